"""Splatted images to deconvolved spectra and back: the Fourier part of the operator, in plain torch.

A few images at a time on the CPU, so that temporaries stay in its cache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from flexlib.projection.fitted import kernel_transfer

KERNELS = {"linear": 2, "cubic": 4}  # taps per axis; B-splines of degree 1 and 3
_FFT_BYTES = 2**22  # of images that the CPU transforms at once: the temporaries stay in its cache, and small


def images_to_spectrum(images: torch.Tensor, box: int, kernel: str) -> torch.Tensor:
    """(b, grid, grid) splatted images to the box's deconvolved frequencies, (b, box, box//2+1) complex.

    ``kernel`` is "linear", "cubic" or "fitted".
    """
    return _Spectrum.apply(images, box, kernel)


def spectrum_to_images(spectra: torch.Tensor, grid: int, kernel: str) -> torch.Tensor:
    """Deconvolve (b, box, box//2+1) half-plane spectra and sum ``exp(+2 pi i k . p / grid)`` over the full plane.

    The inverse of the splat's transform up to a factor, and its adjoint: (b, grid, grid) real images.
    """
    box = spectra.shape[1]
    half = box // 2
    deconvolution = _deconvolution(box, grid, kernel, str(spectra.device), spectra.real.dtype)

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
    def forward(ctx: Any, images: torch.Tensor, box: int, kernel: str) -> torch.Tensor:
        ctx.shape = (images.shape[-1], box, kernel)
        half, grid = box // 2, images.shape[-1]
        deconvolution = _deconvolution(box, grid, kernel, str(images.device), images.dtype)

        def transform(some: torch.Tensor) -> torch.Tensor:
            rows = torch.fft.rfft(some, dim=-1)[..., : half + 1]
            spectrum = torch.fft.fft(rows, dim=-2)
            return torch.cat([spectrum[:, :half], spectrum[:, grid - half :]], dim=1).mul_(deconvolution)

        return _in_parts(transform, images, grid)

    @staticmethod
    def backward(ctx: Any, grad_spectrum: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grid, box, kernel = ctx.shape
        # irfft adds each column's mirror image, which the gradient of the stored half plane does not have
        halved = torch.full((box // 2 + 1,), 0.5, dtype=grad_spectrum.real.dtype, device=grad_spectrum.device)
        halved[0] = 1.0
        if grid == box:
            halved[-1] = 1.0
        return spectrum_to_images(grad_spectrum * halved, grid, kernel), None, None


@lru_cache(maxsize=16)
def _deconvolution(box: int, grid: int, kernel: str, device: str, dtype: torch.dtype) -> torch.Tensor:
    """(box, box//2+1) inverse of the kernel's transfer function at the box's frequencies."""
    ky = torch.fft.fftfreq(box, 1.0 / box, dtype=torch.float64) / grid
    along = torch.from_numpy(kernel_transfer(ky.numpy())) if kernel == "fitted" else torch.sinc(ky) ** KERNELS[kernel]
    return (1.0 / (along[:, None] * along[: box // 2 + 1])).to(device=device, dtype=dtype)


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
