"""What is done to images before anything else: extreme pixels, slow background, noise level.

A background is a polynomial fitted to the pixels outside a circle that holds the particle, as programs do when they
normalise extracted images: a constant (grey level), a plane or a paraboloid (ice of uneven thickness). Which of them a
set needs, and each image's noise level, is for prepare to say; the same is then done whenever images are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd

CONSTANT, PLANE, PARABOLOID = 1, 3, 6  # how many polynomials a background has

_MOST_RADIUS = 0.95  # of half a box: that of a circle which leaves enough pixels outside


@dataclass(frozen=True)
class Normalisation:
    """Of n images and their optics groups."""

    terms: np.ndarray  # (groups,) int, polynomials of the background; 0 for none
    radius_A: float  # of the circle that holds the particle, about the box centre
    grey: np.ndarray  # (n,) grey level that ``reach`` is counted from
    reach: np.ndarray  # (n,) pixels further from the grey level than this are set to it; inf for none
    level: np.ndarray  # (n,) the images are divided by

    @classmethod
    def none(cls, groups: int, count: int) -> Normalisation:
        """Nothing is done to any of ``count`` images."""
        return cls(np.zeros(groups, int), 0.0, np.zeros(count), np.full(count, np.inf), np.ones(count))

    def columns(self) -> dict[str, np.ndarray]:
        """(n,) columns of particles.star, where anything is done to single images; ``from_columns`` reads them."""
        columns = {}
        if np.isfinite(self.reach).any():
            columns = {"flexGreyLevel": self.grey, "flexPixelReach": np.where(np.isfinite(self.reach), self.reach, 0.0)}
        return columns | ({"flexNoiseLevel": self.level} if (self.level != 1).any() else {})

    @classmethod
    def from_columns(cls, table: pd.DataFrame, terms: np.ndarray, radius_A: float) -> Normalisation:
        """Of the images in particles.star; ``terms`` and ``radius_A`` as prepared.json has them."""

        def column(name: str, default: float) -> np.ndarray:
            return table[name].to_numpy(np.float64) if name in table else np.full(len(table), default)

        reach = column("flexPixelReach", 0.0)
        reach = np.where(reach > 0, reach, np.inf)
        return cls(terms, radius_A, column("flexGreyLevel", 0.0), reach, column("flexNoiseLevel", 1.0))

    def needs_whole_images(self, group: int) -> bool:
        """Whether more must be read of the images of an optics group than is used."""
        return bool(self.terms[group])

    def apply(self, images: np.ndarray, rows: np.ndarray, group: int, pixel_size_A: float) -> np.ndarray:
        """Normalise images of one optics group, in place.

        Parameters
        ----------
        images
            (b, N, N) float32: whole, where there is a background.
        rows
            (b,) which images they are.
        group, pixel_size_A
            Their optics group and its pixel size.
        """
        for number in np.flatnonzero(np.isfinite(self.reach[rows])):
            image, grey = images[number], self.grey[rows[number]]
            image[~(np.abs(image - grey) <= self.reach[rows[number]])] = grey
        if self.terms[group]:
            subtract_background(images, int(self.terms[group]), self.radius_A / pixel_size_A)
        level = self.level[rows].astype(np.float32)
        if (level != 1).any():
            images /= level[:, None, None]
        return images


def subtract_background(images: np.ndarray, terms: int, radius_px: float) -> None:
    """Subtract from (b, N, N) images, in place, polynomials fitted to what is outside the circle of ``radius_px``."""
    box = images.shape[-1]
    outside, basis = polynomials(box, terms, radius_px)
    flat = images.reshape(len(images), -1)
    flat -= flat[:, outside] @ basis[outside] @ basis.T


@lru_cache(maxsize=8)
def polynomials(box: int, terms: int, radius_px: float) -> tuple[np.ndarray, np.ndarray]:
    """Polynomials of an image that are orthonormal outside a circle, where one of white noise has unit variance.

    Parameters
    ----------
    box
        N of the images.
    terms
        How many: 1, x, y, x^2, xy, y^2 in turn.
    radius_px
        Of the circle about pixel N//2; one that leaves too few pixels is taken smaller.

    Returns
    -------
    outside
        (m,) flat indices of the pixels outside.
    basis
        (N * N, terms) float32.
    """
    axis = (np.arange(box) - box // 2) / (box / 2)
    y, x = (plane.ravel() for plane in np.meshgrid(axis, axis, indexing="ij"))
    outside = np.flatnonzero(np.hypot(x, y) > min(radius_px / (box / 2), _MOST_RADIUS))
    powers = np.stack([x**0, x, y, x**2, x * y, y**2][:terms], 1)
    _, triangular = np.linalg.qr(powers[outside])
    return outside, np.linalg.solve(triangular.T, powers.T).T.astype(np.float32)
