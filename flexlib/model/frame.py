"""The frame in which a motion is shown: as the flow gives it, or with the most rigid body of the molecule at rest.

Turning and shifting a molecule in one particle, and its pose the other way, changes no image. Which of them is "the
motion" is a choice, and a small head that swings is best seen with the large body at rest.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch

from flexlib.model.flex_model import FlexModel
from flexlib.model.motion import density_at_vertices
from flexlib.projection.op import VoxelTensors
from flexlib.tetra.voxels import voxelise
from flexlib.workflow_support.settings import Align

logger = logging.getLogger(__name__)

_STATES = 500  # particles whose displacements decide what the core is
_STATE_VERTICES = 3_000_000  # states times vertices that are looked at, at most: 72 MB
_STILL_A = 1e-3  # rms residual of one rigid body below which all is one
_PATCHES = 24  # places from where a body may grow
_PATCH_SHARE = 0.08  # of the density, that a patch holds
_GROWTH = 12  # rounds of fitting and weighing in which a patch grows
# Scales of the weights, in units of the rms residual of all as one body: bodies grow at the first at which one of them
# is large enough; the largest is then looked at ever more sharply, down to the last
_SCALES, _LAST_SCALE = (0.3, 0.45, 0.7, 1.0, 1.5, 2.0), 0.02
_FINEST_A = 0.1  # nothing is looked at more sharply
_STEP = 1.3  # from scale to scale on the way down
_ITERATIONS = 3  # at each of them
_MEMBER_WEIGHT = 0.25  # of a vertex whose rms residual is the scale
_KEPT = 0.8  # of the body that a smaller scale must keep
_LEAST_SHARE = 0.25  # of the density, that a core has


@dataclass(frozen=True)
class RigidCore:
    """The largest part of the density that moves as one rigid body over all particles."""

    vertices_A: torch.Tensor  # (nv, 3) float64, of the mesh at rest
    weight: torch.Tensor  # (nv,) float64 in [0, 1]: how far a vertex belongs to the core
    density_share: torch.Tensor  # (nv,) float64, of the density; the sum is 1
    tolerance_A: float  # a vertex that departs from the core by this, rms over particles, has weight 1/4

    @property
    def share(self) -> float:
        """Of the density, in [0, 1], what departs from the core by no more than ``tolerance_A``."""
        return float(self.density_share[self.weight >= _MEMBER_WEIGHT].sum())

    def aligned(self, displacements_A: torch.Tensor) -> torch.Tensor:
        """(b, nv, 3) displacements in Angstrom after the rotation and shift of each that bring the core to rest.

        The moved vertices are turned as a whole, by any angle: a core that is a rigid body comes back to where it is
        in the mesh at rest, exactly.
        """
        moved = displacements_A.to(self.vertices_A)
        mass = self.weight * self.density_share
        centre = mass @ self.vertices_A / mass.sum()
        centred = self.vertices_A - centre
        shift = torch.einsum("v,bvi->bi", mass, moved) / mass.sum()
        weighted = mass[:, None] * centred
        rotation = _rotations(torch.einsum("bvi,vj->bij", moved, weighted), weighted.T @ centred)
        back = (centred + moved - shift[:, None]) @ rotation - centred  # rows times R are columns under R's inverse
        return back.to(displacements_A.dtype)


@dataclass(frozen=True)
class MotionFrame:
    """Displacements of a model's mesh in a chosen frame."""

    model: FlexModel
    core: RigidCore | None  # that is at rest; None shows what the flow gives

    @classmethod
    def of(cls, model: FlexModel, align: Align) -> MotionFrame:
        """The frame ``align`` of ``generate:``; the log says how much of the density the core is."""
        if align == "density":
            return cls(model, None)
        core = model_core(model)
        logger.info(
            "the rigid core is at rest: %.0f %% of the density, all within %.2g A rms of one rigid body",
            100 * core.share,
            core.tolerance_A,
        )
        return cls(model, core)

    @property
    def core_weight(self) -> np.ndarray | None:
        """(nv,) how far each vertex belongs to the core, in [0, 1]; None without one."""
        return None if self.core is None else self.core.weight.numpy()

    @torch.no_grad()
    def displacements_A(self, z: torch.Tensor | np.ndarray) -> torch.Tensor:
        """(b, K) latents to (b, nv, 3) float32 vertex displacements in Angstrom."""
        moved = self.model.displacements_A(z)
        return moved if self.core is None else self.core.aligned(moved.cpu()).to(moved.device)


