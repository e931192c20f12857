"""The density of conformations behind noisy latents: maximum likelihood of a mixture with one normal at each node.

The nodes are fixed and many, the normals all of one width, so their weights are all there is to find: the likelihood
has one maximum (J. Kiefer and J. Wolfowitz, Ann. Math. Stat. 27 (1956) 887; S. Geman and C.-R. Hwang, Ann. Stat. 10
(1982) 401, for the width as a sieve), which expectation maximisation reaches from any start. Each particle enters with
its own likelihood. The width is chosen by particles that were left out. It works in any number of latents, and gives
populations, marginals and bootstraps by sums; penalised splines or histograms do so in one or two only.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from flexlib.interpret.observations import Observations

logger = logging.getLogger(__name__)

MOST_PARTICLES = 20_000  # that the density is found from; more would change it by less than its error
BOOTSTRAPS = 200
_WIDTHS = (0.5, 0.35, 0.25, 0.18, 0.125, 0.09)  # of the normals, in standard deviations of all particles
SPACING = 1.25  # of the nodes, in widths: their sum is level to 1 part in 10,000
_MOST_NODES = 2000
_CHOICE_PARTICLES = 5000  # that choose the width
STEPS, _BOOTSTRAP_STEPS = 100, 60  # of expectation maximisation
_NOTHING = np.float32(1e-15)  # so that products of two are no denormal numbers, which are slow
_CHUNK = 4096


@dataclass(frozen=True)
class Density:
    """A mixture of normals, with bootstraps of its weights."""

    nodes: np.ndarray  # (J, K)
    width: np.ndarray  # (K,) standard deviation of each normal
    weight: np.ndarray  # (J,) adds up to one
    bootstraps: np.ndarray  # (J, B) likewise, each from particles drawn anew
    num_particles: float  # that it is found from, each counted with its probability

    @property
    def dims(self) -> int:
        """K."""
        return self.nodes.shape[1]

    def kernels(self, points: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        """Chunks of (m, K) points with the density of each node's normal there, (c, J)."""
        norm = np.prod(self.width * np.sqrt(2 * np.pi))
        for first in range(0, len(points), _CHUNK):
            some = slice(first, first + _CHUNK)
            away = (points[some, None] - self.nodes) / self.width
            yield some, np.exp(-0.5 * np.einsum("cjk,cjk->cj", away, away)) / norm

    def at(self, points: np.ndarray) -> np.ndarray:
        """(m,) density at (m, K) points."""
        return np.concatenate([kernel @ self.weight for _, kernel in self.kernels(points)])

    def bootstraps_at(self, points: np.ndarray) -> np.ndarray:
        """(m, B) density of each bootstrap at (m, K) points."""
        return np.concatenate([kernel @ self.bootstraps for _, kernel in self.kernels(points)])

    def responsibilities(self, seen: Observations) -> np.ndarray:
        """(n, J) probability that each particle's conformation is of each node's normal; rows add up to one."""
        shares = likelihoods(seen, self.nodes, self.width)
        shares *= self.weight.astype(np.float32)
        return shares / shares.sum(1, keepdims=True)


def estimate_density(seen: Observations, bootstraps: int = BOOTSTRAPS, seed: int = 0) -> Density:
    """The density of the conformations of some particles.

    Parameters
    ----------
    seen
        The particles, by one or two latents; of more than 20,000 particles a random choice is taken.
    bootstraps
        How many times particles (images, with their symmetry copies) are drawn anew, with Poisson weights.
    seed
        Of these, and of the choices.
    """
    seen = seen.sample(MOST_PARTICLES, seed)
    width = choose_width(seen, seed)
    nodes = _nodes(seen, width, seed)
    likelihood = likelihoods(seen, nodes, width)
    start = np.full((len(nodes), 1), 1 / len(nodes))
    weight = maximise(likelihood, seen.weight[:, None], start, STEPS)
    rng = np.random.default_rng(seed)
    counts = rng.poisson(1.0, (int(seen.particle.max()) + 1, bootstraps))[seen.particle]
    drawn = maximise(likelihood, seen.weight[:, None] * counts, np.repeat(weight, bootstraps, 1), _BOOTSTRAP_STEPS)
    return Density(nodes, width, weight[:, 0], drawn, float(seen.weight.sum()))


def maximise(likelihood: np.ndarray, counts: np.ndarray, weight: np.ndarray, steps: int) -> np.ndarray:
    """(J, B) weights of the nodes after some steps of expectation maximisation.

    Parameters
    ----------
    likelihood
        (n, J) of each particle at each node, up to a factor for each particle.
    counts
        (n, B) with which the particles count.
    weight
        (J, B) to begin with, none of them zero.
    steps
        How many.
    """
    total = counts.sum(0).astype(np.float32)
    counts, weight = counts.astype(np.float32), weight.astype(np.float32)
    with threadpool_limits(
        1, "blas"
    ):  # sums in one order; and threads that wait for each other lose more than they gain
        for _ in range(steps):
            mixture = likelihood @ weight
            weight = weight * (likelihood.T @ (counts / np.maximum(mixture, _NOTHING))) / total
            weight[weight < _NOTHING] = 0
    found = weight.astype(np.float64)
    return found / found.sum(0)


