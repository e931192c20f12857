"""The forward model: map, flow and pose in, an image's Fourier transform and its likelihood out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from flexlib.images.batch import ImageBatch
from flexlib.imaging.fourier import resample_spectrum, shell_number
from flexlib.imaging.image_transforms import fourier_resample
from flexlib.projection.fitted import OVERSAMPLING
from flexlib.projection.op import (
    VoxelTensors,
    gather_volume,
    project,
    project_adjoint,
    scatter_volume,
    view_vertices,
)
from flexlib.tetra.tetmesh import MeshVoxels, TetraMesh
from flexlib.tetra.voxels import voxelise


@dataclass(frozen=True)
class Accuracy:
    """How finely voxels are splatted: see ``projection.op.project``."""

    kernel: str
    oversampling: float


# Relative errors of a projection between 0.1, 0.2, 0.3, 0.4 and 0.5 cycles/pixel, against the exact transform of a bent
# volume (tests/test_projection.py, whose bounds are these times 1.5):
TRAINING = Accuracy("linear", 2)  # 2e-3, 1.4e-2, 4.5e-2, 1.5e-1: a quarter of the taps, for bands up to 0.4
STATISTICS = Accuracy("cubic", 1)  # 1e-4, 1.8e-3, 1.8e-2, 1.3e-1: sums over many images, as of noise and scale
EXACT = Accuracy("cubic", 2)  # 1e-5, 2e-4, 1e-3, 7e-3: where every shell counts
SOLVING = Accuracy("fitted", OVERSAMPLING)  # 3e-5, 1.3e-4, 1e-3, 4e-3: a map alone, without gradients


def solving_accuracy(device: torch.device | str) -> Accuracy:
    """What maps are solved for with: ``SOLVING``, where the device has a kernel for it."""
    return SOLVING if torch.device(device).type == "cpu" else EXACT


@dataclass(frozen=True)
class Operator:
    """How voxels that ride on a mesh are projected: the mesh at rest, its voxels, and the accuracy."""

    vertices_A: torch.Tensor  # (nv, 3), float32 or float64 as ``voxels``
    voxels: VoxelTensors
    pixel_size_A: float
    accuracy: Accuracy = TRAINING

    @classmethod
    def on_mesh(
        cls,
        mesh: TetraMesh,
        inside: np.ndarray,
        pixel_size_A: float,
        device: torch.device | str = "cpu",
        accuracy: Accuracy = TRAINING,
    ) -> Operator:
        """The operator of the voxels ``inside`` (N, N, N) bool of a volume of ``pixel_size_A``, riding on ``mesh``."""
        return cls.of_voxels(mesh, voxelise(mesh, inside, pixel_size_A), device, accuracy)

    @classmethod
    def of_voxels(
        cls,
        mesh: TetraMesh,
        voxels: MeshVoxels,
        device: torch.device | str = "cpu",
        accuracy: Accuracy = TRAINING,
        dtype: torch.dtype = torch.float32,
    ) -> Operator:
        """The operator of voxels whose cells are known; ``dtype`` decides the arithmetic."""
        at_rest = torch.as_tensor(mesh.vertices_A, dtype=dtype, device=device)
        tensors = VoxelTensors.from_mesh_voxels(voxels, device, dtype)
        return cls(at_rest, tensors, voxels.pixel_size_A, accuracy)

    def vertices_px(self, batch: ImageBatch, displacements_A: torch.Tensor | None = None) -> torch.Tensor:
        """Where each image of ``batch`` sees the mesh, (b, nv, 2) pixels; moved by (b, nv, 3) Angstrom or at rest."""
        dtype = self.vertices_A.dtype
        rotation, origin_px = batch.rotation.to(dtype), batch.origin_px.to(dtype)
        return view_vertices(self.vertices_A, rotation, origin_px, self.pixel_size_A, displacements_A)

    def project(self, values: torch.Tensor, vertices_px: torch.Tensor) -> torch.Tensor:
        """Fourier transforms (b, box, box//2+1) of ``values`` (nvox,) seen with the mesh at ``vertices_px``."""
        return project(values, vertices_px, self.voxels, self.accuracy.kernel, self.accuracy.oversampling)

    def project_adjoint(self, spectra: torch.Tensor, vertices_px: torch.Tensor) -> torch.Tensor:
        """Adjoint of ``project`` over the full Fourier plane: (nvox,) from (b, box, box//2+1) of real images."""
        return project_adjoint(spectra, vertices_px, self.voxels, self.accuracy.kernel, self.accuracy.oversampling)

    def slices(
        self, values: torch.Tensor, batch: ImageBatch, displacements_A: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Fourier transforms (b, box, box//2+1) of the views of ``values`` (nvox,) moved by (b, nv, 3) or at rest."""
        return self.project(values, self.vertices_px(batch, displacements_A))


def log_likelihood_loss(
    operator: Operator,
    values: torch.Tensor,
    batch: ImageBatch,
    displacements_A: torch.Tensor | None,
    weight: torch.Tensor,
) -> torch.Tensor:
    """Negative log-likelihood in nats up to a constant: half the squared residual summed over Fourier pixels.

    Parameters
    ----------
    operator, values
        The map: ``values`` (nvox,) at the operator's voxels.
    batch
        b images.
    displacements_A
        (b, nv, 3) of the mesh vertices; None for the mesh at rest.
    weight
        (box, box//2+1) or (b, box, box//2+1), ``plane_weight`` of the band in use.

    Returns
    -------
    loss
        (b,), differentiable by ``values``, ``displacements_A`` and the batch's rotation, origin and contrast.
    """
    return _HalfSquaredResidual.apply(operator.slices(values, batch, displacements_A), batch, weight, batch.contrast)


class _HalfSquaredResidual(torch.autograd.Function):
    """Half the weighted squared residual of (b, box, box//2+1) slices, with its gradient written out."""

    @staticmethod
    def forward(
        ctx: Any, slices: torch.Tensor, batch: ImageBatch, weight: torch.Tensor, contrast: torch.Tensor | None
    ) -> torch.Tensor:
        seen = slices if contrast is None else slices * contrast[:, None, None]
        residual = torch.addcmul(batch.images, batch.transfer.to(slices.dtype), seen, value=-1)
        weighted = residual * weight
        by_contrast = contrast is not None and ctx.needs_input_grad[3]
        ctx.save_for_backward(weighted, batch.transfer, contrast, slices if by_contrast else None)
        return 0.5 * (torch.view_as_real(weighted) * torch.view_as_real(residual)).sum((1, 2, 3))

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weighted, transfer, contrast, slices = ctx.saved_tensors
        by_slices = -weighted * transfer.conj()
        by_contrast = None
        if slices is not None:
            by_contrast = (torch.view_as_real(by_slices) * torch.view_as_real(slices)).sum((1, 2, 3)) * grad_loss
        factor = grad_loss if contrast is None else grad_loss * contrast
        return by_slices * factor[:, None, None], None, None, by_contrast


@dataclass(frozen=True)
class CoarseMap:
    """The same model at half the box: where shells up to a quarter of it are enough, at a fraction of the work."""

    operator: Operator
    fine: VoxelTensors

    @cached_property
    def _inside(self) -> torch.Tensor:
        """(box, box, box//2+1) bool: the coarse box's whole shells."""
        box, device = self.operator.voxels.box, self.operator.voxels.index.device
        return torch.as_tensor(shell_number(box) < box // 2, device=device)

    def values(self, values: torch.Tensor) -> torch.Tensor:
        """The map's values (nvox,) at the coarse voxels: its Fourier transform, cropped."""
        box = self.operator.voxels.box
        spectrum = resample_spectrum(torch.fft.rfftn(scatter_volume(values, self.fine)), box) * self._inside
        return gather_volume(torch.fft.irfftn(spectrum, s=(box,) * 3) / 8.0, self.operator.voxels)

    def batch(self, batch: ImageBatch) -> ImageBatch:
        """The images, transfer functions and shifts at the coarse box; a voxel is worth eight fine ones."""
        box = self.operator.voxels.box
        return ImageBatch(
            rows=batch.rows,
            images=fourier_resample(batch.images, box),
            transfer=8.0 * fourier_resample(batch.transfer, box),
            rotation=batch.rotation,
            origin_px=batch.origin_px / 2,
            contrast=batch.contrast,
        )

    def weight(self, weight: torch.Tensor) -> torch.Tensor:
        """A (box, box//2+1) weight of Fourier pixels, cropped."""
        return fourier_resample(weight[None], self.operator.voxels.box)[0]
