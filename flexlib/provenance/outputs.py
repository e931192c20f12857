"""The main outputs of a run, as far as they are there, each with what it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from flexlib.layout import GenerateFolder, ReconstructFolder, RunFolder, TrainFolder
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
