"""Pseudo-atomic models of proteins whose parts turn about hinges: what the simulator images.

A residue is two pseudo-atoms of equal mass, one at C-alpha and one 2.4 A away where the side chain points. Chains are
strands (3.3 A a residue, zigzag), helices (1.5 A and 100 degrees a residue) and loops, so that the density has detail
below 8 A. Angles turn rigid bodies; in a linker of a few residues the angle grows smoothly from 0 to its full value.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from scipy.interpolate import CubicHermiteSpline
from scipy.spatial.transform import Rotation

from flexlib.errors import InputError

_CA_SPACING_A = 3.8
_SIDE_CHAIN_A = 2.4
_STRAND_RISE_A = 3.3
_STRAND_ZIGZAG_A = 0.9
_STRAND_SPACING_A = 4.8
_SHEET_SPACING_A = 10.0
_SHEET_TWIST_RAD = np.deg2rad(12.0)
_HELIX_RISE_A = 1.5
_HELIX_TURN_RAD = np.deg2rad(100.0)
_HELIX_RADIUS_A = 2.3
_HELIX_SPACING_A = 9.8
_ATOMS_PER_RESIDUE = 8.0  # non-hydrogen atoms, split evenly between the two pseudo-atoms


@dataclass(frozen=True)
class Hinge:
    """A rotation of part of the atoms about a fixed axis.

    With ``state_sd_rad`` 0 the angle is uniform in +-``range_rad``; else it is in one of two states at
    +-``range_rad`` with that standard deviation.
    """

    pivot_A: np.ndarray  # (3,) a point of the axis
    axis: np.ndarray  # (3,) unit vector; angles are right-handed about it
    weight: np.ndarray  # (na,) in [0, 1]: the fraction of the angle by which each atom turns
    range_rad: float
    state_sd_rad: float = 0.0

    def sample(self, count: int, generator: np.random.Generator) -> np.ndarray:
        """(count,) random angles in radians."""
        if self.state_sd_rad == 0:
            return generator.uniform(-self.range_rad, self.range_rad, count)
        sign = generator.choice([-1.0, 1.0], count)
        return sign * self.range_rad + self.state_sd_rad * generator.standard_normal(count)

    def log_prior(self, angles_rad: np.ndarray) -> np.ndarray:
        """Log density of the angles that ``sample`` draws, up to a constant; minus infinity where there are none."""
        if self.state_sd_rad == 0:
            return np.where(np.abs(angles_rad) <= self.range_rad, 0.0, -np.inf)
        away = (angles_rad[..., None] - self.range_rad * np.array([-1.0, 1.0])) / self.state_sd_rad
        return np.logaddexp(*np.moveaxis(-0.5 * away**2, -1, 0))


@dataclass(frozen=True)
class Phantom:
    """Pseudo-atoms at rest and the hinges that move them; the centre of mass is at the origin.

    A hinge that carries another one comes first in ``hinges``.
    """

    name: str
    atoms_A: np.ndarray  # (na, 3) float64, (x, y, z)
    mass: np.ndarray  # (na,) float64
    hinges: tuple[Hinge, ...]
    chain: np.ndarray  # (na,) int64, numbers from 0: domains and linkers as built, or a PDB's chains

    def positions_A(self, angles_rad: np.ndarray) -> np.ndarray:
        """Atoms of b states: ``angles_rad`` (b, d), or (d,) for one -> (b, na, 3)."""
        angles_rad = np.atleast_2d(np.asarray(angles_rad, dtype=np.float64))
        atoms = np.broadcast_to(self.atoms_A, (len(angles_rad), *self.atoms_A.shape))
        for hinge, angle in reversed(list(zip(self.hinges, angles_rad.T, strict=True))):
            moves = np.flatnonzero(hinge.weight)
            atoms = atoms.copy()
            atoms[:, moves] = _turn(atoms[:, moves], hinge.pivot_A, hinge.axis, angle[:, None] * hinge.weight[moves])
        return atoms

    def sample_angles(self, count: int, generator: np.random.Generator) -> np.ndarray:
        """(count, d) random hinge angles in radians."""
        if not self.hinges:
            return np.zeros((count, 0))
        return np.stack([hinge.sample(count, generator) for hinge in self.hinges], 1)

    def states_rad(self) -> np.ndarray:
        """(max(1, 2d), d) listed states: each hinge at either end of its range, the others at rest."""
        if not self.hinges:
            return np.zeros((1, 0))
        ranges = np.diag([hinge.range_rad for hinge in self.hinges])
        return np.stack([-ranges, ranges], 1).reshape(-1, len(self.hinges))


def _turn(points: np.ndarray, pivot: np.ndarray, axis: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Rodrigues rotation of (b, n, 3) points by (b, n) angles about one axis."""
    arm = points - pivot
    cosine, sine = np.cos(angle)[..., None], np.sin(angle)[..., None]
    along = (arm @ axis)[..., None] * axis
    return pivot + cosine * (arm - along) + sine * np.cross(axis, arm) + along


