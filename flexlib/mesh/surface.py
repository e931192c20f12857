"""Meshes that follow the surface of the segments, made with TetGen (optional extra ``tetgen``).

TetGen's core is AGPL-3.0-or-later: it is no dependency, and imported only in here, only when asked for.

The surfaces of all segments are made together as a surface net (Gibson, MICCAI 1998): labels on a grid about as coarse
as the wanted cells, one vertex in each cube of eight grid points that do not all have the same label, one
quadrilateral across each grid edge between two labels; then the vertices are relaxed within their cubes. Where two
segments meet they share that surface, vertex by vertex, so that one run of TetGen fills all of them with cells that
fit together, and joining or parting two segments is a matter of whose vertex is whose (``fuse_submeshes``).
"""

from __future__ import annotations

import logging

import numpy as np
from scipy import ndimage
from scipy.sparse import coo_array

from flexlib.errors import InputError
from flexlib.mesh.lattice import fuse_submeshes
from flexlib.mesh.segments import SOLVENT, Segmentation
from flexlib.tetra.io import oriented_cells
from flexlib.tetra.tetmesh import TetraMesh, compact_labels

logger = logging.getLogger(__name__)

_GRID = 0.8  # of the cell size: spacing of the surface's grid; gives about as many cells as the lattice
_COVER = 0.5  # of the cell size by which the mask is grown, so that the faceted surface does not cut voxels off
_RELAX_STEPS = 12
_RELAX_REACH = (0.9, 0.6, 0.3, 0.0)  # of half a cube: tried in turn until TetGen finds no crossing facets; 0 has none
_MIN_DIHEDRAL_DEG = 12.0  # asked of TetGen; cells squeezed between two surfaces may stay flatter
_QUALITY = 1.4  # largest ratio of a cell's circumscribed radius to its shortest edge (TetGen's q)


def surface_mesh(
    mask: np.ndarray, pixel_size_A: float, cell_size_A: float, segmentation: Segmentation | None = None
) -> TetraMesh:
    """Mesh whose outside, and whose boundaries between segments, follow the surface of the mask and the segments.

    Parameters, result and joints as in ``bcc_mesh``; cells have at most the volume of a lattice cell, h^3 / 12, times
    two.

    Raises
    ------
    InputError
        TetGen is not installed or cannot fill the surface, or a segment is thinner than a cell.
    """
    labels = np.where(mask, 0, SOLVENT) if segmentation is None else np.where(mask, segmentation.labels, SOLVENT)
    grid, start_A, spacing_A = _coarse_labels(labels, segmentation, pixel_size_A, cell_size_A)
    points, quads = surface_net(grid)
    for reach in _RELAX_REACH:
        vertices_A = start_A + spacing_A * relax(points, quads, reach)
        try:
            nodes_A, tetras, region = run_tetgen(vertices_A, _triangles(vertices_A, quads), cell_size_A**3 / 6)
            break
        except RuntimeError as error:
            logger.info("surface relaxed by %g of a cube: TetGen cannot fill it (%s)", reach, error)
            if reach == _RELAX_REACH[-1]:
                raise InputError(
                    f"mesh.custom: TetGen cannot fill the surface ({error}); use another mesh.cells"
                ) from error
    segment = _segment_of_regions(nodes_A, tetras, region, grid, start_A, spacing_A)
    tetras, segment = tetras[segment >= 0], segment[segment >= 0]
    tetras = oriented_cells(nodes_A, tetras, "mesh.custom: surface")
    if segmentation is None:
        node, cells = np.unique(tetras, return_inverse=True)
        return TetraMesh(nodes_A[node], cells.reshape(-1, 4).astype(np.int32), np.ones(len(tetras)), segment * 0)
    if lost := sorted(set(segmentation.ids) - set(np.unique(segment).tolist())):
        raise InputError(f"mesh.custom: segment {lost[0]} is thinner than a cell: use more mesh.cells")
    node, cells = fuse_submeshes(tetras, segment, segmentation.pairs)
    return TetraMesh(
        nodes_A[node], cells, np.ones(len(cells)), segment, compact_labels(segmentation.labels), pixel_size_A
    )


