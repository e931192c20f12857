"""Numba kernel that adds images' pixels to their places in a map's Fourier space."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

from flexlib.runtime import keeps_compiled


@njit(cache=keeps_compiled(), parallel=True, fastmath=True, error_model="numpy")
def spread_planes(
    weights: Any, waves: Any, axes: Any, table: Any, shape: tuple[int, int, int], slabs: int, grid: Any
) -> None:
    """Add ``weights`` (b, pixels) to ``grid``, which is periodic in z and wider than ``shape`` in y and x.

    A pixel's place is ``waves @ axes``, (pixels, 2) and (b, 2, 3) grid points along x, y, z; ``table`` (4, 4) holds the
    kernel's coefficients. Planes are cut into ``slabs``, one for each thread: sums are the same for any number of them.
    """
    nz, ny, nx = shape
    for slab in prange(slabs):
        first, end = slab * nz // slabs, (slab + 1) * nz // slabs
        along = np.empty((3, 4), np.float32)
        base = np.empty(3, np.int64)
        for i in range(len(weights)):
            for pixel in range(len(waves)):
                kx, ky, weight = waves[pixel, 0], waves[pixel, 1], weights[i, pixel]
                for axis in range(3):
                    place = kx * axes[i, 0, axis] + ky * axes[i, 1, axis]
                    below = np.floor(place)
                    base[axis] = np.int64(below) - 1
                    fraction = place - below
                    for tap in range(4):
                        value = table[0, tap]
                        for power in range(1, 4):
                            value = value * fraction + table[power, tap]
                        along[axis, tap] = value
                # places lie within half a period of zero: one period more is enough
                x = base[0] + nx if base[0] < 0 else base[0]
                y = base[1] + ny if base[1] < 0 else base[1]
                for tap_z in range(4):
                    z = base[2] + tap_z
                    z = z + nz if z < 0 else z
                    if first <= z < end:
                        for tap_y in range(4):
                            share = weight * along[2, tap_z] * along[1, tap_y]
                            row = grid[z, y + tap_y]
                            for tap_x in range(4):
                                row[x + tap_x] += share * along[0, tap_x]
