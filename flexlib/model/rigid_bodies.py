"""Rigid bodies fitted to displacements in many states: what the frame of a motion and its bodies are found by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from flexlib.model.flex_model import FlexModel
from flexlib.model.motion import density_at_vertices
from flexlib.projection.op import VoxelTensors
from flexlib.tetra.rotations import rotations
from flexlib.tetra.voxels import voxelise

STILL_A = 1e-3  # rms residual of one rigid body below which all is one
_STATES = 500  # particles whose displacements stand for all
_STATE_VERTICES = 3_000_000  # states times vertices that are looked at, at most: 72 MB
_PATCHES = 24  # places from where a body may grow
_PATCH_SHARE = 0.08  # of the density, that a patch holds


@dataclass(frozen=True)
class States:
    """Displacements of some states, arranged for fits of a rigid body to each."""

    vertices_A: torch.Tensor  # (nv, 3) float64
    share: torch.Tensor  # (nv,) float64 of the density
    moved_A: torch.Tensor  # (nv, 3 s) float64
    squared_A2: torch.Tensor  # (nv,) mean squared displacement over the states

    @classmethod
    def of(cls, displacements_A: torch.Tensor, vertices_A: torch.Tensor, density_share: torch.Tensor) -> States:
        """Of (s, nv, 3) displacements of the vertices (nv, 3), with the share (nv,) of the density at each."""
        moved = displacements_A.double().transpose(0, 1).flatten(1).contiguous()
        squared = moved.square().sum(1) / len(displacements_A)
        return cls(vertices_A.double(), density_share.double(), moved, squared)

    @classmethod
    def of_model(cls, model: FlexModel) -> States:
        """Of up to 500 of a model's particles, evenly spaced, weighed by its canonical density."""
        voxels = VoxelTensors.from_mesh_voxels(voxelise(model.mesh, model.canonical != 0, model.pixel_size_A))
        values = torch.from_numpy(model.canonical.reshape(-1)[voxels.index.numpy()])
        known = model.latents[np.isfinite(model.latents).all(1)]
        num = max(1, min(_STATES, _STATE_VERTICES // len(model.mesh.vertices_A)))
        moved = model.displacements_A(known[:: max(1, -(-len(known) // num))]).cpu()
        return cls.of(moved, torch.from_numpy(model.mesh.vertices_A), density_at_vertices(voxels, values))

    def squared_residual_A2(self, weight: torch.Tensor) -> torch.Tensor:
        """(c, nv) mean squared distance, over the states, from the rigid bodies that fit (c, nv) weighted vertices."""
        mass = weight * self.share
        mass = mass / mass.sum(1, keepdim=True).clamp(min=1e-30)
        num = len(mass)
        centred = self.vertices_A - (mass @ self.vertices_A)[:, None]  # (c, nv, 3)
        shift = (mass @ self.moved_A).view(num, -1, 3)
        weighted = (mass[:, :, None] * centred).transpose(1, 2)  # (c, 3, nv)
        overlap = (weighted.flatten(0, 1) @ self.moved_A).view(num, 3, -1, 3).permute(0, 2, 3, 1)
        turn = rotations(overlap, (weighted @ centred)[:, None]) - torch.eye(3, dtype=mass.dtype)
        # a body's own displacement of a vertex is ``turn @ centred + shift``: the sums over states are products of the
        # whole array with few columns
        body = torch.cat([turn, shift[..., None]], dim=3)  # (c, s, 3, 4)
        at = torch.cat([centred, torch.ones_like(centred[..., :1])], dim=2)  # (c, nv, 4)
        square = torch.einsum("csia,csib->cab", body, body)
        cross = (self.moved_A @ body.flatten(1, 2).transpose(0, 1).flatten(1)).view(-1, num, 4).transpose(0, 1)
        distance = ((at @ square - 2 * cross) * at).sum(2) / body.shape[1] + self.squared_A2
        return distance.clamp(min=0.0)

    def residuals_A(self, weight: torch.Tensor) -> Iterator[torch.Tensor]:
        """For each of (c, nv) weighted bodies in turn the distances (nv, 3 s) of all vertices from its motion."""
        states = self.moved_A.view(len(self.vertices_A), -1, 3).transpose(0, 1)
        for mass in weight * self.share:
            rotation, shift_A = rigid_motions(states, self.vertices_A, mass[None])
            carried = torch.einsum("sij,vj->vsi", rotation[:, 0], self.vertices_A) + shift_A[:, 0]
            yield self.moved_A - (carried - self.vertices_A[:, None]).flatten(1)


def patches(states: States) -> torch.Tensor:
    """(c, nv) weights, 0 or 1, of patches all over the density: about places that are far from each other."""
    dense = torch.nonzero(states.share > 0.1 * states.share.mean())[:, 0]
    points, share = states.vertices_A[dense], states.share[dense]
    found = []
    nearest = torch.full_like(share, torch.inf)
    place = int(share.argmax())
    for _ in range(min(_PATCHES, len(dense))):
        distance = (points - points[place]).square().sum(1)
        order = distance.argsort()
        size = int(torch.searchsorted(share[order].cumsum(0), _PATCH_SHARE)) + 1
        patch = torch.zeros_like(states.share)
        patch[dense[order[:size]]] = 1.0
        found.append(patch)
        nearest = torch.minimum(nearest, distance)
        place = int(nearest.argmax())
    return torch.stack(found)


def settled(states: States, weight: torch.Tensor, scale_A: float, rounds: int) -> torch.Tensor:
    """Weights (c, nv) after some rounds of fitting and weighing at one scale, in Angstrom."""
    for _ in range(rounds):
        weight = (1 + states.squared_residual_A2(weight) / scale_A**2) ** -2
    return weight


def rigid_motions(
    displacements_A: torch.Tensor, vertices_A: torch.Tensor, mass: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rigid motions that come nearest to displacements.

    Parameters
    ----------
    displacements_A
        (s, nv, 3), of any type.
    vertices_A
        (nv, 3) float64, at rest.
    mass
        (c, nv) float64 of the vertices in each of c bodies.

    Returns
    -------
    rotation, shift_A
        (s, c, 3, 3) and (s, c, 3) float64: a vertex at x comes to ``rotation @ x + shift_A``.
    """
    moved = displacements_A.double()
    mass = mass / mass.sum(1, keepdim=True)
    centre = mass @ vertices_A
    weighted = mass[:, :, None] * (vertices_A - centre[:, None])  # (c, nv, 3)
    overlap = torch.einsum("svi,cvj->scij", moved, weighted)
    at_rest = torch.einsum("cvi,cvj->cij", weighted, vertices_A - centre[:, None])
    rotation = rotations(overlap, at_rest.expand(len(moved), -1, -1, -1))
    shift_A = torch.einsum("svi,cv->sci", moved, mass) + centre
    return rotation, shift_A - torch.einsum("scij,cj->sci", rotation, centre)
