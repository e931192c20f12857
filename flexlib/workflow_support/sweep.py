"""The sweep: its points, where each lives on disk, which point is best, and the table of them all.

Plain Python only: the workflow imports this each time it is parsed.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flexlib.files import atomic_path, read_json, write_json
from flexlib.workflow_support.points import SweepPoint
from flexlib.workflow_support.scores import Score, best_score, choose_point, read_score

# Of sweep.csv; the points' keys, and gains in nats per particle
COLUMNS = (
    "cells",
    "latent_dims",
    "rigidity",
    "seed",
    "validation_gain",
    "validation_gain_se",
    "resolution_flex_A",
    "resolution_rigid_A",
    "wall_s",
    "chosen",
    "difference_to_best",
    "difference_to_best_se",
)


def choose_from_files(points: Sequence[SweepPoint], validations: Sequence[str | Path], out_json: str | Path) -> Score:
    """Choose among trained points by their ``validation.json`` (in the order of ``points``) and record the choice."""
    scores = [read_score(point, path) for point, path in zip(points, validations, strict=True)]
    chosen = choose_point(scores)
    best = best_score(scores) or chosen
    difference, error = chosen.difference(best)
    write_json(
        out_json,
        {
            **asdict(chosen.point),
            "path": chosen.point.path,
            "validation_gain": chosen.gain,
            "validation_gain_se": chosen.standard_error,
            "highest_validation_gain": best.gain,
            "highest_validation_gain_path": best.point.path,
            "difference_to_best": difference,
            "difference_to_best_se": error,
        },
    )
    return chosen


def summarise_sweep(
    points: Sequence[SweepPoint],
    results_dir: str | Path,
    reconstructed: Sequence[SweepPoint],
    out_csv: str | Path,
) -> None:
    """Write ``sweep.csv`` from each point's ``validation.json`` and, of the reconstructed ones, ``resolution.json``.

    ``difference_to_best`` is a point's gain minus the highest of all, with its standard error (``Score.difference``).
    ``chosen`` marks the point that ``choose_point`` takes among the reconstructed ones: the one that the report shows.
    Where several were reconstructed and none has a held-out score, none is chosen.
    """
    results_dir = Path(results_dir)
    validations = {point: results_dir / "train" / point.path / "validation.json" for point in points}
    scores = {point: read_score(point, path) for point, path in validations.items()}
    chosen = _chosen([scores[point] for point in reconstructed])
    best = best_score(scores.values())
    rows = []
    for point in points:
        wall_s = read_json(validations[point]).get("wall_s")
        row: dict[str, Any] = {**asdict(point), "wall_s": wall_s, "chosen": point == chosen}
        row |= {"validation_gain": scores[point].gain, "validation_gain_se": scores[point].standard_error}
        if best is not None:
            row["difference_to_best"], row["difference_to_best_se"] = scores[point].difference(best)
        if point in reconstructed:
            row |= read_resolutions(results_dir / "reconstruct" / point.path / "resolution.json")
        rows.append(row)
    write_sweep_table(rows, out_csv)


def _chosen(candidates: Sequence[Score]) -> SweepPoint | None:
    if len(candidates) == 1:
        return candidates[0].point
    return choose_point(candidates).point if any(math.isfinite(score.gain) for score in candidates) else None


def read_resolutions(path: str | Path) -> dict[str, float]:
    """Resolutions in Angstrom at FSC 0.143 from a ``resolution.json``: flexible and, where there is one, rigid."""
    resolutions = read_json(path)
    return {
        f"resolution_{kind}_A": resolutions[f"{kind}_0.143_A"]
        for kind in ("flex", "rigid")
        if f"{kind}_0.143_A" in resolutions
    }


def write_sweep_table(rows: Iterable[Mapping[str, Any]], path: str | Path) -> None:
    """Write ``sweep.csv``: one row a point, the columns ``COLUMNS``; what a point does not have is left empty."""
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else ""
    return str(value).lower() if isinstance(value, bool) else value
