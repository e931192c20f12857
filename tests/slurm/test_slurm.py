"""The workflow on a real SLURM (``cluster.sh``): jobs that are cancelled, killed for memory and cut off by their time
limit go on from their checkpoints, and everything ends as if nothing had happened. Run by ``make test-slurm``.

Each of three trainings meets a misfortune of its own after its first checkpoint; meanwhile the same run undisturbed
without SLURM. Trainings are stopped (SIGSTOP) the moment they have a checkpoint: what follows happens to each in the
middle of its work, however fast the machine is. Snakemake has an environment with nothing of ours, the jobs have one
made by the stand-in for conda (``tests/driver.py``).
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import starfile
from driver import IN_CONDA, clone, write_config

CONFIG = {
    "name": "tiny",
    "particles": "sim/particles.star",
    "consensus": "sim/consensus.mrc",
    "device": "cpu",  # the GPUs that the profile asks for are null devices, and an environment for them cannot be had
    "simulate": {"num_particles": 160, "box": 32, "pixel_size_A": 8.0, "snr": 1.0},
    "prepare": {"train_box": 32},
    "mesh": {"cells": 6},
    "train": {"rigidity": [0.5, 1.0, 2.0], "epochs": 5, "validation_fraction": 0.25},
    "generate": {"frames": 3},
    "reconstruct": {"max_bfgs_iterations": 4},
    "validate": "none",
}
POINTS = {
    "cancelled": "cells~6/dims~2/rigidity~0.5/seed~0",
    "out of memory": "cells~6/dims~2/rigidity~1.0/seed~0",
    "out of time": "cells~6/dims~2/rigidity~2.0/seed~0",
}
# no accounting database here: finished jobs are asked of squeue, which remembers them
THROUGH_SLURM = ["--configfile", "my.yaml", "--profile", "slurm", *IN_CONDA, "--slurm-status-command", "squeue"]
THROUGH_SLURM += ["--slurm-init-seconds-before-status-checks", "5"]
POLLING = {"PYTHONPATH": str(Path(__file__).parent / "polling")}
PATIENCE_S = 300


def start_snakemake(folder: Path, log: Path, *arguments: str) -> subprocess.Popen:
    """Snakemake of the tests' environment in a clone, in a process group of its own; without SLURM."""
    command = [sys.executable, "-m", "snakemake", "--configfile", "my.yaml", *arguments]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with log.open("w") as output:
        return subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "PATH": path},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def wait_for(what: str, condition, run: subprocess.Popen, log: Path):
    """The first true value of ``condition()``; fails when the run ends or patience does."""
    deadline = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert run.poll() is None, f"waiting for {what}, the run ended:\n{log.read_text()[-5000:]}"
        assert time.monotonic() < deadline, f"{what} did not happen:\n{log.read_text()[-5000:]}\n{output_of('squeue')}"
        time.sleep(0.05)
    return value


def jobs_of(log: Path) -> list[tuple[str, str]]:
    """(job, comment) of every job of a run, in the order of submission; the run's ID is its jobs' name."""
    name = re.search(r"SLURM run ID: (\S+)", log.read_text())[1]
    lines = output_of("squeue", "--noheader", "--states=all", f"--name={name}", "--format=%i %k").splitlines()
    return sorted((tuple(line.split()) for line in lines), key=lambda pair: int(pair[0]))


def trainings(log: Path, point: str) -> list[str]:
    """Jobs that train a point; their comment has the values of its wildcards."""
    values = "_".join(part.split("~")[1] for part in point.split("/"))
    return [job for job, comment in jobs_of(log) if comment == f"rule_train_wildcards_{values}"]


def training_process(job: str) -> int | None:
    """The process of a job that trains."""
    for pid in re.findall(r"^(\d+) ", output_of("scontrol", "listpids", job), re.M):
        arguments = Path(f"/proc/{pid}/cmdline")
        if arguments.exists() and arguments.read_bytes().rstrip(b"\0").endswith(b".train.py"):
            return int(pid)
    return None


