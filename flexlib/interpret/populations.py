"""Populations: the share of the conformations in basins of the landscape and in regions that a user names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from flexlib.interpret.landscape import Landscape
from flexlib.interpret.observations import Observations
from flexlib.particles.input_rows import InputRows
from flexlib.particles.listed import listed_particles
from flexlib.runtime import kd_tree

_ERRORS = 2.0  # standard errors on either side of the log odds that make the 95 % interval
_VOTES = 9  # particles nearest to a cell that say whether it is of a region
_REGION = 0.85  # of a list and the region that it marks out, that must be common (Dice's coefficient)


@dataclass(frozen=True)
class Population:
    """The share of the conformations somewhere, with its 95 % interval."""

    name: str
    kind: str  # "basin", "region" of latent space, or "list" of particles that is none
    share: float
    std_err: float
    low: float
    high: float
    counted: float  # share of the particles by their latents alone
    centre: np.ndarray  # (K,) mean conformation


def basin_populations(landscape: Landscape, basin: np.ndarray, seen: Observations) -> list[Population]:
    """Of each basin, the largest first."""
    nearest = _nearest_cell(landscape, seen.latents)
    found = []
    for number in range(basin.max() + 1):
        inside = basin == number
        counted = _share(inside[nearest], seen)
        found.append(_of_cells(landscape, inside, f"basin {number + 1}", "basin", counted))
    return found


def region_populations(
    landscape: Landscape, seen: Observations, paths: list[Path], where: InputRows
) -> list[Population]:
    """Of each list of particles: of the region of latent space that it marks out, or of the list itself.

    A list says of particles, not of places, whether they are inside. A cell is inside where most of the particles
    nearest to it are. If particles were chosen by their latents this region holds them and few others; the share is
    then that of the conformations there, whatever the latents' errors. Otherwise the list was chosen by something
    else, and all there is to tell is its share of the particles.
    """
    found = []
    for number, path in enumerate(paths, 1):
        listed = listed_particles(path, where, "interpret.regions")[seen.row]
        name, counted = f"{Path(path).stem} ({number})", _share(listed, seen)
        scale = landscape.density.width
        votes = kd_tree(seen.latents / scale).query(landscape.points / scale, min(_VOTES, len(seen)))[1]
        inside = listed[votes.reshape(len(landscape.points), -1)].mean(1) > 0.5
        there = inside[_nearest_cell(landscape, seen.latents)]
        common = 2 * _share(there & listed, seen) / max(_share(there, seen) + counted, 1e-12)
        if common >= _REGION:
            found.append(_of_cells(landscape, inside, name, "region", counted))
        else:
            found.append(_of_list(listed, seen, name))
    return found


def _of_cells(landscape: Landscape, inside: np.ndarray, name: str, kind: str, counted: float) -> Population:
    share, drawn = landscape.mass(inside)
    of_cells = landscape.share @ landscape.density.weight * inside
    centre = of_cells @ landscape.points / max(of_cells.sum(), 1e-12)
    low, high = interval(share, float(drawn.std()))
    return Population(name, kind, share, float(drawn.std()), low, high, counted, centre)


def interval(share: float, error: float) -> tuple[float, float]:
    """The 95 % interval of a share with this standard error: symmetric in its log odds, so within 0 and 1."""
    if not 0 < share < 1:
        return share, share
    odds, reach = np.log(share / (1 - share)), _ERRORS * error / (share * (1 - share))
    low, high = 1 / (1 + np.exp(-(odds + np.array([-reach, reach]))))
    return float(low), float(high)


def _of_list(listed: np.ndarray, seen: Observations, name: str) -> Population:
    """A share of particles, with Wilson's interval."""
    share, count = _share(listed, seen), seen.weight.sum()
    z2 = 1.96**2 / count
    middle, half = share + z2 / 2, np.sqrt(z2 * share * (1 - share) + z2**2 / 4)
    low, high = (middle - half) / (1 + z2), (middle + half) / (1 + z2)
    error = float(np.sqrt(share * (1 - share) / count))
    weight = listed * seen.weight
    centre = weight @ seen.latents / max(weight.sum(), 1e-12)
    return Population(name, "list", share, error, float(low), float(high), share, centre)


def _share(inside: np.ndarray, seen: Observations) -> float:
    return float(seen.weight @ inside / seen.weight.sum())


def _nearest_cell(landscape: Landscape, latents: np.ndarray) -> np.ndarray:
    scale = landscape.density.width
    return kd_tree(landscape.points / scale).query(latents / scale)[1]


def population_table(populations: list[Population]) -> pd.DataFrame:
    """The rows of populations.csv."""
    rows = []
    for one in populations:
        centre = {f"latent_{k + 1}": value for k, value in enumerate(one.centre)}
        shares = {"share": one.share, "share_se": one.std_err, "low": one.low, "high": one.high}
        rows.append({"name": one.name, "kind": one.kind, **shares, "counted": one.counted, **centre})
    return pd.DataFrame(rows)
