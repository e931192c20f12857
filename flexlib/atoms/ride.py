"""Atoms carried by the mesh: each moves linearly with the corners of its cell, as the density about it does.

Atoms in no cell, and with ``rigid_residues`` all, move as rigid bodies with atoms that lie in cells.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from scipy.spatial import cKDTree  # its type

from flexlib.atoms.model import AtomicModel
from flexlib.errors import InputError
from flexlib.runtime import kd_tree
from flexlib.tetra.rotations import rotations
from flexlib.tetra.tetmesh import TetraMesh

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-6  # barycentric weight by which an atom may miss its cell for rounding
_OWN_LEAST = 4  # carried atoms of a residue that say how its others move
_FOLLOWED = 24  # nearest carried atoms that a residue follows which has fewer
_PAIRS_AT_ONCE = 2_000_000  # of cells and atoms that may lie in them
_NAMED = 8  # residues that a line of the log names


@dataclass(frozen=True)
class Ride:
    """Which vertices move which atom, and which atoms move as rigid bodies."""

    positions_A: np.ndarray  # (na, 3) at rest, from the box centre
    carried: np.ndarray  # (na,) bool: lies in a cell of the mesh
    weights: sparse.csr_array  # (na, nv) of the vertices; rows of atoms that are not carried are empty
    bodies: RigidBodies

    def moved_A(self, displacements_A: np.ndarray) -> np.ndarray:
        """(na, 3) float64 positions from the box centre, after (nv, 3) displacements of the vertices."""
        moved = self.positions_A + self.weights @ np.asarray(displacements_A, np.float64)
        return self.bodies.moved_A(self.positions_A, moved)

    def residue_weights(self, model: AtomicModel) -> sparse.csr_array:
        """(nr, nv): what moves the middle of each residue's carried atoms, or else of those that it follows."""
        rows, atoms = model.residue[self.carried], np.flatnonzero(self.carried)
        missing = ~np.isin(model.residue[self.bodies.member], rows)
        body_residue = np.full(self.bodies.count, -1)
        body_residue[self.bodies.member_body[missing]] = model.residue[self.bodies.member[missing]]
        follows = body_residue[self.bodies.reference_body]
        rows = np.concatenate([rows, follows[follows >= 0]])
        atoms = np.concatenate([atoms, self.bodies.reference[follows >= 0]])
        count = np.bincount(rows, minlength=len(model.residues))
        shape = (len(model.residues), len(self.positions_A))
        return sparse.csr_array((1 / count[rows], (rows, atoms)), shape=shape) @ self.weights


@dataclass(frozen=True)
class RigidBodies:
    """Groups of atoms that move by the rotation and shift that fit the moves of their reference atoms best."""

    reference: np.ndarray  # (r,) atoms
    reference_body: np.ndarray  # (r,) ascending
    member: np.ndarray  # (m,) atoms that move so
    member_body: np.ndarray  # (m,)

    @property
    def count(self) -> int:
        """Number of bodies."""
        return int(self.reference_body[-1]) + 1 if len(self.reference_body) else 0

    def moved_A(self, rest_A: np.ndarray, moved_A: np.ndarray) -> np.ndarray:
        """(na, 3) ``moved_A`` with the members where their bodies take them from (na, 3) ``rest_A``."""
        if not len(self.member):
            return moved_A
        first = np.flatnonzero(np.diff(self.reference_body, prepend=-1))
        size = np.diff(first, append=len(self.reference))[:, None]
        before, after = (np.add.reduceat(points[self.reference], first, axis=0) / size for points in (rest_A, moved_A))
        body = self.reference_body
        arms, moved_arms = rest_A[self.reference] - before[body], moved_A[self.reference] - after[body]
        sums = (
            np.add.reduceat(points[:, :, None] * arms[:, None], first, axis=0) for points in (moved_arms - arms, arms)
        )
        rotation = rotations(*map(torch.from_numpy, sums)).numpy()
        result = moved_A.copy()
        own = self.member_body
        result[self.member] = after[own] + np.einsum("mij,mj->mi", rotation[own], rest_A[self.member] - before[own])
        return result


def ride_on(mesh: TetraMesh, model: AtomicModel, centred_A: np.ndarray, rigid_residues: bool = False) -> Ride:
    """How the atoms of ``model`` ride on ``mesh``; the log names residues that lie outside it.

    Parameters
    ----------
    mesh
        In Angstrom from the box centre.
    model
        The atoms.
    centred_A
        (na, 3) their positions from the box centre.
    rigid_residues
        Move each residue as a rigid body, by the mean shift and the polar rotation of the field at its atoms, instead
        of atom by atom.

    Raises
    ------
    InputError
        No atom lies in the mesh.
    """
    segment = _segments(mesh, model, centred_A)
    weights, carried = _barycentric(mesh, centred_A, segment)
    if not carried.any():
        raise InputError(f"{model.path}: no atom lies in the mesh: the model is not where the map is")
    _tell_outside(model, carried)
    group = np.char.add(model.chain, [f":{one}" for one in segment])  # no body is of two segments
    trees = _Trees(group, centred_A, carried)
    return Ride(centred_A, carried, weights, _bodies(model, trees, carried, rigid_residues))


