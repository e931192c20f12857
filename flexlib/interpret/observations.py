"""What the images alone say of each particle's latents: the posterior that training reports, without its prior."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from flexlib.errors import InputError
from flexlib.model.flex_model import FlexModel
from flexlib.particles.input_rows import read_prepared_rows
from flexlib.particles.latents_read import read_latent_std_errs
from flexlib.train.latents import LatentPrior

_LEAST_INFORMATION = 1e-3  # of the prior's: posteriors as wide as the prior, or wider, say nothing
_LEAST_WEIGHT = 0.01  # particles that are less likely some are left out


@dataclass(frozen=True)
class Observations:
    """n particles that may be of one conformation each: where the images put it, and how surely.

    ``mean`` and ``covariance`` are those of the likelihood, a normal distribution of the latents; ``latents`` and
    ``posterior`` those that training reports, which the prior has drawn together.
    """

    mean: np.ndarray  # (n, K)
    covariance: np.ndarray  # (n, K, K)
    latents: np.ndarray  # (n, K)
    posterior: np.ndarray  # (n, K, K) covariance, with the standard errors to believe
    weight: np.ndarray  # (n,) in (0, 1]: the probability that the image shows a particle
    row: np.ndarray  # (n,) of the prepared particles
    particle: np.ndarray  # (n,) from 0: which are symmetry copies of one image

    @property
    def dims(self) -> int:
        """K."""
        return self.mean.shape[1]

    def __len__(self) -> int:
        return len(self.mean)

    @property
    def std_err(self) -> np.ndarray:
        """(n, K) of the reported latents."""
        return np.sqrt(np.einsum("nkk->nk", self.posterior))

    def take(self, chosen: np.ndarray) -> Observations:
        """Some of them."""
        parts = {name: values[chosen] for name, values in vars(self).items()}
        return Observations(**parts)

    def of_plane(self) -> Observations:
        """The same particles by their first two latents, which move most, whatever the others are."""
        two = slice(0, 2)
        parts = {"mean": self.mean[:, two], "covariance": self.covariance[:, two, two]}
        parts |= {"latents": self.latents[:, two], "posterior": self.posterior[:, two, two]}
        return replace(self, **parts)

    def draws(self, seed: int = 0) -> np.ndarray:
        """(n, K) one draw from each particle's posterior."""
        root = np.linalg.cholesky(self.posterior + 1e-12 * np.eye(self.dims))
        normal = np.random.default_rng(seed).standard_normal(self.latents.shape)
        return self.latents + np.einsum("nkl,nl->nk", root, normal)

    def sample(self, most: int, seed: int = 0) -> Observations:
        """At most so many of the particles, with all their symmetry copies."""
        images = np.unique(self.particle)
        copies = len(self) / max(len(images), 1)
        if len(self) <= most:
            return self
        chosen = np.random.default_rng(seed).permutation(images)[: int(most / copies)]
        return self.take(np.isin(self.particle, chosen))


def observe(
    latents: np.ndarray, posterior: np.ndarray, prior: LatentPrior | None, std_err: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The likelihood's mean (n, K) and covariance (n, K, K), and the posterior's covariance with ``std_err``.

    The posterior's precision is the likelihood's and the prior's, its slope is zero at its mean: so the likelihood has
    the rest of the precision, and the slope that the prior has there, the other way. ``std_err`` beyond the posterior's
    own is an error of the model, which the prior has drawn in as it has the latents.

    Parameters
    ----------
    latents, posterior
        (n, K) means and (n, K, K) covariances.
    prior
        With which they were inferred; None where latents were given, not inferred: they are the mean then.
    std_err
        (n, K) standard errors to believe, where they are larger than those of the posterior.
    """
    dims = latents.shape[1]
    own = np.einsum("nkk->nk", posterior)
    excess = np.zeros_like(own) if std_err is None else np.maximum(std_err**2 - own, 0.0)
    model_error = excess[:, :, None] * np.eye(dims)
    if prior is None:
        return latents, posterior + model_error, posterior + model_error
    at = torch.as_tensor(latents, dtype=torch.float64)
    gradient, curvature = prior.gradient(at).numpy(), prior.curvature(at).numpy()
    values, axes = np.linalg.eigh(np.linalg.inv(posterior) - curvature)
    least = _LEAST_INFORMATION * np.einsum("nkk->n", curvature)[:, None] / dims
    covariance = np.einsum("nkl,nl,nml->nkm", axes, 1 / np.maximum(values, least + 1e-9), axes)
    mean = latents + np.einsum("nkl,nl->nk", covariance, gradient)
    stretch = np.eye(dims) + covariance @ curvature
    covariance = covariance + stretch @ model_error @ stretch.transpose(0, 2, 1)
    return mean, covariance, posterior + model_error


def prior_of(model: FlexModel) -> LatentPrior | None:
    """The prior on the reported latents; None where they were given.

    Training brings the posteriors' mean and covariance to those of its unit normal after every epoch and once more at
    the end, so in the reported coordinates the prior is the unit normal up to what that last step moved.
    """
    if model.settings.get("freeze_latents"):
        return None
    centering = model.settings.get("centering", "auto")
    return LatentPrior() if centering == "auto" else LatentPrior.quartic(float(centering))


def read_observations(model: FlexModel, particles_dir: Path, latents_star: Path) -> Observations:
    """Those of a model's particles, with the standard errors of ``latents_star``.

    Raises InputError where that is of other particles.
    """
    where = read_prepared_rows(particles_dir).input_rows
    if len(where.rows) != len(model.latents):
        raise InputError(
            f"{particles_dir}: {len(where.rows)} particles, but the model was trained on {len(model.latents)}"
        )
    assert model.latent_covariance is not None
    latents, posterior = model.latents.astype(np.float64), model.latent_covariance.astype(np.float64)
    std_err = read_latent_std_errs(latents_star, particles_dir)
    if std_err.shape != latents.shape:
        raise InputError(f"{latents_star}: {std_err.shape[1]} latents, the model has {latents.shape[1]}")
    weight = np.ones(len(latents)) if model.probability is None else model.probability.astype(np.float64)
    known = np.isfinite(latents).all(1) & np.isfinite(posterior).all((1, 2)) & (weight >= _LEAST_WEIGHT)
    known &= np.einsum("nkk->nk", np.nan_to_num(posterior)).min(1) > 0
    row = np.flatnonzero(known)
    if not len(row):
        raise InputError(f"{latents_star}: no particle has latents")
    mean, covariance, believed = observe(latents[row], posterior[row], prior_of(model), std_err[row])
    particle = np.unique(where.rows[row], return_inverse=True)[1]
    return Observations(mean, covariance, latents[row], believed, weight[row], row, particle)
