"""What a motion does to a model's geometry: bonds and angles against the input's, and clashes.

Bonds are what lies within covalent distance in the input, so that no library of monomers is needed; metals have none.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from flexlib.atoms.model import AtomicModel
from flexlib.runtime import kd_tree

_BOND_SLACK_A = 0.4  # beyond the sum of covalent radii that still is a bond
_SHORTEST_A = 0.4  # of a bond: what is nearer is the same atom twice
_OVERLAP_A = 0.6  # of two van der Waals spheres that clash
_BONDS_APART = 3  # atoms that are no further along the bonds do not clash


@dataclass(frozen=True)
class FrameGeometry:
    """One frame against the input."""

    bond_rms_A: float
    bond_worst_A: float
    angle_rms_deg: float
    angle_worst_deg: float
    clashes: int  # pairs of atoms
    new_clashes: int  # that the input does not have


class Geometry:
    """Bonds, angles and clashes of a model as read."""

    def __init__(self, model: AtomicModel) -> None:
        self._model = model
        self._bonds = _bonds(model)
        self._angles = _angles(self._bonds, len(model))
        self._lengths_A = _lengths_A(model.positions_A, self._bonds)
        self._angles_deg = _angles_deg(model.positions_A, self._angles)
        self._close = _close_pairs(self._bonds, len(model))
        self._clashing = self._clashes(model.positions_A)

    @property
    def num_bonds(self) -> int:
        """Bonds found."""
        return len(self._bonds)

    @property
    def num_clashes(self) -> int:
        """Clashes of the input."""
        return len(self._clashing)

    def of_frame(self, positions_A: np.ndarray) -> FrameGeometry:
        """What (na, 3) moved atoms have become."""
        stretched = np.abs(_lengths_A(positions_A, self._bonds) - self._lengths_A)
        bent = np.abs(_angles_deg(positions_A, self._angles) - self._angles_deg)
        clashing = self._clashes(positions_A)
        new = int((~np.isin(clashing, self._clashing)).sum())
        return FrameGeometry(*_rms_and_worst(stretched), *_rms_and_worst(bent), len(clashing), new)

    def _clashes(self, positions_A: np.ndarray) -> np.ndarray:
        """(c,) keys of pairs of atoms that overlap and are not bonded closely, ascending."""
        radius_A, num = self._model.contact_radius_A, len(positions_A)
        atoms = np.flatnonzero(radius_A > 0)
        if not len(atoms):
            return np.zeros(0, np.int64)
        reach_A = 2 * float(radius_A.max()) - _OVERLAP_A
        pairs = atoms[kd_tree(positions_A[atoms]).query_pairs(reach_A, output_type="ndarray")]
        near = _lengths_A(positions_A, pairs) < radius_A[pairs].sum(1) - _OVERLAP_A
        pairs = pairs[near & _together(self._model, pairs)]
        keys = np.sort(pairs.min(1) * num + pairs.max(1))
        return keys[~np.isin(keys, self._close)]


def _rms_and_worst(values: np.ndarray) -> tuple[float, float]:
    return (float(np.sqrt((values**2).mean())), float(values.max())) if len(values) else (0.0, 0.0)


def _together(model: AtomicModel, pairs: np.ndarray) -> np.ndarray:
    """(p,) bool: pairs of atoms (p, 2) that are not of two alternate conformations."""
    one, other = model.altloc[pairs].T
    return (one == other) | (one == "") | (other == "")


def _bonds(model: AtomicModel) -> np.ndarray:
    """(nb, 2) atoms within covalent distance, the lower first; hydrogens are not bonded to each other."""
    radius_A = model.covalent_radius_A
    atoms = np.flatnonzero((radius_A > 0) & (model.atomic_number > 0))
    if not len(atoms):
        return np.zeros((0, 2), np.int64)
    reach_A = 2 * float(radius_A.max()) + _BOND_SLACK_A
    pairs = atoms[kd_tree(model.positions_A[atoms]).query_pairs(reach_A, output_type="ndarray")].reshape(-1, 2)
    length_A = _lengths_A(model.positions_A, pairs)
    bonded = (length_A < radius_A[pairs].sum(1) + _BOND_SLACK_A) & (length_A > _SHORTEST_A)
    bonded &= (model.atomic_number[pairs] > 1).any(1) & _together(model, pairs)
    return np.unique(np.sort(pairs[bonded], axis=1), axis=0)


def _neighbours(bonds: np.ndarray, num: int) -> sparse.csr_array:
    """(na, na) 1 for each bond, either way."""
    both = np.concatenate([bonds, bonds[:, ::-1]])
    return sparse.csr_array((np.ones(len(both), np.int8), (both[:, 0], both[:, 1])), shape=(num, num))


def _angles(bonds: np.ndarray, num: int) -> np.ndarray:
    """(n, 3) atoms of each pair of bonds that share the middle one."""
    around = _neighbours(bonds, num)
    first, last, middle = [], [], []
    degree = np.diff(around.indptr)
    for count in range(2, int(degree.max(initial=0)) + 1):
        centres = np.flatnonzero(degree == count)
        if not len(centres):
            continue
        others = around.indices[around.indptr[centres][:, None] + np.arange(count)]
        for one, other in zip(*np.triu_indices(count, 1), strict=True):
            first.append(others[:, one])
            last.append(others[:, other])
            middle.append(centres)
    if not middle:
        return np.zeros((0, 3), np.int64)
    return np.stack([np.concatenate(first), np.concatenate(middle), np.concatenate(last)], 1)


def _close_pairs(bonds: np.ndarray, num: int) -> np.ndarray:
    """(n,) keys of pairs of atoms up to three bonds apart, ascending."""
    around = _neighbours(bonds, num)
    within, walk = around, around
    for _ in range(_BONDS_APART - 1):
        walk = ((walk @ around) != 0).astype(np.int8)
        within = within + walk
    rows, columns = within.tocoo().coords
    upper = rows < columns
    return np.sort(rows[upper].astype(np.int64) * num + columns[upper])


def _lengths_A(positions_A: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    return np.linalg.norm(positions_A[pairs[:, 0]] - positions_A[pairs[:, 1]], axis=1)


def _angles_deg(positions_A: np.ndarray, triples: np.ndarray) -> np.ndarray:
    one = positions_A[triples[:, 0]] - positions_A[triples[:, 1]]
    other = positions_A[triples[:, 2]] - positions_A[triples[:, 1]]
    return np.rad2deg(np.arctan2(np.linalg.norm(np.cross(one, other), axis=1), (one * other).sum(1)))
