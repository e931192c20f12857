"""The default mesh: a body-centred-cubic (BCC) tetrahedral lattice over the mask.

Nodes are the corners and the centres of cubes of edge h. Each square face between two cubes carries four tetrahedra:
the two cube centres with one of the face's four edges. All are congruent (volume h^3/12, dihedral angles 60 and 90
degrees), neighbours share whole faces, and the cell of a point follows from its two largest offsets within its cube:
there is nothing to search.

``mesh.cells`` of the settings counts cubes across the box, so that h = box extent / cells; it stands for 3DFlex's
``tetra_num_cells`` ("number of cells that fit across the box"), whose own lattice is not published.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from flexlib.errors import InputError
from flexlib.mesh.segments import Segmentation
from flexlib.tetra.tetmesh import TetraMesh, compact_labels


class BccLattice:
    """The lattice of cube edge ``cell_size_A`` that encloses a box, with a cube corner on the box centre.

    Nodes have integer coordinates in half edges, counted from the lattice's own corner: all even at cube corners, all
    odd at cube centres. A tetra is one integer: ``((face cube) * 3 + face axis) * 4 + edge of the face``.
    """

    def __init__(self, cell_size_A: float, extent_A: float) -> None:
        """Cover a box of side ``extent_A`` centred on the origin, with a margin of two cubes."""
        self.cell_size_A = float(cell_size_A)
        self.half_cubes = int(np.ceil(0.5 * extent_A / cell_size_A)) + 2
        self.cubes = 2 * self.half_cubes
        self.nodes = 2 * self.cubes + 1

    def locate(self, points_A: np.ndarray) -> np.ndarray:
        """The tetra that holds each point, in constant time.

        The face is that of the largest offset from the cube's centre, the edge that of the second largest.

        Parameters
        ----------
        points_A : (n, 3)
            Axes (x, y, z), in A from the box centre, inside the box.

        Returns
        -------
        (n,) int64
            Tetra numbers.
        """
        scaled = np.asarray(points_A, dtype=np.float64) / self.cell_size_A + self.half_cubes
        cube = np.floor(scaled).astype(np.int64)
        offset = scaled - cube - 0.5
        size = np.abs(offset)
        rows = np.arange(len(size))
        face_axis = np.argmax(size, axis=1)
        next_axis = (face_axis + 1) % 3
        last_axis = (face_axis + 2) % 3
        which = (size[rows, last_axis] > size[rows, next_axis]).astype(np.int64)
        edge_axis = np.where(which == 1, last_axis, next_axis)
        cube[rows, face_axis] -= offset[rows, face_axis] < 0  # a face belongs to the cube below it
        edge = 2 * which + (offset[rows, edge_axis] > 0)
        flat = (cube[:, 2] * self.cubes + cube[:, 1]) * self.cubes + cube[:, 0]
        return (flat * 3 + face_axis) * 4 + edge

    def tetra_nodes(self, tetra: np.ndarray) -> np.ndarray:
        """(n, 4) int64 node numbers of tetras (n,), ordered so that their volume is positive."""
        tetra = np.asarray(tetra, dtype=np.int64)
        edge, face = tetra % 4, tetra // 4
        face_axis, flat = face % 3, face // 3
        rows = np.arange(len(tetra))
        cube = np.stack([flat % self.cubes, flat // self.cubes % self.cubes, flat // self.cubes**2], axis=1)
        unit = np.eye(3, dtype=np.int64)
        which, sign = edge // 2, 2 * (edge % 2) - 1
        edge_axis, along_axis = (face_axis + 1 + which) % 3, (face_axis + 2 - which) % 3
        lower = 2 * cube + 1
        middle = lower + unit[face_axis] + sign[:, None] * unit[edge_axis]
        corners = np.stack(
            [lower, lower + 2 * unit[face_axis], middle - unit[along_axis], middle + unit[along_axis]], 1
        )
        # (face, edge, along) is a right-handed triple for which = 0, left-handed for which = 1
        swap = (sign > 0) == (which == 1)
        corners[rows[swap], 2:] = corners[rows[swap], 3:1:-1]
        return (corners[..., 2] * self.nodes + corners[..., 1]) * self.nodes + corners[..., 0]

    def node_positions_A(self, node: np.ndarray) -> np.ndarray:
        """(n, 3) float64 positions (x, y, z) of nodes (n,) in A from the box centre."""
        node = np.asarray(node, dtype=np.int64)
        half_edges = np.stack([node % self.nodes, node // self.nodes % self.nodes, node // self.nodes**2], axis=1)
        return (0.5 * half_edges - self.half_cubes) * self.cell_size_A

    def face_neighbours(self, tetra: np.ndarray) -> np.ndarray:
        """(n, 4) int64 tetras that share a face with tetras (n,); column k lies across from vertex k."""
        corner = self.node_positions_A(self.tetra_nodes(tetra).ravel()).reshape(-1, 4, 3)
        face = (corner.sum(1, keepdims=True) - corner) / 3
        beyond = face + 0.01 * (face - corner)
        return self.locate(beyond.reshape(-1, 3)).reshape(-1, 4)

    def tetras_of_cubes(self, cube: np.ndarray) -> np.ndarray:
        """(n * 12,) int64 tetras on the three upper faces of cubes (n, 3)."""
        flat = (cube[:, 2] * self.cubes + cube[:, 1]) * self.cubes + cube[:, 0]
        return (flat[:, None] * 12 + np.arange(12)).ravel()


def bcc_mesh(
    mask: np.ndarray, pixel_size_A: float, cell_size_A: float, segmentation: Segmentation | None = None
) -> TetraMesh:
    """Mesh of the BCC cells that hold at least one mask voxel; with a segmentation, one sub-mesh per segment.

    Two kinds of empty cells are added. Where cells are about as small as voxels, those whose centroid lies in the
    mask: the mesh has no holes inside the mask. And the neighbours of a few cells that would hang on the rest by an
    edge or a vertex alone, about which they could turn freely: parts that touch share whole faces.

    A segment's sub-mesh is made of the cells that hold its own voxels, so cells along a boundary exist once per
    segment there. Where two segments are joined, the vertices that both sub-meshes have are one; where they are not,
    each has its own, and the two move independently.

    Parameters
    ----------
    mask : (N, N, N) bool
        The voxels to cover, soft edge included.
    pixel_size_A
        Voxel size of the mask in A.
    cell_size_A
        Cube edge h in A; the cells' volume is h^3 / 12.
    segmentation
        Segments of the same grid and the pairs to join.

    Returns
    -------
    TetraMesh
        Rigidity 1 everywhere, vertices and cells in the lattice's order (z, y, x) within a segment.

    Raises
    ------
    InputError
        The mask is empty, the cell size is not positive, or joined segments have no common cell.
    """
    mask = np.asarray(mask, dtype=bool)
    if cell_size_A <= 0:
        raise InputError(f"mesh: the cell size must be positive, not {cell_size_A:g} A")
    if not mask.any():
        raise InputError("mesh: the mask is empty")
    lattice = BccLattice(cell_size_A, (mask.shape[0] + 2) * pixel_size_A)
    if segmentation is None:
        corner_node = lattice.tetra_nodes(_tetras_of_mask(lattice, mask, pixel_size_A))
        segment = np.zeros(len(corner_node), np.int32)
        node, cells = np.unique(corner_node, return_inverse=True)
        return TetraMesh(
            lattice.node_positions_A(node), cells.reshape(-1, 4).astype(np.int32), np.ones(len(segment)), segment
        )
    tetras = [_tetras_of_mask(lattice, mask & (segmentation.labels == one), pixel_size_A) for one in segmentation.ids]
    segment = np.repeat(np.array(segmentation.ids, np.int32), [len(part) for part in tetras])
    node, cells = fuse_submeshes(lattice.tetra_nodes(np.concatenate(tetras)), segment, segmentation.pairs)
    return TetraMesh(
        lattice.node_positions_A(node),
        cells,
        np.ones(len(segment)),
        segment,
        compact_labels(segmentation.labels),
        pixel_size_A,
    )


def fuse_submeshes(
    corner_node: np.ndarray, segment: np.ndarray, pairs: Sequence[tuple[int, int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Give every segment vertices of its own, except where it is joined to another one.

    Parameters
    ----------
    corner_node : (nc, 4) int64
        The point of space (any number that names it) at each corner of each cell.
    segment : (nc,) int
        The segment of each cell.
    pairs
        Segments to join: of the points that both have, each becomes one vertex.

    Returns
    -------
    node : (nv,) int64
        The point of space of each vertex.
    cells : (nc, 4) int32
        Vertex indices.

    Raises
    ------
    InputError
        A pair has no point in common.
    """
    ids, rank = np.unique(segment, return_inverse=True)
    points, point = np.unique(corner_node, return_inverse=True)
    own, cells = np.unique(rank.reshape(-1, 1) * len(points) + point.reshape(-1, 4), return_inverse=True)
    owner, location = own // len(points), own % len(points)
    first, second = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for a, b in pairs:
        in_a, in_b = (np.flatnonzero(owner == np.searchsorted(ids, one)) for one in (a, b))
        common, at_a, at_b = np.intersect1d(location[in_a], location[in_b], assume_unique=True, return_indices=True)
        if len(common) == 0:
            raise InputError(f"mesh.connections: {a}>{b}: the two segments have no point of the mesh in common")
        first.append(in_a[at_a])
        second.append(in_b[at_b])
    joints = np.concatenate(first), np.concatenate(second)
    graph = coo_array((np.ones(len(joints[0])), joints), (len(own), len(own)))
    count, vertex = connected_components(graph, directed=False)
    node = np.zeros(count, np.int64)
    node[vertex] = points[location]
    return node, vertex[cells].reshape(-1, 4).astype(np.int32)


