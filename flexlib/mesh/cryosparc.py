"""CryoSPARC's flex_mesh: the pickle that its 3D Flex jobs pass between them, read and written.

The file is a dict of arrays; keys and shapes are those of cryosparc-tools' example on custom rigidity weights. A
pickle can run code when it is loaded: this reader builds numpy arrays and plain values and refuses everything else by
name. The unit and the axis order of ``tm_points`` are documented nowhere, so both are found from the file itself: its
index map says which cell holds each voxel, and only one choice makes that true.

    python -m flexlib.mesh.cryosparc results/NAME/mesh/cells~20 results/NAME/particles flex_mesh.pkl
"""

from __future__ import annotations

import argparse
import io
import itertools
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from flexlib.errors import InputError
from flexlib.files import atomic_path
from flexlib.imaging.maps import read_map
from flexlib.layout import MeshFolder, ParticlesFolder
from flexlib.mesh.segments import SOLVENT, fill_box
from flexlib.tetra.io import oriented_cells, read_mesh, used_vertices
from flexlib.tetra.tetmesh import TetraMesh, compact_labels
from flexlib.tetra.voxels import tetra_index_map, voxelise
from flexlib.untrusted import parsing

logger = logging.getLogger(__name__)

_REQUIRED = ("mask", "N", "psize_A", "tm_points", "tm_cells", "tm_tetraidx_map", "tm_rweights")
_LARGEST = 1e9  # number in such a file
_PIXELS_A = (1e-3, 1e3)  # that a voxel can have
_SAMPLE = 20000  # voxels on which units and axes are tried
_INSIDE = -0.02  # barycentric weight down to which a voxel counts as inside its cell (their arithmetic is float32)
_AGREEMENT = 0.98  # share of voxels that must lie in the cell their index map names


class _Kind:
    """Stands in for numpy.dtype, whose pickled state could pass off bytes as objects, and end the process."""

    def __init__(self, spelling: str, *_: Any) -> None:
        self.dtype = np.dtype(str(spelling))

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands in for numpy.ndarray: ``values`` are one, or a list where it was one of objects."""

    values: Any = None

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, by_columns, data = state
        self.values = data if isinstance(data, list) else _array(data, kind, shape, "F" if by_columns else "C")


def _array(data: bytes | str, kind: _Kind, shape: tuple[int, ...] = (), order: Any = "C") -> np.ndarray:
    """The array of a buffer, which is text in Python 2's pickles."""
    return np.frombuffer(_latin1(data) if isinstance(data, str) else data, kind.dtype).reshape(shape, order=order)


def _scalar(kind: _Kind, data: bytes | str) -> Any:
    return _array(data, kind)[()]


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """The bytes of an array in a pickle of protocol 2; never another codec."""
    return str(text).encode("latin1")


_BUILDERS: dict[tuple[str, str], Any] = {("numpy", "ndarray"): _Array, ("numpy", "dtype"): _Kind}
_BUILDERS["_codecs", "encode"] = _latin1
for _core in ("numpy.core", "numpy._core"):
    _BUILDERS[f"{_core}.multiarray", "_reconstruct"] = _Array
    _BUILDERS[f"{_core}.multiarray", "scalar"] = _scalar
    _BUILDERS[f"{_core}.numeric", "_frombuffer"] = _array


