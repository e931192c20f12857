"""The files of a trained point."""

from __future__ import annotations

import csv
import json
import logging
from dataclasses import asdict
from pathlib import Path

import torch

from flexlib.files import atomic_path, write_json
from flexlib.imaging.maps import write_map
from flexlib.model.flex_model import MODEL_FILE, FlexModel
from flexlib.particles.latents_io import write_latents_cs, write_latents_star
from flexlib.train.motion import motion_coordinates_A, rms_displacement_A, rms_per_unit_A
from flexlib.train.score import HeldOutScore
from flexlib.train.spectral import SpectralStart
from flexlib.train.state import BAND_EPOCHS, Setup, State

logger = logging.getLogger(__name__)


def write_results(
    particles_dir: Path,
    out_dir: Path,
    setup: Setup,
    state: State,
    precision: torch.Tensor,
    score: HeldOutScore,
    rejected: HeldOutScore | None,
) -> None:
    write_log(out_dir / "log.csv", state.log)
    _write_spectrum(out_dir / "spectrum.csv", state.spectrum)
    _write_held_out(out_dir / "held_out.csv", setup, score)
    write_map(out_dir / "canonical.mrc", state.canonical.volume(), setup.source.pixel_size_A, like=setup.consensus)
    deviation = torch.linalg.inv(precision).diagonal(dim1=1, dim2=2).clamp(min=0).sqrt().cpu().numpy()
    motion_A, motion_share = motion_coordinates_A(setup, state)
    dims = setup.settings.latent_dims
    extra = {f"flexLatentStdErr{k + 1}": deviation[:, k] for k in range(dims)}
    extra |= {f"flexMotion{k + 1}Angst": motion_A[:, k] for k in range(dims)}
    latents = state.latents.cpu().numpy()
    write_latents_star(particles_dir, latents, out_dir / "latents.star", extra=extra)
    write_latents_cs(particles_dir, latents, out_dir / "latents.cs")
    write_json(
        out_dir / "validation.json",
        {
            "validation_gain": score.gain,
            "validation_gain_se": score.standard_error,
            "validation_particles": len(setup.validation_rows),
            "rejected_gain": rejected.gain if rejected else None,
            "rejected_gain_se": rejected.standard_error if rejected else None,
            "suggested_dims": state.spectrum.suggested_dims,
            "rms_displacement_A": rms_displacement_A(setup, state),
            "rms_displacement_per_unit_A": rms_per_unit_A(setup, state),
            "motion_share": [round(float(part), 4) for part in motion_share],
            "mean_strain": state.log[-1]["rigidity"] if state.log else None,
            "epochs": state.epoch,
            "band_shell": setup.band(BAND_EPOCHS),
            "num_particles": len(setup.source),
            "num_voxels": len(setup.operator.voxels.index),
            "num_vertices": len(setup.mesh.vertices_A),
            "num_cells": len(setup.mesh.cells),
            "wall_s": round(state.wall_s, 2),
        },
    )
    write_model(out_dir / MODEL_FILE, setup, state)
    logger.info(
        "done: held-out gain %.2f +- %.2f nats per particle, %.0f s", score.gain, score.standard_error, state.wall_s
    )


def write_model(path: Path, setup: Setup, state: State) -> None:
    plain = json.loads(json.dumps(asdict(setup.settings), default=str))
    FlexModel(
        setup.mesh,
        state.flow,
        state.latents.cpu().numpy(),
        state.canonical.volume(),
        setup.source.box,
        setup.source.pixel_size_A,
        plain,
        state.epoch,
    ).save(path)


def write_log(path: Path, log: list[dict[str, float]]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", newline="") as handle:
        names = list(log[0]) if log else ["epoch"]
        writer = csv.DictWriter(handle, names, lineterminator="\n")
        writer.writeheader()
        for entry in log:
            writer.writerow({k: f"{v:.6g}" for k, v in entry.items()})


def _write_held_out(path: Path, setup: Setup, score: HeldOutScore) -> None:
    """The score of each particle: points of a sweep with one seed hold out the same ones, so they can be paired."""
    with atomic_path(path) as temporary, temporary.open("w", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(["row", "gain"])
        for row, gain in zip(setup.validation_rows, score.gains, strict=True):
            writer.writerow([int(row), f"{gain:.6g}"])


def _write_spectrum(path: Path, spectrum: SpectralStart) -> None:
    with atomic_path(path) as temporary, temporary.open("w", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(["index", "eigenvalue", "noise_edge"])
        for index, value in enumerate(spectrum.eigenvalues, 1):
            writer.writerow([index, f"{value:.6g}", f"{spectrum.noise_edge:.6g}"])
