"""The stage validate: what two models, each of a half-set and trained from scratch, agree on.

How they are trained: ``train(..., half=1)``. Nothing passes between them but the mesh, the mask, the whitening and the
settings.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from flexlib.distributed import Ranks, launch
from flexlib.errors import InputError
from flexlib.images.sources import FullImages, open_full_images
from flexlib.imaging.maps import Map, read_map, write_map
from flexlib.imaging.masks import FULL_FLOOR, TRAINING_FLOOR, inside_mask
from flexlib.layout import ParticlesFolder, TrainFolder, ValidateFolder
from flexlib.model.flex_model import FlexModel
from flexlib.model.motion import density_at_vertices
from flexlib.particles.latents_write import write_latents_star
from flexlib.projection.op import VoxelTensors
from flexlib.reconstruct.fsc_table import fsc_table
from flexlib.reconstruct.kinds import check_input
from flexlib.reconstruct.postprocess import moving_region
from flexlib.reconstruct.run import course_table, write_csv
from flexlib.records import AgreementRecord
from flexlib.runtime import describe_device, resolve_device, tune_process
from flexlib.tetra.tetmesh import MeshVoxels
from flexlib.tetra.voxels import voxelise
from flexlib.validate.common_frame import CommonFrame
from flexlib.validate.half_maps import IndependentHalves, error_map, independent_halves
from flexlib.validate.latent_errors import LatentErrors, latent_errors
from flexlib.validate.mode_agreement import ModeAgreement, mode_agreement
from flexlib.validate.motion_error import MotionError, Region, errors_by_region, latent_regions, motion_error
from flexlib.validate.rest_shape import rest_shape_shift_A
from flexlib.workflow_support.scores import read_gains
from flexlib.workflow_support.settings import ReconstructSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Models:
    """The model of all particles, those of the half-sets, and the frame that these share."""

    all: FlexModel
    halves: tuple[FlexModel, FlexModel]
    frame: CommonFrame
    weight: np.ndarray  # (n,) with which particles count

    @property
    def at_rest(self) -> list[bool]:
        """Of the half-sets', whether it moves nothing."""
        return [model.flow.stands_still for model in self.halves]


def validate(
    particles_dir: str | Path,
    train_dir: str | Path,
    half_dirs: Sequence[str | Path],
    out_dir: str | Path,
    settings: ReconstructSettings,
    device: str = "auto",
    *,
    processes: int = 1,
) -> None:
    """Compare two models that were trained on a half-set each, and reconstruct each half-set with its own.

    Writes what ``layout.ValidateFolder`` lists (docs/validate.md).

    Parameters
    ----------
    particles_dir
        What prepare has written.
    train_dir
        What train has written for one sweep point.
    half_dirs
        What it has written for the same point of half-set 1 and of half-set 2 alone.
    out_dir
        Folder to write into.
    settings
        ``reconstruct:``, for the half-maps are made as there.
    device
        See ``runtime.resolve_device``.
    processes
        Ranks that share the particles (``flexlib.distributed``).

    Raises
    ------
    InputError
        The models belong to other particles or meshes, or a half-set is empty.
    """
    first, second = (TrainFolder(Path(folder)) for folder in half_dirs)
    folders = ParticlesFolder(Path(particles_dir)), TrainFolder(Path(train_dir)), (first, second)
    launch(_validate, (*folders, ValidateFolder(Path(out_dir)), settings), processes, device)


