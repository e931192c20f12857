"""Mesh files: VTK unstructured grids (.vtu), readable by ParaView and meshio."""

from __future__ import annotations

import os
from pathlib import Path

import meshio
import numpy as np

from flexlib.errors import InputError
from flexlib.files import atomic_path
from flexlib.mesh.tetmesh import TetraMesh


def write_mesh(path: str | os.PathLike[str], mesh: TetraMesh) -> None:
    """Write points (A from the box centre), tetra cells and the cell data ``rigidity`` and ``segment``; atomic."""
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


def read_mesh(path: str | os.PathLike[str]) -> TetraMesh:
    """Read a tetrahedral mesh in any format of meshio; missing rigidity is 1, missing segment 0.

    Raises ``InputError`` if the file is no mesh, has no tetra cells, or a cell without positive volume.
    """
    path = Path(path)
    try:
        grid = meshio.read(path)
    except (OSError, ValueError, KeyError, SystemExit, meshio.ReadError) as error:
        raise InputError(f"{path}: not a readable mesh ({error})") from error
    blocks = [i for i, block in enumerate(grid.cells) if block.type == "tetra"]
    if not blocks:
        raise InputError(f"{path}: has no tetra cells")
    cells = np.concatenate([grid.cells[i].data for i in blocks]).astype(np.int32)

    def cell_data(name: str, default: float) -> np.ndarray:
        if name not in grid.cell_data:
            return np.full(len(cells), default)
        return np.concatenate([np.asarray(grid.cell_data[name][i]).reshape(-1) for i in blocks])

    mesh = TetraMesh(
        vertices_A=np.asarray(grid.points, dtype=np.float64),
        cells=cells,
        rigidity=cell_data("rigidity", 1.0).astype(np.float64),
        segment=cell_data("segment", 0).astype(np.int32),
    )
    volumes = mesh.cell_volumes_A3()
    if volumes.min() <= 0:
        raise InputError(f"{path}: cell {int(np.argmin(volumes))} has no positive volume")
    return mesh
