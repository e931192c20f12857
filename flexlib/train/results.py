"""The files of a trained sweep point."""

from __future__ import annotations

import csv
import json
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flexlib.files import atomic_path
from flexlib.imaging.maps import write_label_map, write_map
from flexlib.layout import TrainFolder
from flexlib.model.flex_model import FlexModel
from flexlib.model.views import ROTATION, SHIFT, ViewPrior, pose_change
from flexlib.particles.latents_write import write_latents_cs, write_latents_star
from flexlib.particles.pose_change import PoseChange
from flexlib.particles.refined_write import refined_particles, write_refined_cs, write_refined_star
from flexlib.records import ValidationRecord
from flexlib.runtime import describe_device
from flexlib.train.describe_parts import PartResults
from flexlib.train.entanglement import entanglement
from flexlib.train.finish import Inferred
from flexlib.train.junk import MOST_LOG_ODDS
from flexlib.train.motion import motion_coordinates_A, rms_displacement_A, rms_per_unit_A
from flexlib.train.score import HeldOutScore
from flexlib.train.setup import Setup
from flexlib.train.spectral import SpectralStart
from flexlib.train.state import State
from flexlib.train.views import Views

logger = logging.getLogger(__name__)

NO_PARTS = PartResults()


@dataclass(frozen=True)
class Scores:
    """The held-out scores of a finished run."""

    own: HeldOutScore  # of the model as it is
    rejected: HeldOutScore | None  # of the model that did not convince and was set to rest
    cross: HeldOutScore | None = None  # of the other half-set's particles, where one was trained alone


def write_results(
    out: TrainFolder,
    setup: Setup,
    state: State,
    found: Inferred,
    scores: Scores,
    parts: PartResults,
) -> None:
    """Write everything of a finished run.

    Parameters
    ----------
    out
        Where.
    setup, state
        The run.
    found
        What ``finish.infer_all`` gives.
    scores
        As ``finish.final_score`` and ``place.place_all`` give them.
    parts
        What ``describe_parts`` gives.
    """
    score = scores.own
    write_log(out.log, state.log)
    _write_spectrum(out.spectrum, state.spectrum)
    _write_held_out(out.held_out, score)
    if scores.cross is not None:
        _write_held_out(out.cross, scores.cross)
    write_map(out.canonical, state.canonical.volume(), setup.source.pixel_size_A, like=setup.consensus)
    covariance = torch.linalg.inv(found.latent_precision)
    deviation = covariance.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt().cpu().numpy()
    motion_A, motion_share = motion_coordinates_A(setup, state)
    dims = setup.settings.latent_dims
    extra = {f"flexLatentStdErr{k + 1}": deviation[:, k] for k in range(dims)}
    extra |= {f"flexMotion{k + 1}Angst": motion_A[:, k] for k in range(dims)}
    extra["flexLatentModes"] = found.num_modes.cpu().numpy()
    if setup.settings.find_junk:
        log_odds = state.junk.particle_log_odds()
        extra["flexParticleProbability"] = torch.sigmoid(log_odds).cpu().numpy()
        extra["flexParticleLogOdds"] = log_odds.clamp(-MOST_LOG_ODDS, MOST_LOG_ODDS).cpu().numpy()
    if parts.probability is not None:
        extra |= {f"flexOccupancy{k + 1}": column for k, column in enumerate(parts.probability.T)}
    _write_parts(out.parts, setup, parts)
    latents = state.latents.cpu().numpy()
    write_latents_star(setup.particles.path, latents, out.latents, extra=extra)
    write_latents_cs(setup.particles.path, latents, out.latents_cs)
    change, errors = refined_views(setup, state.views, state.latents), found.view_std_err.cpu()
    turn_error, shift_error = (errors[:, kind].square().sum(1).sqrt().numpy() for kind in (ROTATION, SHIFT))
    write_refined(out, setup.particles.path, change, turn_error, shift_error)
    validation_record(setup, state, motion_share, scores, parts).write(out.validation)
    write_model(out.model, setup, state, parts, covariance)
    logger.info(
        "done: held-out gain %.2f +- %.2f nats per particle, %.0f s", score.gain, score.standard_error, state.wall_s
    )


def write_refined(
    out: TrainFolder,
    particles_path: Path,
    change: PoseChange | None,
    rotation_std_err_rad: np.ndarray | None = None,
    shift_std_err_A: np.ndarray | None = None,
) -> None:
    """Write the user's particles with refined poses; remove what an earlier training left where none were refined.

    Parameters
    ----------
    out
        Where.
    particles_path
        Folder that prepare wrote.
    change
        Of all n prepared rows, under the flexible model; None where poses were not refined.
    rotation_std_err_rad, shift_std_err_A
        (n,) their standard errors; nan where they are not known.
    """
    if change is None:
        for path in (out.refined, out.refined_cs, out.refined_cs.with_suffix(".csg")):
            path.unlink(missing_ok=True)
        return
    unknown = np.full(len(change), np.nan)
    rotation_error = unknown if rotation_std_err_rad is None else rotation_std_err_rad
    shift_error = unknown if shift_std_err_A is None else shift_std_err_A
    refined = refined_particles(particles_path, change, rotation_error, shift_error)
    write_refined_star(refined, out.refined)
    write_refined_cs(refined, out.refined_cs)


