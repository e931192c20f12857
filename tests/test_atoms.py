"""Atomic models: files, the mesh that carries them, their geometry, and whether they lie in the map."""

from __future__ import annotations

import gzip

import gemmi
import numpy as np
import pytest
from biotite.structure.io import pdbx
from scipy.spatial.transform import Rotation
from small_protein import atom, protein, write_protein

from flexlib.atoms.geometry import Geometry
from flexlib.atoms.model import read_atomic_model, write_ensemble
from flexlib.atoms.placement import check_placement
from flexlib.atoms.ride import ride_on
from flexlib.errors import InputError
from flexlib.imaging.maps import Map
from flexlib.mesh.lattice import bcc_mesh
from flexlib.mesh.segments import Segmentation
from flexlib.simulate.signal import atoms_to_map
from flexlib.tetra.tetmesh import TetraMesh

BOX, PIXEL_SIZE_A = 40, 3.0
HALF_A = BOX // 2 * PIXEL_SIZE_A


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return read_atomic_model(write_protein(tmp_path_factory.mktemp("made") / "made.cif", protein()))


def mask_around(positions_A: np.ndarray, reach_A: float = 6.0) -> np.ndarray:
    axis_A = (np.arange(BOX) - BOX // 2) * PIXEL_SIZE_A
    z, y, x = np.meshgrid(axis_A, axis_A, axis_A, indexing="ij")
    squared = [(x - p[0]) ** 2 + (y - p[1]) ** 2 + (z - p[2]) ** 2 for p in positions_A[::3]]
    return np.min(squared, axis=0) < reach_A**2


@pytest.fixture(scope="module")
def mesh(model) -> TetraMesh:
    return bcc_mesh(mask_around(model.positions_A), PIXEL_SIZE_A, 12.0, None)


# files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.cif", "a.pdb", "a.ent", "a.cif.gz", "a.pdb.gz", "A.PDB"])
def test_every_kind_of_file_gives_the_same_atoms(tmp_path, model, name):
    plain = write_protein(tmp_path / ("one.pdb" if "pdb" in name.lower() or "ent" in name else "one.cif"), protein())
    content = plain.read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    found = read_atomic_model(tmp_path / name)
    np.testing.assert_allclose(found.positions_A, model.positions_A, atol=1e-3)
    assert found.residues == model.residues
    assert (found.residue == model.residue).all() and (found.atomic_number == model.atomic_number).all()
    assert found.is_backbone.sum() == 4 * len(found.residues)


def odd_protein() -> gemmi.Structure:
    """With an insertion code, alternate conformations, a hydrogen, a ligand, a metal, a water and a second model."""
    structure = protein()
    chain = structure[0]["A"]
    chain[5].seqid = gemmi.SeqId(5, "A")
    chain[3].add_atom(atom("CG", np.array([-11.0, 5, 0]), "A"))
    chain[3].add_atom(atom("CG", np.array([-10.6, 5, 0]), "B"))
    chain[4].add_atom(atom("H", np.array([-12.0, 1, -12])))
    for number, (name, content) in enumerate((("LIG", "C1 N2 P3"), ("ZN", "ZN"), ("HOH", "O"))):
        residue = gemmi.Residue()
        residue.name, residue.seqid, residue.het_flag = name, gemmi.SeqId(str(201 + number)), "H"
        for at, atom_name in enumerate(content.split()):
            residue.add_atom(atom(atom_name, np.array([5.0 + 1.4 * at, -8 - 3 * number, 0])))
            residue[-1].element = gemmi.Element("Zn" if name == "ZN" else atom_name[0])
        chain.add_residue(residue)
    structure.add_model(gemmi.Model(2))
    structure[1].add_chain(structure[0]["B"])
    return structure


@pytest.mark.parametrize("suffix", [".cif", ".pdb"])
def test_an_ensemble_has_the_topology_and_numbering_of_its_model(tmp_path, caplog, suffix):
    path = write_protein(tmp_path / f"odd{suffix}", odd_protein())
    found = read_atomic_model(path)
    assert "2 models: the first is taken" in caplog.text
    assert "5A" in [one.number for one in found.residues] and set(found.altloc) == {"", "A", "B"}
    frames = [found.positions_A + shift for shift in (0.0, 2.5, np.array([1, -2, 3]))]
    value = np.linspace(0, 30, len(found.residues))
    value[0] = np.nan
    write_ensemble(tmp_path / "out.cif", found, frames, value)

    def names(one):
        return [(c.chain.name, str(c.residue.seqid), c.residue.name, c.atom.name, c.atom.altloc) for c in one.all()]

    original, written = gemmi.read_structure(str(path)), gemmi.read_structure(str(tmp_path / "out.cif"))
    assert len(written) == 3 and all(names(one) == names(original[0]) for one in written)
    second = pdbx.get_structure(
        pdbx.CIFFile.read(tmp_path / "out.cif"), altloc="all", extra_fields=["b_factor"], use_author_fields=True
    )
    for number, frame in enumerate(frames):
        np.testing.assert_allclose([c.atom.pos.tolist() for c in written[number].all()], frame, atol=6e-4)
        np.testing.assert_allclose(second.coord[number], frame, atol=6e-4)
    np.testing.assert_allclose(second.b_factor, np.nan_to_num(value)[found.residue], atol=6e-3)
    assert second.res_id.tolist() == [found.residues[one].sequence for one in found.residue]


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"", "no atoms|not a readable"),
        (b"data_x\n_entry.id x\n", "no atoms"),
        (b"nonsense\0\xff", "not a readable atomic model|no atoms"),
        (b"data_x\nloop_\n_atom_site.id\n_atom_site.Cartn_x\n1", "not a readable atomic model"),
    ],
)
def test_files_without_atoms_are_refused_in_one_line(tmp_path, content, wanted):
    path = tmp_path / "bad.cif"
    path.write_bytes(content)
    with pytest.raises(InputError, match=wanted) as caught:
        read_atomic_model(path)
    assert str(path) in str(caught.value)


