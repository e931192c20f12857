"""Atomic models as files: read and written through gemmi, mmCIF or PDB, plain or gzipped.

All atoms of the file's first model are kept as they are: alternate conformations, insertion codes, hydrogens, ligands
and waters. Names are the author's, as programs show them.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gemmi
import numpy as np

from flexlib.errors import InputError
from flexlib.files import atomic_path
from flexlib.untrusted import parsing

logger = logging.getLogger(__name__)

SUFFIXES = (".cif", ".mmcif", ".pdb", ".ent")
_FARTHEST_A = 1e5  # an atom's coordinate
_MOST_ATOMS = 20_000_000
_CROWD, _CROWD_A = 100, 2.0  # atoms in a cube of this side: more than any structure has, with alternates
_NAME = re.compile(r"[!#-&(-~]{0,64}").fullmatch  # of a chain or residue: no spaces, no quotes
_MARK = re.compile(r"[A-Za-z0-9]{0,16}").fullmatch  # of an alternate conformation; a residue's number
_ATOM_NAME = re.compile(r"""[!#-~]{0,16}|[!-&(-~]{0,16}""").fullmatch  # quotes of one kind
_PEPTIDE_OR_NUCLEIC = ("N", "CA", "C", "O", "P", "O5'", "C5'", "C4'", "C3'", "O3'")


@dataclass(frozen=True)
class Residue:
    """A residue by its author's names; ``number`` with the insertion code."""

    chain: str
    sequence: int
    number: str
    name: str

    def __str__(self) -> str:
        return f"{self.chain}:{self.number} {self.name}"


@dataclass(frozen=True)
class AtomicModel:
    """Atoms in the order of their file; positions in its frame."""

    path: Path
    positions_A: np.ndarray  # (na, 3) float64
    residues: tuple[Residue, ...]
    residue: np.ndarray  # (na,) int64, the residue of each atom, ascending
    atomic_number: np.ndarray  # (na,) int64; 0 where the element is unknown
    covalent_radius_A: np.ndarray  # (na,) float64; 0 of metals, which bond in their own ways
    contact_radius_A: np.ndarray  # (na,) float64 of van der Waals; 0 of hydrogens and metals
    altloc: np.ndarray  # (na,) str, one letter or none
    is_backbone: np.ndarray  # (na,) bool, of proteins and nucleic acids
    structure: Any  # gemmi's, with this one model

    def __len__(self) -> int:
        return len(self.positions_A)

    @property
    def chain(self) -> np.ndarray:
        """(na,) str, the chain of each atom."""
        return np.array([one.chain for one in self.residues])[self.residue]


def is_model_file(path: str | os.PathLike[str]) -> bool:
    """Whether a path's name is that of an atomic model."""
    return _format_suffix(Path(path)) in SUFFIXES


def _format_suffix(path: Path) -> str:
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def read_atomic_model(path: str | os.PathLike[str]) -> AtomicModel:
    """Read the first model of an mmCIF or PDB file, plain or gzipped.

    Raises
    ------
    InputError
        The file cannot be read, has no atoms, or has atoms that are nowhere.
    """
    path = Path(path)
    if not is_model_file(path):
        raise InputError(f"{path}: not an atomic model by its name: {', '.join(SUFFIXES)} are read, and these with .gz")
    kind = gemmi.CoorFormat.Pdb if _format_suffix(path) in (".pdb", ".ent") else gemmi.CoorFormat.Mmcif
    with parsing(path, "atomic model"):
        if not path.is_file():
            raise InputError(f"{path}: file not found")
        structure = gemmi.read_structure(str(path), format=kind)
        others = len(structure) - 1
        if not len(structure) or not 0 < structure[0].count_atom_sites() <= _MOST_ATOMS:
            raise InputError(f"{path}: holds no atoms")
        while len(structure) > 1:
            del structure[-1]
        structure.name = "model"
        structure.remove_empty_chains()
        structure.setup_entities()
        structure.assign_label_seq_id()
        model = _from_gemmi(path, structure)
        # what the header of a damaged file names may be no text that mmCIF can hold: seen here, before anything long
        gemmi.cif.read_string(_topology(model).as_string())
    if others:
        logger.warning("%s: %d models: the first is taken", path, others + 1)
    return model


def _from_gemmi(path: Path, structure: Any) -> AtomicModel:
    """The arrays of a structure's first model. Raises ``InputError`` for atoms that are nowhere."""
    residues, atoms, residue = [], [], []
    for chain in structure[0]:
        for one in chain:
            number = f"{one.seqid.num}{one.seqid.icode.strip()}"
            residues.append(Residue(chain.name, int(one.seqid.num), number, one.name))
            atoms += list(one)
            residue += [len(residues) - 1] * len(one)
    names = {name for one in residues for name in (one.chain, one.name)}
    marks = {one.number.lstrip("-") for one in residues} | {atom.altloc.strip("\0 ") for atom in atoms}
    for known, spelled in ((names, _NAME), (marks, _MARK), ({atom.name for atom in atoms}, _ATOM_NAME)):
        if odd := sorted(name for name in known if not spelled(name)):
            raise InputError(f"{path}: damaged: a chain, residue, atom or alternate is called {odd[0]!r:.80}")
    positions_A = np.array([atom.pos.tolist() for atom in atoms], np.float64).reshape(-1, 3)
    nowhere = ~(np.abs(positions_A) < _FARTHEST_A).all(1)  # NaN too
    if nowhere.any():
        at = int(np.argmax(nowhere))
        raise InputError(f"{path}: {residues[residue[at]]}: atom {atoms[at].name} has no place ({positions_A[at]})")
    _, count = np.unique(np.floor(positions_A / _CROWD_A), axis=0, return_counts=True)
    if count.max() > _CROWD:
        raise InputError(
            f"{path}: {count.max()} atoms lie in one place, within {_CROWD_A:g} A: damaged, or no molecule"
        )
    elements = [atom.element for atom in atoms]
    is_metal, is_hydrogen = (np.array([getattr(e, name) for e in elements]) for name in ("is_metal", "is_hydrogen"))
    covalent_A, contact_A = (np.array([getattr(e, name) for e in elements]) for name in ("covalent_r", "vdw_r"))
    return AtomicModel(
        path,
        positions_A,
        tuple(residues),
        np.array(residue, np.int64),
        np.array([e.atomic_number for e in elements], np.int64),
        np.where(is_metal, 0.0, covalent_A),
        np.where(is_metal | is_hydrogen, 0.0, contact_A),
        np.array([atom.altloc.strip("\0 ") for atom in atoms]),
        _is_backbone(structure, atoms, np.array(residue)),
        structure,
    )


def _is_backbone(structure: Any, atoms: list[Any], residue: np.ndarray) -> np.ndarray:
    """(na,) bool: backbone atoms of residues that gemmi's table knows as amino acids or nucleotides."""
    infos = [gemmi.find_tabulated_residue(one.name) for chain in structure[0] for one in chain]
    of_chain = np.array([info.is_amino_acid() or info.is_nucleic_acid() for info in infos], bool)
    return of_chain[residue] & np.isin([atom.name for atom in atoms], _PEPTIDE_OR_NUCLEIC)


def write_ensemble(
    path: str | os.PathLike[str],
    model: AtomicModel,
    frames_A: Iterable[np.ndarray],
    residue_value: np.ndarray,
) -> None:
    """Write one mmCIF with a model a frame, all with the topology and the numbering of ``model``; atomically.

    Parameters
    ----------
    path
        The file.
    model
        The atoms.
    frames_A
        (na, 3) positions of each frame, in the frame of the model's file.
    residue_value
        (nr,) for the B-factor column of each residue's atoms; what is not finite is written as 0.
    """
    block = _topology(model)
    table = block.find_mmcif_category("_atom_site.")
    tags = list(table.tags)
    number, first, b_factor = (tags.index(f"_atom_site.{name}") for name in ("id", "Cartn_x", "B_iso_or_equiv"))
    assert number < first < b_factor < len(tags) - 1 and tags[-1] == "_atom_site.pdbx_PDB_model_num"
    value = np.nan_to_num(residue_value, nan=0.0, posinf=0.0, neginf=0.0)[model.residue]
    parts = []  # of each atom's row, what stands before its number, between that and its place, and after
    for cells, own in zip(table, value.tolist(), strict=True):
        row = list(cells)
        row[b_factor] = f"{own:.2f}"
        parts.append(tuple(" ".join(some) for some in (row[:number], row[number + 1 : first], row[first + 3 : -1])))
    table.erase()
    with atomic_path(path) as temporary, temporary.open("w") as file:
        file.write(block.as_string().rstrip() + "\n#\nloop_\n" + "\n".join(tags) + "\n")
        for frame, positions_A in enumerate(frames_A):
            start = frame * len(parts) + 1
            for at, ((head, names, tail), (x, y, z)) in enumerate(zip(parts, positions_A.tolist(), strict=True), start):
                file.write(f"{head} {at} {names} {x:.3f} {y:.3f} {z:.3f} {tail} {frame + 1}\n")
        file.write("#\n")


def _topology(model: AtomicModel) -> Any:
    """The model as an mmCIF block: entities, connections and atoms, and nothing of the experiment."""
    groups = gemmi.MmcifOutputGroups(False)
    for name in ("entry", "block_name", "entity", "entity_poly", "entity_poly_seq", "struct_asym", "cis"):
        setattr(groups, name, True)
    for name in ("struct_conf", "struct_sheet", "conn", "atoms", "group_pdb", "auth_all"):
        setattr(groups, name, True)
    return model.structure.make_mmcif_document(groups)[0]
