"""The self-contained HTML report of one run; heavy imports wait until a report is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flexlib.layout import RunFolder


def write_report(results_dir: Path, out_html: Path, config: dict[str, Any], truth: Path | None = None) -> None:
    """Write ``report.html`` of a results folder (one file, no network), ``summary.png`` and ``chimerax.cxc`` beside it.

    Parameters
    ----------
    results_dir
        The run's folder, results/<name>; whatever is missing there becomes a sentence in the report.
    out_html
        The report to write.
    config
        The run's configuration, printed as YAML.
    truth
        An .npz of a simulation whose ``angles_rad`` (n, d) has the rows of the input particle file.
    """
    from flexlib.report.chimerax import write_scene
    from flexlib.report.morph import render_gallery
    from flexlib.report.page import build_page
    from flexlib.report.results import Results
    from flexlib.report.summary import summary_figure

    results = Results(Path(results_dir), config, None if truth is None else Path(truth))
    gallery = render_gallery(results)
    build_page(results, gallery, Path(out_html))
    beside = RunFolder(Path(out_html).parent)
    write_scene(results, beside.scene)
    summary_figure(results, gallery, beside.summary)


def write_summary_figure(results_dir: Path, out_png: Path, truth: Path | None = None) -> bool:
    """Write one picture of a run: latents, motion, maps, FSC.

    Returns
    -------
    bool
        False, and nothing is written, where there is none of them.
    """
    from flexlib.report.morph import render_gallery
    from flexlib.report.results import Results
    from flexlib.report.summary import summary_figure

    results = Results(Path(results_dir), {}, None if truth is None else Path(truth))
    return summary_figure(results, render_gallery(results), Path(out_png))
