"""Mesh files: VTK unstructured grids (.vtu) as ours, and any tetrahedral mesh that meshio reads."""

from __future__ import annotations

import logging
import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import meshio
import numpy as np

from flexlib.errors import InputError
from flexlib.files import atomic_path
from flexlib.tetra.tetmesh import TetraMesh

logger = logging.getLogger(__name__)

_SEGMENT_MAP, _SEGMENT_MAP_GRID = "segment_map", "segment_map_grid"
_FLAT = 1e-9  # of the cube of a cell's longest edge: a volume below is none


def write_mesh(path: str | os.PathLike[str], mesh: TetraMesh) -> None:
    """Write points (A from the box centre), tetra cells and the cell data ``rigidity`` and ``segment``; atomic.

    A segment map goes into the file's field data: its labels, and (side, voxel size in A) of its grid.
    """
    grid = meshio.Mesh(
        np.asarray(mesh.vertices_A, dtype=np.float64),
        [("tetra", np.asarray(mesh.cells, dtype=np.int64))],
        cell_data={
            "rigidity": [np.asarray(mesh.rigidity, dtype=np.float64)],
            "segment": [np.asarray(mesh.segment, dtype=np.int32)],
        },
    )
    with atomic_path(path) as temporary:
        meshio.write(temporary, grid, file_format="vtu")
        if mesh.segment_map.size:
            _append_segment_map(temporary, mesh)


def write_displacement(path: str | os.PathLike[str], mesh: TetraMesh, displacement_A: np.ndarray) -> None:
    """Write a mesh at rest, placed as by ``write_mesh``, with the point data ``displacement_A`` (nv, 3); atomic."""
    grid = meshio.Mesh(
        np.asarray(mesh.vertices_A, dtype=np.float64),
        [("tetra", np.asarray(mesh.cells, dtype=np.int32))],
        point_data={"displacement_A": np.asarray(displacement_A, dtype=np.float32)},
    )
    with atomic_path(path) as temporary:
        meshio.write(temporary, grid, file_format="vtu")


def _append_segment_map(path: Path, mesh: TetraMesh) -> None:
    """Add the segment map as VTK field data, which meshio reads but does not write."""
    from meshio.vtu._vtu import numpy_to_vtu_type

    tree = ElementTree.parse(path)
    root = tree.getroot()
    grid = root.find("UnstructuredGrid")
    assert grid is not None
    field = ElementTree.Element("FieldData")
    size = np.array([mesh.segment_map.shape[0], mesh.segment_map_pixel_size_A], np.float64)
    for name, values in ((_SEGMENT_MAP, mesh.segment_map.ravel()), (_SEGMENT_MAP_GRID, size)):
        attributes = {
            "type": numpy_to_vtu_type[values.dtype],
            "Name": name,
            "NumberOfTuples": str(len(values)),
            "format": "binary",
        }
        ElementTree.SubElement(field, "DataArray", attributes).text = _zlib_blocks(values)
    grid.insert(0, field)
    tree.write(path)


def _zlib_blocks(values: np.ndarray, block_bytes: int = 1 << 15) -> str:
    """An array as VTK's XML files hold it: a header of UInt32 sizes and zlib blocks, both in base 64."""
    import base64
    import zlib

    raw = np.ascontiguousarray(values).tobytes()
    blocks = [raw[start : start + block_bytes] for start in range(0, len(raw), block_bytes)]
    packed = [zlib.compress(block) for block in blocks]
    last = len(raw) % block_bytes
    header = np.array([len(blocks), block_bytes, last, *[len(block) for block in packed]], np.uint32)
    return (base64.b64encode(header.tobytes()) + base64.b64encode(b"".join(packed))).decode()


