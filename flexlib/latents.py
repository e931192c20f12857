"""Where latents come from: the spectral start, and Gauss-Newton inference of single particles.

The spectral start reads the motion off the residual images in one pass, before any network exists. At zero
displacement the force of particle i on the mesh, projected on smooth displacement fields, is ``s_i = H_i a_i + e_i``
with ``a_i`` the particle's (small) displacement and ``Cov(e_i) = H_i``, the Fisher information. With white noise in
place of the residuals the same pass gives ``mean H``. In the coordinates where that is the identity, directions
whose variance stands above the noise edge are motion; their scores start the latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from flexlib.particles.images import ImageBatch
from flexlib.projection.op import VoxelTensors, project, view_vertices


@dataclass(frozen=True)
class SpectralStart:
    """Result of ``spectral_start``: eigenvalues in units of the noise, scores and the fields they belong to."""

    eigenvalues: np.ndarray  # (m,) descending; 1 is pure noise
    noise_edge: float  # largest eigenvalue that pure noise is expected to give
    suggested_dims: int  # see ``suggest_dims``
    latents: np.ndarray  # (n, K) float32, unit variance
    directions: np.ndarray  # (K, m) coefficients of the basis per unit latent
    scores: np.ndarray  # (n, m) float32, whitened, leading first


def suggest_dims(eigenvalues: np.ndarray, noise_edge: float, most: int = 10) -> int:
    """Number of leading eigenvalues (descending, noise = 1) before the deepest drop; 0 if none leaves the noise.

    All that stand above the noise edge would be too many: a motion too large to be linear has harmonics of its own,
    which follow the true dimensions after a drop.
    """
    above = min(int((eigenvalues > noise_edge).sum()), most)
    if above == 0:
        return 0
    signal = np.maximum(eigenvalues[: above + 1], noise_edge) - 1.0
    return int(np.argmax(signal[:-1] / signal[1:])) + 1 if len(signal) > above else above


@dataclass(frozen=True)
class Operator:
    """How this run projects: the mesh at rest, its voxels, and the kernel."""

    vertices_A: torch.Tensor  # (nv, 3) float32
    voxels: VoxelTensors
    pixel_size_A: float
    kernel: str = "linear"
    oversampling: int = 2

    def slices(self, values: torch.Tensor, batch: ImageBatch, displacements_A: torch.Tensor | None) -> torch.Tensor:
        """Fourier transforms (b, box, box//2+1) of the views of ``values`` (nvox,) moved by (b, nv, 3) or at rest."""
        vertices = self.vertices_A if displacements_A is None else self.vertices_A + displacements_A
        in_view = view_vertices(vertices, batch.rotation, batch.origin_px, self.pixel_size_A)
        return project(values, in_view, self.voxels, self.kernel, self.oversampling)


def log_likelihood_loss(
    operator: Operator,
    values: torch.Tensor,
    batch: ImageBatch,
    displacements_A: torch.Tensor | None,
    weight: torch.Tensor,
) -> torch.Tensor:
    """(b,) negative log-likelihood in nats up to a constant: half the squared residual summed over Fourier pixels.

    ``weight`` (box, box//2+1) or (b, box, box//2+1) is ``plane_weight`` of the band in use.
    """
    return _HalfSquaredResidual.apply(operator.slices(values, batch, displacements_A), batch, weight)


class _HalfSquaredResidual(torch.autograd.Function):
    """Half the weighted squared residual of (b, box, box//2+1) slices, with its gradient written out."""

    @staticmethod
    def forward(ctx, slices, batch, weight):
        residual = torch.addcmul(batch.images, batch.transfer.to(slices.dtype), slices, value=-1)
        weighted = residual * weight
        ctx.save_for_backward(weighted, batch.transfer)
        return 0.5 * (torch.view_as_real(weighted) * torch.view_as_real(residual)).sum((1, 2, 3))

    @staticmethod
    def backward(ctx, grad_loss):
        weighted, transfer = ctx.saved_tensors
        return -weighted * transfer.conj() * grad_loss[:, None, None], None, None


def field_forces(
    operator: Operator, values: torch.Tensor, batch: ImageBatch, basis_A: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Forces on the displacement fields at rest: of the residual images, and of white noise in their place.

    ``basis_A`` (m, nv, 3). Returns two (b, m) tensors, minus the gradient of the loss by the field's coefficient.
    """
    vertices = view_vertices(operator.vertices_A, batch.rotation, batch.origin_px, operator.pixel_size_A)
    vertices = vertices.detach().requires_grad_()
    slices = project(values, vertices, operator.voxels, operator.kernel, operator.oversampling)
    predicted = batch.transfer * slices
    box = batch.images.shape[1]
    noise = torch.fft.rfft2(torch.randn((len(batch.rows), box, box), device=values.device), norm="ortho")
    forces = []
    for residual, keep in ((batch.images - predicted.detach(), True), (noise, False)):
        (gradient,) = torch.autograd.grad(
            (weight * (residual.real * predicted.real + residual.imag * predicted.imag)).sum(),
            vertices,
            retain_graph=keep,
        )
        spatial = gradient @ batch.rotation[:, :2] / operator.pixel_size_A  # (b, nv, 3), back in the volume's frame
        forces.append(spatial.flatten(1) @ basis_A.flatten(1).T)
    return forces[0], forces[1]


def spectral_start(
    operator: Operator,
    values: torch.Tensor,
    batches: Iterable[ImageBatch],
    basis_A: torch.Tensor,
    weight: torch.Tensor,
    latent_dims: int,
    prior_precision: torch.Tensor,
    progress: Callable[[int], None] | None = None,
) -> SpectralStart:
    """One pass over the particles (see the module's text); streams any number of them, keeping (n, m) scores.

    ``values`` (nvox,) the rigid map; ``basis_A`` (m, nv, 3); ``weight`` the band; ``prior_precision`` (m,) of the
    fields' coefficients, from the rigidity, so that directions the images hardly see stay small.
    """
    residual_forces, noise_forces = [], []
    for batch in batches:
        residual, noise = field_forces(operator, values, batch, basis_A, weight)
        residual_forces.append(residual)
        noise_forces.append(noise)
        if progress is not None:
            progress(len(batch.rows))
    force = torch.cat(residual_forces).double()
    noise_force = torch.cat(noise_forces).double()
    force = force - force.mean(0)
    num = len(force)
    information = noise_force.T @ noise_force / num
    # fields that the images hardly see are left out instead of being blown up by the whitening
    spread, axes = torch.linalg.eigh(information)
    seen = spread > spread[-1] * 1e-6
    whitener = axes[:, seen] / spread[seen].sqrt()
    white = force @ whitener
    variance, directions = torch.linalg.eigh(white.T @ white / num)
    variance, directions = variance.flip(0), directions.flip(1)
    edge = float((1.0 + np.sqrt(int(seen.sum()) / num)) ** 2 * 1.02)
    scores = white @ directions
    latents = scores[:, :latent_dims] / variance[:latent_dims].sqrt()
    # the displacement per unit latent: mean force = H a, solved with the rigidity as a prior on a
    fields = torch.linalg.solve(information + torch.diag(prior_precision.double()), force.T @ latents / num).T
    return SpectralStart(
        variance.numpy(),
        edge,
        suggest_dims(variance.numpy(), edge),
        latents.float().numpy(),
        fields.float().numpy(),
        scores.float().numpy(),
    )


def friedel_halves(box: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two complementary random masks (box, box//2+1) of {0, 1} in which Friedel mates stay together."""
    generator = torch.Generator().manual_seed(seed)
    first = (torch.rand((box, box // 2 + 1), generator=generator) < 0.5).float()
    mirrored = torch.cat([first[:1, 0], first[1:, 0].flip(0)])  # column kx = 0: row -ky of row ky
    upper = torch.arange(box) <= box // 2
    first[:, 0] = torch.where(upper, first[:, 0], mirrored)
    return first, 1.0 - first


@dataclass(frozen=True)
class Posterior:
    """Latents of some particles by Gauss-Newton, with what the images say of their precision."""

    latents: torch.Tensor  # (b, K)
    precision: torch.Tensor  # (b, K, K) Fisher information of the images plus the unit prior
    loss: torch.Tensor  # (b,) nats at ``latents``, without the prior


@torch.no_grad()
def infer_latents(
    operator: Operator,
    flow: Callable[[torch.Tensor], torch.Tensor],
    values: torch.Tensor,
    batch: ImageBatch,
    weight: torch.Tensor,
    start: torch.Tensor,
    steps: int = 3,
    probe: float = 0.05,
    prior: float = 1.0,
) -> Posterior:
    """Maximum a posteriori latents under a normal prior, by Levenberg-Marquardt with K forward derivatives a step.

    ``start`` (b, K); ``weight`` as in ``log_likelihood_loss``; ``probe`` the finite-difference step in latent units;
    ``prior`` its precision. A step that raises a particle's loss is taken back and damped, so the result is never
    worse than ``start``.
    """
    latents = start.clone()
    num, dims = latents.shape
    eye = torch.eye(dims, device=latents.device)
    damping = torch.full((num,), 1e-2, device=latents.device)
    best = _linearise(operator, flow, values, batch, weight, latents, probe)
    for _ in range(steps):
        gradient = best[1] + prior * latents
        hessian = best[2] + prior * eye
        damped = hessian + damping[:, None, None] * torch.diag_embed(hessian.diagonal(dim1=1, dim2=2))
        step = torch.linalg.solve(damped, gradient[..., None])[..., 0]
        step = step * (1.0 / step.norm(dim=1, keepdim=True).clamp(min=1.0))  # at most one unit
        trial = latents - step
        new = _linearise(operator, flow, values, batch, weight, trial, probe)
        better = new[0] + 0.5 * prior * (trial**2).sum(1) <= best[0] + 0.5 * prior * (latents**2).sum(1)
        latents = torch.where(better[:, None], trial, latents)
        best = tuple(
            torch.where(better.view(-1, *[1] * (old.dim() - 1)), fresh, old)
            for fresh, old in zip(new, best, strict=True)
        )
        damping = torch.where(better, damping * 0.1, damping * 10.0)
    return Posterior(latents, best[2] + prior * eye, best[0])


def _linearise(operator, flow, values, batch, weight, latents, probe):
    """Loss (b,), its gradient (b, K) and Gauss-Newton matrix (b, K, K) at ``latents``, by forward differences."""
    base = operator.slices(values, batch, flow(latents))
    residual = batch.images - batch.transfer * base
    tangents = []
    for axis in range(latents.shape[1]):
        moved = latents.clone()
        moved[:, axis] += probe
        tangents.append(batch.transfer * (operator.slices(values, batch, flow(moved)) - base) / probe)
    tangent = torch.view_as_real(torch.stack(tangents, 1) * weight.sqrt()).flatten(2)
    scaled = torch.view_as_real(residual * weight.sqrt()).flatten(1)
    loss = 0.5 * (scaled**2).sum(1)
    return loss, -(tangent @ scaled[..., None])[..., 0], tangent @ tangent.transpose(1, 2)
