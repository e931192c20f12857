"""The stage reconstruct: half-maps at full resolution with and without motion, and what they tell.

How a map is solved for: ``map_solver.py``; what is derived from the half-maps: ``fsc.py``, ``postprocess.py``.

Symmetry: ``prepare.symmetry`` shows every particle in all m poses of the point group, each with latents of its own.
The normal equations of a rigid map are then symmetric by themselves, so that averaging its halves under the group would
change rounding only. The flexible map is of the particles as the flow leaves them, each copy by its own latents: it is
sharp where the flow describes the motion, and that need not be in all subunits. Averaging would mix subunits that were
followed with others that were not, so it is not done.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from flexlib.distributed import Group, launch
from flexlib.errors import InputError
from flexlib.files import atomic_path, write_json
from flexlib.images.batch import ImageSource
from flexlib.images.cache import cached_images
from flexlib.images.sources import open_full_images
from flexlib.imaging.fsc import corrected_fsc, frequencies_1_per_A, fsc, predicted_truth_fsc, resolution_at
from flexlib.imaging.maps import Map, read_map, write_map
from flexlib.imaging.masks import FULL_FLOOR, inside_mask
from flexlib.model.flex_model import FlexModel
from flexlib.projection.op import VoxelTensors
from flexlib.reconstruct.map_solver import Convergence, VertexProvider, solve_map
from flexlib.reconstruct.postprocess import guinier_b_factor, local_resolution, moving_region, sharpened_map
from flexlib.runtime import tune_process
from flexlib.tetra.tetmesh import MeshVoxels, TetraMesh, single_cell_mesh
from flexlib.tetra.voxels import voxelise
from flexlib.workflow_support.settings import ReconstructSettings

logger = logging.getLogger(__name__)

THRESHOLDS = (0.143, 0.5)


@dataclass(frozen=True)
class _Kind:
    """One way to see the particles: flexible or rigid."""

    name: str
    voxels: MeshVoxels
    vertices: VertexProvider


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

    Writes (docs/reconstruct.md) ``{flex,rigid}_{half1,half2,map}.mrc`` (map: the mean of the halves, in the consensus'
    density units), ``flex_sharpened.mrc``, ``flex_local_resolution.mrc``, ``moving_mask.mrc``, ``fsc.csv`` (see
    ``fsc_table``), ``resolution.json`` and ``convergence.csv`` (half, model, iteration, objective in nats, relative
    gradient). With ``settings.all_in_ram`` CTFs and moved vertices of a half are computed once and kept;
    ``cache_dir`` puts a copy of the images on fast scratch while they are read. ``processes`` share the particles
    (``flexlib.distributed``). Raises ``InputError`` where the trained point belongs to other particles or a half-set is
    empty.
    """
    launch(_reconstruct, (Path(particles_dir), Path(train_dir), Path(out_dir), settings), processes, device)


