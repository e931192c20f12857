"""The hinge between two bodies: the axis about which one turns against the other, and how far."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from scipy.spatial.transform import Rotation

from flexlib.interpret.bodies import Bodies
from flexlib.model.flex_model import FlexModel
from flexlib.model.rigid_bodies import rigid_motions
from flexlib.runtime import kd_tree

_CHUNK = 256  # particles
_LOW, _HIGH = 2.0, 98.0  # percentiles of the angle that its range is between
_DRAWN = 10_000  # particles whose latents are drawn from their posteriors, at most
_LEAST_PROBABILITY = 0.5  # with which an image shows a particle, to count
_LITTLE_TURN = 0.3  # of the shift: where turning moves a body by less than this, its axis cannot be told
_RCOND = 0.05  # singular values below this share of the largest are those along the axis
_ONE_AXIS = 0.8  # of the squared rotation, that is about one axis where there is one
_LEAST_DEG = 0.1  # standard deviation of an angle that is one


@dataclass(frozen=True)
class BodyMotions:
    """The rigid motion of each of B bodies in each of n particles: x comes to ``rotation @ x + shift_A``."""

    rotation: np.ndarray  # (n, B, 3, 3) float64
    shift_A: np.ndarray  # (n, B, 3)

    def relative(self, body: int, still: int) -> tuple[np.ndarray, np.ndarray]:
        """(n, 3, 3) and (n, 3): how ``body`` moves for a viewer on ``still``."""
        back = self.rotation[:, still].transpose(0, 2, 1)
        shift_A = self.shift_A[:, body] - self.shift_A[:, still]
        return back @ self.rotation[:, body], np.einsum("nij,nj->ni", back, shift_A)


@dataclass(frozen=True)
class Hinge:
    """How body ``second`` moves against body ``first`` (numbers from 0, the heavier first)."""

    first: int
    second: int
    touching: bool  # whether the two share cells of the mesh
    turns: bool  # whether it turns; else it is shifted, and ``axis`` is the shift's direction
    axis: np.ndarray  # (3,) unit vector; angles are right-handed about it
    point_A: np.ndarray  # (3,) of the axis, the nearest to the contact
    share: float  # of the squared rotation, that is about the axis
    low_deg: float  # 2nd and 98th percentile of the angle over the particles, from the mean shape
    high_deg: float
    sd_deg: float
    along_A: float  # standard deviation of the shift along the axis, at ``point_A``
    across_A: float  # and of what neither turning nor sliding explains
    noise_factor: float  # by which angles are wider than those of the latents' means, for their own errors

    @property
    def kind(self) -> str:
        """A ``hinge`` turns about one axis, a ``joint`` about several; else a ``shift``."""
        if not self.turns:
            return "shift"
        return "hinge" if self.share >= _ONE_AXIS else "joint"

    @property
    def range_deg(self) -> float:
        """From the 2nd to the 98th percentile."""
        return self.high_deg - self.low_deg


@torch.no_grad()
def body_motions(model: FlexModel, bodies: Bodies, latents: np.ndarray) -> BodyMotions:
    """The bodies' rigid motions in particles of ``latents`` (n, K), in the flow's own frame, which is the poses'."""
    mass = bodies.fitted * bodies.states.share
    found = [
        rigid_motions(model.displacements_A(some).cpu(), bodies.states.vertices_A, mass)
        for some in torch.as_tensor(latents, dtype=torch.float32).split(_CHUNK)
    ]
    return BodyMotions(*(torch.cat(parts).numpy() for parts in zip(*found, strict=True)))