def _barycentric(mesh: TetraMesh, centred_A: np.ndarray, segment: np.ndarray) -> tuple[sparse.csr_array, np.ndarray]:
    """(na, nv) weights of the lowest cell of its segment that each atom lies in, and (na,) whether it lies in one."""
    corners = mesh.vertices_A[mesh.cells]
    middle = corners.mean(1)
    reach = np.linalg.norm(corners - middle[:, None], axis=2).max(1) * (1 + 1e-9)
    inverse = np.linalg.inv((corners[:, 1:] - corners[:, :1]).transpose(0, 2, 1))
    tree = kd_tree(centred_A)
    near = tree.query_ball_point(middle, reach, return_length=True)
    cell, bary = np.full(len(centred_A), -1), np.zeros((len(centred_A), 4))
    chunks = np.split(np.arange(len(middle)), np.flatnonzero(np.diff(np.cumsum(near) // _PAIRS_AT_ONCE)) + 1)
    for some in chunks:
        found = tree.query_ball_point(middle[some], reach[some])
        atom = np.concatenate([np.asarray(one, np.int64) for one in found])
        of_cell = np.repeat(some, near[some])
        possible = (cell[atom] < 0) & ((segment[atom] == mesh.segment[of_cell]) | (segment[atom] < 0))
        atom, of_cell = atom[possible], of_cell[possible]
        last = np.einsum("nij,nj->ni", inverse[of_cell], centred_A[atom] - corners[of_cell, 0])
        weight = np.concatenate([1 - last.sum(1, keepdims=True), last], axis=1)
        inside = np.flatnonzero(weight.min(1) >= -_TOLERANCE)[::-1]  # the last of an atom is its lowest cell
        cell[atom[inside]], bary[atom[inside]] = of_cell[inside], weight[inside]
    carried = cell >= 0
    rows, columns = np.repeat(np.flatnonzero(carried), 4), mesh.cells[cell[carried]].ravel()
    shape = (len(centred_A), len(mesh.vertices_A))
    return sparse.csr_array((bary[carried].ravel(), (rows, columns)), shape=shape), carried


def _segments(mesh: TetraMesh, model: AtomicModel, centred_A: np.ndarray) -> np.ndarray:
    """(na,) segment of each atom: the one that most atoms of its residue lie in; -1 where the mesh has no map."""
    if mesh.segment_map.size == 0:
        return np.full(len(model), -1)
    size = mesh.segment_map.shape[0]
    at = np.rint(centred_A / mesh.segment_map_pixel_size_A).astype(np.int64) + size // 2
    x, y, z = np.clip(at, 0, size - 1).T
    of_atom = mesh.segment_map[z, y, x]
    ids, number = np.unique(of_atom, return_inverse=True)
    votes = np.zeros((len(model.residues), len(ids)), np.int64)
    np.add.at(votes, (model.residue, number), 1)
    return ids[votes.argmax(1)][model.residue]


def _bodies(model: AtomicModel, trees: _Trees, carried: np.ndarray, rigid_residues: bool) -> RigidBodies:
    """What moves as rigid bodies: atoms outside the mesh with their residue or their chain's nearest atoms."""
    num_carried = np.bincount(model.residue[carried], minlength=len(model.residues))
    num_atoms = np.bincount(model.residue, minlength=len(model.residues))
    of_itself = num_carried >= np.minimum(_OWN_LEAST, num_atoms)
    chosen = np.flatnonzero((num_carried < num_atoms) | (rigid_residues & of_itself))
    first = np.searchsorted(model.residue, np.arange(len(model.residues) + 1))
    reference, member = [], []
    for one in chosen:
        atoms = np.arange(first[one], first[one + 1])
        inside = carried[atoms]
        reference.append(atoms[inside] if of_itself[one] else trees.nearest(atoms))
        member.append(atoms if rigid_residues else atoms[~inside])
    return RigidBodies(*_flat(reference), *_flat(member))


class _Trees:
    """Carried atoms of a chain (and segment) that are nearest to others of it; of all chains, where it has none."""

    def __init__(self, group: np.ndarray, centred_A: np.ndarray, carried: np.ndarray) -> None:
        self._group, self._centred_A, self._carried = group, centred_A, carried
        self._made: dict[str, tuple[np.ndarray, cKDTree]] = {}

    def nearest(self, residue: np.ndarray) -> np.ndarray:
        group, place_A = self._group[residue[0]], self._centred_A[residue].mean(0)
        if group not in self._made:
            atoms = np.flatnonzero(self._carried & (self._group == group))
            atoms = atoms if len(atoms) else np.flatnonzero(self._carried)
            self._made[group] = atoms, kd_tree(self._centred_A[atoms])
        atoms, tree = self._made[group]
        return np.sort(atoms[np.atleast_1d(tree.query(place_A, min(_FOLLOWED, len(atoms)))[1])])


def _flat(groups: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Groups of atoms as one list, and the number of each one's group."""
    if not groups:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    return np.concatenate(groups), np.repeat(np.arange(len(groups)), [len(one) for one in groups])


def _tell_outside(model: AtomicModel, carried: np.ndarray) -> None:
    """Name in the log which residues have atoms outside the mesh."""
    if carried.all():
        return
    outside = np.unique(model.residue[~carried])
    within = np.isin(outside, model.residue[carried])
    for number, what in (
        (outside[within], "move with the rest of their residue"),
        (outside[~within], "move with the nearest atoms of their chain"),
    ):
        if len(number):
            names = ", ".join(str(model.residues[one]) for one in number[:_NAMED])
            more = f" and {len(number) - _NAMED} more" if len(number) > _NAMED else ""
            logger.warning("%s: atoms outside the mesh, %s: %s%s", model.path, what, names, more)