# --- Chains ----------------------------------------------------------------------------------------------------------


def _strand(residues: int) -> np.ndarray:
    """C-alphas (n, 3) of a beta strand along z, centred, zigzag in x."""
    index = np.arange(residues)
    rise = (index - (residues - 1) / 2) * _STRAND_RISE_A
    return np.stack([_STRAND_ZIGZAG_A * (-1.0) ** index, np.zeros(residues), rise], 1)


def _helix(residues: int) -> np.ndarray:
    """C-alphas (n, 3) of a right-handed alpha helix along z, centred."""
    index = np.arange(residues)
    turn = index * _HELIX_TURN_RAD
    rise = (index - (residues - 1) / 2) * _HELIX_RISE_A
    return np.stack([_HELIX_RADIUS_A * np.cos(turn), _HELIX_RADIUS_A * np.sin(turn), rise], 1)


def _loop(before: np.ndarray, after: np.ndarray, bulge_A: float, generator: np.random.Generator) -> np.ndarray:
    """C-alphas (n, 3) of a loop that leaves the end of chain ``before`` and enters the start of ``after``."""
    leave = before[-1] - before[max(-4, -len(before))]
    enter = after[min(3, len(after) - 1)] - after[0]
    tangents = [bulge_A * v / np.linalg.norm(v) + generator.normal(0, 2.0, 3) for v in (leave, enter)]
    path = CubicHermiteSpline([0, 1], [before[-1], after[0]], tangents)(np.linspace(0, 1, 400))
    travel = np.r_[0.0, np.cumsum(np.linalg.norm(np.diff(path, axis=0), axis=1))]
    count = max(2, round(travel[-1] / _CA_SPACING_A))
    ticks = np.linspace(0, travel[-1], count + 1)[1:-1]
    residues = np.stack([np.interp(ticks, travel, path[:, axis]) for axis in range(3)], 1)
    return residues + generator.normal(0, 0.4, residues.shape)


def _join(elements: Sequence[np.ndarray], bulge_A: float, generator: np.random.Generator) -> np.ndarray:
    """One chain (n, 3) of strands or helices with loops between them."""
    chain = [elements[0]]
    for before, after in pairwise(elements):
        chain += [_loop(before, after, bulge_A, generator), after]
    return np.concatenate(chain)


def beta_sandwich(generator: np.random.Generator) -> np.ndarray:
    """C-alphas (about 105, 3) of an immunoglobulin-like domain: two sheets of four antiparallel, twisted strands.

    Strands run along z; about 40 x 24 x 20 A.
    """
    elements = []
    for sheet in range(2):
        for slot in range(4):
            strand = _strand(int(generator.integers(7, 11)))
            if (slot + sheet) % 2:
                strand = strand[::-1]
            offset = (slot - 1.5) * (1 if sheet == 0 else -1)
            twist = Rotation.from_rotvec([offset * _SHEET_TWIST_RAD, 0, 0])
            sheet_turn = Rotation.from_rotvec([np.deg2rad(15.0) * (1 - 2 * sheet), 0, 0])
            centre = np.array([(sheet - 0.5) * _SHEET_SPACING_A, offset * _STRAND_SPACING_A, generator.normal(0, 1.0)])
            elements.append(sheet_turn.apply(twist.apply(strand) + centre))
    return _join(elements, 14.0, generator)