def model_core(model: FlexModel) -> RigidCore:
    """The rigid core of a model, by its canonical density and up to 500 of its particles, evenly spaced."""
    voxels = VoxelTensors.from_mesh_voxels(voxelise(model.mesh, model.canonical != 0, model.pixel_size_A))
    values = torch.from_numpy(model.canonical.reshape(-1)[voxels.index.numpy()])
    known = model.latents[np.isfinite(model.latents).all(1)]
    num = max(1, min(_STATES, _STATE_VERTICES // len(model.mesh.vertices_A)))
    states = model.displacements_A(known[:: max(1, -(-len(known) // num))]).cpu()
    return find_rigid_core(states, torch.from_numpy(model.mesh.vertices_A), density_at_vertices(voxels, values))


def find_rigid_core(displacements_A: torch.Tensor, vertices_A: torch.Tensor, density_share: torch.Tensor) -> RigidCore:
    """The largest part of a density that moves as one rigid body over some states.

    A rigid body is fitted to each state by rotation and shift, with weights that fall with each vertex' rms residual
    over the states (Geman and McClure's), again and again. Which body that comes to depends on where it begins, and
    beginning with all is no good where two bodies are of nearly one size: so it begins at patches all over the
    molecule too, and the largest body wins, at a scale of the weights that one rms displacement of the whole motion
    sets. That scale then falls, so that only what is rigid counts, but not so far that the body comes apart: of a
    molecule that bends all over no small piece is taken.

    Parameters
    ----------
    displacements_A
        (s, nv, 3) of the mesh vertices, in s states.
    vertices_A
        (nv, 3) of the mesh at rest.
    density_share
        (nv,) of the density, by the vertex that it rides on; the sum is 1.

    Returns
    -------
    core
        All of the molecule where nothing moves, or all as one body.
    """
    states = _States.of(displacements_A, vertices_A, density_share)
    everything = torch.ones_like(states.share)
    spread_A = float((states.squared_residual_A2(everything[None])[0] @ states.share).sqrt())
    if spread_A < _STILL_A:
        return RigidCore(states.vertices_A, everything, states.share, _STILL_A)
    starts = torch.cat([everything[None], _patches(states)])
    for scale in _SCALES:
        bodies = _settled(states, starts, scale * spread_A, _GROWTH)
        shares = bodies @ states.share
        if shares.max() >= _LEAST_SHARE:
            break
    weight, least, scale_A = bodies[shares.argmax()], _KEPT * float(shares.max()), scale * spread_A
    while scale_A > max(_LAST_SCALE * spread_A, _FINEST_A):
        sharper = _settled(states, weight[None], scale_A / _STEP, _ITERATIONS)[0]
        if sharper @ states.share < max(least, _LEAST_SHARE):
            break
        weight, scale_A = sharper, scale_A / _STEP
    return RigidCore(states.vertices_A, weight, states.share, scale_A)


def _patches(states: _States) -> torch.Tensor:
    """(c, nv) weights, 0 or 1, of patches all over the density: about places that are far from each other."""
    dense = torch.nonzero(states.share > 0.1 * states.share.mean())[:, 0]
    points, share = states.vertices_A[dense], states.share[dense]
    patches = []
    nearest = torch.full_like(share, torch.inf)
    place = int(share.argmax())
    for _ in range(min(_PATCHES, len(dense))):
        distance = (points - points[place]).square().sum(1)
        order = distance.argsort()
        size = int(torch.searchsorted(share[order].cumsum(0), _PATCH_SHARE)) + 1
        patch = torch.zeros_like(states.share)
        patch[dense[order[:size]]] = 1.0
        patches.append(patch)
        nearest = torch.minimum(nearest, distance)
        place = int(nearest.argmax())
    return torch.stack(patches)


def _settled(states: _States, weight: torch.Tensor, scale_A: float, rounds: int) -> torch.Tensor:
    """Weights (c, nv) after some rounds of fitting and weighing at one scale, in Angstrom."""
    for _ in range(rounds):
        weight = (1 + states.squared_residual_A2(weight) / scale_A**2) ** -2
    return weight


@dataclass(frozen=True)
class _States:
    """Displacements of some states, arranged for fits of a rigid body to each."""

    vertices_A: torch.Tensor  # (nv, 3) float64
    share: torch.Tensor  # (nv,) float64 of the density
    moved_A: torch.Tensor  # (nv, 3 s) float64
    squared_A2: torch.Tensor  # (nv,) mean squared displacement over the states

    @classmethod
    def of(cls, displacements_A: torch.Tensor, vertices_A: torch.Tensor, density_share: torch.Tensor) -> _States:
        moved = displacements_A.double().transpose(0, 1).flatten(1).contiguous()
        squared = moved.square().sum(1) / len(displacements_A)
        return cls(vertices_A.double(), density_share.double(), moved, squared)

    def squared_residual_A2(self, weight: torch.Tensor) -> torch.Tensor:
        """(c, nv) mean squared distance, over the states, from the rigid bodies that fit (c, nv) weighted vertices."""
        mass = weight * self.share
        mass = mass / mass.sum(1, keepdim=True).clamp(min=1e-30)
        num = len(mass)
        centred = self.vertices_A - (mass @ self.vertices_A)[:, None]  # (c, nv, 3)
        shift = (mass @ self.moved_A).view(num, -1, 3)
        weighted = (mass[:, :, None] * centred).transpose(1, 2)  # (c, 3, nv)
        overlap = (weighted.flatten(0, 1) @ self.moved_A).view(num, 3, -1, 3).permute(0, 2, 3, 1)
        turn = _rotations(overlap, (weighted @ centred)[:, None]) - torch.eye(3, dtype=mass.dtype)
        # a body's own displacement of a vertex is ``turn @ centred + shift``: the sums over states are products of the
        # whole array with few columns
        body = torch.cat([turn, shift[..., None]], dim=3)  # (c, s, 3, 4)
        at = torch.cat([centred, torch.ones_like(centred[..., :1])], dim=2)  # (c, nv, 4)
        square = torch.einsum("csia,csib->cab", body, body)
        cross = (self.moved_A @ body.flatten(1, 2).transpose(0, 1).flatten(1)).view(-1, num, 4).transpose(0, 1)
        distance = ((at @ square - 2 * cross) * at).sum(2) / body.shape[1] + self.squared_A2
        return distance.clamp(min=0.0)


def _rotations(overlap: torch.Tensor, at_rest: torch.Tensor) -> torch.Tensor:
    """Proper rotations (..., 3, 3) that best turn vertices at rest into moved ones (Kabsch).

    Parameters
    ----------
    overlap
        (..., 3, 3) sums over the vertices of mass times displacement (rows) times position from the centre (columns).
    at_rest
        The same sums of the positions at rest in place of the displacement.
    """
    # where all mass lies on one line, nothing says how far it turns about that: then it does not
    size = at_rest.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=1e-30)[..., None, None]
    still = 1e-9 * size * torch.eye(3, dtype=at_rest.dtype)
    left, _, right = torch.linalg.svd(overlap + at_rest + still)
    proper = torch.linalg.det(left @ right)[..., None, None]
    return torch.cat([left[..., :2], left[..., 2:] * proper], dim=-1) @ right
