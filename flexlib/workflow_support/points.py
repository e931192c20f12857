"""The sweep points that a config asks for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flexlib.errors import InputError
from flexlib.layout import MESH_PATTERN, POINT_PATTERN

_MOST_POINTS = 10_000


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


def sweep_points(config: Mapping[str, Any]) -> list[SweepPoint]:
    """The points of a checked config; one when nothing is a list.

    They are the product of the lists, in the order given, without those that agree with an entry of ``sweep.exclude``,
    and the points of ``sweep.points``. An entry of ``points`` names what differs; what it does not name is the first
    value of the key's list.

    Raises
    ------
    InputError
        Two values or points that are the same (2 and 2.0); an entry of ``exclude`` that no point agrees with; nothing
        is left; more points than any machine could train.
    """
    cells = _values("mesh.cells", config["mesh"]["cells"], int)
    dims = _values("train.latent_dims", config["train"]["latent_dims"], int)
    rigidity = _values("train.rigidity", config["train"]["rigidity"], float)
    seeds = _values("train.seed", config["train"]["seed"], int)
    number = math.prod(map(len, (cells, dims, rigidity, seeds)))
    if number > _MOST_POINTS:
        raise InputError(f"config: the sweep's lists make {number} points, more than {_MOST_POINTS}")
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


def select_points(points: Sequence[SweepPoint], wanted: Sequence[Mapping[str, Any]], key: str) -> list[SweepPoint]:
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


def wanted_points(points: Sequence[SweepPoint], config: Mapping[str, Any], stage: str) -> list[SweepPoint]:
    """The points that ``points`` of a stage's section lists; all of them where it is a word.

    Raises
    ------
    InputError
        An entry that no point agrees with.
    """
    wanted = config[stage]["points"]
    return select_points(points, wanted, f"{stage}.points") if isinstance(wanted, list) else list(points)
