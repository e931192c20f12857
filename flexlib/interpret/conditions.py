"""Conditions: whether particles that differ in something known beforehand differ in their conformations.

Training saw no condition: there is one model, one latent space and one density of all. Each particle's conformation
is told by that density and its own likelihood as probabilities of some cells of latent space. Their mean over any
particles of that density is the density's, however large the latents' errors are: so a condition with thicker ice or
another defocus does not differ for that alone. The statistic compares the conditions' mean probabilities in units of
their errors (B. L. Welch and G. S. James); its distribution if there were no difference is found by dealing out the
conditions anew, to whole micrographs where each has one condition, for particles of one micrograph have more in common.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.cluster.vq import kmeans2
from threadpoolctl import threadpool_limits

from flexlib.errors import InputError
from flexlib.interpret.density import MOST_PARTICLES, STEPS, Density, likelihoods, maximise
from flexlib.interpret.landscape import Landscape
from flexlib.interpret.observations import Observations
from flexlib.particles.input_rows import InputRows
from flexlib.particles.listed import input_column, listed_particles

logger = logging.getLogger(__name__)

MOST_CONDITIONS = 20
PERMUTATIONS = 1999
_CELLS = 8  # of latent space, that are compared
_UNITS_A_CELL = 5  # units of the smallest condition for each cell at least
_BOOTSTRAPS = 50  # of each condition's populations
_OPTION = "interpret.conditions"


@dataclass(frozen=True)
class Conditions:
    """Which condition each of n particles has."""

    names: list[str]
    label: np.ndarray  # (n,) into ``names``, -1 where it has none


@dataclass(frozen=True)
class Comparison:
    """How the conditions' populations differ, and how likely that is by chance."""

    share: np.ndarray  # (C, basins)
    std_err: np.ndarray  # (C, basins)
    p_value: float
    pairs: dict[tuple[int, int], float]  # p value of each two of more than two, not corrected for their number
    statistic: float
    by_micrograph: bool
    units: np.ndarray  # (C,) micrographs, or images


def read_conditions(wanted: str | list[Path], where: InputRows, passthrough: str | None) -> Conditions:
    """The condition of each particle, from a column of the input or a list of files.

    Raises InputError where there is no such column, a particle is in two files, or conditions are one or very many.
    """
    if isinstance(wanted, str):
        values = input_column(wanted, where, passthrough, _OPTION)
        names, label = np.unique(values, return_inverse=True)
        found, source = Conditions([str(name) for name in names], label), f"{where.path}: column {wanted}"
    else:
        found, source = _of_files([Path(path) for path in wanted], where), "the files named"
    if len(found.names) < 2:
        raise InputError(f"{_OPTION}: {source}: {found.names[0]} is the only condition: there must be two")
    if len(found.names) > MOST_CONDITIONS:
        raise InputError(
            f"{_OPTION}: {source}: {len(found.names)} different values, at most {MOST_CONDITIONS} are compared: take a "
            "column with few values (such as rlnOpticsGroup), or a list of files, one for each condition"
        )
    return found


def _of_files(paths: list[Path], where: InputRows) -> Conditions:
    if len({path.stem for path in paths}) == len(paths):
        names = [path.stem for path in paths]
    else:
        names = [str(path) for path in paths]
    label = np.full(len(where.rows), -1)
    for number, path in enumerate(paths):
        listed = listed_particles(path, where, _OPTION)
        twice = listed & (label >= 0)
        if twice.any():
            row = int(np.argmax(twice))
            raise InputError(
                f"{_OPTION}: {path}: {int(twice.sum())} of its particles are in {paths[label[row]]} too, the first is "
                f"row {where.rows[row] + 1} of {where.path}"
            )
        label[listed] = number
    if (label < 0).any():
        logger.warning("%s: %d particles are in none of the files: left out", _OPTION, int((label < 0).sum()))
    return Conditions(names, label)