def test_names_places_and_crowds_that_cannot_be_are_refused(tmp_path):
    structure = protein()
    structure[0]["A"][2][1].pos = gemmi.Position(float("nan"), 0, 0)
    with pytest.raises(InputError, match="A:3 ALA: atom CA has no place"):
        read_atomic_model(write_protein(tmp_path / "nan.cif", structure))
    for part, told in (("chain", "A'"), ("atom", "C\tB"), ("altloc", ";"), ("icode", "_")):
        structure = protein()
        chain = structure[0]["A"]
        if part == "chain":
            chain.name = told
        elif part == "icode":
            chain[1].seqid = gemmi.SeqId(2, told)
        else:
            setattr(chain[1][4], "name" if part == "atom" else part, told)
        with pytest.raises(InputError, match=r"damaged: a chain, residue, atom or alternate is called|not a readable"):
            read_atomic_model(write_protein(tmp_path / f"{part}.cif", structure))
    for name in ("model.xyz", "model", "model.gz"):
        with pytest.raises(InputError, match="not an atomic model by its name"):
            read_atomic_model(tmp_path / name)
    with pytest.raises(InputError, match="file not found"):
        read_atomic_model(tmp_path / "model.cif")
    structure = protein()
    for cra in structure[0].all():
        cra.atom.pos = gemmi.Position(1, 1, 1)
    with pytest.raises(InputError, match="600 atoms lie in one place"):
        read_atomic_model(write_protein(tmp_path / "crowd.cif", structure))


# riding --------------------------------------------------------------------------------------------------------------


def affine(points: np.ndarray) -> np.ndarray:
    """Displacements of a motion that is linear everywhere: turned, stretched, sheared and shifted."""
    turned = Rotation.from_rotvec([0.3, -0.2, 0.4]).as_matrix() @ np.array([[1.1, 0.1, 0], [0, 0.95, 0], [0, 0.05, 1]])
    return points @ turned.T + [5.0, -3.0, 1.0] - points


def test_a_linear_motion_carries_every_atom_exactly(model, mesh):
    ride = ride_on(mesh, model, model.positions_A)
    assert ride.carried.all()
    moved = ride.moved_A(affine(mesh.vertices_A))
    np.testing.assert_allclose(moved, model.positions_A + affine(model.positions_A), atol=1e-4)


def test_atoms_move_as_the_density_of_their_cell_does(model, mesh):
    """Any displacement: the sum over corners, cell by cell, found here by trying every cell."""
    displacements = np.random.default_rng(0).normal(size=mesh.vertices_A.shape)
    moved = ride_on(mesh, model, model.positions_A).moved_A(displacements)
    for number in range(0, len(model), 37):
        corners = mesh.vertices_A[mesh.cells]
        edges = (corners[:, 1:] - corners[:, :1]).transpose(0, 2, 1)
        last = np.linalg.solve(edges, (model.positions_A[number] - corners[:, 0])[..., None])[..., 0]
        weight = np.column_stack([1 - last.sum(1), last])
        cell = int(weight.min(1).argmax())
        wanted = model.positions_A[number] + weight[cell] @ displacements[mesh.cells[cell]]
        np.testing.assert_allclose(moved[number], wanted, atol=1e-6)


