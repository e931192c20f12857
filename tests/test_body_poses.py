"""Poses of single bodies: the body at rest in its own pose is seen where the flow has carried it in the particle's."""

from dataclasses import replace

import meshio
import numpy as np
import pandas as pd
import pytest
import torch
from hinged_bar import AXES, BarModel, angles
from particle_files import prepared_poses
from test_refined import a_change, distorted_star

from flexlib.imaging.maps import read_label_map, read_map, write_map
from flexlib.interpret import interpret
from flexlib.interpret.bodies import find_bodies
from flexlib.interpret.body_poses import posed_particles, with_body, write_body_poses
from flexlib.interpret.hinges import BodyMotions, body_motions
from flexlib.layout import InterpretFolder, ParticlesFolder, TrainFolder
from flexlib.model.flex_model import FlexModel
from flexlib.model.flow import FlowGenerator
from flexlib.model.rigid_bodies import States
from flexlib.particles import read_particles
from flexlib.particles.latents_write import write_latents_star
from flexlib.particles.star import read_tables
from flexlib.projection.op import VoxelTensors, project, view_vertices
from flexlib.records import InterpretationRecord, PreparedRecord
from flexlib.tetra.voxels import voxelise
from flexlib.workflow_support.settings import GenerateSettings, InterpretSettings

COUNT = 12
DROPPED = np.array([1, 7])
KEPT = np.setdiff1d(np.arange(COUNT), DROPPED)


@pytest.fixture(scope="module")
def moving():
    """A model of the bar in three pieces, its bodies and their motions."""
    model = BarModel(angles(60, 2))
    bodies = find_bodies(States.of_model(model), model.mesh.cells)
    model.latents = model.latents[: len(KEPT)]
    return model, bodies, body_motions(model, bodies, model.latents)


def images(model, particles, values, displacements_A=None):
    """Spectra of the bar's density, magnification and all, by the one projector of all stages."""
    matrices = np.array([group.magnification_matrix for group in particles.optics])[particles.optics_index]
    rotation = particles.rotation.copy()
    rotation[:, :2] = matrices.transpose(0, 2, 1) @ rotation[:, :2]
    voxels = voxelise(model.mesh, model.canonical > 0, model.pixel_size_A)
    tensors = VoxelTensors.from_mesh_voxels(voxels)
    px = view_vertices(
        torch.from_numpy(model.mesh.vertices_A),
        torch.from_numpy(rotation),
        torch.from_numpy(particles.origin_A / model.pixel_size_A),
        model.pixel_size_A,
        displacements_A,
    )
    return project(torch.from_numpy(values).float(), px.float(), tensors, "cubic", 2.0)


def difference(model, bodies, given, posed, body):
    """Relative difference of images of one body: carried by the flow in the input's poses, at rest in its own."""
    voxels = voxelise(model.mesh, model.canonical > 0, model.pixel_size_A)
    own = (bodies.label[voxels.cells] == body).all(1)[voxels.cell]
    values = np.where(own, model.canonical.ravel()[voxels.index], 0)
    carried = images(model, given, values, model.displacements_A(model.latents))
    at_rest = images(model, posed, values)
    return float((carried - at_rest).abs().norm() / carried.abs().norm())


def test_a_body_at_rest_in_its_pose_is_what_the_flow_shows(tmp_path, moving):
    """As written and read again; with a wrong sign anywhere it is not. Half the images are magnified unevenly."""
    model, bodies, motions = moving
    assert bodies.num == 3
    path = distorted_star(tmp_path / "in.star", COUNT)
    folder = prepared_poses(tmp_path / "prepared", path, KEPT)
    paths = [tmp_path / f"body_{body}.star" for body in range(3)]
    write_body_poses(folder, model, motions, paths)
    given = read_particles(path).subset(KEPT)
    tried = 0
    for body, written in enumerate(paths):
        posed = read_particles(written)
        np.testing.assert_allclose(posed.rotation[DROPPED], read_particles(path).rotation[DROPPED], atol=1e-9)
        assert difference(model, bodies, given, posed.subset(KEPT), body) < 1e-3
        if np.abs(motions.shift_A[:, body]).max() < 1e-3:
            continue  # it is at rest
        tried += 1
        back = BodyMotions(motions.rotation.transpose(0, 1, 3, 2), motions.shift_A)
        away = BodyMotions(motions.rotation, -motions.shift_A)
        other = BodyMotions(np.roll(motions.rotation, 1, 1), np.roll(motions.shift_A, 1, 1))
        for wrong in (back, away, other):
            told = with_body(posed_particles(folder, model), wrong, body).refined.subset(KEPT)
            assert difference(model, bodies, given, told, body) > 0.05
    assert tried == 2


def test_refined_poses_and_contrast_are_kept_below_the_bodies(tmp_path, moving):
    """With a pose refined by the model the body's is composed with that, not with the input's."""
    model, bodies, motions = moving
    path = distorted_star(tmp_path / "in.star", COUNT)
    folder = prepared_poses(tmp_path / "prepared", path, KEPT)
    refining = replace(model, pose=a_change(len(KEPT)))
    posed = posed_particles(folder, refining)
    out = tmp_path / "body.star"
    write_body_poses(folder, refining, motions, [out])
    again = read_particles(out).subset(KEPT)
    assert difference(model, bodies, posed.refined.subset(KEPT), again, 0) < 1e-3
    assert difference(model, bodies, posed.given.subset(KEPT), again, 0) > 0.05
    np.testing.assert_allclose(again.particle_scale, refining.pose.contrast, rtol=1e-6)


