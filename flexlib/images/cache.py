"""A copy of the particle images on fast scratch, for as long as a stage reads them.

Only the images in use are copied, each once, as they are stored (the pixel type of their stack), stack after stack. A
stack's copy is written under a temporary name, read back and compared by checksum, and then renamed. The folder is
removed when the stage ends, whichever way; one that a killed job left behind is removed by the next that uses the
same ``cache_dir``. Where the copy does not fit or fails, a warning says so and the originals are read instead: a cache
may cost time, never a result.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from flexlib.errors import InputError
from flexlib.files import atomic_path
from flexlib.images.sources import FullImages
from flexlib.images.stack import StackHeader, Stacks

logger = logging.getLogger(__name__)

_PREFIX = "flexlib-images-"
_LOCK = "in-use"
_KEEP_FREE = 0.02  # share of the disk that a cache leaves to others
_CHUNK_BYTES = 2**24


class _CacheError(Exception):
    """The copy cannot be made; the message says why."""


@contextmanager
def cached_images(
    source: FullImages, cache_dir: str | Path | None, rows: np.ndarray | None = None
) -> Iterator[FullImages]:
    """``source`` with its images read from a copy below ``cache_dir``; itself where that is None or has no room.

    Parameters
    ----------
    source
        Images as ``open_full_images`` gives them.
    cache_dir
        A folder on fast scratch; made if missing. Several jobs may use it at once.
    rows
        (m,) the only rows that will be read; None for all.
    """
    if cache_dir is None:
        yield source
        return
    with _leave_on_sigterm():
        folder, lock = None, None
        try:
            try:
                folder, lock = _claim_folder(Path(cache_dir))
                used = _copy_images(source, folder, np.arange(len(source)) if rows is None else rows)
            except (OSError, _CacheError) as error:
                reason = error.strerror or error if isinstance(error, OSError) else error
                logger.warning(
                    "reconstruct.cache_dir: %s: images are not copied there (%s); they are read where they are",
                    cache_dir,
                    reason,
                )
                if folder is not None:
                    shutil.rmtree(folder, ignore_errors=True)
                used = source
            yield used
        finally:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            if lock is not None:
                os.close(lock)


def _claim_folder(cache_dir: Path) -> tuple[Path, int]:
    """A new folder below ``cache_dir`` and the descriptor of its lock; folders that nobody holds are removed."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    for other in cache_dir.glob(f"{_PREFIX}*"):
        if not _in_use(other):
            logger.info("removing %s, left behind by a job that was killed", other)
            shutil.rmtree(other, ignore_errors=True)
    # locked under another name first, so that no other job can take it for abandoned
    folder = Path(tempfile.mkdtemp(prefix=".", dir=cache_dir))
    lock = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return folder.rename(cache_dir / f"{_PREFIX}{folder.name[1:]}"), lock


def _in_use(folder: Path) -> bool:
    """Whether the job that made a cache folder still runs: the system frees a lock when its holder ends."""
    try:
        descriptor = os.open(folder / _LOCK, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _copy_images(source: FullImages, folder: Path, rows: np.ndarray) -> FullImages:
    """Copy the images of ``rows`` into ``folder``; the same source, reading the copies."""
    began = time.perf_counter()
    stacks, particles = source.stored
    stack_of, slice_of = particles.stack_index[rows], particles.image_index[rows]
    slices_of = {int(stack): np.unique(slice_of[stack_of == stack]) for stack in np.unique(stack_of)}
    originals = {stack: stacks.header(stack) for stack in slices_of}
    wanted = sum(len(slices) * _image_bytes(originals[stack]) for stack, slices in slices_of.items())
    disk = shutil.disk_usage(folder)
    room = disk.free - _KEEP_FREE * disk.total
    if wanted > room:
        raise _CacheError(f"{wanted / 1e9:.2f} GB are needed, {max(room, 0) / 1e9:.2f} GB are free")
    headers = list(stacks.headers)
    image_index = particles.image_index.copy()
    for stack, slices in slices_of.items():
        path = folder / f"{stack:06d}.images"
        _copy_stack(originals[stack], slices, path)
        headers[stack] = replace(originals[stack], path=path, num_images=len(slices), offset=0)
        here = rows[stack_of == stack]
        image_index[here] = np.searchsorted(slices, particles.image_index[here])
    seconds = time.perf_counter() - began
    logger.info("%.2f GB of images copied to %s in %.1f s", wanted / 1e9, folder, seconds)
    return source.reading_from(Stacks(tuple(headers)), image_index)


def _copy_stack(header: StackHeader, slices: np.ndarray, path: Path) -> None:
    """Copy the images ``slices`` (ascending) of a stack to ``path``, whole and verified or not at all."""
    size = _image_bytes(header)
    checksum = 0
    with atomic_path(path) as temporary:
        with header.path.open("rb", buffering=0) as original, temporary.open("wb") as copy:
            for run in np.split(slices, np.flatnonzero(np.diff(slices) != 1) + 1):
                original.seek(header.offset + int(run[0]) * size)
                left = len(run) * size
                while left:
                    chunk = original.read(min(left, _CHUNK_BYTES))
                    if not chunk:
                        raise InputError(
                            f"{header.path}: image {run[-1] + 1} cannot be read whole: has the file changed?"
                        )
                    checksum = zlib.crc32(chunk, checksum)
                    copy.write(chunk)
                    left -= len(chunk)
            copy.flush()
            os.fsync(copy.fileno())
        if _checksum(temporary) != checksum:
            raise _CacheError(f"the copy of {header.path} differs from it")


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def _image_bytes(header: StackHeader) -> int:
    return header.box**2 * header.dtype.itemsize


@contextmanager
def _leave_on_sigterm() -> Iterator[None]:
    """Let SIGTERM (a cluster's time limit, a cancelled workflow) end the process through its ``finally`` blocks."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
