"""MRC image stacks: only the images asked for are read, by plain reads; written image by image.

Read are .mrc and .mrcs files of square images in modes 0 (int8, or uint8 where IMOD's stamp says so), 1 (int16),
2 (float32), 6 (uint16) and 12 (float16), of either byte order. RELION and other programs write headers without a
machine stamp, a map id or a pixel size: these are read with one warning (the pixel size always is the metadata's).
The shape and the data type must be right, and the file long enough for what its header says.

Sources: the MRC2014 format (https://www.ccpem.ac.uk/mrc-format/mrc2014/), IMOD's description of its header
(https://bio3d.colorado.edu/imod/doc/mrc_format.txt: ``imodStamp``, ``imodFlags``).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import mrcfile
import numpy as np

from flexlib.errors import InputError
from flexlib.files import is_there, reading
from flexlib.imaging.maps import MRC_LABEL
from flexlib.particles.table import Particles

log = logging.getLogger(__name__)

_TYPES = {0: "int8", 1: "int16", 2: "float32", 6: "uint16", 12: "float16"}  # by MRC mode
_OTHER_TYPES = {3: "complex int16", 4: "complex64", 101: "4-bit integers"}
_HEADER = mrcfile.dtypes.HEADER_DTYPE
_IMOD_STAMP_AT, _IMOD_STAMP, _IMOD_SIGNED = 152, 1146047817, 1  # byte offset, value, and the flag in the word after it
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_MAX_SIDE = 2**16  # a larger number of columns means the other byte order


@dataclass(frozen=True)
class StackHeader:
    """Where a stack's pixels lie in its file."""

    path: Path
    num_images: int
    box: int
    dtype: np.dtype
    offset: int
    complaint: str = ""  # what is odd about the header, though readable

    def read(self, slices: np.ndarray, side: int | None = None) -> np.ndarray:
        """The images at ``slices`` (b,), from 0, as (b, side, side) float32; see ``Stacks.read``.

        Plain reads: a memory map would count every page around an image as this process's memory. Raises InputError
        where the file is gone or has become shorter.
        """
        side = self.box if side is None else side
        start = self.box // 2 - side // 2
        inner = slice(start, start + side)
        image = np.empty((self.box, self.box), self.dtype)
        result = np.empty((len(slices), side, side), np.float32)
        with reading(self.path), self.path.open("rb", buffering=0) as file:
            for number, index in enumerate(slices):
                file.seek(self.offset + int(index) * image.nbytes)
                if file.readinto(image.data) != image.nbytes:
                    raise InputError(f"{self.path}: image {index + 1} cannot be read whole: has the file changed?")
                result[number] = image[inner, inner]
        return result


def read_stack_header(path: Path) -> StackHeader:
    """Read and check the header of an MRC stack of square images.

    Raises
    ------
    InputError
        The file is compressed, is no MRC file, has a data type other than ``_TYPES``, or ends too early.
    """
    raw = _read_header_bytes(path)
    header = _parse_header(path, raw)
    nx, ny, nz, mode = (int(header[name]) for name in ("nx", "ny", "nz", "mode"))
    if mode not in _TYPES:
        known = ", ".join(_TYPES.values())
        data_type = _OTHER_TYPES.get(mode, "unknown")
        raise InputError(f"{path}: data of type {data_type} are not supported (mode {mode}), only {known}")
    if nx != ny or nz <= 0:
        raise InputError(f"{path}: images of {nx} x {ny} pixels, {nz} of them: square images are needed")
    order = header.dtype["mode"].byteorder
    dtype = np.dtype(_TYPES[mode]).newbyteorder(order)
    stamp, flags = np.frombuffer(raw, np.dtype("i4").newbyteorder(order), 2, _IMOD_STAMP_AT)
    if mode == 0 and stamp == _IMOD_STAMP and not flags & _IMOD_SIGNED:
        dtype = np.dtype(np.uint8)
    offset = _HEADER.itemsize + max(0, int(header["nsymbt"]))
    wanted, size = offset + nx * ny * nz * dtype.itemsize, path.stat().st_size
    if size < wanted:
        raise InputError(f"{path}: truncated: {size} bytes, its header promises {wanted} ({nz} images of {nx} x {ny})")
    return StackHeader(path, nz, nx, dtype, offset, _complaint(header))


def _read_header_bytes(path: Path) -> bytes:
    """The first 1024 bytes of a file that is long enough and not compressed."""
    with reading(path), path.open("rb") as file:
        raw = file.read(_HEADER.itemsize)
    for magic, name in _COMPRESSED.items():
        if raw.startswith(magic):
            raise InputError(f"{path}: compressed with {name}: unpack it first, images are read where they lie")
    if len(raw) < _HEADER.itemsize:
        raise InputError(f"{path}: not a readable MRC stack ({len(raw)} bytes, shorter than an MRC header)")
    return raw


def _parse_header(path: Path, raw: bytes) -> np.void:
    """The header's fields, in the byte order in which its number of columns and its mode make sense."""
    for fields in (_HEADER.newbyteorder("<"), _HEADER.newbyteorder(">")):
        header = np.frombuffer(raw, fields)[0]
        if 0 < header["nx"] < _MAX_SIDE and 0 <= header["mode"] < _MAX_SIDE:
            return header
    raise InputError(f"{path}: not a readable MRC stack (its header makes no sense in either byte order)")