def end_processes_in(folder: Path) -> None:
    """End what still runs in a folder: without cgroups, SLURM loses processes whose parent it has killed."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink() == folder:
                os.kill(int(process.name), signal.SIGKILL)
        except (OSError, ProcessLookupError):
            continue


@pytest.fixture(scope="module")
def runs(driver, tmp_path_factory):
    """Folders of the run through SLURM and the undisturbed one, both finished; misfortunes' jobs; SLURM run's log."""
    folder = tmp_path_factory.mktemp("slurm")
    disturbed, undisturbed = clone(folder / "disturbed"), clone(folder / "undisturbed")
    for name in (disturbed, undisturbed):
        write_config(name, **CONFIG)
    faulty = str(Path(__file__).parent / "faults")
    driver.run(disturbed, "--configfile", "my.yaml", *IN_CONDA, "--conda-create-envs-only")
    orders = folder / "eat"
    orders.mkdir()
    logs = {name: folder / f"{name}.log" for name in ("disturbed", "undisturbed")}
    fault = {"PYTHONPATH_IN_CONDA": faulty, "EAT_MEMORY": str(orders)}
    run = driver.start(disturbed, logs["disturbed"], *THROUGH_SLURM, **POLLING, **fault)
    other = None
    try:
        jobs, pids = {}, {}
        waiting = set(POINTS)

        def stop_at_first_checkpoint() -> bool:
            for fate in list(waiting):
                if (disturbed / "results/tiny/train" / POINTS[fate] / "checkpoints/checkpoint.pt").exists():
                    (jobs[fate],) = trainings(logs["disturbed"], POINTS[fate])
                    pids[fate] = training_process(jobs[fate])
                    os.kill(pids[fate], signal.SIGSTOP)
                    waiting.remove(fate)
            return not waiting

        wait_for("a checkpoint of each training", stop_at_first_checkpoint, run, logs["disturbed"])
        output_of("scontrol", "update", f"JobId={jobs['out of time']}", "TimeLimit=1")
        output_of("scancel", jobs["cancelled"])
        os.kill(pids["out of memory"], signal.SIGCONT)
        (orders / str(pids["out of memory"])).touch()
        for prepared in ("sim", "results/tiny/particles", "results/tiny/mesh"):
            shutil.copytree(disturbed / prepared, undisturbed / prepared, copy_function=shutil.copy2)
        arguments = ["--cores", "2", "--set-threads", "train=2", "--", "results/tiny/sweep.csv"]
        other = start_snakemake(undisturbed, logs["undisturbed"], *arguments)
        for process, name in ((run, "disturbed"), (other, "undisturbed")):
            assert process.wait(timeout=PATIENCE_S) == 0, logs[name].read_text()[-8000:]
    finally:
        for process in (run, other):
            if process is not None and process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)  # Snakemake cancels its jobs
                process.wait(timeout=60)
        end_processes_in(disturbed)
    return disturbed / "results/tiny", undisturbed / "results/tiny", jobs, logs["disturbed"]


def job_state(job: str) -> str:
    return re.search(r"JobState=(\w+)", output_of("scontrol", "show", "job", job))[1]


def test_slurm_ended_each_in_its_way(runs):
    results, _, jobs, log = runs
    assert job_state(jobs["cancelled"]) == "CANCELLED"
    # SLURM looks every 30 s: the warning (the profile's --signal) ends the job where it comes a look before the limit
    assert job_state(jobs["out of time"]) in ("TIMEOUT", "FAILED")
    assert "TimeLimit=00:01:00" in output_of("scontrol", "show", "job", jobs["out of time"])
    assert job_state(jobs["out of memory"]) == "FAILED"  # of the step; the batch script outlives it
    job_log = next((results.parents[1] / ".snakemake/slurm_logs").rglob(f"{jobs['out of memory']}.log")).read_text()
    assert re.search("exceeded memory limit|oom", job_log, re.I)
    for job in jobs.values():
        assert re.search(rf"SLURM-job '{job}' failed", log.read_text())


def asked_for(job: str) -> tuple[int, int, bool]:
    """Memory in MiB, time in minutes, and whether a GPU was asked for."""
    record = output_of("scontrol", "show", "job", job)
    memory, hours, minutes = re.search(r"mem=(\d+)M", record)[1], *re.search(r"TimeLimit=(\d+):(\d+)", record).groups()
    return int(memory), 60 * int(hours) + int(minutes), "gres:gpu:1" in record


def test_jobs_ask_for_a_gpu_and_more_memory_and_time_when_tried_again(runs):
    first, second = (asked_for(job) for job in trainings(runs[3], POINTS["cancelled"]))
    assert first[2]
    assert second[2]
    assert 1500 < first[0] < 2000
    assert second[0] == pytest.approx(1.5 * first[0], abs=1)
    assert second[1] == pytest.approx(1.5 * first[1], abs=1)


@pytest.mark.parametrize("fate", POINTS)
def test_next_attempt_resumed(runs, fate):
    results = runs[0]
    point = POINTS[fate]
    log = (results.parents[1] / f"logs/tiny/train/{point}.log").read_text()
    assert re.search(r"resumed after epoch \d+, batch \d+", log)
    with (results / "train" / point / "log.csv").open() as file:
        epochs = [int(row["epoch"]) for row in csv.DictReader(file)]
    assert epochs == list(range(1, len(epochs) + 1))


@pytest.mark.parametrize("fate", POINTS)
def test_number_of_submissions(runs, fate):
    assert len(trainings(runs[3], POINTS[fate])) == 2


def test_small_jobs_were_grouped(runs):
    comments = [comment for _, comment in jobs_of(runs[3])]
    assert len([comment for comment in comments if "generate" in comment]) == 1
    for point in POINTS.values():
        assert (runs[0] / "generate" / point / "series.csv").exists()


def assert_same_training(disturbed: Path, undisturbed: Path) -> None:
    tables = [
        starfile.read(folder / "latents.star", always_dict=True)["particles"] for folder in (disturbed, undisturbed)
    ]
    columns = ["flexLatent1", "flexLatent2"]
    np.testing.assert_allclose(tables[0][columns], tables[1][columns], atol=1e-3)
    maps = [mrcfile.read(folder / "canonical.mrc") for folder in (disturbed, undisturbed)]
    np.testing.assert_allclose(maps[0], maps[1], atol=1e-3 * np.abs(maps[1]).max())


@pytest.mark.parametrize("fate", POINTS)
def test_training_ends_as_undisturbed(runs, fate):
    assert_same_training(*(results / "train" / POINTS[fate] for results in runs[:2]))


def test_everything_ends_as_undisturbed(runs):
    tables = []
    for results in runs[:2]:
        with (results / "sweep.csv").open() as file:
            tables.append(list(csv.DictReader(file)))
    for row, expected in zip(*tables, strict=True):
        assert row["chosen"] == expected["chosen"]
        for key in ("validation_gain", "resolution_flex_A"):
            assert [float(r[key]) for r in (row, expected) if r[key]] == pytest.approx(
                [float(r[key]) for r in (expected, row) if r[key]], rel=1e-3
            )
    maps = [mrcfile.read(next(results.glob("reconstruct/**/flex_map.mrc"))) for results in runs[:2]]
    np.testing.assert_allclose(maps[0], maps[1], atol=1e-2 * np.abs(maps[1]).max())
    assert (runs[0] / "report.html").stat().st_size > 10_000


def one_point(runs, folder: Path, **train: object) -> Path:
    """A clone to train one point in, with what has been prepared."""
    write_config(clone(folder), **{**CONFIG, "train": {**CONFIG["train"], "rigidity": 0.5, **train}})
    for prepared in ("sim", "results/tiny/particles", "results/tiny/mesh"):
        shutil.copytree(runs[1].parents[1] / prepared, folder / prepared, copy_function=shutil.copy2)
    return folder


def end(run: subprocess.Popen) -> None:
    """Snakemake and, through it, its jobs."""
    if run.poll() is None:
        os.killpg(run.pid, signal.SIGINT)
        run.wait(timeout=60)


@pytest.fixture(scope="module")
def tasks(driver, runs, tmp_path_factory):
    """Folder and run of one point that two tasks of srun train and reconstruct, as the profile's comment has it."""
    folder = one_point(runs, tmp_path_factory.mktemp("tasks"), processes=2)
    asked = ("mpi=srun", "nodes=1", "tasks=2", "gres=gpu:2", "tasks_per_gpu=0")
    resources = [f"{rule}:{given}" for rule in ("train", "reconstruct") for given in asked]
    run = driver.start(folder, folder / "snakemake.log", *THROUGH_SLURM, "--set-resources", *resources, **POLLING)
    yield folder, run
    end(run)
    end_processes_in(folder)


