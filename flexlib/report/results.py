"""What a results folder holds, read piece by piece; a piece that is not there is None (or empty)."""

from __future__ import annotations

import itertools
import logging
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from flexlib.errors import InputError
from flexlib.files import read_json, reading
from flexlib.imaging.maps import Map, read_map
from flexlib.layout import POINT_PATTERN, GenerateFolder, MeshFolder, ReconstructFolder, RunFolder, TrainFolder
from flexlib.particles.input_rows import latent_columns
from flexlib.particles.latents_table import PROBABILITY
from flexlib.particles.star import StarTables, read_tables
from flexlib.records import ChecksumsRecord, ChoiceRecord, PreparedRecord, Record, ResolutionRecord, ValidationRecord
from flexlib.tetra.tetmesh import TetraMesh
from flexlib.workflow_support.points import SweepPoint
from flexlib.workflow_support.settings import Align, GenerateSettings

logger = logging.getLogger(__name__)

LEAST_PROBABILITY = 0.5  # of an image that is taken for a particle
_NO_POINT = "no-sweep-point"  # a folder that no run has

AnyRecord = TypeVar("AnyRecord", bound=Record)


@dataclass(frozen=True)
class Series:
    """The maps of one motion, in order."""

    name: str  # folder name, e.g. axis_1
    frames: tuple[Path, ...]


