"""Segments of the mask from an atomic model: chains and ranges of residues, by the nearest atom."""

from __future__ import annotations

import gemmi
import numpy as np
import pytest
from small_protein import protein, write_protein
from test_atoms import BOX, HALF_A, PIXEL_SIZE_A, density, mask_around

from flexlib.atoms.model import read_atomic_model
from flexlib.errors import InputError
from flexlib.imaging.maps import Map, read_label_map, write_map
from flexlib.layout import MeshFolder, ParticlesFolder
from flexlib.mesh.build import build_mesh, make_mesh
from flexlib.mesh.segments_of_model import atom_segments, labels_of_model
from flexlib.tetra.io import read_mesh
from flexlib.workflow_support.checks import check_config, input_paths
from flexlib.workflow_support.connections import SegmentPart, check_mesh_keys, parse_segments
from flexlib.workflow_support.settings import MeshSettings, make_settings

ORIGIN_A = (12.0, -30.0, 7.0)


@pytest.fixture(scope="module")
def atoms(tmp_path_factory):
    path = tmp_path_factory.mktemp("atoms") / "made.cif"
    return read_atomic_model(write_protein(path, protein(), np.array(ORIGIN_A) + HALF_A))


@pytest.fixture(scope="module")
def mask(atoms) -> np.ndarray:
    return mask_around(atoms.positions_A - ORIGIN_A - HALF_A, 9.0)


@pytest.fixture(scope="module")
def consensus(tmp_path_factory) -> Map:
    centred = read_atomic_model(write_protein(tmp_path_factory.mktemp("map") / "made.cif", protein()))
    return density(centred, ORIGIN_A)


SEGMENTS = ("A:1-54", "B:31-100,A:61-90")


@pytest.mark.parametrize("segments", [(), SEGMENTS, ("B", "A")])
def test_each_voxel_has_the_segment_of_the_nearest_atom_in_one(atoms, mask, consensus, segments):
    labels = labels_of_model(atoms.path, consensus, mask, segments)
    of_residue = {
        (): lambda one: 1 if one.chain == "A" else 2,
        ("B", "A"): lambda one: 1 if one.chain == "B" else 2,
        SEGMENTS: lambda one: 1 if one.chain == "A" and one.sequence <= 54 else 2 if one.sequence > 30 else 0,
    }[segments]
    wanted = np.array([of_residue(one) for one in atoms.residues])[atoms.residue]
    assert (labels[~mask] == -1).all() and set(labels[mask]) == {1, 2}
    voxels = np.argwhere(mask)
    for z, y, x in voxels[:: len(voxels) // 150]:
        place_A = np.array([x, y, z]) * PIXEL_SIZE_A + ORIGIN_A
        distance = np.where(wanted > 0, np.linalg.norm(atoms.positions_A - place_A, axis=1), np.inf)
        near = wanted[distance < distance.min() + 1e-6]
        assert labels[z, y, x] in near


def test_a_mesh_of_chains_that_move_apart(atoms, mask, consensus, tmp_path):
    """From the stage's own files: two sub-meshes, joined by nothing, and their map."""
    particles = ParticlesFolder(tmp_path / "particles")
    write_map(particles.consensus, consensus.data, PIXEL_SIZE_A, like=consensus)
    write_map(particles.mask, mask.astype(np.float32), PIXEL_SIZE_A, like=consensus)
    settings = MeshSettings(cells=10, segmentation=atoms.path, connections="1, 2")
    build_mesh(particles.path, tmp_path / "mesh", settings)
    mesh = read_mesh(MeshFolder(tmp_path / "mesh").mesh)
    assert set(mesh.segment) == {1, 2}
    corners = [set(mesh.cells[mesh.segment == one].ravel()) for one in (1, 2)]
    assert not corners[0] & corners[1]
    written = read_label_map(MeshFolder(tmp_path / "mesh").segments).labels
    np.testing.assert_array_equal(written[mask], labels_of_model(atoms.path, consensus, mask, ())[mask])


@pytest.mark.parametrize(
    ("segments", "told"),
    [
        (("A", "C"), r"mesh.segments: 'C': .*made.cif has no chain C; its chains are A, B"),
        (("A:200-300",), r"mesh.segments: 'A:200-300': chain A of .*made.cif has no residue 200-300"),
        (("A:1-40", "B,A:40-60"), r"'B,A:40-60' and 'A:1-40' both have residue A:40 ALA of .*made.cif"),
    ],
)
def test_segments_that_do_not_fit_the_model_are_refused(atoms, mask, consensus, segments, told):
    with pytest.raises(InputError, match=told):
        labels_of_model(atoms.path, consensus, mask, segments)


def test_a_model_that_is_not_in_the_map_is_refused(mask, consensus, tmp_path):
    away = write_protein(tmp_path / "away.pdb", protein(), np.array(ORIGIN_A))
    with pytest.raises(InputError, match=r"mesh.segmentation: .*away.pdb: does not lie in the map.*box centre|shifted"):
        make_mesh(consensus, mask, MeshSettings(cells=10, segmentation=away))


def test_segments_are_checked_before_any_job(tmp_path):
    assert parse_segments(("A", "B, C:7", "D:-5--1,E:-3-20")) == [
        [SegmentPart("A", None)],
        [SegmentPart("B", None), SegmentPart("C", (7, 7))],
        [SegmentPart("D", (-5, -1)), SegmentPart("E", (-3, 20))],
    ]
    for text, told in (("A:9-1", "the range 9-1 is empty"), ("A:", "not understood"), ("", "not understood")):
        with pytest.raises(InputError, match=rf"mesh.segments: '{text}'.*{told}"):
            check_mesh_keys(MeshSettings(segmentation=tmp_path / "a.cif", segments=(text,)))
    with pytest.raises(InputError, match=r"mesh.segments: name the atomic model"):
        check_mesh_keys(MeshSettings(segments=("A",)))
    labels = np.ones((BOX,) * 3, np.float32)
    write_map(tmp_path / "labels.mrc", labels, PIXEL_SIZE_A)
    settings = MeshSettings(cells=10, segmentation=tmp_path / "labels.mrc", segments=("A",))
    with pytest.raises(InputError, match=r"mesh.segments: .*labels.mrc is no atomic model"):
        make_mesh(Map(labels, PIXEL_SIZE_A), labels > 0, settings)


def test_the_config_has_models_and_segments():
    config = {"name": "x", "particles": "p.star", "consensus": "c.mrc"}
    config |= {"mesh": {"segmentation": "m.cif", "segments": ["A", "B:1-20,C"]}, "generate": {"atoms": "m.pdb"}}
    checked = check_config(config)
    paths = {key: str(path) for key, path in input_paths(checked)}
    assert paths["mesh.segmentation"] == "m.cif" and paths["generate.atoms"] == "m.pdb"
    assert make_settings(MeshSettings, {**checked["mesh"], "cells": 20}).segments == ("A", "B:1-20,C")


def test_insertion_codes_belong_to_their_number(tmp_path):
    structure = protein()
    structure[0]["A"][5].seqid = gemmi.SeqId(5, "A")
    path = write_protein(tmp_path / "in.cif", structure, np.array(ORIGIN_A) + HALF_A)
    found = read_atomic_model(path)
    segment = atom_segments(found, ("A:5", "A:7-90,B"))
    assert {str(found.residues[one]) for one in found.residue[segment == 1]} == {"A:5 ALA", "A:5A ALA"}
    assert (segment == 0).sum() == 4 * 5  # residues 1 to 4
