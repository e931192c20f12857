"""Whether the latents' standard errors hold: they know of the image's noise, and two models tell what else is wrong."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from flexlib.validate.motion_error import SHARED_BY_HALVES

MATTERS = 0.4  # of a standard error: less would add 8 %, and posteriors are no more exact than that
DEGREE = 3  # of the polynomials that bring one model's latents to another's


@dataclass(frozen=True)
class LatentErrors:
    """Errors of each latent of the model of all particles, in its own units."""

    std_err: np.ndarray  # (n, K) by the images' noise, as training gives them
    disagreement: np.ndarray  # (n, K) half the difference of where two half-set models put the particle
    label: np.ndarray  # (n,) region of latent space

    @property
    def model_std_err(self) -> np.ndarray:
        """(n, K) rms disagreement in the particle's region."""
        found = np.zeros_like(self.std_err)
        for number in np.unique(self.label):
            rows = self.label == number
            found[rows] = np.sqrt((self.disagreement[rows] ** 2).mean(0))
        return found

    @property
    def coverage(self) -> np.ndarray:
        """(K,) share of the particles whose disagreement is within one standard error."""
        return (np.abs(self.disagreement) <= self.std_err).mean(0)

    @property
    def factor(self) -> np.ndarray:
        """(K,) by which standard errors are too small, rms: at least 1."""
        return np.sqrt((self.corrected**2).mean(0) / np.maximum((self.std_err**2).mean(0), 1e-30))

    @property
    def corrected(self) -> np.ndarray:
        """(n, K) standard errors with that of the model, where this one matters."""
        model = self.model_std_err
        return np.sqrt(self.std_err**2 + np.where(model > MATTERS * self.std_err, model, 0.0) ** 2)


def latent_errors(
    latents: np.ndarray,
    std_err: np.ndarray,
    others: tuple[np.ndarray, np.ndarray],
    weight: np.ndarray,
    label: np.ndarray,
) -> LatentErrors:
    """Compare where two models put the particles, in the latent space of a third.

    Parameters
    ----------
    latents, std_err
        (n, K) of the model of all particles.
    others
        Two of (n, K), of the models of the half-sets: any smooth function of the latents is as good, so each is
        brought to the third's by a polynomial, fitted to all particles. It cannot follow a single particle's error.
    weight
        (n,) with which each particle counts in the fits.
    label
        (n,) region of latent space: how well the models know a particle depends on where it is.
    """
    there = [_brought(other, latents, weight) for other in others]
    return LatentErrors(std_err, np.sqrt(SHARED_BY_HALVES) * (there[0] - there[1]), label)


def _brought(given: np.ndarray, wanted: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """(n, K) least-squares polynomial of ``given`` (n, L) that comes closest to ``wanted`` (n, K)."""
    spread = given.std(0)
    scaled = np.clip((given - given.mean(0)) / np.where(spread > 0, spread, 1.0), -4.0, 4.0)
    columns = [np.ones(len(given))]
    for degree in range(1, DEGREE + 1):
        for axes in itertools.combinations_with_replacement(range(given.shape[1]), degree):
            columns.append(np.prod(scaled[:, axes], axis=1))
    design = np.stack(columns, 1)
    weighted = design * weight[:, None]
    gram = weighted.T @ design
    gram += 1e-8 * np.trace(gram) / len(gram) * np.eye(len(gram))
    return design @ np.linalg.solve(gram, weighted.T @ wanted)
