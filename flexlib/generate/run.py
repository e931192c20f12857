"""Series of maps along the latent space: the canonical map (or another) carried by the flow.

``python -m flexlib.generate TRAIN_DIR OUT_DIR`` does what the workflow's rule does, at any time: also while a training
is under way, from its newest checkpoint, and for single maps at chosen latents (``--at``).
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path

import numpy as np
import pandas as pd

from flexlib.errors import InputError
from flexlib.files import atomic_path
from flexlib.generate.atoms import CarriedAtoms
from flexlib.generate.chimerax import chimerax_script, frame_ranges
from flexlib.generate.latents import fitting_latents, series_latents
from flexlib.generate.neighbourhood import Neighbourhood
from flexlib.imaging.fourier import lowpass_map, sharpen_map
from flexlib.imaging.maps import Map, read_map, write_map
from flexlib.layout import CHECKPOINTS, GenerateFolder, ParticlesFolder, TrainFolder, find_run
from flexlib.model.flex_model import FlexModel
from flexlib.model.frame import MotionFrame
from flexlib.model.part_labels import labels_at
from flexlib.render.film import FrameNote, SeriesMovie
from flexlib.render.surface import display_level
from flexlib.runtime import share_threads_with_numba
from flexlib.tetra.deform import VolumeDeformer, moving_mask
from flexlib.tetra.io import write_displacement
from flexlib.workflow_support.settings import GenerateSettings, Presence

logger = logging.getLogger(__name__)

_STILL_A = 0.01  # a series that moves no vertex farther shows no motion


def generate_series(
    train_dir: str | Path,
    out_dir: str | Path,
    settings: GenerateSettings,
    particles_dir: str | Path | None = None,
    points: np.ndarray | None = None,
    name: str = "at",
) -> None:
    """Write maps along the latent space of a trained sweep point.

    For each series: ``NAME/frame_000.mrc`` ... and ``NAME/frame_000.vtu`` ... (the mesh with the point data
    ``displacement_A`` and, of ``align: rigid_core``, ``rigid_core``), ``NAME.cxc`` (plays them in ChimeraX) and
    ``NAME.webp`` (a film). ``series.csv`` has a row for each frame: series, frame, the latents, ``num_particles`` near
    it, ``beyond_data`` (1 where there are hardly any), ``rms_displacement_A`` of the mesh vertices from rest, and
    ``rigid_core_share`` of the density that is held at rest (empty of ``align: density``). Of atoms: docs/atoms.md.

    Parameters
    ----------
    train_dir
        Folder of a training, finished or not, or a model file. Of a training under way the newest checkpoint is used;
        the log says of which epoch.
    out_dir
        Folder to write; frames of an earlier run of a series are replaced.
    settings
        ``generate:``; ``volume`` is a map at any box and pixel size, of the same box centre.
    particles_dir
        Folder that prepare wrote (default: beside the training), for particles named by row and the maps' headers.
    points, name
        (f, K) latents to show instead of ``settings.series``, and the name of that series.

    Raises
    ------
    InputError
        A file is not readable, or latents do not fit the model.
    """
    share_threads_with_numba()
    out = GenerateFolder(Path(out_dir))
    model_path = newest_model(train_dir)
    model = _loaded(model_path)
    known = _known_latents(model, model_path)
    particles = _find_particles(model_path, particles_dir)
    volume = _volume(model, model_path, particles, settings)
    volume = _filtered(_with_parts(volume, model, model_path, settings.occupancy), settings)
    if points is not None:
        wanted = [(name, fitting_latents(np.asarray(points, np.float64), model, "--at"))]
    else:
        wanted = list(series_latents(model, known, settings, particles.path if particles else None))
    mask = moving_mask(model.canonical, model.pixel_size_A, volume.box, volume.pixel_size_A)
    deformer = VolumeDeformer(volume.data, volume.pixel_size_A, mask, model.mesh)
    motion = MotionFrame.of(model, settings.align)
    moving = motion, CarriedAtoms.of(settings, motion, volume)
    neighbourhood, tables = Neighbourhood(known), []
    for series, latents in wanted:
        table = _frame_table(series, latents, neighbourhood)
        table["rms_displacement_A"] = _write_series(out, series, table, latents, moving, deformer, volume)
        table["rigid_core_share"] = np.nan if motion.core is None else motion.core.share
        tables.append(table)
    with atomic_path(out.table) as temporary:
        pd.concat(tables).to_csv(temporary, index=False, float_format="%.7g")


def _known_latents(model: FlexModel, path: Path) -> np.ndarray:
    """(m, K) those of the particles that have some."""
    known = model.latents[np.isfinite(model.latents).all(1)].astype(np.float64)
    if not len(known):
        raise InputError(f"{path}: no particle has latents yet")
    return known


def _frame_table(name: str, latents: np.ndarray, neighbourhood: Neighbourhood) -> pd.DataFrame:
    """The rows of series.csv for the frames (f, K) of a series, but for what the flow says of them."""
    table = pd.DataFrame(latents, columns=[f"latent_{k + 1}" for k in range(latents.shape[1])])
    table.insert(0, "series", name)
    table.insert(1, "frame", np.arange(len(latents)))
    table["num_particles"] = neighbourhood.num_near(latents)
    table["beyond_data"] = neighbourhood.beyond_data(latents).astype(int)
    return table


def newest_model(train_dir: str | Path) -> Path:
    """The model file to use of a training folder: the finished one, or the newest checkpoint of one under way.

    Models are written whole or not at all, so the newest is whole. A checkpoint beside a finished model is used where
    it is newer and of another epoch: then a new training has begun.

    Raises
    ------
    InputError
        There is neither.
    """
    folder = TrainFolder(Path(train_dir))
    if folder.path.is_file():
        return folder.path
    finished, checkpoint = folder.model, folder.checkpoint_model
    if not checkpoint.is_file():
        if not finished.is_file():
            raise InputError(f"{train_dir}: no model and no checkpoint yet: training writes one after its first epoch")
        return finished
    if finished.is_file():
        newer = checkpoint.stat().st_mtime > finished.stat().st_mtime
        if not newer or FlexModel.load(checkpoint).epoch == FlexModel.load(finished).epoch:
            return finished
    return checkpoint


def _loaded(path: Path) -> FlexModel:
    """The model at ``path``; the log says of which epoch, with a warning where training is under way."""
    model = FlexModel.load(path)
    if path.parent.name == CHECKPOINTS:
        logger.warning("%s: training is not finished: this is its checkpoint of epoch %d", path, model.epoch)
    else:
        logger.info("%s: the model after epoch %d", path, model.epoch)
    return model


def _find_particles(model_path: Path, given: str | Path | None) -> ParticlesFolder | None:
    """The folder that prepare wrote: as given, or of the run that the model belongs to."""
    if given is not None:
        return ParticlesFolder(Path(given))
    run = find_run(model_path)
    return None if run is None else run.particles


def _volume(model: FlexModel, model_path: Path, particles: ParticlesFolder | None, settings: GenerateSettings) -> Map:
    """The map to deform, placed as its file or, of a model without a map file yet, as the consensus."""
    if settings.volume is not None:
        volume = read_map(settings.volume)
        extent_A = model.box * model.pixel_size_A
        if volume.pixel_size_A > 4 * model.pixel_size_A or volume.pixel_size_A < model.pixel_size_A / 20:
            raise InputError(
                f"generate.volume: {settings.volume}: its pixels of {volume.pixel_size_A:g} A do not fit the model's "
                f"of {model.pixel_size_A:g} A: set the voxel size in the header"
            )
        if volume.box * volume.pixel_size_A < 0.5 * extent_A:
            raise InputError(
                f"generate.volume: {settings.volume}: {volume.box * volume.pixel_size_A:.0f} A wide, the model's box "
                f"is {extent_A:.0f} A: not a map of the same particle and box centre"
            )
        return volume
    beside = [TrainFolder(model_path.parent).canonical, *([particles.consensus] if particles else [])]
    like = next((read_map(path) for path in beside if path.is_file()), Map(model.canonical, model.pixel_size_A))
    return dataclasses.replace(like, data=model.canonical, pixel_size_A=model.pixel_size_A)


def _with_parts(volume: Map, model: FlexModel, model_path: Path, present: Presence | list[int]) -> Map:
    """The map without the density of the parts that are to be absent; see ``generate.occupancy``."""
    if present == "present":
        return volume
    if model.parts is None:  # of the points of a sweep some may have found parts
        logger.warning("%s: generate.occupancy: this model has no parts that can be absent: maps are whole", model_path)
        return volume
    parts = range(1, int(model.parts.max()) + 1)
    kept = [] if isinstance(present, str) else present
    if unknown := sorted(set(kept) - set(parts)):
        raise InputError(f"generate.occupancy: {model_path}: no part {unknown[0]}: there are 1 to {len(parts)}")
    absent = [part for part in parts if part not in kept]
    logger.info("absent from the maps: part %s", ", ".join(map(str, absent)) or "none")
    gone = np.isin(labels_at(model, volume.box, volume.pixel_size_A), absent)
    return dataclasses.replace(volume, data=np.where(gone, np.float32(0), volume.data))


def _filtered(volume: Map, settings: GenerateSettings) -> Map:
    data = volume.data
    if settings.bfactor_A2 is not None:
        data = sharpen_map(data, volume.pixel_size_A, settings.bfactor_A2)
    if settings.lowpass_A is not None:
        data = lowpass_map(data, volume.pixel_size_A, settings.lowpass_A)
    return dataclasses.replace(volume, data=data)


def _write_series(
    out: GenerateFolder,
    name: str,
    table: pd.DataFrame,
    latents: np.ndarray,
    moving: tuple[MotionFrame, CarriedAtoms | None],
    deformer: VolumeDeformer,
    volume: Map,
) -> np.ndarray:
    """Everything of one series but its rows of the table; returns (f,) rms displacement of each frame."""
    motion, atoms = moving
    logger.info("%s: %d frames, from %s to %s", name, len(latents), latents[0].round(3), latents[-1].round(3))
    displacements_A = motion.displacements_A(latents).cpu().numpy()  # (f, nv, 3)
    if len(latents) > 1 and np.ptp(displacements_A, axis=0).max() < _STILL_A:
        logger.warning("%s: nothing moves along this series: the training found no motion there", name)
    if table["beyond_data"].any():
        logger.warning("%s: frames %s lie beyond the data: only the prior rules there", name, frame_ranges(table))
    shutil.rmtree(out.series(name), ignore_errors=True)  # an earlier run may have had more frames
    last = len(latents) - 1
    key_frames = [deformer.deform(displacements_A[i]) for i in sorted({0, last // 2, last})]
    level = display_level(key_frames[len(key_frames) // 2])
    movie = SeriesMovie(name, key_frames, level, volume.pixel_size_A)
    del key_frames  # at a large box they are large
    notes = zip(latents, table["num_particles"], table["beyond_data"], strict=True)
    for frame, (z, near, beyond) in enumerate(notes):
        moved = deformer.deform(displacements_A[frame])
        path = out.frame(name, frame)
        write_map(path, moved, volume.pixel_size_A, like=volume)
        write_displacement(path.with_suffix(".vtu"), motion.model.mesh, displacements_A[frame], motion.core_weight)
        movie.add(moved, FrameNote(z, int(near), bool(beyond)))
    movie.write(out.film(name))
    ensemble = None
    if atoms is not None:
        atoms.write_series(out, name, displacements_A)
        ensemble = out.ensemble(name).relative_to(out.path).as_posix()
    with atomic_path(out.chimerax(name)) as temporary:
        temporary.write_text(chimerax_script(name, table, level, ensemble))
    return np.sqrt((displacements_A**2).sum(2).mean(1))
