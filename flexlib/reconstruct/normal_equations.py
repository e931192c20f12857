"""The normal equations of a half-set's map, summed over its images in one pass: flow and latents fixed.

Over the voxels of the solvent mask (soft mask ``m``, density ``V = m * x``), x minimises::

    1/2 sum_i sum_k w_k |X_ik - T_ik project(m x; vertices_i)_k|^2 + 1/2 sum_q tau(|q|) |x_q|^2 / N^3

The prior ``tau`` on the 3D Fourier coefficients x_q is Wiener's: the data's mean weight in the shell over the shell's
signal-to-noise ratio, which follows from the half-set's own right-hand side (its power over what noise alone would
give). A rigid map hardly needs it: all coefficients of a shell are seen equally often. But where cells are squeezed in
most particles, waves near the Nyquist frequency leave the images' band, the few particles that show them carry mostly
noise, and with next to no prior that noise came to rule the last shells (clamp, 3,000 particles, box 128: half-map FSC
.16 instead of the rigid .40 at shell 62 of 64). The mean shrinkage is undone at the end, so densities keep their
scale. Outside the sphere |q| < N/2 the prior is at least as strong as the data of the last shell: noise that only the
mask's edge links to the data would grow in the corners and leak back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from flexlib.distributed import ALONE, Ranks
from flexlib.images.batch import ImageBatch, ImageSource, read_ahead, split_batches
from flexlib.imaging.fourier import shell_counts, shell_number, stored_means
from flexlib.imaging.image_transforms import plane_weight
from flexlib.model.forward import Operator
from flexlib.projection.op import scatter_volume
from flexlib.reconstruct.at_rest import Block, RestingHessian, RestingSum
from flexlib.reconstruct.weighing import OccupancyOperator

RIDGE = 3e-3  # least prior, of the data's mean weight inside the sphere |k| < N/2
LEAST_SNR = 0.25  # assumed of a shell: noise models are not so exact that less could be distinguished from none
INNER_TOLERANCE = 0.1  # that the preconditioner's own gradient falls to
INNER_ITERATIONS = 30  # of the preconditioner, at most
BATCH_BYTES = 2**28  # memory of one batch of images and its temporaries

Displacements = Callable[[np.ndarray], torch.Tensor]
"""rows (b,) -> displacements of the mesh vertices in Angstrom, (b, nv, 3)."""


@dataclass(frozen=True)
class BatchViews:
    """What one batch of images adds to the Hessian, whatever the map."""

    weight: torch.Tensor  # (b, N, N//2+1) float32, |transfer|^2
    vertices_px: torch.Tensor  # (b, nv, 2), where the mesh is seen
    present: torch.Tensor | None = None  # (b, G, 1, 1) of an ``OccupancyOperator``


@dataclass(frozen=True)
class Views:
    """The views of a rank's images, in a fixed order; unless kept, they are computed anew in every pass."""

    source: ImageSource
    batches: list[np.ndarray]  # rows of the source
    operator: Operator
    displacements: Displacements | None  # None: the mesh is at rest
    kept: list[BatchViews] | None = None

    def of(self, batch: ImageBatch) -> BatchViews:
        """Those of one batch."""
        moved_A = None
        if self.displacements is not None:
            moved_A = self.displacements(batch.rows).to(self.operator.vertices_A)
        vertices_px = self.operator.vertices_px(batch, moved_A).contiguous()
        transfer = batch.transfer
        weight = transfer.real**2 + transfer.imag**2 if transfer.is_complex() else transfer**2
        present = self.operator.of_rows(batch.rows) if isinstance(self.operator, OccupancyOperator) else None
        return BatchViews(weight, vertices_px, present)

    def adjoint(self, spectra: torch.Tensor, views: BatchViews) -> torch.Tensor:
        """(nvox,) adjoint of what particles are expected to show, from (b, N, N//2+1) spectra."""
        if isinstance(self.operator, OccupancyOperator) and views.present is not None:
            return self.operator.expected_adjoint(spectra, views.vertices_px, views.present)
        return self.operator.project_adjoint(spectra, views.vertices_px)

    def normal(self, values: torch.Tensor, views: BatchViews) -> torch.Tensor:
        """(nvox,) what the Hessian of one batch's squared residuals makes of ``values`` (nvox,)."""
        if isinstance(self.operator, OccupancyOperator) and views.present is not None:
            return self.operator.expected_normal(values, views.weight, views.vertices_px, views.present)
        spectra = self.operator.project(values, views.vertices_px)
        return self.operator.project_adjoint(spectra.mul_(views.weight), views.vertices_px)

    def __iter__(self) -> Iterator[BatchViews]:
        """A batch at a time."""
        if self.kept is not None:
            yield from self.kept
            return
        read_geometry = getattr(self.source, "geometry", self.source.batch)
        for rows in self.batches:
            yield self.of(read_geometry(rows, self.operator.vertices_A.device))


