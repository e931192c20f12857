"""Bodies and hinges that interpret finds, against the truth of a simulated phantom with hinges.

    .venv/bin/python benchmarks/compare_bodies.py --out FOLDER [--phantom clamp] [--particles 3000]

Simulates, trains and interprets (some minutes), and prints the adjusted Rand index by mass of the pseudo-atoms that a
hinge moves wholly or not at all, and of each hinge the error of its axis and the ratio of found and true range.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from flexlib.imaging.maps import read_label_map
from flexlib.interpret import interpret
from flexlib.layout import InterpretFolder, TrainFolder
from flexlib.mesh import build_mesh
from flexlib.prepare import prepare_particles
from flexlib.simulate.phantoms import Phantom, make_phantom
from flexlib.simulate.run import simulate_particles
from flexlib.simulate.settings import Simulation
from flexlib.train import train
from flexlib.workflow_support.settings import (
    GenerateSettings,
    InterpretSettings,
    MaskSettings,
    MeshSettings,
    PrepareSettings,
    TrainSettings,
)

BOX, PIXEL_SIZE_A = 64, 5.0


def interpreted(out: Path, phantom: str, particles: int) -> InterpretFolder:
    """The interpretation of a training on a simulated set; what is there is not made again."""
    data, folder = out / "data", InterpretFolder(out / "interpret")
    dims = len(make_phantom(phantom).hinges)
    if not (out / "train" / TrainFolder(out / "train").model.name).exists():
        settings = Simulation(phantom=phantom, num_particles=particles, box=BOX, pixel_size_A=PIXEL_SIZE_A, snr=0.1)
        simulate_particles(data, settings)
        prepare_particles(
            data / "particles.star",
            data / "consensus.mrc",
            out / "particles",
            settings=PrepareSettings(),
            mask_settings=MaskSettings(),
        )
        build_mesh(out / "particles", out / "mesh", MeshSettings())
        train(out / "particles", out / "mesh", out / "train", TrainSettings(latent_dims=dims), "cpu")
    latents = TrainFolder(out / "train").latents
    interpret(out / "particles", out / "train", folder.path, InterpretSettings(), GenerateSettings(), latents)
    return folder


def rand_index(first: np.ndarray, second: np.ndarray, mass: np.ndarray) -> float:
    """Adjusted Rand index of two partitions, by the pairs of units of mass that they have together."""
    table = np.zeros((first.max() + 1, second.max() + 1))
    np.add.at(table, (first, second), mass / mass.sum())
    both, one, other = (table**2).sum(), (table.sum(1) ** 2).sum(), (table.sum(0) ** 2).sum()
    return float((both - one * other) / ((one + other) / 2 - one * other))


def compare(phantom: Phantom, folder: InterpretFolder, angles_rad: np.ndarray) -> None:
    """Print what was found beside what is true."""
    grid = read_label_map(folder.labels)
    weights = np.stack([hinge.weight for hinge in phantom.hinges], 1)
    voxel = np.rint(phantom.atoms_A / grid.voxel_A[0]).astype(int) + len(grid.labels) // 2
    found = grid.labels[voxel[:, 2], voxel[:, 1], voxel[:, 0]]
    sure = ((weights == 0) | (weights == 1)).all(1) & (found > 0)
    truth = np.unique(weights.round(), axis=0, return_inverse=True)[1].ravel()
    print(f"adjusted Rand index by mass: {rand_index(truth[sure], found[sure], phantom.mass[sure]):.3f}")
    hinges = pd.read_csv(folder.hinges)
    axes = hinges[["axis_x", "axis_y", "axis_z"]].to_numpy()
    points_A = hinges[["point_x_A", "point_y_A", "point_z_A"]].to_numpy()
    for number, (hinge, angles) in enumerate(zip(phantom.hinges, angles_rad.T, strict=True), 1):
        error_deg = np.degrees(np.arccos(np.abs(axes @ hinge.axis).clip(max=1)))
        away_A = np.linalg.norm(np.cross(points_A - hinge.pivot_A, hinge.axis), axis=1)
        at = int((error_deg + away_A).argmin())
        true_deg = np.degrees(np.ptp(np.percentile(angles, (2, 98))))
        ratio = hinges["range_deg"][at] / true_deg
        print(f"hinge {number}: axis {error_deg[at]:.2f} degrees and {away_A[at]:.1f} A off, range {ratio:.3f} of true")


def main() -> None:
    """Simulate, train, interpret, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--phantom", default="clamp")
    parser.add_argument("--particles", type=int, default=3000)
    given = parser.parse_args()
    folder = interpreted(given.out, given.phantom, given.particles)
    compare(make_phantom(given.phantom), folder, np.load(given.out / "data" / "truth.npz")["angles_rad"])


if __name__ == "__main__":
    main()
