"""The tables of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from flexlib.records import ChecksumsRecord
from flexlib.report import facts
from flexlib.report.facts import FSC_KINDS, FSC_LABELS, SWEPT
from flexlib.report.formats import NONE, angstrom, duration, file_size, memory_size, number
from flexlib.report.judged import percent

_SHOWN_POINTS = 16  # of the sweep, where the others are folded away
_SHOWN_FILES = 12  # of the inputs, likewise
_STAGES = (
    "simulate",
    "prepare",
    "checksum",
    "mesh",
    "train",
    "choose",
    "generate",
    "reconstruct",
    "train_half",
    "validate",
    "summarise",
    "report",
)
_QUALITY = {
    "num_vertices": ("vertices", ""),
    "num_cells": ("cells", ""),
    "num_segments": ("segments", ""),
    "num_bodies": ("separate bodies", ""),
    "num_voxels": ("voxels in the mask", ""),
    "uncovered_voxels": ("mask voxels outside their cells", ""),
    "volume_total_A3": ("volume of all cells", "Å³"),
    "cell_volume_min_A3": ("smallest cell", "Å³"),
    "cell_volume_max_A3": ("largest cell", "Å³"),
    "dihedral_min_deg": ("smallest dihedral angle", "°"),
    "dihedral_max_deg": ("largest dihedral angle", "°"),
    "voxels_per_cell_min": ("fewest voxels in a cell", ""),
    "voxels_per_cell_median": ("median voxels in a cell", ""),
    "voxels_per_cell_max": ("most voxels in a cell", ""),
    "rigidity_min": ("smallest rigidity weight", ""),
    "rigidity_max": ("largest rigidity weight", ""),
}


@dataclass(frozen=True)
class Table:
    """Text in rows and columns."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    chosen: Sequence[bool] = ()  # of each row whether it is highlighted; rows beyond are not

    def is_chosen(self, row: int) -> bool:
        """Whether a row is highlighted."""
        return row < len(self.chosen) and bool(self.chosen[row])


@dataclass(frozen=True)
class FoldedTable:
    """A table, and one that a reader can unfold below it."""

    shown: Table
    summary: str = ""  # of what is folded away
    rest: Table | None = None


def mesh_tables(quality: Mapping[str, Any]) -> list[Table]:
    """Figures of the mesh, and of each segment where it has some; none where ``quality`` is empty."""
    if not quality:
        return []
    rows = [
        (label, number(quality[key], 7 if isinstance(quality[key], int) else 3, unit).replace(" °", "°"))
        for key, (label, unit) in _QUALITY.items()
        if key in quality
    ]
    segments = [
        (
            str(one["segment"]),
            number(one["num_cells"], 7),
            number(one["num_voxels"], 7),
            number(one["uncovered_voxels"], 7),
            number(one["rigidity_median"], 3),
        )
        for one in quality.get("segments", [])
    ]
    whole = Table(("mesh", ""), rows)
    if not segments:
        return [whole]
    return [whole, Table(("segment", "cells", "voxels", "outside their cells", "median rigidity"), segments)]


def sweep_table(sweep: pd.DataFrame) -> FoldedTable:
    """The sweep points, best first; of many the rest is folded away."""
    ordered = sweep.sort_values("validation_gain", ascending=False)
    head = [
        "",
        *(label for name, label in SWEPT.items() if name in sweep),
        "held-out gain (nats)",
        *(["less than the best by"] if facts.paired(sweep) else []),
        "resolution flexible",
        "rigid",
        "time",
    ]
    rows = []
    for _, row in ordered.iterrows():
        error = row.get("validation_gain_se")
        rows.append(
            [
                "chosen" if row.get("chosen") else "",
                *(f"{row[name]:g}" for name in SWEPT if name in sweep),
                number(row["validation_gain"], 4)
                + ("" if error is None or np.isnan(error) else f" ± {number(error, 2)}"),
                *([_less_than_best(row)] if facts.paired(sweep) else []),
                _resolution_cell(row.get("resolution_flex_A")),
                _resolution_cell(row.get("resolution_rigid_A")),
                duration(row.get("wall_s")),
            ]
        )
    flags = list(ordered["chosen"]) if "chosen" in ordered else []
    whole = Table(head, rows, flags)
    if len(rows) <= _SHOWN_POINTS + 4:
        return FoldedTable(whole)
    shown = [index for index in range(len(rows)) if index < _SHOWN_POINTS or whole.is_chosen(index)]
    best = Table(head, [rows[index] for index in shown], [whole.is_chosen(index) for index in shown])
    return FoldedTable(best, f"All {len(rows)} sweep points", whole)


def _less_than_best(row: pd.Series) -> str:
    """How much less a sweep point gains than the best, with the standard error of the difference."""
    difference, error = row["difference_to_best"], row["difference_to_best_se"]
    return NONE if not difference else f"{number(-difference, 2)} ± {number(error, 2)}"


