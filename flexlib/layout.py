"""Where everything lies: the folders of a run, and the name of every file that a stage writes.

No other module knows a file's name. Paths may hold Snakemake's wildcards (``cells~{cells}``); nothing is read here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

MESH_PATTERN = "cells~{cells}"  # of a mesh below mesh/, as a Snakemake pattern
POINT_PATTERN = "cells~{cells}/dims~{dims}/rigidity~{rigidity}/seed~{seed}"  # of a sweep point below each later stage
HALF_PATTERN = "half{half}"  # of the training of a half-set, 1 or 2, below its sweep point
CHECKPOINTS = "checkpoints"  # folder of a training under way

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Folder:
    """A folder of known content."""

    path: Path


class File:
    """A file of a folder, by its path from there: an attribute of the folder's class."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, folder: Folder, kind: type[Folder] | None = None) -> Path:
        return folder.path / self._name


@dataclass(frozen=True)
class ParticlesFolder(Folder):
    """What prepare writes."""

    particles = File("particles.star")
    """The kept particles, a row for each symmetry copy."""
    images = File("train.mrcs")
    """The training images."""
    consensus = File("consensus.mrc")
    """The consensus map at the training box."""
    mask = File("mask.mrc")
    """The solvent mask at the training box."""
    full_consensus = File("full/consensus.mrc")
    """The consensus map at the reconstruction box."""
    full_mask = File("full/mask.mrc")
    """The solvent mask at the reconstruction box."""
    noise = File("noise.csv")
    """Noise spectra of the optics groups."""
    left_out = File("left_out.csv")
    """The images that are not used, and why."""
    outlying = File("outlying.csv")
    """The images that are used but unlike the others."""
    record = File("prepared.json")
    """``records.PreparedRecord``."""


@dataclass(frozen=True)
class MeshFolder(Folder):
    """What mesh writes."""

    mesh = File("mesh.vtu")
    """The mesh."""
    segments = File("segments.mrc")
    """The segment of each voxel; a single voxel of -1 where the mesh has no segment map."""
    tetra_index = File("tetra_index.mrc")
    """The cell of each voxel."""
    quality = File("mesh_quality.json")
    """Figures of the mesh."""
    chimerax = File("mesh.cxc")
    """ChimeraX commands that show the mesh."""

    def bild(self, name: str) -> Path:
        """The mesh as coloured edges, for ChimeraX; ``name`` is "segments" or "rigidity"."""
        return self.path / f"mesh_{name}.bild"


@dataclass(frozen=True)
class TrainFolder(Folder):
    """What train writes for one sweep point."""

    model = File("model.pt")
    """The finished model."""
    canonical = File("canonical.mrc")
    """The canonical map."""
    parts = File("occupancy_parts.mrc")
    """The parts that some particles lack, as labels from 1."""
    latents = File("latents.star")
    """The input particles with their latents."""
    latents_cs = File("latents.cs")
    """The latents as CryoSPARC stores them, of a .cs input."""
    refined = File("particles_refined.star")
    """The input particles with refined poses, where they were refined."""
    refined_cs = File("particles_refined.cs")
    """The same of a .cs input, as CryoSPARC stores them."""
    log = File("log.csv")
    """A line for each epoch."""
    spectrum = File("spectrum.csv")
    """Eigenvalues of the spectral start."""
    validation = File("validation.json")
    """``records.ValidationRecord``."""
    held_out = File("held_out.csv")
    """The score of each held-out particle."""
    cross = File("cross.csv")
    """The score of each particle of the other half-set, where a half-set was trained."""
    checkpoint = File(f"{CHECKPOINTS}/checkpoint.pt")
    """The state of a training under way."""
    checkpoint_model = File(f"{CHECKPOINTS}/model.pt")
    """The model of a training under way."""