def _validate(
    ranks: Ranks,
    device: str,
    particles: ParticlesFolder,
    train: TrainFolder,
    half_folders: tuple[TrainFolder, TrainFolder],
    out: ValidateFolder,
    settings: ReconstructSettings,
) -> None:
    """One rank's part of ``validate``. All ranks solve for the maps; only the first writes."""
    tune_process()
    began, chosen = time.perf_counter(), resolve_device(device)
    source, mask = open_full_images(particles.path), read_map(particles.full_mask)
    models = _load(particles, (train, *half_folders), (source, mask), settings)
    halves = independent_halves(source, models.frame, mask, settings, chosen, ranks)
    if not ranks.leads:
        return
    voxels = voxelise(models.all.mesh, inside_mask(mask.data, FULL_FLOOR), source.pixel_size_A)
    moving, _ = moving_region(models.all, voxels, mask.data)
    resolutions_A = _write_half_maps(out, halves, mask, moving)
    errors = motion_error(models.frame, models.all, models.weight)
    _write_maps(out, errors, voxels, mask)
    modes = mode_agreement(models.frame, np.flatnonzero(models.weight >= 0.5))
    label = latent_regions(models.all.latents)
    latents = _latent_errors(models, label)
    regions = errors_by_region(errors, models.all.latents, label)
    _write_tables(out, modes, latents, regions)
    _write_particles(out, particles, models.all, errors, latents)
    gains = _write_cross(out, half_folders)
    density, moving_density = models.frame.density_share.numpy(), _share_of_vertices(moving, voxels)
    something_moves = bool(moving_density.any())
    AgreementRecord(
        cross_gain=float(gains.mean()) if len(gains) else None,
        cross_gain_se=float(gains.std(ddof=1) / np.sqrt(len(gains))) if len(gains) > 1 else None,
        cross_particles=len(gains),
        resolutions_A=resolutions_A,
        motion_error_A=_rms(errors.error_A2, density),
        motion_size_A=_rms(errors.motion_A2, density),
        moving_error_A=_rms(errors.error_A2, moving_density) if something_moves else None,
        moving_size_A=_rms(errors.motion_A2, moving_density) if something_moves else None,
        at_rest=models.at_rest,
        num_modes_agreeing=0 if any(models.at_rest) else modes.num_agreeing,
        mode_limit_A=None if any(models.at_rest) else modes.limit_A,
        latent_coverage=[round(float(value), 4) for value in latents.coverage],
        std_err_factor=[round(float(value), 4) for value in latents.factor],
        rest_shape_A=_rms(models.frame.shift_A.square().sum(1).numpy(), density),
        converged={f"independent_half{half}": course.converged for half, course in enumerate(halves.courses, 1)},
        wall_s=round(time.perf_counter() - began, 2),
        device=describe_device(chosen),
    ).write(out.record)


def _load(
    particles: ParticlesFolder,
    folders: tuple[TrainFolder, TrainFolder, TrainFolder],
    seen: tuple[FullImages, Map],
    settings: ReconstructSettings,
) -> _Models:
    """The models, with their frame; raises InputError where they do not belong together."""
    whole, first, second = (FlexModel.load(folder.path) for folder in folders)
    for folder, model in zip(folders, (whole, first, second), strict=True):
        check_input(*seen, model, particles, folder, settings.weigh_particles)
        if not np.array_equal(model.mesh.vertices_A, whole.mesh.vertices_A):
            raise InputError(f"{folder.path}: trained on another mesh than {folders[0].path}")
    if whole.latent_covariance is None:
        raise InputError(f"{folders[0].path}: the model is of a training that had not ended: train again")
    mask = read_map(particles.mask)
    inside = inside_mask(mask.data, TRAINING_FLOOR)
    voxels = voxelise(whole.mesh, inside, whole.pixel_size_A)
    density = torch.as_tensor(whole.canonical.reshape(-1)[voxels.index])
    share = density_at_vertices(VoxelTensors.from_mesh_voxels(voxels), density)
    shift_A = rest_shape_shift_A(first, second, mask.data)
    logger.info("rest shapes differ by %.2f A rms", _rms((shift_A**2).sum(1), share.numpy()))
    frame = CommonFrame(first, second, torch.as_tensor(shift_A).float(), share)
    weight = np.ones(len(whole.latents)) if whole.probability is None else whole.probability.astype(np.float64)
    return _Models(whole, (first, second), frame, weight)


def _latent_errors(models: _Models, label: np.ndarray) -> LatentErrors:
    model = models.all
    assert model.latent_covariance is not None  # seen to when it was read
    std_err = np.sqrt(np.einsum("nkk->nk", model.latent_covariance).clip(min=0.0))
    first, second = (half.latents for half in models.halves)
    return latent_errors(model.latents, std_err, (first, second), models.weight, label)


