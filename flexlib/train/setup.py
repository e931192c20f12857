"""What stays fixed during a run: data, operators, priors, and which particles are held out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from flexlib.distributed import ALONE, Ranks
from flexlib.errors import InputError
from flexlib.images.batch import split_batches
from flexlib.images.sources import TrainingImages
from flexlib.imaging.fourier import lowpass_map
from flexlib.imaging.image_transforms import plane_weight
from flexlib.imaging.maps import Map, read_map
from flexlib.imaging.masks import TRAINING_FLOOR, inside_mask
from flexlib.layout import MeshFolder, ParticlesFolder
from flexlib.model.forward import TRAINING, Accuracy, CoarseMap, Operator
from flexlib.model.motion import density_at_vertices
from flexlib.projection.op import gather_volume
from flexlib.runtime import resolve_device
from flexlib.tetra.io import read_mesh
from flexlib.tetra.rigidity import RigidityTensors
from flexlib.tetra.tetmesh import TetraMesh, single_cell_mesh
from flexlib.train.canonical import CanonicalMap
from flexlib.train.latents import LatentPrior
from flexlib.train.rows import HalfSet, choose_rows
from flexlib.train.schedule import Schedule
from flexlib.train.score import HeldOut
from flexlib.workflow_support.settings import TrainSettings

RIGIDITY_NATS = 50.0  # nats per unit of rigidity x mean squared strain: 2 is about the best on sets with hinges
HALF_START_BAND = 0.2  # of Nyquist: what a half-set's map starts with of a consensus of all particles
COARSE_BOX = 64  # training boxes from here on have a coarse map too
BATCH_SIZE = 200  # rows of a mini-batch, at most
PASS_ROWS = 2000  # at once, at most, where nothing is learnt from one batch to the next
PASS_BYTES, CPU_PASS_BYTES = 2**29, 2**22  # of images and displacements: a GPU's memory, a CPU's cache


@dataclass(frozen=True)
class Setup:
    """What stays fixed during a run."""

    particles: ParticlesFolder
    source: TrainingImages
    mesh: TetraMesh
    operator: Operator
    rigid: Operator
    coarse: CoarseMap | None
    rigid_coarse: CoarseMap | None
    rigidity: RigidityTensors
    density_share: torch.Tensor  # (nv,) of the consensus' density, by the vertex that it rides on
    mask: Map
    consensus: Map
    training_rows: np.ndarray
    validation_rows: np.ndarray
    settings: TrainSettings
    device: torch.device
    batch_size: int
    ranks: Ranks = ALONE
    half: HalfSet | None = None  # that is trained alone; None: all particles
    by_micrograph: bool = False  # whether the micrographs of validation_rows are held out whole

    def prior(self, num_views: int = 0) -> LatentPrior:
        """Of the latents, and of ``num_views`` view parameters behind them.

        A unit normal; for the latents, it may be 3DFlex's penalty on the fourth power.
        """
        centering = self.settings.centering
        if centering == "auto":
            return LatentPrior(num_views=num_views)
        return LatentPrior.quartic(float(centering), num_views)

    @cached_property
    def schedule(self) -> Schedule:
        """The course of the run."""
        return Schedule(
            epochs=self.settings.epochs,
            box=self.source.box,
            pixel_size_A=self.source.pixel_size_A,
            batch_size=self.batch_size,
            num_training_rows=len(self.training_rows),
        )

    @cached_property
    def pass_size(self) -> int:
        """Rows that are looked at together where results do not depend on it: few cost as much of the host's time."""
        box, num_vertices = self.source.box, len(self.operator.vertices_A)
        at_once = CPU_PASS_BYTES if self.device.type == "cpu" else PASS_BYTES
        fitting = at_once // (8 * box * (box // 2 + 1) + 24 * num_vertices)
        return max(self.batch_size, min(PASS_ROWS, fitting))

    @property
    def rigidity_nats(self) -> float:
        """Nats per unit of mean squared strain."""
        return self.settings.rigidity * RIGIDITY_NATS

    def weight(self, band: float) -> torch.Tensor:
        """(box, box//2+1) weight of each stored Fourier pixel, up to the shell ``band``."""
        return plane_weight(self.source.box, band).to(self.device)

    @cached_property
    def rotation(self) -> torch.Tensor:
        """(n, 3, 3) of the input's views, as batches have them."""
        return torch.as_tensor(self.source.rotation, device=self.device)

    def rows_on_device(self, rows: np.ndarray) -> torch.Tensor:
        """Rows as an index on the run's device."""
        return torch.as_tensor(rows, device=self.device)

    @property
    def held_out_micrographs(self) -> int:
        """How many micrographs are held out whole; 0 where single images are."""
        micrograph = self.source.particles.micrograph
        if micrograph is None or not self.by_micrograph:
            return 0
        return len(np.unique(micrograph[self.validation_rows]))

    def held_out(self, num_views: int = 0, particle_log_odds: float = math.inf) -> HeldOut:
        """The held-out rows, and how they are scored: with ``num_views`` view parameters, particles at these odds."""
        return HeldOut(
            source=self.source,
            rows=self.validation_rows,
            particle=self.source.particles.image_index[self.validation_rows],
            band=self.schedule.full_band,
            seed=derived_seed(0, 7),  # the same for all sweep points: their scores are compared in pairs
            fixed=self.settings.latent_dims if self.settings.freeze_latents else 0,
            prior=self.prior(num_views),
            particle_log_odds=particle_log_odds,
            batch_size=self.pass_size,
            ranks=self.ranks,
        )


