"""Triton backend of the operator for CUDA devices, float32.

A program owns a block of voxels and walks through a few images, so that values, barycentric weights and corners are
read once. Forward: a row of taps is added to the image by one atomic where the device has such (compute capability
9.0), three times as quick as one for each tap. It must be aligned: so an image is as many copies as a row has taps,
each shifted by a pixel, and they are added up at the end. Adjoint: taps are gathered, and the forces of a run of voxels
of one cell are summed inside the program before they are added to the cell's four vertices.

Atomics take effect in any order and float32 sums depend on it: two calls agree within rounding, not bit by bit.
Nothing waits for the device: launch sizes follow from shapes alone. So vertices that are not finite do not raise, as
they do on the CPU: they make pixels and gradients NaN, and no address leaves its image.

The kernels run without a GPU in Triton's interpreter: ``TRITON_INTERPRET=1`` before the first import of triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Tile(NamedTuple):
    """How the work is cut: voxels and images of a program, and its warps."""

    voxels: int
    images: int
    warps: int


class Voxels(NamedTuple):
    """What the kernels read of voxels and cells, as one argument (shapes: ``op.splat_voxels``).

    The names of fields must not be those of Triton's own tuples, such as "values".
    """

    density: torch.Tensor
    cells: torch.Tensor
    cell: torch.Tensor
    bary: torch.Tensor


class Views(NamedTuple):
    """Images (b, G, G), and the vertices (b, nv, 2) seen in them."""

    images: torch.Tensor
    vertices: torch.Tensor


class Sizes(NamedTuple):
    """Sizes that no kernel is compiled anew for."""

    batch: int
    num_voxels: int
    num_vertices: int


class Gradients(NamedTuple):
    """By the voxels' values and by the vertices: tensors, or whether they are needed."""

    by_voxel: torch.Tensor | bool
    by_vertex: torch.Tensor | bool


# at least a voxel a thread: threads that share one would add it twice
SPLAT_TILE = Tile(voxels=128, images=64, warps=4)
ADJOINT_TILE = Tile(voxels=128, images=16, warps=4)  # to the voxels' values alone
FORCES_TILE = Tile(voxels=32, images=16, warps=1)  # to the vertices too
FOLD_PIXELS = 1024  # of a program


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
def _locate(moved, corner, bary, inside, grid):
    """Pixel below each voxel along one axis, in [-1, grid], and the fraction past it.

    ``moved`` points at the first vertex' coordinate of that axis.
    """
    position = bary[0] * tl.load(moved + 2 * corner[0], mask=inside, other=0.0)
    position += bary[1] * tl.load(moved + 2 * corner[1], mask=inside, other=0.0)
    position += bary[2] * tl.load(moved + 2 * corner[2], mask=inside, other=0.0)
    position += bary[3] * tl.load(moved + 2 * corner[3], mask=inside, other=0.0)
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


_ADD_2 = tl.constexpr("red.relaxed.gpu.global.add.v2.f32 [$1], {$2, $3}; mov.u32 $0, 0;")
_ADD_4 = tl.constexpr("red.relaxed.gpu.global.add.v4.f32 [$1], {$2, $3, $4, $5}; mov.u32 $0, 0;")


@triton.jit
def _add_row(at, w0, w1, w2, w3, inside, TAPS: tl.constexpr, VECTOR: tl.constexpr):
    """Add a row of taps to TAPS numbers from ``at``, aligned to as many; of two taps the first two weights count."""
    if VECTOR:  # voxels that are not there add zeros
        address = at.to(tl.int64)
        if TAPS == 2:
            tl.inline_asm_elementwise(_ADD_2, "=r,l,f,f", [address, w0, w1], tl.int32, False, 1)
        else:
            tl.inline_asm_elementwise(_ADD_4, "=r,l,f,f,f,f", [address, w0, w1, w2, w3], tl.int32, False, 1)
    else:
        tl.atomic_add(at, w0, mask=inside, sem="relaxed")
        tl.atomic_add(at + 1, w1, mask=inside, sem="relaxed")
        if TAPS == 4:
            tl.atomic_add(at + 2, w2, mask=inside, sem="relaxed")
            tl.atomic_add(at + 3, w3, mask=inside, sem="relaxed")


