"""Snakemake as the tests run it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def snakemake(folder: Path, *arguments: str, snakefile: Path = ROOT / "Snakefile") -> subprocess.CompletedProcess:
    """Run Snakemake of this environment on the project's Snakefile, or another, in ``folder``."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(snakefile), *arguments]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