def read_mesh(path: str | os.PathLike[str]) -> TetraMesh:
    """Read a tetrahedral mesh in any format of meshio; missing rigidity is 1, missing segment 0.

    Cells that are turned inside out get two vertices swapped. Raises ``InputError`` if the file is no mesh, has no
    tetra cells, or a cell without volume.
    """
    path = Path(path)
    grid = read_grid(path)
    blocks = [i for i, block in enumerate(grid.cells) if block.type == "tetra"]
    if not blocks:
        kinds = ", ".join(sorted({block.type for block in grid.cells})) or "nothing"
        raise InputError(f"{path}: has no tetra cells, only {kinds}")
    cells = np.concatenate([grid.cells[i].data for i in blocks]).astype(np.int32)

    def cell_data(name: str, default: float) -> np.ndarray:
        if name not in grid.cell_data:
            return np.full(len(cells), default)
        return np.concatenate([np.asarray(grid.cell_data[name][i]).reshape(-1) for i in blocks])

    labels, pixel_size_A = _stored_segment_map(grid, path)
    vertices_A, cells = used_vertices(np.asarray(grid.points, dtype=np.float64), cells, str(path))
    return TetraMesh(
        vertices_A=vertices_A,
        cells=oriented_cells(vertices_A, cells, str(path)),
        rigidity=cell_data("rigidity", 1.0).astype(np.float64),
        segment=cell_data("segment", 0).astype(np.int32),
        segment_map=labels,
        segment_map_pixel_size_A=pixel_size_A,
    )


def read_grid(path: Path) -> meshio.Mesh:
    """Whatever mesh meshio finds in a file. Raises ``InputError``."""
    try:
        grid = meshio.read(path)
    except (OSError, ValueError, KeyError, IndexError, SystemExit, meshio.ReadError, ElementTree.ParseError) as error:
        raise InputError(f"{path}: not a readable mesh ({error})") from error
    if grid.points.ndim != 2 or grid.points.shape[1] != 3 or not np.isfinite(grid.points).all():
        raise InputError(f"{path}: its points must be finite and three-dimensional")
    return grid


def _stored_segment_map(grid: meshio.Mesh, path: Path) -> tuple[np.ndarray, float]:
    if _SEGMENT_MAP not in grid.field_data or _SEGMENT_MAP_GRID not in grid.field_data:
        return np.zeros((0, 0, 0), np.int16), 0.0
    labels = np.asarray(grid.field_data[_SEGMENT_MAP]).ravel()
    size, pixel_size_A = np.asarray(grid.field_data[_SEGMENT_MAP_GRID], np.float64).ravel()
    if len(labels) != int(size) ** 3:
        raise InputError(f"{path}: its segment map has {len(labels)} voxels, not {int(size)}^3")
    return labels.reshape((int(size),) * 3), float(pixel_size_A)


def used_vertices(vertices: np.ndarray, cells: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Vertices and cells without the vertices that no cell has. Raises ``InputError`` for an index out of range."""
    wrong = np.flatnonzero((cells.min(1) < 0) | (cells.max(1) >= len(vertices)))
    if len(wrong):
        raise InputError(f"{name}: cell {wrong[0]} names a vertex that is not there")
    used = np.zeros(len(vertices), bool)
    used[cells] = True
    if used.all():
        return vertices, cells
    logger.info("%s: %d vertices without a cell are left out", name, int((~used).sum()))
    return vertices[used], (np.cumsum(used) - 1)[cells].astype(np.int32)


def oriented_cells(vertices: np.ndarray, cells: np.ndarray, name: str) -> np.ndarray:
    """``cells`` (nc, 4) with positive volumes: two vertices are swapped where it was negative.

    Raises ``InputError``, with the cell's number, where a cell has no volume.
    """
    edges = vertices[cells[:, 1:]] - vertices[cells[:, :1]]
    volume = np.linalg.det(edges) / 6
    flat = np.abs(volume) <= _FLAT * np.linalg.norm(edges, axis=2).max(1) ** 3
    if flat.any():
        raise InputError(f"{name}: cell {int(np.argmax(flat))} has no volume ({int(flat.sum())} such cells)")
    inverted = volume < 0
    if inverted.any():
        logger.info("%s: %d cells were inside out, two of their vertices are swapped", name, int(inverted.sum()))
        cells = cells.copy()
        cells[inverted, 2:] = cells[inverted, 3:1:-1]
    return cells
