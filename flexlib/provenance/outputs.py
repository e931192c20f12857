"""The main outputs of a run, as far as they are there, each with what it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from flexlib.layout import GenerateFolder, ReconstructFolder, RunFolder, TrainFolder, ValidateFolder
from flexlib.workflow_support.points import SweepPoint

Output = tuple[Path, str]  # a file or a folder, and what it is


def main_outputs(run: RunFolder, points: Iterable[SweepPoint]) -> list[Output]:
    """The outputs that exist: those of the whole run first, then of each sweep point."""
    points = list(points)
    found = [
        (run.report, "The report, a page for a browser"),
        (run.summary, "The run in one picture"),
        (run.table, "The sweep: settings, held-out score, resolutions and time of each sweep point"),
        (run.best_point, "The chosen sweep point"),
        (run.particles.record, "What was prepared from which files"),
        (run.particles.particles, "The prepared particles"),
        (run.particles.mask, "The solvent mask at the training box"),
        *((run.mesh(path).mesh, "The tetrahedral mesh") for path in dict.fromkeys(point.mesh_path for point in points)),
    ]
    for point in points:
        found += _trained(run.train(point.path))
        found += _generated(run.generate(point.path))
        found += _reconstructed(run.reconstruct(point.path))
        found += _validated(run.validate(point.path))
    return [(path, what) for path, what in found if path.exists()]


def _trained(folder: TrainFolder) -> Iterator[Output]:
    yield folder.model, "The trained model: flow, latents and canonical map"
    yield folder.canonical, "The canonical map, at rest, at the training box"
    yield folder.latents, "Every input particle with its latent coordinates"
    yield folder.latents_cs, "The latent coordinates as CryoSPARC stores them"
    yield folder.refined, "Every input particle with its refined pose"
    yield folder.refined_cs, "The refined poses as CryoSPARC stores them"
    yield folder.validation, "Held-out score and figures of the training"
    yield folder.held_out, "The score of each held-out particle"
    yield folder.log, "The training, a line for each epoch"


def _generated(folder: GenerateFolder) -> Iterator[Output]:
    yield folder.table, "The series: latent coordinates of each map, and how many particles are near it"
    for path in sorted(folder.path.glob("*")):
        if path.is_dir():
            yield path, f"The maps and deformed meshes of the series {path.name}"
            yield folder.film(path.name), f"The film of the series {path.name}"


def _reconstructed(folder: ReconstructFolder) -> Iterator[Output]:
    for kind, how in (("flex", "with its motion undone"), ("rigid", "without motion")):
        for number in (1, 2):
            yield folder.half(kind, number), f"Half-map {number}, reconstructed {how}"
        yield folder.map(kind), f"The mean of the half-maps, reconstructed {how}"
    yield folder.sharpened, "The sharpened map"
    yield folder.local_resolution, "The local resolution, Angstrom"
    yield folder.moving_mask, "The part that moves"
    yield folder.fsc, "Half-map FSC curves"
    yield folder.resolution, "Resolutions of the half-maps"


def _validated(folder: ValidateFolder) -> Iterator[Output]:
    for number in (1, 2):
        half = folder.half(number)
        yield half.model, f"The model trained on half-set {number} alone"
        yield half.validation, f"Held-out score and figures of the training on half-set {number} alone"
        yield folder.half_map(number), f"Half-map {number}, reconstructed with its own half-set's model"
    yield folder.map, "The mean of the half-maps that share no model"
    yield folder.fsc, "FSC curves of the half-maps that share no model"
    yield folder.motion_error, "The error of the motion in each voxel, Angstrom"
    yield folder.motion_size, "The size of the motion in each voxel, Angstrom"
    yield folder.modes, "Agreement of the half-sets' models on the motion, by mode of the mesh"
    yield folder.latents, "The particles with their latents, corrected standard errors, and the error of their motion"
    yield folder.regions, "The error of the motion in regions of the latent space"
    yield folder.calibration, "The latents' standard errors, checked against the half-sets' models"
    yield folder.cross, "The score of each particle by the model of the other half-set"
    yield folder.record, "What the half-sets' models agree on"
