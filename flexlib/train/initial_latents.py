"""Where latents start: from the spectrum, at random, or from a file."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from flexlib.errors import InputError
from flexlib.layout import ParticlesFolder, TrainFolder
from flexlib.particles.latents_read import read_latents
from flexlib.train.spectral import FieldForces, SpectralStart, fields_of_latents
from flexlib.workflow_support.settings import TrainSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class InitialLatents:
    """Latents at the start, with the displacement fields that belong to them."""

    latents: torch.Tensor  # (n, K) zero mean, unit variance
    directions: np.ndarray  # (K, m) float32 coefficients of the spectral fields per unit latent
    given: torch.Tensor | None = None  # (n, K) in the user's own scale, where they are to be frozen


def initial_latents(
    settings: TrainSettings,
    particles: ParticlesFolder,
    drawn: torch.Tensor,
    forces: FieldForces,
    spectrum: SpectralStart,
    prior_precision: np.ndarray,
) -> InitialLatents:
    """Latents as the settings ask for.

    Parameters
    ----------
    settings
        ``train:`` at one sweep point.
    particles
        What prepare has written.
    drawn
        (n, K) standard normal numbers, for ``latent_init: random``.
    forces, spectrum
        Of the particles.
    prior_precision
        (m,) that the rigidity gives the coefficients of the spectral fields.

    Raises
    ------
    InputError
        The file of latents does not fit.
    """
    file = latents_file(settings)
    if file is None and settings.latent_init == "spectral":
        return InitialLatents(torch.as_tensor(spectrum.latents), spectrum.directions)
    latents, given = drawn, None
    if file is not None:
        own = read_own_latents(file, particles, settings.latent_dims)
        latents, _ = standard_scale(own)
        given = own if settings.freeze_latents else None
        logger.info("latents start from %s", file)
    return InitialLatents(latents, fields_of_latents(forces, latents.numpy(), prior_precision), given)


def latents_file(settings: TrainSettings) -> Path | None:
    """The file that latents start from: ``latent_init``, else what ``init_from`` names or holds."""
    if isinstance(settings.latent_init, Path):
        return settings.latent_init
    if settings.init_from is None:
        return None
    return TrainFolder(settings.init_from).latents if settings.init_from.is_dir() else settings.init_from


def read_own_latents(file: Path, particles: ParticlesFolder, dims: int) -> torch.Tensor:
    """(n, K) float32 latents of ``file`` in its own scale, the first ``dims`` of them.

    Raises
    ------
    InputError
        The file has fewer dims, or one is the same for all particles.
    """
    own = read_latents(file, particles.path)
    if own.shape[1] < dims:
        raise InputError(f"{file}: {own.shape[1]} latent dims, but train.latent_dims is {dims}")
    if own.shape[1] > dims:
        logger.warning("%s: has %d latent dims; the first %d are used", file, own.shape[1], dims)
    if not own[:, :dims].std(0).all():
        raise InputError(f"{file}: latent dim {int(np.argmin(own[:, :dims].std(0))) + 1} is the same for all particles")
    return torch.as_tensor(own[:, :dims], dtype=torch.float32)


def standard_scale(own: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """(n, K) latents at zero mean and unit variance, and (scale, offset) with ``own = scale * standard + offset``."""
    scale, offset = own.std(0), own.mean(0)
    return (own - offset) / scale, (scale, offset)
