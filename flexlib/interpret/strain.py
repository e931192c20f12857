"""How far each cell of the mesh turns and is strained over the particles."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from flexlib.tetra.gradients import barycentric_gradients
from flexlib.tetra.tetmesh import MeshVoxels, TetraMesh


@dataclass(frozen=True)
class Deformation:
    """Of each cell, rms over the states."""

    rotation_deg: np.ndarray  # (nc,) angle of R in F = R U
    strain: np.ndarray  # (nc,) Frobenius norm of U - 1

    def at_voxels(self, values: np.ndarray, voxels: MeshVoxels) -> np.ndarray:
        """(N, N, N) float32 map of ``values`` (nc,); 0 outside the voxels.

        Each vertex has the mean of its cells, by volume in voxels, and a voxel the mix of its cell's vertices.
        """
        count = np.bincount(voxels.cell, minlength=len(values))
        corners = voxels.cells
        weight = np.repeat(count + 1e-9, 4)
        total = np.bincount(corners.ravel(), weight * np.repeat(values, 4), voxels.num_vertices)
        mean = total / np.bincount(corners.ravel(), weight, voxels.num_vertices).clip(min=1e-30)
        bary = voxels.bary.clip(min=0.0)
        volume = np.zeros(voxels.box**3, np.float32)
        volume[voxels.index] = np.einsum("nk,nk->n", bary, mean[corners[voxels.cell]]) / bary.sum(1)
        return volume.reshape((voxels.box,) * 3)


@torch.no_grad()
def deformation(mesh: TetraMesh, states: Iterable[torch.Tensor]) -> Deformation:
    """Rotation and strain of each cell, by the polar decomposition F = R U of its deformation gradient.

    Parameters
    ----------
    mesh
        At rest.
    states
        Displacements (nv, 3) in Angstrom, one after another, in the frame in which rotations are told.
    """
    gradients = torch.from_numpy(barycentric_gradients(mesh))
    cells = torch.from_numpy(mesh.cells).long()
    angle2, strain2, num = torch.zeros(len(cells)).double(), torch.zeros(len(cells)).double(), 0
    for moved in states:
        gradient = torch.eye(3).double() + torch.einsum("cki,ckj->cij", moved.double()[cells], gradients)
        left, stretch, right = torch.linalg.svd(gradient)
        inside_out = torch.linalg.det(left @ right) < 0  # turned by the nearest proper rotation, all the same
        left[inside_out, :, 2] *= -1
        stretch[inside_out, 2] *= -1
        cosine = ((left @ right).diagonal(dim1=1, dim2=2).sum(1) - 1) / 2
        angle2 += cosine.clamp(-1, 1).acos().square()
        strain2 += (stretch - 1).square().sum(1)
        num += 1
    return Deformation(np.degrees((angle2 / max(num, 1)).sqrt().numpy()), (strain2 / max(num, 1)).sqrt().numpy())