@triton.jit(do_not_specialize=["sizes"])
def splat_kernel(views, voxels, sizes, grid, pitch, TAPS: tl.constexpr, TILE: tl.constexpr, VECTOR: tl.constexpr):
    """Add voxels to ``views.images``, the copies (b, TAPS, grid, pitch) of images that ``fold_kernel`` adds up."""
    voxel = tl.program_id(0) * TILE.voxels + tl.arange(0, TILE.voxels)
    inside = voxel < sizes.num_voxels
    value = tl.load(voxels.density + voxel, mask=inside, other=0.0)
    corner = _corners(voxels.cells, tl.load(voxels.cell + voxel, mask=inside, other=0), inside)
    bary = _barycentric(voxels.bary, voxel, inside)

    first = tl.program_id(1).to(tl.int64) * TILE.images
    canvas = views.images + first * (TAPS * grid * pitch)
    moved = views.vertices + first * (2 * sizes.num_vertices)
    for _ in range(tl.minimum(TILE.images, sizes.batch - tl.program_id(1) * TILE.images)):
        ix, fx = _locate(moved, corner, bary, inside, grid)
        iy, fy = _locate(moved + 1, corner, bary, inside, grid)
        leftmost = _pixel(ix, 0, TAPS, grid)
        copy = leftmost % TAPS
        column = canvas + copy * (grid * pitch) + (leftmost - copy)
        w0, w1 = _weight(fx, 0, TAPS), _weight(fx, 1, TAPS)
        w2, w3 = _weight(fx, TAPS - 2, TAPS), _weight(fx, TAPS - 1, TAPS)
        for ty in tl.static_range(TAPS):
            share = value * _weight(fy, ty, TAPS)
            at = column + _pixel(iy, ty, TAPS, grid) * pitch
            _add_row(at, share * w0, share * w1, share * w2, share * w3, inside, TAPS, VECTOR)
        canvas += TAPS * grid * pitch
        moved += 2 * sizes.num_vertices


@triton.jit(do_not_specialize=["num_pixels"])
def fold_kernel(images, copies, num_pixels, grid, pitch, TAPS: tl.constexpr, PIXELS: tl.constexpr):
    """Images (b, grid, grid) from their copies (b, TAPS, grid, pitch): pixel x of copy c is pixel x + c, periodic."""
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < num_pixels
    x, row = pixel % grid, pixel // grid
    image, y = row // grid, row % grid
    total = tl.zeros((PIXELS,), tl.float32)
    for copy in tl.static_range(TAPS):
        line = copies + ((image * TAPS + copy) * grid + y) * pitch
        at = x - copy
        total += tl.load(line + tl.where(at < 0, at + grid, at), mask=inside, other=0.0)
        # what was added past the right edge
        total += tl.load(line + at + grid, mask=inside & (at >= 0) & (at + grid < pitch), other=0.0)
    tl.store(images + pixel, total, mask=inside)


@triton.jit
def _add_within_run(
    starts_a, a0, a1, a2, a3, a4, a5, a6, a7,
    starts_b, b0, b1, b2, b3, b4, b5, b6, b7,
):  # fmt: skip
    """Combine two neighbours of a scan: eight sums that begin anew where a run of voxels of one cell starts.

    Triton gives a scan's function every number as an argument of its own.
    """
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


@triton.jit
def _run_ends(cell, voxel, own_cell, inside, num_voxels, VOXELS: tl.constexpr):
    """Where runs of voxels of one cell start inside a program, and where they end."""
    starts = (own_cell != tl.load(cell + voxel - 1, mask=inside & (voxel > 0), other=-1)).to(tl.int32)
    after = tl.load(cell + voxel + 1, mask=voxel + 1 < num_voxels, other=-1)
    return starts, inside & ((own_cell != after) | (tl.arange(0, VOXELS) == VOXELS - 1))


@triton.jit
def _add_forces(forces, corner, bary, along_x, along_y, starts, ends):
    """Share the voxels' slopes among the vertices of their cells, a sum for each run of voxels of one cell."""
    _, x0, x1, x2, x3, y0, y1, y2, y3 = tl.associative_scan(
        (
            starts,
            bary[0] * along_x,
            bary[1] * along_x,
            bary[2] * along_x,
            bary[3] * along_x,
            bary[0] * along_y,
            bary[1] * along_y,
            bary[2] * along_y,
            bary[3] * along_y,
        ),
        0,
        _add_within_run,
    )
    tl.atomic_add(forces + 2 * corner[0], x0, mask=ends, sem="relaxed")
    tl.atomic_add(forces + 2 * corner[1], x1, mask=ends, sem="relaxed")
    tl.atomic_add(forces + 2 * corner[2], x2, mask=ends, sem="relaxed")
    tl.atomic_add(forces + 2 * corner[3], x3, mask=ends, sem="relaxed")
    tl.atomic_add(forces + 2 * corner[0] + 1, y0, mask=ends, sem="relaxed")
    tl.atomic_add(forces + 2 * corner[1] + 1, y1, mask=ends, sem="relaxed")
    tl.atomic_add(forces + 2 * corner[2] + 1, y2, mask=ends, sem="relaxed")
    tl.atomic_add(forces + 2 * corner[3] + 1, y3, mask=ends, sem="relaxed")


