"""Numba backend of the operator for the CPU, float32: what ``op.py`` calls, over the kernels of ``cpu_*.py``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numba import njit, prange

from flexlib.projection.cpu_blocks import adjoint_blocks, splat_blocks
from flexlib.projection.cpu_fitted import gather_map_blocks, splat_map_blocks
from flexlib.projection.cpu_vectors import LANES
from flexlib.runtime import keeps_compiled, share_threads_with_numba

PARTIAL_SUMS = 2**25  # numbers in the blocks' gradients by the map that are kept at once


def splat(
    values: torch.Tensor,
    vertices: torch.Tensor,
    cells: torch.Tensor,
    cell: torch.Tensor,
    bary: torch.Tensor,
    grid: int,
    taps: int,
) -> torch.Tensor:
    """See ``op.splat_voxels``."""
    images = torch.empty((len(vertices), grid, grid), dtype=torch.float32)
    finite = np.ones(_num_blocks(images), np.bool_)
    *voxels, positions = _arrays(values, cells, cell, bary, vertices)
    splat_blocks(tuple(voxels), positions, taps, images.numpy(), finite)
    _check(finite)
    return images


def splat_adjoint(
    grad_images: torch.Tensor,
    values: torch.Tensor,
    vertices: torch.Tensor,
    cells: torch.Tensor,
    cell: torch.Tensor,
    bary: torch.Tensor,
    taps: int,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``op.splat_voxels_adjoint``."""
    need_values, need_vertices = needs
    grad_values = torch.zeros(len(values) if need_values else 0)
    grad_vertices = torch.empty(vertices.shape if need_vertices else (0, 0, 2))
    *voxels, positions, images = _arrays(values, cells, cell, bary, vertices, grad_images)
    batch, num_voxels = len(images), len(values)
    at_once = LANES * max(1, PARTIAL_SUMS // max(1, num_voxels)) if need_values else max(1, batch)
    for first in range(0, batch, at_once):
        some = slice(first, first + at_once)
        blocks = _num_blocks(images[some])
        finite = np.ones(blocks, np.bool_)
        sums = np.empty((blocks, num_voxels) if need_values else (0, 0), np.float32)
        to_vertices = grad_vertices.numpy()[some]
        adjoint_blocks(
            images[some], tuple(voxels), positions[some], taps, (need_values, need_vertices), sums, to_vertices, finite
        )
        _check(finite)
        if need_values:
            _add_blocks(sums, grad_values.numpy())
    return grad_values, grad_vertices


def splat_fitted(
    values: torch.Tensor,
    vertices: torch.Tensor,
    cells: torch.Tensor,
    cell: torch.Tensor,
    bary: torch.Tensor,
    grid: int,
    coefficients: np.ndarray,
) -> torch.Tensor:
    """See ``reference.splat_fitted``."""
    images = torch.empty((len(vertices), grid, grid), dtype=torch.float32)
    finite = np.ones(_num_blocks(images), np.bool_)
    *voxels, turns = _arrays(values, cells, cell, bary, vertices / grid)
    splat_map_blocks(tuple(voxels), turns, coefficients.astype(np.float32), images.numpy(), finite)
    _check(finite)
    return images


def gather_fitted(
    images: torch.Tensor,
    vertices: torch.Tensor,
    cells: torch.Tensor,
    cell: torch.Tensor,
    bary: torch.Tensor,
    coefficients: np.ndarray,
) -> torch.Tensor:
    """See ``reference.gather_fitted``."""
    total = torch.zeros(len(cell))
    *voxels, turns, pixels = _arrays(total, cells, cell, bary, vertices / images.shape[-1], images)
    table = coefficients.astype(np.float32)
    at_once = LANES * max(1, PARTIAL_SUMS // max(1, len(cell)))
    for first in range(0, len(images), at_once):
        some = slice(first, first + at_once)
        blocks = _num_blocks(pixels[some])
        finite = np.ones(blocks, np.bool_)
        sums = np.empty((blocks, len(cell)), np.float32)
        gather_map_blocks(pixels[some], tuple(voxels), turns[some], table, sums, finite)
        _check(finite)
        _add_blocks(sums, total.numpy())
    return total


def view(
    vertices_A: torch.Tensor, displacements_A: torch.Tensor | None, turn: torch.Tensor, origin_px: torch.Tensor
) -> torch.Tensor:
    """See ``op.view_vertices``; ``turn`` (b, 2, 3) holds the rotations' first two rows over the pixel size."""
    num_vertices = vertices_A.shape[-2]
    if displacements_A is None:
        displacements_A = torch.empty((0, num_vertices, 3))
    views = torch.empty((len(turn), num_vertices, 2))
    _view(*_arrays(vertices_A.view(-1, num_vertices, 3), displacements_A, turn, origin_px, views))
    return views


def view_adjoint(grad: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """(b, nv, 3) gradient by the moved vertices, from that by their views, (b, nv, 2)."""
    back = torch.empty((*grad.shape[:2], 3))
    _view_adjoint(*_arrays(grad, turn, back))
    return back


def turn_adjoint(
    grad: torch.Tensor, vertices_A: torch.Tensor, displacements_A: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients by the ``turn`` (b, 2, 3) and ``origin_px`` (b, 2) of ``view``, from that by the views, (b, nv, 2)."""
    num_vertices = vertices_A.shape[-2]
    if displacements_A is None:
        displacements_A = torch.empty((0, num_vertices, 3))
    by_turn, by_origin = torch.empty((len(grad), 2, 3)), torch.empty((len(grad), 2))
    _turn_adjoint(*_arrays(grad, vertices_A.view(-1, num_vertices, 3), displacements_A, by_turn, by_origin))
    return by_turn, by_origin


def _arrays(*tensors: torch.Tensor) -> list[np.ndarray]:
    """As arrays that share the memory of contiguous tensors."""
    share_threads_with_numba()
    return [t.detach().contiguous().numpy() for t in tensors]


def _num_blocks(images: torch.Tensor | np.ndarray) -> int:
    return -(-len(images) // LANES)


def _check(finite: np.ndarray) -> None:
    if not finite.all():
        raise FloatingPointError("mesh vertices are not finite: the model has diverged")


@njit(cache=keeps_compiled(), parallel=True)
def _add_blocks(sums, total):
    """Add ``sums`` (blocks, nvox) to ``total`` (nvox,) in the order of the blocks."""
    for j in prange(sums.shape[1]):
        for block in range(len(sums)):
            total[j] += sums[block, j]


@njit(cache=keeps_compiled(), fastmath=True, parallel=True)
def _view(vertices, displacements, turn, origin, views):
    for i in prange(len(turn)):
        of_image = vertices[min(np.int64(i), len(vertices) - 1)]
        r, shift = turn[i], origin[i]
        for v in range(vertices.shape[1]):
            x, y, z = of_image[v, 0], of_image[v, 1], of_image[v, 2]
            if len(displacements):
                x += displacements[i, v, 0]
                y += displacements[i, v, 1]
                z += displacements[i, v, 2]
            views[i, v, 0] = r[0, 0] * x + r[0, 1] * y + r[0, 2] * z - shift[0]
            views[i, v, 1] = r[1, 0] * x + r[1, 1] * y + r[1, 2] * z - shift[1]


@njit(cache=keeps_compiled(), fastmath=True, parallel=True)
def _view_adjoint(grad, turn, back):
    for i in prange(len(turn)):
        r = turn[i]
        for v in range(grad.shape[1]):
            x, y = grad[i, v, 0], grad[i, v, 1]
            back[i, v, 0] = r[0, 0] * x + r[1, 0] * y
            back[i, v, 1] = r[0, 1] * x + r[1, 1] * y
            back[i, v, 2] = r[0, 2] * x + r[1, 2] * y


@njit(cache=keeps_compiled(), fastmath=True, parallel=True)
def _turn_adjoint(grad, vertices, displacements, by_turn, by_origin):
    for i in prange(len(grad)):
        of_image = vertices[min(np.int64(i), len(vertices) - 1)]
        sums = np.zeros((2, 4))
        for v in range(vertices.shape[1]):
            x, y, z = of_image[v, 0], of_image[v, 1], of_image[v, 2]
            if len(displacements):
                x += displacements[i, v, 0]
                y += displacements[i, v, 1]
                z += displacements[i, v, 2]
            for axis in range(2):
                slope = grad[i, v, axis]
                sums[axis, 0] += slope * x
                sums[axis, 1] += slope * y
                sums[axis, 2] += slope * z
                sums[axis, 3] -= slope
        for axis in range(2):
            by_origin[i, axis] = sums[axis, 3]
            for k in range(3):
                by_turn[i, axis, k] = sums[axis, k]
