"""Fourier transforms of batches of images, in torch: phase origin at the centre, weights of the stored half plane.

Transforms are orthonormal, so that noise of unit variance in real space has unit variance in each coefficient.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from flexlib.imaging.fourier import friedel_weight, resample_spectrum, wavenumbers


def plane_radius(box: int) -> torch.Tensor:
    """(N, N//2+1) float32 |k| of each stored coefficient of an image, in shells: see ``fourier.shell_radius``."""
    ky, kx = torch.from_numpy(wavenumbers(box)), torch.arange(box // 2 + 1, dtype=torch.float32)
    return torch.sqrt(ky[:, None] ** 2 + kx**2)


def plane_weight(box: int, max_shell: float | None = None) -> torch.Tensor:
    """Weight of each stored Fourier pixel in a sum over the full plane.

    Parameters
    ----------
    box
        N of the images.
    max_shell
        Pixels with larger |k| have no weight.

    Returns
    -------
    weight
        (N, N//2+1) float32: 1 at kx = 0, 2 elsewhere (Friedel mates), 0 for |k| >= N/2.
    """
    radius = plane_radius(box)
    weight = torch.from_numpy(friedel_weight(box)) * (radius < box / 2)
    return weight if max_shell is None else weight * (radius <= max_shell)


def centred_rfft2(images: torch.Tensor) -> torch.Tensor:
    """Orthonormal rfft2 of (b, N, N) images, N even, phase origin at pixel N//2: (b, N, N//2+1) complex."""
    return torch.fft.rfft2(images, norm="ortho") * _centre_phase(images.shape[-1], str(images.device))


def centred_irfft2(spectra: torch.Tensor) -> torch.Tensor:
    """The inverse of ``centred_rfft2``: (b, N, N) real images."""
    box = spectra.shape[-2]
    return torch.fft.irfft2(spectra * _centre_phase(box, str(spectra.device)), s=(box, box), norm="ortho")


def fourier_resample(spectra: torch.Tensor, box: int) -> torch.Tensor:
    """The (b, box, box//2+1) coefficients of images of another even box and the same extent.

    Coefficients are carried over unchanged (of the orthonormal FFT, phase origin at the centre); those with |k| at or
    beyond the Nyquist of the smaller of the two boxes are zero.
    """
    old = spectra.shape[-2]
    resampled = spectra if old == box else resample_spectrum(spectra, box, 2)
    return resampled * _inside(box, min(old, box) // 2, str(spectra.device))


@lru_cache(maxsize=32)
def _inside(box: int, radius: int, device: str) -> torch.Tensor:
    """(box, box//2+1) bool: shells below ``radius``."""
    return (plane_radius(box) < radius).to(device)


@lru_cache(maxsize=32)
def _centre_phase(box: int, device: str) -> torch.Tensor:
    """(box, box//2+1) float32 +-1: moves the phase origin of rfft2 from pixel 0 to pixel box//2 (even boxes)."""
    ky = torch.arange(box)[:, None]
    kx = torch.arange(box // 2 + 1)[None, :]
    return (1.0 - 2.0 * ((ky + kx) % 2)).to(torch.float32).to(device)