@dataclass(frozen=True)
class _Units:
    """What is dealt out as a whole: micrographs, or images with their symmetry copies."""

    label: np.ndarray  # (u,)
    count: np.ndarray  # (u,) weight of its particles
    total: np.ndarray  # (u, d) sums of their probabilities

    @classmethod
    def of(cls, unit: np.ndarray, label: np.ndarray, weight: np.ndarray, values: np.ndarray) -> _Units:
        """Of particles (n,) that belong to units numbered by ``unit``."""
        number = np.unique(unit, return_inverse=True)[1]
        size = number.max() + 1
        first = np.zeros(size, np.int64)
        first[number] = label
        total = np.stack([np.bincount(number, weight * column, size) for column in values.T], 1)
        return cls(first, np.bincount(number, weight, size), total)

    def means(self, label: np.ndarray, conditions: int) -> tuple[np.ndarray, np.ndarray]:
        """(C, d) mean of each condition, and (C, d, d) its error's covariance, from unit to unit."""
        member = (label == np.arange(conditions)[:, None]).astype(np.float64)
        count = np.maximum(member @ self.count, 1e-12)
        mean = member @ self.total / count[:, None]
        dims = self.total.shape[1]
        squares = (self.total[:, :, None] * self.total[:, None]).reshape(len(self.total), -1)
        cross = member @ (self.total * self.count[:, None])
        square = (member @ squares).reshape(-1, dims, dims)
        both = cross[:, :, None] * mean[:, None]
        covariance = square - both - both.transpose(0, 2, 1)
        covariance += (member @ self.count**2)[:, None, None] * mean[:, :, None] * mean[:, None]
        return mean, covariance / count[:, None, None] ** 2

    def statistic(self, label: np.ndarray, conditions: int) -> float:
        """Sum over conditions of squared distances from their common mean, in units of their errors."""
        mean, covariance = self.means(label, conditions)
        ridge = 1e-9 * np.trace(covariance, axis1=1, axis2=2)[:, None, None] * np.eye(mean.shape[1])
        precision = np.linalg.inv(covariance + ridge + 1e-15 * np.eye(mean.shape[1]))
        common = np.linalg.solve(precision.sum(0), np.einsum("cde,ce->d", precision, mean))
        away = mean - common
        return float(np.einsum("cd,cde,ce->", away, precision, away))

    def p_value(self, conditions: int, seed: int) -> tuple[float, float]:
        """The statistic, and the share of permutations (itself counted) with as large a one."""
        rng = np.random.default_rng(seed)
        own = self.statistic(self.label, conditions)
        with threadpool_limits(1, "blas"):
            drawn = [self.statistic(rng.permutation(self.label), conditions) for _ in range(PERMUTATIONS)]
        larger = int((np.array(drawn) >= own * (1 - 1e-12)).sum())
        return own, (1 + larger) / (1 + PERMUTATIONS)


