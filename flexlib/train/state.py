"""A run's fixed setup, its changing state, and what a checkpoint holds of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flexlib.distributed import ALONE, Group
from flexlib.errors import InputError
from flexlib.images.batch import split_batches
from flexlib.images.sources import TrainingImages, open_training_images
from flexlib.imaging.maps import Map, read_map
from flexlib.imaging.masks import TRAINING_FLOOR, inside_mask
from flexlib.model.flex_model import FlowGenerator
from flexlib.model.forward import CoarseView, Operator
from flexlib.projection.op import VoxelTensors, gather_volume
from flexlib.tetra.io import read_mesh
from flexlib.tetra.rigidity import RigidityTensors
from flexlib.tetra.tetmesh import TetraMesh, single_cell_mesh
from flexlib.tetra.voxels import voxelise
from flexlib.train.canonical import CanonicalMap
from flexlib.train.latents import LatentPrior
from flexlib.train.score import choose_held_out
from flexlib.train.spectral import SpectralStart
from flexlib.workflow_support.settings import TrainSettings

RIGIDITY_NATS = 50.0  # nats per unit of rigidity x mean squared strain: 2 is about the best on sets with hinges
COARSE_BOX = 64  # training boxes from here on have a coarse view
BATCH_SIZE = 200
MAP_STEPS_PER_EPOCH = 4.0  # Newton steps that the map takes in an epoch, whatever the batch and the set's size
MOST_MAP_STEP = 0.2  # of a Newton step in one batch
FIRST_RESOLUTION_A = 20.0  # where coarse to fine starts
LAST_BAND = 0.8  # of Nyquist (3DFlex's)
BAND_EPOCHS = 5  # epochs from the first to the last band


@dataclass(frozen=True)
class Setup:
    """What stays fixed during a run."""

    particles_dir: Path
    source: TrainingImages
    mesh: TetraMesh
    operator: Operator
    rigid: Operator
    coarse: CoarseView | None
    rigidity: RigidityTensors
    density_share: torch.Tensor  # (nv,) of the consensus' density, by the vertex that it rides on
    mask: Map
    consensus: Map
    training_rows: np.ndarray
    validation_rows: np.ndarray
    settings: TrainSettings
    device: torch.device
    batch_size: int
    group: Group = ALONE

    @property
    def prior(self) -> LatentPrior:
        """Of the latents: a unit normal, or 3DFlex's penalty on the fourth power.

        3DFlex's unit is not known; its default of 20 is given the strength of the unit normal at |z| = 1.5, where it
        says that latents pile up when centering is too weak.
        """
        centering = self.settings.centering
        return LatentPrior() if centering == "auto" else LatentPrior(4.0 * float(centering) / 81.0, 4.0)

    @property
    def map_rate(self) -> float:
        """Newton steps of the map in one batch while learning."""
        return min(MAP_STEPS_PER_EPOCH * self.batch_size / len(self.training_rows), MOST_MAP_STEP)

    def band(self, epoch: int) -> float:
        """Highest shell in use: coarse to fine, up to ``LAST_BAND`` of Nyquist."""
        half = self.source.box / 2
        first = np.clip(self.source.box * self.source.pixel_size_A / FIRST_RESOLUTION_A, 0.25 * half, 0.6 * half)
        return float(first + (LAST_BAND * half - first) * min(1.0, epoch / BAND_EPOCHS))


@dataclass
class State:
    """What a run changes, and a checkpoint holds."""

    flow: FlowGenerator
    optimiser: torch.optim.Optimizer
    canonical: CanonicalMap
    latents: torch.Tensor  # (n, K)
    information: torch.Tensor  # (n, K, K) Fisher information of each latent, without the prior
    held_latents: torch.Tensor  # (validation, K) from half the Fourier pixels
    rigid_values: torch.Tensor  # (nvox of the rigid operator,)
    spectrum: SpectralStart
    given_latents: torch.Tensor | None  # (n, K) in the user's own scale, where they are frozen
    log: list[dict[str, float]]
    information_ratio: float = 1.0  # of the full box to the coarse view
    epoch: int = 0  # epochs done
    step: int = 0  # batches of the next epoch done
    anneal_from: int | None = None  # epoch at which annealing started
    totals: torch.Tensor | None = None  # (2,) loss and rigidity energy, summed over the particles of a part epoch
    wall_s: float = 0.0

    def checkpoint(self) -> dict[str, Any]:
        return {
            "flow": self.flow.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "canonical": self.canonical.values,
            "latents": self.latents,
            "information": self.information,
            "held_latents": self.held_latents,
            "rigid_values": self.rigid_values,
            "spectrum": {
                k: torch.as_tensor(v.copy() if isinstance(v, np.ndarray) else v)
                for k, v in asdict(self.spectrum).items()
            },
            "given_latents": self.given_latents,
            "information_ratio": self.information_ratio,
            "log": self.log,
            "epoch": self.epoch,
            "step": self.step,
            "anneal_from": self.anneal_from,
            "totals": self.totals,
            "wall_s": self.wall_s,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        self.flow.load_state_dict(saved["flow"])
        self.optimiser.load_state_dict(saved["optimiser"])
        self.canonical.values = saved["canonical"]
        restored = "latents information held_latents given_latents information_ratio log epoch step anneal_from totals"
        for name in restored.split():
            setattr(self, name, saved[name])
        self.wall_s = saved["wall_s"]


def set_up(particles_dir: Path, mesh_dir: Path, settings: TrainSettings, device: str, group: Group = ALONE) -> Setup:
    """Read and build what stays fixed.

    Raises InputError for files that don't fit, or where a mini-batch has fewer particles than there are processes.
    """
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    source = open_training_images(particles_dir)
    consensus, mask = read_map(particles_dir / "consensus.mrc"), read_map(particles_dir / "mask.mrc")
    mesh = read_mesh(mesh_dir / "mesh.vtu")
    rigid_mesh = single_cell_mesh(source.box * source.pixel_size_A)

    def operator(of: TetraMesh, inside: np.ndarray, pixel_size_A: float) -> Operator:
        voxels = voxelise(of, inside, pixel_size_A)
        at_rest = torch.as_tensor(of.vertices_A, dtype=torch.float32, device=chosen)
        return Operator(at_rest, VoxelTensors.from_mesh_voxels(voxels, chosen), pixel_size_A)

    inside = inside_mask(mask.data, TRAINING_FLOOR)
    flexible = operator(mesh, inside, source.pixel_size_A)
    coarse = None
    if source.box >= COARSE_BOX and source.box % 4 == 0:
        coarse = CoarseView(operator(mesh, inside[::2, ::2, ::2], 2 * source.pixel_size_A), flexible.voxels)
    density = torch.as_tensor(consensus.data * mask.data, dtype=torch.float32, device=chosen)
    images = source.particles.image_index
    training_rows, validation_rows = choose_held_out(images, settings.validation_fraction, settings.seed)
    batch_size = int(np.clip(len(training_rows) // 20, 10, BATCH_SIZE))
    least = min(len(batch) for batch in split_batches(training_rows, batch_size))
    if group.size > least:
        raise InputError(f"train.processes: {group.size}, but the mini-batches of these particles have {least} each")
    return Setup(
        particles_dir,
        source,
        mesh,
        flexible,
        operator(rigid_mesh, inside, source.pixel_size_A),
        coarse,
        RigidityTensors.from_mesh(mesh, chosen),
        density_at_vertices(flexible.voxels, gather_volume(density, flexible.voxels)),
        mask,
        consensus,
        training_rows,
        validation_rows,
        settings,
        torch.device(chosen),
        batch_size,
        group,
    )


def follow_first(setup: Setup, state: State) -> None:
    """Give all ranks the first one's flow, map and latents: what they compute alike may differ in the last bit."""
    setup.group.follow_first(*state.flow.state_dict().values(), state.canonical.values, state.latents)


def density_at_vertices(voxels: VoxelTensors, values: torch.Tensor) -> torch.Tensor:
    """(nv,) share of the (positive) density that rides on each vertex; the sum is 1."""
    corner = voxels.cells.long()[voxels.cell.long()]
    share = voxels.bary.clamp(min=0.0) * values.clamp(min=0.0)[:, None]
    total = values.new_zeros(voxels.num_vertices).index_add_(0, corner.flatten(), share.flatten())
    return total / total.sum().clamp(min=1e-30)


def derived_seed(*key: int) -> int:
    """A 63-bit seed from a tuple of integers."""
    return int(np.random.SeedSequence(key).generate_state(2, np.uint32).view(np.uint64)[0] >> 1)
