"""The surface of the independent map, coloured by how well its motion is known."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from flexlib.imaging.fourier import fourier_crop_map
from flexlib.imaging.maps import Map
from flexlib.render import surface
from flexlib.report import morph
from flexlib.report.independent import ValidatedPoint

_WIDTH = 5.0  # inches, of two pictures side by side


def error_pictures(point: ValidatedPoint, mask: Map | None, rotation: np.ndarray | None) -> dict[str, bytes]:
    """``error``: coloured by the motion's error, ``ratio``: by that over the motion; WebP, what can be drawn."""
    density, error, size = point.map, point.motion_error, point.motion_size
    if density is None or error is None or error.box != density.box:
        return {}
    box = min(density.box, morph.LARGEST_BOX)
    volume = fourier_crop_map(density.data, box)
    if mask is not None and mask.box == density.box:
        volume = np.where(fourier_crop_map(mask.data, box) > 0.5, volume, 0)
    level = surface.display_level(volume)
    shown = volume >= level
    if not shown.any():
        return {}
    error_A = _shrunk(error.data, box)
    limits = (0.0, max(float(np.quantile(error_A[shown], 0.99)), 1e-3))
    painted = morph.paint_surface(volume, level, error_A, limits, rotation)
    drawn = {"error": morph.painted_picture(painted, "error of the motion (Å)", _WIDTH)}
    if size is not None and size.box == density.box:
        share = error_A / np.maximum(_shrunk(size.data, box), 1e-6)
        painted = morph.paint_surface(volume, level, share, (0.0, 1.0), rotation)
        drawn["ratio"] = morph.painted_picture(painted, "error / motion", _WIDTH)
    return drawn


def _shrunk(values: np.ndarray, box: int) -> np.ndarray:
    """Values of an (N, N, N) map at the voxels of a smaller ``box`` of the same width, by linear interpolation."""
    whole = len(values)
    if box == whole:
        return values
    step = whole / box
    return ndimage.affine_transform(
        values, np.full(3, step), whole // 2 - box // 2 * step, (box,) * 3, order=1, mode="nearest"
    )
