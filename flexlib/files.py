"""Files written whole or not at all, and errors that name the file that they are about."""

from __future__ import annotations

import fcntl
import glob
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flexlib.errors import InputError


def is_there(path: str | os.PathLike[str], *, as_file: bool = False) -> bool:
    """Whether a file or folder (``as_file``: a file) is there for us: no name is too long, no folder closed to ask."""
    try:
        return Path(path).is_file() if as_file else Path(path).exists()
    except OSError:
        return False


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path`` that becomes ``path`` when the block ends well and is removed when it fails.

    The temporary name keeps the suffix, because several writers choose their format by it. Parent folders are made.
    What killed processes have left under other temporary names of ``path`` is removed: theirs is locked as long as they
    live. Before it gets its name the file is on the disk, so that a crash of the machine leaves no half of it either.

    Raises
    ------
    OSError
        It could not be written; ``filename`` is ``path``.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(temporary, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove_abandoned(path, temporary)
            yield temporary
            os.fsync(lock)
            temporary.replace(path)
        finally:
            os.close(lock)
            temporary.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # of torch's writer
        if not isinstance(cause, OSError) or cause.filename not in (None, str(temporary)):
            raise
        reason = cause.strerror or f"not written whole: {cause}: is the disk full?"  # numpy knows no more
        raise OSError(cause.errno, reason, str(path)) from error


def _remove_abandoned(path: Path, own: Path) -> None:
    """Remove temporary files of ``path`` that no process holds."""
    for other in path.parent.glob(f".{glob.escape(path.stem)}.*.part{glob.escape(path.suffix)}"):
        if other == own:
            continue
        with suppress(OSError):
            held = os.open(other, os.O_RDWR)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                other.unlink()
            finally:
                os.close(held)


@contextmanager
def reading(path: str | os.PathLike[str], *damage: type[Exception]) -> Iterator[None]:
    """Turn what goes wrong while the file ``path`` is read into an ``InputError`` that names it.

    Parameters
    ----------
    path
        The file.
    damage
        What else than ``OSError`` its reader raises where the content is not what it should be.

    Raises
    ------
    InputError
        The file cannot be read, or its content is damaged; one of the block is passed on.
    """
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except damage as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path}: damaged, or another kind of file ({reason})") from error


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write ``content`` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, default=str) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file that flexlib wrote. Raises InputError where it cannot be read."""
    with reading(path, ValueError):
        return json.loads(Path(path).read_text())