def _reconstruct(
    group: Group, device: str, particles_dir: Path, train_dir: Path, out_dir: Path, settings: ReconstructSettings
) -> None:
    """One rank's part of ``reconstruct``. All ranks solve for the maps; only the first writes them."""
    tune_process()
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else torch.device(device)
    source = open_full_images(particles_dir)
    mask = read_map(particles_dir / "full" / "mask.mrc")
    model = FlexModel.load(train_dir, place)
    if len(model.latents) != len(source):
        raise InputError(
            f"{train_dir}: has latents of {len(model.latents)} particles, {particles_dir} holds {len(source)}"
        )
    if mask.box != source.box:
        raise InputError(f"{particles_dir / 'full' / 'mask.mrc'}: its box is {mask.box}, the images' {source.box}")
    for half in (0, 1):
        if not (source.half_set == half).any():
            raise InputError(f"{particles_dir / 'particles.star'}: half-set {half + 1} is empty")

    inside = inside_mask(mask.data, FULL_FLOOR)
    flexible_voxels = voxelise(model.mesh, inside, source.pixel_size_A)
    kinds = [_Kind("flex", flexible_voxels, flexible_vertices(model, place))]
    if settings.rigid_baseline:
        mesh = single_cell_mesh(source.box * source.pixel_size_A)
        kinds.append(_Kind("rigid", voxelise(mesh, inside, source.pixel_size_A), rigid_vertices(mesh, place)))
    halves: dict[str, list[np.ndarray]] = {}
    courses: dict[str, list[Convergence]] = {}
    own_rows = np.concatenate([group.share(np.flatnonzero(source.half_set == half)) for half in (0, 1)])
    with cached_images(source, settings.cache_dir, own_rows) as images:
        for kind in kinds:
            solved = _solve_halves(images, kind, mask, settings, place, out_dir, group)
            halves[kind.name], courses[kind.name] = solved
    if not group.leads:
        return
    _write_csv(out_dir / "convergence.csv", _course_table(courses))

    moving, motion = moving_region(model, flexible_voxels, mask.data)
    write_map(out_dir / "moving_mask.mrc", moving, source.pixel_size_A, like=mask)
    table, results = fsc_table(halves, mask.data, source.pixel_size_A, moving)
    _write_csv(out_dir / "fsc.csv", table)
    results["moving_rms_displacement"] = motion
    results |= _write_derived_maps(out_dir, halves["flex"], mask, table["fsc_flex"].to_numpy(), results)
    results["converged"] = {
        f"{name}_half{half}": course.converged for name, both in courses.items() for half, course in enumerate(both, 1)
    }
    write_json(out_dir / "resolution.json", results)


def flexible_vertices(model: FlexModel, device: torch.device | str) -> VertexProvider:
    """rows -> (b, nv, 3) vertices in Angstrom, each particle's moved by the flow at its latents."""
    at_rest = torch.as_tensor(model.mesh.vertices_A, dtype=torch.float32, device=device)
    return lambda rows: at_rest + model.displacements_A(torch.as_tensor(model.latents[rows])).to(device)


def rigid_vertices(mesh: TetraMesh, device: torch.device | str) -> VertexProvider:
    """rows -> (nv, 3): the mesh at rest, the same for all."""
    at_rest = torch.as_tensor(mesh.vertices_A, dtype=torch.float32, device=device)
    return lambda rows: at_rest


def _solve_halves(
    source: ImageSource,
    kind: _Kind,
    mask: Map,
    settings: ReconstructSettings,
    device: torch.device,
    out_dir: Path,
    group: Group,
) -> tuple[list[np.ndarray], list[Convergence]]:
    """Solve for both half-maps of one kind, write them and their mean; (N, N, N) maps and their courses."""
    voxels = VoxelTensors.from_mesh_voxels(kind.voxels, device)
    mask_values = torch.as_tensor(mask.data.reshape(-1)[kind.voxels.index])
    halves, courses = [], []
    for half in (1, 2):
        volume, course = solve_map(
            source,
            np.flatnonzero(source.half_set == half - 1),
            voxels,
            kind.vertices,
            mask_values,
            settings.max_bfgs_iterations,
            keep_views=settings.all_in_ram,
            label=f"{kind.name} half {half}",
            group=group,
        )
        halves.append(volume.cpu().numpy())
        courses.append(course)
        if group.leads:
            write_map(out_dir / f"{kind.name}_half{half}.mrc", halves[-1], source.pixel_size_A, like=mask)
    if group.leads:
        write_map(out_dir / f"{kind.name}_map.mrc", 0.5 * (halves[0] + halves[1]), source.pixel_size_A, like=mask)
    return halves, courses


