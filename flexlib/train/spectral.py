"""The spectral start: motion read off the residual images in one pass, before any network exists.

At zero displacement the force of particle i on the mesh, projected on m smooth displacement fields, is
``s_i = H_i a_i + e_i`` with ``a_i`` the particle's (small) displacement and ``Cov(e_i) = H_i``, the Fisher information.
The mean of H_i follows from the model: it is what the derivative of the map along each field would add to each
Fourier coefficient, weighted by how often, and how strongly, the views sample it. In the coordinates where mean H is
the identity, directions whose variance stands above the noise edge are motion; their scores start the latents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from flexlib.distributed import ALONE, Ranks
from flexlib.images.batch import ImageBatch
from flexlib.imaging.fourier import wavenumbers
from flexlib.imaging.image_transforms import plane_weight
from flexlib.model.forward import Operator
from flexlib.projection.op import scatter_volume

_UNSEEN = 1e-6  # of the largest information: fields that images see less are left out, not blown up by the whitening
_CHUNK = 65536  # rows, or numbers of a field's transform, that are in double precision at one time


@dataclass(frozen=True)
class FieldForces:
    """Forces of all particles on m displacement fields at rest, and what noise alone would give."""

    force: np.ndarray  # (n, m) float32, minus the gradient of the loss by the field's coefficient, mean removed
    information: np.ndarray  # (m, m) float64, mean Fisher information = covariance of the forces of pure noise
    weight: np.ndarray | None = None  # (n,) with which each particle counts; None for 1

    def freed_of(self, kept: int) -> FieldForces:
        """The first ``kept`` forces, without what the others explain as well: those of poses and contrast.

        Forces lose their regression on the others, the information becomes its Schur complement. Where one of the
        others is not seen (a translation along the views' one direction), it explains nothing.
        """
        if kept == len(self.information):
            return self
        others = self.information[kept:, kept:]
        scale = 1 / np.sqrt(np.maximum(others.diagonal(), 1e-30))
        inverse = scale[:, None] * np.linalg.pinv(scale[:, None] * others * scale, rcond=1e-6, hermitian=True) * scale
        regression = inverse @ self.information[kept:, :kept]
        force = self.force[:, :kept] - (self.force[:, kept:] @ regression).astype(np.float32)
        schur = self.information[:kept, :kept] - self.information[:kept, kept:] @ regression
        return FieldForces(force, 0.5 * (schur + schur.T), self.weight)

    def weighed(self, weight: np.ndarray) -> FieldForces:
        """The same forces, with the weighted mean removed, counted with ``weight`` (n,)."""
        mean = (weight @ self.force.astype(np.float64)) / weight.sum()
        return FieldForces((self.force - mean).astype(np.float32), self.information, weight)

    @property
    def count(self) -> float:
        """Of the particles."""
        return len(self.force) if self.weight is None else float(self.weight.sum())

    def chunks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Rows of the forces, and the forces (c, m) float64, times the roots of their weights."""
        for first in range(0, len(self.force), _CHUNK):
            rows = slice(first, first + _CHUNK)
            forces = self.force[rows].astype(np.float64)
            yield rows, forces if self.weight is None else forces * np.sqrt(self.weight[rows])[:, None]


@dataclass(frozen=True)
class SpectralStart:
    """Result of ``spectral_start``: eigenvalues in units of the noise, and latents with the fields they belong to."""

    eigenvalues: np.ndarray  # (m,) descending; 1 is pure noise
    noise_edge: float  # largest eigenvalue that pure noise is expected to give
    suggested_dims: int  # see ``suggest_dims``
    latents: np.ndarray  # (n, K) float32, unit variance
    directions: np.ndarray  # (K, m) float32 coefficients of the fields per unit latent

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All fields as tensors on the CPU."""
        own = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: torch.as_tensor(v.copy() if isinstance(v, np.ndarray) else v) for name, v in own.items()}

    @classmethod
    def from_state_dict(cls, saved: dict[str, torch.Tensor]) -> SpectralStart:
        """The inverse of ``state_dict``."""
        own: dict[str, Any] = {name: v.item() if v.ndim == 0 else v.cpu().numpy() for name, v in saved.items()}
        return cls(**own)


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


def measure_forces(
    operator: Operator,
    values: torch.Tensor,
    batches: Iterable[ImageBatch],
    num_rows: int,
    basis_A: torch.Tensor,
    band: float,
    ranks: Ranks = ALONE,
    *,
    contrast: bool = False,
) -> FieldForces:
    """One pass over the rows: their forces on displacement fields at rest.

    Parameters
    ----------
    operator, values
        That projects the map, and the rigid map's values (nvox,).
    batches
        Of this rank's part of the rows, in their order.
    num_rows
        Of all ranks.
    basis_A
        (m, nv, 3) displacement fields in Angstrom.
    band
        Highest shell in use.
    ranks
        The ranks that share the rows; each gets the result of all.
    contrast
        Whether the image's contrast, as its logarithm, counts as one more field at the end.
    """
    box = operator.voxels.box
    weight = plane_weight(box, band).to(values.device)
    force = np.empty((num_rows, len(basis_A) + contrast), np.float32)
    sampling = FourierSampling(box, band)
    every = max(1, num_rows // 2000)  # a few thousand views show how Fourier space is sampled
    mine = ranks.part(num_rows)
    first = mine.start
    for batch in batches:
        last = first + len(batch.rows)
        forces = _batch_forces(operator, values, batch, basis_A, weight)
        force[first:last] = forces[:, : force.shape[1]].cpu().numpy()
        sampling.add(batch, slice((-first) % every, None, every))
        first = last
    if ranks.size > 1:
        force[: mine.start] = force[mine.stop :] = 0.0
        for first in range(0, num_rows, _CHUNK):
            ranks.add(torch.from_numpy(force[first : first + _CHUNK]))
        sampling.add_up(ranks)
    for axis in range(force.shape[1]):
        force[:, axis] -= force[:, axis].mean(dtype=np.float64)
    return FieldForces(force, ranks.from_first(lambda: mean_information(operator, values, basis_A, sampling, contrast)))


def _batch_forces(
    operator: Operator, values: torch.Tensor, batch: ImageBatch, basis_A: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """(b, m + 1) forces of one batch, and that on the logarithm of the contrast."""
    vertices = operator.vertices_px(batch).detach().requires_grad_()
    predicted = batch.transfer * operator.project(values, vertices)
    residual = (batch.images - predicted).detach()
    of_contrast = (weight * (residual.real * predicted.real + residual.imag * predicted.imag)).sum((1, 2))
    (gradient,) = torch.autograd.grad(of_contrast.sum(), vertices)
    spatial = gradient @ batch.rotation[:, :2] / operator.pixel_size_A  # (b, nv, 3), back in the volume's frame
    return torch.cat([spatial.flatten(1) @ basis_A.flatten(1).T, of_contrast.detach()[:, None]], 1)


class FourierSampling:
    """How strongly a particle of the set, on average, samples each 3D Fourier voxel: the sum of |transfer|^2 there."""

    def __init__(self, box: int, band: float) -> None:
        weight = plane_weight(box, band)
        ky, kx = torch.nonzero(weight > 0, as_tuple=True)
        self.box = box
        self.pixels = (ky, kx)
        self.weight = weight[ky, kx]
        frequency = torch.stack([kx, torch.where(ky < box // 2, ky, ky - box)], 1).float()
        self.frequency = frequency  # (p, 2), (x, y) in cycles per box
        self.total = torch.zeros(box * box * (box // 2 + 1), dtype=torch.float64)
        self.count = 0

    def add(self, batch: ImageBatch, rows: slice = slice(None)) -> None:
        """Count the views of ``rows`` of a batch."""
        rotation = batch.rotation[rows].cpu()
        power = batch.transfer[rows].abs().square().cpu()[:, self.pixels[0], self.pixels[1]] * self.weight
        where = torch.round(self.frequency @ rotation[:, :2]).long()  # (b, p, 3), the plane turned into the volume
        where = torch.where(where[..., :1] < 0, -where, where)  # Friedel mates: x >= 0
        x, y, z = where.unbind(-1)
        inside = (where.abs() < self.box // 2).all(-1)
        flat = ((z % self.box) * self.box + y % self.box) * (self.box // 2 + 1) + x
        self.total += torch.bincount(flat[inside], power[inside].double(), minlength=len(self.total))
        self.count += len(rotation)

    def add_up(self, ranks: Ranks) -> None:
        """Count what the other ranks have counted, too."""
        count = torch.tensor([float(self.count)], dtype=torch.float64)
        ranks.add(self.total, count)
        self.count = int(count)

    def mean(self) -> torch.Tensor:
        """(box, box, box//2+1) float64, in the layout of rfftn."""
        return (self.total / max(self.count, 1)).view(self.box, self.box, self.box // 2 + 1)


def mean_information(
    operator: Operator,
    values: torch.Tensor,
    basis_A: torch.Tensor,
    sampling: FourierSampling,
    contrast: bool = False,
    amplitudes: torch.Tensor | None = None,
) -> np.ndarray:
    """(m, m) float64 mean Fisher information of the coefficients of m displacement fields at rest.

    With ``amplitudes`` (m + a, m + a), that of the density's relative changes; with ``contrast`` that of the contrast's
    logarithm at the end.

    A voxel that moves by u changes the transform of the map by ``-2 pi i (k . u) V exp(-2 pi i k . x)``: three 3D FFTs
    per field, no image. By the projection theorem the mean over particles of the squared change of their images is
    that of the map's, weighted by the Fourier sampling.

    Parameters
    ----------
    operator, values
        That projects the map, and its values (nvox,).
    basis_A
        (m, nv, 3) displacement fields in Angstrom.
    sampling
        Of the views.
    contrast, amplitudes
        Further fields; ``amplitudes`` (a, nvox) are factors of the density. The contrast is that of 1 throughout.
    """
    box, voxels = operator.voxels.box, operator.voxels
    factors = [] if amplitudes is None else list(amplitudes)
    factors += [torch.ones_like(values)] if contrast else []
    seen = sampling.mean().to(values.device)
    where = torch.nonzero(seen.flatten() > 0)[:, 0]
    root = seen.flatten()[where].sqrt().float()
    axes = [torch.from_numpy(wavenumbers(box))] * 2 + [torch.arange(box // 2 + 1, dtype=torch.float32)]
    grid = torch.meshgrid(*[axis.to(values.device) for axis in axes], indexing="ij")
    frequency = [part.flatten()[where] for part in reversed(grid)]  # x, y, z
    changes = torch.empty((len(basis_A) + len(factors), len(where), 2), device=values.device)
    corners = voxels.cells.long()[voxels.cell.long()]
    for number, field in enumerate(basis_A):
        moved = (field[corners] * voxels.bary[..., None]).sum(1) / operator.pixel_size_A  # (nvox, 3) pixels
        change = torch.zeros(len(where), dtype=torch.complex64, device=values.device)
        for axis in range(3):
            spectrum = torch.fft.rfftn(scatter_volume(values * moved[:, axis], voxels))
            change += frequency[axis] * spectrum.flatten()[where]
        changes[number] = torch.view_as_real(change * root * (2 * np.pi / box))
    for number, factor in enumerate(factors, len(basis_A)):  # all are multiplied with i
        spectrum = torch.fft.rfftn(scatter_volume(values * factor, voxels)).flatten()[where]
        changes[number] = torch.view_as_real(1j * spectrum * root)
    information = torch.zeros((len(changes),) * 2, dtype=torch.float64, device=values.device)
    for part in changes.flatten(1).split(_CHUNK, 1):
        part = part.double()
        information += part @ part.T
    return information.cpu().numpy()


def principal_components(forces: FieldForces) -> tuple[np.ndarray, np.ndarray, float]:
    """Of the forces, in units of their noise.

    Returns
    -------
    variance
        (s,) descending; 1 is pure noise.
    directions
        (m, s): forces times one of these are a component's scores, of that variance.
    noise_edge
        Largest variance that pure noise is expected to give.
    """
    spread, axes = np.linalg.eigh(forces.information)
    seen = spread > spread[-1] * _UNSEEN
    whitener = axes[:, seen] / np.sqrt(spread[seen])
    covariance = np.zeros((seen.sum(), seen.sum()))
    for _, part in forces.chunks():
        white = part @ whitener
        covariance += white.T @ white / forces.count
    variance, directions = np.linalg.eigh(covariance)
    noise_edge = float((1.0 + np.sqrt(seen.sum() / forces.count)) ** 2 * 1.02)
    return variance[::-1].copy(), whitener @ directions[:, ::-1], noise_edge


def spectral_start(forces: FieldForces, latent_dims: int, prior_precision: np.ndarray) -> SpectralStart:
    """Principal components of the forces in units of their noise.

    Parameters
    ----------
    forces
        Of all rows on m fields.
    latent_dims
        How many components start latents.
    prior_precision
        (m,) of the fields' coefficients, from the rigidity: directions that the images hardly see stay small.
    """
    variance, directions, edge = principal_components(forces)
    to_latents = directions[:, :latent_dims] / np.sqrt(variance[:latent_dims])
    latents = (forces.force @ to_latents.astype(np.float32)).astype(np.float32)
    fields = fields_of_latents(forces, latents, prior_precision)
    return SpectralStart(variance, edge, suggest_dims(variance, edge), latents, fields)


def fields_of_latents(forces: FieldForces, latents: np.ndarray, prior_precision: np.ndarray) -> np.ndarray:
    """(K, m) float32: the displacement that goes with one unit of each of the (n, K) latents, whatever their source.

    The regression of the forces on the latents is H times the displacement; it is solved with the rigidity as prior.

    Parameters
    ----------
    forces
        Of all rows on m fields.
    latents
        (n, K).
    prior_precision
        (m,) of the fields' coefficients, from the rigidity.
    """
    weight = np.ones(len(latents)) if forces.weight is None else forces.weight
    centred = latents.astype(np.float64) - (weight @ latents.astype(np.float64)) / weight.sum()
    centred = centred * np.sqrt(weight)[:, None]
    slope = np.zeros((forces.force.shape[1], latents.shape[1]))
    for rows, part in forces.chunks():
        slope += part.T @ centred[rows]
    slope = np.linalg.solve(centred.T @ centred, slope.T)  # (K, m)
    solved = np.linalg.solve(forces.information + np.diag(prior_precision), slope.T)
    return solved.T.astype(np.float32)
