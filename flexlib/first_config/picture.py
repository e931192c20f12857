"""The mask over the map, as a picture to be judged by eye."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flexlib.errors import InputError
from flexlib.files import atomic_path
from flexlib.imaging.fourier import fourier_crop_map
from flexlib.imaging.masks import resample_mask

_INK, _MUTED, _OUTLINE = "#1d2733", "#5b6875", "#ff8c1a"
_DRAWN_BOX = 256  # voxels of larger maps are averaged for the picture
_VIEWS = (("x", "y", "z"), ("x", "z", "y"), ("y", "z", "x"))  # runs right, runs up, is looked along
_DPI = 130


def draw_mask(path: Path, density: np.ndarray, mask: np.ndarray, pixel_size_A: float, title: str) -> None:
    """Write a PNG of a map's central slices and projections, with the mask's outline.

    Parameters
    ----------
    path
        The file.
    density, mask
        (N, N, N) on one grid; the outline is where the mask is a half.
    pixel_size_A
        Of that grid.
    title
        Above the picture; several lines if need be.

    Raises
    ------
    InputError
        The file cannot be written.
    """
    box = len(density)
    extent_A = box * pixel_size_A
    if box > _DRAWN_BOX:
        density, mask = fourier_crop_map(density, _DRAWN_BOX), resample_mask(mask, _DRAWN_BOX)
    figure = Figure(figsize=(10.2, 7.4), layout="constrained")
    figure.suptitle(title, color=_INK, fontsize=11, parse_math=False)  # names of files
    rows = figure.subplots(2, 3)
    for column, (right, up, along) in enumerate(_VIEWS):
        axis = "zyx".index(along)
        centre = len(density) // 2
        _panel(rows[0, column], density.take(centre, axis), mask.take(centre, axis), extent_A)
        rows[0, column].set_title(f"slice through the centre, along {along}", fontsize=9, color=_INK)
        _panel(rows[1, column], density.sum(axis), mask.max(axis), extent_A)
        rows[1, column].set_title(f"projection along {along}", fontsize=9, color=_INK)
        for row in (0, 1):
            rows[row, column].set_xlabel(f"{right} (Å)", fontsize=8, color=_MUTED, labelpad=1)
            rows[row, column].set_ylabel(f"{up} (Å)", fontsize=8, color=_MUTED, labelpad=1)
    try:
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", dpi=_DPI)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error


def _panel(axes: Axes, image: np.ndarray, mask: np.ndarray, extent_A: float) -> None:
    """One grey image (rows run up) with the mask's outline."""
    side = len(image)
    pixel_A = extent_A / side
    low, high = (-(side // 2) - 0.5) * pixel_A, (side - side // 2 - 0.5) * pixel_A
    darkest, brightest = np.percentile(image, (1.0, 99.7))
    if not brightest > darkest:
        darkest, brightest = float(image.min()), float(image.max()) + 1e-12
    axes.imshow(
        image, cmap="gray", origin="lower", extent=(low, high, low, high), vmin=darkest, vmax=brightest,
        interpolation="bilinear",
    )  # fmt: skip
    if mask.min() < 0.5 <= mask.max():
        positions = (np.arange(side) - side // 2) * pixel_A
        axes.contour(positions, positions, mask, levels=[0.5], colors=[_OUTLINE], linewidths=1.3)
    axes.set_aspect("equal")
    axes.tick_params(labelsize=7, colors=_MUTED, length=2)
    for spine in axes.spines.values():
        spine.set_visible(False)
