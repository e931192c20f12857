"""The sweep: its points, where each lives on disk, which point is best, and the table of them all.

Plain Python only: the workflow imports this each time it is parsed.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flexlib.errors import InputError
from flexlib.files import atomic_path, read_json, write_json

# Where a point lives below results/<name>/<stage>/, as a Snakemake pattern
MESH_PATTERN = "cells~{cells}"
POINT_PATTERN = "cells~{cells}/dims~{dims}/rigidity~{rigidity}/seed~{seed}"

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
)


@dataclass(frozen=True, order=True)
class SweepPoint:
    """One value of each swept key."""

    cells: int
    latent_dims: int
    rigidity: float
    seed: int

    @property
    def path(self) -> str:
        """The point's folder below a stage's; numbers are written as Python writes them, so 2 and 2.0 are one point."""
        return POINT_PATTERN.format(cells=self.cells, dims=self.latent_dims, rigidity=self.rigidity, seed=self.seed)

    @property
    def mesh_path(self) -> str:
        """The folder of the point's mesh, shared by all points of one coarseness."""
        return MESH_PATTERN.format(cells=self.cells)


@dataclass(frozen=True)
class Score:
    """The held-out score of one trained point, in nats per particle, flexible minus rigid."""

    point: SweepPoint
    gain: float
    standard_error: float


def sweep_points(config: Mapping[str, Any]) -> list[SweepPoint]:
    """The product of the lists in a checked config, in the order given; one point when nothing is a list.

    Raises
    ------
    InputError
        Two values that are the same number (2 and 2.0).
    """
    cells = _values("mesh.cells", config["mesh"]["cells"], int)
    dims = _values("train.latent_dims", config["train"]["latent_dims"], int)
    rigidity = _values("train.rigidity", config["train"]["rigidity"], float)
    seeds = _values("train.seed", config["train"]["seed"], int)
    return [SweepPoint(*values) for values in itertools.product(cells, dims, rigidity, seeds)]


def _values(key: str, value: Any, number: Callable[[Any], Any]) -> list[Any]:
    values = [number(item) for item in (value if isinstance(value, list) else [value])]
    if len(set(values)) < len(values):
        raise InputError(f"config: {key}: {values} names one value twice")
    return values


def select_points(points: Sequence[SweepPoint], wanted: Sequence[Mapping[str, Any]]) -> list[SweepPoint]:
    """The points that agree with at least one of ``wanted``, each a choice of some or all swept keys.

    Raises
    ------
    InputError
        An entry of ``wanted`` that no point agrees with.
    """
    chosen = []
    for entry in wanted:
        matches = [point for point in points if all(asdict(point)[key] == value for key, value in entry.items())]
        if not matches:
            raise InputError(f"config: reconstruct.points: {dict(entry)} is no point of the sweep")
        chosen += matches
    return [point for point in points if point in chosen]


def choose_point(scores: Sequence[Score]) -> Score:
    """The simplest point within one standard error of the best held-out score (the one-standard-error rule).

    Simplest is, in this order: fewer latent dimensions, higher rigidity, coarser mesh. Points that differ in the seed
    alone are equally simple: the one with the higher score is taken.

    Raises
    ------
    InputError
        No point has a score.
    """
    known = [score for score in scores if math.isfinite(score.gain)]
    if not known:
        raise InputError(
            "no point has a held-out score, so none is best: set train.validation_fraction above 0 "
            "or name the points in reconstruct.points"
        )
    best = max(known, key=lambda score: score.gain)
    margin = best.standard_error if math.isfinite(best.standard_error) else 0.0
    within = [score for score in known if score.gain >= best.gain - margin]
    return min(within, key=_simplicity)


def _simplicity(score: Score) -> tuple[float, ...]:
    point = score.point
    return (point.latent_dims, -point.rigidity, point.cells, -score.gain, point.seed)


def read_score(point: SweepPoint, validation: Mapping[str, Any]) -> Score:
    """The score in a point's ``validation.json``; nan where nothing was held out."""
    gain, error = (validation.get(key) for key in ("validation_gain", "validation_gain_se"))
    return Score(point, math.nan if gain is None else float(gain), math.nan if error is None else float(error))


def choose_from_files(points: Sequence[SweepPoint], validations: Sequence[str | Path], out_json: str | Path) -> Score:
    """Choose among trained points by their ``validation.json`` (in the order of ``points``) and record the choice."""
    scores = [read_score(point, read_json(path)) for point, path in zip(points, validations, strict=True)]
    chosen = choose_point(scores)
    write_json(
        out_json,
        {
            **asdict(chosen.point),
            "path": chosen.point.path,
            "validation_gain": chosen.gain,
            "validation_gain_se": chosen.standard_error,
            "highest_validation_gain": max(score.gain for score in scores if math.isfinite(score.gain)),
        },
    )
    return chosen


def summarise_sweep(points: Sequence[SweepPoint], results_dir: str | Path, out_csv: str | Path) -> None:
    """Write ``sweep.csv`` from each point's ``validation.json`` and, where it was reconstructed, ``fsc.csv``.

    ``chosen`` marks the point of ``choose_point``; nobody is chosen where nothing was held out.
    """
    results_dir = Path(results_dir)
    validations = [read_json(results_dir / "train" / point.path / "validation.json") for point in points]
    scores = [read_score(point, content) for point, content in zip(points, validations, strict=True)]
    chosen = choose_point(scores).point if any(math.isfinite(score.gain) for score in scores) else None
    rows = [
        {
            **asdict(score.point),
            "validation_gain": score.gain,
            "validation_gain_se": score.standard_error,
            **read_resolutions(results_dir / "reconstruct" / score.point.path),
            "wall_s": content.get("wall_s"),
            "chosen": score.point == chosen,
        }
        for score, content in zip(scores, validations, strict=True)
    ]
    write_sweep_table(rows, out_csv)


def read_resolutions(reconstruct_dir: str | Path, threshold: float = 0.143) -> dict[str, float]:
    """Resolutions in Angstrom of a reconstructed point, from its ``fsc.csv``; empty where there is none.

    The resolution is where the half-map FSC first falls below ``threshold``, linear between shells; that of the last
    shell where it never does.
    """
    path = Path(reconstruct_dir) / "fsc.csv"
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    frequency = [float(row["frequency_1_per_A"]) for row in rows]
    curves = {
        kind: [float(row[f"fsc_{kind}"]) for row in rows] for kind in ("flex", "rigid") if f"fsc_{kind}" in rows[0]
    }
    return {f"resolution_{kind}_A": 1 / _crossing(frequency, curve, threshold) for kind, curve in curves.items()}


def _crossing(frequency: Sequence[float], curve: Sequence[float], threshold: float) -> float:
    for index in range(1, len(curve)):
        if curve[index] < threshold:
            before, after = curve[index - 1], curve[index]
            share = (before - threshold) / (before - after) if before > threshold else 0.0
            return frequency[index - 1] + share * (frequency[index] - frequency[index - 1])
    return frequency[-1]


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
