"""Snakemake as the tests run it."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def small_config(**more: Any) -> dict[str, Any]:
    """The config in .test, of which a run takes seconds a job, with its particles in sim/; ``more`` takes its place."""
    config = yaml.safe_load((ROOT / ".test/config/config.yaml").read_text())
    return {**config, "particles": "sim/particles.star", "consensus": "sim/consensus.mrc", **more}


def command(*arguments: str, snakefile: Path | None = ROOT / "Snakefile") -> list[str]:
    """Snakemake of this environment on the project's Snakefile, another, or (None) the one that Snakemake finds."""
    named = [] if snakefile is None else ["--snakefile", str(snakefile)]
    return [sys.executable, "-m", "snakemake", *named, *arguments]


def snakemake(
    folder: Path, *arguments: str, snakefile: Path | None = ROOT / "Snakefile"
) -> subprocess.CompletedProcess[str]:
    """Run ``command`` in ``folder`` to its end."""
    return subprocess.run(
        command(*arguments, snakefile=snakefile), cwd=folder, env=ENVIRONMENT, capture_output=True, text=True
    )


def start_snakemake(
    folder: Path, log: Path, *arguments: str, snakefile: Path | None = ROOT / "Snakefile"
) -> subprocess.Popen[bytes]:
    """Start ``command`` in ``folder``, in a process group of its own."""
    return start(command(*arguments, snakefile=snakefile), folder, log, ENVIRONMENT)


def start(command: list[str], folder: Path, log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a command in ``folder``, in a process group of its own, all that it says into ``log``."""
    with log.open("w") as file:
        return subprocess.Popen(
            command, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def wait_for(
    what: str, condition: Callable[[], Any], run: subprocess.Popen[bytes], log: Path, patience_s: float = 300.0
) -> Any:
    """The first true value of ``condition()``; fails when the run ends or patience does."""
    deadline = time.monotonic() + patience_s
    while not (value := condition()):
        assert run.poll() is None, f"waiting for {what}, the run ended:\n{log.read_text()[-5000:]}"
        assert time.monotonic() < deadline, f"{what} did not happen:\n{log.read_text()[-5000:]}"
        time.sleep(0.01)
    return value
