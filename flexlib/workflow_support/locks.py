"""Locks of Snakemake whose process was killed.

Snakemake locks a run's files with plain files in ``.snakemake/locks`` and cannot say whether the process that wrote
them still lives: after a SIGKILL its user has to find ``--unlock``. A lock of the operating system ends with its
process, so every Snakemake of this workflow holds one, and who holds it alone may remove the files.
"""

from __future__ import annotations

import fcntl
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

_held: list[IO[str]] = []  # open until this process ends


def remove_dead_locks(run: str, paths: Sequence[str], snakemake_dir: str | Path = ".snakemake") -> None:
    """Remove the locks on a run that no living Snakemake of this workflow can have made, and count as living.

    Where another one lives, or the file system knows no locks, Snakemake's own are left to speak.

    Parameters
    ----------
    run
        The run's name.
    paths
        What its rules write, as beginnings of paths; lock files that name nothing of it are another workflow's.
    snakemake_dir
        Where Snakemake keeps its books.
    """
    snakemake_dir = Path(snakemake_dir)
    snakemake_dir.mkdir(exist_ok=True)
    file = (snakemake_dir / f"flexlib.{run}.lock").open("a")
    _held.append(file)
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for path in (snakemake_dir / "locks").glob("*.lock"):
            if any(line.startswith(tuple(paths)) for line in path.read_text().splitlines()):
                path.unlink(missing_ok=True)
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_SH)
