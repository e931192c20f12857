"""A job's script again, in several tasks of srun: how a rule runs on more than one machine.

Snakemake's SLURM plugin asks for ``nodes`` and ``tasks``, and leaves it to a job that has the resource ``mpi`` (the
command, ``srun``) to start its tasks itself. Each is the same script with the same arguments, and finds its place by
what srun tells it (``places``).
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from flexlib.workflow_support.places import place_of

# what a step leaves in the environment that srun would take for options of the next
_OPTIONS = tuple(
    f"SLURM_{name}"
    for name in ("STEP", "TASK", "NTASKS", "NPROCS", "NNODES", "CPU_BIND", "CPUS_PER", "GPU", "TRES_PER", "MEM_PER")
)


def tasks_to_start(resources: Mapping[str, Any], processes: int) -> int:
    """How many tasks of srun this process is to start instead of doing the work; 0 where it does the work itself.

    Parameters
    ----------
    resources
        Of the job.
    processes
        ``train.processes``.
    """
    wanted = processes > 1 and bool(resources.get("mpi")) and "SLURM_JOB_ID" in os.environ
    return processes if wanted and place_of(os.environ, processes) is None else 0


def run_tasks(resources: Mapping[str, Any], tasks: int, threads: int) -> int:
    """Run this script in several tasks and wait for them; SIGTERM is handed on.

    Parameters
    ----------
    resources
        Of the job: ``mpi``, and perhaps ``nodes``.
    tasks
        How many.
    threads
        Of each.

    Returns
    -------
    int
        Exit status: the largest of the tasks'.
    """
    # the step that Snakemake may have started this script in holds all that the job was given
    command = [*shlex.split(str(resources["mpi"])), "--overlap", "--kill-on-bad-exit=1", f"--ntasks={tasks}"]
    command += [f"--nodes={resources['nodes']}"] if resources.get("nodes") else []
    command += [f"--cpus-per-task={threads}", sys.executable, *sys.argv]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_OPTIONS)}
    process = subprocess.Popen(command, env=kept)
    previous = signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(number))
    try:
        return process.wait()
    finally:
        signal.signal(signal.SIGTERM, previous)