def fill_surface(vertices_A: np.ndarray, triangles: np.ndarray, cell_size_A: float) -> TetraMesh:
    """Fill a closed triangulated surface (n, 3), (m, 3) with cells. Raises ``InputError`` if it is not closed."""
    corner, index = np.unique(np.round(vertices_A, 4), axis=0, return_inverse=True)
    triangles = index[triangles].reshape(-1, 3)
    proper = (triangles[:, 0] != triangles[:, 1]) & (triangles[:, 1] != triangles[:, 2])
    triangles = triangles[proper & (triangles[:, 0] != triangles[:, 2])]
    edges = np.sort(np.concatenate([triangles[:, [0, 1]], triangles[:, [1, 2]], triangles[:, [0, 2]]]), axis=1)
    _, count = np.unique(edges, axis=0, return_counts=True)
    if (count % 2).any():
        raise InputError(f"mesh.custom: the surface is not closed: {int((count % 2).sum())} edges have one triangle")
    try:
        nodes_A, tetras, _ = run_tetgen(corner, triangles, cell_size_A**3 / 6)
    except RuntimeError as error:
        raise InputError(f"mesh.custom: TetGen cannot fill the surface ({error})") from error
    tetras = oriented_cells(nodes_A, tetras, "mesh.custom")
    return TetraMesh(nodes_A, tetras, np.ones(len(tetras)), np.zeros(len(tetras), np.int32))


