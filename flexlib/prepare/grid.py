"""The grid that images of all optics groups are brought to, the boxes cut from it, and maps brought to it."""

from __future__ import annotations

import logging

import numpy as np

from flexlib.errors import InputError
from flexlib.imaging.fourier import fourier_crop_map, fourier_pad_map
from flexlib.imaging.maps import Map, crop_or_pad_real
from flexlib.particles.table import Particles
from flexlib.workflow_support.settings import PrepareSettings

log = logging.getLogger(__name__)

_PIXEL_SIZE_TOLERANCE = 0.01  # between map and images
_SAME_PIXEL_SIZE = 1e-4  # relative difference that is rounding
_MIN_BOX = 16
_EXTENT_RATIO = 2.5  # of map and images, beyond which they are not of one molecule in one box, or one padded or cropped


def common_grid(particles: Particles) -> tuple[int, float]:
    """Even box and A per pixel that images of all optics groups are brought to.

    The finest group's pixel size, and the widest box that every group can fill; of a single group its own, less a pixel
    where its box is odd.
    """
    finest_A = min(group.pixel_size_A for group in particles.optics)
    extent_A = min(group.box // 2 * 2 * group.pixel_size_A for group in particles.optics)
    return int(extent_A / finest_A * (1 + _SAME_PIXEL_SIZE) + 0.5) // 2 * 2, finest_A


def log_groups(particles: Particles, box: int, pixel_size_A: float) -> None:
    """Log what is done to optics groups whose images are not taken as they are."""
    for group in particles.optics:
        if group.ctf_applied:
            log.info("optics group %s: images are %s: this is undone", group.name, group.ctf_applied.replace("_", "-"))
    sizes_A = sorted({group.pixel_size_A for group in particles.optics})
    boxes = sorted({group.box for group in particles.optics})
    if sizes_A[-1] > sizes_A[0] * (1 + _SAME_PIXEL_SIZE):
        log.info(
            "optics groups of %.5g to %.5g A/px and boxes of %d to %d px: all are resampled to %d px of %.5g A",
            sizes_A[0], sizes_A[-1], boxes[0], boxes[-1], box, pixel_size_A,
        )  # fmt: skip
    elif boxes != [box]:
        log.info("images of %s px are cropped to %d px", ", ".join(map(str, boxes)), box)


def choose_boxes(settings: PrepareSettings, box: int) -> tuple[int, int]:
    """(crop_box, train_box) in pixels, even; no larger than what they are cut from, the latter from the former.

    Parameters
    ----------
    settings
        What is asked for.
    box
        Of the images on their common grid.

    Raises
    ------
    InputError
        A box is odd, too small, or larger than the images'.
    """
    crop = settings.crop_box if settings.crop_box is not None else box
    if box < _MIN_BOX:
        raise InputError(f"images of {box} px are too small: at least {_MIN_BOX} px are needed")
    for name, value in (("crop_box", crop), ("train_box", settings.train_box)):
        if value < _MIN_BOX or value % 2:
            raise InputError(f"prepare.{name}: {value} px: an even number of at least {_MIN_BOX} is needed")
    if crop > box:
        raise InputError(f"prepare.crop_box: {crop} px is larger than the images' box of {box} px")
    train = min(settings.train_box, crop)
    if train < settings.train_box:
        log.info(
            "train_box %d is not smaller than the images' box: %d px, not Fourier-cropped", settings.train_box, crop
        )
    return crop, train


def match_grid(volume: Map, box: int, pixel_size_A: float, name: str) -> np.ndarray:
    """Bring a map to another box and pixel size: real-space pad, Fourier resampling, real-space crop or pad.

    Padding makes the ratio of pixel sizes a ratio of even boxes as nearly as possible.

    Parameters
    ----------
    volume
        The map.
    box, pixel_size_A
        The grid to bring it to.
    name
        Of the map, for messages.

    Returns
    -------
    resampled
        (box, box, box) float32.

    Raises
    ------
    InputError
        The pixel sizes would still differ by more than 1 %, or do so at the same box, or one is far wider than the
        other: then the header's voxel size is most likely wrong.
    """
    ratio = volume.pixel_size_A / pixel_size_A
    if volume.box == box and abs(ratio - 1) <= _PIXEL_SIZE_TOLERANCE:
        if abs(ratio - 1) > 1e-3:
            log.warning("%s: %.5g A/px taken as the images' %.5g A/px", name, volume.pixel_size_A, pixel_size_A)
        return volume.data
    wider = volume.box * volume.pixel_size_A / (box * pixel_size_A)
    if volume.box == box or not 1 / _EXTENT_RATIO < wider < _EXTENT_RATIO:
        raise InputError(
            f"{name}: {volume.box} voxels of {volume.pixel_size_A:.5g} A, but the images have {box} px of "
            f"{pixel_size_A:.5g} A: correct the voxel size in the map's header, or resample the map"
        )
    padded, resampled, error = _nearest_boxes(volume.box, ratio)
    if error > _PIXEL_SIZE_TOLERANCE:
        raise InputError(
            f"{name}: {volume.box} voxels of {volume.pixel_size_A:.5g} A cannot be brought to the images' "
            f"{pixel_size_A:.5g} A/px within 1 %"
        )
    data = crop_or_pad_real(volume.data, padded)
    data = fourier_crop_map(data, resampled) if resampled <= padded else fourier_pad_map(data, resampled)
    log.info(
        "%s: %d voxels of %.5g A brought to %d of %.5g A", name, volume.box, volume.pixel_size_A, box, pixel_size_A
    )
    return crop_or_pad_real(data, box)


def _nearest_boxes(box: int, ratio: float) -> tuple[int, int, float]:
    """Even (padded, resampled) boxes, padded >= box, whose ratio is nearest to 1 / ``ratio``, and their relative error.

    The first pair within 1e-4 is taken, else the best.
    """
    best = (box, box, np.inf)
    for padded in range(box, box + 64, 2):
        resampled = max(2, 2 * round(padded * ratio / 2))
        error = abs(padded * ratio / resampled - 1)
        if error < best[2]:
            best = (padded, resampled, error)
        if error < 1e-4:
            break
    return best
