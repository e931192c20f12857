"""Reconstruction against the truth: a simulated molecule with a moving domain, at full size, from particles to FSC.

Simulates a clamp whose jaw opens, prepares, trains, reconstructs, and prints for the flexible and the rigid map

- resolutions of the whole map and of the part that moves;
- shell by shell, the half-map FSC, the FSC with the truth that it predicts, and the real one.

The truth of the rigid map is the mean over all particles. That of the flexible map is the molecule at one angle, every
atom carried to where the learnt flow says that it rests: its error is thus in the comparison.

    python benchmarks/compare_reconstruct.py --out /scratch/clamp            # about 15 minutes on one core

What is already there is not done again. Figures: docs/reconstruct.md.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from flexlib.files import read_json
from flexlib.imaging.fsc import corrected_fsc, fsc, predicted_truth_fsc, resolution_at
from flexlib.imaging.maps import read_map
from flexlib.mesh.build import build_mesh
from flexlib.model.flex_model import FlexModel
from flexlib.prepare.run import prepare_particles
from flexlib.reconstruct.run import reconstruct
from flexlib.simulate.phantoms import make_phantom
from flexlib.simulate.run import simulate_particles
from flexlib.simulate.settings import Simulation
from flexlib.simulate.signal import atoms_to_map
from flexlib.tetra.voxels import voxelise
from flexlib.train import train
from flexlib.workflow_support.settings import (
    MaskSettings,
    MeshSettings,
    PrepareSettings,
    ReconstructSettings,
    TrainSettings,
)

NEAR_RAD = 0.02  # particles within this of an angle show where the flow puts it


def truth_at_rest(folder: Path, phantom: str, angle_rad: float = 0.0, trained: str = "train") -> np.ndarray:
    """(N, N, N) exact map of the molecule in the flexible map's own conformation: atoms carried back along the flow.

    ``trained`` is the folder of the model whose flow that is.
    """
    model = FlexModel.load(folder / trained)
    mask = read_map(folder / "particles" / "full" / "mask.mrc")
    truth = np.load(folder / "data" / "truth.npz")
    near = np.abs(truth["angles_rad"] - angle_rad).max(1) < NEAR_RAD
    moved_A = model.displacements_A(torch.as_tensor(model.latents[near])).mean(0).numpy()
    voxels = voxelise(model.mesh, mask.data > 1e-3, mask.pixel_size_A)
    field_A = np.zeros((3, mask.box**3), np.float32)
    field_A[:, voxels.index] = np.einsum("nk,nkd->dn", voxels.bary, moved_A[voxels.cells[voxels.cell]])
    filled = np.zeros(mask.box**3, bool)
    filled[voxels.index] = True
    nearest = ndimage.distance_transform_edt(
        ~filled.reshape(mask.data.shape), return_distances=False, return_indices=True
    )
    grids = [component.reshape(mask.data.shape)[tuple(nearest)] for component in field_A]

    molecule = make_phantom(phantom)
    there_A = molecule.positions_A(np.full((1, truth["angles_rad"].shape[1]), angle_rad))[0]
    rest_A = there_A.copy()
    for _ in range(30):  # x + u(x) = y by fixed point: strains are far below one
        at = (rest_A / mask.pixel_size_A + mask.box // 2).T[::-1]
        rest_A = there_A - np.stack([ndimage.map_coordinates(grid, at, order=1, mode="nearest") for grid in grids], 1)
    sigma_px = Simulation().gaussian_sigma_A / mask.pixel_size_A
    exact = atoms_to_map(rest_A / mask.pixel_size_A, molecule.mass, mask.box, sigma_px)
    return float(truth["density_scale"]) * exact


def compare(folder: Path, phantom: str, maps: str = "reconstruct") -> None:
    """Print resolutions, and half-map FSC against the truth, whole map and moving part."""
    mask = read_map(folder / "particles" / "full" / "mask.mrc")
    moving = read_map(folder / maps / "moving_mask.mrc").data
    for key, value in read_json(folder / maps / "resolution.json").items():
        print(f"{key}: {value:.2f}" if isinstance(value, float) else f"{key}: {value}")
    truths = {"rigid": read_map(folder / "data" / "truth_mean.mrc").data}
    truths["flex"] = truth_at_rest(folder, phantom)
    for region, weight in (("whole", mask.data), ("moving", moving)):
        if not weight.any():
            continue
        columns = []
        for kind, truth in truths.items():
            halves = [read_map(folder / maps / f"{kind}_half{half}.mrc").data for half in (1, 2)]
            low = np.flatnonzero(fsc(*halves, weight) < 0.8)
            start = max(2, int(low[0])) if low.size else mask.box // 2
            curves = corrected_fsc(*halves, weight, randomise_from=None if region == "whole" else start)
            # the truth is cut by the same mask, so what the mask itself correlates is in both, and not corrected for
            half_fsc = np.asarray(curves["masked"])
            mean = 0.5 * (halves[0] + halves[1])
            predicted, real = predicted_truth_fsc(half_fsc), fsc(mean, truth * mask.data, weight)
            columns += [half_fsc, predicted, real]
            limit_A = resolution_at(np.asarray(curves["corrected"]), 0.143, mask.box, mask.pixel_size_A)
            trusted = slice(1, int(mask.box * mask.pixel_size_A / limit_A) + 1)
            difference = (predicted - real)[trusted]
            print(
                f"{region}, {kind}: {limit_A:.2f} A; predicted - real FSC with the truth, {trusted.stop - 1} shells: "
                f"mean {difference.mean():+.3f}, from {difference.min():+.3f} to {difference.max():+.3f}"
            )
        print(f"{region}: shell, A, then half-map FSC, predicted, real: rigid | flexible")
        for shell in range(2, mask.box // 2, 3):
            numbers = " ".join(f"{column[shell]:6.3f}" for column in columns)
            print(f"{shell:4d} {mask.box * mask.pixel_size_A / shell:6.1f}  {numbers}")


def make_set(folder: Path, options: argparse.Namespace) -> None:
    """The simulated set, prepared and meshed, as far as it is missing."""
    data, particles, mesh = (folder / name for name in ("data", "particles", "mesh"))
    if not (data / "truth.npz").exists():
        simulate_particles(
            data,
            Simulation(
                phantom=options.phantom,
                num_particles=options.num_particles,
                box=options.box,
                pixel_size_A=options.pixel_size_A,
                snr=options.snr,
            ),
        )
    if not (particles / "prepared.json").exists():
        prepare_particles(
            data / "particles.star",
            data / "consensus.mrc",
            particles,
            settings=PrepareSettings(train_box=options.train_box),
            mask_settings=MaskSettings(),
        )
    if not (mesh / "mesh.vtu").exists():
        build_mesh(particles, mesh, MeshSettings())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--phantom", default="clamp")
    parser.add_argument("--num-particles", type=int, default=3000)
    parser.add_argument("--box", type=int, default=128)
    parser.add_argument("--train-box", type=int, default=96)
    parser.add_argument("--pixel-size-A", type=float, default=2.5)
    parser.add_argument("--snr", type=float, default=0.04)
    parser.add_argument("--latent-dims", type=int, default=1)
    parser.add_argument("--max-iterations", type=int, default=20)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    make_set(options.out, options)
    particles, mesh, trained = (options.out / name for name in ("particles", "mesh", "train"))
    if not (trained / "model.pt").exists():
        train(particles, mesh, trained, TrainSettings(latent_dims=options.latent_dims))
    if not (options.out / "reconstruct" / "resolution.json").exists():
        settings = ReconstructSettings(max_bfgs_iterations=options.max_iterations)
        reconstruct(particles, trained, options.out / "reconstruct", settings)
    compare(options.out, options.phantom)


if __name__ == "__main__":
    main()
