"""What interpret writes of conformations: landscape, populations, least path, conditions, other embeddings."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from flexlib.files import atomic_path
from flexlib.generate import generate_series
from flexlib.generate.latents import displacement_metric
from flexlib.interpret.conditions import Conditions, compare_conditions, condition_table, read_conditions
from flexlib.interpret.density import estimate_density
from flexlib.interpret.embeddings import compare_embeddings, embedding_table
from flexlib.interpret.landscape import Landscape, find_basins, landscape_table, make_landscape
from flexlib.interpret.least_path import least_path, path_ends, path_table, with_others
from flexlib.interpret.observations import Observations, read_observations
from flexlib.interpret.populations import basin_populations, population_table, region_populations
from flexlib.layout import InterpretFolder, ParticlesFolder, TrainFolder
from flexlib.model.flex_model import FlexModel
from flexlib.particles.input_rows import read_prepared_rows
from flexlib.particles.latents_read import read_latents
from flexlib.particles.listed import listed_particles
from flexlib.particles.star_text import read_star_text
from flexlib.workflow_support.settings import GenerateSettings, InterpretSettings

logger = logging.getLogger(__name__)

LEAST_PARTICLES = 50  # from which a density is estimated
_EMPTY = pd.DataFrame({"latent_1": []})

Folders = tuple[ParticlesFolder, TrainFolder, Path]


def write_conformations(
    out: InterpretFolder, folders: Folders, model: FlexModel, settings: InterpretSettings, generate: GenerateSettings
) -> dict[str, Any]:
    """Write the tables and the series of conformations; gives their part of the record.

    Parameters
    ----------
    out
        Where.
    folders
        What prepare and train have written, and the latents.star with the standard errors to believe.
    model, settings, generate
        As for ``run.interpret``.

    Raises
    ------
    InputError
        A file of the settings cannot be read or is of other particles; before anything long is done.
    """
    particles, train, latents_star = folders
    prepared = read_prepared_rows(particles.path)
    where = prepared.input_rows
    every = read_observations(model, particles.path, latents_star)
    others = [read_latents(path, particles.path) for path in settings.embeddings]
    for path in settings.regions:
        listed_particles(path, where, "interpret.regions")
    wanted = settings.conditions
    conditions = None if wanted is None else read_conditions(wanted, where, prepared.record.passthrough)
    if others:
        found = [compare_embeddings(every.latents, other[every.row]) for other in others]
        _write(out.embeddings, embedding_table(settings.embeddings, found))
    if model.flow.stands_still or len(every) < LEAST_PARTICLES:
        reason = "the model stands still" if model.flow.stands_still else f"there are {len(every)} particles only"
        logger.warning("no landscape, populations or path: %s", reason)
        for path in (out.landscape, out.populations, out.path_points):
            _write(path, _EMPTY)
        out.series.path.mkdir(parents=True, exist_ok=True)
        return {}
    seen = every if every.dims <= 2 else every.of_plane()
    landscape = make_landscape(estimate_density(seen))
    basin = find_basins(landscape)
    _write(out.landscape, landscape_table(landscape, seen))
    populations = basin_populations(landscape, basin, seen)
    populations += region_populations(landscape, seen, settings.regions, where)
    _write(out.populations, population_table(populations))
    points = _write_path(out, landscape, (basin, seen, every), model, generate.frames)
    generate_series(train.path, out.series.path, generate, particles.path, points, "least_path")
    record = {
        "landscape_particles": round(landscape.density.num_particles),
        "landscape_width": [round(float(value), 4) for value in landscape.density.width],
        "num_basins": int(basin.max()) + 1,
    }
    if conditions is None:
        return record
    of = "files" if not isinstance(wanted, str) else wanted
    return record | {"condition_of": of} | _write_conditions(out, particles, conditions, seen, (landscape, basin))


def _write_path(
    out: InterpretFolder,
    landscape: Landscape,
    parts: tuple[np.ndarray, Observations, Observations],
    model: FlexModel,
    frames: int,
) -> np.ndarray:
    basin, seen, every = parts
    metric = displacement_metric(model, every.latents)
    plane = metric[: seen.dims, : seen.dims]
    path = least_path(landscape, path_ends(landscape, basin, seen, plane), frames, plane)
    whole = with_others(path, every, landscape.density.width)
    _write(out.path_points, path_table(landscape, path, whole, metric))
    return whole


def _write_conditions(
    out: InterpretFolder,
    particles: ParticlesFolder,
    conditions: Conditions,
    seen: Observations,
    shown: tuple[Landscape, np.ndarray],
) -> dict[str, Any]:
    """Write conditions.csv; particles of no condition are left out."""
    label = conditions.label[seen.row]
    some = np.flatnonzero(label >= 0)
    micrograph, defocus_um = _known_of(particles, seen.row[some])
    own, label = seen.take(some), label[some]
    found = compare_conditions(own, label, micrograph, *shown)
    _write(out.conditions, condition_table(conditions, own, label, found, defocus_um))
    names = conditions.names
    return {
        "condition_p_value": found.p_value,
        "condition_pairs": {f"{names[a]} and {names[b]}": value for (a, b), value in found.pairs.items()},
        "condition_by_micrograph": found.by_micrograph,
        "condition_unassigned": int((conditions.label < 0).sum()),
    }


def _known_of(particles: ParticlesFolder, row: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Micrograph and mean defocus in micrometres of some prepared particles, where they are known."""
    text = read_star_text(particles.particles)
    table = text.frame(text.particles, ("flexMicrograph", "rlnDefocusU", "rlnDefocusV")).iloc[row]
    micrograph = table["flexMicrograph"].to_numpy(np.int64) if "flexMicrograph" in table else None
    if not {"rlnDefocusU", "rlnDefocusV"} <= set(table):
        return micrograph, None
    return micrograph, table[["rlnDefocusU", "rlnDefocusV"]].to_numpy(np.float64).mean(1) / 1e4


def _write(path: Path, table: pd.DataFrame) -> None:
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.7g")
