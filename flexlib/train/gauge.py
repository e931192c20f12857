"""The gauge: moving the molecule in every particle and the map the other way changes no image.

Without a rule the two drift. The rule is that the density's mean rigid-body motion over the particles is zero.
"""

from __future__ import annotations

import torch

from flexlib.model.flow import FlowGenerator

GAUGE_RATE = 0.05  # share of a batch's mean rigid-body motion that is taken out of the flow


@torch.no_grad()
def hold_gauge(flow: FlowGenerator, density_share: torch.Tensor, mean_A: torch.Tensor, rate: float) -> None:
    """Take ``rate`` of the rigid-body part of a mean displacement, as the density feels it, out of the flow.

    Parameters
    ----------
    flow
        Changed in place, by its output bias.
    density_share
        (nv,) share of the density that rides on each vertex.
    mean_A
        (nv, 3) mean displacement over particles in Angstrom.
    rate
        1 takes all of it.
    """
    flow.output.bias[-6:] -= rate * rigid_part(flow, density_share, mean_A)


def rigid_part(flow: FlowGenerator, density_share: torch.Tensor, displacement_A: torch.Tensor) -> torch.Tensor:
    """(6,) coefficients of the basis' rigid-body motions in a displacement field (nv, 3), weighted by density."""
    motions = flow.basis_A[-6:]
    weighted = motions * density_share[:, None]
    overlap = weighted.flatten(1) @ motions.flatten(1).T
    return torch.linalg.solve_ex(overlap, weighted.flatten(1) @ displacement_A.flatten()).result
