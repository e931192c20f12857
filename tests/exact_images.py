"""Reconstruction problems whose images are exact: moved voxels summed term by term under random poses."""

from __future__ import annotations

from dataclasses import replace

import numba
import numpy as np
import torch
from scipy.spatial.transform import Rotation

from flexlib.images.batch import ImageBatch
from flexlib.imaging.fourier import lowpass_map
from flexlib.imaging.image_transforms import plane_weight
from flexlib.imaging.masks import soft_edge
from flexlib.mesh.lattice import bcc_mesh
from flexlib.model.forward import EXACT, Operator
from flexlib.projection.op import gather_volume
from flexlib.reconstruct.map_solver import SolverSettings, solve_map
from flexlib.reconstruct.normal_equations import accumulate_normal_equations
from flexlib.tetra.tetmesh import single_cell_mesh
from flexlib.tetra.voxels import voxelise

BOX = 24
PIXEL_SIZE_A = 3.0


@numba.njit
def exact_transform(values, view_px, box):
    """(box, box//2+1): sum over voxels of ``values`` exp(-2 pi i k . p / box), term by term."""
    plane = np.zeros((box, box // 2 + 1), np.complex128)
    for j in range(len(values)):
        step_x = np.exp(-2j * np.pi / box * view_px[j, 0])
        step_y = np.exp(-2j * np.pi / box * view_px[j, 1])
        along_y = values[j] * np.exp(1j * np.pi * view_px[j, 1])  # ky = -box/2
        for row in range(box):
            term = along_y
            for kx in range(box // 2 + 1):
                plane[(row + box // 2) % box, kx] += term
                term *= step_x
            along_y *= step_y
    return plane


class FakeSource:
    """Exact images (non-uniform DFT) of moved voxels under random poses and CTF-like transfer functions."""

    def __init__(self, count, values, points_A, noise=0.0, seed=0, amplitude=1.0):
        """``values`` (nvox,); ``points_A`` (nvox, 3) or (count, nvox, 3) moved voxel positions."""
        generator = np.random.default_rng(seed)
        self.box, self.pixel_size_A, self.particles = BOX, PIXEL_SIZE_A, None
        self.half_set = (np.arange(count) % 2).astype(np.int8)
        self.rotation = Rotation.random(count, rng=generator).as_matrix()
        self.origin_px = generator.normal(0, 1, (count, 2))
        ky, kx = np.fft.fftfreq(BOX)[:, None], np.arange(BOX // 2 + 1)[None] / BOX
        phase = generator.uniform(20, 60, (count, 1, 1)) * (kx**2 + ky**2) + 0.2
        inside = (plane_weight(BOX) > 0).numpy()
        self.transfer = (amplitude * np.sin(phase) * inside / BOX).astype(np.float32)
        self.images = np.empty((count, BOX, BOX // 2 + 1), np.complex64)
        self.reads = 0
        for i in range(count):
            points = points_A if points_A.ndim == 2 else points_A[i]
            view_px = points @ self.rotation[i, :2].T / PIXEL_SIZE_A - self.origin_px[i]
            self.images[i] = exact_transform(values.astype(float), view_px, BOX) * self.transfer[i]
        white = generator.standard_normal((count, BOX, BOX))
        self.images += noise * inside * np.fft.rfft2(white, norm="ortho")

    def __len__(self):
        return len(self.images)

    def batch(self, rows, device="cpu"):
        self.reads += len(rows)
        return replace(self.geometry(rows, device), images=torch.from_numpy(self.images[rows]))

    def geometry(self, rows, device="cpu"):
        arrays = self.transfer[rows], self.rotation[rows].astype(np.float32), self.origin_px[rows].astype(np.float32)
        return ImageBatch(rows, torch.empty(0), *(torch.from_numpy(a) for a in arrays))


def radius_px(box=BOX):
    axis = np.arange(box) - box // 2
    return np.sqrt(axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[None, None, :] ** 2)


class Problem:
    """A soft-masked random density, a mesh around it and its voxels."""

    def __init__(self, mesh_cell_A=None, dtype=torch.float32):
        self.mask = soft_edge(radius_px() < 6, PIXEL_SIZE_A, 0.0, 6.0)
        white = np.random.default_rng(9).standard_normal((BOX,) * 3)
        self.truth = self.mask * (lowpass_map(white, PIXEL_SIZE_A, 2.4 * PIXEL_SIZE_A) + 0.3)
        inside = self.mask > 1e-3
        rigid = mesh_cell_A is None
        self.mesh = single_cell_mesh(BOX * PIXEL_SIZE_A) if rigid else bcc_mesh(inside, PIXEL_SIZE_A, mesh_cell_A)
        mesh_voxels = voxelise(self.mesh, inside, PIXEL_SIZE_A)
        self.bary, self.corners = mesh_voxels.bary, self.mesh.cells[mesh_voxels.cell]
        self.operator = Operator.of_voxels(self.mesh, mesh_voxels, accuracy=EXACT, dtype=dtype)
        self.voxels = self.operator.voxels
        self.mask_values = gather_volume(self.mask, self.voxels)
        self.values = gather_volume(self.truth, self.voxels).numpy()

    def points_A(self, displacements_A=0.0):
        """Voxel positions (nvox, 3), or (b, nvox, 3) for displacements (b, nv, 3)."""
        vertices = self.mesh.vertices_A + displacements_A
        return np.einsum("nk,...nkd->...nd", self.bary, vertices[..., self.corners, :])

    def equations(self, source, displacements_A=None, **options):
        """Of all images, with displacements (n, nv, 3)."""
        moved = None if displacements_A is None else lambda rows: torch.as_tensor(displacements_A[rows])
        options = {"mask_values": self.mask_values} | options
        return accumulate_normal_equations(source, np.arange(len(source)), self.operator, moved, **options)

    def solve(self, source, displacements_A=None, rows=None, **settings):
        rows = np.arange(len(source)) if rows is None else rows
        moved = None if displacements_A is None else lambda rows: torch.as_tensor(displacements_A[rows])
        solver = SolverSettings(**settings)
        volume, convergence = solve_map(source, rows, self.operator, moved, self.mask_values, solver)
        return volume.numpy(), convergence


def bends_A(mesh, amounts, sd_A=8.0):
    """(n,) amounts -> (n, nv, 3) displacements: a bend of ``sd_A`` rms at one unit."""
    x, _, z = mesh.vertices_A.T
    bend = np.stack([z**2, 0 * x, -x * z], 1)
    return amounts[:, None, None] * bend * sd_A / np.sqrt((bend**2).sum(1).mean())
