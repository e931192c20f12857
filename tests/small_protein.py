"""A small made-up protein for tests: two chains of helices with backbone and C-beta, as gemmi has it."""

from pathlib import Path

import gemmi
import numpy as np

# N, CA, C, O and CB of a residue of an alpha helix along z: radius, angle in degrees and height of each
_HELIX = {
    "N": (1.55, 0.0, 0.0),
    "CA": (2.29, 27.7, 0.87),
    "C": (1.66, 53.6, 2.01 - 0.05),
    "O": (2.03, 71.6, 3.05),
    "CB": (3.3, 37.0, 0.0),
}
LENGTH = 24  # residues of a helix


def helix(start: int, middle_A: np.ndarray, turn: np.ndarray, name: str = "ALA") -> list[gemmi.Residue]:
    """Residues of a helix that are numbered from ``start``, turned and shifted."""
    residues = []
    for number in range(LENGTH):
        residue = gemmi.Residue()
        residue.name, residue.seqid = name, gemmi.SeqId(str(start + number))
        for atom_name, (radius, angle, height) in _HELIX.items():
            at = np.deg2rad(angle + 100.0 * number)
            place = np.array([radius * np.cos(at), radius * np.sin(at), height + 1.5 * (number - LENGTH / 2)])
            residue.add_atom(atom(atom_name, turn @ place + middle_A))
        residues.append(residue)
    return residues


def atom(name: str, place_A: np.ndarray, altloc: str = "\0") -> gemmi.Atom:
    """One atom, its element the first letter of its name."""
    made = gemmi.Atom()
    made.name, made.element, made.altloc = name, gemmi.Element(name[0]), altloc
    made.pos, made.occ, made.b_iso = gemmi.Position(*place_A), 1.0, 20.0
    return made


def protein() -> gemmi.Structure:
    """Chain A of a long bundle, chain B of one at a right angle: no symmetry, 45 A wide."""
    structure = gemmi.Structure()
    structure.name = "made"
    model = gemmi.Model(1)
    flat = np.array([[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]])
    for chain_name, turn, places in (
        ("A", np.eye(3), [(-14, 0, 0), (-4, 3, 2), (-9, 11, -4)]),
        ("B", flat, [(22, 2, 12), (24, 10, 16)]),
    ):
        chain = gemmi.Chain(chain_name)
        for number, place in enumerate(places):
            for residue in helix(1 + 30 * number, np.array(place, float), turn):
                chain.add_residue(residue)
        model.add_chain(chain)
    structure.add_model(model)
    return structure


def write_protein(path: Path, structure: gemmi.Structure, shift_A: np.ndarray | tuple = (0, 0, 0)) -> Path:
    """The structure as mmCIF or PDB, shifted, by the suffix."""
    moved = structure.clone()
    for model in moved:
        for cra in model.all():
            cra.atom.pos = gemmi.Position(*(np.array(cra.atom.pos.tolist()) + shift_A))
    moved.setup_entities()
    if path.suffix == ".pdb":
        moved.write_pdb(str(path))
    else:
        groups = gemmi.MmcifOutputGroups(True)
        groups.auth_all = True
        moved.make_mmcif_document(groups).write_file(str(path))
    return path