def _complaint(header: np.void) -> str:
    """What a strict reader would mind about a readable header."""
    odd = []
    if header["map"].strip(b"\0 ") != b"MAP":
        odd.append("no map id")
    if not header["machst"].any():
        odd.append("no machine stamp")
    if not header["cella"]["x"] > 0:
        odd.append("no pixel size (the metadata's is used)")
    return ", ".join(odd)


@dataclass(frozen=True)
class Stacks:
    """The image stacks of a particle set; safe to read from several threads."""

    headers: tuple[StackHeader | None, ...]  # None where no particle is in the stack

    def read(self, particles: Particles, rows: np.ndarray, side: int | None = None) -> np.ndarray:
        """The images of ``particles`` at ``rows``, all of one box.

        Parameters
        ----------
        particles, rows
            (b,) rows of the particles.
        side
            Of a crop in pixels that keeps the centre: pixel ``box//2`` becomes ``side//2``. None takes the whole box.

        Returns
        -------
        images
            (b, side, side) float32, contrast as stored.
        """
        stack_of_row, slices = particles.stack_index[rows], particles.image_index[rows]
        if side is None:
            side = self.header(stack_of_row[0]).box
        result = np.empty((len(rows), side, side), np.float32)
        for stack in np.unique(stack_of_row):
            members = np.flatnonzero(stack_of_row == stack)
            result[members] = self.header(stack).read(slices[members], side)
        return result

    def header(self, stack: int) -> StackHeader:
        """Of a stack that particles are in."""
        header = self.headers[stack]
        assert header is not None, "no particle was in this stack when the stacks were opened"
        return header


def open_stacks(particles: Particles) -> tuple[Stacks, Particles]:
    """Check every stack that the particles name, before any long work.

    Returns
    -------
    stacks
        Every stack's header.
    particles
        The same, with the box filled into their optics groups.

    Raises
    ------
    InputError
        A stack is missing, truncated, too short for its rows, or of another box than stated; the message has the first
        row concerned.
    """
    column = particles.extra.get("image_column", "rlnImageName")
    used, first_row = np.unique(particles.stack_index, return_index=True)
    headers: list[StackHeader | None] = [None] * len(particles.stack_paths)
    for stack, row in zip(used, first_row, strict=True):
        path = particles.stack_paths[stack]
        if not is_there(path, as_file=True):
            raise InputError(f"{particles.describe_row(row, column)}: image stack not found: {path}")
        try:
            headers[stack] = read_stack_header(path)
        except InputError as error:
            raise InputError(f"{particles.describe_row(row, column)}: {error}") from error
    odd = [header for header in headers if header is not None and header.complaint]
    if odd:
        kinds = "; ".join(sorted({header.complaint for header in odd}))
        log.warning("%d of %d stacks have odd headers, such as %s: %s", len(odd), len(used), odd[0].path, kinds)
    lengths = np.array([0 if header is None else header.num_images for header in headers])
    outside = (particles.image_index < 0) | (particles.image_index >= lengths[particles.stack_index])
    if outside.any():
        row = int(np.argmax(outside))
        stack = particles.stack_index[row]
        raise InputError(
            f"{particles.describe_row(row, column)}: image {particles.image_index[row] + 1} of a stack of "
            f"{lengths[stack]}: {particles.stack_paths[stack]}"
        )
    boxes = np.array([0 if header is None else header.box for header in headers])
    box_of_group = _boxes_of_groups(particles, boxes[particles.stack_index], column)
    optics = tuple(replace(group, box=box_of_group[index]) for index, group in enumerate(particles.optics))
    return Stacks(tuple(headers)), replace(particles, optics=optics)


def _boxes_of_groups(particles: Particles, box_of_row: np.ndarray, column: str) -> list[int]:
    """The box of each optics group's images, which must be one, and the one that the metadata state if they do.

    ``box_of_row`` (n,) the box of each particle's stack. A group without particles keeps its stated box.
    """
    result = [group.box for group in particles.optics]
    for index, group in enumerate(particles.optics):
        members = np.flatnonzero(particles.optics_index == index)
        if not len(members):
            continue
        boxes = box_of_row[members]
        result[index] = int(boxes[0])
        if (boxes != boxes[0]).any():
            row = members[np.argmax(boxes != boxes[0])]
            raise InputError(
                f"{particles.describe_row(row, column)}: images of {box_of_row[row]} px, others of {boxes[0]} px "
                f"in the same optics group ({group.name}): {particles.stack_paths[particles.stack_index[row]]}"
            )
        if group.box not in (0, boxes[0]):
            name = "rlnImageSize" if column != "blob/path" else "blob/shape"
            raise InputError(
                f"{particles.describe_row(members[0], name)}: {group.box} px, but the images have {boxes[0]} px: "
                f"{particles.stack_paths[particles.stack_index[members[0]]]}"
            )
    return result


class ImageStackWriter:
    """A float32 image stack on disk, written image by image: no more is in memory than what is appended."""

    def __init__(self, path: str | Path, num_images: int, box: int, pixel_size_A: float) -> None:
        with mrcfile.new_mmap(path, (num_images, box, box), mrc_mode=2, overwrite=True) as stack:
            stack.set_image_stack()
            stack.voxel_size = pixel_size_A
            stack.header.label[0] = MRC_LABEL
            offset = stack.header.nbytes
        self._file = Path(path).open("r+b")  # noqa: SIM115 (closed by __exit__)
        self._file.seek(offset)

    def append(self, images: np.ndarray) -> None:
        """Write (b, box, box) images after those written before."""
        self._file.write(np.ascontiguousarray(images, "<f4").data)

    def __enter__(self) -> ImageStackWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
