"""Snakemake as the tests run it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


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


def start_snakemake(folder: Path, log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Start ``command`` in ``folder``, in a process group of its own."""
    with log.open("w") as file:
        return subprocess.Popen(
            command(*arguments), cwd=folder, env=ENVIRONMENT, stdout=file, stderr=file, start_new_session=True
        )