@dataclass(frozen=True)
class GenerateFolder(Folder):
    """What generate writes for one sweep point."""

    table = File("series.csv")
    """A row for each frame of each series."""

    def series(self, name: str) -> Path:
        """The folder of a series' frames."""
        return self.path / name

    def frame(self, name: str, number: int) -> Path:
        """One map of a series; its mesh is beside it as .vtu."""
        return self.path / name / f"frame_{number:03d}.mrc"

    def ensemble(self, name: str) -> Path:
        """The atomic model along a series, a model a frame."""
        return self.path / name / "ensemble.cif"

    def residues(self, name: str) -> Path:
        """How far each of its residues moves."""
        return self.path / name / "residues.csv"

    def geometry(self, name: str) -> Path:
        """What the motion does to its bonds and angles, for each frame."""
        return self.path / name / "geometry.csv"

    def chimerax(self, name: str) -> Path:
        """ChimeraX commands that play a series."""
        return self.path / f"{name}.cxc"

    def film(self, name: str) -> Path:
        """The film of a series."""
        return self.path / f"{name}.webp"


@dataclass(frozen=True)
class ReconstructFolder(Folder):
    """What reconstruct writes for one sweep point; ``kind`` is "flex" or "rigid"."""

    def half(self, kind: str, number: int) -> Path:
        """A half-map, 1 or 2."""
        return self.path / f"{kind}_half{number}.mrc"

    def map(self, kind: str) -> Path:
        """The mean of the half-maps."""
        return self.path / f"{kind}_map.mrc"

    sharpened = File("flex_sharpened.mrc")
    """The sharpened flexible map."""
    local_resolution = File("flex_local_resolution.mrc")
    """The flexible map's local resolution."""
    moving_mask = File("moving_mask.mrc")
    """The part that moves."""
    fsc = File("fsc.csv")
    """Half-map FSC curves."""
    resolution = File("resolution.json")
    """``records.ResolutionRecord``."""
    convergence = File("convergence.csv")
    """The course of each solution."""


@dataclass(frozen=True)
class ValidateFolder(Folder):
    """What validate writes for one sweep point, beside the trainings of its halves."""

    def half(self, number: int | str = "{half}") -> TrainFolder:
        """What train writes for the particles of half-set 1 or 2 alone; by default with a wildcard."""
        return TrainFolder(self.path / HALF_PATTERN.format(half=number))

    def half_map(self, number: int) -> Path:
        """The half-map 1 or 2 that the half-set's own model makes."""
        return self.path / f"independent_half{number}.mrc"

    map = File("independent_map.mrc")
    """The mean of these half-maps."""
    fsc = File("fsc.csv")
    """Their FSC curves."""
    motion_error = File("motion_error.mrc")
    """The error of the motion in each voxel, rms over the particles, Angstrom."""
    motion_size = File("motion_size.mrc")
    """The motion itself in each voxel, rms over the particles, Angstrom."""
    modes = File("modes.csv")
    """How far the two models agree on the motion along each mode of the mesh."""
    latents = File("latents.star")
    """The input particles with their latents, corrected standard errors, and the error of their motion."""
    regions = File("regions.csv")
    """The error of the motion in regions of the latent space."""
    calibration = File("calibration.csv")
    """The latents' standard errors beside how far the two models differ."""
    cross = File("cross.csv")
    """The score of each particle by the model of the other half-set."""
    convergence = File("convergence.csv")
    """The course of each half-map's solution."""
    record = File("validation.json")
    """``records.AgreementRecord``."""


