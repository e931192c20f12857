"""The rigidity energy and its gradient by the vertices in one pass over the cells: Triton, CUDA, float32.

Formulae: ``rigidity.py``. Sums are taken by atomics in any order: equal within rounding, not bit by bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_CELLS, _IMAGES, _WARPS = 128, 8, 4  # cells and deformations of a program, and its warps


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


@triton.jit(do_not_specialize=["batch", "num_cells", "num_vertices"])
def _energy_and_gradient(
    energy, by_vertex, vertices, cells, gradients, weight, batch, num_cells, num_vertices, degenerate, tiny,
    NEWTON_STEPS: tl.constexpr, CELLS: tl.constexpr, IMAGES: tl.constexpr,
):  # fmt: skip
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    inside = cell < num_cells
    v0 = tl.load(cells + 4 * cell, mask=inside, other=0)
    v1 = tl.load(cells + 4 * cell + 1, mask=inside, other=0)
    v2 = tl.load(cells + 4 * cell + 2, mask=inside, other=0)
    v3 = tl.load(cells + 4 * cell + 3, mask=inside, other=0)
    of_cell = gradients + 12 * cell
    g1 = _corner(of_cell, 1, inside)
    g2 = _corner(of_cell, 2, inside)
    g3 = _corner(of_cell, 3, inside)
    w = tl.load(weight + cell, mask=inside, other=0.0)

    first = tl.program_id(1).to(tl.int64) * IMAGES
    positions = vertices + first * (3 * num_vertices)
    forces = by_vertex + first * (3 * num_vertices)
    total = energy + first
    for _ in range(tl.minimum(IMAGES, batch - tl.program_id(1) * IMAGES)):
        p0 = _corner(positions, v0, inside)
        e1 = _minus(_corner(positions, v1, inside), p0)
        e2 = _minus(_corner(positions, v2, inside), p0)
        e3 = _minus(_corner(positions, v3, inside), p0)
        fx = _mix(e1[0], g1, e2[0], g2, e3[0], g3)  # the rows of F
        fy = _mix(e1[1], g1, e2[1], g2, e3[1], g3)
        fz = _mix(e1[2], g1, e2[2], g2, e3[2], g3)
        cx, cy, cz = _cross(fy, fz), _cross(fz, fx), _cross(fx, fy)  # of its cofactors
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
        # strain F - R, row by row: R = of_f F + of_cofactor cof F + of_cubic F F^T F
        sx = _minus(fx, _mix(of_f + of_cubic * xx, fx, of_cubic * xy, fy, of_cubic * xz, fz))
        sy = _minus(fy, _mix(of_cubic * xy, fx, of_f + of_cubic * yy, fy, of_cubic * yz, fz))
        sz = _minus(fz, _mix(of_cubic * xz, fx, of_cubic * yz, fy, of_f + of_cubic * zz, fz))
        sx = _mix(1.0, sx, -of_cofactor, cx, 0.0, cx)
        sy = _mix(1.0, sy, -of_cofactor, cy, 0.0, cy)
        sz = _mix(1.0, sz, -of_cofactor, cz, 0.0, cz)
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
        positions += 3 * num_vertices
        forces += 3 * num_vertices
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
    arrays = [t.detach().contiguous() for t in (vertices, cells, gradients, weight)]
    programs = triton.cdiv(len(cells), _CELLS), triton.cdiv(batch, _IMAGES)
    with torch.cuda.device_of(vertices):
        _energy_and_gradient[programs](
            energy, by_vertex, *arrays, batch, len(cells), num_vertices, degenerate,
            torch.finfo(torch.float32).tiny ** 0.5,
            NEWTON_STEPS=newton_steps, CELLS=_CELLS, IMAGES=_IMAGES, num_warps=_WARPS,
        )  # fmt: skip
    return energy, by_vertex
