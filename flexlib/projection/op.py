"""The operator: voxels that ride on a mesh, splatted straight into 2D images.

The position of a moved, rotated voxel is the barycentric mix of its cell's *projected* vertices, so one image costs
(masked voxels) x (kernel taps): no 3D grid is interpolated. With the FFT and the division by the kernel's transfer
function this is a type-1 non-uniform FFT of the moved voxels; the backward pass is its exact adjoint.

``splat_voxels`` is one torch custom operator with its autograd rule; backends are registered per device:
numba on the CPU (``cpu.py``), Triton on CUDA (``cuda.py``), plain torch (``reference.py``) for float64 and the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import torch

from flexlib.projection import reference
from flexlib.projection.fitted import grid_side, kernel_coefficients
from flexlib.projection.spectrum import KERNELS, images_to_spectrum, spectrum_to_images
from flexlib.runtime import has_triton
from flexlib.tetra.tetmesh import MeshVoxels

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class VoxelTensors:
    """``MeshVoxels`` as tensors on one device, ready for the operator (see there for shapes)."""

    box: int
    num_vertices: int
    cells: torch.Tensor  # (nc, 4) int32
    cell: torch.Tensor  # (nvox,) int32, non-decreasing
    bary: torch.Tensor  # (nvox, 4) float32 or float64
    index: torch.Tensor  # (nvox,) int64 into the flattened (z, y, x) volume

    @classmethod
    def from_mesh_voxels(
        cls, voxels: MeshVoxels, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> VoxelTensors:
        """Copy to ``device``; ``dtype`` of the barycentric weights decides the arithmetic."""
        return cls(
            voxels.box,
            voxels.num_vertices,
            torch.as_tensor(voxels.cells, dtype=torch.int32, device=device),
            torch.as_tensor(voxels.cell, dtype=torch.int32, device=device),
            torch.as_tensor(voxels.bary, dtype=dtype, device=device),
            torch.as_tensor(voxels.index, dtype=torch.int64, device=device),
        )


@torch.library.custom_op("flexlib::splat_voxels", mutates_args=())
def splat_voxels(
    values: torch.Tensor,
    vertices: torch.Tensor,
    cells: torch.Tensor,
    cell: torch.Tensor,
    bary: torch.Tensor,
    grid: int,
    taps: int,
) -> torch.Tensor:
    """Splat nvox voxels into b periodic images.

    Parameters
    ----------
    values : torch.Tensor
        (nvox,) densities.
    vertices : torch.Tensor
        (b, nv, 2) view positions (x, y) in grid pixels from the box centre; taken modulo ``grid``.
    cells, cell, bary : torch.Tensor
        (nc, 4) int32 vertices of each cell; (nvox,) int32 cell of each voxel; (nvox, 4) barycentric weights there.
    grid : int
        Side of the images in pixels.
    taps : int
        2 (linear) or 4 (cubic B-spline).

    Returns
    -------
    torch.Tensor
        (b, grid, grid), axes (y, x), the box centre at pixel (0, 0).
    """
    return reference.splat(values, vertices, cells, cell, bary, grid, taps)


@splat_voxels.register_fake
def _fake_splat(
    values: torch.Tensor,
    vertices: torch.Tensor,
    cells: torch.Tensor,
    cell: torch.Tensor,
    bary: torch.Tensor,
    grid: int,
    taps: int,
) -> torch.Tensor:
    return values.new_empty((vertices.shape[0], grid, grid))


@torch.library.custom_op("flexlib::splat_voxels_adjoint", mutates_args=())
def splat_voxels_adjoint(
    grad_images: torch.Tensor,
    values: torch.Tensor,
    vertices: torch.Tensor,
    cells: torch.Tensor,
    cell: torch.Tensor,
    bary: torch.Tensor,
    taps: int,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adjoint of ``splat_voxels``, whose arguments the others are.

    Parameters
    ----------
    grad_images : torch.Tensor
        (b, grid, grid) gradient by the images.
    needs : sequence of two bools
        Whether the gradients by ``values`` and by ``vertices`` are needed.

    Returns
    -------
    torch.Tensor, torch.Tensor
        Gradients by ``values`` (nvox,) and ``vertices`` (b, nv, 2); one that is not needed comes back empty.
    """
    return reference.splat_adjoint(grad_images, values, vertices, cells, cell, bary, taps, needs)


