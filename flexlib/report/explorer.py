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
from flexlib.imaging.fourier import fourier_pad_map
from flexlib.model.flex_model import FlexModel
from flexlib.model.frame import MotionFrame, RigidCore
from flexlib.render import surface
from flexlib.report.formats import number, shell_word
from flexlib.report.markup import render
from flexlib.report.morph import Gallery
from flexlib.report.packing import pack_column
from flexlib.report.results import Results
from flexlib.tetra.tetmesh import MeshVoxels
from flexlib.tetra.voxels import tetra_index_map, voxelise

EXPLORER_ROOM_BYTES = 2.5e6  # of the page
STILL_A = 0.01  # a model that moves nothing farther is at rest
_MOST_FACES, _FEWEST_FACES = 60_000, 2_000
_SHARP_BOX = 128  # maps of smaller boxes are padded in Fourier space to this one
_DUST = 0.01  # of all triangles: smaller pieces of the surface are left out
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
    near, faces = Neighbourhood(reach.known), _MOST_FACES
    common: dict[str, Any] = {
        "low": _numbers(reach.low),
        "high": _numbers(reach.high),
        "start": _numbers(reach.start),
        "spread": _numbers(near.spread),
        "near": NEAR_STANDARD_DEVIATIONS * np.sqrt(len(reach.low)),
        "fewest": near.fewest,
        "most_points": MAX_FRAMES,
        "rotation": _numbers(rotation),
        "paint": [[int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for colour in surface.PAINT],
    }
    model = motion.model
    voxels = voxelise(model.mesh, model.canonical != 0, model.pixel_size_A)
    level = surface.display_level(model.canonical, mask)
    common["level"] = level
    while faces >= _FEWEST_FACES:
        shown = RidingSurface.of(model, voxels, level, faces)
        if shown is None:
            return None
        content = common | _packed_flow(motion, reach, shown) | shown.packed(motion, reach)
        size = len(json.dumps(content, separators=(",", ":")))
        if size <= room_bytes:
            return content
        faces = int(min(0.9 * room_bytes / size, 0.7) * faces)
    return None


# The surface and the mesh that it rides on -------------------------------------------------------------------------


@dataclass(frozen=True)
class RidingSurface:
    """Triangles of the canonical map's surface; each vertex rides on a cell of the mesh."""

    mesh_vertices_A: np.ndarray  # (nv, 3) those of the mesh that carry something
    own: np.ndarray  # (nv,) their numbers in the model's mesh
    cells: np.ndarray  # (nc, 4) of those vertices
    cell: np.ndarray  # (n,) that a surface vertex rides on
    weights: np.ndarray  # (n, 4) of the cell's corners
    inward: np.ndarray  # (n, 4) by how much the weights change an Angstrom below the surface
    depth_A: np.ndarray  # (n, 6) where the density is ``_DENSITIES`` times that of the surface; negative outside
    peak: np.ndarray  # (n,) the highest density below, in units of that of the surface
    faces: np.ndarray  # (nf, 3), seen from outside against the clock

    @classmethod
    def of(cls, model: FlexModel, voxels: MeshVoxels, level: float, max_faces: int) -> RidingSurface | None:
        """The surface of the canonical map, whose ``voxels`` those are, at ``level``; None where there is none."""
        fine = fourier_pad_map(model.canonical, _SHARP_BOX) if model.box < _SHARP_BOX else model.canonical
        pixel_A = model.pixel_size_A * model.box / len(fine)
        vertices, faces = _outward(*_without_dust(*surface.isosurface(fine, pixel_A, level, max_faces)))
        if not len(faces):
            return None
        used, cell = np.unique(_cell_of(voxels, vertices), return_inverse=True)
        own, cells = np.unique(model.mesh.cells[used], return_inverse=True)
        cells = cells.reshape(-1, 4)
        corners = model.mesh.vertices_A[own]
        below = vertices + _downwards(fine, pixel_A, vertices)
        weights, lower = (_barycentric(corners[cells[cell]], points) for points in (vertices, below))
        depth_A, peak = _profile(fine / level, pixel_A, vertices, below - vertices)
        return cls(corners, own, cells, cell, weights, lower - weights, depth_A, peak, faces)

    def packed(self, motion: MotionFrame, reach: Reach) -> dict[str, Any]:
        """For the page; positions are the weighted corners'."""
        moved = motion.displacements_A(reach.particles(_PAINTED_STATES)).cpu().numpy()[:, self.own]
        at = self.cells[self.cell]
        far = [np.linalg.norm(np.einsum("nk,nkx->nx", self.weights, state[at]), axis=1) for state in moved]
        return {
            "paint_limit_A": float(np.quantile(far, 0.98)),
            "mesh": [pack_column(axis, 16) for axis in self.mesh_vertices_A.T],
            "cells": _integers(self.cells),
            "cell": _integers(self.cell),
            "weights": [pack_column(weight, 16) for weight in self.weights.T[1:]],
            "inward": [pack_column(change, 16) for change in self.inward.T[1:]],
            "depth": [pack_column(depth, 8) for depth in self.depth_A.T],
            "peak": pack_column(2 * np.log2(np.clip(self.peak, 1.0, 8.0)), 8),
            "faces": _integers(self.faces),
        }


def _without_dust(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The surface without its smallest pieces."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    if not len(faces):
        return vertices, faces
    ends = (faces[:, [0, 1]].ravel(), faces[:, [1, 2]].ravel())
    graph = coo_matrix((np.ones(len(ends[0]), bool), ends), (len(vertices), len(vertices)))
    piece = connected_components(graph, directed=False)[1][faces[:, 0]]
    kept = faces[np.bincount(piece)[piece] >= _DUST * len(faces)]
    own, numbers = np.unique(kept, return_inverse=True)
    return vertices[own], numbers.reshape(-1, 3)


def _outward(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The triangles in the order that makes the volume inside positive."""
    corner = vertices[faces].astype(np.float64)
    inside = np.einsum("ni,ni->", corner[:, 0], np.cross(corner[:, 1], corner[:, 2]))
    return vertices, faces if inside > 0 else faces[:, ::-1]


def _cell_of(voxels: MeshVoxels, points_A: np.ndarray) -> np.ndarray:
    """(n,) cell that carries the density at each point: that of the nearest voxel that has one."""
    from scipy.spatial import cKDTree

    centre = voxels.box // 2
    nearest = np.rint(points_A / voxels.pixel_size_A).astype(int) + centre
    cell = tetra_index_map(voxels)[tuple(np.clip(nearest, 0, voxels.box - 1)[:, ::-1].T)]
    bare = cell < 0
    if bare.any():
        # counted from beyond the corner: where denormal numbers count as zero, a tree that splits at zero never ends
        at = np.stack(np.unravel_index(voxels.index, (voxels.box,) * 3)[::-1], axis=1) + 1.0
        cell[bare] = voxels.cell[cKDTree(at).query(points_A[bare] / voxels.pixel_size_A + centre + 1.0)[1]]
    return cell


def _barycentric(corners_A: np.ndarray, points_A: np.ndarray) -> np.ndarray:
    """(n, 4) weights of points in their cells (n, 4, 3); outside a cell some are negative."""
    edges = (corners_A[:, 1:] - corners_A[:, :1]).transpose(0, 2, 1)
    last = np.linalg.solve(edges, (points_A - corners_A[:, 0])[..., None])[..., 0]
    return np.concatenate([1 - last.sum(1, keepdims=True), last], axis=1)


def _at(volume: np.ndarray, pixel_size_A: float, points_A: np.ndarray) -> np.ndarray:
    """(n,) density at points (n, 3), by linear interpolation."""
    from scipy import ndimage

    return ndimage.map_coordinates(volume, (points_A / pixel_size_A + len(volume) // 2)[:, ::-1].T, order=1)


def _downwards(volume: np.ndarray, pixel_size_A: float, points_A: np.ndarray) -> np.ndarray:
    """(n, 3) unit vectors up the density's slope, so into the body."""
    steps = 0.7 * pixel_size_A * np.eye(3)
    slope = [_at(volume, pixel_size_A, points_A + step) - _at(volume, pixel_size_A, points_A - step) for step in steps]
    return np.stack(slope, axis=1) / np.maximum(np.linalg.norm(slope, axis=0), 1e-12)[:, None]


def _profile(
    volume: np.ndarray, pixel_size_A: float, points_A: np.ndarray, inward: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Depth (n, 6) at which each of ``_DENSITIES`` is met, and the highest density (n,) met on the way in.

    A density that is not met counts as being where it is nearest to it: at the peak inside, or at the lowest outside.
    """
    steps_A = np.linspace(0.0, _PROFILE_A, _PROFILE_STEPS + 1)
    inside, outside = (
        np.stack([_at(volume, pixel_size_A, points_A + sign * step * inward) for step in steps_A]) for sign in (1, -1)
    )
    inside[0] = outside[0] = 1.0  # by definition
    rising, falling = np.maximum.accumulate(inside), np.minimum.accumulate(outside)
    # what lies beyond a gap is another body
    rising = np.where(np.minimum.accumulate(inside) < 0.9, 0.0, rising)
    depth_A = np.empty((len(points_A), len(_DENSITIES)))
    for column, density in enumerate(_DENSITIES):
        course, sign = (rising, 1) if density > 1 else (-falling, -1)
        depth_A[:, column] = sign * _first_reached(course, sign * density, steps_A)
    return depth_A, rising.max(0)


def _first_reached(course: np.ndarray, value: float, steps_A: np.ndarray) -> np.ndarray:
    """(n,) where each column of ``course`` (s, n) first is ``value``, interpolated, or where it is largest."""
    columns = np.arange(course.shape[1])
    reached = course >= value
    after = np.where(reached.any(0), reached.argmax(0), course.argmax(0))
    before = np.maximum(after - 1, 0)
    low, high = course[before, columns], course[after, columns]
    part = np.clip((value - low) / np.where(high > low, high - low, 1.0), 0.0, 1.0)
    return steps_A[before] + part * (steps_A[after] - steps_A[before])


# The flow ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _packed_flow(motion: MotionFrame, reach: Reach, shown: RidingSurface) -> dict[str, Any]:
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