def _tetras_of_mask(lattice: BccLattice, mask: np.ndarray, pixel_size_A: float) -> np.ndarray:
    """(nc,) tetras that hold voxels of ``mask``, and the empty ones that ``bcc_mesh`` adds; sorted."""
    tetra = np.unique(np.concatenate([np.unique(lattice.locate(part)) for part in _mask_points_A(mask, pixel_size_A)]))
    if lattice.cell_size_A < 6 * pixel_size_A:
        tetra = np.union1d(tetra, _tetras_by_centroid(lattice, mask, pixel_size_A))
    return _join_by_faces(lattice, tetra)


def _join_by_faces(lattice: BccLattice, tetra: np.ndarray, max_rounds: int = 3) -> np.ndarray:
    """Add the face neighbours of small parts that touch another part, but by no face. ``tetra`` is sorted, unique."""
    for _ in range(max_rounds):
        neighbour = lattice.face_neighbours(tetra)
        position = np.minimum(np.searchsorted(tetra, neighbour), len(tetra) - 1)
        row, column = np.nonzero(tetra[position] == neighbour)
        graph = coo_array((np.ones(len(row)), (row, position[row, column])), (len(tetra), len(tetra)))
        count, part = connected_components(graph, directed=False)
        if count == 1:
            break
        _, vertex = np.unique(lattice.tetra_nodes(tetra), return_inverse=True)
        vertex = vertex.reshape(-1, 4)
        lowest, highest = np.full(vertex.max() + 1, count), np.full(vertex.max() + 1, -1)
        np.minimum.at(lowest, vertex, part[:, None])
        np.maximum.at(highest, vertex, part[:, None])
        touches = np.zeros(count, dtype=bool)
        np.logical_or.at(touches, np.repeat(part, 4), (lowest != highest)[vertex].ravel())
        touches[np.argmax(np.bincount(part))] = False
        if not touches.any():
            break
        tetra = np.union1d(tetra, neighbour[touches[part]])
    return tetra


