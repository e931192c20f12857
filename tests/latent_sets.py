"""Latents of particles with known conformations and known errors, as training reports them."""

import numpy as np

from flexlib.interpret.observations import Observations, observe
from flexlib.interpret.populations import interval
from flexlib.train.latents import LatentPrior


def noise(count: int, dims: int, rng: np.random.Generator, low: float = 0.3, high: float = 0.7) -> np.ndarray:
    """(n, K, K) covariances of measurements, each particle's its own, with correlations of latents."""
    root = np.eye(dims) + 0.3 * np.tril(rng.standard_normal((count, dims, dims)), -1)
    root = root * rng.uniform(low, high, (count, dims))[:, None]
    return root @ root.transpose(0, 2, 1)


def posteriors(truth: np.ndarray, covariance: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Means (n, K) and covariances of the posteriors, under the unit normal, of noisy measurements of the truth."""
    root = np.linalg.cholesky(covariance)
    measured = truth + np.einsum("nkl,nl->nk", root, rng.standard_normal(truth.shape))
    information = np.linalg.inv(covariance)
    posterior = np.linalg.inv(information + np.eye(truth.shape[1]))
    return np.einsum("nkl,nlm,nm->nk", posterior, information, measured), posterior


def observed(truth: np.ndarray, covariance: np.ndarray, rng: np.random.Generator, naive: bool = False) -> Observations:
    """What interpret makes of them; ``naive`` takes the posteriors' means for measurements with their covariance."""
    latents, posterior = posteriors(truth, covariance, rng)
    mean, likelihood, believed = observe(latents, posterior, None if naive else LatentPrior())
    rows = np.arange(len(truth))
    return Observations(mean, likelihood, latents, believed, np.ones(len(truth)), rows, rows)


def two_states(count: int, dims: int, share: float, rng: np.random.Generator) -> np.ndarray:
    """(n, K) conformations: of the first latent two states, at -1 (of that share) and 1; the others are normal."""
    truth = 0.8 * rng.standard_normal((count, dims))
    truth[:, 0] = np.where(rng.random(count) < share, -1.0, 1.0) + 0.25 * rng.standard_normal(count)
    return truth


def left_share(landscape, basin: np.ndarray) -> tuple[float, float, float]:
    """Share of the basin on the left, and its 95 % interval."""
    values = np.where(landscape.points[:, 0] < 0, landscape.values, 0)
    share, drawn = landscape.mass(basin == basin[int(values.argmax())])
    return share, *interval(share, float(drawn.std()))
