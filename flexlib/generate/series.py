"""Which latent points to show: the spellings of ``generate.series``, the points they stand for, and where data are.

Reading the spellings needs no file and no model: the workflow asks before any job.
"""

from __future__ import annotations

import numpy as np

from flexlib.errors import InputError

PERCENTILES = (2.0, 98.0)  # of the particles: where a series along an axis or the principal curve begins and ends
NEAR_STANDARD_DEVIATIONS = 0.5  # per latent dimension: particles closer to a frame than this are counted beside it
MAX_POINTS = 1000  # a file of more rows is a list of particles, not of frames

_BEYOND_SHARE = 0.05  # a place with fewer particles near than this part of the usual is beyond the data
_SAMPLE = 5000  # particles that draw the principal curve
_NODES = 60  # of the polyline that the principal curve is
_WIDTHS = (np.inf, 0.6, 0.4, 0.25, 0.15)  # of the smoothing, as parts of the curve's range; infinite is straight
_PASSES = 8  # at each width
_COUNTED = 500  # particles whose neighbours are counted, to know the usual
_CLUSTERED = 100_000  # particles that k-means looks at
_SEED = 0


# points --------------------------------------------------------------------------------------------------------------


def axis_points(latents: np.ndarray, axis: int, frames: int) -> np.ndarray:
    """(frames, K) points along one latent axis, the middle one at the origin, the others' coordinates zero.

    ``latents`` (n, K); ``frames`` is odd. The ends are at ``PERCENTILES`` of the particles; frames are evenly spaced on
    either side of the origin. Where an axis' percentiles do not enclose zero, its median stands for it.
    """
    low, high = np.percentile(latents, PERCENTILES, axis=0)
    centre = np.where((low < 0) & (high > 0), 0.0, np.median(latents, axis=0))
    points = np.tile(centre, (frames, 1))
    half = frames // 2
    points[: half + 1, axis] = np.linspace(low[axis], centre[axis], half + 1)
    points[half:, axis] = np.linspace(centre[axis], high[axis], half + 1)
    return points


def line_points(first: np.ndarray, last: np.ndarray, frames: int) -> np.ndarray:
    """(frames, K) points on the straight line between two points (K,), evenly spaced."""
    return first + np.linspace(0, 1, frames)[:, None] * (last - first)


def cluster_points(latents: np.ndarray, count: int) -> np.ndarray:
    """(count, K) particles nearest to the k-means centres of (n, K) latents, in an order of short steps.

    A centre of a bent cloud lies beside it; the particle nearest to it does not. Seeded, so always the same.
    Raises InputError where the particles do not fall into so many clusters.
    """
    from scipy.cluster.vq import ClusterError, kmeans2
    from scipy.spatial import cKDTree

    rows = np.random.default_rng(_SEED).permutation(len(latents))[:_CLUSTERED]
    chosen = latents[np.sort(rows)]
    try:
        if count > len(chosen):
            raise ClusterError
        centres, _ = kmeans2(chosen, count, 50, minit="++", missing="raise", seed=_SEED)
    except ClusterError as error:
        raise InputError(
            f"generate.series: kmeans {count}: {len(latents)} particles do not fall into so many clusters"
        ) from error
    return _short_tour(chosen[cKDTree(chosen).query(centres)[1]])


def _short_tour(points: np.ndarray) -> np.ndarray:
    """The points in an order with short steps: nearest neighbours from an end, then 2-opt."""
    distance = np.linalg.norm(points[:, None] - points[None], axis=2)
    tour = [int(np.argmax(distance.sum(1)))]
    while len(tour) < len(points):
        left = np.setdiff1d(np.arange(len(points)), tour)
        tour.append(int(left[np.argmin(distance[tour[-1], left])]))

    def length(order: list[int]) -> float:
        return float(distance[order[:-1], order[1:]].sum())

    better = True
    while better:
        better = False
        for i in range(len(tour) - 1):
            for j in range(i + 2, len(tour) + 1):
                other = tour[:i] + tour[i:j][::-1] + tour[j:]
                if length(other) < length(tour) - 1e-9:
                    tour, better = other, True
    ordered = points[tour]
    return ordered if ordered[0, 0] <= ordered[-1, 0] else ordered[::-1].copy()


def principal_curve(latents: np.ndarray, frames: int, metric: np.ndarray | None = None) -> np.ndarray:
    """(frames, K) points along the curve through the middle of the particles, in equal steps.

    Each point of the curve is the mean of the particles that project onto it (T. Hastie and W. Stuetzle, J. Am. Stat.
    Assoc. 84 (1989) 502), smoothed by local lines along the curve, from a straight start with wide to narrow widths.
    The width is kept whose tube around the curve (length times rms distance of the particles) is smallest: so a bent
    cloud is followed, and a round one is crossed straight. The ends are at ``PERCENTILES`` of the particles along it.

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
    place = centred @ direction
    first, last = np.quantile(place, (0.005, 0.995))
    nodes = cloud.mean(0) + np.linspace(first, last, _NODES)[:, None] * direction
    smallest = np.inf
    for width in _WIDTHS:
        for _ in range(0 if np.isinf(width) else _PASSES):
            nodes = _smooth_along(place, cloud, np.quantile(place, np.linspace(0.005, 0.995, _NODES)), width)
            place, _ = _project(cloud, nodes)
        place, squared = _project(cloud, nodes)
        length = np.linalg.norm(np.diff(nodes, axis=0), axis=1).sum()
        tube = length * np.sqrt(squared.mean())
        if tube < smallest:
            smallest, best = tube, (nodes, place)
    nodes, place = best
    low, high = np.percentile(place, PERCENTILES)
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


def _smooth_along(place: np.ndarray, cloud: np.ndarray, at: np.ndarray, width: float) -> np.ndarray:
    """(m, K) local linear fits of (n, K) ``cloud`` over (n,) ``place`` at (m,) ``at``; ``width`` of the whole range."""
    sigma = max(width * (at[-1] - at[0]) / 2, 1e-9)
    offset = place[None] - at[:, None]
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


# where there are data ------------------------------------------------------------------------------------------------


class Neighbourhood:
    """Tells how many particles lie near a point of latent space, and whether it lies where there are hardly any."""

    def __init__(self, latents: np.ndarray):
        """``latents`` (n, K), finite."""
        from scipy.spatial import cKDTree

        self._spread = np.maximum(latents.std(0), 1e-12)
        self._tree = cKDTree(latents / self._spread)
        rows = np.random.default_rng(_SEED).permutation(len(latents))[:_COUNTED]
        self._usual = float(np.median(self.num_near(latents[rows])))

    def num_near(self, points: np.ndarray) -> np.ndarray:
        """(m,) particles within half a standard deviation (rms over the dimensions) of each of (m, K) points."""
        radius = NEAR_STANDARD_DEVIATIONS * np.sqrt(points.shape[1])
        return self._tree.query_ball_point(points / self._spread, radius, return_length=True).astype(int)

    def beyond_data(self, points: np.ndarray) -> np.ndarray:
        """(m,) bool: nobody near, or fewer than a twentieth of those near the median particle."""
        return self.num_near(points) < max(1.0, _BEYOND_SHARE * self._usual)
