"""How far a flow moves density, over the particles: the one measure that files and report give."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from flexlib.model.flex_model import FlexModel
from flexlib.projection.op import VoxelTensors
from flexlib.tetra.voxels import MeshVoxels

MOTION_PARTICLES = 10_000  # that stand for all in the rms displacement

Displacements = Callable[[torch.Tensor], torch.Tensor]
"""latents (b, K) -> displacements (b, nv, 3) in Angstrom."""


@torch.no_grad()
def vertex_rms_displacement_A(displacements_A: Displacements, latents: torch.Tensor) -> torch.Tensor:
    """How far each mesh vertex moves about its mean position, rms over the particles.

    Parameters
    ----------
    displacements_A
        A flow.
    latents
        (n, K) of the particles; up to ``MOTION_PARTICLES`` of them, evenly spaced, stand for all.

    Returns
    -------
    rms_A
        (nv,) float64 in Angstrom.
    """
    latents = latents[:: max(1, -(-len(latents) // MOTION_PARTICLES))]
    total: torch.Tensor | float = 0.0
    square: torch.Tensor | float = 0.0
    for some in latents.split(256):
        moved = displacements_A(some).double()
        total, square = total + moved.sum(0), square + moved.square().sum((0, 2))
    mean = torch.as_tensor(total) / len(latents)
    return (torch.as_tensor(square) / len(latents) - mean.square().sum(-1)).clamp(min=0.0).sqrt()


def rms_displacement_A(
    model: FlexModel, voxels: MeshVoxels, displacements_A: Displacements | None = None
) -> np.ndarray:
    """How far each voxel moves about its mean position, rms over the particles.

    Parameters
    ----------
    model
        Flow and latents.
    voxels
        Of the model's mesh.
    displacements_A
        The model's displacements in another frame than the flow's own.

    Returns
    -------
    rms_A
        (nvox,) float32 in Angstrom: the barycentric mix of the vertices' values.
    """
    flow = model.displacements_A if displacements_A is None else displacements_A
    at_vertices = vertex_rms_displacement_A(flow, torch.as_tensor(model.latents)).cpu().numpy()
    return np.einsum("nk,nk->n", voxels.bary, at_vertices[voxels.cells[voxels.cell]]).astype(np.float32)


def mean_rms_displacement_A(
    displacements_A: Displacements, latents: torch.Tensor, density_share: torch.Tensor
) -> float:
    """Rms distance in Angstrom by which density moves about its mean position, over density and particles.

    Parameters
    ----------
    displacements_A, latents
        As in ``vertex_rms_displacement_A``.
    density_share
        (nv,) of the density, by the vertex that it rides on; the sum is 1.
    """
    rms_A = vertex_rms_displacement_A(displacements_A, latents)
    return float((rms_A.square() @ density_share.to(rms_A)).sqrt())


def density_at_vertices(voxels: VoxelTensors, values: torch.Tensor) -> torch.Tensor:
    """(nv,) share of the (positive) density that rides on each vertex; the sum is 1."""
    corner = voxels.cells.long()[voxels.cell.long()]
    share = voxels.bary.clamp(min=0.0) * values.clamp(min=0.0)[:, None]
    total = values.new_zeros(voxels.num_vertices).index_add_(0, corner.flatten(), share.flatten())
    return total / total.sum().clamp(min=1e-30)