def _write_half_maps(out: ValidateFolder, halves: IndependentHalves, mask: Map, moving: np.ndarray) -> dict[str, float]:
    """Write the half-maps, their mean, FSC and course; the resolutions in Angstrom."""
    pixel_size_A = mask.pixel_size_A
    for number, volume in enumerate(halves.maps, 1):
        write_map(out.half_map(number), volume, pixel_size_A, like=mask)
    write_map(out.map, 0.5 * (halves.maps[0] + halves.maps[1]), pixel_size_A, like=mask)
    table, resolutions_A = fsc_table({"independent": halves.maps}, mask.data, pixel_size_A, moving)
    write_csv(out.fsc, table)
    write_csv(out.convergence, course_table({"independent": halves.courses}))
    return resolutions_A


def _write_maps(out: ValidateFolder, errors: MotionError, voxels: MeshVoxels, mask: Map) -> None:
    """Write the error of the motion and the motion, by voxel."""
    for path, squared_A2 in ((out.motion_error, errors.error_A2), (out.motion_size, errors.motion_A2)):
        write_map(path, error_map(squared_A2, voxels), mask.pixel_size_A, like=mask)


def _write_tables(out: ValidateFolder, modes: ModeAgreement, latents: LatentErrors, regions: list[Region]) -> None:
    """Write modes, latents and regions."""
    columns: dict[str, Any] = {
        "first_mode": modes.first_mode,
        "last_mode": modes.last_mode,
        "length_A": modes.length_A,
        "correlation": modes.correlation,
        "motion_A": modes.motion_A,
    }
    write_csv(out.modes, pd.DataFrame(columns))
    columns = {
        "latent": np.arange(1, len(latents.coverage) + 1),
        "std_err": np.sqrt((latents.std_err**2).mean(0)),
        "model_std_err": np.sqrt((latents.model_std_err**2).mean(0)),
        "coverage": latents.coverage,
        "factor": latents.factor,
    }
    write_csv(out.calibration, pd.DataFrame(columns))
    rows = []
    for number, region in enumerate(regions, 1):
        centre = {f"latent{k + 1}": value for k, value in enumerate(region.centre)}
        sizes = {
            "error_A": region.error_A,
            "model_error_A": region.model_error_A,
            "motion_A": region.motion_A,
        }
        rows.append({"region": number, "particles": len(region.rows), **centre, **sizes})
    write_csv(out.regions, pd.DataFrame(rows))


def _write_particles(
    out: ValidateFolder, particles: ParticlesFolder, model: FlexModel, errors: MotionError, latents: LatentErrors
) -> None:
    """Write the user's particles with latents, their corrected standard errors and the error of their motion."""
    extra = {f"flexLatentStdErr{k + 1}": column for k, column in enumerate(latents.corrected.T)}
    extra["flexMotionAngst"] = np.sqrt(errors.particle_motion_A2)
    extra["flexMotionErrorAngst"] = np.sqrt(errors.particle_error_A2)
    extra["flexMotionModelErrorAngst"] = np.sqrt(errors.particle_model_A2)
    write_latents_star(particles.path, model.latents, out.latents, extra=extra)


def _write_cross(out: ValidateFolder, half_folders: tuple[TrainFolder, TrainFolder]) -> np.ndarray:
    """Write both half-sets' scores by the other's model as one table; (p,) nats."""
    gains = {row: gain for folder in half_folders for row, gain in read_gains(folder.cross).items()}
    rows = sorted(gains)
    write_csv(out.cross, pd.DataFrame({"row": rows, "gain": [gains[row] for row in rows]}))
    return np.array([gains[row] for row in rows])


def _share_of_vertices(moving: np.ndarray, voxels: MeshVoxels) -> np.ndarray:
    """(nv,) what of a soft mask (N, N, N) lies at each vertex."""
    share = np.zeros(voxels.num_vertices)
    at_voxels = moving.reshape(-1)[voxels.index, None]
    np.add.at(share, voxels.cells[voxels.cell].ravel(), (voxels.bary.clip(min=0.0) * at_voxels).ravel())
    return share


def _rms(squared: np.ndarray, weight: np.ndarray) -> float:
    return float(np.sqrt((squared * weight).sum() / max(weight.sum(), 1e-30)))
