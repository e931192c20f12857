"""Time a whole reconstruction, rigid and flexible, from images on disk to half-maps and FSC: nothing is scaled.

    python benchmarks/bench_half_maps.py --out /scratch/clamp [--num-particles 5000] [--distinct 2000] [--threads 1]
    python benchmarks/bench_half_maps.py --out /scratch/clamp --maps other --against reconstruct

Simulates a clamp whose jaw opens, prepares it, repeats it to the number of particles that is asked for, and writes a
model that knows the motion: a flow of two fields that turn the mesh about the hinge, with the true angles as latents.
So no training is waited for, and the flexible map is as good as it can be. Resolutions mean something where
``--distinct`` is as large as ``--num-particles``, and the number of iterations does where there are enough views to
fill Fourier space to the last shell: with 150 a half at box 256, there are not. What is already there is not done
again. ``--maps`` names the folder of the maps; ``--against`` compares them, shell by shell, with those of another run,
as of another version of flexlib. Figures: docs/reconstruct.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from machine import describe_machine
from particle_sets import repeat_set
from scipy.spatial import cKDTree

from flexlib.files import read_json
from flexlib.imaging.fsc import fsc
from flexlib.imaging.maps import read_map
from flexlib.mesh.lattice import bcc_mesh
from flexlib.model.flex_model import FlexModel
from flexlib.model.flow import FlowGenerator
from flexlib.prepare.run import prepare_particles
from flexlib.reconstruct.run import reconstruct
from flexlib.simulate.phantoms import make_phantom
from flexlib.simulate.run import simulate_particles
from flexlib.simulate.settings import Simulation
from flexlib.workflow_support.settings import MaskSettings, PrepareSettings, ReconstructSettings

PHANTOM = "clamp"
EXTENT_A = 320.0  # of the box
ATOMS = 8  # near a vertex, whose motion it takes


def write_model(folder: Path, count: int, cells: int) -> None:
    """A model of the true motion, for the prepared particles, into ``folder``/train."""
    molecule = make_phantom(PHANTOM)
    angles_rad = np.load(folder / "distinct" / "sim" / "truth.npz")["angles_rad"][:, 0]
    mask = read_map(folder / "particles" / "mask.mrc")
    mesh = bcc_mesh(mask.data > 0, mask.pixel_size_A, mask.box * mask.pixel_size_A / cells)
    steps = np.linspace(angles_rad.min(), angles_rad.max(), 9)
    moved_A = molecule.positions_A(steps[:, None]) - molecule.positions_A(np.zeros((1, 1)))
    turns = np.stack([np.cos(steps) - 1, np.sin(steps)], 1).astype(np.float32)
    _, near = cKDTree(molecule.positions_A(np.zeros((1, 1)))[0]).query(mesh.vertices_A, k=ATOMS)
    fields_A = np.linalg.lstsq(turns, moved_A.reshape(len(steps), -1), rcond=None)[0].reshape(2, -1, 3)
    basis_A = torch.from_numpy(fields_A[:, near].mean(2).astype(np.float32))
    flow = FlowGenerator(basis_A, 2, 1, 4)
    with torch.no_grad():
        flow.linear.copy_(torch.eye(2))
    latents = np.stack([np.cos(angles_rad) - 1, np.sin(angles_rad)], 1).astype(np.float32)
    latents = latents[np.arange(count) % len(latents)]
    canonical = read_map(folder / "particles" / "consensus.mrc")
    FlexModel(mesh, flow, latents, canonical.data, mask.box, mask.pixel_size_A).save(folder / "train" / "model.pt")


def make_inputs(folder: Path, distinct: int, count: int, simulation: Simulation, train_box: int, cells: int) -> None:
    """Particles, prepared and repeated, and a model; each unless it is there."""
    data, prepared = folder / "distinct" / "sim", folder / "distinct" / "particles"
    if not (data / "truth.npz").exists():
        simulate_particles(data, replace(simulation, num_particles=distinct))
    if not (prepared / "prepared.json").exists():
        prepare_particles(
            data / "particles.star",
            data / "consensus.mrc",
            prepared,
            settings=PrepareSettings(train_box=train_box),
            mask_settings=MaskSettings(),
        )
    if not (folder / "particles" / "prepared.json").exists():
        repeat_set(folder / "distinct", folder, count)
    if not (folder / "train" / "model.pt").exists():
        write_model(folder, count, cells)


def compare(maps: Path, others: Path, mask: np.ndarray) -> None:
    """Print the FSC of the maps with others, beside the half-map FSC, and their relative difference."""
    table = pd.read_csv(maps / "fsc.csv")
    for kind in ("flex", "rigid"):
        pairs = [[read_map(folder / f"{kind}_half{half}.mrc").data for folder in (maps, others)] for half in (1, 2)]
        curve = np.min([fsc(*pair) for pair in pairs], axis=0)
        difference = max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs)
        half_maps = table[f"fsc_{kind}"].to_numpy()
        lost = np.flatnonzero(half_maps[1:] < 0.143)
        trusted = slice(1, 1 + (int(lost[0]) if lost.size else len(half_maps) - 1))
        print(
            f"{kind}: FSC with the other half-maps {curve[trusted].min():.6f} or more to shell {trusted.stop - 1}, "
            f"{curve[1:].min():.6f} or more to shell {len(curve) - 1}; they differ by {100 * difference:.3f} %"
        )
        for region in ("", "_moving"):
            if f"fsc_{kind}{region}" in table:
                both = [pd.read_csv(folder / "fsc.csv")[f"fsc_{kind}{region}"].to_numpy() for folder in (maps, others)]
                change = (both[0] - both[1])[trusted]
                print(f"   half-map FSC{region}: from {change.min():+.5f} to {change.max():+.5f} of theirs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num-particles", type=int, default=5000)
    parser.add_argument("--distinct", type=int, default=2000, help="particles that are simulated")
    parser.add_argument("--box", type=int, default=256)
    parser.add_argument("--train-box", type=int, default=64)
    parser.add_argument("--cells", type=int, default=20, help="mesh cells across the box")
    parser.add_argument("--snr", type=float, default=0.02)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--maps", default="reconstruct", help="folder of the maps, in --out")
    parser.add_argument("--against", help="another such folder, to compare with")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    torch.set_num_threads(options.threads)
    distinct = min(options.distinct, options.num_particles)
    simulation = Simulation(phantom=PHANTOM, box=options.box, pixel_size_A=EXTENT_A / options.box, snr=options.snr)
    make_inputs(options.out, distinct, options.num_particles, simulation, options.train_box, options.cells)
    maps = options.out / options.maps
    if not (maps / "resolution.json").exists():
        began, began_cpu = time.perf_counter(), time.process_time()
        reconstruct(options.out / "particles", options.out / "train", maps, ReconstructSettings(), options.device)
        took = {"wall_s": time.perf_counter() - began, "cpu_s": time.process_time() - began_cpu}
        course = pd.read_csv(maps / "convergence.csv").groupby(["model", "half"]).iteration.max()
        iterations = {f"{model}_half{half}": int(count) for (model, half), count in course.items()}
        about = {"particles": options.num_particles, "box": options.box, "threads": options.threads}
        (maps / "timing.json").write_text(json.dumps(about | took | {"iterations": iterations} | describe_machine()))
    print(read_json(maps / "timing.json"))
    record = read_json(maps / "resolution.json")
    print({key: value for key, value in record.items() if "0.143" in key or key == "converged"})
    if options.against:
        compare(maps, options.out / options.against, read_map(options.out / "particles" / "full" / "mask.mrc").data)


if __name__ == "__main__":
    main()
