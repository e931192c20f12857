"""Fourier space of maps and images: shells, boxes, filters.

Real fields are stored as half-spaces, as ``rfftn`` and ``rfft2`` give them.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from typing import Any, TypeVar

import numpy as np
import torch
from scipy import fft

Values = TypeVar("Values", np.ndarray, torch.Tensor)


def wavenumbers(box: int) -> np.ndarray:
    """(N,) float32 whole cycles per box of each coefficient of ``fft``: 0, 1 ... N/2 - 1, -N/2 ... -1."""
    return ((np.arange(box) + box // 2) % box - box // 2).astype(np.float32)


def shell_radius(box: int, ndim: int = 3) -> np.ndarray:
    """(N, ..., N//2+1) float32 |k| of each stored coefficient of an ``ndim``-dimensional real transform.

    In shells (cycles per box).
    """
    squares = [wavenumbers(box) ** 2] * (ndim - 1) + [np.arange(box // 2 + 1, dtype=np.float32) ** 2]
    return np.sqrt(sum(np.ix_(*squares)))


def shell_number(box: int, ndim: int = 3, rim: bool = False) -> np.ndarray:
    """(N, ..., N//2+1) int64 ``round(|k|)``: the shell of each stored coefficient. Shells from N//2 on are corners.

    Coefficients with N/2 - 1/2 <= |k| < N/2, which round to N/2, count as corners, or with ``rim`` in the last shell:
    images hold signal and noise up to N/2, and each coefficient of theirs must belong to some shell.
    """
    radius = shell_radius(box, ndim)
    number = np.rint(radius).astype(np.int64)
    if rim:
        number[(number == box // 2) & (radius < box / 2)] -= 1
    return number


def friedel_weight(box: int) -> np.ndarray:
    """(N//2+1,) float32: how many coefficients of the full transform a stored one stands for.

    2 where only one of the two Friedel mates is stored, 1 in the columns kx = 0 and kx = N/2, which hold both.
    """
    weight = np.full(box // 2 + 1, 2.0, np.float32)
    weight[[0, -1]] = 1.0
    return weight


def shell_counts(box: int, ndim: int = 3, rim: bool = False) -> np.ndarray:
    """(N//2,) float64 number of coefficients of the full transform in each shell; ``rim`` as in ``shell_number``."""
    weight = np.broadcast_to(friedel_weight(box), (box,) * (ndim - 1) + (box // 2 + 1,))
    return np.bincount(shell_number(box, ndim, rim).ravel(), weight.ravel())[: box // 2].astype(np.float64)


def shell_sums(values: Values, ndim: int = 3, rim: bool = False) -> Values:
    """Sum over each shell of the full transform, of a real quantity that Friedel mates share.

    Parameters
    ----------
    values
        (..., N, ..., N//2+1) real array or tensor, one value for each stored coefficient of an ``ndim``-dimensional
        real transform; any leading dimensions.
    ndim
        2 for images, 3 for maps.
    rim
        As in ``shell_number``.

    Returns
    -------
    sums
        (..., N//2) float64, of the kind (and on the device) of ``values``; corners are left out.
    """
    tensor = torch.as_tensor(values)
    box = tensor.shape[-2]
    leading = tensor.shape[: tensor.ndim - ndim]
    shells = _image_shells if ndim == 2 else _shells
    shell, weight, length = shells(box, ndim, rim, str(tensor.device))
    weighted = (tensor.double() * weight).reshape(-1, len(shell))
    sums = weighted.new_zeros((len(weighted), length)).index_add_(1, shell, weighted)
    sums = sums[:, : box // 2].reshape(*leading, box // 2)
    return sums if isinstance(values, torch.Tensor) else sums.numpy()  # type: ignore[return-value]


def shell_means(values: Values, ndim: int = 3, rim: bool = False) -> Values:
    """As ``shell_sums``, the mean instead of the sum."""
    sums = shell_sums(values, ndim, rim)
    counts = shell_counts(values.shape[-2], ndim, rim)
    return sums / (torch.as_tensor(counts, device=sums.device) if isinstance(sums, torch.Tensor) else counts)


def stored_means(values: Values, ndim: int = 3, corners: bool = False) -> Values:
    """Mean over the stored coefficients of each shell, of which those at kx = 0 weigh double: both mates are stored.

    Of what is isotropic but for noise it estimates the same as ``shell_means``; rates and priors that were set with it
    keep it.

    Parameters
    ----------
    values
        (N, ..., N//2+1), as for ``shell_sums``.
    ndim
        2 for images, 3 for maps.
    corners
        Whether shells from N//2 on are given too.

    Returns
    -------
    means
        (N//2,) float64, or longer with corners.
    """
    tensor = torch.as_tensor(values)
    box = tensor.shape[-2]
    shell = torch.as_tensor(shell_number(box, ndim).ravel(), device=tensor.device)
    means = torch.bincount(shell, tensor.double().ravel()) / torch.bincount(shell)
    means = means if corners else means[: box // 2]
    return means if isinstance(values, torch.Tensor) else means.numpy()  # type: ignore[return-value]


def _shells(box: int, ndim: int, rim: bool, device: str) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Flat shell numbers, Friedel weights to be broadcast along the last axis, and how many shells there are."""
    number = shell_number(box, ndim, rim)
    weight = torch.as_tensor(friedel_weight(box), device=device).double()
    return torch.as_tensor(number.ravel(), device=device), weight, int(number.max()) + 1


_image_shells = lru_cache(maxsize=8)(_shells)


def resample_spectrum(spectrum: Values, box: int, ndim: int = 3) -> Values:
    """The coefficients of real fields of another even ``box`` and the same extent.

    Along each axis, frequencies below the Nyquist of the smaller of the two boxes are carried over unchanged; all
    others are zero.

    Parameters
    ----------
    spectrum
        (..., N, ..., N//2+1) array or tensor of ``ndim``-dimensional real transforms; any leading dimensions.
    box
        N of the result.
    ndim
        2 for images, 3 for maps.
    """
    half = min(spectrum.shape[-2], box) // 2
    shape = (*spectrum.shape[: spectrum.ndim - ndim], *(box,) * (ndim - 1), box // 2 + 1)
    result = spectrum.new_zeros(shape) if isinstance(spectrum, torch.Tensor) else np.zeros(shape, spectrum.dtype)
    for kept in _low_corners(half, ndim):
        result[kept] = spectrum[kept]
    return result


def _low_corners(half: int, ndim: int) -> list[tuple[Any, ...]]:
    """Indices of the coefficients with frequencies below ``half`` along each axis: a block for each choice of signs."""
    signs = product((slice(0, half), slice(-half + 1, None)), repeat=ndim - 1)
    return [(..., *corner, slice(0, half)) for corner in signs]


def fourier_crop_map(volume: np.ndarray, box: int) -> np.ndarray:
    """Resample (N, N, N) to a smaller ``box`` of the same extent by dropping high frequencies.

    The centre stays at voxel ``N//2`` and values stay densities. The new Nyquist planes are zero. Returns float32.
    """
    if box > volume.shape[0]:
        raise ValueError(f"cannot crop a box of {volume.shape[0]} to {box}")
    return _fourier_resample(volume, box)


def fourier_pad_map(volume: np.ndarray, box: int) -> np.ndarray:
    """Resample (N, N, N) to a larger ``box`` of the same extent; the inverse of ``fourier_crop_map``."""
    if box < volume.shape[0]:
        raise ValueError(f"cannot pad a box of {volume.shape[0]} to {box}")
    return _fourier_resample(volume, box)


def _fourier_resample(volume: np.ndarray, box: int) -> np.ndarray:
    """Zero-pad or crop the spectrum of ``volume`` to even side ``box``; planes at either Nyquist are zero."""
    old = volume.shape[0]
    if old == box:
        return np.array(volume, dtype=np.float32)
    spectrum = fft.rfftn(fft.ifftshift(np.asarray(volume, dtype=np.float32)), workers=fft_workers())
    resampled = resample_spectrum(spectrum, box)
    volume = fft.fftshift(fft.irfftn(resampled, s=(box,) * 3, workers=fft_workers()))
    return (volume * (box / old) ** 3).astype(np.float32)


def lowpass_map(volume: np.ndarray, pixel_size_A: float, resolution_A: float, edge_shells: float = 4.0) -> np.ndarray:
    """Low-pass (N, N, N) at ``resolution_A`` with a cosine edge ``edge_shells`` wide, centred on the cut.

    Returns float32; a resolution beyond Nyquist leaves the map unchanged.
    """
    box = volume.shape[0]
    cut = box * pixel_size_A / resolution_A
    if cut >= box / 2:
        return np.array(volume, dtype=np.float32)
    ramp = np.clip((shell_radius(box) - cut) / edge_shells + 0.5, 0.0, 1.0)
    weight = (0.5 + 0.5 * np.cos(np.pi * ramp)).astype(np.float32)
    spectrum = fft.rfftn(np.asarray(volume, dtype=np.float32), workers=fft_workers())
    return fft.irfftn(spectrum * weight, s=volume.shape, workers=fft_workers()).astype(np.float32)


def sharpen_map(volume: np.ndarray, pixel_size_A: float, bfactor_A2: float) -> np.ndarray:
    """Multiply the amplitudes of (N, N, N) at frequency s by ``exp(-bfactor_A2 s^2 / 4)``: negative sharpens.

    The sign is RELION's and CryoSPARC's. Returns float32.
    """
    box = volume.shape[0]
    frequency = shell_radius(box) / (box * pixel_size_A)
    weight = np.exp(-0.25 * bfactor_A2 * frequency**2).astype(np.float32)
    spectrum = fft.rfftn(np.asarray(volume, dtype=np.float32), workers=fft_workers())
    return fft.irfftn(spectrum * weight, s=volume.shape, workers=fft_workers()).astype(np.float32)


def fft_workers() -> int:
    """Threads for FFTs: those that torch has been given, which are the rule's."""
    return torch.get_num_threads()
