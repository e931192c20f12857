"""Whether the consensus has the symmetry that the user says it has."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from flexlib.errors import InputError
from flexlib.imaging.fourier import fourier_crop_map

_MIN_SYMMETRY = 0.5  # correlation of a map with its own turned copy below which it does not have the symmetry
_SYMMETRY_BOX = 64  # voxels at which that is measured


def check_symmetry(density: np.ndarray, rotations: np.ndarray, name: str, path: str) -> None:
    """Refuse a symmetry that the map does not have: another group, or other axes.

    Parameters
    ----------
    density
        (N, N, N) map.
    rotations
        (m, 3, 3) of the group, the identity first.
    name, path
        Of the group and the map, for the message.

    Raises
    ------
    InputError
        The map correlates with its copy turned by any of ``rotations`` by less than ``_MIN_SYMMETRY``.
    """
    if len(rotations) == 1:
        return
    box = min(_SYMMETRY_BOX, len(density))
    small = fourier_crop_map(density, box).astype(np.float64)
    centre = box // 2
    axis = np.arange(box) - centre
    inside = axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[None, None, :] ** 2 < (centre - 1) ** 2
    values = small[inside]
    for rotation in rotations[1:]:
        matrix = rotation[::-1, ::-1]  # arrays are (z, y, x)
        turned = ndimage.affine_transform(small, matrix, centre - matrix @ np.full(3, centre), order=1)
        correlation = float(np.corrcoef(values, turned[inside])[0, 1])
        if not correlation >= _MIN_SYMMETRY:
            raise InputError(
                f"prepare.symmetry: {name}: the consensus {path} does not have this symmetry about the centre of its "
                f"box (correlation {correlation:.2f} with its turned copy): wrong group, or axes other than RELION's"
            )
