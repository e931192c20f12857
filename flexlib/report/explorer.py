"""The live surface: the flow itself and the canonical map's surface, packed for explorer_flow.js to move."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from markupsafe import Markup

from flexlib.generate.latents import MAX_FRAMES
from flexlib.generate.neighbourhood import NEAR_STANDARD_DEVIATIONS, Neighbourhood
from flexlib.generate.series import axis_latents
from flexlib.imaging.fourier import fourier_crop_map, fourier_pad_map
from flexlib.model.flex_model import FlexModel
from flexlib.model.frame import MotionFrame, RigidCore
from flexlib.render import surface
from flexlib.render.colours import rgb
from flexlib.report.formats import number, shell_word
from flexlib.report.markup import render
from flexlib.report.morph import Gallery
from flexlib.report.packing import pack_column, pack_rows
from flexlib.report.results import Results
from flexlib.runtime import kd_tree
from flexlib.tetra.tetmesh import MeshVoxels
from flexlib.tetra.voxels import tetra_index_map, voxelise

EXPLORER_ROOM_BYTES = 2.5e6  # of the page
STILL_A = 0.01  # a model that moves nothing farther is at rest
_MOST_NODES, _FEWEST_NODES = 120_000, 2_000  # of the grid about the surface
_SHARP_BOX = 128  # maps of smaller boxes are padded in Fourier space to this one
_DUST, _THIN = 0.01, 0.7  # of the volume inside: smaller pieces are left out, by a density that is below the surface's
_CROSSED = (0.35, 2.8)  # densities that the surface may lie at: as far as cells shrink or grow
_TOLERANCE_A = 0.02  # rms over states and vertices, of displacements by fewer fields
_STATES = 1000  # latents of particles, and as many anywhere in the sliders' reach, whose displacements count
_PAINTED_STATES = 200  # particles that set the colours' range
_TOLERANCE_A = 0.02  # rms over states and vertices, of displacements by fewer fields
_STATES = 1000  # latents of particles, and as many anywhere in the sliders' reach, whose displacements count
_PAINTED_STATES = 200  # particles that set the colours' range
_DENSITIES = 2.0 ** np.array([-1.5, -1.0, -0.5, 0.5, 1.0, 1.5])  # of which the depth below the surface is known
_PROFILE_A, _PROFILE_STEPS = 12.0, 24  # how deep, and how far outside, densities are looked for


def explorer_section(results: Results, gallery: Gallery, room_bytes: float = EXPLORER_ROOM_BYTES) -> Markup:
    """A surface that follows a dragged point, in at most ``room_bytes`` of the page."""
    motion = gallery.motion
    if motion is None or not np.isfinite(motion.model.latents).all(1).any():
        return render("explorer", state="absent")
    reach = Reach.of(_known_latents(results, motion))
    if float(motion.displacements_A(reach.states(_PAINTED_STATES // 2)).abs().max()) < STILL_A:
        return render("explorer", state="at rest")
    mask = None if results.mask is None else results.mask.data
    rotation = gallery.morphs[0].rotation if gallery.morphs else np.eye(3)
    content = explorer_content(motion, reach, mask, rotation, room_bytes)
    if content is None:
        return render("explorer", state="too large")
    return render(
        "explorer",
        state="alive",
        content=json.dumps(content, separators=(",", ":")),
        dims=motion.model.latent_dims,
        paint=surface.PAINT,
        paint_limit=number(content["paint_limit_A"], 2),
        core_share=None if motion.core is None else motion.core.share,
        low=reach.low,
        high=reach.high,
        start=reach.start,
        folder=shell_word(results.train_folder.path.as_posix()),
        name=results.name,
    )


def _known_latents(results: Results, motion: MotionFrame) -> np.ndarray:
    """(n, K) of the particles that the page shows, else of all that the model knows."""
    latents = motion.model.latents
    if results.latents is not None and results.latent_dims == latents.shape[1]:
        latents = results.latents[[f"z{i + 1}" for i in range(results.latent_dims)]].to_numpy()
    return latents[np.isfinite(latents).all(1)].astype(np.float64)


@dataclass(frozen=True)
class Reach:
    """Where the sliders go, and where they begin."""

    known: np.ndarray  # (n, K) latents of the particles
    low: np.ndarray  # (K,)
    high: np.ndarray
    start: np.ndarray

    @classmethod
    def of(cls, known: np.ndarray) -> Reach:
        """From a little below the lowest particles to a little above the highest, without strays."""
        low, high = np.percentile(known, [0.5, 99.5], axis=0)
        margin = np.maximum(0.1 * (high - low), 1e-3)
        return cls(known, low - margin, high + margin, axis_latents(known, 0, 3)[1])

    def states(self, count: int) -> np.ndarray:
        """(s, K) at most ``count`` particles, evenly spaced, and as many points anywhere between the ends."""
        anywhere = np.random.default_rng(0).uniform(self.low, self.high, (count, len(self.low)))
        return np.concatenate([self.particles(count), anywhere])

    def particles(self, count: int) -> np.ndarray:
        """(s, K) at most ``count`` particles, evenly spaced."""
        return self.known[:: max(1, -(-len(self.known) // count))]


def explorer_content(
    motion: MotionFrame, reach: Reach, mask: np.ndarray | None, rotation: np.ndarray, room_bytes: float
) -> dict[str, Any] | None:
    """What explorer_flow.js and explorer.js need; None where even a coarse surface does not fit ``room_bytes``.

    Parameters
    ----------
    motion, reach
        The model in the frame of the generated maps, and the latents to be shown.
    mask
        (N, N, N) solvent mask, for the contour level.
    rotation
        (3, 3) view to begin with.
    room_bytes
        The most that the JSON may take.
    """
    near, most = Neighbourhood(reach.known), _MOST_NODES
    common: dict[str, Any] = {
        "low": _numbers(reach.low),
        "high": _numbers(reach.high),
        "start": _numbers(reach.start),
        "spread": _numbers(near.spread),
        "near": NEAR_STANDARD_DEVIATIONS * np.sqrt(len(reach.low)),
        "fewest": near.fewest,
        "most_points": MAX_FRAMES,
        "rotation": _numbers(rotation),
        "paint": [rgb(colour) for colour in surface.PAINT],
    }
    model = motion.model
    voxels = voxelise(model.mesh, model.canonical != 0, model.pixel_size_A)
    level = surface.display_level(model.canonical, mask)
    common["level"] = level
    while most >= _FEWEST_NODES:
        shown = RidingNodes.of(model, voxels, level, most)
        if shown is None:
            return None
        content = common | _packed_flow(motion, reach, shown) | shown.packed(motion, reach)
        size = len(json.dumps(content, separators=(",", ":")))
        if size <= room_bytes:
            return content
        most = int(min(0.9 * room_bytes / size, 0.7) * len(shown.index))
    return None


# The density about the surface, and the mesh that it rides on ---------------------------------------------------------


@dataclass(frozen=True)
class RidingNodes:
    """The nodes of a grid that the surface may come near; each rides on a cell of the mesh."""

    mesh_vertices_A: np.ndarray  # (nv, 3) those of the mesh that carry something
    own: np.ndarray  # (nv,) their numbers in the model's mesh
    cells: np.ndarray  # (nc, 4) of those vertices
    box: int  # of the grid
    index: np.ndarray  # (n,) flat index of each node in the grid (z, y, x), increasing
    density: np.ndarray  # (n,) in units of the surface's
    cell: np.ndarray  # (n,) that a node rides on
    weights: np.ndarray  # (n, 4) of the cell's corners

    @classmethod
    def of(cls, model: FlexModel, voxels: MeshVoxels, level: float, most: int) -> RidingNodes | None:
        """At most ``most`` nodes of the canonical map, which ``voxels`` are of; None where nothing is at ``level``."""
        box = max(model.box, _SHARP_BOX)
        while True:
            volume = _without_dust(_resampled(model.canonical, box) / level)
            near = _near_surface(volume)
            if near.sum() <= most:
                break
            box = 2 * int(0.49 * box * (most / near.sum()) ** (1 / 3))
        if not (near & (volume > 1)).any():
            return None
        index = np.flatnonzero(near)
        at = np.stack(np.unravel_index(index, near.shape)[::-1], axis=1) - box // 2
        points_A = at * (model.pixel_size_A * model.box / box)
        used, cell = np.unique(_cell_of(voxels, points_A), return_inverse=True)
        own, cells = np.unique(model.mesh.cells[used], return_inverse=True)
        cells = cells.reshape(-1, 4)
        corners = model.mesh.vertices_A[own]
        return cls(corners, own, cells, box, index, volume[near], cell, _barycentric(corners[cells[cell]], points_A))

    def packed(self, motion: MotionFrame, reach: Reach) -> dict[str, Any]:
        """For the page; the nodes' places are the weighted corners'."""
        moved = motion.displacements_A(reach.particles(_PAINTED_STATES)).cpu().numpy()[:, self.own]
        solid = self.density > 1
        weights, at = self.weights[solid], self.cells[self.cell[solid]]
        far = [np.linalg.norm(np.einsum("nk,nkx->nx", weights, state[at]), axis=1) for state in moved]
        return {
            "paint_limit_A": float(np.quantile(far, 0.99)),
            "mesh": [pack_column(axis, 16) for axis in self.mesh_vertices_A.T],
            "cells": _integers(self.cells),
            "box": self.box,
            "index": pack_rows(self.index),
            "density": pack_column(np.clip(self.density, 0.0, 4.0), 16),
            "cell": _integers(self.cell),
            "weights": [pack_column(weight, 16) for weight in self.weights.T[1:]],
        }


def _resampled(volume: np.ndarray, box: int) -> np.ndarray:
    if box == len(volume):
        return volume
    return fourier_pad_map(volume, box) if box > len(volume) else fourier_crop_map(volume, box)


def _without_dust(volume: np.ndarray) -> np.ndarray:
    """The density without the smallest pieces of what the surface at 1 encloses."""
    from scipy import ndimage

    piece, _ = ndimage.label(volume > 1)
    size = np.bincount(piece.ravel())
    size[0] = 0
    return np.where((size < _DUST * size.sum())[piece] & (piece > 0), np.float32(_THIN), volume)


def _near_surface(volume: np.ndarray) -> np.ndarray:
    """(N, N, N) bool: the corners of all cubes of the grid that the surface may cross, where density changes too."""
    from scipy import ndimage

    low, high = _CROSSED
    crossed = (ndimage.minimum_filter(volume, 2) < high) & (ndimage.maximum_filter(volume, 2) > low)
    return ndimage.maximum_filter(crossed, 2, origin=-1)


def _cell_of(voxels: MeshVoxels, points_A: np.ndarray) -> np.ndarray:
    """(n,) cell that carries the density at each point: that of the nearest voxel that has one."""
    centre = voxels.box // 2
    nearest = np.rint(points_A / voxels.pixel_size_A).astype(int) + centre
    cell = tetra_index_map(voxels)[tuple(np.clip(nearest, 0, voxels.box - 1)[:, ::-1].T)]
    bare = cell < 0
    if bare.any():
        at = np.stack(np.unravel_index(voxels.index, (voxels.box,) * 3)[::-1], axis=1)
        cell[bare] = voxels.cell[kd_tree(at).query(points_A[bare] / voxels.pixel_size_A + centre)[1]]
    return cell


def _barycentric(corners_A: np.ndarray, points_A: np.ndarray) -> np.ndarray:
    """(n, 4) weights of points in their cells (n, 4, 3); outside a cell some are negative."""
    edges = (corners_A[:, 1:] - corners_A[:, :1]).transpose(0, 2, 1)
    last = np.linalg.solve(edges, (points_A - corners_A[:, 0])[..., None])[..., 0]
    return np.concatenate([1 - last.sum(1, keepdims=True), last], axis=1)


# The flow ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _packed_flow(motion: MotionFrame, reach: Reach, shown: RidingNodes) -> dict[str, Any]:
    """The perceptron, and the few fields that hold its displacements at the surface's mesh vertices."""
    flow = motion.model.flow.assembled()
    factors = flow.factors(torch.as_tensor(reach.states(_STATES), dtype=torch.float32)).double().numpy()
    fields = flow.fields_A.double().numpy().reshape(factors.shape[1], -1, 3)
    own = fields[:, shown.own].reshape(len(fields), -1)
    # the second moment of the factors is R' R, so that R times the fields has the states' own spread
    spread = np.linalg.qr(factors / np.sqrt(len(factors)), mode="r")
    _, size, modes = np.linalg.svd(spread @ own, full_matrices=False)
    left_A = np.sqrt(np.append(np.cumsum(size[::-1] ** 2)[::-1], 0.0) / len(shown.own))
    modes = modes[: int(np.argmax(left_A <= _TOLERANCE_A))]
    moments = np.zeros((len(fields), 0)) if motion.core is None else _core_moments(motion.core, fields)
    perceptron = flow.flow
    linears = [layer for layer in perceptron.hidden if isinstance(layer, torch.nn.Linear)]
    return {
        "input": {"weight": _floats(perceptron.input_matrix), "bias": _floats(perceptron.input_offset)},
        "layers": [{"weight": _floats(layer.weight), "bias": _floats(layer.bias)} for layer in linears],
        "output": _floats(torch.from_numpy(np.concatenate([own @ modes.T, moments], axis=1).T)),
        "fields": [pack_column(mode, 16) for mode in modes],
        "core": None if motion.core is None else _packed_core(motion.core),
    }