@pytest.fixture(scope="module")
def restarted(driver, runs, tasks, tmp_path_factory):
    """Folder of a run of one point, beside ``tasks``, whose Snakemake was killed while it trained."""
    folder = one_point(runs, tmp_path_factory.mktemp("restarted"))
    point = POINTS["cancelled"]
    first, second = folder / "first.log", folder / "second.log"
    run = driver.start(folder, first, *THROUGH_SLURM, **POLLING)
    checkpoint = folder / "results/tiny/train" / point / "checkpoints/checkpoint.pt"
    wait_for("a checkpoint", checkpoint.exists, run, first)
    (job,) = trainings(first, point)
    pid = training_process(job)
    os.kill(pid, signal.SIGSTOP)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    again = driver.start(folder, second, *THROUGH_SLURM, **POLLING)
    try:

        def waits() -> bool:
            logs = (folder / ".snakemake/slurm_logs").rglob("*.log")
            return any("this job still runs" in log.read_text() for log in logs)

        wait_for("the second job to wait for the first", waits, again, second)
        os.kill(pid, signal.SIGCONT)
        assert again.wait(timeout=PATIENCE_S) == 0, second.read_text()[-8000:]
    finally:
        end(again)
        end_processes_in(folder)
    return folder / "results/tiny"


def test_after_a_kill_on_the_login_node_the_same_command_goes_on(runs, restarted):
    assert (restarted / "report.html").stat().st_size > 10_000
    assert_same_training(restarted / "train" / POINTS["cancelled"], runs[1] / "train" / POINTS["cancelled"])


