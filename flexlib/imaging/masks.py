"""The solvent mask: made from a map, softened, brought to another box, cut off where it is faint.

Two floors decide which voxels of a soft mask count, ``TRAINING_FLOOR`` and ``FULL_FLOOR``.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from scipy import ndimage

from flexlib.errors import InputError
from flexlib.imaging.fourier import lowpass_map

_DUST_FRACTION = 0.05  # bodies with less than this part of the largest body's density are dropped
_NOISE_SIGMAS = 3.0  # automatic threshold: this many solvent standard deviations above the solvent level
_MIN_PEAK_FRACTION = 0.015  # and at least this fraction of the dense core, for maps without solvent noise
_AUTO_BLUR = 2.0  # automatic masks are made from the map low-passed this much further: moving domains are blurred


# Training projects every voxel for every image of every epoch: fainter ones would add cells and time and next to no
# density
TRAINING_FLOOR = 0.01
# At full resolution the map is solved, or moved, times the mask: a cut at the training's floor would be a step of a
# hundredth of the density around the molecule
FULL_FLOOR = 1e-3


def inside_mask(mask: np.ndarray, floor: float) -> np.ndarray:
    """(N, N, N) bool, the voxels that belong to a soft mask (N, N, N): ``floor`` is one of the two above."""
    return mask > floor


def soft_edge(mask: np.ndarray, pixel_size_A: float, dilate_A: float, width_A: float) -> np.ndarray:
    """Grow a binary mask and add a cosine edge outside it.

    Parameters
    ----------
    mask
        (N, N, N) bool.
    pixel_size_A
        Of the mask.
    dilate_A
        By how much to grow it.
    width_A
        Of the edge.

    Returns
    -------
    soft
        (N, N, N) float32 in [0, 1]: 1 within ``dilate_A`` of the mask, 0 beyond ``dilate_A + width_A``.
    """
    if not mask.any():
        return np.zeros(mask.shape, np.float32)
    distance_A = ndimage.distance_transform_edt(~mask).astype(np.float32) * pixel_size_A
    if width_A <= 0:
        return (distance_A <= dilate_A).astype(np.float32)
    ramp = np.clip((distance_A - dilate_A) / width_A, 0.0, 1.0)
    soft = 0.5 + 0.5 * np.cos(np.pi * ramp)
    return np.where(ramp < 1.0, soft, 0.0).astype(np.float32)


def auto_threshold(volume: np.ndarray) -> float:
    """Density level that separates particle from solvent, low enough to hold domains blurred by motion.

    The solvent's level and noise are those of the negative side of the histogram, where no particle is: the mode,
    and the spread of the values below it. The level is ``_NOISE_SIGMAS`` above the solvent, but never below
    ``_MIN_PEAK_FRACTION`` of the dense core, which takes over in maps whose solvent was flattened.
    """
    inside = volume[_sphere(volume.shape[0])]
    level = float(np.median(inside))
    below = inside[inside < level]
    for _ in range(5):  # the particle's voxels pull the median up: take the median of what is not particle
        sigma = 1.4826 * float(np.median(level - below)) if below.size else 0.0
        solvent = inside[inside < level + 3.0 * sigma]
        if solvent.size == 0:
            break
        level = float(np.median(solvent))
        below = inside[inside < level]
    peak = float(np.mean(np.sort(inside)[-max(1, inside.size // 1000) :]))
    return max(level + _NOISE_SIGMAS * sigma, level + _MIN_PEAK_FRACTION * (peak - level))


def mask_level(
    volume: np.ndarray, pixel_size_A: float, lowpass_A: float = 10.0, threshold: float | Literal["auto"] = "auto"
) -> tuple[np.ndarray, float]:
    """The map as it is cut for a mask, and the level at which it is: see ``make_mask``.

    Returns
    -------
    filtered
        (N, N, N) the low-passed map.
    level
        Its density level; what "auto" stands for, or the number given.
    """
    blur = _AUTO_BLUR if threshold == "auto" else 1.0
    filtered = lowpass_map(volume, pixel_size_A, blur * lowpass_A)
    return filtered, auto_threshold(filtered) if threshold == "auto" else float(threshold)


def make_mask(
    volume: np.ndarray,
    pixel_size_A: float,
    lowpass_A: float = 10.0,
    threshold: float | Literal["auto"] = "auto",
    dilate_A: float = 2.0,
    pad_A: float = 5.0,
) -> np.ndarray:
    """Solvent mask of a consensus map: low-pass, threshold, drop dust, dilate, add a cosine edge.

    Parameters
    ----------
    volume
        (N, N, N).
    pixel_size_A
        Of the map.
    lowpass_A
        Resolution at which the map is cut off.
    threshold
        An absolute density level of the low-passed map, or "auto": ``auto_threshold`` of the map low-passed at
        ``2 * lowpass_A``, where domains that move stand out of the noise as far as they reach.
    dilate_A, pad_A
        See ``soft_edge``.

    Returns
    -------
    mask
        (N, N, N) float32 in [0, 1].

    Raises
    ------
    InputError
        Nothing lies above the threshold.
    """
    filtered, level = mask_level(volume, pixel_size_A, lowpass_A, threshold)
    core = (filtered > level) & _sphere(volume.shape[0])
    if not core.any():
        raise InputError(f"mask: no voxel of the map lies above the threshold {level:g} (maximum {filtered.max():g})")
    return soft_edge(_drop_dust(core, filtered - level), pixel_size_A, dilate_A, pad_A)


def resample_mask(mask: np.ndarray, box: int, scale: float | None = None) -> np.ndarray:
    """Bring a mask to another box, trilinear, centre on centre.

    Fourier resampling would ring: a hard mask would leave traces tens of Angstrom beyond its edge.

    Parameters
    ----------
    mask
        (N, N, N).
    box
        Side of the result.
    scale
        Ratio of new to old voxel size; None keeps the extent.

    Returns
    -------
    resampled
        (box, box, box) float32 in [0, 1].
    """
    old = mask.shape[0]
    if scale is None:
        scale = old / box
    if old == box and scale == 1:
        return np.array(mask, dtype=np.float32)
    offset = old // 2 - scale * (box // 2)
    source = np.asarray(mask, dtype=np.float32)
    if scale > 1:  # average over the larger voxels, so that thin edges are not missed
        source = ndimage.uniform_filter(source, size=2 * int(scale / 2) + 1, mode="constant")
    result = ndimage.affine_transform(source, [scale] * 3, offset, (box,) * 3, order=1, mode="constant")
    return np.clip(result, 0.0, 1.0).astype(np.float32)


def _drop_dust(core: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Keep the connected bodies whose summed ``weight`` is not negligible against the largest one's."""
    labels, count = ndimage.label(core, structure=np.ones((3, 3, 3)))
    if count <= 1:
        return core
    mass = ndimage.sum_labels(weight, labels, np.arange(count + 1))
    mass[0] = 0.0
    return (mass >= _DUST_FRACTION * mass.max())[labels] & core


def _sphere(box: int) -> np.ndarray:
    """(N, N, N) bool, the ball of radius ``N/2`` about voxel ``N//2``."""
    axis = (np.arange(box) - box // 2).astype(np.float32) ** 2
    return axis[:, None, None] + axis[None, :, None] + axis[None, None, :] < (box / 2) ** 2
