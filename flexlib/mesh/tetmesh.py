"""The tetrahedral mesh and the voxels inside it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TetraMesh:
    """Vertices and tetra cells in Angstrom from the box centre, axes (x, y, z), independent of any box.

    Cells have positive volume: ``det[v1-v0, v2-v0, v3-v0] > 0``.
    """

    vertices_A: np.ndarray  # (nv, 3) float64
    cells: np.ndarray  # (nc, 4) int32 vertex indices
    rigidity: np.ndarray  # (nc,) float64 relative rigidity weight, 1 = densest regions
    segment: np.ndarray  # (nc,) int32, 0 where there is one segment only

    def cell_volumes_A3(self) -> np.ndarray:
        """(nc,) float64 volumes in A^3."""
        corner = self.vertices_A[self.cells]
        edges = corner[:, 1:] - corner[:, :1]
        return np.linalg.det(edges) / 6.0


@dataclass(frozen=True)
class MeshVoxels:
    """The mask's voxels at one box, each with its cell and barycentric weights, sorted by (cell, z, y, x).

    Position of a moved voxel = ``sum_k bary[:, k] * moved_vertices[cells[cell, k]]``: linear in each cell.
    """

    box: int
    pixel_size_A: float
    index: np.ndarray  # (nvox,) int64 flat index into the (z, y, x) volume
    cell: np.ndarray  # (nvox,) int32, non-decreasing
    bary: np.ndarray  # (nvox, 4) float32, rows sum to 1
    cells: np.ndarray  # (nc, 4) int32, the mesh's
    num_vertices: int

    def __len__(self) -> int:
        return len(self.index)


def single_cell_mesh(extent_A: float) -> TetraMesh:
    """One tetra that encloses a box of side ``extent_A``: the rigid model, as a mesh without freedom."""
    corner = np.full(3, -0.6 * extent_A)
    vertices = np.vstack([corner, corner + 4.0 * extent_A * np.eye(3)])
    return TetraMesh(vertices, np.array([[0, 1, 2, 3]], np.int32), np.ones(1), np.zeros(1, np.int32))
