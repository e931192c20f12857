"""A gridding kernel of four taps that is fitted to the band it is used in, rather than taken from a family.

Each tap's weight is a cubic polynomial of the fraction, as a B-spline's is, so it costs the same. Its coefficients
make what is aliased into the band |k| < N/2 as small as possible on a grid of ``OVERSAMPLING`` times the box: in parts
of a white signal 1e-4 at 0.1 cycles/pixel, 3e-4 at 0.2, 7e-4 at 0.3, 2e-3 at 0.5. The cubic B-spline has 9e-6, 2e-4,
1e-3 and 1e-2 on a grid of twice the box, and 3e-2 at 0.5 on this one. Below 1.6 times the box the low frequencies of
the voxels' lattice, which come again at one cycle/pixel, would be aliased into the band in views along its axes.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy.fft import next_fast_len

TAPS = 4
OVERSAMPLING = 1.75
_DEGREE = 3
_QUADRATURE = 32  # points in a pixel
_IMAGES = 8  # of the band, to either side, that alias into it
_ROUNDS = 60


def grid_side(least: float) -> int:
    """The next even number that is a product of small primes: a grid whose transforms are fast."""
    return 2 * int(next_fast_len(int(np.ceil(least / 2))))


@lru_cache(maxsize=4)
def kernel_coefficients(oversampling: float = OVERSAMPLING) -> np.ndarray:
    """(4, 4) float64: of the fraction's powers 3, 2, 1, 0, for the taps at floor(p) - 1, 0, 1, 2.

    Among symmetric kernels whose taps are cubic polynomials the one whose aliasing, relative to ``_tolerated``, is
    least where it is largest. For fixed weights of the frequencies that is linear least squares; the weights follow.
    """
    band = np.linspace(0, 0.5 / oversampling, 48)  # cycles per pixel of the grid
    wanted = _basis_transform(band)
    aliased = [_basis_transform(band + m) for m in range(-_IMAGES, _IMAGES + 1) if m]
    total = _basis_transform(np.zeros(1))[0]
    weight, transfer = 1 / _tolerated(band * oversampling) ** 2, np.ones(len(band))
    for _ in range(_ROUNDS):
        normal = np.sum([a.T @ (a * (weight / transfer**2)[:, None]) for a in aliased], axis=0)
        normal += 1e-13 * np.trace(normal) * np.eye(len(normal))
        halves = np.linalg.solve(normal, total)
        halves /= total @ halves
        transfer = wanted @ halves
        error = np.sqrt(sum((a @ halves) ** 2 for a in aliased)) / transfer / _tolerated(band * oversampling)
        weight *= np.sqrt(error / error.max() + 0.02)
    return _taps_of(halves)


def kernel_transfer(frequency: np.ndarray, oversampling: float = OVERSAMPLING) -> np.ndarray:
    """Fourier transform of the kernel at frequencies in cycles per pixel of the grid, as ``frequency``."""
    coefficients = kernel_coefficients(oversampling)
    fraction, weight = _gauss_points()
    powers = fraction[None] ** np.arange(_DEGREE, -1, -1)[:, None]
    pixel = np.arange(TAPS)[:, None] - (TAPS // 2 - 1) - fraction[None]  # relative to the position
    waves = np.cos(2 * np.pi * frequency[..., None, None] * pixel)
    return (waves * (coefficients.T @ powers) * weight).sum((-1, -2))


def _tolerated(frequency: np.ndarray) -> np.ndarray:
    """Aliasing at frequencies in cycles per pixel of the box, up to a factor: little where maps are strong."""
    return 10 ** (1.5 * np.minimum(frequency / 0.4, 1.0))


def _basis_transform(frequency: np.ndarray) -> np.ndarray:
    """(nk, 8) transforms of the kernels of one power of (fraction - 1/2) on one tap and mirrored on its opposite."""
    fraction, weight = _gauss_points()
    columns = []
    for tap in range(TAPS // 2):
        waves = 2 * np.cos(2 * np.pi * frequency[:, None] * (tap - (TAPS // 2 - 1) - fraction))
        columns += [(waves * weight * (fraction - 0.5) ** power).sum(1) for power in range(_DEGREE + 1)]
    return np.stack(columns, 1)


def _taps_of(halves: np.ndarray) -> np.ndarray:
    """(4, 4) coefficients of all taps in powers of the fraction from the (8,) of the basis."""
    shift = np.polynomial.Polynomial([-0.5, 1.0])
    taps = []
    for sign, rows in ((1, halves.reshape(TAPS // 2, -1)), (-1, halves.reshape(TAPS // 2, -1)[::-1])):
        for row in rows:  # a mirrored tap is the polynomial of 1/2 - fraction
            polynomial = sum(c * (sign * shift) ** power for power, c in enumerate(row))
            taps.append(polynomial.coef[::-1])
    return np.stack(taps, 1)


def _gauss_points() -> tuple[np.ndarray, np.ndarray]:
    """Points in [0, 1] and their weights."""
    points, weights = np.polynomial.legendre.leggauss(_QUADRATURE)
    return 0.5 * (points + 1), 0.5 * weights