@pytest.fixture(scope="module")
def shared(runs, tasks, tmp_path_factory):
    """Folders of the finished run of ``tasks`` and of its training by two processes that were started here."""
    folder = one_point(runs, tmp_path_factory.mktemp("processes"), processes=2)
    log = folder / "snakemake.log"
    model = f"results/tiny/train/{POINTS['cancelled']}/model.pt"
    arguments = ["--cores", "4", "--set-threads", "train=4", "--", model]  # two threads each, as the tasks have
    here = start_snakemake(folder, log, *arguments)
    try:
        assert here.wait(timeout=PATIENCE_S) == 0, log.read_text()[-8000:]
    finally:
        end(here)
    assert tasks[1].wait(timeout=PATIENCE_S) == 0, (tasks[0] / "snakemake.log").read_text()[-8000:]
    return tasks[0], folder


def test_tasks_of_srun_share_a_training_and_a_reconstruction(shared):
    tasks, processes = shared
    point = POINTS["cancelled"]
    for rule in ("train", "reconstruct"):
        log = (tasks / f"logs/tiny/{rule}/{point}.log").read_text()
        assert "2 tasks of srun" in log and log.count("2 processes of 2 threads each, on cpu, at ") == 1
    (job,) = trainings(tasks / "snakemake.log", point)
    record = output_of("scontrol", "show", "job", job)
    assert "NumTasks=2" in record and re.search("TresPerNode=gres[:/]gpu:2", record)
    assert_same_training(*(folder / "results/tiny/train" / point for folder in (tasks, processes)))
    assert (tasks / "results/tiny/report.html").stat().st_size > 10_000
