"""The data's Hessian of particles at rest: a convolution, whose kernel is summed up in one pass over the views.

With W_ik the squared transfer functions and q_ik where pixel k of image i lies in the map's Fourier space::

    (A^T W A)_jl = kappa(x_j - x_l),   kappa(d) = sum_i sum_k W_ik cos(2 pi q_ik . d / N)

Once kappa is known, no view is needed again: a product with the Hessian costs two Fourier transforms of twice the
mask's extent, however many particles there are. A rigid map is solved with it; for a flexible one it is what the
Hessian is preconditioned by, since cells that move see the map from nearly the same directions as cells at rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from flexlib.distributed import Ranks
from flexlib.imaging.fourier import wavenumbers
from flexlib.imaging.image_transforms import plane_weight
from flexlib.projection.fitted import TAPS, grid_side, kernel_coefficients, kernel_transfer
from flexlib.projection.op import VoxelTensors
from flexlib.reconstruct.spread_cpu import spread_planes
from flexlib.runtime import share_threads_with_numba
from flexlib.workflow_support.estimates import largest_grid_mb

_OVERSAMPLING = 1.25  # of that grid, over the kernel's extent; far out, where it aliases, the kernel is weak


@dataclass(frozen=True)
class Block:
    """The box around a mask's voxels, which transforms need not be wider than."""

    extent: tuple[int, int, int]  # voxels along z, y, x
    index: torch.Tensor  # (nvox,) int64 of the mask's voxels in the flattened block

    @classmethod
    def around(cls, voxels: VoxelTensors) -> Block:
        """The smallest one."""
        places = torch.stack(torch.unravel_index(voxels.index, (voxels.box,) * 3))  # (3, nvox) z, y, x
        low = places.amin(1)
        nz, ny, nx = (int(n) for n in places.amax(1) - low + 1)
        z, y, x = places - low[:, None]
        return cls((nz, ny, nx), (z * ny + y) * nx + x)

    def convolve(self, values: torch.Tensor, transfer: torch.Tensor) -> torch.Tensor:
        """(nvox,) periodic convolution of (nvox,) values at the mask's voxels, read at these.

        ``transfer`` (Fz, Fy, Fx//2+1) is the kernel's real transform; the period, even, is at least the extent.
        """
        (nz, ny, nx), (fz, fy, half) = self.extent, transfer.shape
        block = values.new_zeros(nz * ny * nx)
        block[self.index] = values
        spectrum = torch.fft.rfftn(block.view(nz, ny, nx), s=(fz, fy, 2 * (half - 1)))
        spectrum *= transfer
        some = torch.fft.ifft(torch.fft.ifft(spectrum, dim=0)[:nz], dim=1)[:, :ny]
        return torch.fft.irfft(some, n=2 * (half - 1), dim=2)[:, :, :nx].reshape(-1)[self.index]


@dataclass(frozen=True)
class RestingHessian:
    """``A^T W A`` of particles at rest, over the voxels of a mask."""

    block: Block
    transfer: torch.Tensor  # (Fz, Fy, Fx//2+1) real, of the circulant kernel

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """(nvox,) product with (nvox,) values."""
        return self.block.convolve(values, self.transfer)


