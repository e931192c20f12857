"""How much a mesh resists deformation: the energy of a deformation (its weights per cell: ``weights.py``).

The energy is 3DFlex's: the singular values of each cell's deformation gradient should be 1 (Punjani & Fleet,
Nature Methods 2023). Rotations of a cell cost nothing; stretching, compressing and shearing it does.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from flexlib.runtime import has_triton
from flexlib.tetra.gradients import barycentric_gradients
from flexlib.tetra.tetmesh import TetraMesh

NEWTON_STEPS = 6  # reaches float32 rounding from strains of 1 and more
DEGENERATE = 1e-3  # relative to |F|^3
_CPU_CHUNK = 16384


@dataclass(frozen=True)
class RigidityTensors:
    """A mesh's rest shape and weights as tensors on one device."""

    cells: torch.Tensor  # (nc, 4) int64
    gradients_1_per_A: torch.Tensor  # (nc, 4, 3) gradient of each vertex's barycentric weight
    weight: torch.Tensor  # (nc,) rigidity x volume / total volume

    @classmethod
    def from_mesh(
        cls, mesh: TetraMesh, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> RigidityTensors:
        """Precompute what ``deformation_gradients`` and ``rigidity_energy`` need."""
        volume = mesh.cell_volumes_A3()
        return cls(
            torch.as_tensor(mesh.cells, dtype=torch.int64, device=device),
            torch.as_tensor(barycentric_gradients(mesh), dtype=dtype, device=device),
            torch.as_tensor(mesh.rigidity * volume / volume.sum(), dtype=dtype, device=device),
        )


def deformation_gradients(tensors: RigidityTensors, vertices_A: torch.Tensor) -> torch.Tensor:
    """Deformation gradient F of each cell: d(moved position) / d(rest position).

    Parameters
    ----------
    tensors : RigidityTensors
    vertices_A : torch.Tensor
        (b, nv, 3) moved vertices.

    Returns
    -------
    torch.Tensor
        (b, nc, 3, 3), row = moved axis, column = rest axis; a view of component-major memory, which
        ``rigidity_energy`` reads without a copy.
    """
    batch, num_vertices, _ = vertices_A.shape
    num_cells = len(tensors.cells)
    by_vertex = vertices_A.transpose(0, 1).reshape(num_vertices, batch * 3)
    corner = by_vertex.index_select(0, tensors.cells.flatten()).view(num_cells, 4, batch * 3)
    # relative to the first vertex: a translation drops out before rounding can make strain of it
    gradients = tensors.gradients_1_per_A[:, 1:].transpose(1, 2) @ (corner[:, 1:] - corner[:, :1])
    components = gradients.view(num_cells, 3, batch, 3).permute(3, 1, 2, 0).contiguous()
    return components.permute(2, 3, 0, 1)


def nearest_rotations(gradients: torch.Tensor) -> torch.Tensor:
    """The rotation R (det +1) nearest to each F: the polar rotation, or the best proper one where F is inverted.

    The maximum over rotations of trace(R^T F) is the largest root of Horn's quartic
    ``x^4 - 2 n x^2 - 8 det(F) x + n^2 - 4 m`` with n = |F|^2, m = |cof F|^2, found by Newton steps from above
    (as in Theobald, Acta Cryst. A61, 478, 2005); R is that maximum's derivative by F, a closed form. No decomposition
    is needed, and everything is arithmetic on whole arrays, one per matrix element.

    Parameters
    ----------
    gradients : torch.Tensor
        (b, nc, 3, 3) deformation gradients F.

    Returns
    -------
    torch.Tensor
        (b, nc, 3, 3)
    """
    element = _components(gradients).view(9, -1)
    rotation = torch.empty_like(element)
    # on a CPU: pieces that stay in cache and below torch's threshold for starting threads, one per array operation
    chunk = _CPU_CHUNK if element.device.type == "cpu" else max(1, element.shape[1])
    for start in range(0, element.shape[1], chunk):
        part = slice(start, start + chunk)
        _nearest_rotation_elements(element[:, part], rotation[:, part])
    return rotation.view(3, 3, *gradients.shape[:2]).permute(2, 3, 0, 1)


def _nearest_rotation_elements(element: torch.Tensor, rotation: torch.Tensor) -> None:
    """``nearest_rotations`` of (9, n) row-major matrix elements, written into ``rotation`` (9, n)."""
    f = element.unflatten(0, (3, 3))
    cofactor = [[_cofactor(f, i, j) for j in range(3)] for i in range(3)]
    n = element.square().sum(0)
    m = torch.zeros_like(n)
    for row in cofactor:
        for value in row:
            m.addcmul_(value, value)
    det8 = 8 * (f[0, 0] * cofactor[0][0] + f[0, 1] * cofactor[0][1] + f[0, 2] * cofactor[0][2])
    constant = n * n - 4 * m
    smallest = torch.finfo(element.dtype).tiny ** 0.5
    root = torch.sqrt(3 * n)
    for _ in range(NEWTON_STEPS):
        square = root * root
        slope = 4 * root * (square - n) - det8
        value = ((square - 2 * n) * root - det8) * root + constant
        root = root - value / slope.clamp_min(smallest)
    square = root * root
    # zero where an inverted cell's two smallest singular values cancel, and R is not unique: bound what follows
    scale = 1 / torch.maximum(root * (square - n) - 0.25 * det8, DEGENERATE * n * n.sqrt() + smallest)
    of_f, of_cofactor, of_cubic = (square + n) * scale, 2 * root * scale, -2 * scale
    for i in range(3):
        outer = [f[i, 0] * f[k, 0] + f[i, 1] * f[k, 1] + f[i, 2] * f[k, 2] for k in range(3)]  # row i of F F^T
        for j in range(3):
            cubic = outer[0] * f[0, j] + outer[1] * f[1, j] + outer[2] * f[2, j]
            rotation[3 * i + j] = of_f * f[i, j] + of_cofactor * cofactor[i][j] + of_cubic * cubic


def _components(gradients: torch.Tensor) -> torch.Tensor:
    """(b, nc, 3, 3) as contiguous (9, b, nc): arithmetic on whole arrays of one matrix element each."""
    return gradients.permute(2, 3, 0, 1).contiguous().view(9, *gradients.shape[:2])


def _cofactor(f: torch.Tensor, i: int, j: int) -> torch.Tensor:
    """Cofactor (i, j) of matrices laid out (3, 3, ...)."""
    i1, i2, j1, j2 = (i + 1) % 3, (i + 2) % 3, (j + 1) % 3, (j + 2) % 3
    return f[i1, j1] * f[i2, j2] - f[i1, j2] * f[i2, j1]


class _RigidityEnergy(torch.autograd.Function):
    """``|F - R|^2`` with its gradient ``2 (F - R)``: R's own change adds nothing, because R is optimal."""

    @staticmethod
    def forward(ctx: Any, gradients: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        strain = _components(gradients) - _components(nearest_rotations(gradients))
        ctx.save_for_backward(strain, weight)
        return strain.square().sum(0) @ weight

    @staticmethod
    def backward(ctx: Any, grad_energy: torch.Tensor) -> tuple[torch.Tensor, None]:
        strain, weight = ctx.saved_tensors
        scale = 2 * grad_energy[:, None] * weight
        return (strain * scale).view(3, 3, *strain.shape[1:]).permute(2, 3, 0, 1), None


def rigidity_energy(gradients: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Rigidity energy: the weighted sum over cells of ``sum_l (s_l - 1)^2``, s_l the singular values of F.

    Computed as ``|F - R|^2`` with R the nearest rotation. For an inverted cell the smallest singular value counts as
    negative, so that the energy drives it back. With ``RigidityTensors.weight`` it is the volume-weighted mean over
    cells of rigidity times squared strain.

    Parameters
    ----------
    gradients : torch.Tensor
        (b, nc, 3, 3) deformation gradients F.
    weight : torch.Tensor
        (nc,), a constant.

    Returns
    -------
    torch.Tensor
        (b,)
    """
    return _RigidityEnergy.apply(gradients, weight)


class _MeshRigidity(torch.autograd.Function):
    """``mesh_rigidity`` by the device's fused kernel, which gives energy and gradient in one pass."""

    @staticmethod
    def forward(ctx: Any, vertices_A: torch.Tensor, tensors: RigidityTensors) -> torch.Tensor:
        kernel = import_module(f"flexlib.tetra.rigidity_{vertices_A.device.type}")
        energy, gradient = kernel.energy_and_gradient(
            vertices_A, tensors.cells, tensors.gradients_1_per_A, tensors.weight, NEWTON_STEPS, DEGENERATE
        )
        ctx.save_for_backward(gradient)
        return energy

    @staticmethod
    def backward(ctx: Any, grad_energy: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return grad_energy[:, None, None] * gradient, None


def mesh_rigidity(tensors: RigidityTensors, vertices_A: torch.Tensor) -> torch.Tensor:
    """``rigidity_energy`` of moved vertices (b, nv, 3) in A: (b,); a fused kernel in float32 on CPU and CUDA."""
    device = vertices_A.device.type
    if vertices_A.dtype == torch.float32 and (device == "cpu" or (device == "cuda" and has_triton())):
        return _MeshRigidity.apply(vertices_A, tensors)
    return rigidity_energy(deformation_gradients(tensors, vertices_A), tensors.weight)