def _core_moments(core: RigidCore, fields_A: np.ndarray) -> np.ndarray:
    """(m, 12) of each field (m, nv, 3): the core's shift, and its overlap with the core at rest, row by row.

    Both are linear in the displacements: ``RigidCore.aligned`` takes nothing else of them to find the rotation.
    """
    mass, centred = _core_mass(core)
    shift = np.einsum("v,mvi->mi", mass, fields_A)
    overlap = np.einsum("mvi,v,vj->mij", fields_A, mass, centred, optimize=True)
    return np.concatenate([shift, overlap.reshape(-1, 9)], axis=1)


def _packed_core(core: RigidCore) -> dict[str, Any]:
    mass, centred = _core_mass(core)
    vertices = core.vertices_A.numpy()
    at_rest = np.einsum("vi,v,vj->ij", centred, mass, centred)
    return {"centre": _numbers(mass @ vertices), "at_rest": _numbers(at_rest)}


def _core_mass(core: RigidCore) -> tuple[np.ndarray, np.ndarray]:
    """(nv,) share of the core's density, whose sum is 1, and (nv, 3) vertices from the core's centre."""
    mass = (core.weight * core.density_share).numpy()
    mass = mass / mass.sum()
    vertices = core.vertices_A.numpy()
    return mass, vertices - mass @ vertices


def _floats(values: torch.Tensor) -> str:
    """Base64 of little-endian float32, row by row."""
    return base64.b64encode(values.detach().cpu().numpy().astype("<f4").tobytes()).decode()


def _integers(values: np.ndarray) -> dict[str, Any]:
    """Base64 of little-endian integers, of 16 bits where these will do."""
    bits = 16 if values.max() < 2**16 else 32
    return {"bits": bits, "data": base64.b64encode(values.astype(f"<u{bits // 8}").tobytes()).decode()}


def _numbers(values: np.ndarray) -> list[float]:
    return [float(value) for value in np.asarray(values).ravel()]
