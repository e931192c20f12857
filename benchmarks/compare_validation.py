"""Validation against the truth: what two half-sets' models say of map, motion and latents, beside what is true.

Simulates a molecule, prepares, trains on all particles and on each half-set, reconstructs, validates, and prints

- shell by shell, what half-map FSC predicts of the FSC with the truth and what that is: of one model's half-maps, and
  of the independent ones;
- by atom, the error of the motion and what ``motion_error.mrc`` says of it;
- how many true latents lie within a standard error.

    python benchmarks/compare_validation.py --out /scratch/clamp            # about half an hour on one core

What is already there is not done again. Figures: docs/validate.md.
"""

from __future__ import annotations

import argparse
import itertools
import logging
from pathlib import Path

import numpy as np
import torch
from compare_reconstruct import make_set, truth_at_rest

from flexlib.imaging.fsc import fsc, predicted_truth_fsc
from flexlib.imaging.maps import read_map
from flexlib.layout import ReconstructFolder, ValidateFolder
from flexlib.model.flex_model import FlexModel
from flexlib.model.flow import rigid_modes_A
from flexlib.reconstruct.run import reconstruct
from flexlib.records import AgreementRecord
from flexlib.simulate.phantoms import make_phantom
from flexlib.tetra.voxels import voxelise
from flexlib.train import train
from flexlib.validate.run import validate
from flexlib.workflow_support.settings import (
    ReconstructSettings,
    TrainSettings,
)

SAMPLED = 600  # particles whose motion is compared, atom by atom
KINDS = ("flex", "independent")


