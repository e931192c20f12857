"""The path of least free energy between two conformations.

Of all ways along neighbouring cells the one of least resistance is taken: the integral of 1/p over the length (S. Huo
and J. E. Straub, J. Chem. Phys. 107 (1997) 5000, the path of maximum flux at the temperature of the free energies),
with lengths in Angstrom of motion. Of more than two latents it is a path in the first two; the others follow as the
mean of the particles there.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.ndimage import gaussian_filter1d
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import dijkstra

from flexlib.generate.curve import principal_curve
from flexlib.interpret.landscape import Landscape
from flexlib.interpret.observations import Observations

_FINE = 400  # points in which the way along cells is smoothed
_SMOOTHING_CELLS = 1.5  # steps of the way, standard deviation


def path_ends(landscape: Landscape, basin: np.ndarray, seen: Observations, metric: np.ndarray) -> np.ndarray:
    """(2, K): the bottoms of the two most populated basins, or of one, the ends of the particles' principal curve."""
    if basin.max() == 0:
        return principal_curve(seen.latents, 2, metric)
    tops = [np.flatnonzero(basin == number)[landscape.values[basin == number].argmax()] for number in (0, 1)]
    ends = landscape.points[tops]
    return ends if ends[0, 0] <= ends[1, 0] else ends[::-1]


def least_path(landscape: Landscape, ends: np.ndarray, frames: int, metric: np.ndarray) -> np.ndarray:
    """(frames, K) latents from one end (K,) to the other, in steps of equal motion.

    Parameters
    ----------
    landscape
        Of all the latents.
    ends
        (2, K).
    frames
        Number of points.
    metric
        (K, K) square Angstrom for a squared step of latents.
    """
    points, dims = landscape.points, landscape.points.shape[1]
    scale = landscape.density.width
    from_to = ((points[:, None] - ends) / scale) ** 2
    first, last = from_to.sum(2).argmin(0)
    pairs = landscape.pairs
    step = points[pairs[:, 1]] - points[pairs[:, 0]]
    floor = 1e-9 * max(np.trace(metric), 1e-9)
    length = np.sqrt(np.einsum("pk,kl,pl->p", step, metric + floor * np.eye(dims), step))
    resistance = length * np.exp(landscape.free_energy_kT[pairs]).mean(1)
    graph = coo_matrix((resistance, (pairs[:, 0], pairs[:, 1])), (len(points), len(points))).tocsr()
    before = dijkstra(graph, directed=False, indices=first, return_predecessors=True)[1]
    way = [int(last)]
    while way[-1] != first and before[way[-1]] >= 0:
        way.append(int(before[way[-1]]))
    if way[-1] != first:  # no cells between: straight
        way = [int(last), int(first)]
    nodes = np.concatenate([ends[:1], points[way[::-1]][1:-1], ends[1:]])
    return _equal_steps(_smooth(nodes, metric), frames, metric)


def _smooth(nodes: np.ndarray, metric: np.ndarray) -> np.ndarray:
    fine = _equal_steps(nodes, _FINE, metric)
    sigma = _SMOOTHING_CELLS * _FINE / max(len(nodes), 4)
    straight = np.linspace(fine[0], fine[-1], _FINE)
    away = fine - straight
    odd = np.concatenate([-away[:0:-1], away, -away[-2::-1]])  # so that the ends stay where they are
    return straight + gaussian_filter1d(odd, sigma, 0)[_FINE - 1 : 2 * _FINE - 1]


def _equal_steps(nodes: np.ndarray, count: int, metric: np.ndarray) -> np.ndarray:
    """(count, K) points of a polyline at equal lengths."""
    step = np.diff(nodes, axis=0)
    length = np.sqrt(np.maximum(np.einsum("pk,kl,pl->p", step, metric, step), 1e-18))
    along = np.concatenate([[0.0], np.cumsum(length)])
    at = np.linspace(0, along[-1], count)
    return np.stack([np.interp(at, along, column) for column in nodes.T], 1)


def with_others(path: np.ndarray, seen: Observations, width: np.ndarray) -> np.ndarray:
    """(f, K) points of a path (f, k) with the latents beyond the first two: the mean of the particles near each point.

    Near is within about twice the ``width`` (k,) of the density, weighed by a normal distribution.
    """
    dims = path.shape[1]
    if dims == seen.dims:
        return path
    away = ((path[:, None] - seen.latents[:, :dims]) / (2 * width)) ** 2
    logs = -0.5 * away.sum(2) + np.log(seen.weight)
    weight = np.exp(logs - logs.max(1, keepdims=True))
    return np.concatenate([path, weight @ seen.latents[:, dims:] / weight.sum(1, keepdims=True)], 1)


def path_table(landscape: Landscape, path: np.ndarray, whole: np.ndarray, metric: np.ndarray) -> pd.DataFrame:
    """The rows of path.csv: latents, length from the start, free energy over the lowest of the landscape.

    ``path`` (f, k) are the latents of the landscape, ``whole`` (f, K) all of them, with their (K, K) ``metric``.
    """
    density, least = landscape.density, landscape.least
    values, drawn = np.maximum(density.at(path), least), np.maximum(density.bootstraps_at(path), least)
    free = -np.log(values / landscape.values.max())
    error = np.log(drawn).std(1)  # of -ln p itself, as in the landscape
    step = np.diff(whole, axis=0)
    length = np.sqrt(np.maximum(np.einsum("pk,kl,pl->p", step, metric, step), 0.0))
    known = landscape.is_known(values, error)
    columns = {f"latent_{k + 1}": whole[:, k] for k in range(whole.shape[1])}
    columns |= {
        "motion_A": np.concatenate([[0.0], np.cumsum(length)]),
        "free_energy_kT": np.where(known, free, np.nan),
        "free_energy_se_kT": np.where(known, error, np.nan),
    }
    return pd.DataFrame(columns)
