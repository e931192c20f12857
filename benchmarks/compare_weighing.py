"""What weighing images and parts does to a map, with the truth of both: junk, and particles that lack a part, at rest.

Simulates, prepares, and reconstructs with the true probabilities of images and of the part, with one of them, and with
neither; prints time, resolution, the contrast of the part over that of the rest, and the FSC with the true map.

    python benchmarks/compare_weighing.py --out /scratch/dirty            # two minutes on one core

Figures: docs/reconstruct.md.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from flexlib.files import read_json
from flexlib.imaging.fsc import fsc
from flexlib.imaging.maps import read_map
from flexlib.layout import ParticlesFolder, ReconstructFolder, SimulationFolder, TrainFolder
from flexlib.mesh.lattice import bcc_mesh
from flexlib.model.flex_model import FlexModel
from flexlib.model.flow import FlowGenerator, rigid_modes_A
from flexlib.prepare.run import prepare_particles
from flexlib.reconstruct.run import reconstruct
from flexlib.simulate.nuisances import PARTICLE
from flexlib.simulate.run import simulate_particles
from flexlib.simulate.settings import Simulation
from flexlib.workflow_support.settings import PrepareSettings, ReconstructSettings

SETTINGS = Simulation(
    phantom="rigid", num_particles=2000, box=64, snr=0.08, junk_fraction=0.3, missing_part_fraction=0.4
)
SHELLS = (8, 12, 16, 20, 24, 28)


def true_model(folder: Path) -> FlexModel:
    """A model at rest that knows which images show a particle, and which particles have the part."""
    truth, box, pixel_size_A = SimulationFolder(folder / "data"), SETTINGS.box, SETTINGS.pixel_size_A
    mask = read_map(ParticlesFolder(folder / "particles").full_mask).data
    mesh = bcc_mesh(mask > 0, pixel_size_A, 10 * pixel_size_A)
    flow = FlowGenerator(torch.from_numpy(rigid_modes_A(mesh.vertices_A).astype(np.float32)), 2, 1, 4)
    latents, canonical = np.zeros((SETTINGS.num_particles, 2), np.float32), np.zeros((box,) * 3, np.float32)
    with np.load(truth.truth) as known:
        shown, present = known["kind"] == PARTICLE, ~known["absent"][:, None]
    return FlexModel(
        mesh,
        flow,
        latents,
        canonical,
        box,
        pixel_size_A,
        probability=shown.astype(np.float32),
        parts=(read_map(truth.truth_part).data == 2).astype(np.uint8),
        occupancy=present.astype(np.float32),
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder to work in")
    folder = parser.parse_args().out
    data, particles = SimulationFolder(folder / "data"), ParticlesFolder(folder / "particles")
    simulate_particles(data.path, SETTINGS)
    prepare_particles(data.particles, data.consensus, particles.path, settings=PrepareSettings(train_box=SETTINGS.box))
    known = true_model(folder)
    truth = read_map(data.truth_mean).data * read_map(particles.full_mask).data
    variants = {
        "both": known,
        "images": replace(known, occupancy=None),
        "part": replace(known, probability=None),
        "neither": replace(known, probability=None, occupancy=None),
    }
    for name, model in variants.items():
        train, out = TrainFolder(folder / name / "train"), ReconstructFolder(folder / name / "reconstruct")
        model.save(train.model)
        start = time.process_time()
        reconstruct(particles.path, train.path, out.path, ReconstructSettings(rigid_baseline=False), "cpu")
        seconds, volume = time.process_time() - start, read_map(out.map("flex")).data
        rest, part = (
            (volume * truth)[where].sum() / (truth**2)[where].sum() for where in (known.parts == 0, known.parts == 1)
        )
        curve, found = fsc(volume, truth), read_json(out.resolution)
        print(
            f"{name}: {seconds:.0f} s of CPU, {found['flex_0.143_A']:.2f} A at FSC 0.143, {found['flex_0.5_A']:.2f} at "
            f"0.5; contrast {rest:.3f}, of the part {part:.3f} ({part / rest:.3f} of that); FSC with truth at shells "
            f"{SHELLS}: {' '.join(f'{curve[shell]:.3f}' for shell in SHELLS)}"
        )


if __name__ == "__main__":
    main()