def compare_maps(folder: Path, phantom: str) -> None:
    """Predicted and real FSC with the truth, of shared and of independent half-maps."""
    mask = read_map(folder / "particles" / "full" / "mask.mrc")
    shared, independent = ReconstructFolder(folder / "reconstruct"), ValidateFolder(folder / "validate")
    maps = {"flex": [shared.half("flex", number) for number in (1, 2)]}
    maps["independent"] = [independent.half_map(number) for number in (1, 2)]
    truths = {"flex": truth_at_rest(folder, phantom), "independent": truth_at_rest(folder, phantom, trained="half1")}
    moving = read_map(shared.moving_mask).data
    for region, weight in (("whole", mask.data), ("moving", moving)):
        columns = []
        for kind in KINDS:
            halves = [read_map(path).data for path in maps[kind]]
            predicted = predicted_truth_fsc(fsc(*halves, weight))
            real = fsc(0.5 * (halves[0] + halves[1]), truths[kind] * mask.data, weight)
            difference = (predicted - real)[1:]
            columns += [predicted, real]
            span = f"from {difference.min():+.3f} to {difference.max():+.3f}"
            print(f"{region}, {kind}: predicted - real {span}")
        for shell in range(2, mask.box // 2, 3):
            numbers = " ".join(f"{column[shell]:6.3f}" for column in columns)
            print(f"{shell:4d} {mask.box * mask.pixel_size_A / shell:6.1f}  {numbers}")


def compare_motion(folder: Path, phantom: str) -> None:
    """The error of the motion by atom, about the mean over the particles and without rigid-body motion."""
    model = FlexModel.load(folder / "train")
    error = read_map(ValidateFolder(folder / "validate").motion_error)
    truth, molecule = np.load(folder / "data" / "truth.npz"), make_phantom(phantom)
    rows = np.linspace(0, len(model.latents) - 1, SAMPLED).astype(int)
    true_A = molecule.positions_A(truth["angles_rad"][rows])
    mean_A = true_A.mean(0)
    inside = read_map(folder / "particles" / "full" / "mask.mrc").data > 1e-3
    voxels = voxelise(model.mesh, inside, error.pixel_size_A)
    place = np.full(inside.size, -1)
    place[voxels.index] = np.arange(len(voxels))
    at = np.rint(mean_A / error.pixel_size_A).astype(int) + error.box // 2
    index = np.ravel_multi_index(at.T[::-1], inside.shape)
    kept = place[index] >= 0
    corners, bary = voxels.cells[voxels.cell[place[index[kept]]]], voxels.bary[place[index[kept]]]
    moved_A = model.displacements_A(torch.as_tensor(model.latents[rows])).numpy()
    found_A = np.einsum("ak,bakd->bad", bary, moved_A[:, corners])
    wrong_A = (true_A - mean_A)[:, kept] - (found_A - found_A.mean(0))
    if model.pose is not None:
        rigid = rigid_modes_A(mean_A[kept]).reshape(6, -1)
        weighted = rigid * np.repeat(molecule.mass[kept], 3)
        flat = wrong_A.reshape(len(rows), -1)
        wrong_A = (flat - flat @ np.linalg.solve(weighted @ rigid.T, weighted).T @ rigid).reshape(wrong_A.shape)
    real = np.sqrt((wrong_A**2).sum(2).mean(0))
    told = error.data.reshape(-1)[index[kept]]
    size = np.sqrt(((true_A - mean_A) ** 2).sum(2).mean(0)[kept])
    ratio = np.sqrt((told**2).mean() / (real**2).mean())
    print(f"motion {np.sqrt((size**2).mean()):.2f} A rms over atoms, error {np.sqrt((real**2).mean()):.3f}")
    print(f"what is told of it: {ratio:.3f} times as much, correlation over atoms {np.corrcoef(real, told)[0, 1]:.3f}")


def compare_latents(folder: Path) -> None:
    """How many latents lie within a standard error of the truth, as training gives it and corrected."""
    import starfile

    angles = np.load(folder / "data" / "truth.npz")["angles_rad"]
    latents = FlexModel.load(folder / "train").latents.astype(np.float64)
    true = true_latents(angles, latents)
    for name, path in (("training", "train/latents.star"), ("corrected", "validate/latents.star")):
        table = starfile.read(folder / path, always_dict=True)["particles"]
        std_err = table.filter(regex="^flexLatentStdErr").to_numpy(np.float64)
        print(f"{name}: within one standard error {(np.abs(latents - true) <= std_err).mean(0).round(3)}")


def true_latents(angles_rad: np.ndarray, latents: np.ndarray, degree: int = 7) -> np.ndarray:
    """(n, K) latents that particles with these angles truly have.

    Posterior means shrink; standardised latents have unit covariance, means and uncertainty together. So the smooth
    function of the angles that fits the means best is stretched to unit covariance.
    """
    scaled = (angles_rad - angles_rad.mean(0)) / angles_rad.std(0)
    powers = [
        axes
        for order in range(degree + 1)
        for axes in itertools.combinations_with_replacement(range(angles_rad.shape[1]), order)
    ]
    design = np.stack([np.prod(scaled[:, axes], axis=1) for axes in powers], 1)
    fitted = design @ np.linalg.lstsq(design, latents, rcond=None)[0]
    values, vectors = np.linalg.eigh(np.cov(fitted.T).reshape(latents.shape[1], -1))
    return fitted.mean(0) + (fitted - fitted.mean(0)) @ (vectors @ np.diag(values**-0.5) @ vectors.T)


def make(folder: Path, options: argparse.Namespace) -> None:
    """All that is compared, as far as it is missing."""
    make_set(folder, options)
    particles, mesh = folder / "particles", folder / "mesh"
    trainings = TrainSettings(latent_dims=options.latent_dims, rigidity=options.rigidity)
    for name, half in (("train", None), ("half1", 1), ("half2", 2)):
        if not (folder / name / "model.pt").exists():
            train(particles, mesh, folder / name, trainings, half=half)
    if not (folder / "reconstruct" / "resolution.json").exists():
        reconstruct(particles, folder / "train", folder / "reconstruct", ReconstructSettings())
    if not (folder / "validate" / "validation.json").exists():
        halves = [folder / "half1", folder / "half2"]
        validate(particles, folder / "train", halves, folder / "validate", ReconstructSettings())


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
    parser.add_argument("--rigidity", type=float, default=2.0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    make(options.out, options)
    at_rest = AgreementRecord.read(ValidateFolder(options.out / "validate").record).at_rest
    print(f"half-sets' models at rest: {at_rest}")
    if not make_phantom(options.phantom).hinges:
        return  # there is no motion to compare
    compare_maps(options.out, options.phantom)
    compare_motion(options.out, options.phantom)
    compare_latents(options.out)


if __name__ == "__main__":
    main()