def run_tetgen(
    vertices: np.ndarray, triangles: np.ndarray, max_volume: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quality tetrahedra inside a piecewise linear complex.

    Parameters
    ----------
    vertices : (nv, 3)
        Corners of the facets, in A.
    triangles : (nt, 3) int
        Vertex indices of the facets.
    max_volume
        Largest volume of a cell in A^3.

    Returns
    -------
    nodes : (n, 3) float64
        Vertices of the cells.
    cells : (m, 4) int32
        Node indices.
    region : (m,) int64
        The space between facets that each cell lies in.

    Raises
    ------
    InputError
        TetGen is not installed.
    RuntimeError
        TetGen fails.
    """
    try:
        from tetgen import TetGen
    except ImportError as error:
        raise InputError(
            "mesh.custom: to mesh a surface, install the optional package tetgen (its core is AGPL): pip install tetgen"
        ) from error
    filler = TetGen(np.ascontiguousarray(vertices, np.float64), np.ascontiguousarray(triangles, np.int32))
    result = filler.tetrahedralize(
        regionattrib=True,
        fixedvolume=True,
        maxvolume=max_volume,
        minratio=_QUALITY,
        mindihedral=_MIN_DIHEDRAL_DEG,
        opt_iterations=10,
        opt_max_flip_level=10,
        quiet=True,
        nowarning=True,
    )
    nodes, cells, attributes = (np.asarray(part) for part in result[:3])
    if len(cells) == 0:
        raise RuntimeError("it made no cells")
    region = attributes.reshape(len(cells), -1)[:, 0].astype(np.int64)
    return nodes, cells[:, :4].astype(np.int32), region


def _coarse_labels(
    labels: np.ndarray, segmentation: Segmentation | None, pixel_size_A: float, cell_size_A: float
) -> tuple[np.ndarray, np.ndarray, float]:
    """Labels (z, y, x) on the surface's grid, position of its first point (x, y, z) in A, and its spacing in A."""
    box = labels.shape[0]
    distance_px = ndimage.distance_transform_edt(labels < 0)
    grown = distance_px * pixel_size_A <= _COVER * cell_size_A
    every = np.zeros_like(labels) if segmentation is None else segmentation.labels
    spacing_A = _GRID * cell_size_A
    half = int(np.ceil((0.5 * box * pixel_size_A + _COVER * cell_size_A) / spacing_A)) + 2
    nearest = np.rint(np.arange(-half, half + 1) * (spacing_A / pixel_size_A)).astype(int) + box // 2
    inside = (nearest >= 0) & (nearest < box)
    index = np.ix_(*[np.clip(nearest, 0, box - 1)] * 3)
    known = grown[index] & inside[:, None, None] & inside[None, :, None] & inside[None, None, :]
    grid = np.where(known, every[index], SOLVENT).astype(np.int32)
    grid[[0, -1]] = grid[:, [0, -1]] = grid[:, :, [0, -1]] = SOLVENT
    return grid, np.full(3, -half * spacing_A), spacing_A


def surface_net(grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Surface net of integer labels on a grid.

    Parameters
    ----------
    grid : (nz, ny, nx) int
        Its outer planes are all of one label.

    Returns
    -------
    points : (n, 3) float64
        (x, y, z) in grid units, at the cubes' centres.
    quads : (m, 4) int64
        Corners in order around each grid edge.
    """
    shape = np.array(grid.shape) - 1
    quads = []
    for axis in range(3):  # array axis along which two labels differ
        front, back = [slice(None)] * 3, [slice(None)] * 3
        front[axis], back[axis] = slice(1, None), slice(None, -1)
        edge = np.argwhere(grid[tuple(front)] != grid[tuple(back)])
        u, v = [(1, 2), (0, 2), (0, 1)][axis]
        corners = np.repeat(edge[:, None], 4, axis=1)
        corners[:, [1, 2], u] -= 1
        corners[:, [2, 3], v] -= 1
        quads.append((corners[..., 0] * shape[1] + corners[..., 1]) * shape[2] + corners[..., 2])
    cube, quad = np.unique(np.concatenate(quads), return_inverse=True)
    zyx = np.stack(np.unravel_index(cube, shape), axis=1) + 0.5
    return zyx[:, ::-1].astype(np.float64), quad.reshape(-1, 4)


def relax(points: np.ndarray, quads: np.ndarray, reach: float) -> np.ndarray:
    """Move each point towards its neighbours' mean, within ``reach`` of half a cube from where it was."""
    first, second = quads.ravel(), np.roll(quads, -1, axis=1).ravel()
    size = len(points)
    joined = coo_array((np.ones(2 * len(first)), (np.r_[first, second], np.r_[second, first])), (size, size)).tocsr()
    joined.data[:] = 1.0
    count = joined.sum(1).reshape(-1, 1)
    moved = points
    for _ in range(_RELAX_STEPS if reach > 0 else 0):
        mean = (joined @ moved) / np.maximum(count, 1)
        moved = np.clip(0.5 * (moved + mean), points - 0.5 * reach, points + 0.5 * reach)
    return moved


def _triangles(vertices: np.ndarray, quads: np.ndarray) -> np.ndarray:
    """(2 m, 3) triangles: each quadrilateral cut along its shorter diagonal."""
    corner = vertices[quads]
    diagonals = np.linalg.norm(corner[:, [0, 1]] - corner[:, [2, 3]], axis=2)
    turned = np.where((diagonals[:, 0] > diagonals[:, 1])[:, None], np.roll(quads, -1, axis=1), quads)
    return np.concatenate([turned[:, [0, 1, 2]], turned[:, [0, 2, 3]]])


def _segment_of_regions(
    nodes_A: np.ndarray, tetras: np.ndarray, region: np.ndarray, grid: np.ndarray, start_A: np.ndarray, spacing_A: float
) -> np.ndarray:
    """(nc,) int32 segment of each cell: that at the centres of most of its region's volume; ``SOLVENT`` in cavities."""
    corner = nodes_A[tetras]
    volume = np.abs(np.linalg.det(corner[:, 1:] - corner[:, :1]))
    x, y, z = np.rint((corner.mean(1) - start_A) / spacing_A).astype(int).T
    label = grid[z, y, x]
    names, rank = np.unique(label, return_inverse=True)
    regions, number = np.unique(region, return_inverse=True)
    votes = np.zeros((len(regions), len(names)))
    np.add.at(votes, (number, rank), volume)
    return names[votes.argmax(1)][number].astype(np.int32)