def helix_bundle(generator: np.random.Generator, helices: int, residues: int = 20) -> np.ndarray:
    """C-alphas (n, 3) of antiparallel helices along z on a hexagonal lattice, tilted a little."""
    lattice = np.stack(np.meshgrid(np.arange(-4, 5), np.arange(-4, 5), indexing="ij"), -1).reshape(-1, 2)
    sites = _HELIX_SPACING_A * lattice @ np.array([[1.0, 0.0], [0.5, np.sqrt(0.75)]])
    sites = sites[np.lexsort((sites[:, 1], np.round(np.linalg.norm(sites, axis=1), 3)))][:helices]
    sites = sites[np.lexsort((sites[:, 0], np.round(sites[:, 1] / _HELIX_SPACING_A, 1)))]
    elements = []
    for number, site in enumerate(sites):
        helix = _helix(int(residues + generator.integers(-4, 5)))
        helix = helix if number % 2 else helix[::-1] * [1.0, -1.0, 1.0]
        turn = Rotation.from_rotvec([0, 0, generator.uniform(0, 2 * np.pi)])
        tilt = Rotation.from_rotvec([*generator.normal(0, np.deg2rad(7.0), 2), 0])
        offset = np.append(site - sites.mean(0), generator.normal(0, 1.5))
        elements.append(tilt.apply(turn.apply(helix)) + offset)
    return _join(elements, 10.0, generator)


def _orient(chain: np.ndarray, along: np.ndarray, side: np.ndarray, centre: np.ndarray, spin_rad: float) -> np.ndarray:
    """Turn a chain built along z, and shift it: z -> ``along``, x -> ``side``, after a spin about z."""
    along = along / np.linalg.norm(along)
    side = side - (side @ along) * along
    side = side / np.linalg.norm(side)
    frame = np.stack([side, np.cross(along, side), along], 1)
    return Rotation.from_rotvec([0, 0, spin_rad]).apply(chain - chain.mean(0)) @ frame.T + centre


def _with_side_chains(chain: np.ndarray) -> np.ndarray:
    """(2n, 3): C-alphas, then side chains that point away from the chain's local bend."""
    padded = np.concatenate([chain[:1], chain, chain[-1:]])
    outward = 2 * chain - padded[:-2] - padded[2:]
    outward /= np.maximum(np.linalg.norm(outward, axis=1, keepdims=True), 1e-3)
    return np.concatenate([chain, chain + _SIDE_CHAIN_A * outward])


class _Assembly:
    """Collects chains with the fraction of each hinge's angle that their residues follow."""

    def __init__(self, num_hinges: int) -> None:
        self.num_hinges = num_hinges
        self.atoms: list[np.ndarray] = []
        self.weights: list[np.ndarray] = []

    def add(self, chain: np.ndarray, hinge: int | None = None, weight: np.ndarray | float = 1.0) -> np.ndarray:
        """Add C-alphas (n, 3) that follow ``hinge`` by ``weight`` (n,); returns the chain."""
        weights = np.zeros((len(chain), self.num_hinges))
        if hinge is not None:
            weights[:, hinge] = weight
        self.atoms.append(_with_side_chains(chain))
        self.weights.append(np.tile(weights, (2, 1)))
        return chain

    def add_linker(self, fixed: np.ndarray, moving: np.ndarray, hinge: int, generator: np.random.Generator) -> None:
        """Join the end of chain ``fixed`` to the start of chain ``moving`` by residues that turn part of the way."""
        linker = _loop(fixed, moving, 12.0, generator)
        fraction = np.linspace(0, 1, len(linker) + 2)[1:-1]
        self.add(linker, hinge, fraction**2 * (3 - 2 * fraction))

    def finish(self, name: str, hinges: Sequence[tuple[np.ndarray, np.ndarray, float, float]]) -> Phantom:
        """The phantom, centred; ``hinges`` are (pivot, axis, range, state sd)."""
        atoms, weights = np.concatenate(self.atoms), np.concatenate(self.weights)
        centre = atoms.mean(0)
        mass = np.full(len(atoms), _ATOMS_PER_RESIDUE / 2)
        chain = np.repeat(np.arange(len(self.atoms)), [len(one) for one in self.atoms])
        made = [
            Hinge(pivot - centre, axis / np.linalg.norm(axis), weights[:, number], span, sd)
            for number, (pivot, axis, span, sd) in enumerate(hinges)
        ]
        return Phantom(name, atoms - centre, mass, tuple(made), chain)


