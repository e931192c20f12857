"""Two layers that slide past each other, trained with a segment per layer and with one mesh: what docs/mesh.md shows.

    python benchmarks/compare_slide.py OUT_DIR [--figure docs/images/mesh_slide.png] [--range-A 16]

Takes about ten minutes; what is in OUT_DIR already is not done again.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from flexlib.images.batch import read_ahead, split_batches
from flexlib.imaging.image_transforms import plane_weight
from flexlib.imaging.maps import read_map, write_map
from flexlib.layout import ParticlesFolder
from flexlib.mesh.build import build_mesh
from flexlib.model.flex_model import FlexModel
from flexlib.model.forward import Operator, log_likelihood_loss
from flexlib.model.moving_map import MovingMap
from flexlib.prepare.run import prepare_particles
from flexlib.projection.op import VoxelTensors, gather_volume
from flexlib.simulate.phantoms import Phantom, make_phantom
from flexlib.simulate.run import simulate_particles
from flexlib.simulate.settings import Simulation
from flexlib.tetra.voxels import voxelise
from flexlib.train import train
from flexlib.train.latents import friedel_halves, infer_latents
from flexlib.train.rows import choose_rows
from flexlib.workflow_support.settings import MeshSettings, PrepareSettings, TrainSettings

NAMES = {"parted": "a segment per layer", "plain": "one mesh"}
NUM_PARTICLES, BOX, PIXEL_SIZE_A, SNR, CELLS, HELD_OUT = 3000, 64, 4.0, 0.08, 20, 0.2
PIVOT_A = 75.0
NEAR_A = 12.0  # atoms within this height of the contact


def phantom_of(range_A: float) -> Phantom:
    """The slider with another range of its slide."""
    phantom = make_phantom("slider")
    return replace(phantom, hinges=(replace(phantom.hinges[0], range_rad=range_A / PIVOT_A),))


def contact_height_A(phantom: Phantom) -> float:
    """Height z between the two layers."""
    upper = phantom.hinges[0].weight > 0
    heights = phantom.atoms_A[:, 2]
    return float((np.percentile(heights[~upper], 99.5) + np.percentile(heights[upper], 0.5)) / 2)


def prepare(out: Path, phantom: Phantom) -> None:
    """Particles, a segmentation that cuts between the layers, and both meshes."""
    if not (out / "sim/particles.star").exists():
        simulate_particles(
            out / "sim",
            Simulation(
                num_particles=NUM_PARTICLES,
                box=BOX,
                pixel_size_A=PIXEL_SIZE_A,
                snr=SNR,
                seed=1,
            ),
            phantom,
        )
    if not (out / "particles/prepared.json").exists():
        settings = PrepareSettings(train_box=BOX)
        prepare_particles(out / "sim/particles.star", out / "sim/consensus.mrc", out / "particles", settings=settings)
    consensus, mask = (read_map(out / f"particles/{name}.mrc") for name in ("consensus", "mask"))
    height_A = (np.arange(consensus.box) - consensus.box // 2) * consensus.pixel_size_A
    upper = np.broadcast_to((height_A > contact_height_A(phantom))[:, None, None], consensus.data.shape)
    labels = np.where(mask.data > 0, upper.astype(int), -1)
    write_map(out / "segments.mrc", labels, consensus.pixel_size_A, like=consensus, dtype=np.int8)
    build_mesh(out / "particles", out / "plain", MeshSettings(cells=CELLS))
    parted = MeshSettings(cells=CELLS, segmentation=out / "segments.mrc", connections="0, 1")
    build_mesh(out / "particles", out / "parted", parted)


def unseen_loss(out: Path, name: str, seed: int) -> np.ndarray:
    """(n,) nats of the unseen half of each held-out particle's Fourier pixels, latents from the other half."""
    chosen = choose_rows(ParticlesFolder(out / "particles"), TrainSettings(validation_fraction=HELD_OUT))
    source, model = chosen.source, FlexModel.load(out / f"train_{name}_{seed}")
    mask = read_map(out / "particles/mask.mrc")
    voxels = VoxelTensors.from_mesh_voxels(voxelise(model.mesh, mask.data > 0.01, mask.pixel_size_A))
    operator = Operator(torch.as_tensor(model.mesh.vertices_A, dtype=torch.float32), voxels, mask.pixel_size_A)
    values = gather_volume(torch.as_tensor(model.canonical), voxels)
    band = json.loads((out / f"train_{name}_{seed}/validation.json").read_text())["band_shell"]
    seen, unseen = (plane_weight(source.box, band) * half for half in friedel_halves(source.box, 1))
    losses = []
    for batch in read_ahead(source, split_batches(chosen.held_out, 100), "cpu"):
        start = torch.as_tensor(model.latents[batch.rows])
        latents = infer_latents(MovingMap(operator, model.flow, values), batch, seen, start, 5).latents
        with torch.no_grad():
            losses.append(log_likelihood_loss(operator, values, batch, model.flow(latents), unseen))
    return torch.cat(losses).double().numpy()


