"""How much a mesh resists deformation: weights per cell, and the energy of a deformation.

The energy is 3DFlex's: the singular values of each cell's deformation gradient should be 1 (Punjani & Fleet,
Nature Methods 2023). Rotations of a cell cost nothing; stretching, compressing and shearing it does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from flexlib.mesh.tetmesh import MeshVoxels, TetraMesh

_STIFF_PERIPHERY_WEIGHT = 3.0  # 3DFlex's weight for low-density periphery
_PERIPHERY_RANGE = (0.1, 0.5)  # relative density of cells that count as non-empty periphery
_ROBUST_MAXIMUM_PERCENTILE = 95.0


def density_rigidity(
    voxels: MeshVoxels, density: np.ndarray, min_rigidity_weight: float = 0.5, stiffen_low_density: bool = False
) -> np.ndarray:
    """Rigidity weight of each cell: 1 where the map is densest, ``min_rigidity_weight`` in empty space.

    The mean density of a cell, relative to the 95th percentile over cells, is mapped linearly to the weight.
    ``stiffen_low_density`` raises non-empty cells of low density (a tenth to a half of that maximum) to 3.

    Parameters: ``density`` (N, N, N) low-passed map at the voxels' box. Returns (nc,) float64.
    """
    num_cells = len(voxels.cells)
    count = np.bincount(voxels.cell, minlength=num_cells)
    total = np.bincount(voxels.cell, weights=density.ravel()[voxels.index], minlength=num_cells)
    filled = count > 0
    mean = np.zeros(num_cells)
    mean[filled] = total[filled] / count[filled]
    if not filled.all():  # cells smaller than a voxel: take the mean of the cells around their vertices
        mean[~filled] = _mean_of_neighbours(voxels, mean, filled)[~filled]
    maximum = np.percentile(mean, _ROBUST_MAXIMUM_PERCENTILE)
    relative = np.clip(mean / maximum, 0.0, 1.0) if maximum > 0 else np.ones(num_cells)
    weight = min_rigidity_weight + (1.0 - min_rigidity_weight) * relative
    if stiffen_low_density:
        weight[(relative > _PERIPHERY_RANGE[0]) & (relative < _PERIPHERY_RANGE[1])] = _STIFF_PERIPHERY_WEIGHT
    return weight


def _mean_of_neighbours(voxels: MeshVoxels, value: np.ndarray, known: np.ndarray) -> np.ndarray:
    """(nc,) mean over a cell's vertices of the mean over the known cells at that vertex."""
    flat = voxels.cells[known].ravel()
    total = np.bincount(flat, weights=np.repeat(value[known], 4), minlength=voxels.num_vertices)
    count = np.bincount(flat, minlength=voxels.num_vertices)
    at_vertex = total / np.maximum(count, 1)
    has = (count > 0)[voxels.cells]
    return (at_vertex[voxels.cells] * has).sum(1) / np.maximum(has.sum(1), 1)


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


def barycentric_gradients(mesh: TetraMesh) -> np.ndarray:
    """(nc, 4, 3) float64 gradient, in 1/A, of the barycentric weight of each of a cell's vertices."""
    corner = mesh.vertices_A[mesh.cells]
    edges = corner[:, 1:] - corner[:, :1]
    last = np.linalg.inv(edges).transpose(0, 2, 1)
    return np.concatenate([-last.sum(1, keepdims=True), last], axis=1)


def deformation_gradients(tensors: RigidityTensors, vertices_A: torch.Tensor) -> torch.Tensor:
    """Deformation gradient F of each cell: d(moved position) / d(rest position).

    Parameters: ``vertices_A`` (b, nv, 3) moved vertices. Returns (b, nc, 3, 3), row = moved axis, column = rest axis.
    """
    edges = vertices_A[:, tensors.cells[:, 1:]] - vertices_A[:, tensors.cells[:, :1]]  # (b, nc, 3 edges, 3)
    return edges.transpose(-1, -2) @ tensors.gradients_1_per_A[:, 1:]


def nearest_rotations(gradients: torch.Tensor) -> torch.Tensor:
    """The rotation R (det +1) nearest to each F: the polar rotation, or the best proper one where F is inverted.

    The maximum over rotations of trace(R^T F) is the largest root of Horn's quartic
    ``x^4 - 2 n x^2 - 8 det(F) x + n^2 - 4 m`` with n = |F|^2, m = |cof F|^2, found by Newton steps from above
    (as in Theobald, Acta Cryst. A61, 478, 2005); R is that maximum's derivative by F. No decomposition is needed.

    Parameters and result: (..., 3, 3).
    """
    rows = gradients.unbind(-2)
    cofactor = torch.stack(
        [
            torch.linalg.cross(rows[1], rows[2]),
            torch.linalg.cross(rows[2], rows[0]),
            torch.linalg.cross(rows[0], rows[1]),
        ],
        -2,
    )
    n = gradients.square().sum((-1, -2))
    m = cofactor.square().sum((-1, -2))
    det = (rows[0] * cofactor[..., 0, :]).sum(-1)
    constant = n * n - 4 * m
    root = torch.sqrt(3 * n)
    tiny = torch.finfo(gradients.dtype).tiny
    for _ in range(8):
        slope = 4 * root * (root * root - n) - 8 * det
        value = ((root * root - 2 * n) * root - 8 * det) * root + constant
        root = root - value / slope.clamp_min(tiny)
    scale = root * (root * root - n) - 2 * det
    numerator = (
        (root * root + n)[..., None, None] * gradients
        + (2 * root)[..., None, None] * cofactor
        - 2 * gradients @ (gradients.transpose(-1, -2) @ gradients)
    )
    return numerator / scale.clamp_min(tiny)[..., None, None]


def rigidity_energy(gradients: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Rigidity energy: the weighted sum over cells of ``sum_l (s_l - 1)^2``, s_l the singular values of F.

    Computed as ``|F - R|^2`` with R the nearest rotation, which is constant to first order in the gradient. For an
    inverted cell the smallest singular value counts as negative, so that the energy drives it back. With
    ``RigidityTensors.weight`` it is the volume-weighted mean over cells of rigidity times squared strain.

    Parameters: ``gradients`` F (b, nc, 3, 3); ``weight`` (nc,). Returns (b,).
    """
    with torch.no_grad():
        rotation = nearest_rotations(gradients)
    return (gradients - rotation).square().sum((-1, -2)) @ weight