def test_all_columns_of_the_input_are_kept(tmp_path, moving):
    model, _, motions = moving
    path = distorted_star(tmp_path / "in.star", COUNT)
    folder = prepared_poses(tmp_path / "prepared", path, KEPT)
    write_body_poses(folder, model, motions, [tmp_path / "body.star"])
    before, after = read_tables(path).particles, read_tables(tmp_path / "body.star").particles
    assert list(after)[: len(before.columns)] == list(before)
    same = [name for name in before if not name.startswith(("rlnAngle", "rlnOrigin"))]
    pd.testing.assert_frame_equal(before[same], after[same])
    kept = {name: f"flexInput{name.removeprefix('rln')}" for name in before if name not in same}
    for name, own in kept.items():
        np.testing.assert_allclose(after[own], before[name])
    assert after["flexRotationChangeDeg"].isna().to_numpy().nonzero()[0].tolist() == DROPPED.tolist()
    assert "flexRotationStdErrDeg" not in after


# the stage -----------------------------------------------------------------------------------------------------------


def folders(root, model, latents):
    """What prepare and train leave of a model whose one latent turns the lower end, to first order."""
    particles = ParticlesFolder(root / "particles")
    prepared_poses(particles.path, distorted_star(root / "in.star", len(latents)), np.arange(len(latents)))
    record = PreparedRecord.read(particles.record)
    replace(record, full_pixel_size_A=model.pixel_size_A).write(particles.record)
    write_map(particles.full_mask, (model.canonical > 0).astype(np.float32), model.pixel_size_A)
    slope = (model.displacements_A(np.array([[1e-3, 0.0]])) / 1e-3).float()
    flow = FlowGenerator(slope, 1, 1, 4)
    with torch.no_grad():
        flow.linear.copy_(torch.eye(1))
    covariance = np.full((len(latents), 1, 1), 1e-6, np.float32)
    trained = FlexModel(model.mesh, flow, latents.astype(np.float32), model.canonical, model.box, model.pixel_size_A)
    trained.latent_covariance = covariance
    train = TrainFolder(root / "train")
    train.path.mkdir()
    trained.save(train.model)
    std_errs = {"flexLatentStdErr1": np.full(len(latents), 1e-3)}
    write_latents_star(particles.path, trained.latents, train.latents, extra=std_errs)
    return particles, train


def test_the_stage_writes_bodies_hinges_maps_and_poses(tmp_path, moving):
    model, _, _ = moving
    latents = 0.5 * angles(40, 1)
    particles, train = folders(tmp_path, model, latents)
    out = InterpretFolder(tmp_path / "interpret")
    out.path.mkdir()
    out.body_poses(3).write_text("of an earlier run")
    settings = (InterpretSettings(), GenerateSettings(align="density"))
    interpret(particles.path, train.path, out.path, *settings, train.latents)
    record, bodies, hinges = InterpretationRecord.read(out.record), pd.read_csv(out.bodies), pd.read_csv(out.hinges)
    assert record.num_bodies == len(bodies) == 2 and record.body_poses and not record.bodies_reason
    assert record.bodies_explained > 0.95 and record.bodies_bend < 0.1
    assert bodies["mass_share"].sum() == pytest.approx(1, abs=1e-5)
    (hinge,) = hinges.itertuples()
    assert hinge.kind == "hinge" and abs(np.array([hinge.axis_x, hinge.axis_y, hinge.axis_z]) @ AXES[0]) > 0.999
    assert record.hinge_range_deg == pytest.approx([hinge.range_deg], abs=1e-3)
    labels = read_label_map(out.labels).labels
    assert set(np.unique(labels)) == {0, 1, 2} and ((labels > 0) == (model.canonical > 0)).all()
    masks = [read_map(out.body_mask(number)).data for number in (1, 2)]
    assert all((mask[labels == number] == 1).all() for number, mask in enumerate(masks, 1))
    assert masks[0][labels == 2].mean() < 0.5 and len(read_particles(out.body_poses(2))) == 40
    assert not out.body_poses(3).exists()
    mesh = meshio.read(out.deformation)
    assert {"rotation_deg", "strain", "body"} <= set(mesh.cell_data) and read_map(out.rotation).data.max() > 3
    assert out.arrows.read_text().count(".arrow") == 1


def test_the_stage_says_that_nothing_moves(tmp_path, moving):
    model, _, _ = moving
    particles, train = folders(tmp_path, model, np.zeros((12, 1)))
    out = InterpretFolder(tmp_path / "interpret")
    settings = (InterpretSettings(), GenerateSettings())
    interpret(particles.path, train.path, out.path, *settings, train.latents)
    record = InterpretationRecord.read(out.record)
    assert (record.num_bodies, record.bodies_reason, record.body_poses) == (1, "nothing moves", False)
    assert len(pd.read_csv(out.bodies)) == 1 and pd.read_csv(out.hinges).empty
    assert not out.body_poses(1).exists() and ".arrow" not in out.arrows.read_text()
