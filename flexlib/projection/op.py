"""The operator: voxels that ride on a mesh, splatted straight into 2D images.

The position of a moved, rotated voxel is the barycentric mix of its cell's *projected* vertices, so one image costs
(masked voxels) x (kernel taps): no 3D grid is interpolated. With the FFT and the division by the kernel's transfer
function this is a type-1 non-uniform FFT of the moved voxels; the backward pass is its exact adjoint.

``splat_voxels`` is one torch custom operator with its autograd rule; backends are registered per device:
numba on the CPU (``cpu.py``), Triton on CUDA (``cuda.py``), plain torch (``reference.py``) for float64 and the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from types import ModuleType

import numpy as np
import torch

from flexlib.projection import reference
from flexlib.runtime import has_triton
from flexlib.tetra.tetmesh import MeshVoxels

logger = logging.getLogger(__name__)

KERNELS = {"linear": 2, "cubic": 4}  # taps per axis; B-splines of degree 1 and 3
_FFT_BYTES = 2**22  # of images that the CPU transforms at once: the temporaries stay in its cache, and small


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

    Parameters: ``values`` (nvox,) densities; ``vertices`` (b, nv, 2) view positions (x, y) in grid pixels from the
    box centre; ``cells`` (nc, 4) int32; ``cell`` (nvox,) int32; ``bary`` (nvox, 4); ``grid`` side of the image;
    ``taps`` 2 (linear) or 4 (cubic B-spline). Returns (b, grid, grid), axes (y, x), the box centre at pixel (0, 0)
    and positions taken modulo ``grid``.
    """
    return reference.splat(values, vertices, cells, cell, bary, grid, taps)


