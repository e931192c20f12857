"""How well hinge angles can be known from single images at best, map and motion given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy import fft

from flexlib.images.stack import read_stack_header
from flexlib.imaging.fourier import friedel_weight
from flexlib.simulate.nuisances import PARTICLE
from flexlib.simulate.particle_set import ParticleSet, batches

_LIMIT_PARTICLES = 512  # whose information on the hinge angles is averaged
_LIMIT_STEP_RAD = 0.01
_LIMIT_ANGLES = 61  # of the exact posterior's grid


def information_limit_r2(particles: ParticleSet, density_scale: float) -> np.ndarray:
    """(d,) R^2 with which the hinge angles can be known from single images at best, given map, motion and white noise.

    The Cramer-Rao bound: the information of an image on the angles is the squared change of its exact transform per
    radian, over the unit variance of the noise; a hinge angle's variance is at least the inverse's diagonal. A prior
    on the angles is not used. Where the signal is weak, noise makes far angles likely too, and no estimate comes near
    this bound: ``posterior_limit_r2`` is then the limit.

    Parameters
    ----------
    particles
        Without noise.
    density_scale
        By which they are multiplied, so that the noise has unit variance.
    """
    angles_rad = particles.metadata.angles_rad
    weight = _plane_weight(particles.settings.box)
    seen = _seen_whole(particles)
    bounds = [np.full((0 if len(seen) else 1, angles_rad.shape[1]), np.nan)]
    for batch in batches(len(seen)):
        rows, slopes = seen[batch], []
        for axis in range(angles_rad.shape[1]):
            ends = []
            for sign in (0.5, -0.5):
                moved = angles_rad.copy()
                moved[:, axis] += sign * _LIMIT_STEP_RAD
                ends.append(particles.with_angles(moved).transforms(rows))
            slopes.append(density_scale * (ends[0] - ends[1]) / _LIMIT_STEP_RAD)
        slope = np.stack(slopes, 1)
        information = np.einsum("bikx,bjkx,x->bij", slope, slope.conj(), weight).real
        bounds.append(np.linalg.inv(information).diagonal(axis1=1, axis2=2))
    return 1.0 - np.concatenate(bounds).mean(axis=0) / angles_rad.var(axis=0)


def posterior_limit_r2(particles: ParticleSet, density_scale: float, stack: Path) -> float:
    """R^2 of the best estimate there is of a single hinge's angle from an image, map and motion known.

    The posterior mean, from the exact likelihood of the noisy images on a grid of angles. No estimate has a smaller
    squared error on average.

    Parameters
    ----------
    particles, density_scale
        See ``information_limit_r2``.
    stack
        The noisy images.
    """
    (hinge,) = particles.phantom.hinges
    angles_rad = particles.metadata.angles_rad
    seen = _seen_whole(particles)
    angles = (hinge.range_rad + 4.0 * hinge.state_sd_rad) * np.linspace(-1.0, 1.0, _LIMIT_ANGLES)
    weight = _plane_weight(particles.settings.box)
    log_posterior = np.tile(hinge.log_prior(angles), (len(seen), 1))
    noisy = read_stack_header(stack)
    for batch in batches(len(seen)):
        rows = seen[batch]
        images = fft.rfft2(fft.ifftshift(noisy.read(rows).astype(np.float64), axes=(1, 2)))
        for number, angle in enumerate(angles):
            turned = particles.with_angles(np.full_like(angles_rad, angle))
            clean = density_scale * turned.transforms(rows)
            log_posterior[batch, number] -= 0.5 * (np.abs(images - clean) ** 2 * weight).sum((1, 2))
    posterior = np.exp(log_posterior - log_posterior.max(1, keepdims=True))
    mean = posterior @ angles / posterior.sum(1)
    truth = angles_rad[seen, 0]
    return float(1.0 - ((mean - truth) ** 2).mean() / truth.var())


def _seen_whole(particles: ParticleSet) -> np.ndarray:
    """Rows of the first particles, at most ``_LIMIT_PARTICLES``, that are no junk and lack no part."""
    kinds = particles.metadata.kinds
    return np.flatnonzero((kinds.kind == PARTICLE) & ~kinds.absent)[:_LIMIT_PARTICLES]


def _plane_weight(box: int) -> np.ndarray:
    """(box//2+1,) weight of a column of the half plane in a sum over the full plane of an orthonormal transform."""
    return friedel_weight(box).astype(np.float64) / box**2
