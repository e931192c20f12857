"""Which particles are kept, and which half-set each belongs to."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pandas as pd

from flexlib.errors import InputError
from flexlib.particles.table import Particles
from flexlib.workflow_support.settings import PrepareSettings

log = logging.getLogger(__name__)

LEAST_PARTICLES, LEAST_IN_HALF = (
    20,
    5,
)  # fewer give no noise spectrum, no held-out score and no half-map that mean anything
_FEW = 500
_SEED = 0


def select_particles(particles: Particles, settings: PrepareSettings) -> tuple[Particles, str]:
    """Select particles by ``min_scale``, give each a half-set, and draw ``max_particles`` evenly from both halves.

    The scale is CryoSPARC's alpha times the CTF scale. Half-sets are drawn at random where the input has none or
    ``resplit`` asks for it; rows of one image (an input that another program has symmetry-expanded) then get the same.
    Where half-sets of the input part the rows of one image, a warning says so. Random numbers are seeded.

    Parameters
    ----------
    particles
        All of the input.
    settings
        Which to keep.

    Returns
    -------
    kept
        In input order, all with a half-set; optics groups without particles are gone.
    half_sets
        Where half-sets came from: "input" or "random".

    Raises
    ------
    InputError
        ``min_scale`` or ``max_particles`` would leave too few particles.
    """
    rng = np.random.default_rng(_SEED)
    keep = _large_enough(particles, settings.min_scale)
    half_set, origin = _half_sets(particles, keep, settings.resplit, rng)
    keep = _draw(keep, half_set, settings.max_particles, rng)
    return drop_empty_groups(replace(particles, half_set=half_set).subset(keep)), origin


def check_enough(particles: Particles) -> None:
    """Refuse a set, each with a half-set, of which nothing could be told.

    Raises
    ------
    InputError
        Fewer than 20 images (rows of one image count once), or fewer than 5 in a half-set.
    """
    shown = _image_numbers(particles, np.arange(len(particles)))
    if len(np.unique(shown)) < LEAST_PARTICLES:
        raise InputError(
            f"{particles.source_path}: {len(np.unique(shown))} particles can be used: "
            f"at least {LEAST_PARTICLES} are needed"
        )
    for half in (0, 1):
        if (count := len(np.unique(shown[particles.half_set == half]))) < LEAST_IN_HALF:
            raise InputError(
                f"{particles.source_path}: half-set {half + 1} has {count} particles that can be used: "
                f"at least {LEAST_IN_HALF} are needed (prepare.resplit draws new half-sets)"
            )


def warn_of_few(particles: Particles) -> None:
    """Say so where a set is so small that motion can hardly be told from noise."""
    if len(particles) < _FEW:
        log.warning(
            "%s: with only %d particles motion can hardly be told from noise: some thousands are needed",
            particles.source_path, len(particles),
        )  # fmt: skip


def drop_empty_groups(particles: Particles) -> Particles:
    """The same without optics groups that have no particles."""
    used, index = np.unique(particles.optics_index, return_inverse=True)
    optics = tuple(particles.optics[group] for group in used)
    return replace(particles, optics=optics, optics_index=index.astype(np.int32))


def _large_enough(particles: Particles, min_scale: float | None) -> np.ndarray:
    """Rows of the particles whose scale is not below ``min_scale``."""
    keep = np.arange(len(particles))
    if min_scale is None:
        return keep
    scale = particles.ctf_scale * (1.0 if particles.particle_scale is None else particles.particle_scale)
    keep = keep[scale >= min_scale]
    log.info("min_scale %g drops %d particles", min_scale, len(particles) - len(keep))
    if len(keep) < LEAST_PARTICLES:
        raise InputError(
            f"prepare.min_scale: {min_scale:g} leaves {len(keep)} particles: at least {LEAST_PARTICLES} are needed"
        )
    return keep


def _half_sets(
    particles: Particles, keep: np.ndarray, resplit: bool, rng: np.random.Generator
) -> tuple[np.ndarray, str]:
    """(n,) int8 half-set of each particle, of which those at rows ``keep`` count; and where they came from."""
    half_set = particles.half_set.copy()
    image = _image_numbers(particles, keep)
    count = int(image.max()) + 1
    if resplit or len(np.unique(half_set[keep])) < 2 or (half_set < 0).any():
        half_of_image = np.empty(count, np.int8)
        half_of_image[rng.permutation(count)] = np.arange(count) % 2
        half_set[keep] = half_of_image[image]
        why = "resplit is set" if resplit else f"{particles.source_path} has no half-sets"
        log.warning("%s: particles are split at random into two halves", why)
        return half_set, "random"
    if count < len(keep):
        in_second = np.bincount(image, half_set[keep], count) / np.bincount(image, minlength=count)
        parted = int(((in_second > 0) & (in_second < 1)).sum())
        if parted:
            log.warning(
                "%s: %d images have rows in both half-sets, which are then not independent: set prepare.resplit",
                particles.source_path, parted,
            )  # fmt: skip
    return half_set, "input"


def _draw(keep: np.ndarray, half_set: np.ndarray, max_particles: int | None, rng: np.random.Generator) -> np.ndarray:
    """At most ``max_particles`` of the rows ``keep``, ascending, as evenly from both halves as they allow."""
    if max_particles is None or max_particles >= len(keep):
        return keep
    if max_particles < LEAST_PARTICLES:
        raise InputError(f"prepare.max_particles: {max_particles}: at least {LEAST_PARTICLES} are needed")
    halves = [rng.permutation(keep[half_set[keep] == half]) for half in (0, 1)]
    first = min(len(halves[0]), max((max_particles + 1) // 2, max_particles - len(halves[1])))
    return np.sort(np.concatenate([halves[0][:first], halves[1][: max_particles - first]]))


def _image_numbers(particles: Particles, rows: np.ndarray) -> np.ndarray:
    """(m,) int64 which image each of ``rows`` (m,) shows, counted from 0 in the order they first come."""
    longest = int(particles.image_index.max(initial=0)) + 1
    return pd.factorize(particles.stack_index[rows].astype(np.int64) * longest + particles.image_index[rows])[0]
