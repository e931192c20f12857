"""The map as a linear least-squares problem: flow and latents fixed, one half-set at a time.

For one half-set, over the voxels of the solvent mask (soft mask ``m``, density ``V = m * x``)::

    1/2 sum_i sum_k w_k |X_ik - T_ik project(m x; vertices_i)_k|^2 + 1/2 sum_q tau(|q|) |x_q|^2 / N^3

The prior ``tau`` on the 3D Fourier coefficients x_q is Wiener's: the data's mean weight in the shell over the shell's
signal-to-noise ratio, which the half-set's own right-hand side tells (its power over what noise alone would give). A
rigid map hardly needs it: all coefficients of a shell are seen equally often. But where cells are squeezed in most
particles, waves near the Nyquist frequency leave the images' band, the few particles that show them carry mostly
noise, and with next to no prior that noise came to rule the last shells (clamp, 3,000 particles, box 128: half-map FSC
.16 instead of the rigid .40 at shell 62 of 64). The mean shrinkage is undone at the end, so densities keep their
scale. Outside the sphere |q| < N/2 the prior is at least as strong as the data of the last shell: noise that only the
mask's edge links to the data would grow in the corners and leak back.

The objective is quadratic. L-BFGS with an exact line search on a quadratic visits the same points as preconditioned
conjugate gradients started with the same matrix (L. Nazareth, SIAM J. Numer. Anal. 16, 794 (1979)), so that is what is
computed: one projection and one adjoint per image and iteration, no history to store, and *the images themselves are
read only once*, for the right-hand side. The start is zero, so nothing is shared between the half-sets but the mask,
the flow and the latents. Density is assumed to lie inside the mask: what lies outside is not modelled.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from flexlib.distributed import ALONE, Group
from flexlib.images.batch import ImageBatch, ImageSource, read_ahead, split_batches
from flexlib.imaging.image_transforms import plane_radius, plane_weight
from flexlib.projection.op import (
    KERNELS,
    VoxelTensors,
    project,
    scatter_volume,
    spectrum_to_images,
    splat_voxels_adjoint,
    view_vertices,
)
from flexlib.train.canonical import shell_index

logger = logging.getLogger(__name__)

KERNEL = "cubic"
OVERSAMPLING = 2  # with the cubic kernel: relative error of a projection 1e-3 at 0.4 cycles/pixel
RIDGE = 3e-3  # least prior, of the data's mean weight inside the sphere |k| < N/2
LEAST_SNR = 0.25  # assumed of a shell: noise models are not so exact that less could be told from none
TOLERANCE = 2e-3  # of the preconditioned gradient's norm at zero
BATCH_BYTES = 2**28  # memory of one batch of images and its temporaries
REFRESH = 10  # iterations between gradients computed anew, against the drift of the recursion

VertexProvider = Callable[[np.ndarray], torch.Tensor]
"""rows (b,) -> moved mesh vertices in Angstrom, (b, nv, 3), or (nv, 3) where all rows share them."""


@dataclass
class Convergence:
    """The course of one solution; entry 0 is the start (zero map)."""

    objective: list[float] = field(default_factory=list)  # nats, prior included
    relative_gradient: list[float] = field(default_factory=list)  # preconditioned norm over that of the start
    converged: bool = False

    @property
    def iterations(self) -> int:
        """Iterations done."""
        return len(self.objective) - 1


def project_adjoint(
    spectra: torch.Tensor,
    vertices_px: torch.Tensor,
    voxels: VoxelTensors,
    kernel: str = KERNEL,
    oversampling: int = OVERSAMPLING,
) -> torch.Tensor:
    """Adjoint of ``project`` for the inner product of the full Fourier plane.

    ``spectra`` (b, N, N//2+1) complex transforms of real images, zero for |k| >= N/2; ``vertices_px`` (b, nv, 2).
    Returns (nvox,): ``Re sum_i sum_k spectra_ik exp(+2 pi i k . p_ij / N)``, k over the full plane.
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
        True,
        False,
    )
    return density


