"""Density maps: MRC files, and boxes in real space.

Volumes are (z, y, x), cubic, even side N, with the box centre at voxel ``N//2``; see ``docs/conventions.md``.
"""

from __future__ import annotations

import bz2
import gzip
import io
import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import numpy.typing as npt
from mrcfile.mrcinterpreter import MrcInterpreter

from flexlib.errors import InputError
from flexlib.files import atomic_path
from flexlib.untrusted import check_claim, parsing

_HEADER = mrcfile.dtypes.HEADER_DTYPE
_COMPRESSED: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open}
_LARGEST_LABEL = 2**24  # of whole numbers up to this, float32 holds each
MRC_LABEL = b"Written by flexlib"  # for the time, which mrcfile writes: the same data are the same file


@dataclass(frozen=True)
class Map:
    """A cubic volume and where in space its file says it lies."""

    data: np.ndarray  # (N, N, N) float32, axes (z, y, x)
    pixel_size_A: float
    origin_A: tuple[float, float, float] = (0.0, 0.0, 0.0)  # header's ORIGIN, (x, y, z)
    nstart: tuple[int, int, int] = (0, 0, 0)  # header's NXSTART, NYSTART, NZSTART

    @property
    def box(self) -> int:
        """Voxels along each axis."""
        return self.data.shape[0]

    @property
    def corner_A(self) -> tuple[float, float, float]:
        """(x, y, z) of the first voxel in the header's frame."""
        return map_corner_A(self.origin_A, self.nstart, (self.pixel_size_A,) * 3)


def read_map(path: str | os.PathLike[str]) -> Map:
    """Read an MRC/CCP4 map; stored axis orders other than (z, y, x) are transposed.

    A map of odd side gets a layer of zeros before the first of each axis: its side is then even, and its centre, voxel
    ``N//2``, where it was.

    Raises
    ------
    InputError
        The file does not hold one finite, cubic volume with equal, positive voxel sizes.
    """
    stored = _read_mrc(Path(path))
    shape, voxel_A = stored.data.shape, stored.voxel_A
    if len(shape) != 3 or len(set(shape)) != 1:
        raise InputError(f"{path}: a cubic map is needed, its shape (z, y, x) is {shape}")
    if min(voxel_A) <= 0 or max(voxel_A) - min(voxel_A) > 1e-3 * max(voxel_A):
        raise InputError(f"{path}: equal, positive voxel sizes are needed, the header has {list(voxel_A)} A")
    data = stored.data.astype(np.float32, copy=False)
    if not np.isfinite(data).all():
        raise InputError(f"{path}: holds values that are not finite")
    volume = Map(data, float(np.mean(voxel_A)), stored.origin_A, stored.nstart)
    if volume.box % 2 == 0:
        return volume
    even = volume.box + 1
    origin_A, nstart = _placement(volume, even, volume.pixel_size_A)
    return Map(crop_or_pad_real(data, even), volume.pixel_size_A, (origin_A[0], origin_A[1], origin_A[2]), nstart)


@dataclass(frozen=True)
class LabelGrid:
    """Whole numbers on a grid of any shape, and where it lies in space."""

    labels: np.ndarray  # (nz, ny, nx) int32
    voxel_A: tuple[float, float, float]  # voxel size along x, y, z
    corner_A: tuple[float, float, float]  # (x, y, z) of the first voxel, by the file's header


