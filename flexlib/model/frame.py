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
from flexlib.model.rigid_bodies import STILL_A, States, patches, settled
from flexlib.tetra.rotations import rotations
from flexlib.workflow_support.settings import Align

logger = logging.getLogger(__name__)

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
        rotation = rotations(torch.einsum("bvi,vj->bij", moved, weighted), weighted.T @ centred)
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
    return _core(States.of_model(model))


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
    return _core(States.of(displacements_A, vertices_A, density_share))


def _core(states: States) -> RigidCore:
    everything = torch.ones_like(states.share)
    spread_A = float((states.squared_residual_A2(everything[None])[0] @ states.share).sqrt())
    if spread_A < STILL_A:
        return RigidCore(states.vertices_A, everything, states.share, STILL_A)
    starts = torch.cat([everything[None], patches(states)])
    for scale in _SCALES:
        bodies = settled(states, starts, scale * spread_A, _GROWTH)
        shares = bodies @ states.share
        if shares.max() >= _LEAST_SHARE:
            break
    weight, least, scale_A = bodies[shares.argmax()], _KEPT * float(shares.max()), scale * spread_A
    while scale_A > max(_LAST_SCALE * spread_A, _FINEST_A):
        sharper = settled(states, weight[None], scale_A / _STEP, _ITERATIONS)[0]
        if sharper @ states.share < max(least, _LEAST_SHARE):
            break
        weight, scale_A = sharper, scale_A / _STEP
    return RigidCore(states.vertices_A, weight, states.share, scale_A)
