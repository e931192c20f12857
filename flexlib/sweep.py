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


def summarise_sweep(
    points: Sequence[SweepPoint],
    results_dir: str | Path,
    reconstructed: Sequence[SweepPoint],
    out_csv: str | Path,
) -> None:
    """Write ``sweep.csv`` from each point's ``validation.json`` and, of the reconstructed ones, ``resolution.json``.

    ``chosen`` marks the point that ``choose_point`` takes among the reconstructed ones: the one that the report shows.
    Where several were reconstructed and none has a held-out score, none is chosen.
    """
    results_dir = Path(results_dir)
    validations = {point: read_json(results_dir / "train" / point.path / "validation.json") for point in points}
    scores = {point: read_score(point, validation) for point, validation in validations.items()}
    chosen = _chosen([scores[point] for point in reconstructed])
    rows = []
    for point in points:
        row = {**asdict(point), "wall_s": validations[point].get("wall_s"), "chosen": point == chosen}
        row |= {"validation_gain": scores[point].gain, "validation_gain_se": scores[point].standard_error}
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
