"""How long Snakemake takes to plan the demo and a sweep of 500 points, and how much of it is the workflow's own.

    python benchmarks/dry_run.py [--snakemake /path/to/an/environment/bin/snakemake] [--repeats 5]

Prints the least wall time of a dry run, and that of a workflow of as many jobs that has nothing of ours: rules that
touch one file each. Give it the Snakemake of an environment that has nothing else, as clusters have it.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
SWEEP = {
    "name": "sweep",
    "particles": "sim/particles.star",
    "consensus": "sim/consensus.mrc",
    "simulate": {"box": 32},
    "prepare": {"train_box": 32},
    "mesh": {"cells": [10, 12, 14, 16, 18]},
    "train": {"latent_dims": [1, 2, 3, 4], "rigidity": [0.5, 1.0, 2.0, 4.0, 8.0], "seed": [0, 1, 2, 3, 4]},
}
PLAIN = """
rule all:
    input: expand("b/{n}", n=range(500))
rule a:
    output: "a/{n}"
    shell: "touch {output}"
rule b:
    input: "a/{n}"
    output: "b/{n}"
    shell: "touch {output}"
"""


def least_wall_s(snakemake: str, folder: Path, snakefile: Path, *arguments: str, repeats: int) -> float:
    """Least wall time of a dry run, in s."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        command = [snakemake, "--dry-run", "--snakefile", str(snakefile), *arguments]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--snakemake", default=shutil.which("snakemake") or "snakemake")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "sweep.yaml").write_text(yaml.safe_dump(SWEEP))
        (folder / "plain.smk").write_text(PLAIN)
        demo = ("--configfile", str(ROOT / "config/config.yaml"))
        for what, snakefile, arguments in [
            ("demo", ROOT / "Snakefile", demo),
            ("500 points", ROOT / "Snakefile", ("--configfile", "sweep.yaml")),
            ("as many jobs of a workflow without anything", folder / "plain.smk", ()),
        ]:
            wall_s = least_wall_s(options.snakemake, folder, snakefile, *arguments, repeats=options.repeats)
            print(f"{what}: {wall_s:.1f} s")


if __name__ == "__main__":
    main()