def displacements(out: Path, name: str, seed: int, phantom: Phantom) -> dict[str, np.ndarray]:
    """Displacement of each atom in 400 particles, learnt and true, each less its mean over the particles."""
    angles = np.load(out / "sim/truth.npz")["angles_rad"]
    rows = np.random.default_rng(5).choice(len(angles), 400, replace=False)
    mask, model = read_map(out / "particles/mask.mrc"), FlexModel.load(out / f"train_{name}_{seed}")
    voxels = voxelise(model.mesh, mask.data > 0.01, mask.pixel_size_A)
    number = np.full(mask.box**3, -1)
    number[voxels.index] = np.arange(len(voxels))
    nearest = np.rint(phantom.atoms_A / mask.pixel_size_A).astype(int) + mask.box // 2
    voxel = number.reshape(mask.data.shape)[nearest[:, 2], nearest[:, 1], nearest[:, 0]]
    inside = voxel >= 0
    moved = model.displacements_A(model.latents[rows]).numpy()[:, voxels.cells[voxels.cell[voxel[inside]]]]
    learnt = np.einsum("ak,baki->bai", voxels.bary[voxel[inside]], moved)
    true = (phantom.positions_A(angles[rows]) - phantom.atoms_A)[:, inside]
    return {
        "learnt": learnt - learnt.mean(0),
        "true": true - true.mean(0),
        "angle": angles[rows, 0] - angles[rows, 0].mean(),
        "height": phantom.atoms_A[inside, 2],
    }


def rms(values: np.ndarray) -> float:
    """Root mean square length of the vectors in the last axis."""
    return float(np.sqrt((values**2).sum(-1).mean()))


def main() -> None:
    """Run everything, print the table of docs/mesh.md and draw its figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--range-A", type=float, default=16.5, help="the slide reaches this far either way")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    phantom = phantom_of(options.range_A)
    prepare(options.out, phantom)
    scores, fields = {}, {}
    for name in NAMES:
        folder = options.out / f"train_{name}_{options.seed}"
        if not (folder / "validation.json").exists():
            settings = TrainSettings(latent_dims=1, validation_fraction=HELD_OUT, seed=options.seed)
            train(options.out / "particles", options.out / name, folder, settings)
        scores[name] = json.loads((folder / "validation.json").read_text())
        fields[name] = displacements(options.out, name, options.seed, phantom)
        field = fields[name]
        near = np.abs(field["height"] - contact_height_A(phantom)) < NEAR_A
        error = field["learnt"] - field["true"]
        print(
            f"{NAMES[name]}: held-out gain {scores[name]['validation_gain']:.2f} +- "
            f"{scores[name]['validation_gain_se']:.2f} nats, displacement wrong by {rms(error):.2f} A rms, near the "
            f"contact by {rms(error[:, near]):.2f} A (moves by {rms(field['true'][:, near]):.2f} A)"
        )
    difference = unseen_loss(options.out, "plain", options.seed) - unseen_loss(options.out, "parted", options.seed)
    paired = difference.mean(), difference.std(ddof=1) / np.sqrt(len(difference))
    print(
        f"particle by particle: {paired[0]:.2f} +- {paired[1]:.2f} nats for the segments, {len(difference)} particles"
    )
    if options.figure:
        draw(options.figure, fields, scores, paired, contact_height_A(phantom), phantom.hinges[0].range_rad)


def draw(
    path: Path, fields: dict, scores: dict, paired: tuple[float, float], contact_A: float, range_rad: float
) -> None:
    """Slide at the end of the range against height, and the held-out gains."""
    from flexlib.report.pictures import ACCENT, FLEX, INK, MUTED, new_figure, png

    colours = {"parted": FLEX, "plain": ACCENT}
    figure = new_figure(7.6, 3.4)
    left, right = figure.subplots(1, 2, width_ratios=(2.2, 1))
    for name, field in fields.items():
        angle, height = field["angle"], field["height"]
        slope = {k: (field[k][..., 0] * angle[:, None]).sum(0) / (angle**2).sum() for k in ("learnt", "true")}
        if name == "parted":
            left.scatter(height, -range_rad * slope["true"], s=3, color=MUTED, label="truth", linewidths=0)
        left.scatter(
            height, -range_rad * slope["learnt"], s=3, color=colours[name], alpha=0.5, label=NAMES[name], linewidths=0
        )
    left.axvline(contact_A, color=INK, linewidth=0.8, linestyle=":")
    left.set_xlabel("height of the atom, z (Å); dotted: contact")
    left.set_ylabel("slide at the end of its range (Å)")
    left.legend(frameon=False, markerscale=4)
    gains = [scores[name]["validation_gain"] for name in NAMES]
    errors = [scores[name]["validation_gain_se"] for name in NAMES]
    right.bar(range(2), gains, yerr=errors, color=[colours[name] for name in NAMES], capsize=4, width=0.6)
    right.set_xticks(range(2), [NAMES[name].replace(" per", "\nper") for name in NAMES])
    right.set_ylabel("held-out gain (nats per particle)")
    right.set_title(f"particle by particle:\n{paired[0]:.2f} ± {paired[1]:.2f} more", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(figure, 140))


if __name__ == "__main__":
    main()