@splat_voxels_adjoint.register_fake
def _fake_adjoint(
    grad_images: torch.Tensor,
    values: torch.Tensor,
    vertices: torch.Tensor,
    cells: torch.Tensor,
    cell: torch.Tensor,
    bary: torch.Tensor,
    taps: int,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    need_values, need_vertices = needs
    return (
        torch.empty_like(values) if need_values else values.new_empty(0),
        torch.empty_like(vertices) if need_vertices else vertices.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    values, vertices, cells, cell, bary, _, ctx.taps = inputs
    ctx.save_for_backward(values, vertices, cells, cell, bary)


def _backward(ctx: Any, grad_images: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    values, vertices, cells, cell, bary = ctx.saved_tensors
    need_values, need_vertices = ctx.needs_input_grad[:2]
    grad_values, grad_vertices = splat_voxels_adjoint(
        grad_images.contiguous(), values, vertices, cells, cell, bary, ctx.taps, [need_values, need_vertices]
    )
    return (
        grad_values if need_values else None,
        grad_vertices if need_vertices else None,
        None,
        None,
        None,
        None,
        None,
    )


splat_voxels.register_autograd(_backward, setup_context=_setup_context)


def backend(device: str, dtype: torch.dtype) -> ModuleType:
    """The module with the fastest ``splat`` and ``splat_adjoint`` for tensors on ``device``."""
    if dtype != torch.float32 or (device == "cuda" and not has_triton()):
        return reference
    return import_module(f"flexlib.projection.{device}")


def _register(device: str) -> None:
    @splat_voxels.register_kernel(device)
    def _(values: torch.Tensor, *others: Any) -> torch.Tensor:
        return backend(device, values.dtype).splat(values, *others)

    @splat_voxels_adjoint.register_kernel(device)
    def _(grad_images: torch.Tensor, values: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return backend(device, values.dtype).splat_adjoint(grad_images, values, *others)


for _device in ("cpu", "cuda"):
    _register(_device)


def image_grid(box: int, oversampling: float) -> int:
    """Side of the grid that voxels are splatted into: ``oversampling`` boxes, or the next one with fast transforms."""
    side = box * oversampling
    return int(side) if float(oversampling).is_integer() else grid_side(side)


def project(
    values: torch.Tensor,
    vertices_px: torch.Tensor,
    voxels: VoxelTensors,
    kernel: str = "cubic",
    oversampling: float = 1,
) -> torch.Tensor:
    """Fourier transforms of the projections of a deformed volume.

    Parameters
    ----------
    values : torch.Tensor
        (nvox,) densities at ``voxels.index``.
    vertices_px : torch.Tensor
        (b, nv, 2) view positions (x, y) of the mesh vertices, in pixels of ``voxels.box`` from the box centre, after
        displacement, rotation and shift.
    voxels : VoxelTensors
    kernel : str
        "linear" (4 taps), "cubic" (16 taps) or "fitted" (16 taps; ``fitted.py``): the last has no gradients, and no
        kernel for CUDA devices, where plain torch computes it.
    oversampling : float
        Image grid over box; 2 instead of 1 lowers the aliasing error by orders of magnitude at the same taps. At least
        ``fitted.OVERSAMPLING`` for "fitted".

    Returns
    -------
    torch.Tensor
        (b, box, box//2+1) complex: ``sum_j values_j exp(-2 pi i k . p_j / box)`` in rfft2 layout, phase origin at the
        box centre.

    Raises
    ------
    KeyError
        The kernel is unknown.
    """
    grid = image_grid(voxels.box, oversampling)
    mesh = (vertices_px * (grid / voxels.box), voxels.cells, voxels.cell, voxels.bary)
    if kernel == "fitted":
        _refuse_gradients(values, vertices_px)
        images = _fitted_backend(values).splat_fitted(values, *mesh, grid, kernel_coefficients())
    else:
        images = splat_voxels(values, *mesh, grid, KERNELS[kernel])
    return images_to_spectrum(images, voxels.box, kernel)


def project_adjoint(
    spectra: torch.Tensor,
    vertices_px: torch.Tensor,
    voxels: VoxelTensors,
    kernel: str = "cubic",
    oversampling: float = 1,
) -> torch.Tensor:
    """Adjoint of ``project`` for the inner product of the full Fourier plane.

    Parameters
    ----------
    spectra : torch.Tensor
        (b, box, box//2+1) complex transforms of real images, zero for |k| >= box/2.
    vertices_px, voxels, kernel, oversampling
        As for ``project``.

    Returns
    -------
    torch.Tensor
        (nvox,) ``Re sum_i sum_k spectra_ik exp(+2 pi i k . p_ij / box)``, k over the full plane.
    """
    grid = image_grid(voxels.box, oversampling)
    images = spectrum_to_images(spectra, grid, kernel).contiguous()
    mesh = (vertices_px * (grid / voxels.box), voxels.cells, voxels.cell, voxels.bary)
    if kernel == "fitted":
        _refuse_gradients(spectra, vertices_px)
        return _fitted_backend(images).gather_fitted(images, *mesh, kernel_coefficients())
    nothing = voxels.bary.new_zeros(len(voxels.index))
    density, _ = splat_voxels_adjoint(images, nothing, *mesh, KERNELS[kernel], needs=[True, False])
    return density


def _fitted_backend(like: torch.Tensor) -> ModuleType:
    """The module with ``splat_fitted`` and ``gather_fitted`` for tensors such as this."""
    return reference if like.device.type != "cpu" else backend("cpu", like.dtype)


def _refuse_gradients(*tensors: torch.Tensor) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise ValueError("the fitted kernel has no gradients; take the cubic one")


def view_vertices(
    vertices_A: torch.Tensor,
    rotation: torch.Tensor,
    origin_px: torch.Tensor,
    pixel_size_A: float,
    displacements_A: torch.Tensor | None = None,
) -> torch.Tensor:
    """Move mesh vertices, rotate them into the view, drop z, apply the particle's shift.

    Parameters
    ----------
    vertices_A : torch.Tensor
        (nv, 3) or (b, nv, 3) in A.
    rotation, origin_px : torch.Tensor
        (b, 3, 3) and (b, 2) in pixels.
    pixel_size_A : float
    displacements_A : torch.Tensor, optional
        (b, nv, 3) in A.

    Returns
    -------
    torch.Tensor
        (b, nv, 2) in pixels.
    """
    turn = rotation[:, :2] / pixel_size_A
    if vertices_A.device.type == "cpu" and vertices_A.dtype == torch.float32:
        return _View.apply(vertices_A, displacements_A, turn.float(), origin_px.float())
    moved = vertices_A if displacements_A is None else vertices_A + displacements_A
    return torch.baddbmm(-origin_px[:, None], moved.expand(len(turn), -1, -1), turn.transpose(1, 2))


class _View(torch.autograd.Function):
    """``view_vertices`` in one pass: batched products of matrices this thin are slow."""

    @staticmethod
    def forward(
        ctx: Any,
        vertices_A: torch.Tensor,
        displacements_A: torch.Tensor | None,
        turn: torch.Tensor,
        origin_px: torch.Tensor,
    ) -> torch.Tensor:
        moved = (vertices_A, displacements_A) if any(ctx.needs_input_grad[2:]) else (None, None)
        ctx.save_for_backward(turn, *moved)
        ctx.shared = vertices_A.ndim == 2
        return import_module("flexlib.projection.cpu").view(vertices_A, displacements_A, turn, origin_px)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        turn, vertices_A, displacements_A = ctx.saved_tensors
        cpu = import_module("flexlib.projection.cpu")
        of_vertices = of_displacements = of_turn = of_origin = None
        if any(ctx.needs_input_grad[:2]):
            back = cpu.view_adjoint(grad, turn)
            of_vertices = (back.sum(0) if ctx.shared else back) if ctx.needs_input_grad[0] else None
            of_displacements = back if ctx.needs_input_grad[1] else None
        if vertices_A is not None:
            of_turn, of_origin = cpu.turn_adjoint(grad, vertices_A, displacements_A)
        return of_vertices, of_displacements, of_turn, of_origin


def scatter_volume(values: torch.Tensor, voxels: VoxelTensors) -> torch.Tensor:
    """(nvox,) values back into a zero-filled (box, box, box) volume, axes (z, y, x)."""
    volume = values.new_zeros(voxels.box**3)
    volume[voxels.index] = values
    return volume.view(voxels.box, voxels.box, voxels.box)


def gather_volume(volume: torch.Tensor | np.ndarray, voxels: VoxelTensors) -> torch.Tensor:
    """The (box, box, box) volume's values at the mask's voxels, (nvox,)."""
    return torch.as_tensor(volume, device=voxels.index.device).reshape(-1)[voxels.index]