@dataclass(frozen=True)
class ShellFilters:
    """Factors of a map's Fourier coefficients, (N, N, N//2+1) each, and alike all over a shell."""

    prior: torch.Tensor
    inverse_diagonal: torch.Tensor  # of the Hessian
    restoring: torch.Tensor  # undoes the mean shrinkage by the prior

    @classmethod
    def of_shells(cls, hessian: torch.Tensor, signal_to_noise: torch.Tensor, dtype: torch.dtype) -> ShellFilters:
        """From the data's mean Hessian in each shell and the shell's signal-to-noise ratio, (N//2,) float64 both."""
        box, last = 2 * len(hessian), len(hessian) - 1
        shell = torch.as_tensor(shell_number(box), device=hessian.device)
        nearest, outside = shell.clamp(max=last), shell > last
        ridge = RIDGE * _mean_over_sphere(hessian)
        wiener = hessian / signal_to_noise
        inner_prior = wiener + ridge
        beyond = torch.maximum(inner_prior[last], hessian[last] + ridge)
        prior = torch.where(outside, beyond, inner_prior[nearest])
        data = torch.where(outside, 0.0, hessian[nearest])
        shrinkage = hessian / (hessian + wiener)
        return cls(
            prior=prior.to(dtype),
            inverse_diagonal=(1.0 / (data + prior)).to(dtype),
            restoring=(1.0 / shrinkage.clamp(min=1e-6))[nearest].to(dtype),
        )