def validation_record(
    setup: Setup,
    state: State,
    motion_share: np.ndarray,
    scores: Scores,
    parts: PartResults,
) -> ValidationRecord:
    """What the run came to; ``motion_share`` (K,) of ``motion_coordinates_A``, the rest as for ``write_results``."""
    score, rejected = scores.own, scores.rejected
    images, probability = setup.source.particles.image_index, state.junk.probability()[:, None]
    latents = torch.where(probability >= 0.5, state.latents, torch.nan).cpu().numpy()  # of junk they say nothing
    told = entanglement(
        latents, setup.source.particles, refined_views(setup, state.views, state.latents), setup.settings.seed
    )
    return ValidationRecord(
        validation_gain=score.gain,
        validation_gain_se=score.standard_error,
        validation_particles=len(score.gains),
        validation_rows=len(setup.validation_rows),
        held_out_by="micrograph" if setup.by_micrograph else "image",
        held_out_micrographs=setup.held_out_micrographs,
        rejected_gain=rejected.gain if rejected else None,
        rejected_gain_se=rejected.standard_error if rejected else None,
        suggested_dims=state.spectrum.suggested_dims,
        rms_displacement_A=rms_displacement_A(setup, state),
        rms_displacement_per_unit_A=rms_per_unit_A(setup, state),
        motion_share=[round(float(part), 4) for part in motion_share],
        mean_strain=state.log[-1]["rigidity"] if state.log else None,
        epochs=state.epoch,
        band_shell=setup.schedule.full_band,
        num_particles=len(np.unique(images)),
        num_rows=len(images),
        num_voxels=len(setup.operator.voxels.index),
        num_vertices=len(setup.mesh.vertices_A),
        num_cells=len(setup.mesh.cells),
        wall_s=round(state.wall_s, 2),
        device=describe_device(setup.device),
        entanglement=[asdict(one) for one in told],
        occupancy=parts.records,
        **_widths(state.views.prior),
        junk_share=round(state.junk.share, 5) if setup.settings.find_junk else None,
    )


def _widths(prior: ViewPrior | None) -> dict[str, float | None]:
    """The learnt widths of poses and contrasts as the record has them."""
    names = ("pose_rotation_deg", "pose_shift_A", "contrast_sd")
    if prior is None:
        return dict.fromkeys(names)
    values = (math.degrees(prior.rotation_rad) * 3**0.5, prior.shift_A, prior.log_contrast)
    return {name: round(value, 5) for name, value in zip(names, values, strict=True)}


def _write_parts(path: Path, setup: Setup, parts: PartResults) -> None:
    """Write the parts as a label map; remove what an earlier training left where there are none."""
    if parts.labels is None:
        path.unlink(missing_ok=True)
        return
    write_label_map(path, parts.labels, setup.source.pixel_size_A, like=setup.consensus)


def write_model(
    path: Path, setup: Setup, state: State, parts: PartResults = NO_PARTS, covariance: torch.Tensor | None = None
) -> None:
    """Write the model as it stands; ``parts``, and the latents' ``covariance`` (n, K, K), are known at the end."""
    plain = json.loads(json.dumps(asdict(setup.settings), default=str))
    FlexModel(
        mesh=setup.mesh,
        flow=state.flow,
        latents=state.latents.cpu().numpy(),
        canonical=state.canonical.volume(),
        box=setup.source.box,
        pixel_size_A=setup.source.pixel_size_A,
        settings=plain,
        epoch=state.epoch,
        pose=refined_views(setup, state.views, state.latents),
        rigid_pose=refined_views(setup, state.rigid_views, state.latents[:, :0]),
        latent_covariance=None if covariance is None else covariance.float().cpu().numpy(),
        probability=state.junk.probability().cpu().numpy(),
        parts=parts.labels,
        occupancy=parts.probability,
        occupancy_share=parts.share,
    ).save(path)


def refined_views(setup: Setup, views: Views, latents: torch.Tensor) -> PoseChange | None:
    """How the input's poses and contrasts were changed at latents (n, K); None where they were taken for exact."""
    return None if views.prior is None else pose_change(views.own(latents, setup.rotation))


def write_log(path: Path, log: list[dict[str, float]]) -> None:
    """Write a line for each epoch."""
    names = list(log[0]) if log else ["epoch"]
    _write_table(path, names, ([f"{entry[name]:.6g}" for name in names] for entry in log))


def _write_held_out(path: Path, score: HeldOutScore) -> None:
    """The score of each particle: all sweep points hold out the same ones, so they can be paired."""
    lines = zip(score.rows, score.gains, strict=True)
    _write_table(path, ["row", "gain"], ([int(row), f"{gain:.6g}"] for row, gain in lines))


def _write_spectrum(path: Path, spectrum: SpectralStart) -> None:
    edge = f"{spectrum.noise_edge:.6g}"
    lines = ([index, f"{value:.6g}", edge] for index, value in enumerate(spectrum.eigenvalues, 1))
    _write_table(path, ["index", "eigenvalue", "noise_edge"], lines)


def _write_table(path: Path, names: Sequence[str], lines: Iterable[Sequence[Any]]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(lines)