@dataclass(frozen=True)
class Results:
    """One results/<name> folder."""

    root: Path
    config: dict[str, Any]
    truth_path: Path | None = None

    @property
    def run(self) -> RunFolder:
        """Where everything lies."""
        return RunFolder(self.root)

    @property
    def name(self) -> str:
        """The run's name."""
        return str(self.config.get("name") or self.root.name)

    @property
    def align(self) -> Align:
        """What is at rest in the generated maps, as the configuration says."""
        return (self.config.get("generate") or {}).get("align", GenerateSettings.align)

    # what went in -----------------------------------------------------------------------------------------------

    @cached_property
    def particles(self) -> pd.DataFrame | None:
        """Prepared particles, RELION's columns without the prefix ``rln``: a row for each symmetry copy."""
        return None if self._prepared_star is None else _bare_names(self._prepared_star.particles)

    @cached_property
    def optics(self) -> pd.DataFrame | None:
        """The optics groups of the prepared particles, named likewise."""
        tables = self._prepared_star
        return None if tables is None or tables.optics is None else _bare_names(tables.optics)

    @cached_property
    def _prepared_star(self) -> StarTables | None:
        path = self.run.particles.particles
        return read_tables(path) if path.exists() else None

    @cached_property
    def prepared(self) -> PreparedRecord | None:
        """What prepare read and made."""
        return record_at(PreparedRecord, self.run.particles.record)

    @cached_property
    def noise(self) -> pd.DataFrame | None:
        """Noise spectra of the optics groups."""
        return table_at(self.run.particles.noise)

    @cached_property
    def consensus(self) -> Map | None:
        """The consensus map at the training box."""
        return map_at(self.run.particles.consensus)

    @cached_property
    def mask(self) -> Map | None:
        """The solvent mask at the training box."""
        return map_at(self.run.particles.mask)

    @cached_property
    def full_mask(self) -> Map | None:
        """The solvent mask at the reconstruction box."""
        return map_at(self.run.particles.full_mask)

    # the sweep and its chosen point -----------------------------------------------------------------------------

    @cached_property
    def sweep(self) -> pd.DataFrame | None:
        """The table of sweep points, with ``chosen`` as bool."""
        table = table_at(self.run.table)
        if table is not None and "chosen" in table:
            table["chosen"] = table["chosen"].astype(str).str.lower().isin(["true", "1", "yes", "1.0"])
        return table

    @cached_property
    def chosen(self) -> SweepPoint | None:
        """The chosen sweep point: the table's, else the recorded choice, else the first trained one found."""
        if self.sweep is not None and "chosen" in self.sweep and self.sweep["chosen"].any():
            row = self.sweep[self.sweep["chosen"]].iloc[0]
            return SweepPoint(int(row["cells"]), int(row["latent_dims"]), float(row["rigidity"]), int(row["seed"]))
        choice = record_at(ChoiceRecord, self.run.best_point)
        if choice is not None:
            return SweepPoint(choice.cells, choice.latent_dims, choice.rigidity, choice.seed)
        return min(points_below(self.run.train("").path), key=lambda point: point.path, default=None)

    @property
    def _point_path(self) -> str:
        return _NO_POINT if self.chosen is None else self.chosen.path

    @property
    def mesh_folder(self) -> MeshFolder:
        """What mesh wrote for the chosen sweep point."""
        return self.run.mesh(_NO_POINT if self.chosen is None else self.chosen.mesh_path)

    @property
    def train_folder(self) -> TrainFolder:
        """What train wrote for the chosen sweep point."""
        return self.run.train(self._point_path)

    @property
    def generate_folder(self) -> GenerateFolder:
        """What generate wrote for the chosen sweep point."""
        return self.run.generate(self._point_path)

    @property
    def reconstruct_folder(self) -> ReconstructFolder:
        """What reconstruct wrote for the chosen sweep point."""
        return self.run.reconstruct(self._point_path)

    # mesh and training ------------------------------------------------------------------------------------------

    @cached_property
    def mesh(self) -> TetraMesh | None:
        """The chosen sweep point's mesh."""
        path = self.mesh_folder.mesh
        if not path.exists():
            return None
        from flexlib.tetra.io import read_mesh

        return read_mesh(path)

    @cached_property
    def mesh_quality(self) -> dict[str, Any]:
        """Figures of the mesh."""
        path = self.mesh_folder.quality
        return read_json(path) if path.exists() else {}

    @cached_property
    def log(self) -> pd.DataFrame | None:
        """The training, a row for each epoch."""
        return table_at(self.train_folder.log)

    @cached_property
    def spectrum(self) -> pd.DataFrame | None:
        """Eigenvalues of the spectral start and the noise edge."""
        return table_at(self.train_folder.spectrum)

    @cached_property
    def validation(self) -> ValidationRecord | None:
        """What the training came to."""
        return record_at(ValidationRecord, self.train_folder.validation)

    @cached_property
    def latents(self) -> pd.DataFrame | None:
        """One row per particle (and symmetry copy) with latents: z1..zK, ``row`` in the input file, ``copy``.

        Beside them whatever can colour a plot: ``True angle 1 (deg)``... with truth, ``Half-set``, ``Defocus (µm)``,
        ``View tilt (deg)``, and every numeric column of latents.star that varies, under its name there (without
        ``rln``). Images that more likely show no particle are left out.
        """
        table = self.all_latents
        if table is None or "z1" not in table:
            return None
        known = np.isfinite(table["z1"]).to_numpy() & ~self._junk
        own = [name for name in table if name in ("row", "copy") or re.fullmatch(r"z\d+", name)]
        latents = self._add_truth(table[own])[known].reset_index(drop=True)
        further = table.loc[known].drop(columns=own)
        further = further.loc[:, further.nunique() > 1].reset_index(drop=True)
        return pd.concat([self._add_particle_columns(latents), further], axis=1)

    @cached_property
    def num_input(self) -> int | None:
        """Particles of the user's file, kept or not, if known."""
        if self.prepared is not None:
            return self.prepared.num_input
        return None if self.all_latents is None else int(self.all_latents["row"].nunique())

    @property
    def num_junk(self) -> int:
        """Rows that ``latents`` leaves out because they more likely show no particle."""
        table = self.all_latents
        return (
            0 if table is None or "z1" not in table else int((np.isfinite(table["z1"]).to_numpy() & self._junk).sum())
        )

    @property
    def _junk(self) -> np.ndarray:
        """(m,) bool over ``all_latents``."""
        table = self.all_latents
        assert table is not None
        if PROBABILITY not in table:
            return np.zeros(len(table), bool)
        return (table[PROBABILITY] < LEAST_PROBABILITY).to_numpy()

    @cached_property
    def all_latents(self) -> pd.DataFrame | None:
        """Every row of latents.star: ``z1``..K, ``row``, ``copy`` and its further columns of numbers."""
        path = self.train_folder.latents
        return _read_latents(path) if path.exists() else None

    def _add_truth(self, latents: pd.DataFrame) -> pd.DataFrame:
        if self.truth_path is None or not self.truth_path.exists():
            return latents
        with np.load(self.truth_path) as truth:
            angles = np.degrees(truth["angles_rad"]) if "angles_rad" in truth else np.zeros((0, 0))
        angles = angles[:, None] if angles.ndim == 1 else angles
        if len(angles) != len(latents):
            return latents
        return latents.assign(**{f"True angle {i + 1} (deg)": angles[:, i] for i in range(angles.shape[1])})

    def _add_particle_columns(self, latents: pd.DataFrame) -> pd.DataFrame:
        particles = self.particles
        if particles is None or "flexInputRow" not in particles:
            return latents
        keys = particles.assign(row=particles["flexInputRow"].astype(int), copy=particles.get("flexSymmetryCopy", 0))
        own = keys.set_index(["row", "copy"]).reindex(pd.MultiIndex.from_frame(latents[["row", "copy"]]))
        if "RandomSubset" in own:
            latents = latents.assign(**{"Half-set": own["RandomSubset"].to_numpy()})
        if "DefocusU" in own and "DefocusV" in own:
            defocus_um = (own["DefocusU"].astype(float) + own["DefocusV"].astype(float)).to_numpy() / 2e4
            latents = latents.assign(**{"Defocus (µm)": defocus_um})
        if "AngleTilt" in own:
            latents = latents.assign(**{"View tilt (deg)": own["AngleTilt"].astype(float).to_numpy()})
        return latents

    @property
    def latent_dims(self) -> int:
        """K of the latents table."""
        return 0 if self.latents is None else sum(c[0] == "z" and c[1:].isdigit() for c in self.latents)

    @property
    def truth_names(self) -> list[str]:
        """Columns of ``latents`` that hold the truth of a simulation."""
        return [] if self.latents is None else [c for c in self.latents if c.startswith("True angle")]

    # motion and reconstruction ----------------------------------------------------------------------------------

    @cached_property
    def series(self) -> list[Series]:
        """Generated series of the chosen sweep point that have frames."""
        folder = self.generate_folder
        found = []
        for name in sorted(path.name for path in folder.path.glob("*") if path.is_dir()):
            frames = (folder.frame(name, number) for number in itertools.count())
            found.append(Series(name, tuple(itertools.takewhile(Path.exists, frames))))
        return [series for series in found if series.frames]

    @cached_property
    def series_latents(self) -> pd.DataFrame | None:
        """``series``, ``frame``, ``latent_1``..K, ``num_particles``, ``beyond_data`` of every generated frame."""
        return table_at(self.generate_folder.table)

    @cached_property
    def convergence(self) -> pd.DataFrame | None:
        """``half``, ``model``, ``iteration``, ``objective``, ``relative_gradient`` of the reconstruction."""
        return table_at(self.reconstruct_folder.convergence)

    @cached_property
    def resolution(self) -> ResolutionRecord | None:
        """What the reconstruction came to."""
        return record_at(ResolutionRecord, self.reconstruct_folder.resolution)

    @property
    def unconverged(self) -> list[str]:
        """Half-maps whose solution was stopped by the count of iterations: "flex half 1"."""
        converged = {} if self.resolution is None else self.resolution.converged
        return [name.replace("_half", " half ") for name, is_so in converged.items() if not is_so]

    @cached_property
    def fsc(self) -> pd.DataFrame | None:
        """Half-map FSC curves of the chosen sweep point."""
        return table_at(self.reconstruct_folder.fsc)

    def reconstructed(self, kind: str) -> Map | None:
        """``kind`` "flex" or "rigid": the mean of the two half-maps, or the combined map where there are none."""
        folder = self.reconstruct_folder
        halves = [map_at(folder.half(kind, number)) for number in (1, 2)]
        if halves[0] is not None and halves[1] is not None:
            return Map(0.5 * (halves[0].data + halves[1].data), halves[0].pixel_size_A)
        return map_at(folder.map(kind))

    @property
    def reconstructed_maps(self) -> list[tuple[str, Map]]:
        """("rigid", map) and ("flexible", map), as far as they are there."""
        pairs = [(label, self.reconstructed(kind)) for kind, label in (("rigid", "rigid"), ("flex", "flexible"))]
        return [(label, map_) for label, map_ in pairs if map_ is not None]

    @property
    def reconstruction_mask(self) -> Map | None:
        """The mask that fits the reconstructed maps."""
        return self.full_mask if self.full_mask is not None else self.mask

    # provenance -------------------------------------------------------------------------------------------------

    @cached_property
    def checksums(self) -> ChecksumsRecord | None:
        """What the input files were."""
        return record_at(ChecksumsRecord, self.run.checksums)

    @cached_property
    def benchmarks(self) -> pd.DataFrame:
        """Snakemake's benchmark files: rule (path below benchmarks/), seconds, peak memory in MB."""
        rows = []
        for path in sorted(self.run.benchmarks.rglob("*.tsv")):
            table = pd.read_csv(path, sep="\t", na_values="-")
            if len(table) and "s" in table:
                label = path.relative_to(self.run.benchmarks).with_suffix("").as_posix()
                rows.append((label, float(table["s"].mean()), float(table.get("max_rss", pd.Series([np.nan])).mean())))
        return pd.DataFrame(rows, columns=["rule", "seconds", "memory_MB"])


