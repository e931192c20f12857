"""Triton backend of the operator for CUDA devices, float32.

A program owns a block of voxels and walks through a few images, so that values, barycentric weights and corners are
read once. Forward: every tap is added to the image in place by an atomic. Adjoint: taps are gathered, and the forces
of a run of voxels of one cell are summed inside the program before they are added to the cell's four vertices.

Atomics take effect in any order and float32 sums depend on it: two calls agree within rounding, not bit by bit.
Nothing waits for the device: launch sizes follow from shapes alone. So vertices that are not finite do not raise, as
they do on the CPU: they make pixels and gradients NaN, and no address leaves its image.

The kernels run without a GPU in Triton's interpreter: ``TRITON_INTERPRET=1`` before the first import of triton.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Tile(NamedTuple):
    """How the work is cut: voxels and images of a program, and its warps."""

    voxels: int
    images: int
    warps: int


SPLAT_TILE = Tile(voxels=128, images=16, warps=4)
ADJOINT_TILE = Tile(voxels=128, images=16, warps=4)


@triton.jit
def _weight(fraction, tap: tl.constexpr, TAPS: tl.constexpr):
    """B-spline weight of a tap, ``fraction`` of a pixel past the pixel below the voxel."""
    f = fraction
    g = 1.0 - fraction
    if TAPS == 2:
        weight = f if tap == 1 else g
    else:
        if tap == 0:
            weight = g * g * g * (1.0 / 6.0)
        elif tap == 1:
            weight = 2.0 / 3.0 - f * f + 0.5 * f * f * f
        elif tap == 2:
            weight = 2.0 / 3.0 - g * g + 0.5 * g * g * g
        else:
            weight = f * f * f * (1.0 / 6.0)
    return weight


@triton.jit
def _slope(fraction, tap: tl.constexpr, TAPS: tl.constexpr):
    """Derivative of ``_weight`` by the voxel's position."""
    f = fraction
    g = 1.0 - fraction
    if TAPS == 2:
        slope = tl.full(f.shape, 2.0 * tap - 1.0, tl.float32)
    else:
        if tap == 0:
            slope = -0.5 * g * g
        elif tap == 1:
            slope = -2.0 * f + 1.5 * f * f
        elif tap == 2:
            slope = 2.0 * g - 1.5 * g * g
        else:
            slope = 0.5 * f * f
    return slope


