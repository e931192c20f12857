"""Atoms along a series: they lie where the maps do, their errors are those of the latents, and files say so."""

from __future__ import annotations

from dataclasses import replace

import gemmi
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.spatial.transform import Rotation
from small_protein import protein, write_protein
from test_atoms import BOX, HALF_A, PIXEL_SIZE_A, density, mask_around

from flexlib.atoms.model import read_atomic_model
from flexlib.atoms.ride import ride_on
from flexlib.errors import InputError
from flexlib.generate.atoms import residue_motion_A
from flexlib.generate.command import main
from flexlib.generate.run import generate_series
from flexlib.imaging.maps import read_map, write_map
from flexlib.mesh.lattice import bcc_mesh
from flexlib.model.flex_model import FlexModel
from flexlib.model.flow import FlowGenerator
from flexlib.model.frame import MotionFrame
from flexlib.render import film, surface
from flexlib.simulate.signal import atoms_to_map
from flexlib.workflow_support.settings import GenerateSettings

ORIGIN_A = (12.0, -30.0, 7.0)


@pytest.fixture(scope="module", autouse=True)
def small_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(film, "_SIZE_PX", 120)
        patch.setattr(surface, "_SHARP_BOX", 40)
        yield


def _placed(path, volume):
    write_map(path, volume.data, PIXEL_SIZE_A, like=replace(volume, origin_A=ORIGIN_A))
    return path


def exact(centred_A, atoms):
    return atoms_to_map(centred_A / PIXEL_SIZE_A, atoms.atomic_number.astype(float), BOX, 0.8)


@pytest.fixture(scope="module")
def atoms(tmp_path_factory):
    """The model in its map's frame, whose header has an origin."""
    path = tmp_path_factory.mktemp("atoms") / "made.cif"
    return read_atomic_model(write_protein(path, protein(), np.array(ORIGIN_A) + HALF_A))


@pytest.fixture(scope="module")
def train(tmp_path_factory, atoms):
    """Chain B swings as the first latent says, in radians times ten, and all goes along y by the second."""
    folder = tmp_path_factory.mktemp("train")
    centred = read_atomic_model(write_protein(folder / "centred.cif", protein()))
    canonical = density(centred, noise=0.0)
    mesh = bcc_mesh(mask_around(centred.positions_A, 9.0), PIXEL_SIZE_A, 12.0, None)
    swing = np.clip((mesh.vertices_A[:, 0] - 2) / 6, 0, 1)[:, None] * np.cross(
        [0.0, 0.1, 0], mesh.vertices_A - [5, 0, 0]
    )
    fields = np.stack([swing, np.broadcast_to([0.0, 1, 0], swing.shape)]).astype(np.float32)
    flow = FlowGenerator(torch.from_numpy(fields), 2, 1, 4)
    with torch.no_grad():
        flow.linear.copy_(torch.eye(2))
    generator = np.random.default_rng(0)
    latents = generator.normal(size=(400, 2)).astype(np.float32)
    model = FlexModel(mesh, flow, latents, canonical.data, BOX, PIXEL_SIZE_A)
    root = generator.normal(size=(400, 2, 2)) * 0.2
    model.latent_covariance = (root @ root.transpose(0, 2, 1)).astype(np.float32)
    model.save(folder / "model.pt")
    placed = read_map(_placed(folder / "canonical.mrc", canonical))
    assert placed.corner_A == ORIGIN_A
    return folder


@pytest.mark.parametrize("align", ["density", "rigid_core"])
def test_atoms_and_maps_of_a_frame_superpose(train, atoms, tmp_path, align):
    """The model's density at each frame is the frame's map, however the series is aligned, in the header's frame."""
    points = np.array([[-1.5, 3.0], [0, 0], [1.5, 3.0]])
    generate_series(train, tmp_path, GenerateSettings(atoms=atoms.path, align=align), points=points)
    structure = gemmi.read_structure(str(tmp_path / "at/ensemble.cif"))
    rest = read_map(train / "canonical.mrc")
    for number, frame in enumerate(structure):
        volume = read_map(tmp_path / f"at/frame_{number:03d}.mrc")
        moved = np.array([cra.atom.pos.tolist() for cra in frame.all()])
        own = exact(moved - ORIGIN_A - HALF_A, atoms)
        here, before = (np.corrcoef(own.ravel(), one.data.ravel())[0, 1] for one in (volume, rest))
        assert here > 0.97, (number, here)
        assert number == 1 or here > before + 0.03
    table = pd.read_csv(tmp_path / "at/geometry.csv")
    assert list(table.frame) == [0, 1, 2] and table.bond_rms_A[1] < 1e-3
    assert table.clashes[1] == table.clashes.min() or table.new_clashes[1] == 0


