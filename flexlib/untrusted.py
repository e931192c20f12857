"""Parsers of other people's making, on files of other people's making: a result, or ``InputError`` in one line.

A library meets a damaged or hostile file with whatever exception it comes to, and may first ask for all the memory
that a header claims. So its call is made within ``parsing``, and what a header claims is held against the file's size.
"""

from __future__ import annotations

import io
import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import numpy as np

from flexlib.errors import InputError

MAX_RATIO = 1100  # deflate makes no more than 1032 bytes of one
_FREE_BYTES = 2**28  # that any compressed file may hold: masks are nearly empty
_MAX_HEADER = 2**22  # of a .npy file, in bytes: tens of thousands of columns
_one_at_a_time = threading.RLock()
_MEMORY_FACTOR, _MEMORY_BYTES = 64, 2**29  # a parser's memory: a multiple of its file, and as much as this besides


@contextmanager
def parsing(path: str | os.PathLike[str], what: str, unpacked: int = 0) -> Iterator[None]:
    """For a library's call alone: whatever exception it ends in becomes an InputError, ``not a readable <what>``.

    Where the system can limit it (Linux), the call gets memory in proportion to the file's size, so that a small file
    cannot ask for all there is, and some for ``unpacked`` bytes (which ``check_claim`` has passed) besides. What the
    library prints is kept from the terminal; it is the reason given where the exception has none.
    """
    printed = io.StringIO()
    try:
        with _limited_memory(path, unpacked), redirect_stdout(printed), redirect_stderr(printed):
            yield
    except InputError:
        raise
    except MemoryError as error:
        raise InputError(f"{path}: not a readable {what} (it asks for more memory than a file of its size)") from error
    except (Exception, SystemExit) as error:
        told = str(error) if isinstance(error, Exception) and str(error) else printed.getvalue()
        reason = " ".join(told.split()) or type(error).__name__
        raise InputError(f"{path}: not a readable {what} ({reason})") from error


@contextmanager
def _limited_memory(path: str | os.PathLike[str], unpacked: int) -> Iterator[None]:
    """Limit this process's memory to what it has now and a share in proportion to the file."""
    with _one_at_a_time:  # the limit is the whole process's
        yield from _limited(path, unpacked)


def _limited(path: str | os.PathLike[str], unpacked: int) -> Iterator[None]:
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        size = Path(path).stat().st_size
    except (ImportError, OSError):  # no such system, or no such file: the parser will say so
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = pages * resource.getpagesize() + _MEMORY_FACTOR * size + _MEMORY_BYTES + 4 * unpacked
    known = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (min([wanted, *known]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def check_claim(path: str | os.PathLike[str], claimed: int, stored: int, compressed: bool) -> None:
    """Refuse data that cannot be in the file, before they get memory.

    Parameters
    ----------
    path
        The file.
    claimed
        Bytes that a header promises.
    stored
        Bytes that the file has for them.
    compressed
        Whether these are compressed.

    Raises
    ------
    InputError
        There are fewer than the header promises, or so few that no compressor can have made them of so many.
    """
    if claimed < 0 or (claimed > stored and not compressed):
        raise InputError(f"{path}: truncated or damaged: its header promises {claimed} bytes of data, it has {stored}")
    if compressed and claimed > max(_FREE_BYTES, MAX_RATIO * stored):
        raise InputError(f"{path}: damaged: its header promises {claimed} bytes of data, compressed to only {stored}")


def read_npy(path: str | os.PathLike[str], what: str) -> np.ndarray:
    """The array of a NumPy file (``.npy``, any version); Python objects are never loaded.

    ``what`` is what the file should be, for the message. Raises InputError where it cannot be read, or is shorter than
    its header says.
    """
    with parsing(path, what), Path(path).open("rb") as file:
        version = np.lib.format.read_magic(file)  # not a zip file or a pickle, which numpy.load would look into too
        of_version = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = of_version(file, max_header_size=_MAX_HEADER)  # of 3.0 too, but for letters in names
        stored = os.fstat(file.fileno()).st_size - file.tell()
    if dtype.itemsize == 0 or min(shape, default=0) < 0:  # which numpy.load divides by, or reads to the file's end
        raise InputError(
            f"{path}: not a readable {what} (its header promises {shape} values of {dtype.itemsize} bytes)"
        )
    if not dtype.hasobject:
        check_claim(path, math.prod(shape) * dtype.itemsize, stored, compressed=False)
    with parsing(path, what):
        array: np.ndarray = np.load(path, allow_pickle=False, max_header_size=_MAX_HEADER)
    return array


def as_float64(values: np.ndarray) -> np.ndarray:
    """Numbers of a file as float64: without a warning, infinite where a long double is too large."""
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(np.float64)
