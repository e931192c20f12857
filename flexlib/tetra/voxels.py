"""Which cell holds each voxel of the mask, and where in it: for any mesh, at any box."""

from __future__ import annotations

import logging

import numpy as np

from flexlib.errors import InputError
from flexlib.runtime import compiled, kd_tree
from flexlib.tetra.tetmesh import MeshVoxels, TetraMesh

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-9  # barycentric; a voxel on a face belongs to the cell of lower index
_CANDIDATES = 16  # nearest cells tried for a voxel outside the mesh


def voxelise(mesh: TetraMesh, mask: np.ndarray, pixel_size_A: float) -> MeshVoxels:
    """Assign every voxel of ``mask`` to a cell and compute its barycentric weights there.

    Where the mesh has a segment map, a voxel's cell is one of its own segment. A voxel outside every (such) cell takes
    the nearest one and extrapolating (partly negative) weights; ``covered`` shows which those are, and their count is
    logged.

    Parameters
    ----------
    mesh : TetraMesh
    mask : np.ndarray
        (N, N, N) bool, at any box.
    pixel_size_A : float
        The mask's voxel size.

    Returns
    -------
    MeshVoxels
        Sorted by (cell, z, y, x).

    Raises
    ------
    InputError
        The mask is empty, or a cell has no volume.
    """
    return _locate(mesh, mask, pixel_size_A)[0]


def covered(mesh: TetraMesh, mask: np.ndarray, pixel_size_A: float) -> np.ndarray:
    """(N, N, N) bool: voxels of ``mask`` that lie inside a cell of the mesh."""
    voxels, outside = _locate(mesh, mask, pixel_size_A)
    inside = np.zeros(mask.size, dtype=bool)
    inside[voxels.index[~outside]] = True
    return inside.reshape(mask.shape)


def tetra_index_map(voxels: MeshVoxels) -> np.ndarray:
    """(N, N, N) int32: the cell of each voxel, -1 outside the mask."""
    index = np.full(voxels.box**3, -1, dtype=np.int32)
    index[voxels.index] = voxels.cell
    return index.reshape((voxels.box,) * 3)


def _locate(mesh: TetraMesh, mask: np.ndarray, pixel_size_A: float) -> tuple[MeshVoxels, np.ndarray]:
    """The voxels, and (nvox,) bool for those that lie outside every cell."""
    mask = np.ascontiguousarray(mask, dtype=bool)
    if not mask.any():
        raise InputError("voxelise: the mask is empty")
    if mesh.cell_volumes_A3().min() <= 0:
        bad = int(np.argmin(mesh.cell_volumes_A3()))
        raise InputError(f"mesh: cell {bad} has no positive volume")
    box = mask.shape[0]
    base_px, inverse = _barycentric_maps(mesh, box, pixel_size_A)
    cell_of = np.full(mask.shape, -1, dtype=np.int32)
    segments = mesh.segments_on_grid(box, pixel_size_A)
    vertices_px = mesh.vertices_A / pixel_size_A + box // 2
    nowhere = np.zeros((0, 0, 0), np.int16)
    _assign_cells(
        (vertices_px, mesh.cells, mesh.segment),
        (base_px, inverse),
        mask,
        nowhere if segments is None else segments,
        cell_of,
    )

    index = np.flatnonzero(mask)
    cell = cell_of.ravel()[index]
    points_px = np.stack(np.unravel_index(index, mask.shape)[::-1], axis=1).astype(np.float64)
    outside = cell < 0
    if outside.any():
        wanted = None if segments is None else segments.ravel()[index[outside]]
        cell[outside] = _nearest_own_cell(mesh, points_px[outside], wanted, base_px, inverse, pixel_size_A)
        logger.info("%d of %d mask voxels lie outside the mesh: extrapolated", int(outside.sum()), len(index))

    order = np.argsort(cell, kind="stable")
    index, cell, outside = index[order], cell[order], outside[order]
    bary = _barycentrics(points_px[order], cell, base_px, inverse)
    return MeshVoxels(box, float(pixel_size_A), index, cell, bary, mesh.cells, len(mesh.vertices_A)), outside


def _barycentric_maps(mesh: TetraMesh, box: int, pixel_size_A: float) -> tuple[np.ndarray, np.ndarray]:
    """First vertex (nc, 3) in voxels and inverse edge matrix (nc, 3, 3): weights 1..3 = inverse @ (x - first)."""
    corner = mesh.vertices_A[mesh.cells] / pixel_size_A + box // 2
    edges = corner[:, 1:] - corner[:, :1]  # rows are edges
    return np.ascontiguousarray(corner[:, 0]), np.ascontiguousarray(np.linalg.inv(edges.transpose(0, 2, 1)))