def set_up(
    particles: ParticlesFolder,
    mesh_folder: MeshFolder,
    settings: TrainSettings,
    device: str,
    ranks: Ranks = ALONE,
    *,
    batch_size: int | None = None,
    accuracy: Accuracy = TRAINING,
    half: int | None = None,
) -> Setup:
    """Read and build what stays fixed.

    Parameters
    ----------
    particles, mesh_folder, settings
        What prepare and mesh have written; ``train:`` at one sweep point.
    device
        "auto", "cpu" or "cuda".
    ranks
        The ranks that share the run.
    batch_size
        Rows of a mini-batch; None chooses by the number of rows.
    accuracy
        Of the projection.
    half
        1 or 2: as if there were no particles but those of this half-set. None for all.

    Raises
    ------
    InputError
        Files do not fit, a half-set is empty, or a mini-batch has fewer particles than there are processes.
    """
    chosen = resolve_device(device)
    rows, mesh = choose_rows(particles, settings, half), read_mesh(mesh_folder.mesh)
    source, consensus, mask = rows.source, read_map(particles.consensus), read_map(particles.mask)
    rigid_mesh, inside = single_cell_mesh(source.box * source.pixel_size_A), inside_mask(mask.data, TRAINING_FLOOR)
    flexible = Operator.on_mesh(mesh, inside, source.pixel_size_A, chosen, accuracy)
    rigid = Operator.on_mesh(rigid_mesh, inside, source.pixel_size_A, chosen, accuracy)
    return Setup(
        particles=particles,
        source=source,
        mesh=mesh,
        operator=flexible,
        rigid=rigid,
        coarse=_coarse_map(mesh, inside, flexible, accuracy),
        rigid_coarse=_coarse_map(rigid_mesh, inside, rigid, accuracy),
        rigidity=RigidityTensors.from_mesh(mesh, chosen),
        density_share=_density_share(consensus, mask, flexible, half),
        mask=mask,
        consensus=consensus,
        training_rows=rows.training,
        validation_rows=rows.held_out,
        settings=settings,
        device=chosen,
        batch_size=_fitting_batch_size(rows.training, batch_size, ranks),
        ranks=ranks,
        half=rows.half,
        by_micrograph=rows.by_micrograph,
    )


def _density_share(consensus: Map, mask: Map, operator: Operator, half: int | None) -> torch.Tensor:
    """(nv,) of the density that the training sees, by the vertex of the operator's mesh that it rides on."""
    density = (consensus.data if half is None else _low_band(consensus)) * mask.data
    on_device = torch.as_tensor(density, dtype=torch.float32, device=operator.vertices_A.device)
    return density_at_vertices(operator.voxels, gather_volume(on_device, operator.voxels))


def _fitting_batch_size(rows: np.ndarray, wanted: int | None, ranks: Ranks) -> int:
    """``wanted``, or what suits the number of rows; raises InputError where some rank would have no row of a batch."""
    size = int(np.clip(len(rows) // 20, 10, BATCH_SIZE)) if wanted is None else wanted
    least = min(len(batch) for batch in split_batches(rows, size))
    if ranks.size > least:
        raise InputError(f"train.processes: {ranks.size}, but the mini-batches of these particles have {least} each")
    return size


def _coarse_map(mesh: TetraMesh, inside: np.ndarray, fine: Operator, accuracy: Accuracy) -> CoarseMap | None:
    """The map at half the box; None where the box is too small for one."""
    if len(inside) < COARSE_BOX or len(inside) % 4:
        return None
    device, pixel_size_A = fine.vertices_A.device, 2 * fine.pixel_size_A
    return CoarseMap(Operator.on_mesh(mesh, inside[::2, ::2, ::2], pixel_size_A, device, accuracy), fine.voxels)


def canonical_map(setup: Setup, operator: Operator, transfer2: torch.Tensor, *, inside_only: bool) -> CanonicalMap:
    """The consensus, ready to be improved at the voxels of ``operator``.

    Of a half-set alone only the consensus' low band, and its power in each shell: the rest has seen the other half-set.
    ``transfer2`` as ``mean_transfer2``, ``inside_only`` as for ``CanonicalMap``.
    """
    volume = torch.as_tensor(setup.consensus.data, device=setup.device)
    mask = torch.as_tensor(setup.mask.data, device=setup.device)
    rows = len(setup.training_rows)
    canonical = CanonicalMap(volume, mask, operator.voxels, transfer2, rows, inside_only=inside_only)
    if setup.half is not None:
        start = gather_volume(torch.as_tensor(_low_band(setup.consensus), device=setup.device), operator.voxels)
        canonical.values = start * canonical.mask_values
    return canonical


def _low_band(consensus: Map) -> np.ndarray:
    """(box, box, box) what a half-set's training sees of a consensus of all particles."""
    return lowpass_map(consensus.data, 1.0, 2.0 / HALF_START_BAND)


def derived_seed(*key: int) -> int:
    """A 63-bit seed from a tuple of integers."""
    return int(np.random.SeedSequence(key).generate_state(2, np.uint32).view(np.uint64)[0] >> 1)
