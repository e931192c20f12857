"""Point groups in RELION's orientations: rotations that leave a symmetric map unchanged.

Axes as in RELION's ``symmetries.cpp`` (its ``relion_refine --print_symmetry_ops`` is what the tests compare
with), in volume coordinates (x, y, z):

    Cn      n-fold along z
    Dn      n-fold along z, 2-fold along x
    T       3-fold along z, 2-fold along (0, sqrt 2, 1)
    O       4-fold along z and x
    I1      2-folds along x, y, z; 5-fold along (phi, 0, 1)
    I2, I   2-folds along x, y, z; 5-fold along (1, 0, phi)
    I3      5-fold along z, 2-fold along (-1, 0, phi)
    I4      5-fold along z, 2-fold along (1, 0, phi)
"""

from __future__ import annotations

import re
from functools import lru_cache

import numpy as np
from scipy.spatial.transform import Rotation

from flexlib.errors import InputError

_PHI = (1 + 5**0.5) / 2  # golden ratio

# (fold, axis) of two rotations that generate the group
_GENERATORS = {
    "T": ((3, (0, 0, 1)), (2, (0, 2**0.5, 1))),
    "O": ((4, (0, 0, 1)), (4, (1, 0, 0))),
    "I1": ((2, (0, 0, 1)), (5, (_PHI, 0, 1))),
    "I2": ((2, (0, 0, 1)), (5, (1, 0, _PHI))),
    "I3": ((5, (0, 0, 1)), (2, (-1, 0, _PHI))),
    "I4": ((5, (0, 0, 1)), (2, (1, 0, _PHI))),
}
_ORDER = {"T": 12, "O": 24, "I1": 60, "I2": 60, "I3": 60, "I4": 60}
_CYCLIC = re.compile(r"([CD])([1-9]\d{0,2})")


@lru_cache(maxsize=16)
def symmetry_rotations(name: str) -> np.ndarray:
    """The rotations of a point group, the identity first.

    Parameters
    ----------
    name
        Cn, Dn, T, O, I, I1, I2, I3 or I4, in RELION's sense; upper or lower case.

    Returns
    -------
    rotations
        (m, 3, 3) float64, read-only. A map of this symmetry has the same density at ``x`` and at
        ``rotations[i] @ x``, x measured from the box centre.

    Raises
    ------
    InputError
        Not the name of a point group that a map of a chiral molecule can have.
    """
    group = name.strip().upper()
    group = "I2" if group == "I" else group
    if match := _CYCLIC.fullmatch(group):
        fold = int(match[2])
        rotations = Rotation.from_rotvec(np.arange(fold)[:, None] * [0.0, 0.0, 2 * np.pi / fold])
        if match[1] == "D":
            rotations = Rotation.concatenate([rotations, rotations * Rotation.from_rotvec([np.pi, 0.0, 0.0])])
        matrices = rotations.as_matrix()
    elif group in _GENERATORS:
        matrices = _closure([_rotation(fold, axis) for fold, axis in _GENERATORS[group]], _ORDER[group])
    else:
        raise InputError(f"prepare.symmetry: {name!r} is no point group; known are Cn, Dn, T, O and I, I1 to I4")
    matrices[np.abs(matrices) < 1e-15] = 0.0
    matrices.flags.writeable = False
    return matrices


def _rotation(fold: int, axis: tuple[float, float, float]) -> np.ndarray:
    """(3, 3): a turn by one ``fold``-th about ``axis``."""
    return Rotation.from_rotvec(2 * np.pi / fold * np.array(axis) / np.linalg.norm(axis)).as_matrix()


def _closure(generators: list[np.ndarray], order: int) -> np.ndarray:
    """(order, 3, 3): all products of the generators, in the order in which they are found."""
    found = [np.eye(3)]
    for rotation in found:  # grows while it is walked through
        for generator in generators:
            product = generator @ rotation
            if np.abs(np.array(found) - product).max((1, 2)).min() > 1e-6:
                found.append(product)
    assert len(found) == order, f"{len(found)} rotations found, {order} expected"
    return np.array(found)