class RestingSum:
    """Sums up a ``RestingHessian`` from batches of views."""

    def __init__(self, voxels: VoxelTensors, dtype: torch.dtype) -> None:
        """Of the voxels, which stand on their lattice; ``dtype`` decides the arithmetic."""
        box, device = voxels.box, voxels.index.device
        self._block = Block.around(voxels)
        self._shape = _grid_shape(self._block.extent)
        # wider by the taps that reach past the end of y and x, which are folded back at last
        self._grid = torch.zeros(
            (self._shape[0], self._shape[1] + TAPS, self._shape[2] + TAPS), dtype=dtype, device=device
        )
        self._times = plane_weight(box).to(device)  # 2 for a pixel that stands for its Friedel mate too
        inside = self._times > 0
        waves = torch.as_tensor(wavenumbers(box), device=device)
        ky, kx = torch.meshgrid(waves, torch.arange(box // 2 + 1, device=device).to(waves), indexing="ij")
        self._waves = torch.stack([kx[inside], ky[inside]], 1).to(dtype)  # (pixels, 2)
        self._inside, self._box = inside, box

    @staticmethod
    def fits(voxels: VoxelTensors) -> bool:
        """Whether the grid is no larger than jobs are given memory for."""
        grid_mb = 4 * int(np.prod(_grid_shape(Block.around(voxels).extent))) / 2**20
        return grid_mb <= largest_grid_mb(voxels.box)

    def add(self, weight: torch.Tensor, rotation: torch.Tensor) -> None:
        """Views with ``weight`` (b, N, N//2+1), the squared transfer functions, and ``rotation`` (b, 3, 3)."""
        dtype = self._grid.dtype
        weights = (weight * self._times)[:, self._inside].to(dtype)
        per_wave = torch.tensor(self._shape[::-1], device=rotation.device) / self._box  # grid points along x, y, z
        axes = rotation[:, :2].to(dtype) * per_wave.to(dtype)
        table = kernel_coefficients(_OVERSAMPLING)
        if self._grid.device.type == "cpu" and dtype == torch.float32:
            share_threads_with_numba()
            seen, waves, turns = (t.contiguous().numpy() for t in (weights, self._waves, axes))
            slabs = torch.get_num_threads()
            spread_planes(seen, waves, turns, table.astype(np.float32), self._shape, slabs, self._grid.numpy())
        else:
            places = (self._waves @ axes).flatten(0, 1)
            _spread(weights.flatten(), places, table, self._shape, self._grid)

    def total(self, ranks: Ranks) -> RestingHessian:
        """The Hessian of all views of all ranks; the sum itself is used up."""
        (nz, ny, nx), (pz, py, px) = self._block.extent, self._shape
        grid = self._grid
        del self._grid  # one copy is enough
        grid[:, :TAPS] += grid[:, py:]
        grid[:, :, :TAPS] += grid[:, :, px:]
        grid = grid[:, :py, :px].contiguous()
        kernel = torch.fft.rfftn(grid).real
        del grid
        steps = [torch.cat([torch.arange(n), torch.arange(1 - n, 0)]).to(kernel.device) for n in (nz, ny)]
        right = kernel[steps[0] % pz][:, steps[1] % py][:, :, :nx].clone()  # dx >= 0
        for axis, (offsets, side) in enumerate(zip((*steps, torch.arange(nx)), (pz, py, px), strict=True)):
            factor = torch.from_numpy(1 / kernel_transfer(offsets.cpu().numpy() / side, _OVERSAMPLING)).to(right)
            right *= factor.view([-1 if a == axis else 1 for a in range(3)])
        fz, fy, fx = (grid_side(2 * n - 1) for n in self._block.extent)
        circulant = right.new_zeros((fz, fy, fx))
        rows, columns = steps[0][:, None] % fz, steps[1][None] % fy
        circulant[rows, columns, :nx] = right
        # the kernel is even: what is left of zero is what lies opposite
        circulant[(-rows) % fz, (-columns) % fy, fx - nx + 1 :] = right[:, :, 1:].flip(2)
        transfer = torch.fft.rfftn(circulant).real.contiguous()
        ranks.add(transfer)
        return RestingHessian(self._block, transfer)


def _grid_shape(extent: tuple[int, int, int]) -> tuple[int, int, int]:
    nz, ny, nx = (grid_side(_OVERSAMPLING * 2 * n) for n in extent)
    return nz, ny, nx


def _spread(
    weights: torch.Tensor, places: torch.Tensor, table: np.ndarray, shape: tuple[int, int, int], grid: torch.Tensor
) -> None:
    """``spread_planes`` in plain torch: ``weights`` (m,) at ``places`` (m, 3) x, y, z."""
    below = torch.floor(places)
    fraction = places - below
    along = torch.zeros_like(fraction)[..., None]
    for row in torch.as_tensor(table).to(fraction):
        along = along * fraction[..., None] + row  # (pixels, 3, taps)
    x, y, z = (below.long() - (TAPS // 2 - 1)).unbind(1)
    x, y, flat = x % shape[2], y % shape[1], grid.view(-1)
    for tap_z in range(TAPS):
        plane = (z + tap_z) % shape[0] * grid.shape[1]
        for tap_y in range(TAPS):
            row = (plane + y + tap_y) * grid.shape[2] + x
            share = weights * along[:, 2, tap_z] * along[:, 1, tap_y]
            for tap_x in range(TAPS):
                flat.index_add_(0, row + tap_x, share * along[:, 0, tap_x])
