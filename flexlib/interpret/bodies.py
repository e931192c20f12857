"""The quasi-rigid bodies of a motion: the fewest rigid bodies that explain how the density moves."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from flexlib.model.rigid_bodies import STILL_A, States, patches
from flexlib.tetra.tetmesh import MeshVoxels

logger = logging.getLogger(__name__)

MOST_BODIES = 12
# of the squared motion a further body must explain this; or the second, and leave no more than half of what was left
_GAIN, _LEAST_GAIN, _MOST_LEFT = 0.1, 0.02, 0.5
_LEAST_SHARE = 0.03  # of the density, that a body has
_STARTS = 6  # places from where a further body grows in earnest
_FITS = 4  # of a body's motion to its rigid core
_ROUNDS = 40  # of fitting and assigning
_SPECK = 0.02  # of the density: what lies apart from its body and is smaller goes to what it touches


@dataclass(frozen=True)
class Bodies:
    """A partition of the mesh's vertices into bodies, the heaviest first."""

    label: np.ndarray  # (nv,) int64 from 0
    states: States
    motion_A: float  # rms, of the density as one body
    explained: tuple[float, ...]  # share of the squared motion that 1, 2, ... bodies explain
    reason: str = ""  # why there is only one, where that is not found but known

    @property
    def num(self) -> int:
        """How many."""
        return int(self.label.max()) + 1

    @property
    def members(self) -> torch.Tensor:
        """(B, nv) float64, 1 for a body's own vertices."""
        return _one_hot(torch.from_numpy(self.label), self.num)

    @cached_property
    def fitted(self) -> torch.Tensor:
        """(B, nv) in [0, 1]: how far a body's motion is told by each of its vertices.

        What bends near a hinge lags behind, and would make the motion too small.
        """
        members = self.members
        weight, own = members, self.states.share / (members @ self.states.share)[:, None]
        for _ in range(_FITS):
            squared = self.states.squared_residual_A2(weight)
            if weight is members:
                scale2 = (members * squared * own).sum(1, keepdim=True).clamp(min=STILL_A**2)
            weight = members / (1 + squared / scale2) ** 2
        return weight

    @property
    def mass(self) -> np.ndarray:
        """(B,) share of the density."""
        return (self.members @ self.states.share).numpy()

    @property
    def residual_A(self) -> np.ndarray:
        """(B,) rms distance of a body's density from its rigid motion, over the states."""
        members, share = self.members, self.states.share
        squared = (members * self.states.squared_residual_A2(members)) @ share
        return (squared / (members @ share)).sqrt().numpy()

    @property
    def body_explained(self) -> np.ndarray:
        """(B,) share of the squared motion of each body's density that its rigid motion explains."""
        members, share = self.members, self.states.share
        before = members @ (share * self.states.squared_residual_A2(torch.ones_like(share)[None])[0])
        after = (members * self.states.squared_residual_A2(members)) @ share
        return (1 - after / before.clamp(min=STILL_A**2)).clamp(min=0).numpy()

    def bend(self, cells: np.ndarray, strain: np.ndarray) -> float:
        """Strain inside the bodies, away from their contacts, over that of all: 0 of rigid bodies, 1 where all bends.

        Parameters
        ----------
        cells, strain
            (nc, 4) and (nc,) rms strain of the mesh's cells; the ratio is of the mean squares by density.
        """
        of_cells = self.label[cells]
        between = np.zeros(len(self.label), bool)
        between[cells[(of_cells != of_cells[:, :1]).any(1)]] = True
        inside, mass = ~between[cells].any(1), self.states.share.numpy()[cells].sum(1)
        if not (mass * inside).sum() > 0 or not (mass @ strain**2) > 0:
            return 0.0
        return float(np.average(strain**2, weights=mass * inside) / np.average(strain**2, weights=mass))

    def label_voxels(self, voxels: MeshVoxels) -> np.ndarray:
        """(nvox,) body of each voxel, from 0.

        Where the vertices of a voxel's cell are of several bodies it is that of whose rigid motion it departs least.
        """
        corners = self.label[voxels.cells]  # (nc, 4)
        label = corners[voxels.cell, voxels.bary.argmax(1)]
        mixed = np.flatnonzero((corners != corners[:, :1]).any(1))
        at = np.flatnonzero(np.isin(voxels.cell, mixed))
        if not len(at):
            return label
        squares = np.full((self.num, len(at)), np.inf)
        for body, residual_A in enumerate(self.states.residuals_A(self.members)):
            inside = (corners[mixed] == body).any(1)
            cells = mixed[inside]
            own = residual_A[torch.from_numpy(voxels.cells[cells]).long()]  # (m, 4, 3 s)
            gram = np.zeros((len(corners), 4, 4))
            gram[cells] = torch.einsum("mis,mjs->mij", own, own).numpy()
            here = np.isin(voxels.cell[at], cells)
            bary = voxels.bary[at[here]]
            squares[body, here] = np.einsum("ni,nij,nj->n", bary, gram[voxels.cell[at[here]]], bary, optimize=True)
        label[at] = squares.argmin(0)
        return label


def one_body(states: States, reason: str) -> Bodies:
    """All as one body, for a ``reason``."""
    return Bodies(np.zeros(len(states.share), np.int64), states, _motion_A(states), (0.0,), reason)


