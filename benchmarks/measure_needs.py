"""What each stage takes of memory and time, against box, rows and mesh: what ``estimates.py`` is held against.

    python benchmarks/measure_needs.py [--box 64 128] [--full-box 192] [--cells 10 20 40] [--rows 500] [--dims 2]
                                       [--filling 0.143] [--distinct 500] [--stages mesh train ...] [--scratch DIR]
                                       [--out FILE]

Every stage is one call of its function in a process of its own, on simulated antibodies in a mask that is a ball of the
given share of the box; sets of more rows repeat them. A training has one epoch, a reconstruction two iterations, a
series 5 frames: more take longer, and no more memory. Memory is the largest resident set (Linux's ``VmHWM``: getrusage
would count the parent's too). What ``--scratch`` holds of an earlier call is used again, and printed no more.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

STAGES = ("simulate", "prepare", "mesh", "train", "generate", "reconstruct", "report")
COLUMNS = ("stage", "full_box", "box", "cells", "vertices", "rows", "dims", "peak_MB", "seconds", "epoch_s")


@dataclass(frozen=True)
class Case:
    """One sweep point on one set of particles."""

    box: int = 64  # of the training
    full_box: int = 64
    cells: int = 20
    rows: int = 500
    latent_dims: int = 2
    filling: float = 0.143  # of the box by the mask
    distinct: int = 500  # particles that are simulated

    def folders(self, scratch: Path) -> tuple[Path, Path]:
        """The set of particles, and the run."""
        origin = scratch / f"full{self.full_box}_box{self.box}_filling{self.filling}"
        return origin, origin / f"rows{self.rows}"


def stages(case: Case, scratch: Path) -> dict[str, tuple[Path, Callable[[], None]]]:
    """Of each stage a file that it leaves, and its call."""
    from particle_sets import make_mesh, prepare_set, simulate_set

    from flexlib.generate import generate_series
    from flexlib.layout import RunFolder
    from flexlib.reconstruct import reconstruct
    from flexlib.report import write_report
    from flexlib.train import train
    from flexlib.workflow_support.points import SweepPoint
    from flexlib.workflow_support.settings import GenerateSettings, ReconstructSettings, TrainSettings

    origin, folder = case.folders(scratch)
    run, point = RunFolder(folder), SweepPoint(case.cells, case.latent_dims, 2.0, 0)
    settings = TrainSettings(latent_dims=case.latent_dims, epochs=1)
    particles, mesh, trained = run.particles.path, run.mesh(point.mesh_path), run.train(point.path)
    series, halves = run.generate(point.path), run.reconstruct(point.path)
    report = run.path / f"report{case.cells}_{case.latent_dims}.html"
    few = ReconstructSettings(max_bfgs_iterations=2)
    return {
        "simulate": (
            origin / "sim" / "truth.npz",
            lambda: simulate_set(origin, case.full_box, case.distinct),
        ),
        "prepare": (
            RunFolder(origin).particles.record,
            lambda: prepare_set(origin, case.full_box, case.filling, case.box),
        ),
        "mesh": (mesh.quality, lambda: make_mesh(particles, mesh.path, case.cells)),
        "train": (trained.validation, lambda: train(particles, mesh.path, trained.path, settings, "cpu")),
        "generate": (series.table, lambda: generate_series(trained.path, series.path, GenerateSettings(frames=5))),
        "reconstruct": (
            halves.resolution,
            lambda: reconstruct(particles, trained.path, halves.path, few, "cpu"),
        ),
        "report": (report, lambda: write_report(run.path, report, {})),
    }


def measure(stage: str, case: Case, scratch: Path) -> dict[str, Any] | None:
    """One stage in this process; None where it has been done."""
    from bench_training import peak_bytes

    from flexlib.layout import RunFolder

    left, call = stages(case, scratch)[stage]
    if left.exists():
        return None
    began = time.perf_counter()
    call()
    row = {"seconds": round(time.perf_counter() - began, 1), "peak_MB": round(peak_bytes() / 2**20)}
    run = RunFolder(case.folders(scratch)[1])
    if stage == "train":
        row["epoch_s"] = round(float((left.parent / "log.csv").read_text().split(",")[-1]), 1)
    quality = run.mesh(f"cells~{case.cells}").quality
    if stage in ("simulate", "prepare"):
        row["rows"] = case.distinct
    else:
        row["vertices"] = json.loads(quality.read_text())["num_vertices"]
    return {"stage": stage} | asdict(case) | row


def run_cases(cases: list[Case], chosen: list[str], scratch: Path) -> list[dict[str, Any]]:
    """A row for each stage of each case, printed as it comes."""
    from particle_sets import repeat_set

    print(" ".join(f"{name:>11}" for name in COLUMNS), flush=True)
    rows = []
    for case in cases:
        origin, folder = case.folders(scratch)
        for stage in chosen:
            if stage not in ("simulate", "prepare") and not folder.exists():
                repeat_set(origin, folder, case.rows)
            child = [sys.executable, __file__, "--child", stage, json.dumps(asdict(case)), str(scratch)]
            done = subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True)
            if row := json.loads(done.stdout.splitlines()[-1]):
                rows.append(row)
                print(" ".join(f"{row.get(name, ''):>11}" for name in COLUMNS), flush=True)
    return rows


def main() -> None:
    """Print a table; write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--box", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--full-box", type=int, help="of the images; the training's where not given")
    parser.add_argument("--cells", type=int, nargs="+", default=[10, 20, 40])
    parser.add_argument("--rows", type=int, nargs="+", default=[500])
    parser.add_argument("--dims", type=int, nargs="+", default=[2])
    parser.add_argument("--filling", type=float, default=0.143)
    parser.add_argument("--distinct", type=int, default=500)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        stage, case, scratch = options.child
        print(json.dumps(measure(stage, Case(**json.loads(case)), Path(scratch))))
        return
    cases = [
        Case(box, options.full_box or box, cells, rows, dims, options.filling, options.distinct)
        for box, rows, cells, dims in itertools.product(options.box, options.rows, options.cells, options.dims)
    ]
    with tempfile.TemporaryDirectory() as fallback:
        rows = run_cases(cases, options.stages, options.scratch or Path(fallback))
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
