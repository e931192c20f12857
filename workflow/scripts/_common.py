"""What every script does besides calling its stage: its packages, threads, logging, the user's mistakes in one line."""

import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

_stopped_by: list[int] = []  # signals that came


def _stop(number: int, frame: FrameType | None) -> None:
    """End through all ``finally`` blocks, with the status that shells give to what a signal has ended."""
    _stopped_by.append(number)
    sys.exit(128 + number)


for _number in (signal.SIGINT, signal.SIGTERM):  # before any long import
    signal.signal(_number, _stop)


def _use_own_packages() -> None:
    """Import flexlib from beside this very script, and all else from this interpreter's own packages.

    Snakemake appends the search path of the interpreter that it runs in, which it needs itself. What that interpreter
    has besides (another numpy, another flexlib) must not fill the gaps of this one.
    """
    if "snakemake" in sys.modules:  # not where a script is run without it
        snakemake_home = Path(sys.modules["snakemake"].__file__).parents[1]
        if str(snakemake_home) in sys.path and not snakemake_home.is_relative_to(sys.prefix):
            del sys.path[sys.path.index(str(snakemake_home)) :]
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


_use_own_packages()

from flexlib.errors import InputError
from flexlib.workflow_support.estimates import check_free_space
from flexlib.workflow_support.locks import wait_for_orphan
from flexlib.workflow_support.places import place_of
from flexlib.workflow_support.srun import run_tasks, tasks_to_start


def run_stage(stage: Callable[[Any], None], snakemake: Any, processes: int = 1) -> None:
    """Call ``stage(snakemake)``; ends the process with one line where the user or the machine is at fault.

    The status is 1 after an ``InputError`` and where a file cannot be written or read, 128 and the signal's number
    after SIGINT and SIGTERM. What else goes wrong is a mistake of ours, whose traceback is wanted.

    Threads are set before ``stage`` imports anything, because numba reads its number once. Where several ``processes``
    are to be tasks of srun, these call ``stage`` and this one waits for them.
    """
    _set_threads(snakemake.threads)
    try:
        place = place_of(os.environ, processes)
        tasks = tasks_to_start(snakemake.resources, processes)
        if place is None:
            wait_for_orphan(snakemake.log[0])  # which the tasks' own starter is to them
        _log_to(snakemake.log[0], "w" if place is None else "a", place is None or place.rank == 0)
        check_free_space(
            folder(snakemake.output[0]), snakemake.resources.get("disk_mb", 0), f"what {snakemake.rule} writes"
        )
        if tasks:
            _run_tasks(snakemake, tasks)
        else:
            stage(snakemake)
    except SystemExit as end:
        if end.code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            _say_stopped(snakemake.rule, int(end.code) - 128)
        raise
    except Exception as error:
        if _stopped_by:  # some libraries turn what a signal's handler raises into an error of their own
            _say_stopped(snakemake.rule, _stopped_by[0])
            sys.exit(128 + _stopped_by[0])
        _say_failed(snakemake.rule, error)
        sys.exit(1)


def _say_stopped(rule: str, number: int) -> None:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    logging.getLogger(rule).error("stopped by %s; the same command goes on", signal.Signals(number).name)


def _say_failed(rule: str, error: Exception) -> None:
    logger = logging.getLogger(rule)
    if isinstance(error, InputError):
        logger.error("%s", error)
    elif isinstance(error, OSError):
        named = f"{error.filename}: " if error.filename else ""
        logger.error("%s%s; the same command goes on once that is mended", named, error.strerror or error)
    elif isinstance(error, ModuleNotFoundError):
        complaint = "%s has no package %s: run Snakemake with --sdm conda, or install flexlib there (pip install -e .)"
        logger.error(complaint, sys.executable, error.name)
    else:
        logger.error("failed", exc_info=error)


def _run_tasks(snakemake: Any, tasks: int) -> None:
    """Run this script in several tasks of srun, and end as they do."""
    logger = logging.getLogger(snakemake.rule)
    logger.info("%d tasks of srun", tasks)
    status = run_tasks(snakemake.resources, tasks, snakemake.threads)
    if status > 1 and status != 75:  # else the first of them has said why
        logger.error("%s has ended its tasks with status %d", snakemake.resources["mpi"], status)
    if status:
        sys.exit(status)


def chosen_device(snakemake: Any) -> str:
    """``device:`` of the config, which is no parameter of a rule: another device must not repeat what is done."""
    from flexlib.runtime import resolve_device

    return resolve_device(snakemake.config["device"]).type


def use_torch_threads(snakemake: Any) -> None:
    """Give torch the rule's threads; apart from ``run_stage``, so that scripts without torch do not import it."""
    import torch

    torch.set_num_threads(snakemake.threads)


def folder(path: Any) -> Path:
    """The folder that holds an input or output."""
    return Path(str(path)).parent


def optional(value: Any) -> Path | None:
    """A declared but perhaps empty input, or a parameter that may be None, as a path."""
    text = str(value) if value else ""
    return Path(text) if text else None


def _set_threads(threads: int) -> None:
    for variable in ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = str(threads)


def _log_to(path: str, mode: str, leads: bool) -> None:
    """Log to a file and to standard error; a process that does not lead logs its errors only, and not to the file."""
    formatter = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(level=logging.INFO if leads else logging.ERROR, handlers=[handler], force=True)
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # where the disk is full, what cannot be logged is no error of its own
    if leads:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        to_file = logging.FileHandler(path, mode)
        to_file.setFormatter(formatter)
        logging.getLogger().addHandler(to_file)