@dataclass(frozen=True)
class InterpretFolder(Folder):
    """What interpret writes for one sweep point."""

    bodies = File("bodies.csv")
    """The quasi-rigid bodies of the motion."""
    hinges = File("hinges.csv")
    """The hinge between each pair of bodies: axis and range."""
    labels = File("bodies.mrc")
    """The body of each voxel, from 1."""
    rotation = File("rotation.mrc")
    """How far each voxel's surroundings turn, rms over the particles, degrees."""
    strain = File("strain.mrc")
    """How far each voxel's surroundings are strained, rms over the particles."""
    deformation = File("deformation.vtu")
    """The mesh with the same figures for each cell."""
    arrows = File("hinges.bild")
    """The hinges as arrows, for ChimeraX."""

    def body_poses(self, number: int) -> Path:
        """The input particles with the poses of one body, from 1."""
        return self.path / f"body_{number}.star"

    def body_mask(self, number: int) -> Path:
        """The soft mask of one body, from 1."""
        return self.path / f"body_{number}_mask.mrc"

    landscape = File("landscape.csv")
    """Density of the conformations and free energy, with their errors, on a grid of latents."""
    populations = File("populations.csv")
    """Share of the particles in each cluster and each region, with its confidence interval."""
    path_points = File("path.csv")
    """The path of least free energy, as latents."""
    conditions = File("conditions.csv")
    """Populations by condition, and how likely the difference is by chance."""
    embeddings = File("embeddings.csv")
    """How far latents of other methods agree with these."""
    record = File("interpretation.json")
    """``records.InterpretationRecord``."""

    @property
    def series(self) -> GenerateFolder:
        """Maps along the path of least free energy."""
        return GenerateFolder(self.path / "path")


@dataclass(frozen=True)
class RunFolder(Folder):
    """``results/<name>``: everything of one run. A ``point`` is a sweep point's path, or ``POINT_PATTERN``."""

    @property
    def particles(self) -> ParticlesFolder:
        """Of prepare."""
        return ParticlesFolder(self.path / "particles")

    def mesh(self, point: str = MESH_PATTERN) -> MeshFolder:
        """Of mesh, at one coarseness."""
        return MeshFolder(self.path / "mesh" / point)

    def train(self, point: str = POINT_PATTERN) -> TrainFolder:
        """Of train."""
        return TrainFolder(self.path / "train" / point)

    def generate(self, point: str = POINT_PATTERN) -> GenerateFolder:
        """Of generate."""
        return GenerateFolder(self.path / "generate" / point)

    def reconstruct(self, point: str = POINT_PATTERN) -> ReconstructFolder:
        """Of reconstruct."""
        return ReconstructFolder(self.path / "reconstruct" / point)

    def validate(self, point: str = POINT_PATTERN) -> ValidateFolder:
        """Of validate."""
        return ValidateFolder(self.path / "validate" / point)

    def interpret(self, point: str = POINT_PATTERN) -> InterpretFolder:
        """Of interpret."""
        return InterpretFolder(self.path / "interpret" / point)

    benchmarks = File("benchmarks")
    """Time and memory of each job, as Snakemake measures them."""
    best_point = File("best_point.json")
    """``records.ChoiceRecord``."""
    table = File("sweep.csv")
    """A row for each sweep point."""
    report = File("report.html")
    """The report."""
    summary = File("summary.png")
    """One picture of the run, beside the report."""
    scene = File("chimerax.cxc")
    """ChimeraX commands that open everything of the chosen sweep point, beside the report."""
    checksums = File("checksums.json")
    """``records.ChecksumsRecord``."""
    config = File("config.yaml")
    """The checked config, complete with defaults."""
    crate = File("ro-crate-metadata.json")
    """Versions, config, inputs, outputs and command of the run, as an RO-Crate; the name is the standard's."""


@dataclass(frozen=True)
class SimulationFolder(Folder):
    """What simulate writes."""

    particles = File("particles.star")
    """RELION's metadata."""
    particles_cs = File("particles.cs")
    """CryoSPARC's metadata."""
    images = File("particles.mrcs")
    """The noisy images."""
    consensus = File("consensus.mrc")
    """A rigid reconstruction of them."""
    truth = File("truth.npz")
    """Hinge angles, half-sets, scale, limits."""
    truth_mean = File("truth_mean.mrc")
    """The mean map over all particles, without noise."""
    truth_part = File("truth_part.mrc")
    """Labels of the molecule at rest: 1, and 2 where the part is that some particles lack."""

    def truth_state(self, number: int) -> Path:
        """The map of a state, without noise."""
        return self.path / f"truth_state_{number}.mrc"


def find_run(path: PathLike) -> RunFolder | None:
    """The run that a path belongs to: the nearest parent with prepared particles; None where there is none."""
    folders = (RunFolder(parent) for parent in Path(path).absolute().parents)
    return next((run for run in folders if run.particles.record.is_file()), None)
