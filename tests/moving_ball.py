"""A small flexible model with a known motion, shared by tests: a ball of density that its latents shift."""

import numpy as np
import torch

from flexlib.mesh.lattice import bcc_mesh
from flexlib.model.flex_model import FlexModel
from flexlib.model.flow import FlowGenerator

BOX = 32
PIXEL_SIZE_A = 3.0


def ball(box, radius_px, centre_px=(0, 0, 0)):
    """(box,)*3 bool, centre (x, y, z) from the box centre."""
    z, y, x = np.ogrid[:box, :box, :box]
    x0, y0, z0 = (c + box // 2 for c in centre_px)
    return (x - x0) ** 2 + (y - y0) ** 2 + (z - z0) ** 2 < radius_px**2


def ball_mesh():
    """A mesh around a ball of 11 voxels."""
    return bcc_mesh(ball(BOX, 11), PIXEL_SIZE_A, 20.0)


def linear_model(mesh, canonical, latents):
    """A model whose first latent is a translation along x in Angstrom and whose second is one along y."""
    shifts = np.zeros((2, len(mesh.vertices_A), 3), np.float32)
    shifts[0, :, 0] = shifts[1, :, 1] = 1.0
    flow = FlowGenerator(torch.from_numpy(shifts), 2, 1, 4)
    with torch.no_grad():
        flow.linear.copy_(torch.eye(2))
    return FlexModel(mesh, flow, latents.astype(np.float32), canonical.astype(np.float32), BOX, PIXEL_SIZE_A)


def centre_A(volume, pixel_size_A):
    """Centre of mass (x, y, z) in Angstrom from the box centre."""
    box = len(volume)
    axis = (np.arange(box) - box // 2) * pixel_size_A
    return np.array([(volume.sum(tuple({0, 1, 2} - {a})) * axis).sum() / volume.sum() for a in (2, 1, 0)])
