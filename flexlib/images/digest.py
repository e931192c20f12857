"""Checksums of images, by which prepare finds repeated ones and later stages find that stacks have changed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from flexlib.errors import InputError
from flexlib.images.stack import Stacks
from flexlib.particles.table import Particles

_HASHED_ROWS = 8  # of an image's pixels, through its centre
_SAMPLE = 200  # images that are looked at again
_SEED = 0


def image_digests(images: np.ndarray) -> np.ndarray:
    """(b,) uint64 checksums of the pixels about the centres of (b, N, N) float32 images, contrast as stored."""
    middle = images.shape[1] // 2
    hashed = images[:, max(0, middle - _HASHED_ROWS // 2) : middle + _HASHED_ROWS // 2]
    found = (hashlib.blake2b(pixels.tobytes(), digest_size=8).digest() for pixels in hashed)
    return np.array([int.from_bytes(digest, "little") for digest in found], np.uint64)


def digest_texts(digests: np.ndarray) -> list[str]:
    """(n,) checksums as particles.star has them: 16 hexadecimal digits."""
    return [f"{digest:016x}" for digest in digests.tolist()]


def check_digests(particles: Particles, stacks: Stacks, expected: Sequence[str]) -> None:
    """Refuse stacks that hold other images than prepare saw, by a sample of 200 images, the same each time.

    Parameters
    ----------
    particles, stacks
        The original images.
    expected
        (n,) what ``digest_texts`` said of them then.

    Raises
    ------
    InputError
        Names the first image of the sample whose pixels are others.
    """
    count = len(particles)
    sample = np.random.default_rng(_SEED).choice(count, min(count, _SAMPLE), replace=False)
    for row in np.sort(sample):
        if digest_texts(image_digests(stacks.read(particles, np.array([row])))) != [expected[row]]:
            path = particles.stack_paths[particles.stack_index[row]]
            raise InputError(
                f"{path}: image {particles.image_index[row] + 1} is not the one that prepare read "
                f"(particle of row {particles.source_row[row] + 1} of {particles.source_path}): "
                "the image stacks have changed since prepare: run it again"
            )