def fsc_table(
    halves: dict[str, list[np.ndarray]], mask: np.ndarray, pixel_size_A: float, moving: np.ndarray | None = None
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Half-map FSC of each model and its resolutions.

    Parameters: ``halves`` model name -> two (N, N, N) maps; ``mask`` (N, N, N) soft; ``moving`` (N, N, N) soft mask of
    the part that moves, if any: None or all zero for none.

    Returns
    -------
    table : shell, frequency_1_per_A, resolution_A and for each model ``fsc_<model>_unmasked`` (the maps as solved,
        which is inside the mask), ``_masked``, ``_randomised``, ``_corrected`` (see ``fsc.corrected_fsc``),
        ``fsc_<model>``: the corrected one again, the curve that counts; ``_predicted``: what it predicts for the mean
        map against the truth (``fsc.predicted_truth_fsc``); and where something moves ``_moving_masked``,
        ``_moving_randomised`` and ``_moving`` (corrected), the same within that part.
    resolutions : ``<model>_<threshold>_A`` and ``<model>_moving_<threshold>_A`` of the corrected curves.
    """
    box = len(mask)
    frequency = frequencies_1_per_A(box, pixel_size_A)
    with np.errstate(divide="ignore"):
        table = {"shell": np.arange(box // 2), "frequency_1_per_A": frequency, "resolution_A": 1.0 / frequency}
    resolutions: dict[str, Any] = {}
    for name, (first, second) in halves.items():
        curves = corrected_fsc(first, second, mask)
        corrected = np.asarray(curves["corrected"])
        table[f"fsc_{name}"] = corrected
        for column in ("unmasked", "masked", "randomised", "corrected"):
            table[f"fsc_{name}_{column}"] = np.asarray(curves[column])
        table[f"fsc_{name}_predicted"] = predicted_truth_fsc(corrected)
        found = {name: corrected}
        if moving is not None and moving.any():
            # the part that moves loses its signal earlier than the whole, and its phases are randomised from there
            low = np.flatnonzero(fsc(first, second, moving) < 0.8)
            within = corrected_fsc(first, second, moving, randomise_from=max(2, int(low[0])) if low.size else box // 2)
            table[f"fsc_{name}_moving"] = found[f"{name}_moving"] = np.asarray(within["corrected"])
            for column in ("masked", "randomised"):
                table[f"fsc_{name}_moving_{column}"] = np.asarray(within[column])
        for label, curve in found.items():
            for threshold in THRESHOLDS:
                resolutions[f"{label}_{threshold}_A"] = resolution_at(curve, threshold, box, pixel_size_A)
                logger.info("%s: %.2f A at FSC %g", label, resolutions[f"{label}_{threshold}_A"], threshold)
    return pd.DataFrame(table), resolutions


def _write_derived_maps(
    out_dir: Path, halves: list[np.ndarray], mask: Map, curve: np.ndarray, resolutions: dict[str, Any]
) -> dict[str, Any]:
    """Write local resolution and the sharpened map of the flexible reconstruction; what there is to tell of them."""
    pixel_size_A, resolution_A = mask.pixel_size_A, resolutions["flex_0.143_A"]
    local_A = local_resolution(halves[0], halves[1], mask.data, pixel_size_A, resolution_A)
    write_map(out_dir / "flex_local_resolution.mrc", local_A, pixel_size_A, like=mask)
    mean = 0.5 * (halves[0] + halves[1])
    b_factor_A2 = guinier_b_factor(mean, curve, pixel_size_A, resolution_A)
    if b_factor_A2 is None:
        logger.info("flex_sharpened.mrc: %.2f A leaves no range for a Guinier fit; not sharpened", resolution_A)
    else:
        logger.info("flex_sharpened.mrc: B-factor %.0f A^2", b_factor_A2)
    sharp = sharpened_map(mean, curve, pixel_size_A, resolution_A, b_factor_A2 or 0.0)
    write_map(out_dir / "flex_sharpened.mrc", sharp, pixel_size_A, like=mask)
    percentiles = np.percentile(local_A[mask.data > 0.5], [5, 50, 95])
    return {
        "flex_b_factor_A2": b_factor_A2,
        "flex_local_A": {f"percentile_{p}": float(v) for p, v in zip((5, 50, 95), percentiles, strict=True)},
    }


def _course_table(courses: dict[str, list[Convergence]]) -> pd.DataFrame:
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


def _write_csv(path: Path, table: pd.DataFrame) -> None:
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False)
