"""Splatted images to deconvolved spectra and back: the Fourier part of the operator, in plain torch.

A few images at a time on the CPU, so that temporaries stay in its cache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

_FFT_BYTES = 2**22  # of images that the CPU transforms at once: the temporaries stay in its cache, and small


def images_to_spectrum(images: torch.Tensor, box: int, taps: int) -> torch.Tensor:
    """(b, grid, grid) splatted images to the box's deconvolved frequencies, (b, box, box//2+1) complex."""
    return _Spectrum.apply(images, box, taps)


def spectrum_to_images(spectra: torch.Tensor, grid: int, taps: int) -> torch.Tensor:
    """Deconvolve (b, box, box//2+1) half-plane spectra and sum ``exp(+2 pi i k . p / grid)`` over the full plane.

    The inverse of the splat's transform up to a factor, and its adjoint: (b, grid, grid) real images.
    """
    box = spectra.shape[1]
    half = box // 2
    deconvolution = _deconvolution(box, grid, taps, str(spectra.device), spectra.real.dtype)

    def transform(some: torch.Tensor) -> torch.Tensor:
        some = some * deconvolution
        if grid > box:
            padded = some.new_zeros((len(some), grid, half + 1))
            padded[:, :half] = some[:, :half]
            padded[:, grid - half :] = some[:, half:]
            some = padded
        columns = torch.fft.ifft(some, dim=-2, norm="forward")
        return torch.fft.irfft(columns, n=grid, dim=-1, norm="forward")

    return _in_parts(transform, spectra, grid)


class _Spectrum(torch.autograd.Function):
    """``images_to_spectrum`` with its adjoint."""

    @staticmethod
    def forward(ctx: Any, images: torch.Tensor, box: int, taps: int) -> torch.Tensor:
        ctx.shape = (images.shape[-1], box, taps)
        half, grid = box // 2, images.shape[-1]
        deconvolution = _deconvolution(box, grid, taps, str(images.device), images.dtype)

        def transform(some: torch.Tensor) -> torch.Tensor:
            rows = torch.fft.rfft(some, dim=-1)[..., : half + 1]
            spectrum = torch.fft.fft(rows, dim=-2)
            return torch.cat([spectrum[:, :half], spectrum[:, grid - half :]], dim=1).mul_(deconvolution)

        return _in_parts(transform, images, grid)

    @staticmethod
    def backward(ctx: Any, grad_spectrum: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grid, box, taps = ctx.shape
        # irfft adds each column's mirror image, which the gradient of the stored half plane does not have
        halved = torch.full((box // 2 + 1,), 0.5, dtype=grad_spectrum.real.dtype, device=grad_spectrum.device)
        halved[0] = 1.0
        if grid == box:
            halved[-1] = 1.0
        return spectrum_to_images(grad_spectrum * halved, grid, taps), None, None


@lru_cache(maxsize=16)
def _deconvolution(box: int, grid: int, taps: int, device: str, dtype: torch.dtype) -> torch.Tensor:
    """(box, box//2+1) inverse of the B-spline kernel's transfer function at the box's frequencies."""
    ky = torch.fft.fftfreq(box, 1.0 / box, dtype=torch.float64)[:, None] / grid
    kx = torch.arange(box // 2 + 1, dtype=torch.float64)[None, :] / grid
    return (1.0 / (torch.sinc(ky) * torch.sinc(kx)) ** taps).to(device=device, dtype=dtype)


def _in_parts(transform: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor, grid: int) -> torch.Tensor:
    """``transform`` of a batch, on the CPU of a part at a time; ``grid`` the side of the images it comes from or to."""
    at_once = len(batch)
    if batch.device.type == "cpu":
        at_once = max(1, _FFT_BYTES // (4 * grid**2))
    if at_once >= len(batch):
        return transform(batch)
    first = transform(batch[:at_once])
    result = first.new_empty((len(batch), *first.shape[1:]))
    result[:at_once] = first
    for start in range(at_once, len(batch), at_once):
        result[start : start + at_once] = transform(batch[start : start + at_once])
    return result
