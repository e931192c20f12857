"""Small simulated sets, prepared and meshed, for the tests of training and of what it is made of."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import starfile
import torch
from scipy.spatial import cKDTree

from flexlib.images.batch import ImageBatch
from flexlib.layout import MeshFolder, ParticlesFolder
from flexlib.mesh.build import build_mesh
from flexlib.model.flow import FlowGenerator
from flexlib.model.moving_map import MovingMap
from flexlib.prepare.run import prepare_particles
from flexlib.projection.op import gather_volume
from flexlib.simulate.run import simulate_particles
from flexlib.simulate.settings import Simulation
from flexlib.train.setup import Setup, set_up
from flexlib.workflow_support.settings import MeshSettings, PrepareSettings, TrainSettings


def prepared(
    folder: Path,
    phantom: str,
    num_particles: int,
    snr: float,
    box: int = 32,
    cells: int = 10,
    field_of_view_A: float = 224.0,
    exact_limit: bool = False,
    **errors: float | str,
) -> Path:
    """``folder`` with sim/, particles/ and mesh/ of a simulated set; ``errors`` of poses and contrasts as simulated."""
    simulate_particles(
        folder / "sim",
        Simulation(
            phantom=phantom,
            num_particles=num_particles,
            box=box,
            pixel_size_A=field_of_view_A / box,
            snr=snr,
            seed=3,
            exact_limit=exact_limit,
            **errors,
        ),
    )
    prepare_particles(
        folder / "sim/particles.star",
        folder / "sim/consensus.mrc",
        folder / "particles",
        settings=PrepareSettings(train_box=box),
    )
    build_mesh(folder / "particles", folder / "mesh", MeshSettings(cells=cells))
    return folder


def small_setup(folder: Path, latent_dims: int) -> Setup:
    """The set of ``prepared``, a tenth of it held out, as a training would have it."""
    settings = TrainSettings(latent_dims=latent_dims, validation_fraction=0.1)
    return set_up(ParticlesFolder(folder / "particles"), MeshFolder(folder / "mesh"), settings, "cpu")


def masked_consensus(setup: Setup) -> torch.Tensor:
    """(nvox,) values of the consensus at the voxels of the flexible operator."""
    return gather_volume(setup.consensus.data * setup.mask.data, setup.operator.voxels)


def bent_flow(fields_A: torch.Tensor, bend: float) -> FlowGenerator:
    """Some smooth motion in two latents, with a ``bend``."""
    torch.manual_seed(1)
    flow = FlowGenerator(fields_A, 2, 2, 16)
    with torch.no_grad():
        flow.linear[0, :3] = torch.tensor([1.0, -0.5, 0.3])
        flow.linear[1, :3] = torch.tensor([0.2, 0.8, -0.6])
        flow.output.weight[:4].normal_(std=bend)
    return flow


def predicted_images(model: MovingMap, batch: ImageBatch, latents: torch.Tensor, seed: int) -> ImageBatch:
    """The batch with images that the model itself makes at ``latents`` (b, K), with white noise."""
    torch.manual_seed(seed)
    with torch.no_grad():
        clean = batch.transfer * model.operator.slices(model.values, batch, model.flow(latents))
    box = clean.shape[1]
    return replace(batch, images=clean + torch.fft.rfft2(torch.randn(len(clean), box, box), norm="ortho"))


def neighbour_r2(latents: np.ndarray, truth: np.ndarray) -> float:
    """R^2 of the mean over 15 nearest neighbours in latent space, fitted on even rows and scored on odd ones."""
    _, nearest = cKDTree(latents[::2]).query(latents[1::2], k=15)
    error = truth[::2][nearest].mean(1) - truth[1::2]
    return float(1 - (error**2).mean() / truth[1::2].var())


def area_under_roc(score: np.ndarray, label: np.ndarray) -> float:
    """Chance that a labelled one scores higher than one that is not; equal scores count half."""
    above = score[label][:, None] - score[~label]
    return float(((above > 0) + 0.5 * (above == 0)).mean())


def latents_of(train_dir: Path, pattern: str = r"^flexLatent\d+$") -> np.ndarray:
    """(n, K) columns of a training's latents.star."""
    table = starfile.read(train_dir / "latents.star", always_dict=True)["particles"]
    return table.filter(regex=pattern).to_numpy(np.float64)
