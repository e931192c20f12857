"""Where everything lies: the folders of a run, and the name of every file that a stage writes.

No other module knows a file's name. Paths may hold Snakemake's wildcards (``cells~{cells}``); nothing is read here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

MESH_PATTERN = "cells~{cells}"  # of a mesh below mesh/, as a Snakemake pattern
POINT_PATTERN = "cells~{cells}/dims~{dims}/rigidity~{rigidity}/seed~{seed}"  # of a sweep point below each later stage

CHECKPOINTS = "checkpoints"  # folder of a training under way

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Folder:
    """A folder of known content."""

    path: Path


@dataclass(frozen=True)
class ParticlesFolder(Folder):
    """What prepare writes."""

    @property
    def particles(self) -> Path:
        """The kept particles, a row for each symmetry copy."""
        return self.path / "particles.star"

    @property
    def images(self) -> Path:
        """The training images."""
        return self.path / "train.mrcs"

    @property
    def consensus(self) -> Path:
        """The consensus map at the training box."""
        return self.path / "consensus.mrc"

    @property
    def mask(self) -> Path:
        """The solvent mask at the training box."""
        return self.path / "mask.mrc"

    @property
    def full_consensus(self) -> Path:
        """The consensus map at the reconstruction box."""
        return self.path / "full" / "consensus.mrc"

    @property
    def full_mask(self) -> Path:
        """The solvent mask at the reconstruction box."""
        return self.path / "full" / "mask.mrc"

    @property
    def noise(self) -> Path:
        """Noise spectra of the optics groups."""
        return self.path / "noise.csv"

    @property
    def left_out(self) -> Path:
        """The images that are not used, and why."""
        return self.path / "left_out.csv"

    @property
    def outlying(self) -> Path:
        """The images that are used but unlike the others."""
        return self.path / "outlying.csv"

    @property
    def record(self) -> Path:
        """``records.PreparedRecord``."""
        return self.path / "prepared.json"


@dataclass(frozen=True)
class MeshFolder(Folder):
    """What mesh writes."""

    @property
    def mesh(self) -> Path:
        """The mesh."""
        return self.path / "mesh.vtu"

    @property
    def segments(self) -> Path:
        """The segment of each voxel; a single voxel of -1 where the mesh has no segment map."""
        return self.path / "segments.mrc"

    @property
    def tetra_index(self) -> Path:
        """The cell of each voxel."""
        return self.path / "tetra_index.mrc"

    @property
    def quality(self) -> Path:
        """Figures of the mesh."""
        return self.path / "mesh_quality.json"

    @property
    def chimerax(self) -> Path:
        """ChimeraX commands that show the mesh."""
        return self.path / "mesh.cxc"

    def bild(self, name: str) -> Path:
        """The mesh as coloured edges, for ChimeraX; ``name`` is "segments" or "rigidity"."""
        return self.path / f"mesh_{name}.bild"


@dataclass(frozen=True)
class TrainFolder(Folder):
    """What train writes for one sweep point."""

    @property
    def model(self) -> Path:
        """The finished model."""
        return self.path / "model.pt"

    @property
    def canonical(self) -> Path:
        """The canonical map."""
        return self.path / "canonical.mrc"

    @property
    def parts(self) -> Path:
        """The parts that some particles lack, as labels from 1."""
        return self.path / "occupancy_parts.mrc"

    @property
    def latents(self) -> Path:
        """The input particles with their latents."""
        return self.path / "latents.star"

    @property
    def latents_cs(self) -> Path:
        """The latents as CryoSPARC stores them, of a .cs input."""
        return self.path / "latents.cs"

    @property
    def refined(self) -> Path:
        """The input particles with refined poses, where they were refined."""
        return self.path / "particles_refined.star"

    @property
    def refined_cs(self) -> Path:
        """The same of a .cs input, as CryoSPARC stores them."""
        return self.path / "particles_refined.cs"

    @property
    def log(self) -> Path:
        """A line for each epoch."""
        return self.path / "log.csv"

    @property
    def spectrum(self) -> Path:
        """Eigenvalues of the spectral start."""
        return self.path / "spectrum.csv"

    @property
    def validation(self) -> Path:
        """``records.ValidationRecord``."""
        return self.path / "validation.json"

    @property
    def held_out(self) -> Path:
        """The score of each held-out particle."""
        return self.path / "held_out.csv"

    @property
    def cross(self) -> Path:
        """The score of the other half-set's particles, where one was trained alone."""
        return self.path / "cross.csv"

    @property
    def checkpoint(self) -> Path:
        """The state of a training under way."""
        return self.path / CHECKPOINTS / "checkpoint.pt"

    @property
    def checkpoint_model(self) -> Path:
        """The model of a training under way."""
        return self.path / CHECKPOINTS / "model.pt"


