"""The solvent mask on the images' grid: the user's, or made from the consensus."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from flexlib.errors import InputError
from flexlib.imaging.maps import crop_or_pad_real, read_map
from flexlib.imaging.masks import TRAINING_FLOOR, make_mask, resample_mask
from flexlib.prepare.grid import match_grid
from flexlib.workflow_support.settings import MaskSettings

log = logging.getLogger(__name__)

_MOST_CUT = 0.02  # share of the mask that a smaller box may cut off
_OVERSHOOT = 0.01  # beyond 0 and 1, of a mask that was resampled


def read_mask(path: str | Path, box: int, pixel_size_A: float) -> np.ndarray:
    """The user's mask, of any box and voxel size, on the images' full grid.

    Parameters
    ----------
    path
        An MRC file.
    box, pixel_size_A
        The images' full grid.

    Returns
    -------
    mask
        (box, box, box) float32 in [0, 1]; values below ``TRAINING_FLOOR`` are 0, they would only add cells to the mesh.

    Raises
    ------
    InputError
        It is no mask, is empty within the box, or has the images' box but other voxels.
    """
    mask = read_map(path)
    low, high = float(mask.data.min()), float(mask.data.max())
    if low < -_OVERSHOOT or high > 1 + _OVERSHOOT or high <= 0:
        raise InputError(f"{path}: a mask has values from 0 to 1, not {low:g} to {high:g}")
    if mask.box == box:
        data = np.clip(match_grid(mask, box, pixel_size_A, str(path)), 0.0, 1.0)
    else:
        data = resample_mask(mask.data, box, pixel_size_A / mask.pixel_size_A)
        log.info(
            "%s: %d voxels of %.5g A brought to %d of %.5g A", path, mask.box, mask.pixel_size_A, box, pixel_size_A
        )
    data[data < TRAINING_FLOOR] = 0.0
    if not data.any():
        raise InputError(f"{path}: the mask is empty within the images' box of {box} px")
    return data


def mask_reach_A(mask: np.ndarray, pixel_size_A: float) -> float:
    """Radius of the circle about the box centre that the inside of an (N, N, N) mask fits in, in any view."""
    axis = np.arange(len(mask)) - len(mask) // 2
    square = axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[None, None, :] ** 2
    return float(np.sqrt(square[mask > 0.5 * mask.max()].max())) * pixel_size_A


def consensus_mask(density: np.ndarray, pixel_size_A: float, settings: MaskSettings) -> np.ndarray:
    """(N, N, N) float32 soft mask of the consensus (N, N, N): see ``imaging.masks.make_mask``."""
    mask = make_mask(density, pixel_size_A, settings.lowpass_A, settings.threshold, settings.dilate_A, settings.pad_A)
    log.info("mask made from the consensus: %.3g %% of the box", 100 * float(mask.mean()))
    return mask


def check_crop(mask: np.ndarray, crop_box: int) -> None:
    """Refuse a box for reconstruction that does not hold the (N, N, N) mask; a warning tells of a little that is cut.

    Raises
    ------
    InputError
        More than 2 % of the mask lie outside.
    """
    cut = 1 - float(crop_or_pad_real(mask, crop_box).sum(dtype=np.float64) / mask.sum(dtype=np.float64))
    if cut > _MOST_CUT:
        raise InputError(f"prepare.crop_box: {crop_box} px cut away {cut:.0%} of the mask: a larger box is needed")
    if cut > 1e-4:
        log.warning("prepare.crop_box: %d px cut away %.2g %% of the mask", crop_box, 100 * cut)