@triton.jit(do_not_specialize=["sizes"])
def adjoint_kernel(gradients, views, voxels, sizes, grid, TAPS: tl.constexpr, NEEDS: tl.constexpr, TILE: tl.constexpr):
    """Add to ``gradients`` what ``views.images``, the gradient by the images, make of them."""
    VOXELS: tl.constexpr = TILE.voxels
    voxel = tl.program_id(0) * VOXELS + tl.arange(0, VOXELS)
    inside = voxel < sizes.num_voxels
    own_cell = tl.load(voxels.cell + voxel, mask=inside, other=-1)
    corner = _corners(voxels.cells, own_cell, inside)
    bary = _barycentric(voxels.bary, voxel, inside)
    if NEEDS.by_vertex:
        value = tl.load(voxels.density + voxel, mask=inside, other=0.0)
        starts, ends = _run_ends(voxels.cell, voxel, own_cell, inside, sizes.num_voxels, VOXELS)

    first = tl.program_id(1).to(tl.int64) * TILE.images
    canvas = views.images + first * (grid * grid)
    moved = views.vertices + first * (2 * sizes.num_vertices)
    forces = gradients.by_vertex + first * (2 * sizes.num_vertices)
    total = tl.zeros((VOXELS,), tl.float32)
    for _ in range(tl.minimum(TILE.images, sizes.batch - tl.program_id(1) * TILE.images)):
        ix, fx = _locate(moved, corner, bary, inside, grid)
        iy, fy = _locate(moved + 1, corner, bary, inside, grid)
        along_x = tl.zeros((VOXELS,), tl.float32)
        along_y = tl.zeros((VOXELS,), tl.float32)
        for ty in tl.static_range(TAPS):
            row = canvas + _pixel(iy, ty, TAPS, grid) * grid
            level = tl.zeros((VOXELS,), tl.float32)
            tilt = tl.zeros((VOXELS,), tl.float32)
            for tx in tl.static_range(TAPS):
                pixel = tl.load(row + _pixel(ix, tx, TAPS, grid), mask=inside, other=0.0)
                level += pixel * _weight(fx, tx, TAPS)
                if NEEDS.by_vertex:
                    tilt += pixel * _slope(fx, tx, TAPS)
            weight = _weight(fy, ty, TAPS)
            total += weight * level
            if NEEDS.by_vertex:
                along_x += weight * tilt
                along_y += _slope(fy, ty, TAPS) * level
        if NEEDS.by_vertex:
            _add_forces(forces, corner, bary, along_x * value, along_y * value, starts, ends)
        canvas += grid * grid
        moved += 2 * sizes.num_vertices
        forces += 2 * sizes.num_vertices
    if NEEDS.by_voxel:
        tl.atomic_add(gradients.by_voxel + voxel, total, mask=inside, sem="relaxed")


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
    batch, num_vertices = vertices.shape[:2]
    pitch = taps * (triton.cdiv(grid, taps) + 1)  # rows aligned, with room for taps past the right edge
    copies = torch.zeros((batch, taps, grid, pitch), dtype=torch.float32, device=values.device)
    images = torch.empty((batch, grid, grid), dtype=torch.float32, device=values.device)
    voxels = Voxels(*_contiguous(values, cells, cell, bary))
    sizes = Sizes(batch, len(values), num_vertices)
    tile = SPLAT_TILE
    with torch.cuda.device_of(values):
        splat_kernel[_programs(len(values), batch, tile)](
            Views(copies, *_contiguous(vertices)), voxels, sizes, grid, pitch, TAPS=taps, TILE=tile,
            VECTOR=has_vector_atomics(values.device), num_warps=tile.warps,
        )  # fmt: skip
        fold_kernel[(triton.cdiv(images.numel(), FOLD_PIXELS),)](
            images, copies, images.numel(), grid, pitch, TAPS=taps, PIXELS=FOLD_PIXELS
        )
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
    batch, num_vertices = vertices.shape[:2]
    need_values, need_vertices = needs
    grad_values = values.new_zeros(len(values) if need_values else 0)
    grad_vertices = vertices.new_zeros(vertices.shape if need_vertices else 0)
    voxels = Voxels(*_contiguous(values, cells, cell, bary))
    sizes = Sizes(batch, len(values), num_vertices)
    tile = FORCES_TILE if need_vertices else ADJOINT_TILE
    with torch.cuda.device_of(values):
        adjoint_kernel[_programs(len(values), batch, tile)](
            Gradients(grad_values, grad_vertices), Views(*_contiguous(grad_images, vertices)), voxels, sizes,
            grad_images.shape[-1], TAPS=taps, NEEDS=Gradients(need_values, need_vertices), TILE=tile,
            num_warps=tile.warps,
        )  # fmt: skip
    return grad_values, grad_vertices


@cache
def has_vector_atomics(device: torch.device) -> bool:
    """Whether the device adds two or four float32 numbers at once."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _programs(num_voxels: int, batch: int, tile: Tile) -> tuple[int, int]:
    return triton.cdiv(num_voxels, tile.voxels), triton.cdiv(batch, tile.images)


def _contiguous(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.detach().contiguous() for t in tensors]
