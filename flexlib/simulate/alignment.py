"""Maximum-likelihood alignment of single images to one map, near the poses that they start from.

An image is a slice of the map's transform, moved and multiplied by the CTF, and noise whose spectrum is known. Five
numbers a particle, a small rotation about the axes of its own view and a shift, are found by Levenberg-Marquardt steps
on the squared difference over the noise. Slices are interpolated trilinearly in a 2x padded transform; derivatives
are those of the interpolation itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numba import njit
from scipy import fft
from scipy.spatial.transform import Rotation

from flexlib.imaging.fourier import friedel_weight
from flexlib.imaging.maps import crop_or_pad_real
from flexlib.runtime import keeps_compiled

_PADDING = 2
_STEPS = 5  # of Levenberg-Marquardt
_FIRST_DAMPING = 0.01  # of the diagonal; a step that helps divides it by 10, one that does not multiplies it by 10
_MAX_TURN_RAD = 0.2  # of one step


@dataclass(frozen=True)
class Poses:
    """Rotations and shifts of n images."""

    rotation: np.ndarray  # (n, 3, 3), view = rotation @ volume
    origin_px: np.ndarray  # (n, 2)

    def __len__(self) -> int:
        return len(self.origin_px)

    def at(self, rows: np.ndarray | slice) -> Poses:
        """Those of ``rows``."""
        return Poses(self.rotation[rows], self.origin_px[rows])

    def changed(self, step: np.ndarray) -> Poses:
        """Turned by exp([w]) and shifted: (n, 5) w about the view's x, y, z in radians, then the origin's x, y."""
        turn = Rotation.from_rotvec(step[:, :3]).as_matrix()
        return Poses(turn @ self.rotation, self.origin_px + step[:, 3:])


class Reference:
    """What images are aligned to: a map's transform, and the Fourier pixels that are compared.

    Parameters
    ----------
    volume
        (N, N, N) density.
    limit
        Shell from which on nothing is compared, below N/2.
    noise
        (N, N//2+1) standard deviation of the noise in the orthonormal transform of an image.
    """

    def __init__(self, volume: np.ndarray, limit: int, noise: np.ndarray) -> None:
        self.box = len(volume)
        ky, kx = np.meshgrid(np.arange(1 - limit, limit), np.arange(limit), indexing="ij")
        radius = np.hypot(ky, kx)
        kept = (radius > 0) & (radius < limit)
        self.ky, self.kx = ky[kept], kx[kept]
        self.frequency = np.stack([self.kx, self.ky], 1) / self.box  # (K, 2) cycles/pixel
        self.weight = friedel_weight(self.box)[self.kx] / (self.box * noise[self.ky, self.kx].astype(np.float64)) ** 2
        self.transform = _padded_transform(volume, limit)

    def coefficients(self, images: np.ndarray) -> np.ndarray:
        """(b, N, N) images -> (b, K) complex64 of the pixels that are compared, phase origin at the centre."""
        return fft.rfft2(fft.ifftshift(images, axes=(1, 2)))[:, self.ky, self.kx].astype(np.complex64)

    def ctf_at(self, ctf: np.ndarray) -> np.ndarray:
        """(b, N, N//2+1) -> (b, K)."""
        return ctf[:, self.ky, self.kx]

    def normal_equations(
        self, images: np.ndarray, ctf: np.ndarray, poses: Poses
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The fit of the (b, K) coefficients of images with (b, K) CTFs at ``poses``.

        Returns
        -------
        misfit
            (b,) half the squared difference over the noise's variance: the negative log-likelihood.
        slope
            (b, 5) minus its derivative along the numbers of ``Poses.changed``.
        information
            (b, 5, 5) their Fisher information.
        """
        return _normal_equations(
            self.transform, self.frequency, self.weight, self.box, images, ctf, poses.rotation, poses.origin_px
        )


def align(reference: Reference, images: np.ndarray, ctf: np.ndarray, start: Poses) -> Poses:
    """The likeliest poses of (b, N, N) images with (b, N, N//2+1) CTFs, near ``start``.

    Each image is aligned by itself. One that the reference says nothing of stays where it is.
    """
    coefficients, factors = reference.coefficients(images), reference.ctf_at(ctf)
    poses, damping = start, np.full(len(start), _FIRST_DAMPING)
    misfit, slope, information = reference.normal_equations(coefficients, factors, poses)
    for _ in range(_STEPS):
        trial = poses.changed(_damped_step(slope, information, damping))
        trial_misfit, trial_slope, trial_information = reference.normal_equations(coefficients, factors, trial)
        better = trial_misfit < misfit
        damping *= np.where(better, 0.1, 10.0)
        poses = replace(
            poses,
            rotation=np.where(better[:, None, None], trial.rotation, poses.rotation),
            origin_px=np.where(better[:, None], trial.origin_px, poses.origin_px),
        )
        misfit = np.where(better, trial_misfit, misfit)
        slope = np.where(better[:, None], trial_slope, slope)
        information = np.where(better[:, None, None], trial_information, information)
    return poses


def _damped_step(slope: np.ndarray, information: np.ndarray, damping: np.ndarray) -> np.ndarray:
    """(b, 5) steps, whose turns are at most ``_MAX_TURN_RAD``."""
    diagonal = np.einsum("bii->bi", information) + np.finfo(np.float32).tiny
    damped = information + np.eye(5) * (damping[:, None] * diagonal)[:, None]
    scale = 1 / np.sqrt(np.einsum("bii->bi", damped))
    scaled = damped * scale[:, :, None] * scale[:, None]
    step = scale * np.linalg.solve(scaled, (scale * slope)[..., None])[..., 0]
    turn = np.linalg.norm(step[:, :3], axis=1, keepdims=True)
    return step * np.minimum(1, _MAX_TURN_RAD / np.maximum(turn, 1e-12))


def _padded_transform(volume: np.ndarray, limit: int) -> np.ndarray:
    """(s, s, s) complex64 transform of (N, N, N), 2x padded, up to shell ``limit``; zero frequency at s//2."""
    box, size = len(volume), _PADDING * len(volume)
    taper = np.sinc((np.arange(box) - box // 2) / size) ** 2  # undoes what trilinear interpolation does
    level = volume / (taper[:, None, None] * taper[None, :, None] * taper[None, None, :])
    spectrum = fft.fftn(fft.ifftshift(crop_or_pad_real(level.astype(np.float32), size)))
    kept = np.arange(-_PADDING * limit, _PADDING * limit + 1)
    return np.ascontiguousarray(spectrum[np.ix_(kept, kept, kept)])


@njit(cache=keeps_compiled(), fastmath=True)
def _normal_equations(
    transform: np.ndarray,
    frequency: np.ndarray,
    weight: np.ndarray,
    box: int,
    images: np.ndarray,
    ctf: np.ndarray,
    rotation: np.ndarray,
    origin_px: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What ``Reference.normal_equations`` returns, image by image."""
    count = len(images)
    misfit, slope, information = np.zeros(count), np.zeros((count, 5)), np.zeros((count, 5, 5))
    along_view, jacobian = np.empty(3, np.complex128), np.empty(5, np.complex128)
    for i in range(count):
        turn = rotation[i]
        for j in range(len(frequency)):
            kx, ky = box * frequency[j, 0], box * frequency[j, 1]
            value, along_x, along_y, along_z = _interpolated(
                transform,
                turn[0, 0] * kx + turn[1, 0] * ky,
                turn[0, 1] * kx + turn[1, 1] * ky,
                turn[0, 2] * kx + turn[1, 2] * ky,
            )
            phase = 2 * np.pi * (frequency[j, 0] * origin_px[i, 0] + frequency[j, 1] * origin_px[i, 1])
            factor = ctf[i, j] * (np.cos(phase) + 1j * np.sin(phase))
            for axis in range(3):
                along_view[axis] = factor * (
                    turn[axis, 0] * along_x + turn[axis, 1] * along_y + turn[axis, 2] * along_z
                )
            predicted = factor * value
            jacobian[0] = -ky * along_view[2]  # exp([w]) R sees the volume's transform at R^T (k - w x k)
            jacobian[1] = kx * along_view[2]
            jacobian[2] = ky * along_view[0] - kx * along_view[1]
            for axis in range(2):
                jacobian[3 + axis] = 2j * np.pi * frequency[j, axis] * predicted
            rest = images[i, j] - predicted
            misfit[i] += 0.5 * weight[j] * (rest.real**2 + rest.imag**2)
            for a in range(5):
                real, imaginary = weight[j] * jacobian[a].real, weight[j] * jacobian[a].imag
                slope[i, a] += real * rest.real + imaginary * rest.imag
                for b in range(a + 1):
                    information[i, a, b] += real * jacobian[b].real + imaginary * jacobian[b].imag
    for a in range(5):
        for b in range(a):
            information[:, b, a] = information[:, a, b]
    return misfit, slope, information


@njit(cache=keeps_compiled(), fastmath=True)
def _interpolated(transform: np.ndarray, x: float, y: float, z: float) -> tuple[complex, complex, complex, complex]:
    """Value and derivatives along x, y, z of a padded transform at a frequency in pixels of the unpadded box."""
    centre = len(transform) // 2
    x, y, z = _PADDING * x + centre, _PADDING * y + centre, _PADDING * z + centre
    x0, y0, z0 = int(np.floor(x)), int(np.floor(y)), int(np.floor(z))
    value = along_x = along_y = along_z = 0j
    for dz in range(2):
        share_z, sign_z = 1 - abs(z - z0 - dz), 2 * dz - 1
        for dy in range(2):
            share_y, sign_y = 1 - abs(y - y0 - dy), 2 * dy - 1
            for dx in range(2):
                share_x, sign_x = 1 - abs(x - x0 - dx), 2 * dx - 1
                corner = transform[z0 + dz, y0 + dy, x0 + dx]
                value += share_z * share_y * share_x * corner
                along_x += share_z * share_y * sign_x * corner
                along_y += share_z * share_x * sign_y * corner
                along_z += share_y * share_x * sign_z * corner
    return value, _PADDING * along_x, _PADDING * along_y, _PADDING * along_z
