"""The latents of each series that is asked for."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from flexlib.errors import InputError
from flexlib.generate.curve import principal_curve
from flexlib.generate.series import axis_latents, line_latents
from flexlib.model.flex_model import FlexModel
from flexlib.particles.clusters import cluster_latents
from flexlib.particles.input_rows import input_rows
from flexlib.particles.latents_read import read_frame_latents
from flexlib.workflow_support.series import SeriesRequest, parse_series
from flexlib.workflow_support.settings import GenerateSettings

logger = logging.getLogger(__name__)

MAX_FRAMES = 1000  # a file of more rows is a list of particles, not of frames
_METRIC_SAMPLE = 512  # particles from which the displacement per latent step is estimated


def series_latents(
    model: FlexModel, known: np.ndarray, settings: GenerateSettings, particles_dir: Path | None
) -> Iterator[tuple[str, np.ndarray]]:
    """Name, unique, and (f, K) latents of each series that the settings ask for.

    Parameters
    ----------
    model, known
        The model, and the (n, K) finite ones of its latents.
    settings
        ``generate:``.
    particles_dir
        Folder that prepare wrote, for particles named by row.

    Raises
    ------
    InputError
        A series does not fit the model.
    """
    taken: dict[str, int] = {}
    for request in parse_series(settings.series):
        for name, points in _latents(request, model, known, settings.frames, particles_dir):
            taken[name] = taken.get(name, 0) + 1
            yield (name if taken[name] == 1 else f"{name}_{taken[name]}"), points


def _latents(
    request: SeriesRequest, model: FlexModel, known: np.ndarray, frames: int, particles_dir: Path | None
) -> Iterator[tuple[str, np.ndarray]]:
    """One request's series: an axis is one each."""
    if request.kind == "axes":
        odd = frames + 1 - frames % 2
        if odd != frames:
            logger.info("%d frames along an axis instead of %d, so that the middle one is at the origin", odd, frames)
        for axis in range(model.latent_dims):
            yield f"axis_{axis + 1}", axis_latents(known, axis, odd)
    elif request.kind == "curve":
        yield request.name, principal_curve(known, frames, displacement_metric(model, known))
    elif request.kind == "kmeans":
        option = f"generate.series: kmeans {request.count}"
        yield request.name, known[cluster_latents(known, request.count, option).nearest]
    elif request.kind == "between":
        first, last = (_end_latents(end, model, particles_dir) for end in request.ends)
        yield request.name, line_latents(first, last, frames)
    else:
        yield request.name, fitting_latents(_latents_of_file(request.path), model, str(request.path))


def _latents_of_file(path: Path) -> np.ndarray:
    if not path.is_file():
        raise InputError(f"generate.series: {path}: file not found")
    points = read_frame_latents(path)
    if len(points) > MAX_FRAMES:
        raise InputError(
            f"generate.series: {path}: {len(points)} rows, each would be a map: more than {MAX_FRAMES} are taken for a "
            "list of particles"
        )
    return points


def fitting_latents(points: np.ndarray, model: FlexModel, where: str) -> np.ndarray:
    """``points`` (f, K). Raises InputError, which begins with ``where``, unless K is the model's."""
    if points.ndim != 2 or points.shape[1] != model.latent_dims:
        raise InputError(f"{where}: {points.shape[-1]} numbers a row, the model has {model.latent_dims} latents")
    return points


def _end_latents(end: int | tuple[float, ...], model: FlexModel, particles_dir: Path | None) -> np.ndarray:
    """(K,) coordinates as given, or those of the particle in a row (from 1) of the input file."""
    if isinstance(end, tuple):
        return fitting_latents(np.array([end]), model, "generate.series: between")[0]
    if particles_dir is None:
        raise InputError(
            f"generate.series: between: particle {end}: the folder that prepare wrote is not beside the training: "
            "name it (--particles), or give coordinates"
        )
    where = input_rows(particles_dir)
    if len(where.rows) != len(model.latents):
        raise InputError(
            f"{particles_dir}: {len(where.rows)} particles, but the model was trained on {len(model.latents)}"
        )
    if end > where.num_input:
        raise InputError(f"generate.series: between: particle {end}: {where.path} has {where.num_input}")
    found = np.flatnonzero((where.rows == end - 1) & (where.copy == 0))
    if not len(found):
        raise InputError(f"generate.series: between: particle {end} of {where.path} was left out by prepare")
    latents = model.latents[found[0]].astype(np.float64)
    if not np.isfinite(latents).all():
        raise InputError(f"generate.series: between: particle {end} has no latents yet")
    name = where.all_names[end - 1] if where.all_names else where.path.name
    logger.info("particle %d (%s) lies at %s", end, name, latents.round(3))
    return latents


def displacement_metric(model: FlexModel, latents: np.ndarray) -> np.ndarray:
    """(K, K) A^2: ``dz' metric dz`` is the mean squared displacement of the mesh vertices for a latent step dz.

    From the linear regression of displacements on the latents (n, K) of at most 512 particles.
    """
    rows = np.random.default_rng(0).permutation(len(latents))[:_METRIC_SAMPLE]
    z = latents[np.sort(rows)]
    moved = model.displacements_A(z).cpu().numpy().reshape(len(z), -1).astype(np.float64)
    slope = np.linalg.lstsq(z - z.mean(0), moved - moved.mean(0), rcond=None)[0]  # (K, nv * 3)
    return slope @ slope.T / len(model.mesh.vertices_A)
