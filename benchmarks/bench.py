"""All benchmarks: print their tables and keep the figures of this machine as JSON.

    python benchmarks/bench.py [--device cpu] [--quick] [--parts operator training] [--out FILE]

Parts, each of which replaces what the file has of it:

- ``operator``: the projection operator at boxes 64, 128 and 256, and what the machine can do (``bench_operator.py``);
- ``training``: epochs of 10,000 x 64^2 and 5,000 x 128^2, and the cost against voxels, latent dims, cells and
  particles (``bench_training.py``); with ``--device cuda`` 10,000 x 128^2 with 300,000 voxels instead, reported
  for 100,000 by proportion;
- ``reconstruction``: only with ``--device cuda``, and only if asked for by ``--parts`` on a CPU: box 384, 50,000
  particles, timed on some and scaled (``bench_reconstruct.py``);
- ``memory``: only if asked for: training on a stack four times the memory limit (``bench_larger_than_memory.py``).

Figures go to ``benchmarks/results/<processor>-<cores>.json`` (the host's name is kept nowhere), and ``make_page.py``
makes docs/performance.md of all such files. Times are worth keeping only of a machine with nothing else to do:
``--provisional`` marks others.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from bench_larger_than_memory import train_larger
from bench_operator import time_on_cpu, time_on_gpu
from bench_training import Case, run_cases
from machine import describe_machine, machine_name

from flexlib.files import read_json, write_json

RESULTS = Path(__file__).parent / "results"
RUN_EPOCHS = 16  # what a run with epochs: auto takes
PARTS = ("operator", "training", "reconstruction", "memory")


def bench_operator(device: str, quick: bool) -> dict:
    """See ``bench_operator.py``."""
    boxes = (32,) if quick else (64, 128, 256)
    if device == "cuda":
        return time_on_gpu(boxes)
    return time_on_cpu(boxes, sorted({1, len(os.sched_getaffinity(0))}), images=16 if quick else 32)


def training_cases(device: str, quick: bool) -> dict[str, list[Case]]:
    """Cases by the quantity that varies among them; the base case is part of each list."""
    if quick:
        return {"latent_dims": [Case(200, 32, cells=8, epochs=1, device=device)]}
    if device == "cuda":
        base = Case(10_000, 128, device=device)
        return {
            "epochs": [base],
            "latent_dims": [replace(base, latent_dims=dims, epochs=RUN_EPOCHS) for dims in (1, 2, 4, 8)],
        }
    base = Case()
    return {
        "epochs": [replace(base, particles=10_000), replace(base, particles=5_000, box=128)],
        "latent_dims": [replace(base, latent_dims=dims, epochs=RUN_EPOCHS) for dims in (1, 2, 4, 8)],
        "cells": [replace(base, cells=cells) for cells in (12, 20, 40)],
        "voxels": [replace(base, filling=filling) for filling in (0.07, 0.143, 0.286)],
        "particles": [base, replace(base, particles=10_000)],
    }


def bench_training(device: str, quick: bool) -> dict[str, list[dict]]:
    """See ``bench_training.py``; a case that is in several lists is run once."""
    lists = training_cases(device, quick)
    cases = list(dict.fromkeys(case for cases in lists.values() for case in cases))
    with tempfile.TemporaryDirectory() as scratch:
        rows = dict(zip(cases, run_cases(cases, Path(scratch), 100 if quick else 500), strict=True))
    return {name: [rows[case] for case in cases] for name, cases in lists.items()}


def bench_reconstruction(device: str, quick: bool) -> dict:
    """See ``bench_reconstruct.py``."""
    box, particles, part = (32, 200, 20) if quick else (384, 50_000, 2_000 if device == "cuda" else 50)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "rows.json"
        script = Path(__file__).with_name("bench_reconstruct.py")
        options = {"--box": box, "--particles": particles, "--part": part, "--device": device, "--out": out}
        threads = ["--threads", str(len(os.sched_getaffinity(0)))]
        words = [str(word) for pair in options.items() for word in pair]
        subprocess.run([sys.executable, str(script), "--kinds", "flex", *threads, *words], check=True)
        return {"rows": json.loads(out.read_text())}


def bench_memory(quick: bool) -> dict:
    """See ``bench_larger_than_memory.py``."""
    if quick:
        return train_larger(100_000_000, 0.1, 32, 0.01, 8, 100, warm_up=True)
    return train_larger(1_500_000_000, distinct=100, filling=0.005)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="tiny cases: that everything runs, no figures to keep")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: operator training, on a GPU reconstruction")
    parser.add_argument("--provisional", action="store_true", help="mark the figures: the machine had other work")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<machine>.json")
    options = parser.parse_args()
    machine = describe_machine()
    if options.device == "cuda" and machine["gpu"] is None:
        parser.error("--device cuda: torch sees no CUDA device")
    if options.device == "cpu":
        machine["gpu"] = None  # its figures have a file of their own
    default = RESULTS / ("local" if options.quick else "") / f"{machine_name(machine)}.json"
    out = options.out or default
    result = read_json(out) if out.exists() else {}
    result |= {"machine": machine, "device": options.device}
    for part in options.parts or PARTS[: 3 if options.device == "cuda" else 2]:
        print(f"--- {part}", flush=True)
        if part == "memory":
            figures = bench_memory(options.quick)
        else:
            bench = {"operator": bench_operator, "training": bench_training, "reconstruction": bench_reconstruction}
            figures = bench[part](options.device, options.quick)
        # each part has its own date, since parts may be measured on different days
        result[part] = {"date": machine["date"], "provisional": options.provisional or options.quick} | figures
        write_json(out, result)
    print(f"written to {out}")


if __name__ == "__main__":
    main()