# --- Phantoms --------------------------------------------------------------------------------------------------------


def antibody() -> Phantom:
    """An antibody-like Y of twelve immunoglobulin-like domains: core (Fc) and two arms (Fab) that bend at the hinge.

    Arm 1 is uniform in +-0.5 rad in the plane of the Y; arm 2 sits in two states at +-0.3 rad (sd 0.12) about an
    oblique axis. The arms differ in twist and direction, as in the crystal structure of an intact antibody.
    """
    generator = np.random.default_rng(1)
    assembly = _Assembly(2)
    x, y, z = np.eye(3)
    core_tops = []
    for side in (1.0, -1.0):
        upper = beta_sandwich(generator)
        upper = assembly.add(_orient(upper, -z + 0.25 * side * x, y, -27 * z + side * 17 * x + 3 * side * y, 0.4))
        lower = beta_sandwich(generator)
        assembly.add(_orient(lower, -z - 0.2 * side * x, y, -64 * z + side * 12.5 * x, 1.0))
        core_tops.append(upper[::-1])
        sugar = _loop(upper, np.array([[2.0 * side, 0, -30.0], [2.0 * side, 0, -40.0]]), 10.0, generator)
        assembly.add(sugar)
    pivots = (5.0 * x + 2.0 * z, -5.0 * x + 2.0 * z)
    arms = (  # direction of the arm, direction across its two chains
        (np.array([0.85, 0.10, 0.50]), np.array([0.1, 1.0, 0.2])),
        (np.array([-0.74, -0.40, 0.55]), np.array([0.5, 0.2, 1.0])),
    )
    for hinge, (along, across) in enumerate(arms):
        pivot = pivots[hinge]
        along = along / np.linalg.norm(along)
        across = across - (across @ along) * along
        across = across / np.linalg.norm(across)
        for slot in (-1.0, 1.0):
            near = beta_sandwich(generator)
            near = _orient(near, along - 0.2 * slot * across, across, pivot + 28 * along + 11.5 * slot * across, 0.7)
            assembly.add(near, hinge)
            far = beta_sandwich(generator)
            far = _orient(far, along + 0.3 * slot * across, across, pivot + 66 * along + 12 * slot * across, 1.9)
            assembly.add(far, hinge)
            if slot < 0:
                nearest = near if (near[0] - pivot) @ along < (near[-1] - pivot) @ along else near[::-1]
                assembly.add_linker(core_tops[hinge], nearest, hinge, generator)
    return assembly.finish("antibody", [(pivots[0], y, 0.5, 0.0), (pivots[1], y + 0.7 * z + 0.3 * x, 0.3, 0.12)])


def clamp() -> Phantom:
    """A C-shaped body of helix bundles and a beta domain, with one jaw (about a third of the mass) that opens.

    The jaw's angle is uniform in +-0.35 rad.
    """
    generator = np.random.default_rng(2)
    assembly = _Assembly(1)
    x, y, z = np.eye(3)
    assembly.add(_orient(helix_bundle(generator, 10, 24), z, x, -30 * x, 0.3))
    assembly.add(_orient(helix_bundle(generator, 9, 26), x + 0.2 * z, y, 7 * x - 24 * z, 0.0))
    assembly.add(_orient(beta_sandwich(generator), y, x, 37 * x + 10 * y - 16 * z, 0.5))
    upper = assembly.add(_orient(beta_sandwich(generator), y + 0.4 * z, x, -34 * x + 6 * y + 36 * z, 0.0))
    jaw = assembly.add(_orient(helix_bundle(generator, 9, 26), x - 0.25 * z, y, 11 * x + 34 * z, 0.0), 0)
    assembly.add(_orient(beta_sandwich(generator), y - 0.3 * z, x, 42 * x + 6 * y + 26 * z, 1.0), 0)
    pivot = np.array([-18.0, 2.0, 34.0])
    for offset in (-5.0, 5.0):
        hold = pivot + offset * y
        end = upper[np.argsort(np.linalg.norm(upper - hold, axis=1))[:4]][::-1]
        start = jaw[np.argsort(np.linalg.norm(jaw - hold, axis=1))[:4]]
        assembly.add_linker(end, start, 0, generator)
    return assembly.finish("clamp", [(pivot, y, 0.35, 0.0)])


