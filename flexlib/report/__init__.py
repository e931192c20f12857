"""The self-contained HTML report of one run; heavy imports wait until a report is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_report(results_dir: Path, out_html: Path, config: dict[str, Any], truth: Path | None = None) -> None:
    """Write ``report.html`` (one file, no network) and ``summary.png`` beside it from a results folder.

    Parameters: ``results_dir`` is results/<name> (docs/architecture.md); whatever is missing there becomes a sentence
    in the report. ``config`` is the run's configuration, printed as YAML. ``truth`` is an .npz of a simulation whose
    ``angles_rad`` (n, d) has the rows of the input particle file.
    """
    from flexlib.report.morph import summary_figure
    from flexlib.report.page import build_page
    from flexlib.report.results import Results

    results = Results(Path(results_dir), config, None if truth is None else Path(truth))
    morphs = build_page(results, Path(out_html))
    summary_figure(results, Path(out_html).with_name("summary.png"), morphs[0] if morphs else None)


def write_summary_figure(results_dir: Path, out_png: Path, truth: Path | None = None) -> bool:
    """Write one picture of a run: latents, morph frames, FSC; False (nothing written) where there is none of them."""
    from flexlib.report.morph import summary_figure
    from flexlib.report.results import Results

    return summary_figure(Results(Path(results_dir), {}, None if truth is None else Path(truth)), Path(out_png))
