"""The stage reconstruct: half-maps at full resolution with and without motion, and what they show.

How a map is solved for: ``map_solver.py``; what is derived from the half-maps: ``fsc_table.py``, ``postprocess.py``.

Symmetry: ``prepare.symmetry`` shows every particle in all m poses of the point group, each with latents of its own.
The normal equations of a rigid map are then symmetric by themselves, so that averaging its halves under the group would
change rounding only. The flexible map is of the particles as the flow leaves them, each copy by its own latents: it is
sharp where the flow describes the motion, and that need not be in all subunits. Averaging would mix subunits that were
followed with others that were not, so it is not done.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pandas as pd

from flexlib.distributed import Ranks, launch
from flexlib.files import atomic_path
from flexlib.images.cache import cached_images
from flexlib.images.sources import open_full_images
from flexlib.imaging.maps import Map, read_map, write_map
from flexlib.imaging.masks import FULL_FLOOR, inside_mask
from flexlib.layout import ParticlesFolder, ReconstructFolder, TrainFolder
from flexlib.model.flex_model import FlexModel
from flexlib.reconstruct.fsc_table import fsc_table
from flexlib.reconstruct.kinds import check_input, flexible_kind, own_rows, rigid_kind, solve_half
from flexlib.reconstruct.map_solver import Convergence
from flexlib.reconstruct.postprocess import guinier_b_factor, local_resolution, moving_region, sharpened_map
from flexlib.records import ResolutionRecord
from flexlib.runtime import describe_device, resolve_device, tune_process
from flexlib.workflow_support.settings import ReconstructSettings

logger = logging.getLogger(__name__)

LOCAL_PERCENTILES = (5, 50, 95)  # of the local resolution, in the record


def reconstruct(
    particles_dir: str | Path,
    train_dir: str | Path,
    out_dir: str | Path,
    settings: ReconstructSettings,
    device: str = "auto",
    *,
    processes: int = 1,
) -> None:
    """Half-maps at full resolution, flexible and rigid, their FSC and the course of their solution.

    Writes what ``layout.ReconstructFolder`` lists (docs/reconstruct.md): maps in the consensus' density units; the FSC
    curves are those of ``fsc_table``, and the course of a solution has the columns half, model, iteration, objective in
    nats, relative gradient.

    Parameters
    ----------
    particles_dir
        What prepare has written.
    train_dir
        What train has written for one sweep point.
    out_dir
        Folder to write into.
    settings
        With ``all_in_ram`` CTFs and moved vertices of a half are computed once and kept; ``cache_dir`` puts a copy of
        the images on fast scratch while they are read.
    device
        See ``runtime.resolve_device``.
    processes
        Ranks that share the particles (``flexlib.distributed``).

    Raises
    ------
    InputError
        The model belongs to other particles, or a half-set is empty.
    """
    folders = ParticlesFolder(Path(particles_dir)), TrainFolder(Path(train_dir)), ReconstructFolder(Path(out_dir))
    launch(_reconstruct, (*folders, settings), processes, device)


def _reconstruct(
    ranks: Ranks,
    device: str,
    particles: ParticlesFolder,
    train: TrainFolder,
    out: ReconstructFolder,
    settings: ReconstructSettings,
) -> None:
    """One rank's part of ``reconstruct``. All ranks solve for the maps; only the first writes them."""
    tune_process()
    chosen = resolve_device(device)
    source = open_full_images(particles.path)
    mask = read_map(particles.full_mask)
    model = FlexModel.load(train.path, chosen)
    check_input(source, mask, model, particles, train, settings.weigh_particles)

    inside = inside_mask(mask.data, FULL_FLOOR)
    kinds = [flexible_kind(model, inside, source, settings)]
    if settings.rigid_baseline:
        kinds.append(rigid_kind(model, inside, source, settings))
    if kinds[0].probability is not None:
        weight = kinds[0].probability
        logger.info("%d images weighed by their probability count as %.1f particles", len(weight), weight.sum())
    halves: dict[str, list[np.ndarray]] = {}
    courses: dict[str, list[Convergence]] = {}
    with cached_images(source, settings.cache_dir, own_rows(source, ranks)) as images:
        for kind in kinds:
            solved = [solve_half(images, half, kind, mask, settings, chosen, ranks) for half in (1, 2)]
            halves[kind.name], courses[kind.name] = ([*part] for part in zip(*solved, strict=True))
            if ranks.leads:
                _write_half_maps(out, kind.name, halves[kind.name], source.pixel_size_A, mask)
    if not ranks.leads:
        return
    write_csv(out.convergence, course_table(courses))
    moving, motion_A = moving_region(model, kinds[0].voxels, mask.data)
    write_map(out.moving_mask, moving, source.pixel_size_A, like=mask)
    table, resolutions_A = fsc_table(halves, mask.data, source.pixel_size_A, moving)
    write_csv(out.fsc, table)
    b_factor_A2, local_A = _write_derived_maps(out, halves["flex"], mask, table["fsc_flex"].to_numpy(), resolutions_A)
    ResolutionRecord(
        resolutions_A=resolutions_A,
        moving_rms_displacement=motion_A,
        flex_b_factor_A2=b_factor_A2,
        flex_local_A=local_A,
        converged={
            f"{name}_half{half}": course.converged
            for name, both in courses.items()
            for half, course in enumerate(both, 1)
        },
        device=describe_device(chosen),
        poses={kind.name: "input" if kind.pose is None else "refined" for kind in kinds},
        effective_particles=None if kinds[0].probability is None else float(kinds[0].probability.sum()),
    ).write(out.resolution)


