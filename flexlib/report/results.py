"""What a results folder holds, read piece by piece; a piece that is not there is None (or empty)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from flexlib.files import read_json
from flexlib.imaging.maps import Map, read_map
from flexlib.particles.star import StarTables, read_tables
from flexlib.tetra.tetmesh import TetraMesh
from flexlib.workflow_support.points import SweepPoint


@dataclass(frozen=True)
class Series:
    """The maps of one motion, in order."""

    name: str  # folder name, e.g. axis_1
    frames: tuple[Path, ...]


@dataclass(frozen=True)
class Results:
    """One results/<name> folder, as laid out in docs/architecture.md."""

    root: Path
    config: dict[str, Any]
    truth_path: Path | None = None

    @property
    def name(self) -> str:
        """The run's name."""
        return str(self.config.get("name") or self.root.name)

    # what went in -----------------------------------------------------------------------------------------------

    @cached_property
    def particles(self) -> pd.DataFrame | None:
        """Prepared particles, RELION's columns without the prefix ``rln``, in the order of particles.star."""
        return None if self._prepared_star is None else _bare_names(self._prepared_star.particles)

    @cached_property
    def optics(self) -> pd.DataFrame | None:
        """The optics groups of particles.star, named likewise."""
        tables = self._prepared_star
        return None if tables is None or tables.optics is None else _bare_names(tables.optics)

    @cached_property
    def _prepared_star(self) -> StarTables | None:
        path = self.root / "particles" / "particles.star"
        return read_tables(path) if path.exists() else None

    @cached_property
    def prepared(self) -> dict[str, Any]:
        """prepared.json."""
        return _json(self.root / "particles" / "prepared.json")

    @cached_property
    def consensus(self) -> Map | None:
        """The consensus map at the training box."""
        return _map(self.root / "particles" / "consensus.mrc")

    @cached_property
    def mask(self) -> Map | None:
        """The solvent mask at the training box."""
        return _map(self.root / "particles" / "mask.mrc")

    @cached_property
    def full_mask(self) -> Map | None:
        """The solvent mask at the reconstruction box."""
        return _map(self.root / "particles" / "full" / "mask.mrc")

    # the sweep and its chosen point -----------------------------------------------------------------------------

    @cached_property
    def sweep(self) -> pd.DataFrame | None:
        """sweep.csv, with ``chosen`` as bool."""
        table = _csv(self.root / "sweep.csv")
        if table is not None and "chosen" in table:
            table["chosen"] = table["chosen"].astype(str).str.lower().isin(["true", "1", "yes", "1.0"])
        return table

    @cached_property
    def chosen(self) -> SweepPoint | None:
        """The point the sweep chose; without a table, the first trained point found."""
        if self.sweep is not None and "chosen" in self.sweep and self.sweep["chosen"].any():
            row = self.sweep[self.sweep["chosen"]].iloc[0]
            return SweepPoint(int(row["cells"]), int(row["latent_dims"]), float(row["rigidity"]), int(row["seed"]))
        trained = sorted((self.root / "train").glob("cells~*/dims~*/rigidity~*/seed~*"))
        return _point_of(trained[0]) if trained else None

    def stage_dir(self, stage: str) -> Path:
        """The chosen point's folder of a stage."""
        point = self.chosen
        if point is None:
            return self.root / stage / "no-point"
        return self.root / stage / (point.mesh_path if stage == "mesh" else point.path)

    # mesh and training ------------------------------------------------------------------------------------------

    @cached_property
    def mesh(self) -> TetraMesh | None:
        """The chosen point's mesh."""
        path = self.stage_dir("mesh") / "mesh.vtu"
        if not path.exists():
            return None
        from flexlib.tetra.io import read_mesh

        return read_mesh(path)

    @cached_property
    def mesh_quality(self) -> dict[str, Any]:
        """mesh_quality.json."""
        return _json(self.stage_dir("mesh") / "mesh_quality.json")

    @cached_property
    def log(self) -> pd.DataFrame | None:
        """log.csv of the training."""
        return _csv(self.stage_dir("train") / "log.csv")

    @cached_property
    def spectrum(self) -> pd.DataFrame | None:
        """spectrum.csv: eigenvalues of the spectral start and the noise edge."""
        return _csv(self.stage_dir("train") / "spectrum.csv")

    @cached_property
    def validation(self) -> dict[str, Any]:
        """validation.json."""
        return _json(self.stage_dir("train") / "validation.json")

    @cached_property
    def latents(self) -> pd.DataFrame | None:
        """One row per particle with latents: z1..zK, ``row`` in the input file, and whatever can colour a plot.

        Columns beside z: ``True angle 1 (deg)``... with truth, ``Half-set``, ``Defocus (µm)``, ``View tilt (deg)``, and
        every numeric column of latents.star that varies, under its name there
        (without ``rln``).
        """
        table = self._latents_table
        if table is None:
            return None
        names = [c for c in table if re.fullmatch(r"flexLatent\d+", c)]
        names.sort(key=lambda c: int(c[len("flexLatent") :]))
        if not names:
            return None
        out = pd.DataFrame({f"z{i + 1}": table[c].astype(float) for i, c in enumerate(names)})
        # with symmetry a particle has a row for each copy, and the table says which is whose
        out["row"] = table["flexInputRow"].to_numpy() if "flexInputRow" in table else np.arange(len(table))
        out["copy"] = table["flexSymmetryCopy"].to_numpy() if "flexSymmetryCopy" in table else 0
        out = self._add_truth(out)
        known = np.isfinite(out["z1"]).to_numpy()
        out = self._add_particle_columns(out[known].reset_index(drop=True))
        skip = {*names, "flexInputRow", "flexSymmetryCopy", "flexUid", "flexInputSign", "RandomSubset", "AngleTilt"}
        further = table.loc[known, [name for name in table.select_dtypes("number") if name not in skip]]
        further = further.loc[:, further.nunique() > 1].reset_index(drop=True)
        return pd.concat([out, further], axis=1)

    @cached_property
    def all_latents_count(self) -> int | None:
        """Rows of the input particle file, kept or not."""
        return None if self._latents_table is None else len(self._latents_table)

    @cached_property
    def _latents_table(self) -> pd.DataFrame | None:
        path = self.stage_dir("train") / "latents.star"
        return _bare_names(read_tables(path).particles) if path.exists() else None

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
        """Generated series of the chosen point that have frames."""
        folders = sorted(path for path in self.stage_dir("generate").glob("*") if path.is_dir())
        found = [Series(path.name, tuple(sorted(path.glob("frame_*.mrc")))) for path in folders]
        return [series for series in found if series.frames]

    @cached_property
    def series_latents(self) -> pd.DataFrame | None:
        """series.csv: series, frame, latent_1..K, num_particles, beyond_data of every generated frame."""
        return _csv(self.stage_dir("generate") / "series.csv")

    @cached_property
    def convergence(self) -> pd.DataFrame | None:
        """convergence.csv: half, model, iteration, objective, relative_gradient of the reconstruction."""
        return _csv(self.stage_dir("reconstruct") / "convergence.csv")

    @cached_property
    def unconverged(self) -> list[str]:
        """Half-maps whose solution was stopped by the count of iterations, as resolution.json says: "flex half 1"."""
        converged = _json(self.stage_dir("reconstruct") / "resolution.json").get("converged", {})
        return [name.replace("_half", " half ") for name, is_so in converged.items() if not is_so]

    @cached_property
    def fsc(self) -> pd.DataFrame | None:
        """fsc.csv of the chosen point."""
        return _csv(self.stage_dir("reconstruct") / "fsc.csv")

    def reconstructed(self, kind: str) -> Map | None:
        """``kind`` "flex" or "rigid": the mean of the two half-maps, or the combined map where there are none."""
        folder = self.stage_dir("reconstruct")
        halves = [_map(folder / f"{kind}_half{i}.mrc") for i in (1, 2)]
        if halves[0] is not None and halves[1] is not None:
            return Map(0.5 * (halves[0].data + halves[1].data), halves[0].pixel_size_A)
        return _map(folder / f"{kind}_map.mrc")

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
    def benchmarks(self) -> pd.DataFrame:
        """Snakemake's benchmark files: rule (path below benchmarks/), seconds, peak memory in MB."""
        rows = []
        for path in sorted((self.root / "benchmarks").rglob("*.tsv")):
            table = pd.read_csv(path, sep="\t", na_values="-")
            if len(table) and "s" in table:
                label = path.relative_to(self.root / "benchmarks").with_suffix("").as_posix()
                rows.append((label, float(table["s"].mean()), float(table.get("max_rss", pd.Series([np.nan])).mean())))
        return pd.DataFrame(rows, columns=["rule", "seconds", "memory_MB"])


def _bare_names(table: pd.DataFrame) -> pd.DataFrame:
    return table.rename(columns=lambda name: name.removeprefix("rln"))


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _csv(path: Path) -> pd.DataFrame | None:
    table = pd.read_csv(path) if path.exists() and path.stat().st_size else None
    return table if table is not None and len(table) else None


def _map(path: Path) -> Map | None:
    return read_map(path) if path.exists() else None


def _point_of(folder: Path) -> SweepPoint:
    cells, dims, rigidity, seed = (part.split("~", 1)[1] for part in folder.parts[-4:])
    return SweepPoint(int(cells), int(dims), float(rigidity), int(seed))
