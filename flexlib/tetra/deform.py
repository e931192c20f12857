"""Density carried by the flow: each voxel of the mask moves with its mesh cell, at any box.

Density is pushed forward: a moved voxel is splatted, with a cubic B-spline, onto a grid that is twice as fine;
dividing by the transfer function of the spline's samples and cropping to the volume's own frequencies gives the moved
density as the operator of training and reconstruction sees it. Mass is kept exactly, and a voxel that does not move
gives back itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
from numba import njit, prange
from scipy import fft, ndimage

from flexlib.imaging.masks import FULL_FLOOR, inside_mask
from flexlib.runtime import keeps_compiled
from flexlib.tetra.tetmesh import MeshVoxels, TetraMesh
from flexlib.tetra.voxels import voxelise

_OVERSAMPLING = 2
_CHUNK = 32  # planes transformed at a time


def moving_mask(canonical: np.ndarray, canonical_pixel_size_A: float, box: int, pixel_size_A: float) -> np.ndarray:
    """Where the canonical map has density (its mask), brought to another grid.

    Box centre lies on box centre; interpolation is trilinear.

    Returns
    -------
    mask
        (box, box, box) float32 in [0, 1].
    """
    support = (canonical != 0).astype(np.float32)
    if box == len(support) and abs(pixel_size_A / canonical_pixel_size_A - 1) < 1e-4:
        return support
    scale = pixel_size_A / canonical_pixel_size_A
    offset = len(support) // 2 - scale * (box // 2)
    return ndimage.affine_transform(support, [scale] * 3, offset, (box,) * 3, order=1, mode="constant")


def deform_volume(
    volume: np.ndarray, pixel_size_A: float, mask: np.ndarray, mesh: TetraMesh, displacements_A: np.ndarray
) -> np.ndarray:
    """Push the masked density of ``volume`` forward with the mesh.

    For many displacements of one volume use ``VolumeDeformer``.

    Parameters
    ----------
    volume
        (N, N, N).
    pixel_size_A
        Of the volume.
    mask
        (N, N, N) in [0, 1], the share of each voxel's density that moves.
    mesh
        That carries the density.
    displacements_A
        (nv, 3) of the mesh vertices.

    Returns
    -------
    moved
        (N, N, N) float32 of the same mass.
    """
    return VolumeDeformer(volume, pixel_size_A, mask, mesh).deform(displacements_A)


@dataclass(frozen=True)
class _Moving:
    """The part of a volume that moves, sorted by (cell, z, y, x)."""

    voxels: MeshVoxels
    values: np.ndarray  # (nvox,) float32
    home: np.ndarray  # (nvox, 3) int64 voxel (x, y, z)


class VolumeDeformer:
    """A volume split into what rides on the mesh and what stays."""

    def __init__(self, volume: np.ndarray, pixel_size_A: float, mask: np.ndarray, mesh: TetraMesh) -> None:
        """See ``deform_volume``."""
        share = np.where(inside_mask(mask, FULL_FLOOR), mask, 0).astype(np.float32)
        voxels = voxelise(mesh, share > 0, pixel_size_A)
        moving = share * volume
        home = np.stack(np.unravel_index(voxels.index, volume.shape)[::-1], axis=1)
        self._moving = _Moving(voxels, moving.reshape(-1)[voxels.index].astype(np.float32), home)
        self._resting = (volume - moving).astype(np.float32)

    def deform(self, displacements_A: np.ndarray) -> np.ndarray:
        """(N, N, N) float32: the volume with its mesh vertices moved by (nv, 3) Angstrom."""
        voxels, box = self._moving.voxels, len(self._resting)
        corners = np.asarray(displacements_A, np.float32)[voxels.cells[voxels.cell]]  # (nvox, 4, 3)
        shift_px = (voxels.bary[:, None] @ corners)[:, 0] / np.float32(voxels.pixel_size_A)
        grid = box * _OVERSAMPLING
        # the shift is split before the voxel's own position is added, so that no digits are lost in large boxes
        whole = np.floor(shift_px * _OVERSAMPLING)
        fraction = shift_px * _OVERSAMPLING - whole
        base = (self._moving.home * _OVERSAMPLING + whole.astype(np.int64)) % grid
        fine = splat_cubic(self._moving.values, base, fraction, grid)
        return self._resting + _to_coarse_grid(fine, box)


def splat_cubic(values: np.ndarray, base: np.ndarray, fraction: np.ndarray, grid: int) -> np.ndarray:
    """Add cubic B-splines to a periodic grid, in an order that does not depend on the number of threads.

    Parameters
    ----------
    values
        (n,) float32.
    base, fraction
        (n, 3) integers in [0, grid) and (n, 3) float32 in [0, 1): positions (x, y, z).
    grid
        Side of the grid.

    Returns
    -------
    volume
        (grid, grid, grid) float32, axes (z, y, x), of the sum of ``values``.
    """
    slabs = max(2, 2 * (grid // 16))  # an even number, each at least 4 planes thick for any grid of 8 or more
    edges = np.linspace(0, grid, slabs + 1).astype(np.int64)
    slab = np.searchsorted(edges, base[:, 2], side="right") - 1
    order = np.argsort(slab, kind="stable")
    first = np.searchsorted(slab[order], np.arange(slabs + 1))
    image = np.zeros((grid, grid, grid), np.float32)
    _splat_slabs(
        values[order], base[order].astype(np.int32), fraction[order].astype(np.float32), first, np.int32(grid), image
    )
    return image


@njit(cache=keeps_compiled())
def _bspline(f, weight) -> None:
    g = np.float32(1) - f
    weight[0] = g * g * g / np.float32(6)
    weight[1] = np.float32(2 / 3) - f * f + f * f * f / np.float32(2)
    weight[2] = np.float32(2 / 3) - g * g + g * g * g / np.float32(2)
    weight[3] = f * f * f / np.float32(6)


@njit(cache=keeps_compiled(), parallel=True)
def _splat_slabs(values, base, fraction, first, grid, image) -> None:
    """Even slabs at once, then odd ones: a slab writes at most two planes into its neighbours, which are at rest."""
    slabs = len(first) - 1
    for colour in range(2):
        for pair in prange(slabs // 2):
            slab = 2 * pair + colour
            wx, wy, wz = np.empty(4, np.float32), np.empty(4, np.float32), np.empty(4, np.float32)
            columns = np.empty(4, np.int64)
            for j in range(first[slab], first[slab + 1]):
                _bspline(fraction[j, 0], wx)
                _bspline(fraction[j, 1], wy)
                _bspline(fraction[j, 2], wz)
                for c in range(4):
                    columns[c] = (base[j, 0] + c - 1) % grid
                for a in range(4):
                    plane = image[(base[j, 2] + a - 1) % grid]
                    for b in range(4):
                        row = plane[(base[j, 1] + b - 1) % grid]
                        weight = values[j] * wz[a] * wy[b]
                        for c in range(4):
                            row[columns[c]] += weight * wx[c]


def _to_coarse_grid(fine: np.ndarray, box: int) -> np.ndarray:
    """Undo the B-spline and keep the frequencies of ``box``: (grid, grid, grid) -> (box, box, box) float32.

    The divisor is the transform of the spline's samples, (2 + cos w) / 3, which makes a volume at rest exact; it
    differs from that of the spline itself by 4e-3 at 0.4 cycles per voxel of ``box``.
    """
    grid, half = len(fine), box // 2
    divisor = (2 + np.cos(2 * np.pi * fft.fftfreq(box, 1.0 / box) / grid)) / 3
    divisor = divisor.astype(np.float32)
    keep = np.r_[0:half, grid - half : grid]
    workers = numba.get_num_threads()
    spectrum = np.empty((grid, box, half + 1), np.complex64)
    for first in range(0, grid, _CHUNK):  # the fine spectrum as a whole would be four times as large
        planes = fft.rfft(fine[first : first + _CHUNK], axis=2, workers=workers)[:, :, : half + 1] / divisor[: half + 1]
        planes = fft.fft(planes, axis=1, workers=workers, overwrite_x=True)
        spectrum[first : first + _CHUNK] = planes[:, keep] / divisor[:, None]
    spectrum = fft.fft(spectrum, axis=0, workers=workers, overwrite_x=True)[keep] / divisor[:, None, None]
    return fft.irfftn(spectrum, s=(box, box, box), workers=workers, overwrite_x=True).astype(np.float32)