def test_a_hinge_keeps_both_arms_rigid(model, mesh):
    """Chain B turns with the vertices about it, A rests: residues well inside are exact, bonds too."""
    turn = Rotation.from_rotvec([0, 0.5, 0]).as_matrix()
    pivot = np.array([2.0, 0, 0])
    swings = mesh.vertices_A[:, 0] > 3
    displacements = np.where(swings[:, None], (mesh.vertices_A - pivot) @ (turn - np.eye(3)).T, 0)
    moved = ride_on(mesh, model, model.positions_A).moved_A(displacements)
    far = np.abs(model.positions_A[:, 0] - 3) > 14  # than the width of a cell
    turned = (model.positions_A - pivot) @ turn.T + pivot
    wanted = np.where(model.positions_A[:, :1] > 3, turned, model.positions_A)
    np.testing.assert_allclose(moved[far], wanted[far], atol=1e-4)
    assert far.mean() > 0.3


def test_atoms_outside_follow_their_residue_or_their_chain(tmp_path, caplog):
    structure = protein()
    chain = structure[0]["A"]
    chain[0].add_atom(atom("CG", np.array([-14.0, 0, -60])))  # of a residue that is inside
    lone = gemmi.Residue()
    lone.name, lone.seqid = "HOH", gemmi.SeqId("301")
    lone.add_atom(atom("O", np.array([-14.0, -50, 0])))
    chain.add_residue(lone)
    found = read_atomic_model(write_protein(tmp_path / "out.cif", structure))
    far = np.linalg.norm(found.positions_A, axis=1) > 51
    assert far.sum() == 2
    mesh = bcc_mesh(mask_around(found.positions_A[~far]), PIXEL_SIZE_A, 12.0, None)
    ride = ride_on(mesh, found, found.positions_A)
    assert (ride.carried == ~far).all()
    assert "rest of their residue: A:1 ALA" in caplog.text and "nearest atoms of their chain: A:301 HOH" in caplog.text
    turn = Rotation.from_rotvec([0.2, 0.4, -0.3]).as_matrix()
    rigid = mesh.vertices_A @ (turn - np.eye(3)).T + [1.0, 2, 3]
    np.testing.assert_allclose(ride.moved_A(rigid), found.positions_A @ turn.T + [1.0, 2, 3], atol=1e-6)
    weights = ride.residue_weights(found)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-9)
    with pytest.raises(InputError, match="no atom lies in the mesh"):
        ride_on(mesh, found, found.positions_A + 500)


def test_rigid_residues_keep_their_shape_and_follow_the_field(model, mesh):
    displacements = affine(mesh.vertices_A)
    moved = ride_on(mesh, model, model.positions_A, rigid_residues=True).moved_A(displacements)
    exact = model.positions_A + affine(model.positions_A)
    for number in (0, 50, 119):
        own = model.residue == number
        rest, now = model.positions_A[own], moved[own]
        np.testing.assert_allclose(now.mean(0), exact[own].mean(0), atol=1e-6)
        arms = rest - rest.mean(0)
        turn = Rotation.align_vectors(exact[own] - exact[own].mean(0), arms)[0]
        np.testing.assert_allclose(now - now.mean(0), turn.apply(arms), atol=1e-5)
    free = Geometry(model).of_frame(exact)
    assert Geometry(model).of_frame(moved).bond_rms_A < free.bond_rms_A and free.bond_rms_A > 0.05