@dataclass(frozen=True)
class GenerateFolder(Folder):
    """What generate writes for one sweep point."""

    @property
    def table(self) -> Path:
        """A row for each frame of each series."""
        return self.path / "series.csv"

    def series(self, name: str) -> Path:
        """The folder of a series' frames."""
        return self.path / name

    def frame(self, name: str, number: int) -> Path:
        """One map of a series; its mesh is beside it as .vtu."""
        return self.path / name / f"frame_{number:03d}.mrc"

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

    @property
    def sharpened(self) -> Path:
        """The sharpened flexible map."""
        return self.path / "flex_sharpened.mrc"

    @property
    def local_resolution(self) -> Path:
        """The flexible map's local resolution."""
        return self.path / "flex_local_resolution.mrc"

    @property
    def moving_mask(self) -> Path:
        """The part that moves."""
        return self.path / "moving_mask.mrc"

    @property
    def fsc(self) -> Path:
        """Half-map FSC curves."""
        return self.path / "fsc.csv"

    @property
    def resolution(self) -> Path:
        """``records.ResolutionRecord``."""
        return self.path / "resolution.json"

    @property
    def convergence(self) -> Path:
        """The course of each solution."""
        return self.path / "convergence.csv"


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

    @property
    def benchmarks(self) -> Path:
        """Time and memory of each job, as Snakemake measures them."""
        return self.path / "benchmarks"

    @property
    def best_point(self) -> Path:
        """``records.ChoiceRecord``."""
        return self.path / "best_point.json"

    @property
    def table(self) -> Path:
        """A row for each sweep point."""
        return self.path / "sweep.csv"

    @property
    def report(self) -> Path:
        """The report."""
        return self.path / "report.html"

    @property
    def summary(self) -> Path:
        """One picture of the run, beside the report."""
        return self.path / "summary.png"

    @property
    def checksums(self) -> Path:
        """``records.ChecksumsRecord``."""
        return self.path / "checksums.json"

    @property
    def config(self) -> Path:
        """The checked config, complete with defaults."""
        return self.path / "config.yaml"

    @property
    def crate(self) -> Path:
        """Versions, config, inputs, outputs and command of the run, as an RO-Crate; the name is the standard's."""
        return self.path / "ro-crate-metadata.json"


@dataclass(frozen=True)
class SimulationFolder(Folder):
    """What simulate writes."""

    @property
    def particles(self) -> Path:
        """RELION's metadata."""
        return self.path / "particles.star"

    @property
    def particles_cs(self) -> Path:
        """CryoSPARC's metadata."""
        return self.path / "particles.cs"

    @property
    def images(self) -> Path:
        """The noisy images."""
        return self.path / "particles.mrcs"

    @property
    def consensus(self) -> Path:
        """A rigid reconstruction of them."""
        return self.path / "consensus.mrc"

    @property
    def truth(self) -> Path:
        """Hinge angles, half-sets, scale, limits."""
        return self.path / "truth.npz"

    @property
    def truth_mean(self) -> Path:
        """The mean map over all particles, without noise."""
        return self.path / "truth_mean.mrc"

    @property
    def truth_part(self) -> Path:
        """Labels of the molecule at rest: 1, and 2 where the part is that some particles lack."""
        return self.path / "truth_part.mrc"

    def truth_state(self, number: int) -> Path:
        """The map of a state, without noise."""
        return self.path / f"truth_state_{number}.mrc"


def find_run(path: PathLike) -> RunFolder | None:
    """The run that a path belongs to: the nearest parent with prepared particles; None where there is none."""
    folders = (RunFolder(parent) for parent in Path(path).absolute().parents)
    return next((run for run in folders if run.particles.record.is_file()), None)