@triton.jit
def _pixel(below, tap: tl.constexpr, TAPS: tl.constexpr, grid):
    """Index along one axis, in the periodic image, of a tap of a voxel past pixel ``below`` in [-1, grid]."""
    at = below + (tap - (TAPS // 2 - 1))
    at = tl.where(at < 0, at + grid, at)
    return tl.where(at >= grid, at - grid, at)


@triton.jit
def _place(moved, corner0, corner1, corner2, corner3, bary0, bary1, bary2, bary3, inside, grid):
    """Pixel below each voxel along one axis, in [-1, grid], and the fraction past it.

    ``moved`` points at the first vertex' coordinate of that axis.
    """
    position = bary0 * tl.load(moved + 2 * corner0, mask=inside, other=0.0)
    position += bary1 * tl.load(moved + 2 * corner1, mask=inside, other=0.0)
    position += bary2 * tl.load(moved + 2 * corner2, mask=inside, other=0.0)
    position += bary3 * tl.load(moved + 2 * corner3, mask=inside, other=0.0)
    side = grid * 1.0
    position -= side * tl.floor(position / side)
    below = tl.floor(position)
    # rounding may leave a position just below 0 or at ``grid``; the bounds also keep what is no number in the image
    return tl.minimum(tl.maximum(below.to(tl.int32), -1), grid), position - below


@triton.jit
def _corners(cells, cell, inside):
    """The four vertices of each voxel's cell."""
    row = cells + 4 * cell
    return (
        tl.load(row, mask=inside, other=0),
        tl.load(row + 1, mask=inside, other=0),
        tl.load(row + 2, mask=inside, other=0),
        tl.load(row + 3, mask=inside, other=0),
    )


@triton.jit
def _barycentric(bary, voxel, inside):
    """The four barycentric weights of each voxel."""
    row = bary + 4 * voxel
    return (
        tl.load(row, mask=inside, other=0.0),
        tl.load(row + 1, mask=inside, other=0.0),
        tl.load(row + 2, mask=inside, other=0.0),
        tl.load(row + 3, mask=inside, other=0.0),
    )


@triton.jit(do_not_specialize=["batch", "num_voxels", "num_vertices"])
def _splat(
    images, values, vertices, cells, cell, bary, batch, num_voxels, num_vertices, grid,
    TAPS: tl.constexpr, VOXELS: tl.constexpr, IMAGES: tl.constexpr,
):  # fmt: skip
    voxel = tl.program_id(0) * VOXELS + tl.arange(0, VOXELS)
    inside = voxel < num_voxels
    value = tl.load(values + voxel, mask=inside, other=0.0)
    corner0, corner1, corner2, corner3 = _corners(cells, tl.load(cell + voxel, mask=inside, other=0), inside)
    bary0, bary1, bary2, bary3 = _barycentric(bary, voxel, inside)

    first = tl.program_id(1).to(tl.int64) * IMAGES
    canvas = images + first * (grid * grid)
    moved = vertices + first * (2 * num_vertices)
    for _ in range(tl.minimum(IMAGES, batch - tl.program_id(1) * IMAGES)):
        ix, fx = _place(moved, corner0, corner1, corner2, corner3, bary0, bary1, bary2, bary3, inside, grid)
        iy, fy = _place(moved + 1, corner0, corner1, corner2, corner3, bary0, bary1, bary2, bary3, inside, grid)
        for ty in tl.static_range(TAPS):
            row = canvas + _pixel(iy, ty, TAPS, grid) * grid
            share = value * _weight(fy, ty, TAPS)
            for tx in tl.static_range(TAPS):
                pixel = row + _pixel(ix, tx, TAPS, grid)
                tl.atomic_add(pixel, share * _weight(fx, tx, TAPS), mask=inside, sem="relaxed")
        canvas += grid * grid
        moved += 2 * num_vertices


@triton.jit
def _add_within_run(
    starts_a, a0, a1, a2, a3, a4, a5, a6, a7,
    starts_b, b0, b1, b2, b3, b4, b5, b6, b7,
):  # fmt: skip
    """Combine two neighbours of a scan: eight sums that begin anew where a run of voxels of one cell starts."""
    new = starts_b != 0
    return (
        starts_a | starts_b,
        tl.where(new, b0, a0 + b0),
        tl.where(new, b1, a1 + b1),
        tl.where(new, b2, a2 + b2),
        tl.where(new, b3, a3 + b3),
        tl.where(new, b4, a4 + b4),
        tl.where(new, b5, a5 + b5),
        tl.where(new, b6, a6 + b6),
        tl.where(new, b7, a7 + b7),
    )


@triton.jit(do_not_specialize=["batch", "num_voxels", "num_vertices"])
def _adjoint(
    grad_values, grad_vertices, images, values, vertices, cells, cell, bary, batch, num_voxels, num_vertices, grid,
    TAPS: tl.constexpr, NEED_VALUES: tl.constexpr, NEED_VERTICES: tl.constexpr,
    VOXELS: tl.constexpr, IMAGES: tl.constexpr,
):  # fmt: skip
    voxel = tl.program_id(0) * VOXELS + tl.arange(0, VOXELS)
    inside = voxel < num_voxels
    own_cell = tl.load(cell + voxel, mask=inside, other=-1)
    corner0, corner1, corner2, corner3 = _corners(cells, own_cell, inside)
    bary0, bary1, bary2, bary3 = _barycentric(bary, voxel, inside)
    if NEED_VERTICES:
        value = tl.load(values + voxel, mask=inside, other=0.0)
        starts = (own_cell != tl.load(cell + voxel - 1, mask=inside & (voxel > 0), other=-1)).to(tl.int32)
        after = tl.load(cell + voxel + 1, mask=voxel + 1 < num_voxels, other=-1)
        ends = inside & ((own_cell != after) | (tl.arange(0, VOXELS) == VOXELS - 1))

    first = tl.program_id(1).to(tl.int64) * IMAGES
    canvas = images + first * (grid * grid)
    moved = vertices + first * (2 * num_vertices)
    forces = grad_vertices + first * (2 * num_vertices)
    total = tl.zeros((VOXELS,), tl.float32)
    for _ in range(tl.minimum(IMAGES, batch - tl.program_id(1) * IMAGES)):
        ix, fx = _place(moved, corner0, corner1, corner2, corner3, bary0, bary1, bary2, bary3, inside, grid)
        iy, fy = _place(moved + 1, corner0, corner1, corner2, corner3, bary0, bary1, bary2, bary3, inside, grid)
        along_x = tl.zeros((VOXELS,), tl.float32)
        along_y = tl.zeros((VOXELS,), tl.float32)
        for ty in tl.static_range(TAPS):
            row = canvas + _pixel(iy, ty, TAPS, grid) * grid
            level = tl.zeros((VOXELS,), tl.float32)
            tilt = tl.zeros((VOXELS,), tl.float32)
            for tx in tl.static_range(TAPS):
                pixel = tl.load(row + _pixel(ix, tx, TAPS, grid), mask=inside, other=0.0)
                level += pixel * _weight(fx, tx, TAPS)
                if NEED_VERTICES:
                    tilt += pixel * _slope(fx, tx, TAPS)
            weight = _weight(fy, ty, TAPS)
            total += weight * level
            if NEED_VERTICES:
                along_x += weight * tilt
                along_y += _slope(fy, ty, TAPS) * level
        if NEED_VERTICES:
            along_x *= value
            along_y *= value
            _, x0, x1, x2, x3, y0, y1, y2, y3 = tl.associative_scan(
                (
                    starts,
                    bary0 * along_x,
                    bary1 * along_x,
                    bary2 * along_x,
                    bary3 * along_x,
                    bary0 * along_y,
                    bary1 * along_y,
                    bary2 * along_y,
                    bary3 * along_y,
                ),
                0,
                _add_within_run,
            )
            tl.atomic_add(forces + 2 * corner0, x0, mask=ends, sem="relaxed")
            tl.atomic_add(forces + 2 * corner1, x1, mask=ends, sem="relaxed")
            tl.atomic_add(forces + 2 * corner2, x2, mask=ends, sem="relaxed")
            tl.atomic_add(forces + 2 * corner3, x3, mask=ends, sem="relaxed")
            tl.atomic_add(forces + 2 * corner0 + 1, y0, mask=ends, sem="relaxed")
            tl.atomic_add(forces + 2 * corner1 + 1, y1, mask=ends, sem="relaxed")
            tl.atomic_add(forces + 2 * corner2 + 1, y2, mask=ends, sem="relaxed")
            tl.atomic_add(forces + 2 * corner3 + 1, y3, mask=ends, sem="relaxed")
        canvas += grid * grid
        moved += 2 * num_vertices
        forces += 2 * num_vertices
    if NEED_VALUES:
        tl.atomic_add(grad_values + voxel, total, mask=inside, sem="relaxed")


def _programs(num_voxels: int, batch: int, tile: Tile) -> tuple[int, int]:
    return triton.cdiv(num_voxels, tile.voxels), triton.cdiv(batch, tile.images)


def splat(values, vertices, cells, cell, bary, grid, taps):
    """See ``op.splat_voxels``."""
    batch, num_vertices = vertices.shape[:2]
    images = torch.zeros((batch, grid, grid), dtype=torch.float32, device=values.device)
    arguments = [t.detach().contiguous() for t in (values, vertices, cells, cell, bary)]
    tile = SPLAT_TILE
    with torch.cuda.device_of(values):
        _splat[_programs(len(values), batch, tile)](
            images, *arguments, batch, len(values), num_vertices, grid,
            TAPS=taps, VOXELS=tile.voxels, IMAGES=tile.images, num_warps=tile.warps,
        )  # fmt: skip
    return images


def splat_adjoint(grad_images, values, vertices, cells, cell, bary, taps, need_values, need_vertices):
    """See ``op.splat_voxels_adjoint``."""
    batch, num_vertices = vertices.shape[:2]
    grad_values = values.new_zeros(len(values) if need_values else 0)
    grad_vertices = vertices.new_zeros(vertices.shape if need_vertices else 0)
    arguments = [t.detach().contiguous() for t in (grad_images, values, vertices, cells, cell, bary)]
    tile = ADJOINT_TILE
    with torch.cuda.device_of(values):
        _adjoint[_programs(len(values), batch, tile)](
            grad_values, grad_vertices, *arguments, batch, len(values), num_vertices, grad_images.shape[-1],
            TAPS=taps, NEED_VALUES=need_values, NEED_VERTICES=need_vertices,
            VOXELS=tile.voxels, IMAGES=tile.images, num_warps=tile.warps,
        )  # fmt: skip
    return grad_values, grad_vertices