def test_a_residue_is_not_torn_between_segments(model):
    """Two free segments, the border through residues: all atoms of a residue go with one of them."""
    labels = np.broadcast_to((np.arange(BOX) - BOX // 2) * PIXEL_SIZE_A > 1.5, (BOX,) * 3).astype(np.int32)
    mask = mask_around(model.positions_A)
    mesh = bcc_mesh(mask, PIXEL_SIZE_A, 12.0, Segmentation(labels, (0, 1), ()))
    leaves = np.zeros(len(mesh.vertices_A))
    leaves[np.unique(mesh.cells[mesh.segment == 1])] = 10.0
    moved = ride_on(mesh, model, model.positions_A).moved_A(leaves[:, None] * [1.0, 0, 0])
    shift = (moved - model.positions_A)[:, 0]
    for number in range(len(model.residues)):
        own = shift[model.residue == number]
        assert np.ptp(own) < 1e-6 and min(abs(own[0]), abs(own[0] - 10)) < 1e-6
    assert {0, 10} == set(shift.round(6))


# geometry ------------------------------------------------------------------------------------------------------------


def test_bonds_angles_and_clashes_are_told(model):
    geometry = Geometry(model)
    chains = 5  # helices
    assert geometry.num_bonds == 5 * len(model.residues) - chains  # N-CA, CA-C, C-O, CA-CB, and peptides
    still = geometry.of_frame(model.positions_A)
    assert (still.bond_rms_A, still.angle_worst_deg, still.new_clashes) == (0, 0, 0)
    stretched = geometry.of_frame(1.1 * model.positions_A)
    assert stretched.bond_rms_A == pytest.approx(0.14, abs=0.01) and stretched.angle_rms_deg < 1e-6
    moved = model.positions_A.copy()
    moved[model.chain == "B"] -= [20.0, 0, 0]  # into the other chain
    into = geometry.of_frame(moved)
    assert into.bond_worst_A < 1e-9 and into.new_clashes > 10
    one = model.positions_A.copy()
    one[7] += [0, 0, 0.3]
    assert geometry.of_frame(one).bond_worst_A > 0.1 and geometry.of_frame(one).angle_worst_deg > 5


def test_the_second_readers_bonds_are_the_same(tmp_path):
    """By distance here; biotite takes them from its dictionary of residues."""
    import biotite.structure as struc

    found = read_atomic_model(write_protein(tmp_path / "made.cif", protein()))
    second = pdbx.get_structure(pdbx.CIFFile.read(tmp_path / "made.cif"), model=1)
    bonds = struc.connect_via_residue_names(second, inter_residue=False).as_array()[:, :2]
    own = {tuple(pair) for pair in Geometry(found)._bonds if found.residue[pair[0]] == found.residue[pair[1]]}
    assert own == {tuple(sorted(pair)) for pair in bonds.tolist()}


# placement -----------------------------------------------------------------------------------------------------------


def density(model, origin_A=(0.0, 0.0, 0.0), noise: float = 0.5) -> Map:
    exact = atoms_to_map(model.positions_A / PIXEL_SIZE_A, model.atomic_number.astype(float), BOX, 0.8)
    noisy = exact + noise * exact.std() * np.random.default_rng(0).normal(size=exact.shape)
    mask = mask_around(model.positions_A, 9.0)
    return Map(np.where(mask, noisy, 0).astype(np.float32), PIXEL_SIZE_A, origin_A)


@pytest.mark.parametrize("origin_A", [(0.0, 0.0, 0.0), (-HALF_A,) * 3, (37.0, -120.0, 5.0)])
@pytest.mark.parametrize("part", ["all", "A"])
def test_a_model_in_its_place_is_taken(tmp_path, model, origin_A, part):
    structure = protein()
    if part == "A":
        del structure[0]["B"]
    found = read_atomic_model(write_protein(tmp_path / "in.cif", structure, np.array(origin_A) + HALF_A))
    centred = check_placement(found, density(model, origin_A), "generate.atoms")
    np.testing.assert_allclose(centred, found.positions_A - origin_A - HALF_A, atol=1e-9)
    assert np.abs(centred[:5] - model.positions_A[:5]).max() < 2e-3


@pytest.mark.parametrize(
    ("change", "origin_A", "told"),
    [
        (lambda p: p + HALF_A + [10.0, 0, 0], (0, 0, 0), r"shifted by \(-(8|9|10|11)\.\d, .*\) A: fit it into the map"),
        (lambda p: p * [1, 1, -1] + HALF_A, (0, 0, 0), "mirrored along z: the map, or the model, is of the other hand"),
        (lambda p: p * [-1, 1, 1] + HALF_A, (0, 0, 0), "mirrored along x: the map, or the model, is of the other hand"),
        (lambda p: p, (0, 0, 0), "the model's zero is the box centre"),
        (lambda p: p + HALF_A, (37.0, -120.0, 5.0), "has an origin that the model was not placed by"),
        (lambda p: p[:, [1, 2, 0]] + HALF_A, (0, 0, 0), "no shift or mirroring makes it fit"),
    ],
)
def test_a_model_out_of_place_is_refused_with_the_reason(tmp_path, model, change, origin_A, told):
    structure = protein()
    for cra, place in zip(structure[0].all(), change(model.positions_A), strict=True):
        cra.atom.pos = gemmi.Position(*place)
    found = read_atomic_model(write_protein(tmp_path / "out.cif", structure))
    with pytest.raises(InputError, match=told) as caught:
        check_placement(found, density(model, tuple(map(float, origin_A))), "generate.atoms")
    assert str(caught.value).startswith(f"generate.atoms: {tmp_path / 'out.cif'}: does not lie in the map")
