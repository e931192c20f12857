"""Snakemake with a disk that fills up, and room made afterwards; Snakemake stopped by its user."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from bench import IN_NAMESPACE, can_mount
from run_snakemake import ENVIRONMENT, command, snakemake, start, start_snakemake, wait_for
from small_run import CONFIG, TRAIN, Runner, content, files_of

MODEL = str(TRAIN / "model.pt")
ARGUMENTS = ("--configfile", "my.yaml", "--cores", "1", "--set-threads", "train=1", "--set-resources")


def arguments(*targets: str) -> list[str]:
    """One core, and no question whether there is room: it is there when the job starts."""
    rooms = [f"{rule}:disk_mb=0" for rule in ("simulate", "prepare", "mesh", "train")]
    return [*ARGUMENTS, *rooms, "--", *targets]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """Trained without a fault."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_config(folder)
    done = snakemake(folder, *arguments(MODEL))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def write_config(folder: Path) -> None:
    (folder / "my.yaml").write_text(yaml.safe_dump({**CONFIG, "device": "cpu"}))


def assert_as(undisturbed: Path, folder: Path) -> None:
    """What was trained is the same to the last bit, though in another folder."""
    wanted, found = files_of(undisturbed, "train"), files_of(folder, "train")
    assert wanted.keys() == found.keys()
    for name, path in found.items():
        assert content(path) == content(wanted[name]), name


def fill(path: Path) -> None:
    """Write to the file until there is no room."""
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(2**12))


@pytest.mark.parametrize("last", ["sim/particles.star", f"{TRAIN}/checkpoints/checkpoint.pt"])
def test_disk_full_then_room_then_the_same_command(undisturbed, tmp_path, last):
    """Others fill the disk when the file ``last`` has found room. Not on the disk: the console, temporary files."""
    folder = tmp_path / "disk"
    folder.mkdir()
    with Runner(tmp_path, IN_NAMESPACE if can_mount() else []) as holder:  # of the namespace
        inside = ["nsenter", "--mount", "--target", str(holder.process.pid)] if can_mount() else []
        if inside:
            subprocess.run([*inside, "mount", "-t", "tmpfs", "-o", "size=64m", "none", str(folder)], check=True)
        seen = Path(f"/proc/{holder.process.pid}/root{folder}") if inside else folder
        write_config(seen)
        run = [*inside, "sh", "-c", 'cd "$0" && exec "$@"', str(folder)]
        log = tmp_path / "console"
        full = start([*run, *command(*arguments(MODEL))], tmp_path, log, ENVIRONMENT)
        wait_for(last, (seen / last).exists, full, log)
        if inside:
            fill(seen / "others")
        else:  # no file of what is started from now on may become larger
            subprocess.run(["prlimit", "--fsize=16384", "--pid", str(full.pid)], check=True)
        assert full.wait() != 0, log.read_text()[-4000:]
        assert "Traceback" not in log.read_text(), log.read_text()[-4000:]
        assert re.search(r"ERROR \w+: .*(No space left on device|File too large|disk full)", log.read_text())
        (seen / "others").unlink(missing_ok=True)
        again = subprocess.run([*run, *command(*arguments(MODEL))], env=ENVIRONMENT, capture_output=True, text=True)
        assert again.returncode == 0, again.stderr[-4000:]
        assert_as(undisturbed, seen)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_its_user_then_the_same_command(undisturbed, tmp_path, number):
    """As the terminal does it: the signal goes to Snakemake and to its jobs."""
    write_config(tmp_path)
    log = tmp_path / "console"
    run = start_snakemake(tmp_path, log, *arguments(MODEL))
    wait_for("a checkpoint", lambda: list(tmp_path.glob(f"{TRAIN}/checkpoints/checkpoint.pt")), run, log)
    os.killpg(run.pid, number)
    assert run.wait() != 0
    assert "Traceback" not in log.read_text(), log.read_text()[-4000:]
    again = snakemake(tmp_path, *arguments(MODEL))
    assert again.returncode == 0, again.stderr[-4000:]
    assert_as(undisturbed, tmp_path)
