"""Processes that srun or torchrun has started on several machines: they find each other, or say in one line why not."""

import itertools
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from machines import Machines, free_port

from flexlib import rendezvous
from flexlib.distributed import Ranks, check_processes
from flexlib.errors import InputError
from flexlib.rendezvous import Meeting, interface_to
from flexlib.workflow_support.places import Place, first_host, place_of
from flexlib.workflow_support.srun import run_tasks, tasks_to_start

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node7", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_JOB_ID": "1000",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[03-04],big1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}


def test_place_is_what_torchrun_or_srun_says():
    assert place_of(TORCHRUN, 4) == Place(1, 4, 1, "node7", 29500)
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2"}
    assert place_of(TORCHRUN | agent, 4) == Place(1, 4, 1, "node7", 29500, "2", is_hosted=True)
    assert place_of(SRUN, 4) == Place(3, 4, 1, "gpu03", 20_000 + 13_002 % 10_000)
    assert place_of(SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"}, 4) == Place(3, 4, 1, "10.0.0.1", 4000)
    assert place_of(SRUN | TORCHRUN, 4).host == "node7"  # torchrun under srun


@pytest.mark.parametrize(
    ("environment", "processes"),
    [
        ({}, 4),
        ({"WORLD_SIZE": "1"}, 1),
        (SRUN, 1),  # tasks of srun are as many runs
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, 4),  # as Snakemake's SLURM plugin starts a job
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"}, 4),  # in a batch script
    ],
)
def test_one_machine_starts_its_ranks_itself(environment, processes):
    assert place_of(environment, processes) is None


@pytest.mark.parametrize(
    ("environment", "processes", "message"),
    [
        (TORCHRUN, 2, "train.processes: 2, but WORLD_SIZE is 4: they must be the same"),
        (TORCHRUN, 1, "train.processes: 1, but WORLD_SIZE is 4"),
        (SRUN, 3, "train.processes: 3, but srun has started 4 tasks"),
        ({**TORCHRUN, "RANK": "4"}, 4, "RANK is 4, but must be from 0 to 3 where WORLD_SIZE is 4"),
        ({**TORCHRUN, "RANK": "first"}, 4, "RANK is 'first', but must be a whole number"),
        ({**TORCHRUN, "RANK": ""}, 4, "RANK is not set"),
        ({**TORCHRUN, "MASTER_ADDR": ""}, 4, "MASTER_ADDR is not set: processes that are started together need it"),
        ({**TORCHRUN, "MASTER_PORT": "70000"}, 4, "MASTER_PORT is 70000, but must be from 1 to 65535"),
        ({**SRUN, "SLURM_STEP_NODELIST": ""}, 4, "SLURM_STEP_NODELIST is not set"),
    ],
)
def test_wrong_settings_are_told_in_one_line(environment, processes, message):
    with pytest.raises(InputError, match=message):
        place_of(environment, processes)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("one", "one"),
        ("a1,b[2-3]", "a1"),
        ("n[07-09,12],m1", "n07"),
        ("r[1-2]n[05,7]", "r1n05"),
        ("x[3]-ib,y", "x3-ib"),
    ],
)
def test_first_of_slurms_list_of_nodes(nodes, first):
    assert first_host(nodes) == first


def test_each_process_of_a_machine_needs_its_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    place = Place(5, 8, 1, "node7", 29500)
    assert check_processes(8, "auto", place) == "cuda"
    with pytest.raises(InputError, match="process 3 of its machine and needs its GPU 3; torch sees 2"):
        check_processes(8, "auto", replace(place, local_rank=2))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # srun shows each task its own
    assert check_processes(8, "auto", replace(place, local_rank=2)) == "cuda"


@pytest.fixture
def port(monkeypatch):
    """A port at which nobody listens; whoever waits there for others does so for a second."""
    monkeypatch.setattr(rendezvous, "_numbers", itertools.repeat(0))  # all are processes of their own
    monkeypatch.setattr(rendezvous, "MEETING_S", 1.0)
    monkeypatch.setattr(rendezvous, "GRACE_S", 1.0)
    yield free_port()
    rendezvous._open_store.cache_clear()


def met(*places: Place, devices: tuple[str, ...] = ("cpu", "cpu", "cpu")) -> list[str]:
    """What comes of it where these meet: the network interface, or the message of each."""

    def meet(place: Place, device: str) -> str:
        try:
            meeting = Meeting(place, device)
        except InputError as error:
            return str(error)
        meeting.close()
        return meeting.interface

    with ThreadPoolExecutor() as threads:
        return list(threads.map(meet, places, devices))


def test_they_meet_and_find_the_network(port):
    assert met(*(Place(rank, 3, rank, "localhost", port) for rank in range(3))) == ["lo"] * 3
    assert interface_to("127.0.0.1") == "lo" and interface_to("no address") is None