@dataclass(frozen=True)
class NormalEquations:
    """``hessian(x) = data`` of the least-squares problem (see the module's head); each rank holds them whole.

    ``resting`` is what particles at rest would make of the data's part of the Hessian. Where they are at rest, it is
    that part: no view is gone through again. Where they move, the preconditioner is the inverse of the Hessian that it
    makes; where it would need too much memory, the Hessian's shell averages are all that there is.
    """

    operator: Operator
    mask_values: torch.Tensor  # (nvox,) density of a unit of x: the mask, over a part's root mean square presence
    views: Views  # of this rank
    data: torch.Tensor  # (nvox,) float64
    energy: float  # the objective of an empty map, in nats
    signal_to_noise: torch.Tensor  # (N//2,)
    filters: ShellFilters
    ranks: Ranks
    mask: torch.Tensor  # (nvox,)
    block: Block
    resting: RestingHessian | None = None
    at_rest: bool = False  # whether that is exact

    def density(self, x: torch.Tensor) -> torch.Tensor:
        """The masked density of a solution (nvox,), freed of the mean shrinkage by the prior."""
        return self._filtered(x, self.filters.restoring).to(self.mask_values.dtype) * self.mask_values

    def hessian(self, x: torch.Tensor) -> torch.Tensor:
        """``(m A^T W A m + prior) x`` for (nvox,) float64 ``x``: one pass over the particles, no image read.

        No pass at all where they are at rest and ``resting`` is known.
        """
        if self.at_rest and self.resting is not None:
            return self._resting_hessian(x, self.resting, self.mask_values)
        values = x.to(self.mask_values.dtype) * self.mask_values
        result = torch.zeros_like(self.data)
        for views in self.views:
            result += (self.mask_values * self.views.normal(values, views)).double()
        self.ranks.add(result)
        return result + self._filtered(x, self.filters.prior)

    def precondition(self, gradient: torch.Tensor) -> torch.Tensor:
        """Divide (nvox,) by the Hessian of particles at rest, nearly; else by shell averages in Fourier space.

        The quotient is that of a few conjugate gradients, so that it is not quite linear in ``gradient``.
        """
        resting = self.resting
        if resting is None:
            return self._shell_average_inverse(gradient)
        # parts that are rarely there have larger unknowns, in which their own block of the Hessian is as at rest
        return _solve(lambda x: self._resting_hessian(x, resting, self.mask), gradient, self._shell_average_inverse)

    def _resting_hessian(self, x: torch.Tensor, resting: RestingHessian, mask: torch.Tensor) -> torch.Tensor:
        data = mask * resting(x.to(mask.dtype) * mask)
        return data.double() + self._filtered(x, self.filters.prior)

    def _shell_average_inverse(self, gradient: torch.Tensor) -> torch.Tensor:
        """(nvox,) symmetric and positive."""
        return self._filtered(gradient, self.filters.inverse_diagonal)

    def _filtered(self, x: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        return self.block.convolve(x.to(factors.dtype), factors).double()


def accumulate_normal_equations(
    source: ImageSource,
    rows: np.ndarray,
    operator: Operator,
    displacements: Displacements | None = None,
    mask_values: torch.Tensor | np.ndarray | None = None,
    batch_size: int | None = None,
    keep_views: bool = False,
    ranks: Ranks = ALONE,
) -> NormalEquations:
    """Read the images at ``rows`` once and sum up what they say.

    Sums are taken in double precision over batches; within a batch the operator is float32. For the parameters see
    ``map_solver.solve_map`` and ``map_solver.SolverSettings``.
    """
    box, device, dtype = operator.voxels.box, operator.vertices_A.device, operator.vertices_A.dtype
    mask = torch.ones(len(operator.voxels.index)) if mask_values is None else torch.as_tensor(mask_values)
    mask = mask.to(device, dtype)
    unknowns, groups = mask, 1
    if isinstance(operator, OccupancyOperator):
        unknowns, groups = mask * operator.unknowns_scale(rows), len(operator.groups)
    batch_size = batch_size or default_batch_size(box, operator.accuracy.oversampling, groups)
    batches = split_batches(ranks.share(rows), batch_size)
    views = Views(source, batches, operator, displacements)
    kept: list[BatchViews] = []
    data = torch.zeros(len(mask), dtype=torch.float64, device=device)
    resting = RestingSum(operator.voxels, dtype) if RestingSum.fits(operator.voxels) else None
    energy = torch.zeros(1, dtype=torch.float64)
    power = torch.zeros(box // 2, dtype=torch.float64, device=device)
    plane = plane_weight(box).to(device)
    # pixels between the last shell and |k| = N/2 count to it: without them its prior is weaker, and on the demo the
    # masked FSC of the last shells is lower by .007
    shell = torch.as_tensor(shell_number(box, 2).clip(max=box // 2 - 1), device=device)
    for batch in read_ahead(source, batches, device):
        energy += 0.5 * float((plane * batch.images.abs() ** 2).sum(dtype=torch.float64))
        of_batch = views.of(batch)
        data += (unknowns * views.adjoint(batch.images * batch.transfer.conj(), of_batch)).double()
        power.index_add_(0, shell.flatten(), (plane * of_batch.weight).sum(0).flatten().double())
        if resting is not None:
            resting.add(of_batch.weight, batch.rotation)
        if keep_views:
            kept.append(of_batch)
    ranks.add(data, power)
    ranks.add(energy)
    hessian = _hessian_per_shell(power)
    signal_to_noise = _signal_to_noise(scatter_volume(data.to(dtype), operator.voxels), hessian, mask)
    return NormalEquations(
        operator=operator,
        mask_values=unknowns,
        views=replace(views, kept=kept) if keep_views else views,
        data=data,
        energy=float(energy),
        signal_to_noise=signal_to_noise,
        filters=ShellFilters.of_shells(hessian, signal_to_noise, dtype),
        ranks=ranks,
        mask=mask,
        block=Block.around(operator.voxels),
        resting=None if resting is None else resting.total(ranks),
        at_rest=displacements is None and not isinstance(operator, OccupancyOperator),
    )


def _solve(
    hessian: Callable[[torch.Tensor], torch.Tensor],
    gradient: torch.Tensor,
    precondition: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """``x`` of ``hessian(x) = gradient``, (nvox,) float64, to ``INNER_TOLERANCE`` of the preconditioned gradient."""
    x, rest = torch.zeros_like(gradient), gradient
    scaled = precondition(rest)
    direction, size = scaled, float(rest @ scaled)
    aim = INNER_TOLERANCE**2 * size
    for _ in range(INNER_ITERATIONS):
        if size <= aim:
            break
        curved = hessian(direction)
        step = size / float(direction @ curved)
        x = x + step * direction
        rest = rest - step * curved
        scaled = precondition(rest)
        before, size = size, float(rest @ scaled)
        direction = scaled + size / before * direction
    return x


def default_batch_size(box: int, oversampling: float, groups: int = 1) -> int:
    """Images per batch so that a batch and its oversampled temporaries stay within ``BATCH_BYTES``.

    Of voxels in groups each group's projections are held. The CPU takes eight images at once: whole blocks of them.
    """
    per_image = 4 * box**2 * (3 + 4 * oversampling**2 + 2 * (groups - 1))
    images = int(np.clip(BATCH_BYTES // per_image, 1, 128))
    return images // 8 * 8 if images > 8 else images


def _hessian_per_shell(power: torch.Tensor) -> torch.Tensor:
    """Mean Hessian per 3D shell, (N//2,), from the sum of ``|T|^2`` of all images' pixels in each 2D shell.

    Exact for a rigid model: a slice carries its weights to 3D, ``|F3 V|^2`` sums to ``N^3 |V|^2``. Neighbouring shells
    are averaged, as a mask mixes them.
    """
    box = 2 * len(power)
    weight = power * box**3 / torch.as_tensor(shell_counts(box)).to(power)
    ends = torch.cat([weight[:1], weight, weight[-1:]])
    return 0.25 * ends[:-2] + 0.5 * ends[1:-1] + 0.25 * ends[2:]


def _mean_over_sphere(values: torch.Tensor) -> torch.Tensor:
    """Mean of (N//2,) values of shells over the sphere |k| < N/2, as a continuum."""
    k = torch.arange(len(values), device=values.device, dtype=values.dtype)
    counts = torch.where(k == 0, 1.0, 4 * torch.pi * k**2)
    return (values * counts).sum() / counts.sum()


def _signal_to_noise(volume: torch.Tensor, hessian: torch.Tensor, mask_values: torch.Tensor) -> torch.Tensor:
    """Power of signal over noise in each shell of a half-set's map, (N//2,), at least ``LEAST_SNR``.

    ``volume`` (N, N, N) is the right-hand side: noise alone gives it a power of ``sum m^2`` times the Hessian's
    diagonal, whose mean in each shell is ``hessian`` (N//2,).
    """
    spectrum = torch.fft.rfftn(volume)
    mean_power = stored_means(spectrum.real**2 + spectrum.imag**2)
    noise = hessian * float((mask_values.double() ** 2).sum())
    return (mean_power / noise.clamp(min=torch.finfo(torch.float64).tiny) - 1.0).clamp(min=LEAST_SNR)
