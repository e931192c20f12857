"""What training costs: seconds a run against the number of latent dims, on a simulated antibody.

    python benchmarks/bench_training.py [--particles 4000] [--dims 1 2 4 8] [--epochs 8] [--json FILE]

Every run is the same but for ``latent_dims``: spectral start, epochs, search of other valleys, final inference.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from flexlib.mesh.build import build_mesh
from flexlib.prepare import prepare_particles
from flexlib.settings import MeshSettings, PrepareSettings, TrainSettings
from flexlib.simulate import simulate_particles
from flexlib.training import train


def make_set(folder: Path, num_particles: int) -> None:
    """Simulate, prepare and mesh ``num_particles`` images of 64 px."""
    simulate_particles(folder / "sim", phantom="antibody", num_particles=num_particles, box=64, pixel_size_A=4.0)
    prepare_particles(
        folder / "sim/particles.star",
        folder / "sim/consensus.mrc",
        folder / "particles",
        settings=PrepareSettings(train_box=64),
    )
    build_mesh(folder / "particles", folder / "mesh", MeshSettings())


def time_training(folder: Path, dims: int, epochs: int) -> dict[str, float]:
    """One training run: its wall time, the median epoch, and the held-out gain that it reached."""
    out = folder / f"train{dims}"
    began = time.perf_counter()
    train(folder / "particles", folder / "mesh", out, TrainSettings(latent_dims=dims, epochs=epochs), "cpu")
    wall_s = time.perf_counter() - began
    seconds = np.genfromtxt(out / "log.csv", delimiter=",", names=True)["seconds"]
    scores = json.loads((out / "validation.json").read_text())
    return {
        "latent_dims": dims,
        "wall_s": round(wall_s, 1),
        "epoch_s": round(float(np.median(seconds)), 2),
        "validation_gain": round(scores["validation_gain"], 2),
    }


def main() -> None:
    """Print a table; write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--particles", type=int, default=4000)
    parser.add_argument("--dims", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        make_set(Path(scratch), options.particles)
        time_training(Path(scratch), 3, 1)  # compiles the kernels
        rows = [time_training(Path(scratch), dims, options.epochs) for dims in options.dims]
    for row in rows:
        ratio = row["wall_s"] / rows[0]["wall_s"]
        print(
            f"K = {row['latent_dims']}: {row['wall_s']:6.1f} s ({ratio:.2f} x), {row['epoch_s']:.2f} s an epoch, "
            f"held-out gain {row['validation_gain']:.2f} nats"
        )
    if options.json:
        machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
        result = {"machine": machine, "particles": options.particles, "runs": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