def time_table(benchmarks: pd.DataFrame) -> FoldedTable | None:
    """Time and memory of each rule, summed over its jobs, and folded away those of each job; None without any."""
    if not len(benchmarks):
        return None
    stage = benchmarks["rule"].str.split("/").str[0]
    order = [name for name in _STAGES if (stage == name).any()]
    order += sorted(set(stage) - set(order))
    rows = []
    for name in order:
        jobs = benchmarks[stage == name]
        times = (duration(jobs["seconds"].sum()), duration(jobs["seconds"].max()))
        rows.append((name, str(len(jobs)), *times, memory_size(jobs["memory_MB"].max())))
    each = Table(
        ("job", "time", "peak memory"),
        [(row.rule, duration(row.seconds), memory_size(row.memory_MB)) for row in benchmarks.itertuples()],
    )
    summed = Table(("rule", "jobs", "time", "longest job", "peak memory"), rows)
    return FoldedTable(summed, "Each job", each) if len(benchmarks) > len(rows) else FoldedTable(summed)


def entanglement_table(found: Sequence[Mapping[str, Any]]) -> Table | None:
    """How much of each latent each group of covariates tells, more than chance marked; None where nothing is known."""
    if not found:
        return None
    names = list(dict.fromkeys(one["covariates"] for one in found))
    latents = sorted({one["latent"] for one in found})
    cells = {(one["latent"], one["covariates"]): one for one in found}
    limits = [max((one["chance_limit"] for one in found if one["covariates"] == name), default=0.0) for name in names]
    rows = [[f"latent {latent}", *(_told_cell(cells.get((latent, name))) for name in names)] for latent in latents] + [
        ["by chance, up to", *(f"{100 * max(limit, 0.0):.1f} %" for limit in limits)]
    ]
    marked = [any(one["more_than_chance"] for one in found if one["latent"] == latent) for latent in latents]
    return Table(("variance told by", *names), rows, marked)


def _told_cell(one: Mapping[str, Any] | None) -> str:
    if one is None:
        return NONE
    return f"{100 * max(one['r2'], 0.0):.1f} %" + " ▲" * bool(one["more_than_chance"])


def checksum_table(checksums: ChecksumsRecord) -> FoldedTable:
    """Sizes and SHA-256 of the input files; of many image stacks all but the first are folded away."""
    rows = [
        (file.path, ", ".join(file.used_as), file_size(file.size_bytes), file.sha256 or "not taken")
        for file in checksums.files
    ]
    head = ("input file", "used as", "size", "SHA-256")
    if len(rows) <= _SHOWN_FILES + 4:
        return FoldedTable(Table(head, rows))
    return FoldedTable(Table(head, rows[:_SHOWN_FILES]), f"All {len(rows)} input files", Table(head, rows))


def _resolution_cell(value: float | None) -> str:
    return NONE if value is None or np.isnan(value) else f"{angstrom(value)} Å"


def resolution_table(fsc: pd.DataFrame) -> Table:
    """Resolution of each curve at 0.143 and 0.5."""
    last = float(fsc["frequency_1_per_A"].max())
    rows = []
    for kind in FSC_KINDS:
        cells = []
        for threshold in (0.143, 0.5):
            for model in ("rigid", "flex"):
                column = facts.fsc_column(fsc, model, kind)
                value = facts.resolution_A(fsc, column, threshold) if column else None
                cells.append(
                    NONE if column is None else f"{angstrom(value)} Å" if value else f"beyond {angstrom(1 / last)} Å"
                )
        if any(cell != NONE for cell in cells):
            rows.append((f"corrected, {FSC_LABELS[kind]}" if kind == "moving" else FSC_LABELS[kind], *cells))
    return Table(("FSC", "rigid, 0.143", "flexible, 0.143", "rigid, 0.5", "flexible, 0.5"), rows)


def region_table(regions: pd.DataFrame) -> Table:
    """Motion and its error in each region of the latent space; those are named where the error exceeds it."""
    latents = [name for name in regions if name.startswith("latent")]
    rows = [
        (
            f"{row['region']:.0f}",
            ", ".join(number(row[name], 2) for name in latents) or NONE,
            number(row["particles"], 7),
            *(f"{row[name]:.2f}" for name in ("motion_A", "error_A", "model_error_A")),
            _ratio_cell(row["error_A"], row["motion_A"]),
        )
        for _, row in regions.iterrows()
    ]
    head = ("region", "latents at its centre", "particles", "motion (Å)", "error (Å)", "of it the flow's own (Å)")
    return Table((*head, "error / motion"), rows)


def _ratio_cell(error_A: float, motion_A: float) -> str:
    if not motion_A > 0:
        return NONE
    return f"{error_A / motion_A:.2f}" + ", not told" * bool(error_A > motion_A)


def calibration_table(calibration: pd.DataFrame) -> Table:
    """Each latent's standard error beside the disagreement of the two models."""
    rows = [
        (
            f"latent {row.latent:.0f}",
            number(row.std_err),
            number(row.model_std_err),
            percent(row.coverage),
            f"{row.factor:.2f}",
        )
        for row in calibration.itertuples()
    ]
    head = ("", "standard error (rms)", "disagreement of the models (rms)", "particles within one standard error")
    return Table((*head, "too small by a factor of"), rows)
