"""Mesh files: VTK unstructured grids (.vtu) as ours, and the tetrahedral meshes and surfaces of other programs.

A mesh's segment map is a label map of its own beside the mesh, ``MeshFolder.segments``: meshio writes no field data.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import meshio
import numpy as np

from flexlib.errors import InputError
from flexlib.files import atomic_path
from flexlib.imaging.maps import Map, read_label_map, write_label_map
from flexlib.layout import MeshFolder
from flexlib.tetra.tetmesh import TetraMesh, compact_labels
from flexlib.untrusted import parsing

logger = logging.getLogger(__name__)

_NO_SEGMENTS = np.full((1, 1, 1), -1)  # what is written for a mesh without a segment map
_FARTHEST_A = 1e9  # of any point
_CORNERS = {"triangle": 3, "tetra": 4}  # of the kinds of cells that are used
_LARGEST = 2**31 - 1  # of what a file says of cells
_SUFFIXES = (".vtu", ".vtk", ".msh", ".stl", ".ply", ".obj")  # of those that meshio reads, what is tried with damage
_MOST_ASKED_BEYOND = 1000  # times that a file is read at its end
_FLAT = 1e-9  # of the cube of a cell's longest edge: a volume below is none


def write_mesh(path: str | os.PathLike[str], mesh: TetraMesh, like: Map | None = None) -> None:
    """Write vertices, tetra cells and the cell data ``rigidity`` and ``segment``, and the segment map; atomic.

    The segment map is always written, so that none of another mesh stays: for a mesh without one it is a single voxel
    of -1.

    Parameters
    ----------
    path
        The mesh to write; the segment map goes into the same folder, as ``MeshFolder.segments``.
    mesh
        The mesh; vertices are written as they are, in A from the box centre.
    like
        The map over which the segment map is to lie in programs that show it, as in ``write_map``.

    Raises
    ------
    InputError
        A segment's number is too large for an MRC file.
    """
    path = Path(path)
    grid = meshio.Mesh(
        np.asarray(mesh.vertices_A, dtype=np.float64),
        [("tetra", np.asarray(mesh.cells, dtype=np.int64))],
        cell_data={
            "rigidity": [np.asarray(mesh.rigidity, dtype=np.float64)],
            "segment": [np.asarray(mesh.segment, dtype=np.int32)],
        },
    )
    segments_path = MeshFolder(path.parent).segments
    if mesh.segment_map.size:
        write_label_map(segments_path, mesh.segment_map, mesh.segment_map_pixel_size_A, like=like)
    else:
        write_label_map(segments_path, _NO_SEGMENTS, 1.0)
    with atomic_path(path) as temporary:
        meshio.write(temporary, grid, file_format="vtu")


def write_displacement(
    path: str | os.PathLike[str], mesh: TetraMesh, displacement_A: np.ndarray, rigid_core: np.ndarray | None = None
) -> None:
    """Write a mesh at rest, in the frame of ``write_mesh``, with the point data ``displacement_A`` (nv, 3); atomic.

    ``rigid_core``, (nv,) in [0, 1], is written too where it is given: how far each vertex belongs to the core.
    """
    point_data = {"displacement_A": np.asarray(displacement_A, dtype=np.float32)}
    if rigid_core is not None:
        point_data["rigid_core"] = np.asarray(rigid_core, dtype=np.float32)
    grid = meshio.Mesh(
        np.asarray(mesh.vertices_A, dtype=np.float64),
        [("tetra", np.asarray(mesh.cells, dtype=np.int32))],
        point_data=point_data,
    )
    with atomic_path(path) as temporary:
        meshio.write(temporary, grid, file_format="vtu")


def write_cell_data(path: str | os.PathLike[str], mesh: TetraMesh, values: Mapping[str, np.ndarray]) -> None:
    """Write a mesh at rest, in the frame of ``write_mesh``, with figures (nc,) of its cells by name; atomic."""
    grid = meshio.Mesh(
        np.asarray(mesh.vertices_A, dtype=np.float64),
        [("tetra", np.asarray(mesh.cells, dtype=np.int32))],
        cell_data={name: [np.asarray(one)] for name, one in values.items()},
    )
    with atomic_path(path) as temporary:
        meshio.write(temporary, grid, file_format="vtu")


def read_mesh(path: str | os.PathLike[str]) -> TetraMesh:
    """Read a tetrahedral mesh of any program (``read_grid``); missing rigidity is 1, missing segment 0.

    Cells that are turned inside out get two vertices swapped. The segment map of a mesh with the cell data ``segment``
    is the file ``MeshFolder.segments`` beside it; without that file the mesh has none.

    Raises
    ------
    InputError
        The file is no mesh, has no tetra cells, or a cell without volume; or its segments are no label map.
    """
    path = Path(path)
    grid = read_grid(path)
    blocks = [i for i, block in enumerate(grid.cells) if block.type == "tetra"]
    if not blocks:
        kinds = ", ".join(sorted({block.type for block in grid.cells})) or "nothing"
        raise InputError(f"{path}: has no tetra cells, only {kinds}")
    cells = np.concatenate([grid.cells[i].data for i in blocks])

    def cell_data(name: str, default: float) -> np.ndarray:
        if name not in grid.cell_data:
            return np.full(len(cells), default)
        values = np.concatenate([np.asarray(grid.cell_data[name][i]).reshape(-1) for i in blocks])
        if len(values) != len(cells) or values.dtype.kind not in "fiu" or not (np.abs(values) <= _LARGEST).all():
            raise InputError(f"{path}: its {name} must be one finite number a cell")
        return values

    rigidity = cell_data("rigidity", 1.0).astype(np.float64)
    if (rigidity <= 0).any():
        raise InputError(f"{path}: cell {int(np.argmax(rigidity <= 0))}: its rigidity must be positive")
    labels, pixel_size_A = np.zeros((0, 0, 0), np.int16), 0.0
    segments_path = MeshFolder(path.parent).segments
    if "segment" in grid.cell_data and segments_path.is_file():
        labels, pixel_size_A = _read_segment_map(segments_path)
    vertices_A, cells = used_vertices(np.asarray(grid.points, dtype=np.float64), cells, str(path))
    return TetraMesh(
        vertices_A=vertices_A,
        cells=oriented_cells(vertices_A, cells, str(path)),
        rigidity=rigidity,
        segment=cell_data("segment", 0).astype(np.int32),
        segment_map=labels,
        segment_map_pixel_size_A=pixel_size_A,
    )


def read_grid(path: Path) -> meshio.Mesh:
    """Whatever mesh meshio finds in a file of one of ``_SUFFIXES``. Raises ``InputError``."""
    if path.suffix.lower() not in _SUFFIXES:
        raise InputError(f"{path}: meshes are read from {', '.join(_SUFFIXES)} files")
    with parsing(path, "mesh"):
        grid = _read_by_meshio(path)
    if grid.points.ndim != 2 or grid.points.shape[1] != 3 or not (np.abs(grid.points) <= _FARTHEST_A).all():
        raise InputError(f"{path}: its points must be finite and three-dimensional")
    for block in grid.cells:
        if block.type in _CORNERS and (
            block.data.shape[1:] != (_CORNERS[block.type],) or block.data.dtype.kind not in "iu"
        ):
            raise InputError(f"{path}: its cells of type {block.type} must be {_CORNERS[block.type]} numbers of points")
    return grid


class _FileWithAnEnd(io.BufferedReader):
    """A file that is not read beyond its end for ever, as meshio would where a count or a bracket is damaged."""

    _asked_beyond = 0

    def read(self, size: int | None = -1, /) -> bytes:
        """As of any file. Raises ``EOFError`` where more is asked for again and again."""
        return self._counted(super().read(size))

    def readline(self, size: int | None = -1, /) -> bytes:
        """As ``read``."""
        return self._counted(super().readline(size))

    def _counted(self, content: bytes) -> bytes:
        self._asked_beyond += not content
        if self._asked_beyond > _MOST_ASKED_BEYOND:
            raise EOFError("truncated or damaged: it ends before what it promises")
        return content


def _read_by_meshio(path: Path) -> meshio.Mesh:
    suffix = path.suffix.lower()
    if suffix not in (".msh", ".ply"):
        return meshio.read(path)
    with _FileWithAnEnd(io.FileIO(path)) as file:
        if suffix == ".ply":
            return meshio.read(file, "ply")
        is_gmsh = file.readline().lstrip().startswith(b"$")  # else Ansys's: both are .msh
        file.seek(0)
        return meshio.gmsh.main.read_buffer(file) if is_gmsh else meshio.read(file, "ansys")


def surface_of(grid: meshio.Mesh, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Points (n, 3) and triangles (m, 3) of a grid. Raises ``InputError`` for a triangle without its points."""
    triangles = np.concatenate([block.data for block in grid.cells if block.type == "triangle"])
    wrong = np.flatnonzero(((triangles < 0) | (triangles >= len(grid.points))).any(1))
    if len(wrong):
        raise InputError(f"{path}: triangle {wrong[0]} names a point that is not there")
    return np.asarray(grid.points, np.float64), triangles.astype(np.int64)