class _ArraysOnly(pickle.Unpickler):
    """Unpickles numpy arrays, numbers, text and containers; nothing can be called but what builds arrays."""

    def __init__(self, file: io.BufferedIOBase, name: str) -> None:
        super().__init__(file, encoding="latin1")
        self.name = name

    def find_class(self, module: str, name: str) -> Any:
        """Ours for the few constructors that numpy's own pickles name; anything else is refused."""
        if (module, name) not in _BUILDERS:
            raise InputError(
                f"{self.name}: refused: the pickle asks for {module}.{name}, a mesh is made of arrays only"
            )
        return _BUILDERS[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise InputError(f"{self.name}: refused: the pickle refers to something outside the file")


def load_arrays(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The dict in a flex_mesh pickle, without running anything. Raises ``InputError``."""
    path = Path(path)
    with parsing(path, "pickle"), path.open("rb") as file:
        content = _ArraysOnly(file, str(path)).load()
    if not isinstance(content, dict):
        raise InputError(f"{path}: a flex_mesh is a dict of arrays, this pickle holds a {type(content).__name__}")
    return {key: value.values if isinstance(value, _Array) else value for key, value in content.items()}


def read_flex_mesh(path: str | os.PathLike[str]) -> TetraMesh:
    """Read a flex_mesh pickle as a mesh in A from the box centre, segments and rigidity weights included.

    Its index map is checked: nearly every voxel must lie in the cell it names.

    Raises
    ------
    InputError
        The file is no mesh, or its index map and cells disagree.
    """
    content = load_arrays(path)
    if missing := [key for key in _REQUIRED if key not in content]:
        raise InputError(f"{path}: no {missing[0]!r} in this pickle: not a flex_mesh")
    (box,), (pixel_size_A,) = (_numbers(content, key, str(path)).ravel()[:1] for key in ("N", "psize_A"))
    points, rigidity = _numbers(content, "tm_points", str(path)), _numbers(content, "tm_rweights", str(path)).ravel()
    cells = _numbers(content, "tm_cells", str(path)).astype(np.int32)
    index = _numbers(content, "tm_tetraidx_map", str(path)).astype(np.int64)
    box = int(box)
    if not _PIXELS_A[0] <= pixel_size_A <= _PIXELS_A[1] or (rigidity <= 0).any():
        raise InputError(
            f"{path}: psize_A is {pixel_size_A:g}, the least rigidity {rigidity.min():g}: both must be positive"
        )
    if points.ndim != 2 or points.shape[1] != 3 or cells.ndim != 2 or cells.shape[1] != 4:
        raise InputError(f"{path}: tm_points must be (n, 3) and tm_cells (n, 4), not {points.shape} and {cells.shape}")
    if index.shape != (box,) * 3 or len(rigidity) != len(cells):
        raise InputError(
            f"{path}: tm_tetraidx_map must be {box}^3 and tm_rweights {len(cells)} numbers, not {index.shape} and "
            f"{len(rigidity)}"
        )
    if index.max() >= len(cells) or not (index >= 0).any():
        raise InputError(f"{path}: tm_tetraidx_map names cell {index.max()}, there are {len(cells)}")
    points, cells = used_vertices(points, cells, str(path))
    cells = oriented_cells(points, cells, str(path))
    vertices_A = _in_angstrom(points, cells, index, box, pixel_size_A, str(path))
    cells = oriented_cells(vertices_A, cells, str(path))  # another axis order mirrors the cells
    segment, labels = _their_segments(content, len(cells), box, str(path))
    map_size_A = pixel_size_A if labels.size else 0.0
    mesh = TetraMesh(vertices_A, cells, rigidity, segment, labels, map_size_A)
    ours = tetra_index_map(voxelise(mesh, index >= 0, pixel_size_A))
    same = float((ours == index)[index >= 0].mean())
    logger.info("%s: recomputed index map equals theirs in %.2f %% of the voxels", path, 100 * same)
    if same < 0.9:
        logger.warning(
            "%s: %.1f %% of the voxels are in another cell of ours than theirs: on faces, or where cells overlap",
            path,
            100 * (1 - same),
        )
    return mesh


def _numbers(content: dict[str, Any], key: str, name: str) -> np.ndarray:
    """A value of the dict as float64. Raises ``InputError`` where it is no array of finite numbers."""
    try:
        values = np.asarray(content[key])
    except (TypeError, ValueError):  # lists within lists
        values = np.empty(0)
    if values.dtype.kind not in "fiub" or values.size == 0 or not (np.abs(values.astype(np.float64)) <= _LARGEST).all():
        raise InputError(f"{name}: {key} is no array of finite numbers")
    return values.astype(np.float64)


def _in_angstrom(
    points: np.ndarray, cells: np.ndarray, index: np.ndarray, box: int, pixel_size_A: float, name: str
) -> np.ndarray:
    """``tm_points`` as (x, y, z) in A from voxel N//2, by the unit, origin and axes that make their index map true."""
    voxel = np.flatnonzero(index.ravel() >= 0)
    voxel = voxel[:: max(1, len(voxel) // _SAMPLE)]
    zyx = np.stack(np.unravel_index(voxel, index.shape), axis=1) - box // 2
    position_px = zyx[:, ::-1].astype(np.float64)
    cell = cells[index.ravel()[voxel]]
    units_px = {"voxels": 1.0, "Angstrom": 1 / pixel_size_A, "boxes": float(box), "half boxes": box / 2}
    origins_px = {"box centre": 0.0, "centre between voxels": -0.5, "corner": -float(box // 2)}
    best, best_share, best_name = None, -1.0, ""
    for (unit, scale), (origin, offset), axes in itertools.product(
        units_px.items(), origins_px.items(), ((0, 1, 2), (2, 1, 0))
    ):
        trial = points[:, axes] * scale + offset
        corner = trial[cell]
        edges = (corner[:, 1:] - corner[:, :1]).transpose(0, 2, 1)
        try:
            last = np.linalg.solve(edges, (position_px - corner[:, 0])[..., None])[..., 0]
        except np.linalg.LinAlgError:  # cells so small that nothing is left of them beside the offset
            continue
        share = float((np.minimum(last.min(1), 1 - last.sum(1)) > _INSIDE).mean())
        if share > best_share:
            best, best_share = trial, share
            best_name = f"{unit} from the {origin}, axes {'xyz' if axes == (0, 1, 2) else 'zyx'}"
    if best is None or best_share < _AGREEMENT:
        raise InputError(
            f"{name}: tm_tetraidx_map and tm_cells disagree: at best {100 * best_share:.0f} % of the voxels lie in the "
            "cell the map names"
        )
    logger.info("%s: tm_points are in %s; %.2f %% of the voxels lie in their cell", name, best_name, 100 * best_share)
    return best * pixel_size_A


def _their_segments(content: dict[str, Any], num_cells: int, box: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(nc,) int32 segment of each cell, and (N, N, N) the segment map; empty where there is one segment."""
    none = np.zeros(num_cells, np.int32), np.zeros((0, 0, 0), np.int16)
    if (given := content.get("tm_segmask")) is None or (isinstance(given, np.ndarray | list) and len(given) == 0):
        return none
    segment = _numbers(content, "tm_segmask", name).ravel().astype(np.int32)
    if len(segment) != num_cells:
        raise InputError(f"{name}: tm_segmask has {len(segment)} numbers for {num_cells} cells")
    index = _numbers(content, "tm_tetraidx_map", name).astype(np.int64)
    if len(np.unique(segment)) == 1:
        return segment, none[1]
    # the cells' own segments, where their index map has a cell: equal to segmask_exp, and there in every file
    labels = np.where(index >= 0, segment[np.maximum(index, 0)], SOLVENT).astype(np.int32)
    labels = fill_box(labels, np.zeros((box,) * 3, bool))
    return segment, compact_labels(labels)


def write_flex_mesh(
    path: str | os.PathLike[str],
    mesh: TetraMesh,
    consensus: np.ndarray,
    soft_mask: np.ndarray,
    pixel_size_A: float,
) -> None:
    """Write a mesh as a flex_mesh pickle, version 1, with every key that the documentation lists; atomic.

    ``tm_points`` are voxels (x, y, z) from the box centre. Not tried in CryoSPARC itself: if it counts them otherwise,
    scale that one array.

    Parameters
    ----------
    path
        The pickle to write.
    mesh
        The mesh.
    consensus, soft_mask : (N, N, N)
        The map, and its mask in [0, 1].
    pixel_size_A
        Their voxel size in A.
    """
    mask = soft_mask > 0
    voxels = voxelise(mesh, mask, pixel_size_A)
    index = tetra_index_map(voxels)
    labels = np.where(mask, mesh.segment[np.maximum(index, 0)], -1).astype(np.int32)
    content = {
        "mask": mask,
        "mask_soft": soft_mask.astype(np.float32),
        "map_r": consensus.astype(np.float32),
        "map_r_masked": (consensus * soft_mask).astype(np.float32),
        "N": int(mask.shape[0]),
        "psize_A": float(pixel_size_A),
        "tm_points": mesh.vertices_A / pixel_size_A,
        "tm_cells": mesh.cells.astype(np.int32),
        "tm_tetraidx_map": index.astype(np.int32),
        "tm_rweights": mesh.rigidity.astype(np.float32),
        "segmask": labels,
        "segmask_exp": labels,
        "segfuses": [],
        "tm_segmask": mesh.segment.astype(np.int32),
        "version": 1,
    }
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        pickle.dump(content, file, protocol=4)


def main() -> None:
    """Command line: write the mesh of a results folder for CryoSPARC."""
    parser = argparse.ArgumentParser(description="Write a mesh of ours as CryoSPARC's flex_mesh pickle.")
    parser.add_argument("mesh_dir", type=Path, help="folder of a mesh: results/NAME/mesh/cells~20")
    parser.add_argument("particles_dir", type=Path, help="folder of its consensus and mask: results/NAME/particles")
    parser.add_argument("out", type=Path, help="the pickle to write")
    options = parser.parse_args()
    try:
        particles = ParticlesFolder(options.particles_dir)
        consensus, mask = read_map(particles.consensus), read_map(particles.mask)
        mesh = read_mesh(MeshFolder(options.mesh_dir).mesh)
        write_flex_mesh(options.out, mesh, consensus.data, mask.data, consensus.pixel_size_A)
    except InputError as error:
        raise SystemExit(str(error)) from None
    print(options.out)


if __name__ == "__main__":
    main()
