"""A rigid reconstruction by direct Fourier gridding: the consensus that a simulated data set comes with.

Slices are inserted trilinearly into a 2x padded transform, weighted by the CTF, and divided by the sum of CTF^2.
Flexlib's own maps come from ``reconstruct.py``; this one is only meant to be quick and honest.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numba import njit
from scipy import fft

from flexlib.imaging.fourier import shell_number, stored_means
from flexlib.imaging.fsc import fsc, predicted_truth_fsc
from flexlib.imaging.maps import crop_or_pad_real
from flexlib.runtime import keeps_compiled

_PADDING = 2
_MIN_WEIGHT_FRACTION = 0.05  # of a shell's mean CTF^2: the least that a coefficient is divided by


@njit(cache=keeps_compiled(), fastmath=True)
def _insert_slices(numerator, weight, slices, ctf, rotation) -> None:
    """Add (b, P, P//2+1) slices and their squared CTF to (P, P, P) arrays whose zero frequency is at P//2."""
    box = numerator.shape[0]
    half = box // 2
    limit = (half - 1.5) ** 2
    for i in range(len(slices)):
        for row in range(box):
            ky = row if row < half else row - box
            for kx in range(half):
                if kx * kx + ky * ky >= limit or (kx == 0 and ky < 0):
                    continue
                value = slices[i, row, kx] * ctf[i, row, kx]
                square = ctf[i, row, kx] ** 2
                x = rotation[i, 0, 0] * kx + rotation[i, 1, 0] * ky + half
                y = rotation[i, 0, 1] * kx + rotation[i, 1, 1] * ky + half
                z = rotation[i, 0, 2] * kx + rotation[i, 1, 2] * ky + half
                x0, y0, z0 = int(np.floor(x)), int(np.floor(y)), int(np.floor(z))
                for dz in range(2):
                    wz = 1 - abs(z - z0 - dz)
                    for dy in range(2):
                        wzy = wz * (1 - abs(y - y0 - dy))
                        for dx in range(2):
                            share = wzy * (1 - abs(x - x0 - dx))
                            numerator[z0 + dz, y0 + dy, x0 + dx] += share * value
                            weight[z0 + dz, y0 + dy, x0 + dx] += share * square


def padded_transforms(images: np.ndarray, origin_px: np.ndarray) -> np.ndarray:
    """(b, N, N) images and (b, 2) origins -> (b, 2N, N+1) transforms, shifts undone, phase origin at the centre."""
    box = images.shape[-1]
    size = _PADDING * box
    margin = size // 2 - box // 2
    padded = np.zeros((len(images), size, size), np.float32)
    padded[:, margin : margin + box, margin : margin + box] = images
    spectrum = fft.rfft2(fft.ifftshift(padded, axes=(1, 2)))
    ky = np.exp(-2j * np.pi * fft.fftfreq(size)[None, :] * origin_px[:, 1:])
    kx = np.exp(-2j * np.pi * fft.rfftfreq(size)[None, :] * origin_px[:, :1])
    return (spectrum * ky[:, :, None] * kx[:, None, :]).astype(np.complex64)


def padded_box(box: int) -> int:
    """Side of the padded transform: the box at which ``ctf`` is to be given to ``backproject``."""
    return _PADDING * box


class Backprojector:
    """Sums of inserted slices of one half-set."""

    def __init__(self, box: int) -> None:
        self.box = box
        self.numerator = np.zeros((padded_box(box),) * 3, np.complex64)
        self.weight = np.zeros((padded_box(box),) * 3, np.float32)

    def add(self, images: np.ndarray, ctf: np.ndarray, rotation: np.ndarray, origin_px: np.ndarray) -> None:
        """Insert (b, N, N) images with (b, 2N, N+1) CTFs, (b, 3, 3) rotations and (b, 2) origins in pixels."""
        if len(images):
            slices = padded_transforms(images, origin_px)
            _insert_slices(self.numerator, self.weight, slices, ctf.astype(np.float32), rotation.astype(np.float32))

    def map(self, others: Iterable[Backprojector] = ()) -> np.ndarray:
        """(N, N, N) float32 map of these slices and those of ``others``, in the units of the images' density."""
        numerator, weight = self.numerator.copy(), self.weight.copy()
        for other in others:
            numerator += other.numerator
            weight += other.weight
        half = slice(1, None)  # index 0 is -P/2, which has no mate and is never filled
        numerator[half, half, half] += numerator[:0:-1, :0:-1, :0:-1].conj()
        weight[half, half, half] += weight[:0:-1, :0:-1, :0:-1].copy()
        numerator, weight = fft.ifftshift(numerator), fft.ifftshift(weight)
        keep = slice(0, len(weight) // 2 + 1)
        numerator, weight = numerator[:, :, keep], weight[:, :, keep]
        mean, shell = stored_means(weight, corners=True), shell_number(len(weight))
        floor = np.maximum(_MIN_WEIGHT_FRACTION * mean, 1e-6 * mean.max() + 1e-30)[shell]
        volume = fft.fftshift(fft.irfftn(numerator / np.maximum(weight, floor), s=(padded_box(self.box),) * 3))
        volume = crop_or_pad_real(volume, self.box)
        taper = np.sinc((np.arange(self.box) - self.box // 2) / padded_box(self.box)) ** 2
        return (volume / (taper[:, None, None] * taper[None, :, None] * taper[None, None, :])).astype(np.float32)


def soft_sphere(box: int) -> np.ndarray:
    """(N, N, N) a sphere of radius 0.4 boxes with an edge of 0.08 boxes, within which half-maps are compared."""
    return 0.5 + 0.5 * np.cos(np.pi * np.clip((_radius_px(box) - 0.4 * box) / (0.08 * box), 0, 1))


def _radius_px(box: int) -> np.ndarray:
    """(N, N, N) distance of each voxel from the centre."""
    axis = np.arange(box) - box // 2
    return np.sqrt(axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[None, None, :] ** 2)


def consensus_map(first: Backprojector, second: Backprojector) -> np.ndarray:
    """Map of both half-sets, each shell weighted by what their FSC says is signal, cut where FSC falls below 0.143.

    The FSC is taken in a soft sphere of radius 0.4 boxes; weights are ``imaging.fsc.predicted_truth_fsc``.
    """
    box = first.box
    curve = fsc(first.map(), second.map(), soft_sphere(box), mates=False)
    curve = np.append(curve, 0.0)  # of the corners
    weight = np.where(np.logical_and.accumulate(curve >= 0.143), predicted_truth_fsc(curve), 0.0)
    ball = 0.5 + 0.5 * np.cos(np.pi * np.clip(2 * (_radius_px(box) - 0.5 * box) / (0.1 * box) + 1, 0, 1))
    shell = np.minimum(shell_number(box), box // 2)
    spectrum = fft.rfftn(first.map([second])) * weight[shell]
    return (fft.irfftn(spectrum, s=(box,) * 3) * ball).astype(np.float32)
