"""Half-maps of two models that never met, in one shape, and the maps of the motion's error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from flexlib.distributed import Ranks
from flexlib.images.cache import cached_images
from flexlib.images.sources import FullImages
from flexlib.imaging.maps import Map
from flexlib.imaging.masks import FULL_FLOOR, inside_mask
from flexlib.model.flex_model import FlexModel
from flexlib.reconstruct.kinds import flexible_kind, own_rows, solve_half
from flexlib.reconstruct.map_solver import Convergence
from flexlib.reconstruct.normal_equations import Displacements
from flexlib.tetra.tetmesh import MeshVoxels
from flexlib.validate.common_frame import CommonFrame, Flow
from flexlib.workflow_support.settings import ReconstructSettings


@dataclass(frozen=True)
class IndependentHalves:
    """Both half-maps (N, N, N) in the first model's rest shape, and the course of their solution."""

    maps: list[np.ndarray]
    courses: list[Convergence]


def independent_halves(
    source: FullImages,
    frame: CommonFrame,
    mask: Map,
    settings: ReconstructSettings,
    device: torch.device,
    ranks: Ranks,
) -> IndependentHalves:
    """Each half-set's map, of its own particles, with the motion that its own model gives them.

    The second is solved for in the first one's rest shape: its particles' displacements start there. No map is
    interpolated.
    """
    inside = inside_mask(mask.data, FULL_FLOOR)
    flows = frame.of_first, frame.of_second
    maps, courses = [], []
    with cached_images(source, settings.cache_dir, own_rows(source, ranks)) as images:
        for number, (model, flow) in enumerate(zip((frame.first, frame.second), flows, strict=True), 1):
            kind = flexible_kind(model, inside, source, settings, _of_rows(model, flow, device))
            volume, course = solve_half(images, number, kind, mask, settings, device, ranks, "independent")
            maps.append(volume)
            courses.append(course)
    return IndependentHalves(maps, courses)


def _of_rows(model: FlexModel, flow: Flow, device: torch.device) -> Displacements:
    return lambda rows: flow(torch.as_tensor(model.latents[rows])).to(device)


def error_map(squared_A2: np.ndarray, voxels: MeshVoxels) -> np.ndarray:
    """(N, N, N) float32 in Angstrom, of squares (nv,) at the vertices; beyond the voxels the nearest one's goes on.

    So that a surface drawn around the molecule can be coloured by it everywhere.
    """
    at_voxels = np.einsum("nk,nk->n", voxels.bary, np.sqrt(squared_A2)[voxels.cells[voxels.cell]])
    whole = np.zeros(voxels.box**3, np.float32)
    whole[voxels.index] = np.maximum(at_voxels, 0.0)
    known = np.zeros(voxels.box**3, bool)
    known[voxels.index] = True
    shape = (voxels.box,) * 3
    nearest: Any = ndimage.distance_transform_edt(~known.reshape(shape), return_distances=False, return_indices=True)
    return whole.reshape(shape)[tuple(nearest)]