def _read_latents(path: Path) -> pd.DataFrame:
    """z1..zK (float), ``row`` in the input file, ``copy`` (of its symmetry), and all further numeric columns.

    A row for each row of ``path``, in order; nan where a particle was not kept.
    """
    table = _bare_names(read_tables(path).particles)
    names = latent_columns(list(table))
    out = pd.DataFrame({f"z{i + 1}": table[c].astype(float) for i, c in enumerate(names)}, index=table.index)
    out["row"] = table["flexInputRow"].to_numpy() if "flexInputRow" in table else np.arange(len(table))
    out["copy"] = table["flexSymmetryCopy"].to_numpy() if "flexSymmetryCopy" in table else 0
    skip = {*names, "flexInputRow", "flexSymmetryCopy", "flexUid", "flexInputSign", "RandomSubset", "AngleTilt"}
    further = [name for name in table.select_dtypes("number") if name not in skip]
    return pd.concat([out, table[further]], axis=1)


def _bare_names(table: pd.DataFrame) -> pd.DataFrame:
    return table.rename(columns=lambda name: name.removeprefix("rln"))


def record_at(kind: type[AnyRecord], path: Path) -> AnyRecord | None:
    """The record at ``path``; None where there is none, or one of an older flexlib that cannot be read."""
    if not path.exists():
        return None
    try:
        return kind.read(path)
    except InputError as error:
        logger.warning("%s", error)
        return None


def table_at(path: Path) -> pd.DataFrame | None:
    """The table at ``path``; None where there is none, or an empty one."""
    with reading(path, ValueError):
        table = pd.read_csv(path) if path.exists() and path.stat().st_size else None
    return table if table is not None and len(table) else None


def map_at(path: Path) -> Map | None:
    """The map at ``path``; None where there is none."""
    return read_map(path) if path.exists() else None


def points_below(stage: Path) -> list[SweepPoint]:
    """The sweep points that have a folder below a stage's."""
    values = re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", POINT_PATTERN))
    found = []
    for path in stage.glob(re.sub(r"\{\w+\}", "*", POINT_PATTERN)):
        match = values.fullmatch(path.relative_to(stage).as_posix())
        assert match is not None  # the same pattern
        found.append(SweepPoint(int(match["cells"]), int(match["dims"]), float(match["rigidity"]), int(match["seed"])))
    return found
