"""What a killed Snakemake leaves behind: its locks, and jobs that still run.

Snakemake locks a run's files with plain files in ``.snakemake/locks`` and cannot say whether the process that wrote
them still lives: after a SIGKILL its user has to find ``--unlock``. A lock of the operating system ends with its
process, so every Snakemake of this workflow holds one, and who holds it alone may remove the files. Jobs hold one too.
Where the file system knows no such locks, nothing is removed and nothing waited for.
"""

from __future__ import annotations

import fcntl
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

_held: dict[Path, IO[str]] = {}  # open until this process ends


def remove_dead_locks(run: str, paths: Sequence[str], snakemake_dir: str | Path = ".snakemake") -> bool:
    """Remove the locks on a run that no living Snakemake of this workflow can have made, and count as living.

    Where another one lives, nothing is removed.

    Parameters
    ----------
    run
        The run's name.
    paths
        What its rules write, as beginnings of paths; lock files that name nothing of it are another workflow's.
    snakemake_dir
        Where Snakemake keeps its books.

    Returns
    -------
    bool
        Whether another one lives and has locked files of the run.
    """
    snakemake_dir = Path(snakemake_dir)
    own = snakemake_dir / f"flexlib.{run}.lock"
    lives = False
    with suppress(OSError):
        try:
            fcntl.flock(_open(own), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lives = True
        locks = [path for path in (snakemake_dir / "locks").glob("*.lock") if _names_any(path, paths)]
        if lives:
            lives = bool(locks)
        else:
            for path in locks:
                path.unlink(missing_ok=True)
    with suppress(OSError):
        fcntl.flock(_open(own), fcntl.LOCK_SH)
    return lives


def _names_any(lock: Path, paths: Sequence[str]) -> bool:
    """Whether a lock file of Snakemake's lists a path that begins as one of ``paths``."""
    return any(line.startswith(tuple(paths)) for line in lock.read_text().splitlines())


def wait_for_orphan(job: str, snakemake_dir: str | Path = ".snakemake") -> None:
    """Wait until no other process runs a job, and count as running it until this one ends.

    The job of a killed Snakemake runs on. The same job, started again, must not write beside it.

    Parameters
    ----------
    job
        What no other job is called, such as its log file.
    snakemake_dir
        Where Snakemake keeps its books.
    """
    own = Path(snakemake_dir, f"flexlib.{job.replace('/', '_')}.lock")
    try:
        fcntl.flock(_open(own), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{job}: this job still runs, from a Snakemake that was killed; waiting for its end", file=sys.stderr)
        with suppress(OSError):
            fcntl.flock(_open(own), fcntl.LOCK_EX)
    except OSError:
        return


def _open(path: Path) -> IO[str]:
    """The one open file at ``path``: a second one of the same process would wait for the first."""
    path = path.absolute()
    if path not in _held:
        path.parent.mkdir(parents=True, exist_ok=True)
        _held[path] = path.open("a")
    return _held[path]