@dataclass(frozen=True)
class _Views:
    """What one batch adds to the Hessian, whatever the map: weights and where the mesh is seen."""

    weight: torch.Tensor  # (b, N, N//2+1) float32, |transfer|^2
    vertices_px: torch.Tensor  # (b, nv, 2)


class NormalEquations:
    """``hessian x = data`` of the least-squares problem, streamed over batches of images.

    Sums over images are taken in double precision over batches; within a batch the operator is float32. With several
    processes each holds the map and its own part of the images.
    """

    def __init__(
        self,
        source: ImageSource,
        rows: np.ndarray,
        voxels: VoxelTensors,
        vertex_provider: VertexProvider,
        mask_values: torch.Tensor,
        batch_size: int | None = None,
        keep_views: bool = False,
        group: Group = ALONE,
    ):
        """``mask_values`` (nvox,) soft mask at ``voxels``; ``keep_views`` trades memory for CTFs and moved vertices."""
        self.source, self.voxels, self.vertex_provider = source, voxels, vertex_provider
        self.device = voxels.bary.device
        self.mask_values = mask_values.to(self.device, voxels.bary.dtype)
        self.group = group
        self.batches = split_batches(group.share(rows), batch_size or default_batch_size(voxels.box))
        self._kept: list[_Views] | None = None

        self.data = torch.zeros(len(voxels.index), dtype=torch.float64, device=self.device)
        energy = torch.zeros(1, dtype=torch.float64)
        power = torch.zeros(voxels.box // 2, dtype=torch.float64, device=self.device)
        plane = plane_weight(voxels.box).to(self.device)
        shell = _shell_2d(voxels.box).to(self.device)
        kept = []
        for batch in read_ahead(source, self.batches, self.device):
            energy += 0.5 * float((plane * batch.images.abs() ** 2).sum(dtype=torch.float64))
            views = self._views(batch)
            self.data += self._adjoint(batch.images * batch.transfer.conj(), views.vertices_px)
            power.index_add_(0, shell.flatten(), (plane * views.weight).sum(0).flatten().double())
            if keep_views:
                kept.append(views)
        if keep_views:
            self._kept = kept
        group.add(self.data, power)
        group.add(energy)
        self.energy = float(energy)
        self.shell_weight = _hessian_per_shell(power, voxels.box)
        shell_3d = shell_index(voxels.box).to(self.device)
        last = voxels.box // 2 - 1
        ridge = RIDGE * _shell_mean(self.shell_weight, voxels.box)
        self.signal_to_noise = self._signal_to_noise(shell_3d)
        prior = self.shell_weight / self.signal_to_noise + ridge
        beyond = torch.maximum(prior[last], self.shell_weight[last] + ridge)
        nearest, outside = shell_3d.clamp(max=last), shell_3d > last
        dtype = self.mask_values.dtype
        data_weight = torch.where(outside, 0.0, self.shell_weight[nearest])
        self.prior = torch.where(outside, beyond, prior[nearest])
        self.inverse_diagonal = (1.0 / (data_weight + self.prior)).to(dtype)
        shrinkage = self.shell_weight / (self.shell_weight + prior - ridge)
        self._restoring_gain = (1.0 / shrinkage.clamp(min=1e-6))[nearest].to(dtype)
        self.prior = self.prior.to(dtype)

    def _signal_to_noise(self, shell_3d: torch.Tensor) -> torch.Tensor:
        """(box//2,) power of signal over noise in each shell of this half-set's map, at least ``LEAST_SNR``.

        Noise alone gives the right-hand side a power of ``sum m^2`` times the Hessian's diagonal.
        """
        spectrum = torch.fft.rfftn(scatter_volume(self.data.to(self.mask_values.dtype), self.voxels))
        power = (spectrum.real**2 + spectrum.imag**2).flatten().double()
        shells, half = shell_3d.flatten(), self.voxels.box // 2
        mean_power = (torch.bincount(shells, power) / torch.bincount(shells).clamp(min=1))[:half]
        noise = self.shell_weight * float((self.mask_values.double() ** 2).sum())
        return (mean_power / noise.clamp(min=torch.finfo(torch.float64).tiny) - 1.0).clamp(min=LEAST_SNR)

    def density(self, x: torch.Tensor) -> torch.Tensor:
        """The masked density of a solution (nvox,), freed of the mean shrinkage by the prior."""
        return self._filter(x, self._restoring_gain).to(self.mask_values.dtype) * self.mask_values

    def hessian(self, x: torch.Tensor) -> torch.Tensor:
        """``(m A^T W A m + prior) x`` for (nvox,) float64 ``x``: one pass over the particles, no image read."""
        values = x.to(self.mask_values.dtype) * self.mask_values
        result = torch.zeros_like(self.data)
        for views in self._stream():
            spectra = project(values, views.vertices_px, self.voxels, KERNEL, OVERSAMPLING)
            result += self._adjoint(spectra.mul_(views.weight), views.vertices_px)
        self.group.add(result)
        return result + self._filter(x, self.prior)

    def precondition(self, gradient: torch.Tensor) -> torch.Tensor:
        """Divide (nvox,) by the Hessian's shell averages in Fourier space; symmetric and positive."""
        return self._filter(gradient, self.inverse_diagonal)

    def _filter(self, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        spectrum = torch.fft.rfftn(scatter_volume(x.to(gain.dtype), self.voxels))
        spectrum *= gain
        return torch.fft.irfftn(spectrum, s=(self.voxels.box,) * 3).reshape(-1)[self.voxels.index].double()

    def _adjoint(self, spectra: torch.Tensor, vertices_px: torch.Tensor) -> torch.Tensor:
        return (self.mask_values * project_adjoint(spectra, vertices_px, self.voxels)).double()

    def _views(self, batch: ImageBatch) -> _Views:
        vertices_A = self.vertex_provider(batch.rows).to(self.device, self.voxels.bary.dtype)
        rotation, origin_px = batch.rotation.to(vertices_A.dtype), batch.origin_px.to(vertices_A.dtype)
        vertices_px = view_vertices(vertices_A, rotation, origin_px, self.source.pixel_size_A).contiguous()
        transfer = batch.transfer
        weight = transfer.real**2 + transfer.imag**2 if transfer.is_complex() else transfer**2
        return _Views(weight, vertices_px)

    def _stream(self) -> Iterator[_Views]:
        """The batches in a fixed order; unless kept, CTFs and moved vertices are computed anew in every pass."""
        if self._kept is not None:
            yield from self._kept
            return
        read_geometry = getattr(self.source, "geometry", self.source.batch)
        for rows in self.batches:
            yield self._views(read_geometry(rows, self.device))


@torch.no_grad()
def solve_map(
    source: ImageSource,
    rows: np.ndarray,
    voxels: VoxelTensors,
    vertex_provider: VertexProvider,
    mask_values: torch.Tensor | np.ndarray | None = None,
    max_iterations: int = 20,
    tolerance: float = TOLERANCE,
    batch_size: int | None = None,
    keep_views: bool = False,
    label: str = "map",
    group: Group = ALONE,
) -> tuple[torch.Tensor, Convergence]:
    """The least-squares map of the particles at ``rows``, each moved by its own vertices.

    Parameters
    ----------
    source : images at the box of ``voxels``.
    rows : (n,) int64 rows of ``source``.
    vertex_provider : rows (b,) -> vertices in Angstrom, (b, nv, 3) or (nv, 3).
    mask_values : (nvox,) soft mask at the voxels, in (0, 1]; None for 1.
    max_iterations, tolerance : stop when the preconditioned gradient has fallen to ``tolerance`` of its start, or
        after this many iterations, with a warning.
    batch_size : images at a time (default by memory); the result depends on it by rounding only.
    keep_views : keep the squared transfer functions and moved vertices of all particles in memory.
    group : the processes that share the particles; all call this with the same ``rows``.

    Returns
    -------
    volume : (box, box, box) float32 on the voxels' device, zero outside the voxels.
    convergence : the objective and gradient of each iteration.
    """
    if mask_values is None:
        mask_values = torch.ones(len(voxels.index))
    start = time.perf_counter()
    equations = NormalEquations(
        source, rows, voxels, vertex_provider, torch.as_tensor(mask_values), batch_size, keep_views, group
    )
    logger.info("%s: %d particles read in %.1f s", label, len(rows), time.perf_counter() - start)
    x, convergence = conjugate_gradients(equations, max_iterations, tolerance, label)
    return scatter_volume(equations.density(x), voxels), convergence


def conjugate_gradients(
    equations: NormalEquations, max_iterations: int, tolerance: float, label: str = "map"
) -> tuple[torch.Tensor, Convergence]:
    """Minimise ``1/2 x.Hx - data.x + energy`` from zero: L-BFGS with exact line search (see the module's head).

    Returns x (nvox,) float64.
    """
    x = torch.zeros_like(equations.data)
    gradient = -equations.data
    scaled = equations.precondition(gradient)
    size = first_size = float(gradient @ scaled)
    convergence = Convergence([equations.energy], [1.0 if first_size > 0 else 0.0], first_size <= 0)
    direction = -scaled
    while not convergence.converged and convergence.iterations < max_iterations:
        start = time.perf_counter()
        curved = equations.hessian(direction)
        step = -float(gradient @ direction) / float(direction @ curved)
        x += step * direction
        if (convergence.iterations + 1) % REFRESH:
            new_gradient = gradient + step * curved
        else:
            new_gradient = equations.hessian(x) - equations.data
        scaled = equations.precondition(new_gradient)
        # Polak-Ribiere: equal to Fletcher-Reeves in exact arithmetic, and forgets a direction that rounding spoiled
        beta = max(0.0, float((new_gradient - gradient) @ scaled) / size)
        gradient, size = new_gradient, float(new_gradient @ scaled)
        direction = beta * direction - scaled
        convergence.objective.append(equations.energy + 0.5 * float(x @ (gradient - equations.data)))
        convergence.relative_gradient.append((size / first_size) ** 0.5)
        convergence.converged = equations.group.any(convergence.relative_gradient[-1] <= tolerance)
        logger.info(
            "%s: iteration %d, objective %.6g, relative gradient %.2e, %.1f s",
            label,
            convergence.iterations,
            convergence.objective[-1],
            convergence.relative_gradient[-1],
            time.perf_counter() - start,
        )
    if not convergence.converged:
        logger.warning(
            "%s: stopped by reconstruct.max_bfgs_iterations = %d at a relative gradient of %.1e (aim %.1e); raise it",
            label,
            max_iterations,
            convergence.relative_gradient[-1],
            tolerance,
        )
    return x, convergence


def default_batch_size(box: int) -> int:
    """Images per batch so that a batch and its oversampled temporaries stay within ``BATCH_BYTES``."""
    per_image = 4 * box**2 * (3 + 4 * OVERSAMPLING**2)
    return int(np.clip(BATCH_BYTES // per_image, 1, 128))


def _hessian_per_shell(power: torch.Tensor, box: int) -> torch.Tensor:
    """Mean Hessian per 3D shell, (box//2,), from the sum of ``|T|^2`` of all images' pixels in each 2D shell.

    Exact for a rigid model: a slice carries its weights to 3D, ``|F3 V|^2`` sums to ``N^3 |V|^2``. Neighbouring shells
    are averaged, as a mask mixes them.
    """
    shell, last = shell_index(box), box // 2
    modes = 2 * torch.bincount(shell.flatten())[:last] - torch.bincount(shell[:, :, 0].flatten())[:last]
    weight = power * box**3 / modes.to(power)
    ends = torch.cat([weight[:1], weight, weight[-1:]])
    return 0.25 * ends[:-2] + 0.5 * ends[1:-1] + 0.25 * ends[2:]


def _shell_mean(weight: torch.Tensor, box: int) -> torch.Tensor:
    """Mean of a per-shell weight over the modes inside the sphere |k| < N/2."""
    k = torch.arange(box // 2, device=weight.device, dtype=weight.dtype)
    modes = torch.where(k == 0, 1.0, 4 * torch.pi * k**2)
    return (weight * modes).sum() / modes.sum()


def _shell_2d(box: int) -> torch.Tensor:
    """(box, box//2+1) int64 ``round(|k|)`` in rfft2 layout, the last shell beyond the sphere."""
    return plane_radius(box).round().long().clamp(max=box // 2 - 1)