def slider() -> Phantom:
    """Two layers of helix bundles and beta domains that lie flat on each other and slide past each other, uncoupled.

    The lower layer is still; the upper one, two fifths of the mass, turns by +-0.22 rad about the normal of their
    contact, at a pivot 75 A outside the molecule's middle: nearly a translation of +-16 A along x in the plane of
    contact. No chain connects the two, as with subunits that ratchet.
    """
    generator = np.random.default_rng(3)
    assembly = _Assembly(1)
    x, y, z = np.eye(3)
    for slot in (-1.0, 0.0, 1.0):
        flat = helix_bundle(generator, 8, 30)
        assembly.add(_orient(flat, x + 0.1 * slot * y, z, 2 * slot * x + 30 * slot * y - 16 * z, 0.4 * slot))
    assembly.add(_orient(beta_sandwich(generator), x, y, -38 * x + 14 * y - 39 * z, 0.8))
    for slot in (-1.0, 1.0):
        flat = helix_bundle(generator, 8, 28)
        assembly.add(_orient(flat, x - 0.15 * slot * y, z, -2 * slot * x + 16 * slot * y + 16 * z, 0.3 * slot), 0)
    assembly.add(_orient(beta_sandwich(generator), y, x, 26 * x + 2 * y + 39 * z, 0.2), 0)
    return assembly.finish("slider", [(-75.0 * y, z, 0.22, 0.0)])


def rigid() -> Phantom:
    """The antibody at rest, without motion."""
    return replace(antibody(), name="rigid", hinges=())


PHANTOMS: dict[str, Callable[[], Phantom]] = {
    "antibody": antibody,
    "clamp": clamp,
    "slider": slider,
    "rigid": rigid,
}


def make_phantom(name: str) -> Phantom:
    """The built-in phantom called ``name``; raises ``InputError`` for an unknown one."""
    if name not in PHANTOMS:
        raise InputError(f"phantom: no phantom is called {name!r}; there are {', '.join(PHANTOMS)}")
    return PHANTOMS[name]()


def phantom_from_pdb(
    path: str | os.PathLike[str], hinges: Sequence[tuple[str, Sequence[float], Sequence[float], float]] = ()
) -> Phantom:
    """A phantom made of the C-alphas of a PDB file (one mass a residue; phosphorus for nucleotides).

    Source: wwPDB format 3.3, ATOM records.

    Parameters
    ----------
    path
        The file.
    hinges
        Rows (chain letters that move, pivot (x, y, z) in A of the file, axis (x, y, z), range in radians); the angle
        grows smoothly over the 10 A around the pivot.

    Raises
    ------
    InputError
        No atom is found.
    """
    atoms, chains = [], []
    for line in Path(path).read_text().splitlines():
        if line.startswith("ATOM") and line[12:16] in (" CA ", " P  ") and line[16] in " A":
            atoms.append([float(line[30:38]), float(line[38:46]), float(line[46:54])])
            chains.append(line[21])
        elif line.startswith("ENDMDL"):
            break
    if not atoms:
        raise InputError(f"{path}: no ATOM record of a C-alpha or phosphorus")
    positions, chain = np.array(atoms), np.array(chains)
    centre = positions.mean(0)
    made = []
    for letters, pivot, axis, range_rad in hinges:
        moves = np.isin(chain, list(letters))
        if not moves.any():
            raise InputError(f"{path}: no chain {letters!r} for a hinge")
        ramp = np.clip(np.linalg.norm(positions - pivot, axis=1) / 10.0, 0.0, 1.0)
        unit = np.asarray(axis, float) / np.linalg.norm(axis)
        made.append(Hinge(np.asarray(pivot, float) - centre, unit, moves * ramp**2 * (3 - 2 * ramp), range_rad))
    mass = np.full(len(positions), _ATOMS_PER_RESIDUE)
    number = np.unique(chain, return_inverse=True)[1]
    return Phantom(Path(path).stem, positions - centre, mass, tuple(made), number)
