"""Files written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write ``content`` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, default=str) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file that flexlib wrote."""
    return json.loads(Path(path).read_text())