def find_hinges(model: FlexModel, bodies: Bodies, motions: BodyMotions) -> list[Hinge]:
    """The hinge of each pair of bodies, those that touch first.

    A particle's latents are the mean of its posterior, and so vary by less than the conformations do. The spread of
    angles is that of latents drawn from the posteriors, and percentiles are widened by the same factor.
    """
    counted = np.isfinite(model.latents).all(1)
    if model.probability is not None and (model.probability >= _LEAST_PROBABILITY).any():
        counted &= model.probability >= _LEAST_PROBABILITY
    rows = np.flatnonzero(counted)
    drawn_rows = rows[:: max(1, -(-len(rows) // _DRAWN))]
    drawn = body_motions(model, bodies, _drawn_latents(model, drawn_rows))
    of_all = BodyMotions(motions.rotation[rows], motions.shift_A[rows])
    of_drawn_rows = BodyMotions(motions.rotation[drawn_rows], motions.shift_A[drawn_rows])
    hinges = [
        _hinge(bodies, model.mesh.cells, pair, (of_all, of_drawn_rows, drawn))
        for pair in combinations(range(bodies.num), 2)
    ]
    return sorted(hinges, key=lambda hinge: not hinge.touching)


def _drawn_latents(model: FlexModel, rows: np.ndarray) -> np.ndarray:
    """(m, K) latents drawn from the posteriors of some rows; their means where these are not known."""
    means = model.latents[rows].astype(np.float64)
    if model.latent_covariance is None:
        return means
    values, vectors = np.linalg.eigh(model.latent_covariance[rows].astype(np.float64))
    normal = np.random.default_rng(0).standard_normal(means.shape)
    return means + np.einsum("nij,nj->ni", vectors, np.sqrt(values.clip(min=0)) * normal)


def _hinge(
    bodies: Bodies, cells: np.ndarray, pair: tuple[int, int], motions: tuple[BodyMotions, BodyMotions, BodyMotions]
) -> Hinge:
    first, second = pair
    contact_A, touching = _contact(bodies, cells, first, second)
    rotation, shift_A = motions[0].relative(second, first)
    vector = Rotation.from_matrix(rotation).as_rotvec()
    values, axes = np.linalg.eigh(np.cov(vector.T).reshape(3, 3))
    axis = _pointing_up(axes[:, -1])
    sd_rad = float(np.sqrt(max(values[-1], 0)))
    mass = (bodies.members[second] * bodies.states.share).numpy()
    vertices_A = bodies.states.vertices_A.numpy()
    centre_A = mass @ vertices_A / mass.sum()
    radius_A = float(np.sqrt(mass @ ((vertices_A - centre_A) ** 2).sum(1) / mass.sum()))
    travel_A = np.einsum("nij,j->ni", rotation, centre_A) + shift_A
    shift_sd_A = float(np.sqrt(travel_A.var(0).sum()))
    reach_A = radius_A + float(np.linalg.norm(centre_A - contact_A))
    turns = bool(sd_rad > np.radians(_LEAST_DEG) and sd_rad * reach_A > _LITTLE_TURN * shift_sd_A)
    point_A = _axis_point(rotation, shift_A, axis, contact_A) if turns else contact_A
    if not turns:
        axis = _pointing_up(np.linalg.eigh(np.cov(travel_A.T).reshape(3, 3))[1][:, -1])
    at_point = np.einsum("nij,j->ni", rotation, point_A) + shift_A
    at_point = at_point - at_point.mean(0)
    angle = np.degrees(vector @ axis) if turns else np.zeros(len(vector))
    factor = _noise_factor(motions[1:], pair, axis) if turns else 1.0
    low, high = angle.mean() + factor * (np.percentile(angle, (_LOW, _HIGH)) - angle.mean())
    along_A = at_point @ axis
    return Hinge(
        first,
        second,
        touching,
        turns,
        axis,
        point_A,
        share=float(values[-1] / max(values.sum(), 1e-30)),
        low_deg=float(low),
        high_deg=float(high),
        sd_deg=float(factor * angle.std()),
        along_A=float(along_A.std()),
        across_A=float(np.sqrt((at_point - along_A[:, None] * axis).var(0).sum())),
        noise_factor=factor,
    )


def _noise_factor(motions: tuple[BodyMotions, BodyMotions], pair: tuple[int, int], axis: np.ndarray) -> float:
    """Spread of the angle with latents drawn from the posteriors, over that with their means; 1 at least."""
    means, drawn = (
        (Rotation.from_matrix(one.relative(pair[1], pair[0])[0]).as_rotvec() @ axis).std() for one in motions
    )
    return float(max(drawn / means, 1.0)) if means > 0 else 1.0


def _axis_point(rotation: np.ndarray, shift_A: np.ndarray, axis: np.ndarray, near_A: np.ndarray) -> np.ndarray:
    """The point that moves least across the axis, and of these, which are a line, the nearest to ``near_A``."""
    across = np.eye(3) - np.outer(axis, axis)
    turning = across @ (rotation - rotation.mean(0))
    moving = (shift_A - shift_A.mean(0)) @ across + turning @ near_A
    return near_A + np.linalg.lstsq(turning.reshape(-1, 3), -moving.ravel(), rcond=_RCOND)[0]


def _contact(bodies: Bodies, cells: np.ndarray, first: int, second: int) -> tuple[np.ndarray, bool]:
    """Where two bodies touch: the middle of the cells that both have a part in; else of their nearest vertices."""
    vertices_A, share = bodies.states.vertices_A.numpy(), bodies.states.share.numpy()
    of_cells = bodies.label[cells]
    shared = (of_cells == first).any(1) & (of_cells == second).any(1)
    if shared.any():
        weight = share[cells[shared]].sum(1) + 1e-12
        return weight @ vertices_A[cells[shared]].mean(1) / weight.sum(), True
    own, other = (vertices_A[bodies.label == body] for body in (first, second))
    distance, nearest = kd_tree(other).query(own)
    at = int(distance.argmin())
    return 0.5 * (own[at] + other[nearest[at]]), False


def _pointing_up(axis: np.ndarray) -> np.ndarray:
    """The axis with its largest component positive."""
    return axis * np.sign(axis[np.abs(axis).argmax()])