def read_label_map(path: str | os.PathLike[str]) -> LabelGrid:
    """Read an MRC file that holds a whole number per voxel, in any of MRC's number types, at any box.

    Raises
    ------
    InputError
        It is no volume, has values that are not whole numbers, or no voxel size.
    """
    stored = _read_mrc(Path(path))
    if stored.data.ndim != 3:
        raise InputError(f"{path}: a volume of labels is needed, its shape is {stored.data.shape}")
    if min(stored.voxel_A) <= 0:
        raise InputError(f"{path}: the header has no voxel size: set it, it says where the labels lie")
    if not np.isfinite(stored.data).all() or (np.abs(stored.data - np.rint(stored.data)) > 1e-3).any():
        raise InputError(f"{path}: labels are whole numbers, this map has others: it may be a density map")
    largest = float(np.abs(stored.data).max())  # half floats cannot be compared with numbers as large as that
    if largest > _LARGEST_LABEL:
        raise InputError(f"{path}: the label {largest:g} is above {_LARGEST_LABEL}")
    labels = np.rint(stored.data).astype(np.int32)
    return LabelGrid(labels, stored.voxel_A, map_corner_A(stored.origin_A, stored.nstart, stored.voxel_A))


def map_corner_A(
    origin_A: tuple[float, ...], nstart: tuple[int, ...], voxel_A: tuple[float, ...]
) -> tuple[float, float, float]:
    """(x, y, z) of a map's first voxel in A: the header's ORIGIN, or where that is zero NSTART (as ChimeraX does)."""
    corner = origin_A if any(origin_A) else [start * size for start, size in zip(nstart, voxel_A, strict=True)]
    return (float(corner[0]), float(corner[1]), float(corner[2]))


@dataclass(frozen=True)
class _StoredMap:
    """An MRC file's content: data (z, y, x) in the file's number type; the rest in the order x, y, z."""

    data: np.ndarray
    voxel_A: tuple[float, float, float]
    origin_A: tuple[float, float, float]
    nstart: tuple[int, int, int]