def _read_segment_map(path: Path) -> tuple[np.ndarray, float]:
    """The segment of each voxel (M, M, M) and the voxel size in A; (0, 0, 0) where the file has no segments."""
    grid = read_label_map(path)
    if grid.labels.max() < 0:
        return np.zeros((0, 0, 0), np.int16), 0.0
    if len(set(grid.labels.shape)) != 1 or len(set(grid.voxel_A)) != 1:
        raise InputError(f"{path}: the segments of a mesh must be a cube of cubic voxels, not {grid.labels.shape}")
    return compact_labels(grid.labels), grid.voxel_A[0]


def used_vertices(vertices: np.ndarray, cells: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Vertices, and cells as int32, without the vertices that no cell has.

    Raises ``InputError`` for an index out of range.
    """
    wrong = np.flatnonzero((cells.min(1) < 0) | (cells.max(1) >= len(vertices)))
    if len(wrong):
        raise InputError(f"{name}: cell {wrong[0]} names a vertex that is not there")
    used = np.zeros(len(vertices), bool)
    used[cells] = True
    if used.all():
        return vertices, cells.astype(np.int32)
    logger.info("%s: %d vertices without a cell are left out", name, int((~used).sum()))
    return vertices[used], (np.cumsum(used) - 1)[cells].astype(np.int32)


def oriented_cells(vertices: np.ndarray, cells: np.ndarray, name: str) -> np.ndarray:
    """``cells`` (nc, 4) with positive volumes: two vertices are swapped where it was negative.

    Raises ``InputError``, with the cell's number, where a cell has no volume.
    """
    edges = vertices[cells[:, 1:]] - vertices[cells[:, :1]]
    with np.errstate(all="ignore"):  # numbers so large or small that they have no volume either
        volume = np.linalg.det(edges) / 6
        flat = ~(np.abs(volume) > _FLAT * np.linalg.norm(edges, axis=2).max(1) ** 3) | ~np.isfinite(volume)
    if flat.any():
        raise InputError(f"{name}: cell {int(np.argmax(flat))} has no volume ({int(flat.sum())} such cells)")
    inverted = volume < 0
    if inverted.any():
        logger.info("%s: %d cells were inside out, two of their vertices are swapped", name, int(inverted.sum()))
        cells = cells.copy()
        cells[inverted, 2:] = cells[inverted, 3:1:-1]
    return cells