def _mask_points_A(mask: np.ndarray, pixel_size_A: float, chunk: int = 1 << 19) -> Iterator[np.ndarray]:
    """Yield the mask's voxel positions (x, y, z) in A from the box centre, (<= chunk, 3) at a time."""
    index = np.flatnonzero(mask)
    box = mask.shape[0]
    for start in range(0, len(index), chunk):
        part = index[start : start + chunk]
        zyx = np.unravel_index(part, mask.shape)
        yield (np.stack(zyx[::-1], axis=1) - box // 2) * pixel_size_A


def _tetras_by_centroid(lattice: BccLattice, mask: np.ndarray, pixel_size_A: float) -> np.ndarray:
    """Tetras whose centroid lies in a mask voxel."""
    box = mask.shape[0]
    zyx = np.argwhere(mask)
    low = np.floor((zyx.min(0)[::-1] - box // 2 - 1) * pixel_size_A / lattice.cell_size_A).astype(int)
    high = np.ceil((zyx.max(0)[::-1] - box // 2 + 1) * pixel_size_A / lattice.cell_size_A).astype(int)
    low, high = low + lattice.half_cubes - 1, high + lattice.half_cubes
    found = []
    for z in range(low[2], high[2] + 1):  # one layer of cubes at a time bounds the memory
        y, x = np.meshgrid(np.arange(low[1], high[1] + 1), np.arange(low[0], high[0] + 1), indexing="ij")
        tetra = lattice.tetras_of_cubes(np.stack([x.ravel(), y.ravel(), np.full(x.size, z)], axis=1))
        centroid = lattice.node_positions_A(lattice.tetra_nodes(tetra).ravel()).reshape(-1, 4, 3).mean(1)
        voxel = np.rint(centroid / pixel_size_A).astype(int) + box // 2
        inside = ((voxel >= 0) & (voxel < box)).all(1)
        tetra, voxel = tetra[inside], voxel[inside]
        found.append(tetra[mask[voxel[:, 2], voxel[:, 1], voxel[:, 0]]])
    return np.concatenate(found)
