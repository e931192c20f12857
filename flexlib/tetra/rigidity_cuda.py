"""The rigidity energy and its gradient by the vertices in one pass over the cells: Triton, CUDA, float32.

Formulae: ``rigidity.py``. Sums are taken by atomics in any order: equal within rounding, not bit by bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Tile(NamedTuple):
    """How the work is cut: cells and deformations of a program, and its warps."""

    cells: int
    images: int
    warps: int


class Results(NamedTuple):
    """Energy (b,) and its gradient by the vertices (b, nv, 3)."""

    energy: torch.Tensor
    by_vertex: torch.Tensor


class Cells(NamedTuple):
    """As in ``rigidity.RigidityTensors``."""

    vertices: torch.Tensor
    gradients: torch.Tensor
    weight: torch.Tensor


class Sizes(NamedTuple):
    """Sizes that no kernel is compiled anew for."""

    batch: int
    num_cells: int
    num_vertices: int


TILE = Tile(cells=128, images=8, warps=4)


@triton.jit
def _corner(positions, vertex, inside):
    """(x, y, z) of one vertex of each cell."""
    at = positions + 3 * vertex
    return (
        tl.load(at, mask=inside, other=0.0),
        tl.load(at + 1, mask=inside, other=0.0),
        tl.load(at + 2, mask=inside, other=0.0),
    )


@triton.jit
def _dot(a, b):
    """Scalar product of two vectors."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


@triton.jit
def _cross(a, b):
    """Vector product of two vectors."""
    return (a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0])


@triton.jit
def _mix(a, u, b, v, c, w):
    """``a u + b v + c w`` of scalars and vectors."""
    return (
        a * u[0] + b * v[0] + c * w[0],
        a * u[1] + b * v[1] + c * w[1],
        a * u[2] + b * v[2] + c * w[2],
    )


@triton.jit
def _minus(a, b):
    """Difference of two vectors."""
    return (a[0] - b[0], a[1] - b[1], a[2] - b[2])


@triton.jit
def _add_force(forces, vertex, force, inside):
    """Add a vector to one vertex of each cell."""
    at = forces + 3 * vertex
    tl.atomic_add(at, force[0], mask=inside, sem="relaxed")
    tl.atomic_add(at + 1, force[1], mask=inside, sem="relaxed")
    tl.atomic_add(at + 2, force[2], mask=inside, sem="relaxed")


@triton.jit
def _strain(fx, fy, fz, degenerate, tiny, NEWTON_STEPS: tl.constexpr):
    """The rows of F - R, R the rotation nearest to F, from the rows of F."""
    cx, cy, cz = _cross(fy, fz), _cross(fz, fx), _cross(fx, fy)  # the rows of its cofactors
    xx, yy, zz = _dot(fx, fx), _dot(fy, fy), _dot(fz, fz)  # elements of F F^T
    xy, xz, yz = _dot(fx, fy), _dot(fx, fz), _dot(fy, fz)
    n = xx + yy + zz
    m = _dot(cx, cx) + _dot(cy, cy) + _dot(cz, cz)
    det8 = 8.0 * _dot(fx, cx)
    constant = n * n - 4.0 * m
    root = tl.sqrt(3.0 * n)
    for _step in tl.static_range(NEWTON_STEPS):
        square = root * root
        slope = tl.maximum(4.0 * root * (square - n) - det8, tiny)
        root -= (((square - 2.0 * n) * root - det8) * root + constant) / slope
    square = root * root
    scale = 1.0 / tl.maximum(root * (square - n) - 0.25 * det8, degenerate * n * tl.sqrt(n) + tiny)
    of_f, of_cofactor, of_cubic = (square + n) * scale, 2.0 * root * scale, -2.0 * scale
    # row by row: R = of_f F + of_cofactor cof F + of_cubic F F^T F
    sx = _minus(fx, _mix(of_f + of_cubic * xx, fx, of_cubic * xy, fy, of_cubic * xz, fz))
    sy = _minus(fy, _mix(of_cubic * xy, fx, of_f + of_cubic * yy, fy, of_cubic * yz, fz))
    sz = _minus(fz, _mix(of_cubic * xz, fx, of_cubic * yz, fy, of_f + of_cubic * zz, fz))
    sx = _mix(1.0, sx, -of_cofactor, cx, 0.0, cx)
    sy = _mix(1.0, sy, -of_cofactor, cy, 0.0, cy)
    sz = _mix(1.0, sz, -of_cofactor, cz, 0.0, cz)
    return sx, sy, sz


