"""Series of maps along the latent space: the canonical map (or another) carried by the flow.

``python -m flexlib.generate TRAIN_DIR OUT_DIR`` does what the workflow's rule does, at any time: also while a training
is under way, from its newest checkpoint, and for single maps at chosen latents (``--at``).
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from flexlib.errors import InputError
from flexlib.files import atomic_path
from flexlib.generate.series import MAX_POINTS, Neighbourhood, axis_points, cluster_points, line_points, principal_curve
from flexlib.imaging.fourier import lowpass_map, sharpen_map
from flexlib.imaging.maps import Map, read_map, write_map
from flexlib.model.flex_model import MODEL_FILE, FlexModel
from flexlib.render.film import FrameNote, SeriesMovie
from flexlib.runtime import share_threads_with_numba
from flexlib.tetra.deform import VolumeDeformer, moving_mask
from flexlib.tetra.io import write_displacement
from flexlib.workflow_support.series import SPELLINGS, SeriesRequest, parse_point, parse_series
from flexlib.workflow_support.settings import GenerateSettings

logger = logging.getLogger(__name__)

_STILL_A = 0.01  # a series that moves no vertex farther shows no motion
_METRIC_SAMPLE = 512  # particles from which the displacement per latent step is estimated
_CHIMERAX_INTERVAL = 4  # drawn frames per map while the labels are shown


def generate_series(
    train_dir: str | Path,
    out_dir: str | Path,
    settings: GenerateSettings,
    particles_dir: str | Path | None = None,
    points: np.ndarray | None = None,
) -> None:
    """Write maps along the latent space of a trained point.

    For each series: ``NAME/frame_000.mrc`` ... and ``NAME/frame_000.vtu`` ... (the mesh with the point data
    ``displacement_A``), ``NAME.cxc`` (plays them in ChimeraX) and ``NAME.webp`` (a film). ``series.csv`` has a row for
    each frame: series, frame, the latents, ``num_particles`` near it, ``beyond_data`` (1 where there are hardly
    any), ``rms_displacement_A`` of the mesh vertices from rest.

    Parameters
    ----------
    train_dir
        Folder of a training, finished or not, or a model file. Of a training under way the newest checkpoint is used;
        the log says of which epoch.
    out_dir
        Folder to write; frames of an earlier run of the same series are replaced.
    settings
        ``series`` as ``workflow_support.series`` reads it; ``volume`` a map at any box and pixel size, of the same
        box centre, to deform in place of the canonical one.
    particles_dir
        Folder that prepare wrote; by default ``particles`` beside the training. Needed for particles named by row, and
        while training for the header of the maps.
    points
        (f, K) latents to show in place of ``settings.series``, as the series ``at``.

    Raises
    ------
    InputError
        A file that is not readable, or points that do not fit the model.
    """
    share_threads_with_numba()
    out_dir = Path(out_dir)
    model_path = newest_model(train_dir)
    model = FlexModel.load(model_path)
    if model_path.parent.name == "checkpoints":
        logger.warning("%s: training is not finished: this is its checkpoint of epoch %d", model_path, model.epoch)
    else:
        logger.info("%s: the model after epoch %d", model_path, model.epoch)
    known = model.latents[np.isfinite(model.latents).all(1)].astype(np.float64)
    if not len(known):
        raise InputError(f"{model_path}: no particle has latents yet")
    particles_dir = _find_particles(model_path, particles_dir)
    volume = _filtered(_volume(model, model_path, particles_dir, settings), settings)
    if points is None:
        wanted = list(_all_points(model, known, settings, particles_dir))
    else:
        wanted = [("at", _fitting(np.asarray(points, np.float64), model, "--at"))]
    mask = moving_mask(model.canonical, model.pixel_size_A, volume.box, volume.pixel_size_A)
    deformer = VolumeDeformer(volume.data, volume.pixel_size_A, mask, model.mesh)
    neighbourhood = Neighbourhood(known)
    tables = []
    for name, latents in wanted:
        table = pd.DataFrame(latents, columns=[f"latent_{k + 1}" for k in range(latents.shape[1])])
        table.insert(0, "series", name)
        table.insert(1, "frame", np.arange(len(latents)))
        table["num_particles"] = neighbourhood.num_near(latents)
        table["beyond_data"] = neighbourhood.beyond_data(latents).astype(int)
        table["rms_displacement_A"] = _write_series(out_dir, name, table, latents, model, deformer, volume)
        tables.append(table)
    with atomic_path(out_dir / "series.csv") as temporary:
        pd.concat(tables).to_csv(temporary, index=False, float_format="%.7g")


def newest_model(train_dir: str | Path) -> Path:
    """The model file to use of a training folder: the finished one, or the newest checkpoint of one under way.

    Models are written whole or not at all, so the newest is whole. A checkpoint beside a finished model is used where
    it is newer and of another epoch: then a new training has begun. Raises InputError where there is neither.
    """
    train_dir = Path(train_dir)
    if train_dir.is_file():
        return train_dir
    finished, checkpoint = train_dir / MODEL_FILE, train_dir / "checkpoints" / MODEL_FILE
    if not checkpoint.is_file():
        if not finished.is_file():
            raise InputError(f"{train_dir}: no model and no checkpoint yet: training writes one after its first epoch")
        return finished
    if finished.is_file():
        newer = checkpoint.stat().st_mtime > finished.stat().st_mtime
        if not newer or FlexModel.load(checkpoint).epoch == FlexModel.load(finished).epoch:
            return finished
    return checkpoint


def _find_particles(model_path: Path, given: str | Path | None) -> Path | None:
    """The folder that prepare wrote: as given, or beside the training."""
    if given is not None:
        return Path(given)
    candidates = (parent / "particles" for parent in model_path.absolute().parents)
    return next((folder for folder in candidates if (folder / "prepared.json").is_file()), None)


def _volume(model: FlexModel, model_path: Path, particles_dir: Path | None, settings: GenerateSettings) -> Map:
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
    beside = [model_path.parent / "canonical.mrc", *([particles_dir / "consensus.mrc"] if particles_dir else [])]
    like = next((read_map(path) for path in beside if path.is_file()), Map(model.canonical, model.pixel_size_A))
    return dataclasses.replace(like, data=model.canonical, pixel_size_A=model.pixel_size_A)


def _filtered(volume: Map, settings: GenerateSettings) -> Map:
    data = volume.data
    if settings.bfactor_A2 is not None:
        data = sharpen_map(data, volume.pixel_size_A, settings.bfactor_A2)
    if settings.lowpass_A is not None:
        data = lowpass_map(data, volume.pixel_size_A, settings.lowpass_A)
    return dataclasses.replace(volume, data=data)


# which points --------------------------------------------------------------------------------------------------------


def _all_points(
    model: FlexModel, known: np.ndarray, settings: GenerateSettings, particles_dir: Path | None
) -> Iterator[tuple[str, np.ndarray]]:
    """Name, unique, and (f, K) latents of each series that the settings ask for; ``known`` (n, K) are finite."""
    taken: dict[str, int] = {}
    for request in parse_series(settings.series):
        for name, points in _points(request, model, known, settings.frames, particles_dir):
            taken[name] = taken.get(name, 0) + 1
            yield (name if taken[name] == 1 else f"{name}_{taken[name]}"), points


def _points(
    request: SeriesRequest, model: FlexModel, known: np.ndarray, frames: int, particles_dir: Path | None
) -> Iterator[tuple[str, np.ndarray]]:
    if request.kind == "axes":
        odd = frames + 1 - frames % 2
        if odd != frames:
            logger.info("%d frames along an axis instead of %d, so that the middle one is at the origin", odd, frames)
        for axis in range(model.latent_dims):
            yield f"axis_{axis + 1}", axis_points(known, axis, odd)
    elif request.kind == "curve":
        yield request.name, principal_curve(known, frames, displacement_metric(model, known))
    elif request.kind == "kmeans":
        yield request.name, cluster_points(known, request.count)
    elif request.kind == "between":
        first, last = (_end_point(end, model, particles_dir) for end in request.ends)
        yield request.name, line_points(first, last, frames)
    else:
        yield request.name, _fitting(_points_of_file(request.path), model, str(request.path))


def _points_of_file(path: Path) -> np.ndarray:
    from flexlib.particles.latents_io import read_latent_points

    if not path.is_file():
        raise InputError(f"generate.series: {path}: file not found")
    points = read_latent_points(path)
    if len(points) > MAX_POINTS:
        raise InputError(
            f"generate.series: {path}: {len(points)} rows, each would be a map: more than {MAX_POINTS} are taken for a "
            "list of particles"
        )
    return points


def _fitting(points: np.ndarray, model: FlexModel, where: str) -> np.ndarray:
    if points.ndim != 2 or points.shape[1] != model.latent_dims:
        raise InputError(f"{where}: {points.shape[-1]} numbers a row, the model has {model.latent_dims} latents")
    return points


def _end_point(end: int | tuple[float, ...], model: FlexModel, particles_dir: Path | None) -> np.ndarray:
    """(K,) coordinates as given, or those of the particle in a row (from 1) of the input file."""
    if isinstance(end, tuple):
        return _fitting(np.array([end]), model, "generate.series: between")[0]
    if particles_dir is None:
        raise InputError(
            f"generate.series: between: particle {end}: the folder that prepare wrote is not beside the training: "
            "name it (--particles), or give coordinates"
        )
    from flexlib.particles.latents_io import input_rows

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
    point = model.latents[found[0]].astype(np.float64)
    if not np.isfinite(point).all():
        raise InputError(f"generate.series: between: particle {end} has no latents yet")
    name = where.all_names[end - 1] if where.all_names else where.path.name
    logger.info("particle %d (%s) lies at %s", end, name, point.round(3))
    return point


def displacement_metric(model: FlexModel, latents: np.ndarray) -> np.ndarray:
    """(K, K) A^2: ``dz' metric dz`` is the mean squared displacement of the mesh vertices for a latent step dz.

    From the linear regression of displacements on the latents (n, K) of at most 512 particles.
    """
    rows = np.random.default_rng(0).permutation(len(latents))[:_METRIC_SAMPLE]
    z = latents[np.sort(rows)]
    moved = model.displacements_A(z).cpu().numpy().reshape(len(z), -1).astype(np.float64)
    slope = np.linalg.lstsq(z - z.mean(0), moved - moved.mean(0), rcond=None)[0]  # (K, nv * 3)
    return slope @ slope.T / len(model.mesh.vertices_A)


# writing -------------------------------------------------------------------------------------------------------------


def _write_series(
    out_dir: Path,
    name: str,
    table: pd.DataFrame,
    latents: np.ndarray,
    model: FlexModel,
    deformer: VolumeDeformer,
    volume: Map,
) -> np.ndarray:
    """Everything of one series but its rows of the table; returns (f,) rms displacement of each frame."""
    from flexlib.render.surface import display_level

    logger.info("%s: %d frames, from %s to %s", name, len(latents), latents[0].round(3), latents[-1].round(3))
    displacements_A = model.displacements_A(latents).cpu().numpy()  # (f, nv, 3)
    if len(latents) > 1 and np.ptp(displacements_A, axis=0).max() < _STILL_A:
        logger.warning("%s: nothing moves along this series: the training found no motion there", name)
    if table["beyond_data"].any():
        logger.warning("%s: frames %s lie beyond the data: only the prior rules there", name, _ranges(table))
    shutil.rmtree(out_dir / name, ignore_errors=True)  # an earlier run may have had more frames
    last = len(latents) - 1
    key_frames = [deformer.deform(displacements_A[i]) for i in sorted({0, last // 2, last})]
    level = display_level(key_frames[len(key_frames) // 2])
    movie = SeriesMovie(name, key_frames, level, volume.pixel_size_A)
    del key_frames  # at a large box they are large
    notes = zip(latents, table["num_particles"], table["beyond_data"], strict=True)
    for frame, (z, near, beyond) in enumerate(notes):
        moved = deformer.deform(displacements_A[frame])
        path = out_dir / name / f"frame_{frame:03d}.mrc"
        write_map(path, moved, volume.pixel_size_A, like=volume)
        write_displacement(path.with_suffix(".vtu"), model.mesh, displacements_A[frame])
        movie.add(moved, FrameNote(z, int(near), bool(beyond)))
    movie.write(out_dir / f"{name}.webp")
    with atomic_path(out_dir / f"{name}.cxc") as temporary:
        temporary.write_text(chimerax_script(name, table, level))
    return np.sqrt((displacements_A**2).sum(2).mean(1))


def _ranges(table: pd.DataFrame) -> str:
    """The frames beyond the data as text such as ``1-3, 40`` (from 1)."""
    numbers = table.loc[table["beyond_data"] > 0, "frame"].to_numpy() + 1
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs if len(run))


def chimerax_script(name: str, table: pd.DataFrame, level: float) -> str:
    """ChimeraX commands that open ``name``/*.mrc, beside the script, as one series and play it.

    First to and fro with a label for each frame, red where it is beyond the data; then without labels for ever, with a
    slider. ``table``: the series' rows of series.csv.
    """
    count = len(table)
    lines = [
        f"# {name}: {count} maps; the mesh's displacements are in {name}/*.vtu (ParaView)",
        f"open {name}/frame_*.mrc vseries true",
        f"volume #1 style surface step 1 level {level:.6g}",
        "view",
    ]
    if count == 1:
        return "\n".join(lines) + "\n"
    # one label a frame, hidden: perframe can change which is shown, but not what it says
    place = "xpos 0.03 ypos 0.04 size 20 visibility false"
    for row in table.itertuples():
        text, colour = f"frame {row.frame + 1} of {count}: {row.num_particles} particles near", "dim gray"
        if row.beyond_data:
            text, colour = f"{text} - BEYOND THE DATA", "red"
        lines.append(f'2dlabels create flex{row.frame + 1} text "{text}" color "{colour}" {place}')
    for end in (0, count + 1):
        lines.append(f'2dlabels create flex{end} text " " {place}')
    show = (
        '"vseries play #1 jumpTo $1; 2dlabels change flex$2 visibility false; 2dlabels change flex$3 visibility true"'
    )
    interval = _CHIMERAX_INTERVAL
    lines += [
        f"perframe {show} range 0,{count - 1} range 0,{count - 1} range 1,{count} interval {interval}",
        f"wait {count * interval + interval}",
        f"perframe {show} range {count - 1},0 range {count + 1},2 range {count},1 interval {interval}",
        f"wait {count * interval + interval}",
        "2dlabels change flex1 visibility false",
    ]
    if beyond := _ranges(table):
        text = f"beyond the data: frames {beyond}"
        lines.append(f'2dlabels create flexbeyond text "{text}" color red xpos 0.03 ypos 0.04 size 20')
    lines += ["vseries slider #1", "vseries play #1 direction oscillate loop true maxFrameRate 15"]
    return "\n".join(lines) + "\n"


# command line --------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """The command ``python -m flexlib.generate``; returns the exit status (1 after a mistake, told in one line)."""
    parser = argparse.ArgumentParser(
        prog="python -m flexlib.generate",
        description="Maps along the latent space of a training, finished or under way, or at chosen points of it.",
    )
    parser.add_argument("train_dir", type=Path, help="a training folder (train/cells~C/...) or a model file")
    parser.add_argument("out_dir", type=Path, help="folder to write")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--series", action="append", metavar="S", help=f"{SPELLINGS} (quoted); may be repeated")
    which.add_argument("--at", action="append", metavar="z1,z2,...", help="a map at this point; may be repeated")
    defaults = GenerateSettings()
    parser.add_argument("--frames", type=int, default=defaults.frames, help="maps per series (%(default)s)")
    parser.add_argument("--volume", type=Path, help="deform this map instead of the canonical one")
    parser.add_argument("--lowpass", type=float, metavar="A", help="low-pass filter on the map, Angstrom")
    parser.add_argument("--bfactor", type=float, metavar="A2", help="B-factor on the map; negative sharpens")
    parser.add_argument("--particles", type=Path, help="the folder that prepare wrote, if not beside the training")
    given = parser.parse_args(_joined_values(sys.argv[1:] if arguments is None else arguments))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if given.frames < 2:
            raise InputError(f"--frames: {given.frames}: a series has two maps or more")
        if given.lowpass is not None and given.lowpass <= 0:
            raise InputError(f"--lowpass: {given.lowpass:g} is not a resolution in Angstrom")
        points = None
        if given.at:
            chosen = [parse_point(text, "--at") for text in given.at]
            if len({len(point) for point in chosen}) > 1:
                raise InputError("--at: the points have different numbers of coordinates")
            points = np.array(chosen)
        settings = GenerateSettings(
            given.frames, given.series or defaults.series, given.volume, given.lowpass, given.bfactor
        )
        generate_series(given.train_dir, given.out_dir, settings, given.particles, points)
    except InputError as error:
        print(f"ERROR {error}", file=sys.stderr)
        return 1
    return 0


def _joined_values(arguments: Sequence[str]) -> list[str]:
    """``--at -1,0`` as ``--at=-1,0``: argparse would take the point for an option."""
    result: list[str] = []
    for argument in arguments:
        if result and result[-1] in ("--at", "--bfactor"):
            result[-1] += f"={argument}"
        else:
            result.append(argument)
    return result