def compare_conditions(
    seen: Observations, label: np.ndarray, micrograph: np.ndarray | None, landscape: Landscape, basin: np.ndarray
) -> Comparison:
    """Compare the conditions ``label`` (n,), from 0, of particles, each of which has one.

    Parameters
    ----------
    seen, label
        The particles.
    micrograph
        (n,) of each; None where it is not known.
    landscape, basin
        The density of all particles and its basins, whose populations are told.
    """
    conditions = int(label.max()) + 1
    whole = micrograph is not None and _constant(micrograph, label)
    unit = micrograph if whole and micrograph is not None else seen.particle
    if not _constant(unit, label):
        raise InputError(f"{_OPTION}: symmetry copies of one image have different conditions")
    smallest = min(len(np.unique(unit[label == one])) for one in range(conditions))
    of_nodes = [(basin == one).astype(np.float64) @ landscape.share for one in range(basin.max() + 1)]
    cells = int(np.clip(smallest // _UNITS_A_CELL, 2, _CELLS))
    cell = _cells(landscape.density, cells)
    tested = [(cell == one).astype(np.float64) for one in range(1, cells)]
    units = _Units.of(unit, label, seen.weight, _probabilities(landscape.density, seen, np.stack(tested, 1)))
    statistic, p_value = units.p_value(conditions, seed=0)
    pairs = {}
    for one in range(conditions):
        for other in range(one + 1, conditions if conditions > 2 else 0):
            of_two = np.isin(units.label, (one, other))
            two = _Units((units.label[of_two] == other).astype(int), units.count[of_two], units.total[of_two])
            pairs[one, other] = two.p_value(2, seed=0)[1]
    share, error = _shares(unit, label, seen, landscape.density, np.stack(of_nodes, 1))
    counts = np.bincount(units.label, minlength=conditions)
    return Comparison(share, error, p_value, pairs, statistic, whole, counts)


def _shares(
    unit: np.ndarray, label: np.ndarray, seen: Observations, density: Density, of_nodes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(C, basins) populations by the density of each condition alone, and their errors by bootstraps over units."""
    rng = np.random.default_rng(0)
    chosen = np.sort(rng.permutation(len(seen))[:MOST_PARTICLES])
    number, some = np.unique(unit[chosen], return_inverse=True)[1], seen.take(chosen)
    likelihood = likelihoods(some, density.nodes, density.width)
    share, error = [], []
    for condition in range(int(label.max()) + 1):
        rows = label[chosen] == condition
        drawn = np.concatenate([np.ones((1, number.max() + 1)), rng.poisson(1.0, (_BOOTSTRAPS, number.max() + 1))]).T
        counts = some.weight[rows, None] * drawn[number[rows]]
        start = np.repeat(np.maximum(density.weight, 1e-9)[:, None], counts.shape[1], 1)
        shares = of_nodes.T @ maximise(likelihood[rows], counts, start, STEPS)
        share.append(shares[:, 0])
        error.append(shares[:, 1:].std(1))
    return np.array(share), np.array(error)


def _constant(unit: np.ndarray, label: np.ndarray) -> bool:
    """Whether all particles of each unit have one label."""
    return len(np.unique(np.stack([unit, label], 1), axis=0)) == len(np.unique(unit))


def _cells(density: Density, count: int) -> np.ndarray:
    """(J,) which of some cells of latent space each node is in, of about equal shares."""
    rng = np.random.default_rng(0)
    draws = density.nodes[rng.choice(len(density.nodes), 4000, p=density.weight / density.weight.sum())]
    draws = (draws + density.width * rng.standard_normal(draws.shape)) / density.width
    centres, _ = kmeans2(draws, count, 30, minit="++", missing="warn", seed=0)
    away = density.nodes[:, None] / density.width - centres
    return np.einsum("jck,jck->jc", away, away).argmin(1)


def _probabilities(density: Density, seen: Observations, of_nodes: np.ndarray) -> np.ndarray:
    """(n, d) sums of the particles' responsibilities over nodes, weighted by (J, d)."""
    parts = []
    for rows in np.array_split(np.arange(len(seen)), max(1, len(seen) // 5000)):
        parts.append(density.responsibilities(seen.take(rows)) @ of_nodes)
    return np.concatenate(parts)


def condition_table(
    conditions: Conditions, seen: Observations, label: np.ndarray, found: Comparison, defocus_um: np.ndarray | None
) -> pd.DataFrame:
    """The rows of conditions.csv: populations of each condition, and what else may differ between them."""
    rows = []
    for number, name in enumerate(conditions.names):
        own = label == number
        row: dict[str, Any] = {"condition": name, "particles": int(own.sum()), "units": int(found.units[number])}
        for basin in range(found.share.shape[1]):
            row[f"basin_{basin + 1}"] = found.share[number, basin]
            row[f"basin_{basin + 1}_se"] = found.std_err[number, basin]
        row["std_err_rms"] = float(np.sqrt((seen.std_err[own] ** 2).mean()))
        row["junk_share"] = float(1 - seen.weight[own].mean())
        row["defocus_um"] = np.nan if defocus_um is None else float(defocus_um[own].mean())
        row["p_value"] = found.p_value
        rows.append(row)
    return pd.DataFrame(rows)
