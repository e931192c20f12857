"""What a sweep came to: the record of the best sweep point, and the table of them all."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flexlib.files import atomic_path
from flexlib.layout import RunFolder
from flexlib.records import ChoiceRecord, ResolutionRecord, ValidationRecord
from flexlib.workflow_support.points import SweepPoint
from flexlib.workflow_support.scores import READERS, Score, best_score, choose_point, read_cross_score, read_score

# Of sweep.csv; the swept keys, and gains in nats per particle
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
    "cross_gain",
    "cross_gain_se",
)


def choose_from_files(
    points: Sequence[SweepPoint], records: Sequence[str | Path], out_json: str | Path, choose_by: str = "held_out"
) -> Score:
    """Choose among sweep points and record the choice.

    Parameters
    ----------
    points
        The sweep points.
    records
        In their order, each one's ``validation.json``, or that of validate for the cross score.
    out_json
        The ``ChoiceRecord`` to write.
    choose_by
        ``sweep.choose_by``.
    """
    scores = [READERS[choose_by](point, path) for point, path in zip(points, records, strict=True)]
    chosen = choose_point(scores)
    best = best_score(scores) or chosen
    difference, error = chosen.difference(best)
    record = ChoiceRecord(
        **asdict(chosen.point),
        path=chosen.point.path,
        validation_gain=chosen.gain,
        validation_gain_se=chosen.standard_error,
        highest_validation_gain=best.gain,
        highest_validation_gain_path=best.point.path,
        difference_to_best=difference,
        difference_to_best_se=error,
        choose_by=choose_by,
    )
    record.write(out_json)
    return chosen


def summarise_sweep(
    points: Sequence[SweepPoint],
    results_dir: str | Path,
    reconstructed: Sequence[SweepPoint],
    validated: Sequence[SweepPoint],
    out_csv: str | Path,
    choose_by: str = "held_out",
) -> None:
    """Write ``sweep.csv`` from each point's ``ValidationRecord`` and, where there are any, its other records.

    ``difference_to_best`` is a sweep point's held-out gain minus the highest of all, with its standard error
    (``Score.difference``). ``chosen`` marks the one that ``choose_point`` takes among the reconstructed by the score
    that ``choose_by`` names, which the report shows. Where several were reconstructed and none has a score, none is
    chosen. Resolutions are those of the ``reconstructed``, cross gains those of the ``validated``.
    """
    run = RunFolder(Path(results_dir))
    validations = {point: run.train(point.path).validation for point in points}
    scores = {point: read_score(point, path) for point, path in validations.items()}
    cross = {point: read_cross_score(point, run.validate(point.path).record) for point in validated}
    chosen = _chosen([(cross if choose_by == "cross" else scores)[point] for point in reconstructed])
    best = best_score(scores.values())
    rows = []
    for point in points:
        wall_s = ValidationRecord.read(validations[point]).wall_s
        row: dict[str, Any] = {**asdict(point), "wall_s": wall_s, "chosen": point == chosen}
        row |= {"validation_gain": scores[point].gain, "validation_gain_se": scores[point].standard_error}
        if best is not None:
            row["difference_to_best"], row["difference_to_best_se"] = scores[point].difference(best)
        if point in reconstructed:
            row |= read_resolutions(run.reconstruct(point.path).resolution)
        if point in cross:
            row |= {"cross_gain": cross[point].gain, "cross_gain_se": cross[point].standard_error}
        rows.append(row)
    write_sweep_table(rows, out_csv)


def _chosen(candidates: Sequence[Score]) -> SweepPoint | None:
    if len(candidates) == 1:
        return candidates[0].point
    return choose_point(candidates).point if any(math.isfinite(score.gain) for score in candidates) else None


def read_resolutions(path: str | Path) -> dict[str, float]:
    """Resolutions in Angstrom at FSC 0.143 from a ``resolution.json``: flexible and, where there is one, rigid."""
    resolutions_A = ResolutionRecord.read(path).resolutions_A
    return {
        f"resolution_{kind}_A": resolutions_A[f"{kind}_0.143"]
        for kind in ("flex", "rigid")
        if f"{kind}_0.143" in resolutions_A
    }


def write_sweep_table(rows: Iterable[Mapping[str, Any]], path: str | Path) -> None:
    """Write ``sweep.csv``: one row a sweep point, the columns ``COLUMNS``; what a point does not have is left empty."""
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else ""
    return str(value).lower() if isinstance(value, bool) else value
