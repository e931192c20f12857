"""Where a finished run of the workflow spent its time: CPU seconds of each stage, from Snakemake's own benchmarks.

    python benchmarks/time_run.py results/NAME [--out benchmarks/results/MACHINE.json]

CPU seconds and not those of the wall clock: on a machine that others use too they are the ones to trust. With ``--out``
they become the part ``run`` of that file.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import pandas as pd
from machine import describe_machine

from flexlib.files import read_json, write_json
from flexlib.layout import RunFolder
from flexlib.records import PreparedRecord


def stage_seconds(run: RunFolder) -> dict[str, float]:
    """CPU seconds of each stage, most first; of a sweep, those of all points together."""
    seconds: dict[str, float] = defaultdict(float)
    for path in sorted(run.benchmarks.rglob("*.tsv")):
        stage = path.relative_to(run.benchmarks).parts[0].removesuffix(".tsv")
        seconds[stage] += float(pd.read_csv(path, sep="\t")["cpu_time"].sum())
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def main() -> None:
    """Print a table; write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    run = RunFolder(options.run)
    seconds, record = stage_seconds(run), PreparedRecord.read(run.particles.record)
    total = sum(seconds.values())
    for stage, spent in seconds.items():
        print(f"{stage:<14} {spent:8.1f} s {100 * spent / total:6.1f} %")
    if options.out:
        result = read_json(options.out)
        about = {"particles": record.num_particles, "box": record.train_box, "cpu_s": seconds}
        result["run"] = {"date": describe_machine()["date"], "provisional": False} | about
        write_json(options.out, result)


if __name__ == "__main__":
    main()
