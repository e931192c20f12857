"""The sweep: its points, where each lives on disk, which point is best, and the table of them all.

Plain Python only: the workflow imports this each time it is parsed.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from flexlib.errors import InputError
from flexlib.files import atomic_path, read_json, write_json

# Where a point lives below results/<name>/<stage>/, as a Snakemake pattern
MESH_PATTERN = "cells~{cells}"
POINT_PATTERN = "cells~{cells}/dims~{dims}/rigidity~{rigidity}/seed~{seed}"

HELD_OUT = "held_out.csv"  # beside validation.json: the score of each held-out particle

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
    particles: Mapping[int, float] = field(default_factory=dict)  # row of particles.star -> its gain

    def difference(self, other: Score) -> tuple[float, float]:
        """Gain minus that of ``other``, and its standard error.

        Particles differ far more than settings do. Where both held out the same ones, the error is that of the mean
        of their differences, particle by particle; else (another seed holds out others) both errors add in square.
        """
        if self.particles.keys() == other.particles.keys() and len(self.particles) > 1:
            differences = [gain - other.particles[row] for row, gain in self.particles.items()]
            return fmean(differences), stdev(differences) / math.sqrt(len(differences))
        errors = [error for error in (self.standard_error, other.standard_error) if math.isfinite(error)]
        return self.gain - other.gain, math.hypot(*errors)


def sweep_points(config: Mapping[str, Any]) -> list[SweepPoint]:
    """The points of a checked config; one when nothing is a list.

    They are the product of the lists, in the order given, without those that agree with an entry of ``sweep.exclude``,
    and the points of ``sweep.points``. An entry of ``points`` names what differs; what it does not name is the first
    value of the key's list.

    Raises
    ------
    InputError
        Two values or points that are the same (2 and 2.0); an entry of ``exclude`` that no point agrees with; nothing
        is left.
    """
    cells = _values("mesh.cells", config["mesh"]["cells"], int)
    dims = _values("train.latent_dims", config["train"]["latent_dims"], int)
    rigidity = _values("train.rigidity", config["train"]["rigidity"], float)
    seeds = _values("train.seed", config["train"]["seed"], int)
    product = [SweepPoint(*values) for values in itertools.product(cells, dims, rigidity, seeds)]
    excluded = select_points(product, config["sweep"]["exclude"], "sweep.exclude")
    points = [point for point in product if point not in excluded]
    for entry in config["sweep"]["points"]:
        point = SweepPoint(**{**asdict(product[0]), **entry, "rigidity": float(entry.get("rigidity", rigidity[0]))})
        if point in points:
            raise InputError(f"config: sweep.points: {dict(entry)} is a point of the sweep already")
        points.append(point)
    if not points:
        raise InputError("config: sweep.exclude: no point is left")
    return points


def _values(key: str, value: Any, number: Callable[[Any], Any]) -> list[Any]:
    values = [number(item) for item in (value if isinstance(value, list) else [value])]
    if len(set(values)) < len(values):
        raise InputError(f"config: {key}: {values} names one value twice")
    return values


def select_points(
    points: Sequence[SweepPoint], wanted: Sequence[Mapping[str, Any]], key: str = "reconstruct.points"
) -> list[SweepPoint]:
    """The points that agree with at least one of ``wanted`` (under ``key``), each a choice of some or all swept keys.

    Raises
    ------
    InputError
        An entry of ``wanted`` that no point agrees with.
    """
    chosen = []
    for entry in wanted:
        matches = [point for point in points if all(getattr(point, name) == entry[name] for name in entry)]
        if not matches:
            raise InputError(f"config: {key}: {dict(entry)} is no point of the sweep")
        chosen += matches
    return [point for point in points if point in chosen]


def choose_point(scores: Sequence[Score]) -> Score:
    """The simplest point within one standard error of the best held-out score (the one-standard-error rule).

    The standard error is the best point's own, over the held-out particles. (That of the paired difference is far
    smaller, and one such error is what chance alone gives the luckiest of a dozen points that are equally good.)
    Simplest is, in this order: fewer latent dimensions, coarser mesh, higher rigidity. Points that differ in the seed
    alone are equally simple: the one with the higher score is taken.

    Raises
    ------
    InputError
        No point has a score.
    """
    best = best_score(scores)
    if best is None:
        raise InputError(
            "no point has a held-out score, so none is best: set train.validation_fraction above 0 "
            "or name the points in reconstruct.points"
        )
    error = best.standard_error if math.isfinite(best.standard_error) else 0.0
    near = [score for score in scores if score.gain >= best.gain - error]
    return min(near, key=_simplicity)


def best_score(scores: Iterable[Score]) -> Score | None:
    """The highest held-out score; None where no point has one."""
    return max((score for score in scores if math.isfinite(score.gain)), key=lambda score: score.gain, default=None)


def _simplicity(score: Score) -> tuple[float, ...]:
    point = score.point
    return (point.latent_dims, point.cells, -point.rigidity, -score.gain, point.seed)


def read_score(point: SweepPoint, validation_json: str | Path) -> Score:
    """The score in a point's ``validation.json`` and ``held_out.csv`` beside it; nan where nothing was held out."""
    validation = read_json(validation_json)
    gain, error = (validation.get(key) for key in ("validation_gain", "validation_gain_se"))
    with Path(validation_json).with_name(HELD_OUT).open(newline="") as file:
        particles = {int(row["row"]): float(row["gain"]) for row in csv.DictReader(file)}
    return Score(
        point, math.nan if gain is None else float(gain), math.nan if error is None else float(error), particles
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
