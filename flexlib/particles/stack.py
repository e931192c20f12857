"""MRC image stacks, memory-mapped: only the slices asked for are read.

RELION and other programs write stacks whose headers lack a machine stamp, a map id or a pixel size: these are read with
a warning. The shape and the data type must be right, and the file long enough for what its header says.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path

import mrcfile
import numpy as np

from flexlib.errors import InputError
from flexlib.particles.table import Particles

log = logging.getLogger(__name__)

_TYPES = ("int8", "int16", "float16", "float32", "uint16")  # MRC modes 0, 1, 12, 2, 6
_OPEN_STACKS = 64


@dataclass(frozen=True)
class StackHeader:
    """Where a stack's pixels lie in its file."""

    path: Path
    num_images: int
    box: int
    dtype: np.dtype
    offset: int
    complaint: str = ""  # what is odd about the header, though readable

    def open(self) -> np.memmap:
        """(num_images, box, box) read-only map of the file."""
        shape = (self.num_images, self.box, self.box)
        return np.memmap(self.path, self.dtype, mode="r", offset=self.offset, shape=shape)


def read_stack_header(path: Path) -> StackHeader:
    """Read and check the header of an MRC stack of square images.

    Raises InputError where the file is no MRC file, has another data type than ``_TYPES``, or ends too early.
    """
    try:
        with warnings.catch_warnings(record=True) as complaints:
            warnings.simplefilter("always")
            with mrcfile.open(path, header_only=True, permissive=True) as file:
                header = file.header
        dtype = mrcfile.utils.dtype_from_mode(int(header.mode)).newbyteorder(header.mode.dtype.byteorder)
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: not a readable MRC stack ({' '.join(str(error).split())})") from error
    if dtype.name not in _TYPES:
        raise InputError(f"{path}: data of type {dtype.name} are not supported, only {', '.join(_TYPES)}")
    nx, ny, nz = int(header.nx), int(header.ny), int(header.nz)
    if nx != ny or nx <= 0 or nz <= 0:
        raise InputError(f"{path}: images of {nx} x {ny} pixels, {nz} of them: square images are needed")
    offset = 1024 + max(0, int(header.nsymbt))
    wanted, size = offset + nx * ny * nz * dtype.itemsize, path.stat().st_size
    if size < wanted:
        raise InputError(f"{path}: truncated: {size} bytes, its header tells of {wanted} ({nz} images of {nx} x {ny})")
    return StackHeader(path, nz, nx, dtype, offset, "; ".join(str(complaint.message) for complaint in complaints))


@dataclass(frozen=True)
class Stacks:
    """The image stacks of a particle set; safe to read from several threads."""

    headers: tuple[StackHeader, ...]
    box: int

    def read(self, particles: Particles, rows: np.ndarray, crop_box: int | None = None) -> np.ndarray:
        """The images of ``particles`` at ``rows``: (b, c, c) float32, c = ``crop_box`` or the whole box.

        A crop keeps the centre: pixel ``box//2`` becomes ``c//2``. Contrast is as stored.
        """
        side = self.box if crop_box is None else crop_box
        start = self.box // 2 - side // 2
        inner = slice(start, start + side)
        result = np.empty((len(rows), side, side), np.float32)
        stack_of_row, slices = particles.stack_index[rows], particles.image_index[rows]
        for stack in np.unique(stack_of_row):
            members = np.flatnonzero(stack_of_row == stack)
            images = _open(self.headers[stack])
            for member, index in zip(members, slices[members], strict=True):
                result[member] = images[index, inner, inner]
        return result


_lock = threading.Lock()
_opened: OrderedDict[StackHeader, np.memmap] = OrderedDict()


def _open(header: StackHeader) -> np.memmap:
    """The stack's memory map; the latest ``_OPEN_STACKS`` stay open."""
    with _lock:
        images = _opened.pop(header, None)
        if images is None:
            images = header.open()
        _opened[header] = images
        while len(_opened) > _OPEN_STACKS:
            _opened.popitem(last=False)
    return images


def open_stacks(particles: Particles) -> tuple[Stacks, Particles]:
    """Check every stack that the particles name, before any long work.

    Returns the stacks and the particles with the box filled into their optics groups. Raises InputError, naming the
    first row concerned, where a stack is missing, truncated, too short for its rows, or of another box than stated.
    """
    column = particles.extra.get("image_column", "rlnImageName")
    used, first_row = np.unique(particles.stack_index, return_index=True)
    headers: list[StackHeader | None] = [None] * len(particles.stack_paths)
    for stack, row in zip(used, first_row, strict=True):
        path = particles.stack_paths[stack]
        if not path.is_file():
            raise InputError(f"{particles.describe_row(row, column)}: image stack not found: {path}")
        try:
            headers[stack] = read_stack_header(path)
        except InputError as error:
            raise InputError(f"{particles.describe_row(row, column)}: {error}") from error
    odd = [header for header in headers if header is not None and header.complaint]
    if odd:
        log.warning(
            "%d of %d stacks have odd headers, such as %s: %s", len(odd), len(used), odd[0].path, odd[0].complaint
        )
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
    box = int(boxes[particles.stack_index[0]])
    _check_boxes(particles, boxes, box, column)
    optics = tuple(replace(group, box=box) for group in particles.optics)
    return Stacks(tuple(headers), box), replace(particles, optics=optics)  # type: ignore[arg-type]


def _check_boxes(particles: Particles, boxes: np.ndarray, box: int, column: str) -> None:
    other = boxes[particles.stack_index] != box
    if other.any():
        row = int(np.argmax(other))
        stack = particles.stack_index[row]
        raise InputError(
            f"{particles.describe_row(row, column)}: images of {boxes[stack]} px, others of {box} px: "
            f"{particles.stack_paths[stack]}"
        )
    declared = np.array([group.box for group in particles.optics])[particles.optics_index]
    wrong = (declared != 0) & (declared != box)
    if wrong.any():
        row = int(np.argmax(wrong))
        name = "rlnImageSize" if column == "rlnImageName" else "blob/shape"
        raise InputError(
            f"{particles.describe_row(row, name)}: {declared[row]} px, but the images have {box} px: "
            f"{particles.stack_paths[particles.stack_index[row]]}"
        )
