"""Reconstruction at full resolution: with flow and latents fixed, the map is a linear least-squares problem.

For one half-set, over the voxels of the solvent mask (soft mask ``m``, density ``V = m * x``)::

    1/2 sum_i sum_k w_k |X_ik - T_ik project(m x; vertices_i)_k|^2 + 1/2 sum_q tau(|q|) |x_q|^2 / N^3

The prior ``tau`` on the 3D Fourier coefficients x_q acts only where the data say nothing: next to nothing inside the
sphere |q| < N/2, as much as the data of the last shell outside it. Without the latter, noise that only the mask's edge
links to the data grows in the corners and leaks back: on simulated data each iteration after the third then lowered
the FSC with the truth (shell 31 of 32: .78 after 3 iterations, .67 after 16; with it .77 throughout, converged in 10).

The objective is quadratic. L-BFGS with an exact line search on a quadratic visits the same points as preconditioned
conjugate gradients started with the same matrix (L. Nazareth, SIAM J. Numer. Anal. 16, 794 (1979)), so that is what is
computed: one projection and one adjoint per image and iteration, no history to store, and *the images themselves are
read only once*, for the right-hand side. The start is zero, so nothing is shared between the half-sets but the mask,
the flow and the latents. Density is assumed to lie inside the mask: what lies outside is not modelled.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from flexlib.canonical import shell_index
from flexlib.errors import InputError
from flexlib.files import atomic_path, write_json
from flexlib.fsc import corrected_fsc, frequencies_1_per_A, resolution_at
from flexlib.maps import read_map, write_map
from flexlib.mesh.tetmesh import TetraMesh, single_cell_mesh
from flexlib.mesh.voxels import voxelise
from flexlib.model import FlexModel
from flexlib.particles.images import ImageBatch, ImageSource, plane_weight, shell_radius, split_batches
from flexlib.particles.prepared import open_full_images
from flexlib.projection.op import (
    KERNELS,
    VoxelTensors,
    project,
    scatter_volume,
    spectrum_to_images,
    splat_voxels_adjoint,
    view_vertices,
)
from flexlib.runtime import tune_process
from flexlib.settings import ReconstructSettings

logger = logging.getLogger(__name__)

KERNEL = "cubic"
OVERSAMPLING = 2  # with the cubic kernel: relative error of a projection 1e-3 at 0.4 cycles/pixel
RIDGE = 3e-3  # prior inside the sphere |k| < N/2, of the data's mean weight there
TOLERANCE = 2e-3  # of the preconditioned gradient's norm at zero
MASK_FLOOR = 1e-3  # voxels below it are left out
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


class NormalEquations:
    """``hessian x = data`` of the least-squares problem, streamed over batches of images.

    Sums over images are taken in double precision over batches; within a batch the operator is float32.
    """

    def __init__(
        self,
        source: ImageSource,
        rows: np.ndarray,
        voxels: VoxelTensors,
        vertex_provider: VertexProvider,
        mask_values: torch.Tensor,
        batch_size: int | None = None,
        keep_transfer: bool = False,
    ):
        """``mask_values`` (nvox,) soft mask at ``voxels``; ``keep_transfer`` trades memory for CTF calculations."""
        self.source, self.voxels, self.vertex_provider = source, voxels, vertex_provider
        self.device = voxels.bary.device
        self.mask_values = mask_values.to(self.device, voxels.bary.dtype)
        size = batch_size or default_batch_size(voxels.box)
        self.batches = split_batches(rows, size)
        self.weight = plane_weight(voxels.box).to(self.device)
        self.inside = self.weight > 0
        self._kept: dict[int, ImageBatch] | None = {} if keep_transfer else None

        self.data = torch.zeros(len(voxels.index), dtype=torch.float64, device=self.device)
        self.energy = 0.0
        power = torch.zeros(voxels.box // 2, dtype=torch.float64, device=self.device)
        shell = _shell_2d(voxels.box).to(self.device)
        for batch in self._stream(with_images=True):
            self.energy += 0.5 * float((self.weight * batch.images.abs() ** 2).sum(dtype=torch.float64))
            self.data += self._adjoint(batch.images, batch)
            squared = (self.weight * batch.transfer.abs() ** 2).sum(0)[self.inside]
            power.index_add_(0, shell[self.inside], squared.double())
        self.shell_weight = _hessian_per_shell(power, voxels.box)
        shell_3d = shell_index(voxels.box).to(self.device)
        last = voxels.box // 2 - 1
        data_weight = torch.where(shell_3d > last, 0.0, self.shell_weight[shell_3d.clamp(max=last)])
        inner = RIDGE * _shell_mean(self.shell_weight, voxels.box)
        dtype = self.mask_values.dtype
        self.prior = torch.where(shell_3d > last, self.shell_weight[last] + inner, inner).to(dtype)
        self.inverse_diagonal = (1.0 / (data_weight + self.prior)).to(dtype)

    def hessian(self, x: torch.Tensor) -> torch.Tensor:
        """``(m A^T W A m + prior) x`` for (nvox,) float64 ``x``: one pass over the particles, no image read."""
        values = x.to(self.mask_values.dtype) * self.mask_values
        result = self._filter(x, self.prior)
        for batch in self._stream(with_images=False):
            spectra = project(values, self._vertices_px(batch), self.voxels, KERNEL, OVERSAMPLING)
            result += self._adjoint(spectra * batch.transfer, batch)
        return result

    def precondition(self, gradient: torch.Tensor) -> torch.Tensor:
        """Divide (nvox,) by the Hessian's shell averages in Fourier space; symmetric and positive."""
        return self._filter(gradient, self.inverse_diagonal)

    def _filter(self, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        spectrum = torch.fft.rfftn(scatter_volume(x.to(gain.dtype), self.voxels))
        return torch.fft.irfftn(spectrum * gain, s=(self.voxels.box,) * 3).reshape(-1)[self.voxels.index].double()

    def _adjoint(self, spectra: torch.Tensor, batch: ImageBatch) -> torch.Tensor:
        spectra = torch.where(self.inside, spectra * batch.transfer.conj(), 0.0)
        return (self.mask_values * project_adjoint(spectra, self._vertices_px(batch), self.voxels)).double()

    def _vertices_px(self, batch: ImageBatch) -> torch.Tensor:
        vertices_A = self.vertex_provider(batch.rows).to(self.device, self.voxels.bary.dtype)
        rotation, origin_px = batch.rotation.to(vertices_A.dtype), batch.origin_px.to(vertices_A.dtype)
        return view_vertices(vertices_A, rotation, origin_px, self.source.pixel_size_A).contiguous()

    def _stream(self, with_images: bool):
        """Batches in a fixed order; the transfer functions are computed anew each time unless kept."""
        read_geometry = getattr(self.source, "geometry", self.source.batch)
        for number, rows in enumerate(self.batches):
            if not with_images and self._kept:
                yield self._kept[number]
                continue
            batch = (self.source.batch if with_images else read_geometry)(rows, self.device)
            if self._kept is not None:
                blank = batch.images[:0]
                self._kept[number] = ImageBatch(batch.rows, blank, batch.transfer, batch.rotation, batch.origin_px)
            yield batch


def reconstruct(
    particles_dir: str | Path,
    train_dir: str | Path,
    out_dir: str | Path,
    settings: ReconstructSettings,
    device: str = "auto",
) -> None:
    """Half-maps at full resolution, flexible and rigid, their FSC and the course of their solution.

    Writes ``{flex,rigid}_{half1,half2,map}.mrc`` (map: the mean of the halves, in the consensus' density units),
    ``fsc.csv`` (see ``fsc_table``), ``resolution.json`` and ``convergence.csv`` (half, model, iteration, objective in
    nats, relative gradient). With ``settings.all_in_ram`` the transfer functions of a half are computed once and kept;
    ``cache_dir`` is not needed, as each image is read once per map. Raises ``InputError`` where the trained point
    belongs to other particles.
    """
    tune_process()
    particles_dir, out_dir = Path(particles_dir), Path(out_dir)
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else torch.device(device)
    source = open_full_images(particles_dir)
    mask = read_map(particles_dir / "full" / "mask.mrc")
    model = FlexModel.load(train_dir, place)
    if len(model.latents) != len(source):
        raise InputError(
            f"{train_dir}: has latents of {len(model.latents)} particles, {particles_dir} holds {len(source)}"
        )
    if mask.box != source.box:
        raise InputError(f"{particles_dir / 'full' / 'mask.mrc'}: its box is {mask.box}, the images' {source.box}")
    providers = {"flex": (model.mesh, flexible_vertices(model, place))}
    if settings.rigid_baseline:
        rigid = single_cell_mesh(source.box * source.pixel_size_A)
        providers["rigid"] = (rigid, rigid_vertices(rigid, place))

    halves: dict[str, list[np.ndarray]] = {}
    courses = []
    for name, (mesh, provider) in providers.items():
        mesh_voxels = voxelise(mesh, mask.data > MASK_FLOOR, source.pixel_size_A)
        voxels = VoxelTensors.from_mesh_voxels(mesh_voxels, place)
        mask_values = torch.as_tensor(mask.data.reshape(-1)[mesh_voxels.index])
        halves[name] = []
        for half in (0, 1):
            rows = np.flatnonzero(source.half_set == half)
            if not len(rows):
                raise InputError(f"{particles_dir / 'particles.star'}: half-set {half + 1} is empty")
            volume, convergence = solve_map(
                source,
                rows,
                voxels,
                provider,
                mask_values,
                settings.max_bfgs_iterations,
                keep_transfer=settings.all_in_ram,
                label=f"{name} half {half + 1}",
            )
            halves[name].append(volume.cpu().numpy())
            write_map(out_dir / f"{name}_half{half + 1}.mrc", halves[name][-1], source.pixel_size_A, like=mask)
            courses.append(_course(name, half + 1, convergence))
        write_map(
            out_dir / f"{name}_map.mrc", 0.5 * (halves[name][0] + halves[name][1]), source.pixel_size_A, like=mask
        )

    table, resolutions = fsc_table(halves, mask.data, source.pixel_size_A)
    _write_csv(out_dir / "convergence.csv", pd.concat(courses))
    _write_csv(out_dir / "fsc.csv", table)
    write_json(out_dir / "resolution.json", resolutions)


def flexible_vertices(model: FlexModel, device: torch.device | str) -> VertexProvider:
    """rows -> (b, nv, 3) vertices in Angstrom, each particle's moved by the flow at its latents."""
    at_rest = torch.as_tensor(model.mesh.vertices_A, dtype=torch.float32, device=device)
    return lambda rows: at_rest + model.displacements_A(torch.as_tensor(model.latents[rows])).to(device)


def rigid_vertices(mesh: TetraMesh, device: torch.device | str) -> VertexProvider:
    """rows -> (nv, 3): the mesh at rest, the same for all."""
    at_rest = torch.as_tensor(mesh.vertices_A, dtype=torch.float32, device=device)
    return lambda rows: at_rest


def fsc_table(
    halves: dict[str, list[np.ndarray]], mask: np.ndarray, pixel_size_A: float
) -> tuple[pd.DataFrame, dict[str, float]]:
    """Half-map FSC of each model and its resolutions.

    Parameters: ``halves`` model name -> two (N, N, N) maps; ``mask`` (N, N, N) soft.

    Returns
    -------
    table : shell, frequency_1_per_A, resolution_A and for each model ``fsc_<model>_unmasked`` (the maps as solved,
        which is inside the mask), ``_masked``, ``_randomised``, ``_corrected`` (see ``fsc.corrected_fsc``), and
        ``fsc_<model>``: the corrected one again, the curve that counts.
    resolutions : ``<model>_<threshold>_A`` of the corrected curve at 0.143 and 0.5.
    """
    box = len(mask)
    frequency = frequencies_1_per_A(box, pixel_size_A)
    with np.errstate(divide="ignore"):
        table = {"shell": np.arange(box // 2), "frequency_1_per_A": frequency, "resolution_A": 1.0 / frequency}
    resolutions = {}
    for name, (first, second) in halves.items():
        curves = corrected_fsc(first, second, mask)
        corrected = np.asarray(curves["corrected"])
        table[f"fsc_{name}"] = corrected
        for kind in ("unmasked", "masked", "randomised", "corrected"):
            table[f"fsc_{name}_{kind}"] = np.asarray(curves[kind])
        for threshold in (0.143, 0.5):
            resolution_A = resolution_at(corrected, threshold, box, pixel_size_A)
            resolutions[f"{name}_{threshold}_A"] = resolution_A
            logger.info("%s: %.2f A at FSC %g", name, resolution_A, threshold)
    return pd.DataFrame(table), resolutions


def _course(model: str, half: int, convergence: Convergence) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "half": half,
            "model": model,
            "iteration": np.arange(convergence.iterations + 1),
            "objective": convergence.objective,
            "relative_gradient": convergence.relative_gradient,
        }
    )


def _write_csv(path: Path, table: pd.DataFrame) -> None:
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False)


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
    keep_transfer: bool = False,
    label: str = "map",
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
    keep_transfer : keep the transfer functions of all particles in memory.

    Returns
    -------
    volume : (box, box, box) float32 on the voxels' device, zero outside the voxels.
    convergence : the objective and gradient of each iteration.
    """
    if mask_values is None:
        mask_values = torch.ones(len(voxels.index))
    start = time.perf_counter()
    equations = NormalEquations(
        source, rows, voxels, vertex_provider, torch.as_tensor(mask_values), batch_size, keep_transfer
    )
    logger.info("%s: %d particles read in %.1f s", label, len(rows), time.perf_counter() - start)
    x, convergence = conjugate_gradients(equations, max_iterations, tolerance, label)
    return scatter_volume(x.to(equations.mask_values.dtype) * equations.mask_values, voxels), convergence


def conjugate_gradients(
    equations: NormalEquations, max_iterations: int, tolerance: float, label: str = "map"
) -> tuple[torch.Tensor, Convergence]:
    """Minimise ``1/2 x.Hx - data.x + energy`` from zero: L-BFGS with exact line search (see the module's head).

    ``equations`` gives ``data``, ``energy``, ``hessian(x)`` and ``precondition(g)``. Returns x (nvox,) float64.
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
        convergence.converged = convergence.relative_gradient[-1] <= tolerance
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
    return shell_radius(box).round().long().clamp(max=box // 2 - 1)
