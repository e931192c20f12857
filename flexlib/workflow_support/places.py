"""Which of several processes this one is, where srun, torchrun or a hand has started them, perhaps on several machines.

Read from environment variables alone: scripts ask before they import anything large.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from flexlib.errors import InputError

_PORTS = range(20_000, 30_000)  # below those that Linux gives to connections


@dataclass(frozen=True)
class Place:
    """One of several processes that share a run, and where they meet."""

    rank: int
    size: int
    local_rank: int  # among those of its machine: which GPU is its own
    host: str  # the first process's machine
    port: int  # that the first listens at
    run: str = ""  # tells apart what is said at a store that outlives a run
    is_hosted: bool = False  # whether somebody listens there already: torchrun does


def place_of(environment: Mapping[str, str], processes: int) -> Place | None:
    """The place of this process; None where nobody has started others beside it.

    Parameters
    ----------
    environment
        With torchrun's RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and LOCAL_RANK, which come first, or with what srun
        tells a task of a step of several. There MASTER_ADDR and MASTER_PORT are the step's first node and a port that
        follows from the job's number, unless they are given.
    processes
        ``train.processes``. With 1, tasks of srun are taken for as many runs.

    Raises
    ------
    InputError
        Variables are missing or no numbers, or are of another number of processes.
    """
    if "WORLD_SIZE" in environment and (processes > 1 or environment["WORLD_SIZE"] != "1"):
        place = _place_by_torchrun(environment)
        starter = f"WORLD_SIZE is {place.size}"
    elif "SLURM_STEP_NUM_TASKS" in environment and processes > 1 and environment["SLURM_STEP_NUM_TASKS"] != "1":
        place = _place_by_srun(environment)
        starter = f"srun has started {place.size} tasks"
    else:
        return None
    if place.size != processes:
        raise InputError(f"train.processes: {processes}, but {starter}: they must be the same")
    if not 0 <= place.rank < place.size:
        raise InputError(f"RANK is {place.rank}, but must be from 0 to {place.size - 1} where {starter}")
    if not 0 < place.port < 2**16:
        raise InputError(f"MASTER_PORT is {place.port}, but must be from 1 to {2**16 - 1}")
    return place


def _place_by_torchrun(environment: Mapping[str, str]) -> Place:
    return Place(
        rank=_number(environment, "RANK"),
        size=_number(environment, "WORLD_SIZE"),
        local_rank=_number(environment, "LOCAL_RANK", 0),
        host=_text(environment, "MASTER_ADDR"),
        port=_number(environment, "MASTER_PORT"),
        run=environment.get("TORCHELASTIC_RESTART_COUNT", ""),
        is_hosted=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _place_by_srun(environment: Mapping[str, str]) -> Place:
    job, step = _number(environment, "SLURM_JOB_ID"), _number(environment, "SLURM_STEP_ID")
    nodes = "SLURM_STEP_NODELIST" if "SLURM_STEP_NODELIST" in environment else "SLURM_JOB_NODELIST"
    return Place(
        rank=_number(environment, "SLURM_PROCID"),
        size=_number(environment, "SLURM_STEP_NUM_TASKS"),
        local_rank=_number(environment, "SLURM_LOCALID", 0),
        host=environment.get("MASTER_ADDR") or first_host(_text(environment, nodes)),
        port=_number(environment, "MASTER_PORT", _PORTS[(13 * job + step) % len(_PORTS)]),
    )


def first_host(nodes: str) -> str:
    """The first of SLURM's list of nodes: "gpu03" of "gpu[03-05,9],cpu1"."""
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", re.split(r",(?![^\[]*\])", nodes)[0])


def _text(environment: Mapping[str, str], name: str) -> str:
    value = environment.get(name, "")
    if not value:
        raise InputError(f"{name} is not set: processes that are started together need it to find each other")
    return value


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = str(default) if default is not None and not environment.get(name) else _text(environment, name)
    if not value.isascii() or not value.isdecimal():
        raise InputError(f"{name} is {value!r}, but must be a whole number")
    return int(value)