def _write_half_maps(
    out: ReconstructFolder, kind: str, halves: list[np.ndarray], pixel_size_A: float, like: Map
) -> None:
    """Write both half-maps of one kind and their mean."""
    for number, volume in enumerate(halves, 1):
        write_map(out.half(kind, number), volume, pixel_size_A, like=like)
    write_map(out.map(kind), 0.5 * (halves[0] + halves[1]), pixel_size_A, like=like)


def _write_derived_maps(
    out: ReconstructFolder,
    halves: list[np.ndarray],
    mask: Map,
    curve: np.ndarray,
    resolutions_A: dict[str, float],
) -> tuple[float | None, dict[str, float]]:
    """Write local resolution and the sharpened map of the flexible reconstruction.

    Returns
    -------
    b_factor_A2
        Of the sharpening; None where there was no fit.
    local_A
        ``LOCAL_PERCENTILES`` of the local resolution within the mask.
    """
    pixel_size_A, resolution_A = mask.pixel_size_A, resolutions_A["flex_0.143"]
    local_A = local_resolution(halves[0], halves[1], mask.data, pixel_size_A, resolution_A)
    write_map(out.local_resolution, local_A, pixel_size_A, like=mask)
    mean = 0.5 * (halves[0] + halves[1])
    b_factor_A2 = guinier_b_factor(mean, curve, pixel_size_A, resolution_A)
    name = out.sharpened.name
    if b_factor_A2 is None:
        logger.info("%s: %.2f A leaves no range for a Guinier fit; not sharpened", name, resolution_A)
    else:
        logger.info("%s: B-factor %.0f A^2", name, b_factor_A2)
    sharp = sharpened_map(mean, curve, pixel_size_A, resolution_A, b_factor_A2 or 0.0)
    write_map(out.sharpened, sharp, pixel_size_A, like=mask)
    percentiles = np.percentile(local_A[mask.data > 0.5], LOCAL_PERCENTILES)
    return b_factor_A2, {f"percentile_{p}": float(v) for p, v in zip(LOCAL_PERCENTILES, percentiles, strict=True)}


def course_table(courses: dict[str, list[Convergence]]) -> pd.DataFrame:
    """A row for each iteration of each solution."""
    tables = [
        pd.DataFrame(
            {
                "half": half,
                "model": name,
                "iteration": np.arange(course.iterations + 1),
                "objective": course.objective,
                "relative_gradient": course.relative_gradient,
            }
        )
        for name, both in courses.items()
        for half, course in enumerate(both, 1)
    ]
    return pd.concat(tables)


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write a table, atomically, without its index."""
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False)
