"""How far a model moves density."""

from __future__ import annotations

import numpy as np
import torch

from flexlib.model.flex_model import FlexModel
from flexlib.tetra.voxels import MeshVoxels

MOTION_PARTICLES = 10_000  # that stand for all in the rms displacement


def rms_displacement_A(model: FlexModel, voxels: MeshVoxels) -> np.ndarray:
    """How far each voxel moves about its mean position, rms over the particles.

    Up to ``MOTION_PARTICLES`` particles, evenly spaced, stand for all.

    Parameters
    ----------
    model
        Flow and latents.
    voxels
        Of the model's mesh.

    Returns
    -------
    rms_A
        (nvox,) float32 in Angstrom: the barycentric mix of the vertices' values.
    """
    latents = model.latents[:: max(1, -(-len(model.latents) // MOTION_PARTICLES))]
    total = np.zeros((len(model.mesh.vertices_A), 3))
    square = np.zeros(len(total))
    for first in range(0, len(latents), 256):
        moved = model.displacements_A(torch.as_tensor(latents[first : first + 256])).double().cpu().numpy()
        total += moved.sum(0)
        square += (moved**2).sum((0, 2))
    variance = square / len(latents) - ((total / len(latents)) ** 2).sum(1)
    at_vertices = np.sqrt(np.maximum(variance, 0.0))
    return np.einsum("nk,nk->n", voxels.bary, at_vertices[voxels.cells[voxels.cell]]).astype(np.float32)