def find_bodies(states: States, cells: np.ndarray, number: int | Literal["auto"] = "auto") -> Bodies:
    """The rigid bodies by which a density moves.

    Each vertex belongs to the body, a rotation and a shift in each state, from whose motion it departs least over
    the states, together with its neighbours; bodies are fitted and vertices assigned in turn, as in k-means. Bodies
    are added one at a time: each grows from patches all over the density, and the best one is kept.

    Parameters
    ----------
    states
        Of the mesh.
    cells
        (nc, 4) vertices of its cells.
    number
        Of bodies; ``auto`` stops where a further one explains less than a tenth of the squared motion, unless it
        explains a fiftieth and more than half of what was left: a soft hinge is no body of its own.
    """
    if _motion_A(states) < STILL_A:
        return one_body(states, "nothing moves")
    near = _neighbours(cells, states.share)
    label = torch.zeros(len(states.share), dtype=torch.int64)
    total = _unexplained_A2(states, label)
    explained, most = [0.0], MOST_BODIES if number == "auto" else number
    while len(explained) < most:
        further = _one_more(states, near, label)
        if further is None:
            break
        share = 1 - _unexplained_A2(states, further) / total
        if number == "auto" and not _is_worth_it(explained[-1], share):
            break
        label = further
        explained.append(share)
    if number != "auto" and len(explained) < number:
        logger.warning("only %d bodies are found, of %d that were asked for", len(explained), number)
    return Bodies(_heaviest_first(label, states.share), states, float(total) ** 0.5, tuple(explained))


def _is_worth_it(before: float, after: float) -> bool:
    """Whether one body more is worth it, by the shares of the squared motion that are explained."""
    gain = after - before
    return gain >= _GAIN or (gain >= _LEAST_GAIN and 1 - after <= _MOST_LEFT * (1 - before))


def _motion_A(states: States) -> float:
    return _unexplained_A2(states, torch.zeros(len(states.share), dtype=torch.int64)) ** 0.5


def _unexplained_A2(states: States, label: torch.Tensor) -> float:
    """Mean squared distance of the density from the motions of its bodies."""
    members = _one_hot(label, int(label.max()) + 1)
    return float((members * states.squared_residual_A2(members)).sum(0) @ states.share)


def _one_hot(label: torch.Tensor, num: int) -> torch.Tensor:
    return (label == torch.arange(num)[:, None]).double()


def _one_more(states: States, near: sparse.csr_array, label: torch.Tensor) -> torch.Tensor | None:
    """The best partition into one body more; None where none is large enough."""
    num = int(label.max()) + 1
    now = (_one_hot(label, num) * states.squared_residual_A2(_one_hot(label, num))).sum(0)
    starts = patches(states)
    left = torch.minimum(states.squared_residual_A2(starts), now) @ states.share
    best, least = None, torch.inf
    for start in left.argsort()[:_STARTS]:
        further = label.clone()
        further[starts[start] > 0] = num
        found = _settled(states, near, further, num + 1)
        if found is None:
            continue
        squared = _unexplained_A2(states, found)
        if squared < least:
            best, least = found, squared
    return best


def _settled(states: States, near: sparse.csr_array, label: torch.Tensor, num: int) -> torch.Tensor | None:
    """Labels that fit and assignment no longer change; None where a body has come to nothing."""
    for _ in range(_ROUNDS):
        members = _one_hot(label, num)
        if (members @ states.share).min() < _LEAST_SHARE:
            return None
        squared = torch.from_numpy((near @ states.squared_residual_A2(members).T.numpy()).T)
        new = squared.argmin(0)
        if torch.equal(new, label):
            break
        label = new
    label = _without_specks(near, label, states.share)
    return None if (_one_hot(label, num) @ states.share).min() < _LEAST_SHARE else label


def _neighbours(cells: np.ndarray, share: torch.Tensor) -> sparse.csr_array:
    """(nv, nv) rows that average over a vertex and those that it shares a cell with, by density."""
    num = len(share)
    rows, columns = np.repeat(cells, 4, axis=1).ravel(), np.tile(cells, (1, 4)).ravel()
    touching = sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=(num, num))
    touching.data[:] = 1.0
    weight = share.numpy() + 1e-3 / num  # what has no density follows its neighbours
    near = touching * weight + sparse.diags_array(2 * weight)
    return sparse.csr_array(near / near.sum(1)[:, None])


def _without_specks(near: sparse.csr_array, label: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Labels in which small pieces that lie apart from their body belong to what they touch most."""
    label, mass = label.clone(), share.numpy()
    rows, columns = near.nonzero()
    same = (label[rows] == label[columns]).numpy()
    num, piece = connected_components(sparse.csr_array((same[same], (rows[same], columns[same])), shape=near.shape))
    of_piece = np.bincount(piece, mass, num)
    for small in np.flatnonzero(of_piece < _SPECK):
        here = piece == small
        border = here[rows] & ~here[columns]
        if border.any():
            label[torch.from_numpy(here)] = int(np.bincount(label[columns[border]].numpy()).argmax())
    return label


def _heaviest_first(label: torch.Tensor, share: torch.Tensor) -> np.ndarray:
    mass = _one_hot(label, int(label.max()) + 1) @ share
    rank = torch.empty(len(mass), dtype=torch.int64)
    rank[mass.argsort(descending=True)] = torch.arange(len(mass))
    return rank[label].numpy()
