"""The curve through the middle of the particles in latent space."""

from __future__ import annotations

import numpy as np

from flexlib.generate.series import PERCENTILES

_SEED = 0

_SAMPLE = 5000  # particles that draw the principal curve
_NODES = 60  # of the polyline that the principal curve is
_WIDTHS = (np.inf, 0.6, 0.4, 0.25, 0.15)  # of the smoothing, as parts of the curve's range; infinite is straight
_PASSES = 8  # at each width


def principal_curve(latents: np.ndarray, frames: int, metric: np.ndarray | None = None) -> np.ndarray:
    """(frames, K) latents along the curve through the middle of the particles, in equal steps.

    Each point of the curve is the mean of the particles that project onto it (T. Hastie and W. Stuetzle, J. Am. Stat.
    Assoc. 84 (1989) 502), smoothed by local lines along the curve, from a straight start with wide to narrow widths.
    The width is kept whose tube around the curve (length times rms distance of the particles) is smallest: so a bent
    cloud is followed, and a round one is crossed straight. The ends are at ``PERCENTILES`` of the particles along it.

    By hand: scipy and scikit-learn were considered; neither has principal curves.

    Parameters
    ----------
    latents
        (n, K) of the particles; at most 5,000 are used.
    frames
        Number of points.
    metric
        (K, K) positive semidefinite: lengths are ``sqrt(dz' metric dz)``. With the mean squared displacement per
        squared latent step these are Angstrom: the curve follows what moves most, in steps of equal motion.
    """
    rows = np.random.default_rng(_SEED).permutation(len(latents))[:_SAMPLE]
    chosen = latents[np.sort(rows)]
    to_length = _square_root(metric, latents.shape[1])
    cloud = chosen @ to_length
    centred = cloud - cloud.mean(0)
    direction = np.linalg.eigh(centred.T @ centred)[1][:, -1]
    direction = direction * (np.sign(direction[np.argmax(np.abs(direction))]) or 1.0)
    along = centred @ direction
    first, last = np.quantile(along, (0.005, 0.995))
    nodes = cloud.mean(0) + np.linspace(first, last, _NODES)[:, None] * direction
    smallest = np.inf
    for width in _WIDTHS:
        for _ in range(0 if np.isinf(width) else _PASSES):
            nodes = _smooth_along(along, cloud, np.quantile(along, np.linspace(0.005, 0.995, _NODES)), width)
            along, _ = _project(cloud, nodes)
        along, squared = _project(cloud, nodes)
        length = np.linalg.norm(np.diff(nodes, axis=0), axis=1).sum()
        tube = length * np.sqrt(squared.mean())
        if tube < smallest:
            smallest, best = tube, (nodes, along)
    nodes, along = best
    low, high = np.percentile(along, PERCENTILES)
    steps = _at_length(nodes, np.linspace(low, high, frames))
    return steps @ np.linalg.inv(to_length)


def _square_root(metric: np.ndarray | None, dims: int) -> np.ndarray:
    """(K, K) symmetric root of a metric; the identity where there is none or it is flat."""
    if metric is None:
        return np.eye(dims)
    values, vectors = np.linalg.eigh(metric)
    if values[-1] <= 1e-12:  # nothing moves
        return np.eye(dims)
    values = np.maximum(values, 1e-6 * values[-1])
    return (vectors * np.sqrt(values)) @ vectors.T


def _smooth_along(along: np.ndarray, cloud: np.ndarray, at: np.ndarray, width: float) -> np.ndarray:
    """(m, K) local linear fits of (n, K) ``cloud`` over (n,) ``along`` at (m,) ``at``; ``width`` of the whole range."""
    sigma = max(width * (at[-1] - at[0]) / 2, 1e-9)
    offset = along[None] - at[:, None]
    weight = np.exp(-0.5 * (offset / sigma) ** 2)
    s0, s1, s2 = weight.sum(1), (weight * offset).sum(1), (weight * offset**2).sum(1)
    kernel = weight * (s2[:, None] - s1[:, None] * offset)
    return kernel @ cloud / np.maximum(s0 * s2 - s1**2, 1e-12)[:, None]


def _project(cloud: np.ndarray, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the point of the polyline (m, K) nearest to each of (n, K): (n,) length along it, (n,) squared distance."""
    edges = np.diff(nodes, axis=0)
    squared = np.maximum((edges**2).sum(1), 1e-18)
    start = np.concatenate([[0.0], np.cumsum(np.sqrt(squared))])
    from_node = cloud[:, None] - nodes[None, :-1]
    part = np.clip((from_node * edges).sum(2) / squared, 0, 1)
    distance = ((from_node - part[..., None] * edges) ** 2).sum(2)
    nearest = distance.argmin(1)
    rows = np.arange(len(cloud))
    return start[nearest] + part[rows, nearest] * np.sqrt(squared[nearest]), distance[rows, nearest]


def _at_length(nodes: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Points of a polyline (m, K) at lengths (f,) from its start."""
    steps = np.maximum(np.linalg.norm(np.diff(nodes, axis=0), axis=1), 1e-9)
    start = np.concatenate([[0.0], np.cumsum(steps)])
    return np.stack([np.interp(lengths, start, nodes[:, k]) for k in range(nodes.shape[1])], axis=1)
