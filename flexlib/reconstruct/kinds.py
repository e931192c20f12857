"""The ways to see the particles that maps are solved for in: with the flow's motion, or at rest."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch

from flexlib.distributed import Ranks
from flexlib.errors import InputError
from flexlib.images.batch import ImageSource
from flexlib.images.sources import PreparedImages
from flexlib.imaging.maps import Map
from flexlib.layout import ParticlesFolder, TrainFolder
from flexlib.model.flex_model import FlexModel
from flexlib.model.forward import Operator, solving_accuracy
from flexlib.model.part_labels import labels_at
from flexlib.particles.pose_change import PoseChange
from flexlib.reconstruct.map_solver import Convergence, SolverSettings, solve_map
from flexlib.reconstruct.normal_equations import Displacements
from flexlib.reconstruct.weighing import OccupancyOperator, WeighedImages
from flexlib.tetra.tetmesh import MeshVoxels, TetraMesh, single_cell_mesh
from flexlib.tetra.voxels import voxelise
from flexlib.workflow_support.settings import ReconstructSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kind:
    """One way to see the particles: flexible or rigid."""

    name: str  # "flex" or "rigid"
    mesh: TetraMesh
    voxels: MeshVoxels
    displacements: Displacements | None  # None: at rest
    pose: PoseChange | None  # None: as in the input
    probability: np.ndarray | None  # (n,) that the image shows a particle; None: all count alike
    occupancy: np.ndarray | None = None  # (n, S) that the particle has the part; None: all have all
    labels: np.ndarray | None = None  # (nvox,) of the parts, where there is an occupancy

    def seen(self, images: PreparedImages) -> ImageSource:
        """The images with their poses and weights."""
        posed = images if self.pose is None else images.posed(self.pose)
        return posed if self.probability is None else WeighedImages(posed, self.probability)

    def operator(self, device: torch.device) -> Operator:
        """What projects the map."""
        operator = Operator.of_voxels(self.mesh, self.voxels, device, solving_accuracy(device))
        if self.occupancy is None or self.labels is None:
            return operator
        return OccupancyOperator.of_labels(operator, self.labels, self.occupancy)


def flexible_kind(
    model: FlexModel,
    inside: np.ndarray,
    source: ImageSource,
    settings: ReconstructSettings,
    displacements: Displacements | None = None,
) -> Kind:
    """The flexible way to see the particles, with the poses found under it.

    Parameters
    ----------
    model
        Of the particles.
    inside
        (N, N, N) bool, the voxels of the map.
    source
        The images.
    settings
        ``reconstruct:``.
    displacements
        Of the mesh' vertices; None for the model's own.
    """
    voxels = voxelise(model.mesh, inside, source.pixel_size_A)
    labels = labels_at(model, source.box, source.pixel_size_A).reshape(-1)[voxels.index]
    return Kind(
        "flex",
        model.mesh,
        voxels,
        flow_displacements(model) if displacements is None else displacements,
        model.pose if settings.poses == "refined" else None,
        model.probability if settings.weigh_particles else None,
        model.occupancy,
        labels,
    )


def rigid_kind(model: FlexModel, inside: np.ndarray, source: ImageSource, settings: ReconstructSettings) -> Kind:
    """The particles at rest, with the poses found under a rigid map."""
    mesh = single_cell_mesh(source.box * source.pixel_size_A)
    voxels = voxelise(mesh, inside, source.pixel_size_A)
    pose = model.rigid_pose if settings.poses == "refined" else None
    return Kind("rigid", mesh, voxels, None, pose, model.probability if settings.weigh_particles else None)


def flow_displacements(model: FlexModel) -> Displacements:
    """Rows -> (b, nv, 3) Angstrom: what the flow makes of each particle's latents."""
    return lambda rows: model.displacements_A(torch.as_tensor(model.latents[rows]))


def solve_half(
    images: PreparedImages,
    half: int,
    kind: Kind,
    mask: Map,
    settings: ReconstructSettings,
    device: torch.device,
    ranks: Ranks,
    name: str | None = None,
) -> tuple[np.ndarray, Convergence]:
    """A half-map (N, N, N), of half-set 1 or 2, and the course of its solution.

    Parameters
    ----------
    images
        All of them.
    half
        Which half-set.
    kind
        How its particles are seen.
    mask
        Soft.
    settings
        ``reconstruct:``.
    device, ranks
        Where, and who shares the particles.
    name
        For the log; None for the kind's.
    """
    source, label = kind.seen(images), f"{name or kind.name} half {half}"
    mask_values = torch.as_tensor(mask.data.reshape(-1)[kind.voxels.index])
    solver = SolverSettings(max_iterations=settings.max_bfgs_iterations, keep_views=settings.all_in_ram)
    rows = np.flatnonzero(source.half_set == half - 1)
    volume, course = solve_map(
        source, rows, kind.operator(device), kind.displacements, mask_values, solver, label=label, ranks=ranks
    )
    warn_if_stopped(label, course, solver)
    return volume.cpu().numpy(), course


def warn_if_stopped(label: str, course: Convergence, solver: SolverSettings) -> None:
    """Name the setting to raise where a solution ended before it had converged."""
    if not course.converged:
        logger.warning(
            "%s: stopped by reconstruct.max_bfgs_iterations = %d at a relative gradient of %.1e (aim %.1e); raise it",
            label,
            solver.max_iterations,
            course.relative_gradient[-1],
            solver.tolerance,
        )


def check_input(
    source: ImageSource,
    mask: Map,
    model: FlexModel,
    particles: ParticlesFolder,
    train: TrainFolder,
    weigh_particles: bool,
) -> None:
    """Raise ``InputError`` where images, mask and model do not belong together."""
    found = {
        "latents": model.latents,
        "poses": model.pose,
        "poses under the rigid map": model.rigid_pose,
        "probabilities": model.probability,
        "occupancies": model.occupancy,
    }
    for what, values in found.items():
        if values is not None and len(values) != len(source):
            raise InputError(
                f"{train.path}: has {what} of {len(values)} rows, {particles.path} holds {len(source)}: "
                "were they trained on these particles?"
            )
    if mask.box != source.box:
        raise InputError(f"{particles.full_mask}: its box is {mask.box}, the images' {source.box}")
    for half in (0, 1):
        rows = source.half_set == half
        if not rows.any():
            raise InputError(f"{particles.particles}: half-set {half + 1} is empty")
        if weigh_particles and model.probability is not None and model.probability[rows].sum() < 1:
            raise InputError(
                f"{train.path}: hardly an image of half-set {half + 1} shows a particle (their probabilities add up to "
                f"{model.probability[rows].sum():.2g}): reconstruct.weigh_particles: false counts all alike"
            )


def own_rows(source: ImageSource, ranks: Ranks) -> np.ndarray:
    """The rows that this rank reads: its share of each half-set."""
    return np.concatenate([ranks.share(np.flatnonzero(source.half_set == half)) for half in (0, 1)])