def _read_mrc(path: Path) -> _StoredMap:
    """Read an MRC file of any shape, axes brought to (z, y, x). Raises InputError."""
    with parsing(path, "MRC map"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        size = _checked_size(path)
    with parsing(path, "MRC map", size), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with mrcfile.open(path, permissive=True) as file:
            if file.data is None:
                raise InputError(f"{path}: not a readable MRC map")
            data, header, voxel = np.array(file.data), file.header, file.voxel_size
            stored_axes = [int(header.mapc), int(header.mapr), int(header.maps)]
            start = [int(header.nxstart), int(header.nystart), int(header.nzstart)]
            origin_A = (float(header.origin.x), float(header.origin.y), float(header.origin.z))
            voxel_A = (float(voxel.x), float(voxel.y), float(voxel.z))
    if data.dtype.kind not in "fiu":
        raise InputError(f"{path}: holds complex numbers (mode {header.mode}): a map of real numbers is needed")
    if not np.isfinite([*voxel_A, *origin_A]).all():
        raise InputError(f"{path}: voxel size or origin in its header are not finite")
    if data.ndim == 3 and sorted(stored_axes) == [1, 2, 3] and stored_axes != [1, 2, 3]:
        section_first = stored_axes[::-1]  # axis (1 x, 2 y, 3 z) of each array dimension
        data = np.ascontiguousarray(data.transpose([section_first.index(axis) for axis in (3, 2, 1)]))
        start = [start[stored_axes.index(axis)] for axis in (1, 2, 3)]
    return _StoredMap(data, voxel_A, origin_A, (start[0], start[1], start[2]))


def _checked_size(path: Path) -> int:
    """Bytes that a map's header claims. Raises InputError, before they get memory, where the file cannot hold them."""
    with path.open("rb") as file:
        unpack = _COMPRESSED.get(file.read(2), open)
    with unpack(path, "rb") as file:
        raw = bytearray(file.read(_HEADER.itemsize))
    # the byte order as mrcfile finds it, which is not to read an extended header of any size that this one claims
    at = _HEADER.fields["nsymbt"][1]
    extended, raw[at : at + 4] = bytes(raw[at : at + 4]), bytes(4)
    header = MrcInterpreter(io.BytesIO(raw), permissive=True, header_only=True).header
    extra = int(np.frombuffer(extended, header.nsymbt.dtype)[0])
    shape = mrcfile.utils.data_shape_from_header(header)
    voxels = math.prod(int(side) for side in shape) if min(shape) > 0 else -1
    claimed = voxels * mrcfile.utils.data_dtype_from_header(header).itemsize + extra + _HEADER.itemsize
    possible = voxels > 0 and extra >= 0
    check_claim(path, claimed if possible else -1, path.stat().st_size, compressed=unpack is not open)
    return claimed


def write_map(
    path: str | os.PathLike[str],
    data: np.ndarray,
    pixel_size_A: float,
    like: Map | None = None,
    dtype: npt.DTypeLike = np.float32,
) -> None:
    """Write a volume as MRC, atomically, its centre where that of ``like`` lies.

    Parameters
    ----------
    path
        The file.
    data
        (N, N, N).
    pixel_size_A
        Of the volume.
    like
        A map at any box and pixel size whose ORIGIN and NSTART are carried over, scaled to this box.
    dtype
        To write: float32; int16 or int8 for labels.
    """
    with atomic_path(path) as temporary, mrcfile.new(temporary, overwrite=True) as file:
        file.set_data(np.ascontiguousarray(data, dtype=dtype))
        file.set_volume()
        file.header.label[0] = MRC_LABEL
        file.voxel_size = pixel_size_A
        if like is not None:
            origin_A, nstart = _placement(like, data.shape[0], pixel_size_A)
            for axis, value in zip("xyz", origin_A, strict=True):
                file.header.origin[axis] = value
            file.nstart = nstart


def write_label_map(
    path: str | os.PathLike[str], labels: np.ndarray, pixel_size_A: float, like: Map | None = None
) -> None:
    """Write whole numbers as MRC, atomically, so that ``read_label_map`` returns the same.

    MRC has no 32-bit integers: the file holds 16-bit ones where they are enough, else float32.

    Parameters
    ----------
    path
        File to write.
    labels : (N, N, N) int
        A label for each voxel, up to 2^24.
    pixel_size_A
        Voxel size in A.
    like
        As in ``write_map``.

    Raises
    ------
    InputError
        A label is not exact in float32.
    """
    largest = int(np.abs(labels).max())
    if largest > _LARGEST_LABEL:
        raise InputError(
            f"{path}: the label {largest} is above {_LARGEST_LABEL}, the largest an MRC file holds exactly"
        )
    dtype = np.int16 if largest <= np.iinfo(np.int16).max else np.float32
    write_map(path, labels, pixel_size_A, like=like, dtype=dtype)


def _placement(like: Map, box: int, pixel_size_A: float) -> tuple[list[float], tuple[int, int, int]]:
    """ORIGIN in A and NSTART of a map at another box whose centre stays where that of ``like`` is.

    Readers use one of the two fields, so each is made right by itself; NSTART that was zero stays zero.
    """
    corner_A = like.box // 2 * like.pixel_size_A - box // 2 * pixel_size_A
    corner_A = 0.0 if abs(corner_A) < 1e-6 * pixel_size_A * box else corner_A
    by_nstart = any(like.nstart) and not any(like.origin_A)
    origin_A = [0.0 if by_nstart else origin + corner_A for origin in like.origin_A]
    if not any(like.nstart):
        return origin_A, (0, 0, 0)
    start = [round((s * like.pixel_size_A + corner_A) / pixel_size_A) for s in like.nstart]
    return origin_A, (start[0], start[1], start[2])


def crop_or_pad_real(volume: np.ndarray, box: int, fill: float = 0.0) -> np.ndarray:
    """Cut or extend (N, N, N) to side ``box`` at the same voxel size: voxel ``N//2`` becomes voxel ``box//2``."""
    old = volume.shape[0]
    result = np.full((box,) * 3, fill, dtype=volume.dtype)
    start = box // 2 - old // 2
    new_slice = slice(max(start, 0), min(start + old, box))
    old_slice = slice(max(-start, 0), max(-start, 0) + new_slice.stop - new_slice.start)
    result[new_slice, new_slice, new_slice] = volume[old_slice, old_slice, old_slice]
    return result
