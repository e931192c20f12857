"""Noise spectrum and scale of each optics group, measured against the consensus.

In each optics group, a random sample of images is compared with CTF * projection of the consensus. Per image and shell
three sums suffice, <X,X>, <X,P> and <P,P>: from them come the scale s = sum <X,P>/sigma^2 / sum <P,P>/sigma^2 and the
noise power <X,X> - 2 s <X,P> + s^2 <P,P>.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from tqdm import tqdm

from flexlib.errors import InputError
from flexlib.images.noise import Calibration
from flexlib.images.normalisation import Normalisation
from flexlib.images.sources import FullImages
from flexlib.images.stack import Stacks
from flexlib.imaging.fourier import shell_radius, shell_sums
from flexlib.model.forward import STATISTICS, Operator
from flexlib.particles.table import Particles
from flexlib.prepare.contrast import contrast_signs
from flexlib.prepare.fit import Fit, ShellSums, best_fit
from flexlib.projection.op import gather_volume
from flexlib.tetra.tetmesh import single_cell_mesh

log = logging.getLogger(__name__)

CHUNK_PIXELS = 2**23  # of the images that are in memory at a time
_SEED = 0
_SAMPLE = 1000  # images per optics group that noise and scale are measured on
_MIN_SAMPLE = 50  # smaller groups are measured together
_BAND_A = 8.0  # scale is measured on frequencies up to 1/8 A, and half of Nyquist at least
_MIN_SIGNIFICANCE = 4.0  # standard errors by which the scale must exceed 0
_DECISIVE_NATS = 10.0
_BACKGROUND_SHELLS = 4


@dataclass(frozen=True)
class Measured:
    """What the images say against the consensus."""

    particles: Particles  # their scale divided by the noise level where only the noise varies from image to image
    calibration: Calibration  # scales are negative where contrast is inverted
    normalisation: Normalisation  # what of the proposed one the images bear out
    scale_error: np.ndarray  # (groups,) standard error of the scale
    sample: np.ndarray  # (m,) rows that were looked at, ascending by optics group

    def check_scale(self) -> None:
        """Raise InputError where the images of an optics group show no trace of the consensus."""
        for optics, scale, error in zip(
            self.particles.optics, self.calibration.image_scale, self.scale_error, strict=True
        ):
            if abs(scale) < _MIN_SIGNIFICANCE * error:
                raise InputError(
                    f"{self.particles.source_path}: the images of optics group {optics.name} do not match projections "
                    f"of the consensus (scale {scale:.3g} +- {error:.2g}): other map, poses or half of the images?"
                )


def measure_noise(
    particles: Particles,
    stacks: Stacks,
    grid: tuple[int, float],
    density: np.ndarray,
    mask: np.ndarray,
    proposed: Normalisation,
) -> Measured:
    """Noise spectrum and scale of each optics group, and which background and noise levels explain its images best.

    Parameters
    ----------
    particles, stacks
        The images.
    grid
        Box and pixel size in Angstrom of their common grid.
    density
        (box, box, box) consensus times soft mask on that grid.
    mask
        (box, box, box) bool.
    proposed
        Backgrounds and noise levels as the images alone suggest them.
    """
    box, pixel_size_A = grid
    samples, groups = draw_samples(particles), len(particles.optics)
    rows = np.concatenate(samples)
    unknown = Calibration(np.ones(groups), np.ones((groups, box // 2)), box, pixel_size_A)
    large = np.array([len(sample) >= _MIN_SAMPLE for sample in samples])
    group_of_row = np.where(large, np.arange(groups), -1)[particles.optics_index[rows]]

    def compared(normalisation: Normalisation, some: np.ndarray = rows) -> ShellSums:
        source = FullImages(stacks, particles, box, pixel_size_A, unknown, normalisation)
        return compare_with_consensus(source, density, mask, some)

    normalisation, sums = _with_background(proposed, compared, group_of_row, large)
    band = scale_band(box, pixel_size_A)
    sign = contrast_signs(particles, rows, sums, band, lambda some: compared(normalisation, some))
    particles = replace(particles, contrast_sign=particles.contrast_sign * sign)
    sums = sums.scaled(sign[rows], np.ones(len(rows)))
    sigma, (image_scale, scale_error) = np.empty((groups, box // 2)), np.empty((2, groups))
    particle_scale, level = np.ones(len(particles)), proposed.level.copy()
    for group in range(groups):
        own, members = particles.optics_index == group, group_of_row == (group if large[group] else -1)
        found = best_fit(sums.subset(members), proposed.level[rows[members]], band)
        _log_scale(particles.optics[group].name, found)
        if found.noise_varies and (proposed.level[own] != 1).any():
            _log_levels(particles.optics[group].name, found)
        sigma[group], image_scale[group], scale_error[group] = found.sigma, found.scale, found.error
        level[own] = proposed.level[own] if found.noise_varies else 1.0
        particle_scale[own] = 1 / level[own] if found.noise_varies and not found.signal_varies else 1.0
        _log_odd_aberrations(particles, group, sums.subset(particles.optics_index[rows] == group), found)
    particles = _with_scale(particles, particle_scale)
    calibration = replace(unknown, image_scale=image_scale, sigma=sigma)
    return Measured(particles, calibration, replace(normalisation, level=level), scale_error, rows)


def _with_scale(particles: Particles, factor: np.ndarray) -> Particles:
    """The particles with their scale multiplied by ``factor`` (n,); as they are where that is 1."""
    if (factor == 1).all():
        return particles
    given = 1.0 if particles.particle_scale is None else particles.particle_scale
    return replace(particles, particle_scale=factor * given)


def _with_background(
    proposed: Normalisation,
    compared: Callable[[Normalisation], ShellSums],
    group_of_row: np.ndarray,
    large: np.ndarray,
) -> tuple[Normalisation, ShellSums]:
    """Take out the proposed background where that leaves less in the lowest shells than the consensus alone does.

    A strong signal that reaches beyond the circle may look like a background.

    Parameters
    ----------
    proposed
        Backgrounds of the optics groups.
    compared
        What compares the sample's images with the consensus.
    group_of_row
        (m,) optics group of the sample's images, -1 where groups are measured together.
    large
        (groups,) bool: those measured by themselves.

    Returns
    -------
    normalisation
        With the backgrounds that are kept, all levels 1.
    sums
        Of the images without them.
    """
    plain = replace(proposed, terms=np.zeros_like(proposed.terms), level=np.ones_like(proposed.level))
    sums = compared(plain)
    if not proposed.terms.any():
        return plain, sums
    without = compared(replace(plain, terms=proposed.terms))
    terms, better = proposed.terms.copy(), np.zeros(len(group_of_row), bool)
    for group in np.unique(group_of_row):
        rows = group_of_row == group
        before, after = (_low_residual(some.subset(rows)) for some in (sums, without))
        better[rows] = after < before
        if not after < before:
            terms[~large if group < 0 else group] = 0
    return replace(plain, terms=terms), sums.where(better, without)


def _low_residual(sums: ShellSums) -> float:
    """Sum of the logarithms of the residual power in the shells in which a slow background lies."""
    low = slice(0, _BACKGROUND_SHELLS)
    scale = sums.cross.sum() / max(sums.predicted.sum(), 1e-300)
    residual = sums.image - 2 * scale * sums.cross + scale**2 * sums.predicted
    return float(np.log(np.median(residual[:, low], axis=0) + 1e-300).sum())


def _log_scale(name: str, found: Fit) -> None:
    log.info(
        "optics group %s: image scale %.4g +- %.2g, noise sigma %.4g (low shells) to %.4g (high), from %d images",
        name, found.scale, found.error, found.sigma[1], found.sigma[-1], found.num_images,
    )  # fmt: skip


def _log_levels(name: str, found: Fit) -> None:
    what = "signal and noise vary" if found.signal_varies else "noise, but not signal, varies"
    log.info("optics group %s: %s with the images' noise levels, which are brought to one", name, what)


def draw_samples(particles: Particles) -> list[np.ndarray]:
    """Rows, ascending, of each optics group's sample."""
    rng = np.random.default_rng(_SEED)
    groups = len(particles.optics)
    most = max(_MIN_SAMPLE, min(_SAMPLE, 8 * _SAMPLE // groups))
    members = [np.flatnonzero(particles.optics_index == group) for group in range(groups)]
    return [np.sort(rng.permutation(rows)[:most]) for rows in members]


def _log_odd_aberrations(particles: Particles, group: int, sums: ShellSums, found: Fit) -> None:
    """Log by how much the sample's images fit odd aberrations better as given than with the opposite sign.

    Programs differ in that sign, and CryoSPARC documents its own nowhere: the images themselves decide.
    """
    optics = particles.optics[group]
    if not (any(optics.beam_tilt_mrad) or any(optics.odd_zernike)):
        return
    nats = found.scale * float(((sums.cross - sums.reversed).sum(0) / found.sigma**2).sum())
    if nats < -_DECISIVE_NATS:
        log.warning(
            "%s: optics group %s: the images fit beam tilt, trefoil and odd Zernike terms of the opposite sign better "
            "(%.3g nats): check the convention of the program that wrote them",
            particles.source_path, optics.name, -nats,
        )  # fmt: skip
    else:
        log.info(
            "optics group %s: odd aberrations as given fit better than the opposite sign by %.3g nats",
            optics.name, nats,
        )  # fmt: skip


def compare_with_consensus(
    source: FullImages,
    density: np.ndarray,
    mask: np.ndarray,
    rows: np.ndarray,
    seen: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> ShellSums:
    """Shell sums of the images at ``rows`` against predictions from the consensus.

    Parameters
    ----------
    source
        The images, with noise and scale taken as 1.
    density, mask
        See ``measure_noise``.
    rows
        (m,) rows of the source.
    seen
        What the CTF is replaced by, (b, N, N//2+1) each; None for itself.
    """
    box = source.box
    mesh = single_cell_mesh(box * source.pixel_size_A)
    operator = Operator.on_mesh(mesh, mask, source.pixel_size_A, accuracy=STATISTICS)
    values = gather_volume(np.ascontiguousarray(density, np.float32), operator.voxels)
    parts: list[tuple[np.ndarray, ...]] = []
    step = max(1, CHUNK_PIXELS // box**2)
    for start in tqdm(range(0, len(rows), step), desc="comparing with the consensus", unit="chunk", disable=None):
        batch = source.batch(rows[start : start + step])
        projected = operator.slices(values, batch)
        if seen is not None:
            batch = replace(batch, transfer=seen(batch.transfer))
        predicted = projected * batch.transfer
        crosses = [_plane_sums((batch.images * predicted.conj()).real)]
        if batch.transfer.is_complex():
            crosses.append(_plane_sums((batch.images * (projected * batch.transfer.conj()).conj()).real))
        image, prediction = _plane_sums(batch.images.abs().square()), _plane_sums(predicted.abs().square())
        parts.append((image, crosses[0], crosses[-1], prediction))
    image, cross, opposite, prediction = (np.concatenate(part) for part in zip(*parts, strict=True))
    bands = np.minimum(source.sides_px, box)
    inside = shell_radius(box, 2) < bands[:, None, None] / 2
    pixels = shell_sums(inside.astype(np.float32), 2, rim=True)
    return ShellSums(image, cross, opposite, prediction, pixels[source.particles.optics_index[rows]])


def _plane_sums(values: torch.Tensor) -> np.ndarray:
    """(b, shells) sums of (b, N, N//2+1) values over the pixels |k| < N/2 of the full plane."""
    return shell_sums(values, 2, rim=True).numpy()


def scale_band(box: int, pixel_size_A: float) -> np.ndarray:
    """(shells,) bool: shells used for the scale; the mean and the first shell depend on background subtraction."""
    shells = np.arange(box // 2)
    return (shells >= 2) & (shells <= max(box * pixel_size_A / _BAND_A, box / 4))
