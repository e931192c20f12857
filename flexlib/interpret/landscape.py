"""The landscape: the density of conformations in cells of latent space, free energies, and basins between barriers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from flexlib.interpret.density import SPACING, Density
from flexlib.interpret.observations import Observations
from flexlib.runtime import kd_tree

CONFIRMED = 5.0  # standard errors by which a ridge is lower than both basins that it parts: chance has many tries
_FINER = {1: 4, 2: 2}  # cells along an axis for each node of the lattice
_KNOWN_KT = 1.0  # a free energy with a larger error is not told
_LEAST_PARTICLES = 5.0  # at least must the density be worth where it is told


@dataclass(frozen=True)
class Landscape:
    """A density of one or two latents in m cells of a grid."""

    density: Density
    points: np.ndarray  # (m, K) centres of the cells
    share: np.ndarray  # (m, J) float32: of each node's normal, the part that lies in each cell; columns add up to one
    pairs: np.ndarray  # (p, 2) neighbouring cells

    @cached_property
    def values(self) -> np.ndarray:
        """(m,) density."""
        return np.maximum(self.density.at(self.points), self.least)

    @cached_property
    def bootstraps(self) -> np.ndarray:
        """(m, B) its bootstraps."""
        return np.maximum(self.density.bootstraps_at(self.points), self.least)

    @property
    def least(self) -> float:
        """What one particle alone amounts to at the place where it is: lower densities cannot be told from none."""
        return float(1 / (self.density.num_particles * np.prod(self.density.width * np.sqrt(2 * np.pi))))

    @cached_property
    def free_energy_kT(self) -> np.ndarray:
        """(m,) -ln p over that of the densest cell."""
        return -np.log(self.values / self.values.max())

    @cached_property
    def error_kT(self) -> np.ndarray:
        """(m,) standard error of -ln p itself: relative to the densest cell, that cell would seem to have none."""
        return np.log(self.bootstraps).std(1)

    @property
    def known(self) -> np.ndarray:
        """(m,) bool: where there are data enough for a free energy."""
        return self.is_known(self.values, self.error_kT)

    def is_known(self, values: np.ndarray, error_kT: np.ndarray) -> np.ndarray:
        """Whether there are data enough for a free energy where the density has these values and errors."""
        return (values >= _LEAST_PARTICLES * self.least) & (error_kT <= _KNOWN_KT)

    def mass(self, inside: np.ndarray) -> tuple[float, np.ndarray]:
        """The share of the conformations in some cells (m,), as 0 to 1 for each, and (B,) its bootstraps."""
        of_nodes = inside.astype(np.float64) @ self.share
        return float(of_nodes @ self.density.weight), of_nodes @ self.density.bootstraps


def make_landscape(density: Density) -> Landscape:
    """Cells where the density has nodes."""
    points, number = _grid(density)
    share = np.concatenate([kernel.astype(np.float32) for _, kernel in density.kernels(points)])
    share /= np.maximum(share.sum(0), 1e-30)
    return Landscape(density, points, share, _adjacent(number))


def _grid(density: Density) -> tuple[np.ndarray, np.ndarray]:
    """Centres (m, K) of a lattice's cells about the nodes, and their integer numbers (m, K)."""
    step = SPACING * density.width / _FINER[density.dims]
    near = np.unique(np.rint(density.nodes / step).astype(np.int64), axis=0)
    reach = range(-_FINER[density.dims], _FINER[density.dims] + 1)
    steps = np.stack(np.meshgrid(*[list(reach)] * density.dims, indexing="ij"), -1).reshape(-1, density.dims)
    number = np.unique((near[:, None] + steps).reshape(-1, density.dims), axis=0)
    return number * step, number


def _adjacent(number: np.ndarray) -> np.ndarray:
    """(p, 2) cells of a lattice that touch each other, at corners too."""
    return kd_tree(number).query_pairs(1.5, output_type="ndarray")


def find_basins(landscape: Landscape) -> np.ndarray:
    """(m,) the basin of each cell, numbered from 0 by size: only those between which a barrier is confirmed.

    Cells are flooded from the densest down. Where two basins meet is their ridge: it parts them if its density is lower
    than that of the shallower one by more than five standard errors of the difference, by the bootstraps, else they are
    one. (Differences of logarithms will not do: they are least sure of the ridges that hardly any particle is on.)
    """
    values, bootstraps = landscape.values, landscape.bootstraps
    links = _linked(landscape.pairs, len(values))
    peak = np.full(len(values), -1)  # of each flooded cell, the top of its basin
    joined: dict[int, int] = {}

    def top(cell: int) -> int:
        while cell in joined:
            cell = joined[cell]
        return cell

    for cell in np.argsort(-values, kind="stable").tolist():
        tops = sorted({top(int(peak[other])) for other in links[cell] if peak[other] >= 0}, key=lambda t: -values[t])
        peak[cell] = tops[0] if tops else cell
        for place, lower in enumerate(tops[1:], 1):
            by_counting = np.sqrt(landscape.least * values[lower])
            error = max(float((bootstraps[lower] - bootstraps[cell]).std()), by_counting)
            if values[lower] - values[cell] <= CONFIRMED * error:
                joined[lower] = tops[0]
                tops[place] = tops[0]
    basin = np.array([top(int(one)) for one in peak])
    kept = values[basin] >= min(_LEAST_PARTICLES * landscape.least, values.max())
    scaled = landscape.points / landscape.density.width
    basin[~kept] = basin[kept][kd_tree(scaled[kept]).query(scaled[~kept])[1]]  # islands of hardly any particles
    number = np.unique(basin, return_inverse=True)[1]
    sizes = [landscape.mass(number == one)[0] for one in range(number.max() + 1)]
    return np.argsort(np.argsort(-np.array(sizes), kind="stable"))[number]


def _linked(pairs: np.ndarray, count: int) -> list[np.ndarray]:
    """Of each cell the cells that it touches."""
    both = np.concatenate([pairs, pairs[:, ::-1]])
    both = both[np.argsort(both[:, 0], kind="stable")]
    return np.split(both[:, 1], np.searchsorted(both[:, 0], np.arange(1, count)))


def landscape_table(shown: Landscape, seen: Observations) -> pd.DataFrame:
    """The rows of landscape.csv."""
    dims = shown.density.dims
    known, latents = shown.known, seen.latents[:, :dims]
    scaled = kd_tree(latents / shown.density.width)
    reach = SPACING * np.sqrt(dims)
    near = scaled.query_ball_point(shown.points / shown.density.width, reach, return_length=True)
    columns = {f"latent_{k + 1}": shown.points[:, k] for k in range(dims)}
    columns |= {
        "density": shown.density.at(shown.points),
        "density_se": shown.density.bootstraps_at(shown.points).std(1),
        "free_energy_kT": np.where(known, shown.free_energy_kT, np.nan),
        "free_energy_se_kT": np.where(known, shown.error_kT, np.nan),
        "num_particles": near,
    }
    return pd.DataFrame(columns)
