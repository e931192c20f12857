"""One look at every image before anything is computed from it: pixels that are no signal, grey, background, noise."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from tqdm import tqdm

from flexlib.images.digest import image_digests
from flexlib.images.normalisation import PARABOLOID, polynomials
from flexlib.images.stack import Stacks
from flexlib.particles.table import Particles

_CHUNK_PIXELS = 2**21  # of the images that are in memory at a time
_PARTS = 4  # quadrants of an image, whose noise levels are compared
_PART_PIXELS = 512  # looked at in each, outside the particle
_MAD = 1.4826  # standard deviations in a median absolute deviation
_WINSOR = 3.0  # standard deviations beyond which a pixel counts as if it were there
_SEED = 0


@dataclass(frozen=True)
class ImageFacts:
    """What was seen of n images; where ``finite`` or ``varies`` is False the rest means nothing."""

    finite: np.ndarray  # (n,) bool
    varies: np.ndarray  # (n,) bool: not all pixels are equal
    grey: np.ndarray  # (n,) median of the pixels outside the particle
    level: np.ndarray  # (n,) robust standard deviation there, slow background taken out
    level_error: np.ndarray  # (n,) standard error of its logarithm, by comparison of quadrants
    peak: np.ndarray  # (n,) distance from the grey level of the pixel furthest from it, in levels
    background: np.ndarray  # (n, 6) coefficients of polynomials; those of white noise have unit variance
    digest: np.ndarray  # (n,) uint64 checksum of the pixels about the centre

    def subset(self, rows: np.ndarray) -> ImageFacts:
        """Of the images at ``rows``: indices or (n,) bool."""
        return ImageFacts(*(getattr(self, item.name)[rows] for item in fields(self)))


def survey_images(particles: Particles, stacks: Stacks, radius_A: float) -> ImageFacts:
    """Look at all images, each read once.

    Parameters
    ----------
    particles, stacks
        The images.
    radius_A
        Of the circle about the box centre that holds the particle.
    """
    count = len(particles)
    grey, level, level_error, peak = np.zeros((4, count))
    facts = ImageFacts(
        finite=np.zeros(count, bool),
        varies=np.zeros(count, bool),
        grey=grey,
        level=level,
        level_error=level_error,
        peak=peak,
        background=np.zeros((count, PARABOLOID)),
        digest=np.zeros(count, np.uint64),
    )
    progress = tqdm(total=count, desc="looking at images", unit="image", disable=None)
    for group, optics in enumerate(particles.optics):
        members = np.flatnonzero(particles.optics_index == group)
        members = members[np.lexsort((particles.image_index[members], particles.stack_index[members]))]
        look = _Look(optics.box, radius_A / optics.pixel_size_A)
        step = max(1, _CHUNK_PIXELS // optics.box**2)
        for start in range(0, len(members), step):
            rows = members[start : start + step]
            seen = look.at(stacks.read(particles, rows))
            for item in fields(facts):
                getattr(facts, item.name)[rows] = getattr(seen, item.name)
            progress.update(len(rows))
    progress.close()
    return facts


class _Look:
    """How images of one box are looked at: the same pixels outside the particle of each."""

    def __init__(self, box: int, radius_px: float) -> None:
        """``radius_px`` of the circle that holds the particle."""
        outside, basis = polynomials(box, PARABOLOID, radius_px)
        y, x = np.divmod(outside, box)
        part = 2 * (y >= box // 2) + (x >= box // 2)
        quadrants = [outside[part == number] for number in range(_PARTS)]
        length = min(_PART_PIXELS, min(map(len, quadrants)))
        rng = np.random.default_rng(_SEED)
        self.pixels = np.concatenate([np.sort(rng.permutation(own)[:length]) for own in quadrants])
        self.enlarged = (len(outside) / len(self.pixels)) ** 0.5  # so that coefficients are as of all pixels
        self.basis = np.linalg.qr(basis[self.pixels].astype(np.float64))[0].astype(np.float32)

    def at(self, images: np.ndarray) -> ImageFacts:
        """What is seen of (b, N, N) float32 images."""
        low, high = images.min((1, 2)), images.max((1, 2))
        finite = np.isfinite(low) & np.isfinite(high)
        varies = high > low
        outside = images.reshape(len(images), -1)[:, self.pixels]
        outside[~finite] = 0.0
        grey = np.median(outside, axis=1)
        outside -= grey[:, None]
        _winsorise(outside, 2 * _WINSOR)
        slow = outside @ self.basis
        outside -= slow @ self.basis.T
        background = slow + grey[:, None] * self.basis.sum(0)  # of the constant, but for rounding
        _winsorise(outside, _WINSOR)
        power = np.square(outside).reshape(len(images), _PARTS, -1).mean(-1).astype(np.float64)
        masked = varies & finite & ~(power > 0).all(1)  # equal pixels outside, as masks leave them: no noise is seen
        power[masked] = images[masked].var((1, 2), dtype=np.float64)[:, None]
        background[masked] = 0.0
        power = np.maximum(power, 1e-300)
        level = np.sqrt(power.mean(1))
        with np.errstate(invalid="ignore", over="ignore"):
            peak = np.maximum(high - grey, grey - low) / level
        return ImageFacts(
            finite=finite,
            varies=varies,
            grey=grey.astype(np.float64),
            level=level,
            level_error=0.5 * np.log(power).std(1, ddof=1) / _PARTS**0.5,
            peak=peak,
            background=self.enlarged * background / level[:, None],
            digest=image_digests(images),
        )


def _winsorise(pixels: np.ndarray, deviations: float) -> None:
    """Bring (b, m) pixels of median about 0, in place, within so many robust standard deviations of 0."""
    reach = deviations * _MAD * np.median(np.abs(pixels), axis=1, keepdims=True)
    np.clip(pixels, -reach, reach, out=pixels)