@splat_voxels.register_fake
def _(values, vertices, cells, cell, bary, grid, taps):
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
    need_values: bool,
    need_vertices: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adjoint of ``splat_voxels``: gradients to ``values`` (nvox,) and ``vertices`` (b, nv, 2).

    ``grad_images`` is (b, grid, grid). A gradient that is not needed comes back empty.
    """
    return reference.splat_adjoint(grad_images, values, vertices, cells, cell, bary, taps, need_values, need_vertices)


@splat_voxels_adjoint.register_fake
def _(grad_images, values, vertices, cells, cell, bary, taps, need_values, need_vertices):
    return (
        torch.empty_like(values) if need_values else values.new_empty(0),
        torch.empty_like(vertices) if need_vertices else vertices.new_empty(0),
    )


def _setup_context(ctx, inputs, output):
    values, vertices, cells, cell, bary, _, ctx.taps = inputs
    ctx.save_for_backward(values, vertices, cells, cell, bary)


def _backward(ctx, grad_images):
    values, vertices, cells, cell, bary = ctx.saved_tensors
    need_values, need_vertices = ctx.needs_input_grad[:2]
    grad_values, grad_vertices = splat_voxels_adjoint(
        grad_images.contiguous(), values, vertices, cells, cell, bary, ctx.taps, need_values, need_vertices
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


def _backend(device: str, dtype: torch.dtype) -> ModuleType:
    """The module with the fastest ``splat`` and ``splat_adjoint`` for tensors on ``device``."""
    if dtype != torch.float32 or (device == "cuda" and not has_triton()):
        return reference
    return import_module(f"flexlib.projection.{device}")


def _register(device: str) -> None:
    @splat_voxels.register_kernel(device)
    def _(values, *others):
        return _backend(device, values.dtype).splat(values, *others)

    @splat_voxels_adjoint.register_kernel(device)
    def _(grad_images, values, *others):
        return _backend(device, values.dtype).splat_adjoint(grad_images, values, *others)


for _device in ("cpu", "cuda"):
    _register(_device)


@lru_cache(maxsize=16)
def _deconvolution(box: int, grid: int, taps: int, device: str, dtype: torch.dtype) -> torch.Tensor:
    """(box, box//2+1) inverse of the B-spline kernel's transfer function at the box's frequencies."""
    ky = torch.fft.fftfreq(box, 1.0 / box, dtype=torch.float64)[:, None] / grid
    kx = torch.arange(box // 2 + 1, dtype=torch.float64)[None, :] / grid
    return (1.0 / (torch.sinc(ky) * torch.sinc(kx)) ** taps).to(device=device, dtype=dtype)


def project(
    values: torch.Tensor,
    vertices_px: torch.Tensor,
    voxels: VoxelTensors,
    kernel: str = "cubic",
    oversampling: int = 1,
) -> torch.Tensor:
    """Fourier transforms of the projections of a deformed volume.

    Parameters
    ----------
    values : (nvox,) densities at ``voxels.index``.
    vertices_px : (b, nv, 2) view positions (x, y) of the mesh vertices, in pixels of ``voxels.box`` from the box
        centre, after displacement, rotation and shift.
    kernel : "linear" (4 taps) or "cubic" (16 taps).
    oversampling : image grid over box, 1 or 2; 2 lowers the aliasing error by orders of magnitude at the same taps.

    Returns
    -------
    (b, box, box//2+1) complex: ``sum_j values_j exp(-2 pi i k . p_j / box)`` in rfft2 layout, phase origin at the box
    centre. Raises KeyError for an unknown kernel.
    """
    box, taps = voxels.box, KERNELS[kernel]
    grid = box * oversampling
    images = splat_voxels(values, vertices_px * oversampling, voxels.cells, voxels.cell, voxels.bary, grid, taps)
    return _Spectrum.apply(images, box, taps)


class _Spectrum(torch.autograd.Function):
    """(b, grid, grid) splatted images to the box's deconvolved frequencies, (b, box, box//2+1)."""

    @staticmethod
    def forward(ctx, images, box, taps):
        ctx.shape = (images.shape[-1], box, taps)
        half, grid = box // 2, images.shape[-1]
        deconvolution = _deconvolution(box, grid, taps, str(images.device), images.dtype)

        def transform(some: torch.Tensor) -> torch.Tensor:
            rows = torch.fft.rfft(some, dim=-1)[..., : half + 1]
            spectrum = torch.fft.fft(rows, dim=-2)
            return torch.cat([spectrum[:, :half], spectrum[:, grid - half :]], dim=1).mul_(deconvolution)

        return _in_parts(transform, images, grid)

    @staticmethod
    def backward(ctx, grad_spectrum):
        grid, box, taps = ctx.shape
        # irfft adds each column's mirror image, which the gradient of the stored half plane does not have
        halved = torch.full((box // 2 + 1,), 0.5, dtype=grad_spectrum.real.dtype, device=grad_spectrum.device)
        halved[0] = 1.0
        if grid == box:
            halved[-1] = 1.0
        return spectrum_to_images(grad_spectrum * halved, grid, taps), None, None


def spectrum_to_images(spectra: torch.Tensor, grid: int, taps: int) -> torch.Tensor:
    """Deconvolve (b, box, box//2+1) half-plane spectra and sum ``exp(+2 pi i k . p / grid)`` over the full plane.

    The inverse of the splat's transform up to a factor, and its adjoint: (b, grid, grid) real images.
    """
    box = spectra.shape[1]
    half = box // 2
    deconvolution = _deconvolution(box, grid, taps, str(spectra.device), spectra.real.dtype)

    def transform(some: torch.Tensor) -> torch.Tensor:
        some = some * deconvolution
        if grid > box:
            padded = some.new_zeros((len(some), grid, half + 1))
            padded[:, :half] = some[:, :half]
            padded[:, grid - half :] = some[:, half:]
            some = padded
        columns = torch.fft.ifft(some, dim=-2, norm="forward")
        return torch.fft.irfft(columns, n=grid, dim=-1, norm="forward")

    return _in_parts(transform, spectra, grid)


def project_adjoint(
    spectra: torch.Tensor,
    vertices_px: torch.Tensor,
    voxels: VoxelTensors,
    kernel: str = "cubic",
    oversampling: int = 1,
) -> torch.Tensor:
    """Adjoint of ``project`` for the inner product of the full Fourier plane.

    Parameters
    ----------
    spectra : (b, box, box//2+1) complex transforms of real images, zero for |k| >= box/2.
    vertices_px, voxels, kernel, oversampling : as for ``project``.

    Returns
    -------
    (nvox,): ``Re sum_i sum_k spectra_ik exp(+2 pi i k . p_ij / box)``, k over the full plane.
    """
    taps = KERNELS[kernel]
    images = spectrum_to_images(spectra, voxels.box * oversampling, taps)
    density, _ = splat_voxels_adjoint(
        images.contiguous(),
        voxels.bary.new_zeros(len(voxels.index)),
        vertices_px * oversampling,
        voxels.cells,
        voxels.cell,
        voxels.bary,
        taps,
        need_values=True,
        need_vertices=False,
    )
    return density


def _in_parts(transform: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor, grid: int) -> torch.Tensor:
    """``transform`` of a batch, on the CPU of a part at a time; ``grid`` the side of the images it comes from or to."""
    at_once = len(batch)
    if batch.device.type == "cpu":
        at_once = max(1, _FFT_BYTES // (4 * grid**2))
    if at_once >= len(batch):
        return transform(batch)
    first = transform(batch[:at_once])
    result = first.new_empty((len(batch), *first.shape[1:]))
    result[:at_once] = first
    for start in range(at_once, len(batch), at_once):
        result[start : start + at_once] = transform(batch[start : start + at_once])
    return result


def view_vertices(
    vertices_A: torch.Tensor,
    rotation: torch.Tensor,
    origin_px: torch.Tensor,
    pixel_size_A: float,
    displacements_A: torch.Tensor | None = None,
) -> torch.Tensor:
    """Move mesh vertices, rotate them into the view, drop z, apply the particle's shift.

    ``vertices_A`` (nv, 3) or (b, nv, 3) in A; ``rotation`` (b, 3, 3) and ``origin_px`` (b, 2) are constants;
    ``displacements_A`` (b, nv, 3) in A, or none. Returns (b, nv, 2) pixels.
    """
    turn = rotation[:, :2] / pixel_size_A
    if vertices_A.device.type == "cpu" and vertices_A.dtype == torch.float32:
        return _View.apply(vertices_A, displacements_A, turn.float(), origin_px.float())
    moved = vertices_A if displacements_A is None else vertices_A + displacements_A
    return torch.baddbmm(-origin_px[:, None], moved.expand(len(turn), -1, -1), turn.transpose(1, 2))


class _View(torch.autograd.Function):
    """``view_vertices`` in one pass: batched products of matrices this thin are slow."""

    @staticmethod
    def forward(ctx, vertices_A, displacements_A, turn, origin_px):
        ctx.save_for_backward(turn)
        ctx.shared = vertices_A.ndim == 2
        backend = import_module("flexlib.projection.cpu")
        return backend.view(vertices_A, displacements_A, turn, origin_px)

    @staticmethod
    def backward(ctx, grad):
        (turn,) = ctx.saved_tensors
        back = import_module("flexlib.projection.cpu").view_adjoint(grad, turn)
        of_vertices = (back.sum(0) if ctx.shared else back) if ctx.needs_input_grad[0] else None
        return of_vertices, back if ctx.needs_input_grad[1] else None, None, None


def scatter_volume(values: torch.Tensor, voxels: VoxelTensors) -> torch.Tensor:
    """(nvox,) values back into a zero-filled (box, box, box) volume, axes (z, y, x)."""
    volume = values.new_zeros(voxels.box**3)
    volume[voxels.index] = values
    return volume.view(voxels.box, voxels.box, voxels.box)


def gather_volume(volume: torch.Tensor | np.ndarray, voxels: VoxelTensors) -> torch.Tensor:
    """The (box, box, box) volume's values at the mask's voxels, (nvox,)."""
    return torch.as_tensor(volume, device=voxels.index.device).reshape(-1)[voxels.index]
