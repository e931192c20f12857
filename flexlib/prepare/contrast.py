"""The contrast of map and images: white density, in images alike within an optics group, white in all."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from scipy.stats import skew

from flexlib.imaging.fourier import lowpass_map
from flexlib.particles.table import Particles
from flexlib.prepare.fit import ShellSums, noise_and_scale

log = logging.getLogger(__name__)

_LEAST_IMAGES = 20  # of an optics group, to look for images of another contrast in it
_SIGNIFICANT = 3.0  # standard errors of an image's own scale from zero
_MIXED = 0.01  # share of an optics group's images that speak against the others, above which all are asked
_MOST_UNDECIDED = 0.06  # share of images of less than a quarter of the median evidence; of a normal variable it is 0.13
_MIXED_STACK = 0.1  # the same of a stack, above which its images are asked one by one
_CHUNK = 2000  # images that are asked at a time
_DARK_SKEWNESS = -1.0  # of a low-passed map's voxels: particles stand out of the solvent, by 2 to 10, to one side
_LOWPASS_A = 20.0


def white_density(density: np.ndarray, pixel_size_A: float, name: str) -> np.ndarray:
    """A map (N, N, N), inverted where its density is dark, which a warning tells; ``name`` is the map's."""
    smooth = lowpass_map(density, pixel_size_A, max(_LOWPASS_A, 3 * pixel_size_A))
    skewness = float(skew(smooth, axis=None))
    if not skewness < _DARK_SKEWNESS:
        return density
    log.warning(
        "%s: the density is dark (skewness of its voxels %.2g, low-passed): the map is inverted", name, skewness
    )
    return -density


def contrast_signs(
    particles: Particles,
    rows: np.ndarray,
    sums: ShellSums,
    band: np.ndarray,
    compare: Callable[[np.ndarray], ShellSums],
) -> np.ndarray:
    """Which images have the opposite contrast of most in their optics group: those of some stacks, or single ones.

    Parameters
    ----------
    particles
        All particles.
    rows, sums
        (m,) a sample of them, and their shell sums against the consensus.
    band
        (shells,) bool: shells to judge by.
    compare
        Gives the sums of other rows; asked only where the sample has images of both contrasts.

    Returns
    -------
    sign
        (n,) 1, or -1 for images that are to be inverted.
    """
    sign = np.ones(len(particles))
    for group, optics in enumerate(particles.optics):
        members = particles.optics_index[rows] == group
        if members.sum() < _LEAST_IMAGES:
            continue
        sigma, scale, _ = noise_and_scale(sums.subset(members), band)
        weight = np.where(band, sigma**-2.0, 0.0)
        most = 1.0 if scale >= 0 else -1.0
        if not _of_two_kinds(most * _evidence(sums.subset(members), weight)):
            continue
        own = np.flatnonzero(particles.optics_index == group)
        parts = np.array_split(own, -(-len(own) // _CHUNK))
        evidence = most * np.concatenate([_evidence(compare(part), weight) for part in parts])
        sign[own] = _signs_by_stack(evidence, particles.stack_index[own])
        turned = own[sign[own] < 0]
        if len(turned):
            log.warning(
                "%s: %d of %d images of optics group %s, in %d stacks, have the opposite contrast of the others: they "
                "are inverted (first: row %d)",
                particles.source_path, len(turned), len(own), optics.name,
                len(np.unique(particles.stack_index[turned])), particles.source_row[turned[0]] + 1,
            )  # fmt: skip
    return sign


def _of_two_kinds(evidence: np.ndarray) -> bool:
    """Whether some images speak clearly against the others, and few are undecided, as all are in wrong poses."""
    against = (evidence < -_SIGNIFICANT).sum()
    size = np.abs(evidence)
    undecided = (size < 0.25 * np.median(size)).mean()
    return bool(against > max(_SIGNIFICANT, _MIXED * len(evidence)) and undecided < _MOST_UNDECIDED)


def _evidence(sums: ShellSums, weight: np.ndarray) -> np.ndarray:
    """(m,) each image's own scale over its standard error."""
    return (sums.cross @ weight) / np.sqrt(np.maximum(sums.predicted @ weight, 1e-300))


def _signs_by_stack(evidence: np.ndarray, stack: np.ndarray) -> np.ndarray:
    """(m,) 1 or -1 of images with ``evidence`` (m,) for 1: a stack's together, unless it clearly holds both kinds."""
    sign = np.ones(len(evidence))
    for number in np.unique(stack):
        members = np.flatnonzero(stack == number)
        own = evidence[members]
        total = own.sum() / len(own) ** 0.5
        common = -1.0 if total < -_SIGNIFICANT else 1.0
        against = (common * own < -_SIGNIFICANT).mean()
        clear = np.median(np.abs(own)) > _SIGNIFICANT
        sign[members] = np.where(own < 0, -1.0, 1.0) if against > _MIXED_STACK and clear else common
    return sign


def invert_dark_contrast(particles: Particles, image_scale: np.ndarray) -> tuple[Particles, np.ndarray]:
    """Invert the contrast of optics groups whose scale (groups,) is negative: dark where others are white.

    Returns
    -------
    particles
        The same, their ``contrast_sign`` right.
    image_scale
        (groups,) all positive.
    """
    dark = image_scale < 0
    if dark.any():
        names = ", ".join(group.name for group, is_dark in zip(particles.optics, dark, strict=True) if is_dark)
        log.warning(
            "%s: images of optics group %s correlate negatively with the consensus: they are inverted",
            particles.source_path, names,
        )  # fmt: skip
        sign = np.where(dark, -1.0, 1.0)[particles.optics_index]
        particles = replace(particles, contrast_sign=particles.contrast_sign * sign)
    return particles, np.abs(image_scale)
