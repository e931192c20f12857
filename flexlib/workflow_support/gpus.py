"""Whether the GPUs that a config wants can be had, as far as that shows without torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_DEVICES = (Path("/dev/nvidiactl"), Path("/dev/dxg"), Path("/dev/kfd"))  # of NVIDIA's driver, WSL and ROCm


def gpu_complaint(device: str, local: bool, asked_for: Mapping[str, Any], processes: int = 1) -> str | None:
    """Why the GPUs that the config wants cannot be had here, in one line; None where they can, or none are wanted.

    Parameters
    ----------
    device
        ``device`` of the config.
    local
        Whether jobs run on this machine.
    asked_for
        GPUs that each rule which uses one asks the scheduler for.
    processes
        ``train.processes``; where there is a GPU each needs its own.
    """
    if device == "cpu":
        return None
    gpus = count_gpus() if local else min((int(n) for n in asked_for.values() if str(n).isdecimal()), default=0)
    if processes > gpus > 0:
        more = "lower it, or set device: cpu" if local else f"raise gpu of {_listed(asked_for)} in the profile"
        found = "this machine shows" if local else "jobs are given"
        return f"config: train.processes: {processes}, one a GPU, but {found} {gpus}: {more}"
    if device == "auto":
        return None
    if local and not gpus:
        return (
            "config: device: cuda, but this machine shows no GPU: set device: auto, "
            "or run on a cluster with --profile slurm"
        )
    without = [rule for rule, gpus in asked_for.items() if str(gpus) == "0"]
    if not local and without:
        return (
            f"config: device: cuda, but no GPU is asked for {_listed(without)}: give them gpu: 1 in the profile's "
            "set-resources, or set device: auto"
        )
    return None


def _listed(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def gpus_of(resources: Mapping[str, Any]) -> int | str | None:
    """How many GPUs a rule's resources ask a scheduler for; None where they do not speak of GPUs.

    Parameters
    ----------
    resources
        As Snakemake's SLURM plugin understands them: gpu, gpu_model, or gres (such as gpu:a100:2, on each node).
    """
    if gres := re.search(r"\bgpu(?::[A-Za-z]\w*)?(?::(\d+))?(?![\w:])", str(resources.get("gres", ""))):
        return int(gres[1] or 1) * int(resources.get("nodes") or 1)
    gpus = str(resources["gpu"]) if "gpu" in resources else None
    return int(gpus) if gpus is not None and gpus.isdecimal() else gpus


def tasks_of(resources: Mapping[str, Any]) -> int:
    """How many tasks of srun a rule is to start, of one process each; 1 where its processes are all on one machine."""
    return int(resources.get("tasks") or 1) if resources.get("mpi") else 1


def tasks_complaint(rule: str, resources: Mapping[str, Any], processes: int) -> str | None:
    """Why a rule cannot run on the nodes that its resources ask for, in one line; None where it can.

    Parameters
    ----------
    rule
        Its name.
    resources
        As Snakemake's SLURM plugin understands them: nodes, tasks, mpi.
    processes
        ``train.processes``.
    """
    tasks, nodes = tasks_of(resources), int(resources.get("nodes") or 1)
    if nodes > 1 and not resources.get("mpi"):
        return f"profile: {rule}: nodes: {nodes} needs mpi: srun and tasks: {processes} beside it"
    if resources.get("mpi") and tasks != processes:
        return (
            f"config: train.processes: {processes}, but the profile has tasks: {tasks} for {rule}: make them the same"
        )
    if nodes > processes:
        return f"config: train.processes: {processes}, but the profile has nodes: {nodes} for {rule}: lower these"
    return None


def uses_gpu(device: str, local: bool, asked_for: Mapping[str, Any]) -> bool:
    """Whether jobs may come to use a GPU; arguments as for ``gpu_complaint``."""
    if device == "auto":
        return any(str(gpus) != "0" for gpus in asked_for.values()) or (local and count_gpus() > 0)
    return device == "cuda"


def count_gpus() -> int:
    """How many GPUs there are and are not hidden, without importing torch (seconds)."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1") or not any(map(Path.exists, _DEVICES)):
        return 0
    if visible:
        return len(visible.split(","))
    # WSL and ROCm do not show how many: torch counts them in the job
    return len([path for path in Path("/dev").glob("nvidia*") if path.name[6:].isdecimal()]) or 64
