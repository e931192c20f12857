"""Whether the images show the consensus in the poses given, and if not, what would have to be changed for them to.

Images of a sample are compared with projections of the consensus in their own poses, in the orientations of other
images, with projections of its mirror images, and with common mistakes put right (``prepare.mistakes``): a map of
another voxel size, poses or shifts in another convention or unit, images of other rows, a CTF that is not the images'.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import numpy as np

from flexlib.errors import InputError
from flexlib.images.noise import Calibration
from flexlib.imaging.maps import Map
from flexlib.prepare.mistakes import Mistake, Views, likely_mistakes, mirrored

log = logging.getLogger(__name__)

_SEED = 1
_IMAGES = 200  # of the sample that are compared
_LEAST_NATS = 10.0  # by which images together must be likelier, and
_LEAST_ERRORS = 3.0  # standard errors of the mean over images, for one thing to explain them better than another
_FAR_BETTER = 1.3  # times the nats, from which another reading of the files is not a doubt but the right one


@dataclass(frozen=True)
class Match:
    """How well the images of a sample match the consensus."""

    num_images: int
    own_pose: float  # share of them that match it better in their own pose than in another image's
    hand: float  # and better than they match its mirror image, the likeliest of those


def check_match(given: Views, consensus: Map, sample: np.ndarray, calibration: Calibration) -> Match:
    """Compare images with the consensus, in their own poses and in others, and with its mirror images.

    What would explain them better, but not by far, is told in a warning.

    Parameters
    ----------
    given
        What the user's files say.
    consensus
        As its file has it.
    sample
        (m,) rows that noise and scale were measured on.
    calibration
        The noise, and the scale of each optics group, negative where contrast is inverted.

    Raises
    ------
    InputError
        The images do not show the consensus in these poses, or show its mirror image, or would match far better if
        shifts or CTFs were taken otherwise; the message has the likeliest mistake.
    """
    mistakes = likely_mistakes(given, consensus)
    name, given = given.particles.source_path, given.coarse()
    rows = np.sort(np.random.default_rng(_SEED).permutation(sample)[:_IMAGES])
    own, others = (views.evidence(rows, calibration) for views in (given, _shuffled(given, rows)))
    if not _better(own, others) and len(rows) < len(sample):
        rows = sample
        own, others = (views.evidence(rows, calibration) for views in (given, _shuffled(given, rows)))
    if not _better(own, others):
        raise InputError(
            f"{name}: the images do not match projections of the consensus: in their own orientations no better than "
            f"in others' ({len(rows)} compared){_explanation(given, mistakes, rows, calibration)}"
        )
    _, other_hand = _likeliest(mirrored(given), rows, calibration)
    if _better(other_hand, own):
        raise InputError(
            f"{name}: the images do not match projections of the consensus: {(other_hand > own).mean():.0%} of "
            f"{len(rows)} match its mirror image better: it has the other hand than the poses"
        )
    likeliest, found = _likeliest(mistakes, rows, calibration)
    if _better(found, own):
        share, reason = f"{(found > own).mean():.0%} of {len(rows)}", likeliest.reason
        if likeliest.certain and found.sum() > _FAR_BETTER * own.sum():
            raise InputError(
                f"{name}: the images do not match projections of the consensus as the files have it: {share} do so "
                f"better if {reason}"
            )
        log.warning("%s: %s images match projections of the consensus better if %s", name, share, reason)
    return Match(len(rows), float((own > others).mean()), float((own > other_hand).mean()))


def _better(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether images are clearly likelier by ``one`` than by ``other``, (m,) nats each: together, and most of them."""
    gain = one - other
    least = max(_LEAST_NATS, _LEAST_ERRORS * gain.std() * len(gain) ** 0.5)
    return bool(gain.sum() > least and (gain > 0).mean() > 0.5)


def _shuffled(views: Views, rows: np.ndarray) -> Views:
    """Each image in the orientation of another one."""
    rotation = views.particles.rotation.copy()
    order = np.random.default_rng(_SEED).permutation(rows)
    rotation[order] = views.particles.rotation[np.roll(order, 1)]
    return views.with_(rotation=rotation)


def _likeliest(mistakes: list[Mistake], rows: np.ndarray, calibration: Calibration) -> tuple[Mistake, np.ndarray]:
    """The mistake that explains the images at ``rows`` best, and the (m,) nats by which it does."""
    tried = [(mistake, mistake.views.evidence(rows, calibration)) for mistake in mistakes]
    return max(tried, key=lambda one: one[1].sum())


def _explanation(given: Views, mistakes: list[Mistake], rows: np.ndarray, calibration: Calibration) -> str:
    """What is most likely wrong where nothing matches, as the end of a sentence."""
    # what optics groups' scales were taken for means nothing there
    calibration = replace(calibration, image_scale=np.ones_like(calibration.image_scale))
    likeliest, best = _likeliest([*mirrored(given), *mistakes], rows, calibration)
    others = (other.evidence(rows, calibration) for other in (given, _shuffled(likeliest.views, rows)))
    if all(_better(best, other) for other in others):
        return f"; they do match if {likeliest.reason}"
    return (
        ", and so it is with another hand, voxel size, convention of angles, sign or unit of shifts and defocus: "
        "another map or other poses, images of other particles, or half of the images?"
    )
