"""Noise spectrum and scale of each optics group, measured against the consensus.

In each optics group, a random sample of images is compared with CTF * projection of the consensus. Per image and shell
three sums suffice, <X,X>, <X,P> and <P,P>: from them come the scale s = sum <X,P>/sigma^2 / sum <P,P>/sigma^2 and the
noise power <X,X> - 2 s <X,P> + s^2 <P,P>.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass, replace

import numpy as np
import torch
from tqdm import tqdm

from flexlib.errors import InputError
from flexlib.images.noise import Calibration
from flexlib.images.sources import FullImages
from flexlib.images.stack import Stacks
from flexlib.imaging.fourier import shell_radius, shell_sums
from flexlib.model.forward import STATISTICS, Operator
from flexlib.particles.table import Particles
from flexlib.projection.op import gather_volume
from flexlib.tetra.tetmesh import single_cell_mesh

log = logging.getLogger(__name__)

CHUNK_PIXELS = 2**23  # of the images that are in memory at a time
_SEED = 0
_SAMPLE = 1000  # images per optics group that noise and scale are measured on
_MIN_SAMPLE = 50  # smaller groups are measured together
_SHELL_SAMPLES = 2000  # Fourier samples wanted for sigma; neighbouring shells are averaged until there are so many
_BAND_A = 8.0  # scale is measured on frequencies up to 1/8 A, and half of Nyquist at least
_MIN_SIGNIFICANCE = 4.0  # standard errors by which the scale must exceed 0
_DECISIVE_NATS = 10.0


def measure_noise(
    particles: Particles, stacks: Stacks, box: int, pixel_size_A: float, density: np.ndarray, mask: np.ndarray
) -> Calibration:
    """Noise spectrum and scale of each optics group, the latter negative where contrast is inverted.

    Parameters
    ----------
    particles, stacks
        The images.
    box, pixel_size_A
        Their common grid.
    density
        (box, box, box) consensus times soft mask on that grid.
    mask
        (box, box, box) bool.

    Raises
    ------
    InputError
        The images show no trace of the consensus.
    """
    samples = _draw_samples(particles)
    rows = np.concatenate(samples)
    groups = len(particles.optics)
    unknown = Calibration(np.ones(groups), np.ones((groups, box // 2)), box, pixel_size_A)
    source = FullImages(stacks, particles, box=box, pixel_size_A=pixel_size_A, calibration=unknown)
    sums = compare_with_consensus(source, density, mask, rows)
    group_of_row = particles.optics_index[rows]
    large = np.array([len(sample) >= _MIN_SAMPLE for sample in samples])
    sigma, image_scale = np.empty((groups, box // 2)), np.empty(groups)
    band = _scale_band(box, pixel_size_A)
    for group, optics in enumerate(particles.optics):
        members = group_of_row == group if large[group] else ~large[group_of_row]
        sigma[group], image_scale[group], error = noise_and_scale(sums.subset(members), band)
        log.info(
            "optics group %s: image scale %.4g +- %.2g, noise sigma %.4g (low shells) to %.4g (high), from %d images",
            optics.name, image_scale[group], error, sigma[group, 1], sigma[group, -1], members.sum(),
        )  # fmt: skip
        if abs(image_scale[group]) < _MIN_SIGNIFICANCE * error:
            raise InputError(
                f"{particles.source_path}: the images of optics group {optics.name} do not match projections of the "
                f"consensus (scale {image_scale[group]:.3g} +- {error:.2g}): other map, poses or half of the images?"
            )
        if any(optics.beam_tilt_mrad) or any(optics.odd_zernike):
            own = sums.subset(group_of_row == group)
            nats = image_scale[group] * float(((own.cross - own.reversed).sum(0) / sigma[group] ** 2).sum())
            _log_odd_aberrations(particles, group, nats)
    return replace(unknown, image_scale=image_scale, sigma=sigma)


def _draw_samples(particles: Particles) -> list[np.ndarray]:
    """Rows, ascending, of each optics group's sample."""
    rng = np.random.default_rng(_SEED)
    groups = len(particles.optics)
    most = max(_MIN_SAMPLE, min(_SAMPLE, 8 * _SAMPLE // groups))
    members = [np.flatnonzero(particles.optics_index == group) for group in range(groups)]
    return [np.sort(rng.permutation(rows)[:most]) for rows in members]


def _log_odd_aberrations(particles: Particles, group: int, nats: float) -> None:
    """Log by how many ``nats`` the sample's images fit odd aberrations better as given than with the opposite sign.

    Programs differ in that sign, and CryoSPARC documents its own nowhere: the images themselves decide.
    """
    if nats < -_DECISIVE_NATS:
        log.warning(
            "%s: optics group %s: the images fit beam tilt, trefoil and odd Zernike terms of the opposite sign better "
            "(%.3g nats): check the convention of the program that wrote them",
            particles.source_path, particles.optics[group].name, -nats,
        )  # fmt: skip
    else:
        log.info(
            "optics group %s: odd aberrations as given fit better than the opposite sign by %.3g nats",
            particles.optics[group].name, nats,
        )  # fmt: skip


@dataclass(frozen=True)
class ShellSums:
    """Sums over the full Fourier plane of each image X and its prediction P, shell by shell."""

    image: np.ndarray  # (m, shells) float64, |X|^2
    cross: np.ndarray  # Re(X P*)
    reversed: np.ndarray  # as ``cross``, P with odd aberrations (beam tilt, odd Zernike terms) of the opposite sign
    predicted: np.ndarray  # |P|^2
    # number of pixels; fewer, down to none, near and beyond Nyquist of an image that was resampled from coarser ones
    pixels: np.ndarray

    def subset(self, rows: np.ndarray) -> ShellSums:
        """Those of the images at ``rows``: indices or (m,) bool."""
        return ShellSums(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))


def compare_with_consensus(source: FullImages, density: np.ndarray, mask: np.ndarray, rows: np.ndarray) -> ShellSums:
    """Shell sums of the images at ``rows`` against predictions from the consensus.

    Parameters
    ----------
    source
        The images, with noise and scale taken as 1.
    density, mask
        See ``measure_noise``.
    rows
        (m,) rows of the source.
    """
    box = source.box
    mesh = single_cell_mesh(box * source.pixel_size_A)
    operator = Operator.on_mesh(mesh, mask, source.pixel_size_A, accuracy=STATISTICS)
    values = gather_volume(np.ascontiguousarray(density, np.float32), operator.voxels)
    parts: list[tuple[np.ndarray, ...]] = []
    step = max(1, CHUNK_PIXELS // box**2)
    for start in tqdm(range(0, len(rows), step), desc="noise and scale", unit="chunk", disable=None):
        batch = source.batch(rows[start : start + step])
        projected = operator.slices(values, batch)
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


def _scale_band(box: int, pixel_size_A: float) -> np.ndarray:
    """(shells,) bool: shells used for the scale; the mean and the first shell depend on background subtraction."""
    shells = np.arange(box // 2)
    return (shells >= 2) & (shells <= max(box * pixel_size_A / _BAND_A, box / 4))


def noise_and_scale(sums: ShellSums, band: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Noise and scale that explain the images best, found in turn.

    Images whose residual power lies far outside the others' (five robust deviations) do not count.

    Parameters
    ----------
    sums
        Of the images of one optics group.
    band
        (shells,) bool: the scale's shells.

    Returns
    -------
    sigma
        (shells,) the noise's standard deviation.
    scale, error
        The scale and its standard error.
    """
    keep = np.ones(len(sums.image), bool)
    power = _noise_power(sums.image, sums.pixels)
    scale = information = 0.0
    for _ in range(4):
        weight = np.where(band, 1.0 / power, 0.0)
        information = float((sums.predicted[keep] @ weight).sum()) or 1e-300
        scale = float((sums.cross[keep] @ weight).sum()) / information
        residual = sums.image - 2 * scale * sums.cross + scale**2 * sums.predicted
        total = residual.sum(1)
        spread = 1.4826 * np.median(np.abs(total - np.median(total)))
        keep = np.abs(total - np.median(total)) <= 5 * spread + 1e-6 * np.median(total)
        samples = sums.pixels[keep].sum(0)
        power = smooth_power(_noise_power(residual[keep], sums.pixels[keep]), samples)
    return np.sqrt(power), scale, information**-0.5


def _noise_power(power: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """(shells,) mean power per pixel from sums (m, shells); a shell without pixels gets that of the last one before."""
    count = pixels.sum(0)
    last = int(np.flatnonzero(count)[-1])
    mean = power.sum(0) / np.maximum(count, 1.0)
    mean[last + 1 :] = mean[last]
    return mean


def smooth_power(power: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Average (shells,) noise power over neighbouring shells, no further than needed for ``_SHELL_SAMPLES`` samples.

    The image mean (shell 0) stays by itself. Never below a millionth of the median, so that whitening stays finite.
    """
    smoothed = power.copy()
    for shell in range(1, len(power)):
        for reach in range(len(power)):
            window = slice(max(1, shell - reach), shell + reach + 1)
            if samples[window].sum() >= _SHELL_SAMPLES:
                break
        smoothed[shell] = np.average(power[window], weights=np.maximum(samples[window], 1e-6))
    return np.maximum(smoothed, 1e-6 * np.median(smoothed))


def invert_dark_contrast(particles: Particles, image_scale: np.ndarray) -> tuple[Particles, np.ndarray]:
    """Invert the contrast of optics groups whose scale (groups,) is negative: dark where others are white.

    Returns
    -------
    particles
        The same, their ``contrast_sign`` right.
    image_scale
        (groups,) all positive.
    """
    dark = image_scale < 0
    if dark.any():
        names = ", ".join(group.name for group, is_dark in zip(particles.optics, dark, strict=True) if is_dark)
        log.warning(
            "%s: images of optics group %s correlate negatively with the consensus: they are inverted",
            particles.source_path, names,
        )  # fmt: skip
        sign = np.where(dark, -1.0, 1.0)[particles.optics_index]
        particles = replace(particles, contrast_sign=particles.contrast_sign * sign)
    return particles, np.abs(image_scale)