@triton.jit(do_not_specialize=["sizes"])
def energy_kernel(results, positions, cells, sizes, degenerate, tiny, NEWTON_STEPS: tl.constexpr, TILE: tl.constexpr):
    """Add to ``results`` the energies of moved vertices ``positions``, and their gradients."""
    cell = tl.program_id(0) * TILE.cells + tl.arange(0, TILE.cells)
    inside = cell < sizes.num_cells
    v0 = tl.load(cells.vertices + 4 * cell, mask=inside, other=0)
    v1 = tl.load(cells.vertices + 4 * cell + 1, mask=inside, other=0)
    v2 = tl.load(cells.vertices + 4 * cell + 2, mask=inside, other=0)
    v3 = tl.load(cells.vertices + 4 * cell + 3, mask=inside, other=0)
    of_cell = cells.gradients + 12 * cell
    g1 = _corner(of_cell, 1, inside)
    g2 = _corner(of_cell, 2, inside)
    g3 = _corner(of_cell, 3, inside)
    w = tl.load(cells.weight + cell, mask=inside, other=0.0)

    first = tl.program_id(1).to(tl.int64) * TILE.images
    positions += first * (3 * sizes.num_vertices)
    forces = results.by_vertex + first * (3 * sizes.num_vertices)
    total = results.energy + first
    for _ in range(tl.minimum(TILE.images, sizes.batch - tl.program_id(1) * TILE.images)):
        p0 = _corner(positions, v0, inside)
        e1 = _minus(_corner(positions, v1, inside), p0)
        e2 = _minus(_corner(positions, v2, inside), p0)
        e3 = _minus(_corner(positions, v3, inside), p0)
        fx = _mix(e1[0], g1, e2[0], g2, e3[0], g3)  # the rows of F
        fy = _mix(e1[1], g1, e2[1], g2, e3[1], g3)
        fz = _mix(e1[2], g1, e2[2], g2, e3[2], g3)
        sx, sy, sz = _strain(fx, fy, fz, degenerate, tiny, NEWTON_STEPS)
        strain2 = w * (_dot(sx, sx) + _dot(sy, sy) + _dot(sz, sz))
        # a masked cell has F = 0, and so no strain
        tl.atomic_add(total, tl.sum(strain2, 0), sem="relaxed")
        twice = 2.0 * w
        t1 = (twice * _dot(sx, g1), twice * _dot(sy, g1), twice * _dot(sz, g1))
        t2 = (twice * _dot(sx, g2), twice * _dot(sy, g2), twice * _dot(sz, g2))
        t3 = (twice * _dot(sx, g3), twice * _dot(sy, g3), twice * _dot(sz, g3))
        _add_force(forces, v1, t1, inside)
        _add_force(forces, v2, t2, inside)
        _add_force(forces, v3, t3, inside)
        _add_force(forces, v0, _mix(-1.0, t1, -1.0, t2, -1.0, t3), inside)
        positions += 3 * sizes.num_vertices
        forces += 3 * sizes.num_vertices
        total += 1


def energy_and_gradient(
    vertices: torch.Tensor,
    cells: torch.Tensor,
    gradients: torch.Tensor,
    weight: torch.Tensor,
    newton_steps: int,
    degenerate: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Energy (b,) and its gradient (b, nv, 3) at ``vertices`` (b, nv, 3) A; the rest as in ``RigidityTensors``."""
    batch, num_vertices, _ = vertices.shape
    energy = vertices.new_zeros(batch)
    by_vertex = vertices.new_zeros(vertices.shape)
    positions, *of_cells = (t.detach().contiguous() for t in (vertices, cells, gradients, weight))
    sizes = Sizes(batch, len(cells), num_vertices)
    programs = triton.cdiv(len(cells), TILE.cells), triton.cdiv(batch, TILE.images)
    tiny = torch.finfo(torch.float32).tiny ** 0.5
    with torch.cuda.device_of(vertices):
        energy_kernel[programs](
            Results(energy, by_vertex), positions, Cells(*of_cells), sizes, degenerate, tiny,
            NEWTON_STEPS=newton_steps, TILE=TILE, num_warps=TILE.warps,
        )  # fmt: skip
    return energy, by_vertex
