"""The tetrahedral mesh and the voxels inside it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


def _no_segment_map() -> np.ndarray:
    return np.zeros((0, 0, 0), np.int16)


@dataclass(frozen=True)
class TetraMesh:
    """Vertices and tetra cells in Angstrom from the box centre, axes (x, y, z), independent of any box.

    Cells have positive volume: ``det[v1-v0, v2-v0, v3-v0] > 0``. Sub-meshes of segments overlap in space where a cell
    holds voxels of two segments; ``segment_map`` then says which segment a voxel belongs to.
    """

    vertices_A: np.ndarray  # (nv, 3) float64
    cells: np.ndarray  # (nc, 4) int32 vertex indices
    rigidity: np.ndarray  # (nc,) float64 relative rigidity weight, 1 = densest regions
    segment: np.ndarray  # (nc,) int32, 0 where there is one segment only
    segment_map: np.ndarray = field(default_factory=_no_segment_map)  # (M, M, M) int, segment of each voxel; or empty
    segment_map_pixel_size_A: float = 0.0  # voxel M//2 of segment_map is the box centre

    def __post_init__(self) -> None:
        # a model file holds arrays only: the number comes back as an array of one element
        object.__setattr__(self, "segment_map_pixel_size_A", float(np.asarray(self.segment_map_pixel_size_A).item()))

    def cell_volumes_A3(self) -> np.ndarray:
        """(nc,) float64 volumes in A^3."""
        corner = self.vertices_A[self.cells]
        edges = corner[:, 1:] - corner[:, :1]
        return np.linalg.det(edges) / 6.0

    def segments_on_grid(self, box: int, pixel_size_A: float) -> np.ndarray | None:
        """(box, box, box) segment of each voxel of a centred grid, by the nearest voxel of ``segment_map``.

        None where the mesh has no segment map: there a point belongs to the cell it lies in.
        """
        if self.segment_map.size == 0:
            return None
        size = self.segment_map.shape[0]
        nearest = np.rint((np.arange(box) - box // 2) * (pixel_size_A / self.segment_map_pixel_size_A)) + size // 2
        index = np.clip(nearest.astype(int), 0, size - 1)
        return self.segment_map[np.ix_(index, index, index)]


def compact_labels(labels: np.ndarray) -> np.ndarray:
    """Segment numbers of any shape as int16 where that holds them, else as int32: a mesh keeps its segment map so."""
    return labels.astype(np.int16 if labels.max() <= np.iinfo(np.int16).max else np.int32)


def boundary_faces(mesh: TetraMesh) -> tuple[np.ndarray, np.ndarray]:
    """Faces that belong to one cell of their segment only: (nf, 3) vertex indices, and (nf,) the cell of each."""
    cells = mesh.cells
    faces = np.concatenate([cells[:, list(corners)] for corners in ((1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2))])
    owner = np.tile(np.arange(len(cells)), 4)
    keys = np.column_stack([np.sort(faces, axis=1), mesh.segment[owner]])
    _, first, count = np.unique(keys, axis=0, return_index=True, return_counts=True)
    return faces[first[count == 1]], owner[first[count == 1]]


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
