"""Noise, scale and noise levels of images from shell sums against predictions of the consensus."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np

_SHELL_SAMPLES = 2000  # Fourier samples wanted for sigma; neighbouring shells are averaged until there are so many
_DECISIVE_NATS = 10.0  # by which a model with noise levels must be more likely than one without
_TRIMMED = 0.02  # share of images, half of it at either end, that do not count when models are compared


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
        return ShellSums(*(getattr(self, field.name)[rows] for field in fields(self)))

    def where(self, other_at: np.ndarray, other: ShellSums) -> ShellSums:
        """These, but ``other``'s of the images where ``other_at`` (m,) is True."""
        pairs = ((getattr(self, field.name), getattr(other, field.name)) for field in fields(self))
        return ShellSums(*(np.where(other_at[:, None], theirs, own) for own, theirs in pairs))

    def scaled(self, image: np.ndarray, prediction: np.ndarray) -> ShellSums:
        """Of images multiplied by factors (m,) and predictions multiplied by others."""
        both, image, prediction = (image * prediction)[:, None], image[:, None], prediction[:, None]
        return ShellSums(
            self.image * image**2, self.cross * both, self.reversed * both, self.predicted * prediction**2, self.pixels
        )


@dataclass(frozen=True)
class Fit:
    """Noise and scale of images of an optics group."""

    sigma: np.ndarray  # (shells,) the noise's standard deviation, at level 1
    scale: float
    error: float  # standard error of the scale
    num_images: int
    noise_varies: bool = False  # with the images' levels
    signal_varies: bool = False


def best_fit(sums: ShellSums, level: np.ndarray, band: np.ndarray) -> Fit:
    """Noise and scale that explain images of one optics group best, and what their noise levels mean.

    Levels differ because intensities do, so that the signal varies too (images that were never normalised), because
    the noise alone does (thick ice), or because of what is no noise (neighbours, a strong signal beyond the circle):
    the likelihood decides.

    Parameters
    ----------
    sums
        Of the images as they are.
    level
        (m,) their noise levels.
    band
        (shells,) bool: the scale's shells.
    """
    same, inverse = np.ones_like(level), 1 / level
    plain = Fit(*noise_and_scale(sums, band), len(level))
    if (level == 1).all():
        return replace(plain, noise_varies=True, signal_varies=True)
    models = [(plain, _nats(plain, sums, same))]
    for signal_varies in (True, False):
        scaled = sums.scaled(inverse, same if signal_varies else inverse)
        fit = Fit(*noise_and_scale(scaled, band), len(level), True, signal_varies)
        models.append((fit, _nats(fit, scaled, level) - _DECISIVE_NATS / len(level)))
    return max(models, key=lambda model: _trimmed_mean(model[1][level != 1]))[0]


def _nats(fit: Fit, sums: ShellSums, level: np.ndarray) -> np.ndarray:
    """(m,) log-likelihoods, in nats, of images divided by ``level`` (m,), but for a constant."""
    residual = sums.image - 2 * fit.scale * sums.cross + fit.scale**2 * sums.predicted
    return -(sums.pixels * np.log(level[:, None] * fit.sigma)).sum(1) - 0.5 * (residual / fit.sigma**2).sum(1)


def _trimmed_mean(values: np.ndarray) -> float:
    """Mean of (m,) values without the least and the greatest."""
    cut = round(0.5 * _TRIMMED * len(values))
    return float(np.sort(values)[cut : len(values) - cut].mean())


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
