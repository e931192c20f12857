"""What images say of their own background and noise level, before anything is known of the particles in them."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd

from flexlib.images.normalisation import CONSTANT, PARABOLOID, PLANE
from flexlib.particles.table import Particles
from flexlib.prepare.survey import ImageFacts

log = logging.getLogger(__name__)

_CHI2_MEDIAN = 0.4549  # of the square of a standard normal number
_QUADRANT_MEDIAN = 0.7887  # of a chi-squared of three degrees of freedom, over its mean
_MAD = 1.4826  # standard deviations in a median absolute deviation
_BACKGROUND_POWER = 10.0  # of a polynomial, over white noise's, from which it is taken for background
_COMMON = 0.5  # its mean, in standard deviations of white noise, that all images share, from which it is too
_COMMON_ERRORS = 6.0  # if so many standard errors from zero
_LEAST_SPREAD = 0.03  # of the logarithm of noise levels, beyond what chance explains: less is none
_CHANCE = 2.0  # times the variance that chance explains: less is none
_STACK_IMAGES = 20  # a stack with fewer has no level of its own to which its images' are drawn
_OUTLYING = 6.0  # standard deviations of a level that is an image's own
_OUTLYING_RATIO = 1.3  # by which it differs at least


def background_terms(particles: Particles, facts: ImageFacts) -> np.ndarray:
    """(groups,) how many polynomials the background of each optics group's images seems to have.

    Counts ``CONSTANT``, ``PLANE``, ``PARABOLOID``; 0 where no polynomial has more power than coloured noise gives it.
    """
    terms = np.zeros(len(particles.optics), int)
    for group in range(len(particles.optics)):
        values = facts.background[particles.optics_index == group]
        power = np.median(values**2, axis=0) / _CHI2_MEDIAN
        common = np.median(values, axis=0)
        error = _MAD * np.median(np.abs(values - common), axis=0) * 1.25 / len(values) ** 0.5
        shared = (np.abs(common) > _COMMON) & (np.abs(common) > _COMMON_ERRORS * error)
        slow = shared | (power > _BACKGROUND_POWER)
        highest = int(np.flatnonzero(slow)[-1]) + 1 if slow.any() else 0
        terms[group] = next(count for count in (0, CONSTANT, PLANE, PARABOLOID) if count >= highest)
    return terms


def noise_levels(particles: Particles, facts: ImageFacts) -> np.ndarray:
    """(n,) noise level of each image over the median of its optics group; exactly 1 where they do not differ.

    A level measured in one image is drawn to that of its stack (often a micrograph) or optics group, the more the less
    certain it is. Levels far from all others stay as they are.
    """
    levels = np.ones(len(particles))
    for group in range(len(particles.optics)):
        members = np.flatnonzero(particles.optics_index == group)
        logs = np.log(facts.level[members])
        logs -= np.median(logs)
        chance = float(np.median(facts.level_error[members] ** 2) / _QUADRANT_MEDIAN)
        if _spread(logs) ** 2 > max(_CHANCE * chance, chance + _LEAST_SPREAD**2):
            logs = _drawn_to_stacks(logs, particles.stack_index[members], chance)
            log.info(
                "optics group %s: noise levels of the images differ, by a factor of %.3g to %.3g from the median",
                particles.optics[group].name, np.exp(np.quantile(logs, 0.05)), np.exp(np.quantile(logs, 0.95)),
            )  # fmt: skip
        else:
            far = np.abs(logs) > max(_OUTLYING * max(chance**0.5, _spread(logs)), np.log(_OUTLYING_RATIO))
            logs = np.where(far, logs, 0.0)
            if far.any():
                log.warning(
                    "%s: %d images of optics group %s have noise levels of %.3g to %.3g times the others': they are "
                    "scaled to one",
                    particles.source_path, far.sum(), particles.optics[group].name,
                    np.exp(logs[far].min()), np.exp(logs[far].max()),
                )  # fmt: skip
        levels[members] = np.exp(logs)
    return levels


def _drawn_to_stacks(logs: np.ndarray, stack: np.ndarray, chance: float) -> np.ndarray:
    """(m,) logarithms of levels, of median 0, each drawn to its stack's; ``chance`` is the variance of one."""
    table = pd.DataFrame({"stack": stack, "log": logs}).groupby("stack")["log"]
    centre = np.where(table.transform("size") >= _STACK_IMAGES, table.transform("median"), 0.0)
    within = logs - centre
    own = max(_spread(within) ** 2 - chance, 0.0)
    weight = own / max(own + chance, 1e-12)
    far = np.abs(within) > _OUTLYING * (own + chance) ** 0.5
    return centre + np.where(far, within, weight * within)


def _spread(values: np.ndarray) -> float:
    """Robust standard deviation about the median."""
    return float(_MAD * np.median(np.abs(values - np.median(values))))