def _barycentrics(points_px: np.ndarray, cell: np.ndarray, base_px: np.ndarray, inverse: np.ndarray) -> np.ndarray:
    """(n, 4) float32 weights of points (n, 3) in their cells (n,)."""
    bary = np.empty((len(points_px), 4), dtype=np.float32)
    chunk = 1 << 18
    for start in range(0, len(points_px), chunk):
        part = slice(start, start + chunk)
        bary[part, 1:] = np.einsum("nij,nj->ni", inverse[cell[part]], points_px[part] - base_px[cell[part]])
        # of the rounded weights: that their sum is 1 matters most, far from the box centre
        bary[part, 0] = 1.0 - bary[part, 1:].sum(1, dtype=np.float64)
    return bary


def _nearest_own_cell(
    mesh: TetraMesh,
    points_px: np.ndarray,
    segment: np.ndarray | None,
    base_px: np.ndarray,
    inverse: np.ndarray,
    pixel_size_A: float,
) -> np.ndarray:
    """(n,) int32: ``_nearest_cell`` of each point among the cells of its ``segment`` (n,), or of all where None."""
    centre = base_px[0] - mesh.vertices_A[mesh.cells[0, 0]] / pixel_size_A  # the box centre, in voxels
    centroid = mesh.vertices_A[mesh.cells].mean(1) / pixel_size_A + centre
    every = np.arange(len(mesh.cells))
    if segment is None:
        return _nearest_cell(points_px, every, centroid, base_px, inverse)
    cell = np.zeros(len(points_px), np.int32)
    for one in np.unique(segment):
        own = np.flatnonzero(mesh.segment == one)
        chosen = segment == one
        cell[chosen] = _nearest_cell(points_px[chosen], own if len(own) else every, centroid, base_px, inverse)
    return cell


def _nearest_cell(
    points_px: np.ndarray, cells: np.ndarray, centroid_px: np.ndarray, base_px: np.ndarray, inverse: np.ndarray
) -> np.ndarray:
    """(n,) int32: of ``cells`` (m,) those with the nearest centroids, and of these the one that extrapolates least.

    The measure is how far the lowest barycentric weight is below zero.
    """
    count = min(_CANDIDATES, len(cells))
    _, candidates = kd_tree(centroid_px[cells]).query(points_px, k=count)
    candidates = cells[candidates.reshape(len(points_px), count)]
    best = np.zeros(len(points_px), dtype=np.int32)
    best_weight = np.full(len(points_px), -np.inf)
    for column in candidates.T:
        last = np.einsum("nij,nj->ni", inverse[column], points_px - base_px[column])
        lowest = np.minimum(last.min(1), 1.0 - last.sum(1))
        better = lowest > best_weight
        best[better], best_weight[better] = column[better], lowest[better]
    return best


@compiled()
def _assign_cells(mesh, barycentric, mask, segment_of_voxel, cell_of) -> None:  # pragma: no cover
    """Write the lowest cell that holds each mask voxel into ``cell_of`` (z, y, x); voxels in no cell stay -1.

    ``mesh`` (vertices in voxels, cells, segment of each cell); ``barycentric`` as of ``_barycentric_maps``;
    ``segment_of_voxel`` (z, y, x), of which a cell takes its own only, or empty.
    """
    vertices_px, cells, segment_of_cell = mesh
    base_px, inverse = barycentric
    use_segments = segment_of_voxel.size > 0
    box = mask.shape[0]
    low, high = np.empty(3, np.int64), np.empty(3, np.int64)
    for c in range(cells.shape[0]):
        for axis in range(3):
            lowest = highest = vertices_px[cells[c, 0], axis]
            for k in range(1, 4):
                value = vertices_px[cells[c, k], axis]
                lowest, highest = min(lowest, value), max(highest, value)
            low[axis] = max(int(np.ceil(lowest - 1e-6)), 0)
            high[axis] = min(int(np.floor(highest + 1e-6)), box - 1)
        a = inverse[c]
        for z in range(low[2], high[2] + 1):
            dz = z - base_px[c, 2]
            for y in range(low[1], high[1] + 1):
                dy = y - base_px[c, 1]
                for x in range(low[0], high[0] + 1):
                    if not mask[z, y, x] or cell_of[z, y, x] >= 0:
                        continue
                    if use_segments and segment_of_voxel[z, y, x] != segment_of_cell[c]:
                        continue
                    dx = x - base_px[c, 0]
                    b1 = a[0, 0] * dx + a[0, 1] * dy + a[0, 2] * dz
                    b2 = a[1, 0] * dx + a[1, 1] * dy + a[1, 2] * dz
                    b3 = a[2, 0] * dx + a[2, 1] * dy + a[2, 2] * dz
                    if min(b1, b2, b3, 1.0 - b1 - b2 - b3) >= -_TOLERANCE:
                        cell_of[z, y, x] = c