@pytest.mark.parametrize("which", [0, 1])
def test_one_that_is_alone_says_so(port, which):
    (message,) = met(Place(which, 2, 0, "localhost", port))
    alone = f"1 of 2 processes have come to localhost:{port} within 1 s; not these: 2"
    late = f"MASTER_ADDR localhost, MASTER_PORT {port}: the first process was not there within 1 s ("
    assert message.startswith((alone, late)[which])


def test_a_host_that_nobody_knows_is_named(port):
    (message,) = met(Place(1, 2, 0, "nowhere.invalid", port))
    assert message == f"MASTER_ADDR nowhere.invalid, MASTER_PORT {port}: no machine of this name is known here"


def test_a_port_that_is_taken_is_named(port):
    met(Place(0, 2, 0, "localhost", port))
    (message,) = met(Place(0, 2, 1, "localhost", port))
    assert message == f"port {port} is taken: give another as MASTER_PORT"


def test_processes_that_do_not_agree_all_say_why(port):
    told = met(Place(0, 2, 0, "localhost", port), Place(2, 3, 1, "localhost", port))
    assert told[0] == told[1] and "WORLD_SIZE is 3 for process 3 (" in told[0] and "2 for the first (" in told[0]


def test_processes_on_other_devices_all_say_so(port):
    told = met(*(Place(rank, 2, 0, "localhost", port) for rank in (0, 1)), devices=("cpu", "cuda"))
    assert told[0] == told[1] and "device is cuda for process 2 (" in told[0]


def test_two_of_one_rank_are_refused(port):
    told = met(*(Place(rank, 3, rank, "localhost", port) for rank in (0, 1, 1)))
    assert told == ["two processes have RANK 1"] * 3


def fail(ranks: Ranks, device: str, how: str, which: int) -> None:
    """A rank fails, alone or with its launcher, while the other waits for it."""
    ranks.any(False)
    if ranks.rank == which:
        if how == "error":
            raise ValueError("what was wrong")
        if how == "input":
            raise InputError("particles.star: row 3: no defocus")
        os.kill(os.getpid() if how == "killed" else os.getppid(), signal.SIGKILL)
        time.sleep(60)
    ranks.any(False)


@pytest.fixture(scope="module")
def machines():
    with Machines.joined() as machines:
        yield machines


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "which", "message"),
    [
        ("error", 1, "ERROR RuntimeError: process 2 of 2 failed:"),
        ("input", 1, "ERROR InputError: particles.star: row 3: no defocus"),
        ("killed", 0, "ERROR RuntimeError: process 1 of 2 was ended by signal 9 (is memory short?)"),
    ],
)
def test_one_that_fails_ends_the_other_machines_and_the_first_says_why(machines, how, which, message):
    (first, said), (second, nothing) = machines.run(fail, how, which)
    assert first == second == 1
    assert message in said and said.count("ERROR") == 1
    assert ("ValueError: what was wrong" in said) == (how == "error")
    assert nothing == ""


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_a_machine_that_is_gone_ends_the_other(machines, which):
    told = machines.run(fail, "all killed", which)
    assert [status for status, _ in told] == ([-signal.SIGKILL, 1] if which == 0 else [1, -signal.SIGKILL])
    said = told[1 - which][1]
    assert said.count("ERROR") == 1
    assert ("process 2 of 2 (" if which else f"process 1 of 2, at {machines.address}:") in said and " is gone" in said


def test_tasks_of_srun_are_started_where_the_profile_says_so(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    resources = {"mpi": "srun", "nodes": 2, "tasks": 4}
    assert tasks_to_start(resources, 4) == 0  # no job
    for name, value in {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_NNODES": "1", "SLURM_CONF": "here"}.items():
        monkeypatch.setenv(name, value)
    assert tasks_to_start(resources, 4) == 4 and tasks_to_start({}, 4) == tasks_to_start(resources, 1) == 0
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\necho "$*" "$(env | grep SLURM_ | sort | tr "\\n" " ")" >"$0.said"\nexit 75\n')
    srun.chmod(0o755)
    monkeypatch.setattr("sys.argv", ["train.py", "x"])
    assert run_tasks(resources | {"mpi": f"{srun} --mpi=none"}, 4, 8) == 75
    said = (tmp_path / "srun.said").read_text()
    assert said.startswith("--mpi=none --overlap --kill-on-bad-exit=1 --ntasks=4 --nodes=2 --cpus-per-task=8 ")
    assert "train.py x SLURM_CONF=here SLURM_JOB_ID=1000 SLURM_LOCALID=1 SLURM_PROCID=3" in said
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert tasks_to_start(resources, 4) == 0  # it is one of them
