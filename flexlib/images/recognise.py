"""Whether image stacks still hold what prepare read from them: later stages read them again, by their names.

Recognised by size and time of modification; where these have changed, by a few images of each stack. Stacks that were
copied or touched are the same; those that were written anew, in another order perhaps, are not.
"""

from __future__ import annotations

import csv
import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flexlib.errors import InputError
from flexlib.files import atomic_path, reading
from flexlib.images.stack import StackHeader, Stacks
from flexlib.particles.table import Particles

log = logging.getLogger(__name__)

_SAMPLE = 16  # images of each stack, evenly among those in use
_COLUMNS = ("stack", "size_bytes", "modified_ns", "images", "blake2b")


@dataclass(frozen=True)
class KnownStack:
    """What is remembered of a stack."""

    path: Path
    size_bytes: int
    modified_ns: int
    images: tuple[int, ...]  # the sample, from 0
    checksum: str  # of their pixels, as float32

    @classmethod
    def seen(cls, header: StackHeader, used: np.ndarray) -> KnownStack:
        """A stack as it is now; ``used`` (m,) are the images in use, ascending."""
        places = np.linspace(0, len(used) - 1, min(_SAMPLE, len(used)))
        images = tuple(int(used[place]) for place in places.round().astype(int))
        size_bytes, modified_ns = _size_and_time(header.path)
        return cls(header.path, size_bytes, modified_ns, images, _checksum(header, images))

    def check(self, header: StackHeader) -> None:
        """Raises InputError where the stack does not hold the same images any more."""
        if (self.size_bytes, self.modified_ns) == _size_and_time(header.path):
            return
        fits = max(self.images) < header.num_images
        if not fits or _checksum(header, self.images) != self.checksum:
            raise InputError(
                f"{header.path}: not the images that prepare has read: the stack was written anew since then: "
                "run prepare again (snakemake --forcerun prepare)"
            )
        log.info("%s: written or touched since prepare read it, but its images are the same", header.path)


def known_stacks(stacks: Stacks, particles: Particles) -> list[KnownStack]:
    """All stacks that ``particles`` are in, as they are now."""
    order = np.argsort(particles.stack_index, kind="stable")
    stack_of, first = np.unique(particles.stack_index[order], return_index=True)
    images = np.split(particles.image_index[order], first[1:])
    return [KnownStack.seen(stacks.header(int(s)), np.unique(i)) for s, i in zip(stack_of, images, strict=True)]


def write_known_stacks(path: Path, known: list[KnownStack]) -> None:
    """As CSV; images count from 1."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for one in known:
            images = " ".join(str(image + 1) for image in one.images)
            writer.writerow([one.path.absolute(), one.size_bytes, one.modified_ns, images, one.checksum])


def check_known_stacks(path: Path, stacks: Stacks, particles: Particles) -> None:
    """Compare the stacks that ``particles`` are in with what ``path`` says of them; nothing where it is not there.

    Raises
    ------
    InputError
        A stack holds other images than it did.
    """
    if not path.is_file():  # of an older flexlib
        return
    known = {one.path: one for one in _read(path)}
    for stack in np.unique(particles.stack_index):
        header = stacks.header(int(stack))
        if header.path in known:
            known[header.path].check(header)


def _read(path: Path) -> list[KnownStack]:
    damage = ValueError, KeyError, AttributeError, TypeError
    with reading(path, *damage), path.open(newline="", errors="surrogateescape") as file:
        return [_of_row(row) for row in csv.DictReader(file)]


def _of_row(row: dict[str, str]) -> KnownStack:
    images = tuple(int(image) - 1 for image in row["images"].split())
    return KnownStack(Path(row["stack"]), int(row["size_bytes"]), int(row["modified_ns"]), images, row["blake2b"])


def _size_and_time(path: Path) -> tuple[int, int]:
    with reading(path):
        status = path.stat()
    return status.st_size, status.st_mtime_ns


def _checksum(header: StackHeader, images: tuple[int, ...]) -> str:
    """Of the pixels of some images, one after the other."""
    return hashlib.blake2b(header.read(np.array(images)).tobytes(), digest_size=16).hexdigest()
