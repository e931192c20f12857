"""The displacements of two models, and of the one that is judged, in one frame."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from flexlib.model.flex_model import FlexModel
from flexlib.model.flow import AssembledFlow, rigid_modes_A
from flexlib.tetra.gradients import directional_derivative

CHUNK = 256  # particles at a time


@dataclass(frozen=True)
class CommonFrame:
    """Two models of the same particles, the second seen from the first one's rest shape.

    Where either refines poses, a rigid-body motion of a particle is its pose's as well as its flow's: fields are then
    freed of it, as the density feels it.
    """

    first: FlexModel
    second: FlexModel
    shift_A: torch.Tensor  # (nv, 3) from the first one's rest shape to the second one's
    density_share: torch.Tensor  # (nv,) of the density, by the vertex that it rides on; the sum is 1

    @cached_property
    def _along(self) -> torch.Tensor:
        derivative = directional_derivative(self.first.mesh, self.shift_A.cpu().numpy()).tocoo()
        index = torch.as_tensor(np.stack(derivative.coords))
        values = torch.as_tensor(derivative.data).float()
        return torch.sparse_coo_tensor(index, values, derivative.shape, check_invariants=False).coalesce()

    @cached_property
    def _rigid(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(6, 3 nv) rigid-body motions, and (6, 3 nv) what gives a field's coefficients of them."""
        rigid = torch.as_tensor(rigid_modes_A(self.first.mesh.vertices_A)).flatten(1)
        weighted = rigid * self.density_share.double().repeat_interleave(3)
        return rigid.float(), torch.linalg.solve(weighted @ rigid.T, weighted).float()

    @cached_property
    def _flows(self) -> tuple[AssembledFlow, AssembledFlow]:
        return self.first.flow.assembled(), self.second.flow.assembled()

    @property
    def free_of_poses(self) -> bool:
        """Whether rigid-body motions are left out."""
        return self.first.pose is not None or self.second.pose is not None

    @torch.no_grad()
    def of_first(self, latents: torch.Tensor) -> torch.Tensor:
        """(b, K) latents of the first model to (b, nv, 3) displacements in Angstrom of its vertices."""
        return self._flows[0](latents)

    @torch.no_grad()
    def of_second(self, latents: torch.Tensor) -> torch.Tensor:
        """(b, K) latents of the second model to displacements of the vertices in the first one's rest shape.

        A vertex at x lies at x + shift in the second's, and moves as that place does.
        """
        moved = self._flows[1](latents)
        columns = moved.transpose(0, 1).flatten(1)  # (nv, 3 b)
        there = (self._along @ columns).view(-1, len(latents), 3).transpose(0, 1)
        return moved + there + self.shift_A

    def comparable(self, fields_A: torch.Tensor) -> torch.Tensor:
        """Fields (b, nv, 3) without what poses may have taken over."""
        if not self.free_of_poses:
            return fields_A
        rigid, coefficients = self._rigid
        flat = fields_A.flatten(1)
        return (flat - (flat @ coefficients.T) @ rigid).view(fields_A.shape)

    def pairs(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, torch.Tensor, torch.Tensor]]:
        """Chunks of ``rows`` with both models' comparable fields (b, nv, 3)."""
        for some in np.array_split(rows, max(1, -(-len(rows) // CHUNK))):
            first, second = (
                self.comparable(of(torch.as_tensor(model.latents[some])))
                for of, model in ((self.of_first, self.first), (self.of_second, self.second))
            )
            yield some, first, second


Flow = Callable[[torch.Tensor], torch.Tensor]


def slopes_A(flow: Flow, latents: torch.Tensor, probe: float) -> torch.Tensor:
    """(b, K, nv, 3) displacement in Angstrom per unit of each latent, at latents (b, K)."""
    found = []
    for axis in range(latents.shape[1]):
        step = torch.zeros_like(latents)
        step[:, axis] = probe
        found.append((flow(latents + step) - flow(latents - step)) / (2 * probe))
    return torch.stack(found, 1)
