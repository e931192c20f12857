"""Exact signal of pseudo-atoms, contrast transfer, and the spectrum of the noise.

The signal is the Fourier transform of the pseudo-atoms evaluated at the Fourier pixels themselves, without any grid in
between; it and the maps are zero at and beyond ``|k| = N/2``. The CTF is written out here on purpose instead of shared
with ``images/ctf.py``: an error in one of the two shows as a disagreement, and would cancel if they were one.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import fft

_NOISE_CORNER = 0.05  # cycles/pixel below which coloured noise is flat


def _inside_nyquist(box: int) -> np.ndarray:
    """(box, box//2+1) bool, the pixels with ``|k| < N/2``."""
    return np.hypot(fft.fftfreq(box, 1.0 / box)[:, None], np.arange(box // 2 + 1)[None]) < box / 2


def _waves(position_px: np.ndarray, box: int, mass: np.ndarray | float = 1.0) -> np.ndarray:
    """Mass * exp(-2 pi i k p / box) for k = 0 ... box/2 at (..., na) positions.

    Powers are taken in double precision.

    Returns
    -------
    waves
        (2, ..., box//2+1, na) float32, real and imaginary parts.
    """
    first = np.exp(-2j * np.pi / box * position_px)
    wave = np.ones_like(first) * mass
    waves = np.empty((2, *position_px.shape[:-1], box // 2 + 1, position_px.shape[-1]), np.float32)
    for k in range(box // 2 + 1):
        waves[0, ..., k, :], waves[1, ..., k, :] = wave.real, wave.imag
        wave *= first
    return waves


def _matmul(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Matrix product on one thread: these are small, and BLAS threads that wait for a busy core cost tenfold."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return (torch.from_numpy(left) @ torch.from_numpy(right)).numpy()
    finally:
        torch.set_num_threads(threads)


def project_atoms(position_px: np.ndarray, mass: np.ndarray, box: int, sigma_px: float) -> np.ndarray:
    """Exact Fourier transforms of projected Gaussian pseudo-atoms.

    Parameters
    ----------
    position_px
        (b, na, 2) view positions (x, y) in pixels from the box centre.
    mass
        (na,), or (b, na).
    box
        N of the images.
    sigma_px
        Standard deviation of each Gaussian.

    Returns
    -------
    spectrum
        (b, box, box//2+1) complex64 ``sum_a mass_a exp(-2 pi^2 sigma^2 k^2 / box^2) exp(-2 pi i k . p_a / box)``, zero
        for ``|k| >= box/2``.
    """
    half = box // 2
    waves_x = _waves(position_px[..., 0], box, mass).swapaxes(2, 3)
    waves_y = _waves(position_px[..., 1], box)
    cos_cos, cos_sin = (_matmul(waves_y[0], part) for part in waves_x)  # y part, x part; summed over atoms
    sin_cos, sin_sin = (_matmul(waves_y[1], part) for part in waves_x)
    spectrum = np.zeros((len(position_px), box, half + 1), np.complex64)
    spectrum[:, :half] = ((cos_cos - sin_sin) + 1j * (sin_cos + cos_sin))[:, :half]
    spectrum[:, half + 1 :] = ((cos_cos + sin_sin) + 1j * (cos_sin - sin_cos))[:, half - 1 : 0 : -1]  # ky < 0
    ky, kx = fft.fftfreq(box)[:, None], fft.rfftfreq(box)[None]
    envelope = np.exp(-2 * np.pi**2 * sigma_px**2 * (ky**2 + kx**2)) * _inside_nyquist(box)
    return spectrum * envelope.astype(np.float32)


def atoms_to_map(position_px: np.ndarray, mass: np.ndarray, box: int, sigma_px: float) -> np.ndarray:
    """Exact map of Gaussian pseudo-atoms.

    Parameters
    ----------
    position_px
        (na, 3) positions (x, y, z) in pixels from the box centre.
    mass, box, sigma_px
        As for ``project_atoms``.

    Returns
    -------
    volume
        (box, box, box) float32, axes (z, y, x), centre at voxel ``box//2``, band-limited to ``|k| < box/2``; its sum
        over z has the transform that ``project_atoms`` gives.
    """
    half = box // 2
    x, y, z = (real + 1j * imaginary for real, imaginary in (_waves(p, box) for p in position_px.T))
    y, z = (np.concatenate([wave, wave[half - 1 : 0 : -1].conj()]) for wave in (y, z))
    weighted_x = (x * mass).astype(np.complex64).T
    spectrum = np.stack([_matmul(y * wave, weighted_x) for wave in z])
    k = fft.fftfreq(box) ** 2
    square = k[:, None, None] + k[None, :, None] + fft.rfftfreq(box)[None, None] ** 2
    spectrum *= np.where(square < 0.25, np.exp(-2 * np.pi**2 * sigma_px**2 * square), 0).astype(np.float32)
    return fft.fftshift(fft.irfftn(spectrum, s=(box,) * 3)).astype(np.float32)


def simulated_ctf(
    box: int,
    pixel_size_A: float,
    defocus_u_A: np.ndarray,
    defocus_v_A: np.ndarray,
    defocus_angle_rad: np.ndarray,
    voltage_kV: float = 300.0,
    spherical_aberration_mm: float = 2.7,
    amplitude_contrast: float = 0.07,
) -> np.ndarray:
    """(b, box, box//2+1) float32 contrast transfer functions in rfft2 layout, RELION's sign: CTF(0) = + contrast."""
    volts = 1e3 * voltage_kV
    wavelength_A = 12.2642598 / np.sqrt(volts * (1 + 0.978475598e-6 * volts))
    ky, kx = fft.fftfreq(box, pixel_size_A)[:, None], fft.rfftfreq(box, pixel_size_A)[None]
    square, angle = kx**2 + ky**2, np.arctan2(ky, kx)
    mean, difference = ((defocus_u_A + s * defocus_v_A)[:, None, None] / 2 for s in (1, -1))
    defocus_A = mean + difference * np.cos(2 * (angle - defocus_angle_rad[:, None, None]))
    aberration = 0.5 * np.pi * spherical_aberration_mm * 1e7 * wavelength_A**3 * square**2
    return np.sin(np.pi * wavelength_A * defocus_A * square - aberration + np.arcsin(amplitude_contrast)).astype(
        np.float32
    )


def noise_amplitude(box: int, power_law: float) -> np.ndarray:
    """(box, box//2+1) standard deviation per Fourier pixel of noise of unit variance in the image.

    Power falls as ``|k|^-power_law`` beyond 0.05 cycles/pixel; 0 is white noise.
    """
    k = np.hypot(fft.fftfreq(box)[:, None], fft.fftfreq(box)[None])
    power = (1 + (k / _NOISE_CORNER) ** 2) ** (-power_law / 2)
    return np.sqrt(power / power.mean())[:, : box // 2 + 1].astype(np.float32)