@pytest.fixture(scope="module")
def written(train, atoms, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    generate_series(train, out, GenerateSettings(frames=3, atoms=atoms.path, align="density"))
    return out


def test_residues_are_told_with_their_motion_and_range(written, atoms):
    ensemble = gemmi.read_structure(str(written / "axis_1/ensemble.cif"))
    table = pd.read_csv(written / "axis_1/residues.csv", dtype={"residue": str})
    assert table.chain.tolist() == [one.chain for one in atoms.residues]
    assert table.residue.tolist() == [one.number for one in atoms.residues]
    assert (table.atoms == 5).all() and (table.outside == 0).all()
    places = np.array([[cra.atom.pos.tolist() for cra in one.all()] for one in ensemble])
    middle = np.stack([places[:, atoms.residue == number].mean(1) for number in range(len(table))], 1)
    np.testing.assert_allclose(table.range_A, np.linalg.norm(middle[-1] - middle[0], axis=1), atol=5e-3)
    b_factor = np.array([cra.atom.b_iso for cra in ensemble[0].all()])
    np.testing.assert_allclose(b_factor, table.rms_displacement_A.to_numpy()[atoms.residue], atol=6e-3)
    still = (table.chain == "A") & (table.range_A < 1e-3)
    assert still.sum() > 20 and table.range_A.max() > 5
    np.testing.assert_allclose(table.rms_displacement_A[still], 1, atol=0.1)  # along y, by the second latent
    second = pd.read_csv(written / "axis_2/residues.csv")
    assert (second.std_err_A == table.std_err_A).all() and np.ptp(second.range_A) < 1e-3


@pytest.mark.parametrize("align", ["density", "rigid_core"])
def test_standard_errors_are_those_of_drawn_latents(train, atoms, align):
    """Monte Carlo: latents drawn from each particle's posterior scatter the residues by what is told."""
    model = FlexModel.load(train)
    model.flow.linear.data *= 0.3  # nearly linear within a posterior: the frame turns with the core
    motion = MotionFrame.of(model, align)
    ride = ride_on(model.mesh, atoms, atoms.positions_A - ORIGIN_A - HALF_A)
    rms_A, std_err_A = residue_motion_A(atoms, ride, motion)
    generator, weights = np.random.default_rng(1), ride.residue_weights(atoms)

    def residues_A(latents):
        return np.stack([weights @ one for one in motion.displacements_A(latents.astype(np.float32)).numpy()])

    draws, square = 40, 0.0
    middle = residues_A(model.latents)
    for _ in range(draws):
        noise = np.einsum("nij,nj->ni", np.linalg.cholesky(model.latent_covariance + 1e-9 * np.eye(2)),
                          generator.normal(size=model.latents.shape))  # fmt: skip
        square = square + ((residues_A(model.latents + noise) - middle) ** 2).sum(2).mean(0) / draws
    np.testing.assert_allclose(std_err_A, np.sqrt(square), rtol=0.08, atol=1e-3)
    np.testing.assert_allclose(rms_A, np.sqrt(((middle - middle.mean(0)) ** 2).sum(2).mean(0)), rtol=1e-4, atol=1e-4)
    assert std_err_A.max() > 3 * std_err_A.min() > 0


def test_a_model_without_posteriors_has_no_errors(train, atoms, tmp_path):
    model = FlexModel.load(train)
    model.latent_covariance = None
    model.save(tmp_path / "model.pt")
    _placed(tmp_path / "canonical.mrc", read_map(train / "canonical.mrc"))
    points = np.zeros((1, 2))
    generate_series(tmp_path, tmp_path / "out", GenerateSettings(atoms=atoms.path), points=points)
    table = pd.read_csv(tmp_path / "out/at/residues.csv")
    assert table.std_err_A.isna().all() and table.rms_displacement_A.notna().all()


def test_chimerax_shows_atoms_and_maps_of_the_same_frame(written):
    script = (written / "axis_1.cxc").read_text().splitlines()
    assert "open axis_1/ensemble.cif coordsets true" in script
    frames = [line for line in script if line.startswith("perframe")]
    assert frames[0].split('"')[1].startswith("vseries play #1 jumpTo $1; ")
    assert frames[0].split('"')[1].endswith("; coordset #2 $3") and "range 0,2 range 0,2 range 1,3" in frames[0]
    assert 'jumpTo $1; coordset #2 $2" range 2,0 range 3,1' in frames[3]
    assert not any("direction oscillate" in line for line in script)


def test_the_command_carries_atoms(train, atoms, tmp_path, capsys):
    given = [str(train), str(tmp_path / "out"), "--at", "1,0", "--at", "-1,0", "--atoms", str(atoms.path)]
    assert main([*given, "--rigid-residues", "--align", "density"]) == 0
    free = tmp_path / "free"
    assert main([given[0], str(free), *given[2:], "--align", "density"]) == 0
    rigid, free = (pd.read_csv(path / "at/geometry.csv") for path in (tmp_path / "out", free))
    assert (rigid.bond_rms_A < free.bond_rms_A).all()
    assert main([*given[:2], "--at", "1,0", "--atoms", str(train / "model.pt")]) == 1
    assert "ERROR" in capsys.readouterr().err


def test_a_model_elsewhere_is_refused_before_any_map(train, tmp_path):
    away = write_protein(tmp_path / "away.cif", protein(), np.array(ORIGIN_A) + HALF_A + [12.0, 0, 0])
    with pytest.raises(InputError, match=r"generate.atoms: .*away.cif: does not lie in the map.*shifted by \(-1[0-3]"):
        generate_series(train, tmp_path / "out", GenerateSettings(atoms=away))
    assert not (tmp_path / "out").exists()
    turned = protein()
    for cra in turned[0].all():
        cra.atom.pos = gemmi.Position(*(Rotation.from_rotvec([2.0, 1, 0]).apply(cra.atom.pos.tolist()) + HALF_A))
    with pytest.raises(InputError, match="does not lie in the map"):
        generate_series(
            train, tmp_path / "out", GenerateSettings(atoms=write_protein(tmp_path / "t.cif", turned, ORIGIN_A))
        )
