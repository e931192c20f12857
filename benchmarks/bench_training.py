"""What training costs: seconds an epoch and a run, and memory, against particles, box, voxels, cells and latent dims.

    python benchmarks/bench_training.py [--particles 2000] [--box 64] [--filling 0.143] [--cells 12 20 40]
                                        [--dims 1 2 4 8] [--epochs 3] [--device cpu] [--out FILE]

Simulated antibodies, repeated to the number asked for, in a mask that is a ball of the given share of the box. Every
run is a whole ``flexlib.train.train`` in a process of its own: spectral start, epochs, search of other local minima,
final inference. ``epoch_s`` is the median epoch; the first two, and every fourth, also measure the latents'
information. Memory is the largest resident set (Linux's ``VmHWM``).
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Case:
    """One training run."""

    particles: int = 2000
    box: int = 64
    filling: float = 0.143  # of the box by the mask
    cells: int = 20
    latent_dims: int = 2
    epochs: int = 3
    device: str = "cpu"


def run_cases(cases: list[Case], folder: Path, distinct: int = 500) -> list[dict]:
    """A row for each case, printed as it comes; ``folder`` is for the particle sets."""
    from particle_sets import make_mesh, make_set, repeat_set

    rows = []
    for case in cases:
        simulated = folder / f"box{case.box}_filling{case.filling}"
        if not simulated.exists():
            make_set(simulated, case.box, filling=case.filling, distinct=distinct)
        mesh = simulated / f"mesh{case.cells}"
        if not mesh.exists():
            make_mesh(simulated / "particles", mesh, case.cells)
        with tempfile.TemporaryDirectory(dir=folder) as name:
            repeat_set(simulated, Path(name) / "set", case.particles)
            command = [sys.executable, __file__, "--case", json.dumps(asdict(case)), str(mesh), name]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(asdict(case) | json.loads(done.stdout.splitlines()[-1]))
        print_row(rows[-1])
    return rows


def print_row(row: dict) -> None:
    """One line of the table."""
    print(
        f"{row['particles']:>7} x {row['box']}^2, {row['voxels']:>7} voxels, {row['cells']} cells, "
        f"K = {row['latent_dims']}: {row['epoch_s']:7.2f} s an epoch, {row['wall_s']:6.1f} s in all "
        f"({row['start_s']:.1f} s before the first epoch), peak {row['peak_GB']:.2f} GB",
        flush=True,
    )


def measure(case: Case, mesh_dir: Path, folder: Path) -> dict[str, float | list[float]]:
    """One training run in this process."""
    import time

    import torch

    from flexlib.imaging.maps import read_map
    from flexlib.train import train
    from flexlib.workflow_support.settings import TrainSettings

    particles, out = folder / "set" / "particles", folder / "train"
    settings = TrainSettings(latent_dims=case.latent_dims, epochs=case.epochs)
    wall_began = time.time()
    train(particles, mesh_dir, out, settings, case.device)
    wall_s = time.time() - wall_began
    seconds = np.atleast_1d(np.genfromtxt(out / "log.csv", delimiter=",", names=True)["seconds"])
    scores = json.loads((out / "validation.json").read_text())
    log_times = out / "checkpoints"
    result = {
        "voxels": int((read_map(particles / "mask.mrc").data > 0.01).sum()),
        "threads": torch.get_num_threads(),
        "epoch_s": round(float(np.median(seconds)), 3),
        "epochs_s": [round(float(s), 3) for s in seconds],
        "wall_s": round(wall_s, 2),
        "start_s": round((log_times / "model.pt").stat().st_mtime - wall_began - seconds.sum(), 2),
        "peak_GB": round(peak_bytes() / 1e9, 3),
        "validation_gain": round(scores["validation_gain"], 2),
    }
    if case.device == "cuda":
        result["peak_gpu_GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
    return result


def peak_bytes() -> int:
    """Largest resident set of this process so far."""
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def main() -> None:
    """Print a table; write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--particles", type=int, nargs="+", default=[2000])
    parser.add_argument("--box", type=int, nargs="+", default=[64])
    parser.add_argument("--filling", type=float, nargs="+", default=[0.143])
    parser.add_argument("--cells", type=int, nargs="+", default=[20])
    parser.add_argument("--dims", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)  # the child's part
    options = parser.parse_args()
    if options.case:
        case, mesh_dir, folder = options.case
        print(json.dumps(measure(Case(**json.loads(case)), Path(mesh_dir), Path(folder))))
        return
    lists = (options.particles, options.box, options.filling, options.cells, options.dims)
    cases = [Case(*values, options.epochs, options.device) for values in itertools.product(*lists)]
    with tempfile.TemporaryDirectory() as scratch:
        rows = run_cases(cases, Path(scratch))
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