def likelihoods(seen: Observations, nodes: np.ndarray, width: np.ndarray) -> np.ndarray:
    """(n, J) float32: likelihood of each particle if it were of a node's normal, over that of its best node."""
    logs = log_likelihoods(seen, nodes, width)
    return _to_largest(logs)


def _to_largest(logs: np.ndarray) -> np.ndarray:
    """(n, J) float32 exp, each row over its largest."""
    values = np.exp(logs - logs.max(1, keepdims=True)).astype(np.float32)
    return np.where(values < _NOTHING, np.float32(0), values)


def log_likelihoods(seen: Observations, nodes: np.ndarray, width: np.ndarray) -> np.ndarray:
    """(n, J) float64."""
    root = np.linalg.cholesky(seen.covariance + np.diag(width**2))
    whiten = np.linalg.inv(root)  # lower triangular
    logs = np.repeat(np.log(np.einsum("nkk->nk", whiten)).sum(1)[:, None], len(nodes), 1)
    mean = np.einsum("nkl,nl->nk", whiten, seen.mean)
    for k in range(seen.dims):
        away = whiten[:, k, : k + 1] @ nodes[:, : k + 1].T - mean[:, k, None]
        logs -= 0.5 * away**2
    return logs


def choose_width(seen: Observations, seed: int = 0) -> np.ndarray:
    """(K,) width of the normals: the largest whose density predicts other particles as well as the best one's does.

    Two halves of at most 5,000 particles predict each other; as well is within one standard error of the difference
    (the rule of L. Breiman et al., Classification and Regression Trees, 1984). The best is found with one width, in
    standard deviations, along all latents; from there it is widened along one after the other, where that costs least:
    along a latent in which all is smooth a narrow width would show bumps that are none.
    """
    seen = seen.sample(_CHOICE_PARTICLES, seed)
    half = np.random.default_rng(seed).permutation(int(seen.particle.max()) + 1)[seen.particle] % 2
    spread = np.maximum(seen.draws(seed).std(0), 1e-9)

    def score(level: tuple[int, ...]) -> np.ndarray | None:
        width = np.array([_WIDTHS[one] for one in level]) * spread
        nodes = _nodes(seen, width, seed)
        if len(nodes) >= _MOST_NODES and any(level):
            return None
        return _held_out(log_likelihoods(seen, nodes, width), seen.weight, half) * seen.weight

    even = [(number,) * seen.dims for number in range(len(_WIDTHS))]
    found = {level: one for level, one in zip(even, map(score, even), strict=True) if one is not None}
    level = max(found, key=lambda one: found[one].sum())
    best = found[level]
    while any(level):
        wider = [tuple(one - (k == axis) for k, one in enumerate(level)) for axis in range(seen.dims) if level[axis]]
        scores = {one: value for one in wider if (value := score(one)) is not None}
        level_up = max(scores, key=lambda one: scores[one].sum())
        less = best - scores[level_up]
        if less.sum() > np.sqrt(len(less)) * less.std():
            break
        level = level_up
    told = ", ".join(f"{_WIDTHS[one]:.3g}" for one in level)
    logger.info("landscape: resolved to %s of the standard deviations", told)
    return np.array([_WIDTHS[one] for one in level]) * spread


def _held_out(logs: np.ndarray, weight: np.ndarray, half: np.ndarray) -> np.ndarray:
    """(n,) log-likelihood of each particle by the density of the other half."""
    likelihood = _to_largest(logs)
    score = logs.max(1)
    start = np.full((logs.shape[1], 1), 1 / logs.shape[1])
    for number in (0, 1):
        rows = half == number
        density = maximise(likelihood[rows], weight[rows, None], start, STEPS)[:, 0]
        score[~rows] += np.log(np.maximum(likelihood[~rows] @ density, _NOTHING))
    return score


def _nodes(seen: Observations, width: np.ndarray, seed: int) -> np.ndarray:
    """(J, K) nodes of a lattice, where draws from the particles' posteriors fall and around there."""
    near = np.rint(seen.draws(seed) / (SPACING * width)).astype(np.int64)
    steps = np.stack(np.meshgrid(*[[-1, 0, 1]] * seen.dims, indexing="ij"), -1).reshape(-1, seen.dims)
    filled = np.unique(near, axis=0)
    lattice = np.unique((filled[:, None] + steps).reshape(-1, seen.dims), axis=0)
    return lattice * (SPACING * width)
