"""Fourier shell correlation of two half-maps, with the correction for what a mask does to it."""

from __future__ import annotations

import numpy as np
from scipy import fft

from flexlib.imaging.fourier import fft_workers, shell_means, shell_number, stored_means


def fsc(map1: np.ndarray, map2: np.ndarray, mask: np.ndarray | None = None, mates: bool = True) -> np.ndarray:
    """Fourier shell correlation of two maps.

    Shell k holds the coefficients with ``round(|k|) = k``.

    Parameters
    ----------
    map1, map2
        (N, N, N).
    mask
        (N, N, N) to multiply both with.
    mates
        Whether sums are over the full transform, or (False) over what a half-space stores: ``fourier.stored_means``.

    Returns
    -------
    curve
        (N//2,) float64, 1 at shell 0; a shell without power has 0.
    """
    if mask is not None:
        map1, map2 = map1 * mask, map2 * mask
    return _shell_correlation(_spectrum(map1), _spectrum(map2), mates)


def phase_randomise(volume: np.ndarray, from_shell: int, seed: int = 0) -> np.ndarray:
    """Replace the phases of (N, N, N) by random ones in all shells >= ``from_shell``, amplitudes kept; float32.

    The phases are those of white noise, so the result is real.
    """
    spectrum = _spectrum(volume)
    noise = np.random.default_rng(seed).standard_normal(volume.shape, dtype=np.float32)
    phase = _spectrum(noise)
    phase /= np.maximum(np.abs(phase), np.finfo(phase.real.dtype).tiny)
    beyond = shell_number(len(volume)) >= from_shell
    spectrum[beyond] = np.abs(spectrum[beyond]) * phase[beyond]
    return fft.irfftn(spectrum, s=volume.shape, workers=fft_workers()).astype(np.float32)


def corrected_fsc(
    map1: np.ndarray, map2: np.ndarray, mask: np.ndarray, randomise_from: int | None = None, seed: int = 0
) -> dict[str, np.ndarray | int]:
    """FSC within a mask, corrected for the correlation that the mask itself makes.

    Beyond ``randomise_from`` (default: where the unmasked FSC falls below 0.8) the phases of both maps are randomised;
    the masked FSC of those is due to the mask, and ``(masked - random) / (1 - random)`` is without it, from two
    shells further on (Chen et al., Ultramicroscopy 135, 24, 2013).

    Parameters
    ----------
    map1, map2, mask
        As for ``fsc``.
    randomise_from
        The first shell whose phases are randomised.
    seed
        Of the random phases.

    Returns
    -------
    curves
        (N//2,) arrays "unmasked", "masked", "randomised", "corrected" and the shell "randomise_from".
    """
    unmasked = fsc(map1, map2)
    masked = fsc(map1, map2, mask)
    if randomise_from is None:
        below = np.flatnonzero(unmasked < 0.8)
        randomise_from = int(below[0]) if below.size else len(unmasked)
        randomise_from = max(randomise_from, 2)
    randomised = fsc(phase_randomise(map1, randomise_from, seed), phase_randomise(map2, randomise_from, seed + 1), mask)
    corrected = masked.copy()
    apply = np.arange(len(masked)) >= randomise_from + 2
    # a shell whose randomised maps agree fully would divide by zero: nothing can be said of it
    denominator = np.maximum(1.0 - randomised, 1e-6)
    corrected[apply] = np.clip((masked - randomised)[apply] / denominator[apply], -1.0, 1.0)
    return {
        "unmasked": unmasked,
        "masked": masked,
        "randomised": randomised,
        "corrected": corrected,
        "randomise_from": randomise_from,
    }


def predicted_truth_fsc(half_map_fsc: np.ndarray) -> np.ndarray:
    """FSC of the mean of two half-maps with the noise-free map that their own FSC h predicts: ``sqrt(2h / (1 + h))``.

    Of independent noise in the halves: h = S / (S + N), and the mean holds half the noise, so its correlation with the
    signal is ``sqrt(S / (S + N/2))`` (P. Rosenthal, R. Henderson, J. Mol. Biol. 333, 721 (2003): C_ref). Its square,
    2h / (1 + h), is the FSC that two maps as good as the mean would have. Negative h predicts 0.
    """
    h = np.maximum(half_map_fsc, 0.0)
    return np.sqrt(2.0 * h / (1.0 + h))


def resolution_at(curve: np.ndarray, threshold: float, box: int, pixel_size_A: float, first_shell: int = 0) -> float:
    """Resolution in A at which an FSC curve first falls below ``threshold``, linear between shells.

    Parameters
    ----------
    curve
        (N//2,) of maps with ``box`` N. A curve that never falls gives the last shell's resolution.
    threshold
        FSC.
    box, pixel_size_A
        Of the maps.
    first_shell
        0 or 1, the first that the interpolation may use. Shell 0, the mean density, says that a whole map agrees; in a
        small window it says nothing, and a curve that is low from shell 1 on has that shell's resolution.
    """
    below = np.flatnonzero(np.asarray(curve)[1:] < threshold)
    if below.size == 0:
        return box * pixel_size_A / (len(curve) - 1)
    last = int(below[0]) + 1  # first shell below
    high, low = float(curve[last - 1]), float(curve[last])
    between = last > first_shell and high > low
    shell = last - 1 + (high - threshold) / (high - low) if between else float(last)
    return box * pixel_size_A / shell if shell > 0 else float("inf")


def frequencies_1_per_A(box: int, pixel_size_A: float) -> np.ndarray:
    """(N//2,) spatial frequency of each shell."""
    return np.arange(box // 2) / (box * pixel_size_A)


def _spectrum(volume: np.ndarray) -> np.ndarray:
    return fft.rfftn(np.asarray(volume), workers=fft_workers())


def _shell_correlation(spectrum1: np.ndarray, spectrum2: np.ndarray, mates: bool) -> np.ndarray:
    """(N//2,) correlation per shell of two half-space spectra (N, N, N//2+1)."""
    means = shell_means if mates else stored_means
    cross = means((spectrum1 * spectrum2.conj()).real)
    power = means(np.abs(spectrum1) ** 2) * means(np.abs(spectrum2) ** 2)
    result = np.divide(cross, np.sqrt(power), out=np.zeros(len(cross)), where=power > 0)
    result[0] = 1.0
    return result
