"""Refined poses: what a change does to a view, and the files that carry it to RELION, CryoSPARC and another run."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import starfile
import torch
import yaml
from particle_files import COUNT, STAR_TAIL, cs_records, prepared_poses, save_cs, star_rows, write_relion_star
from scipy.linalg import expm
from scipy.spatial.transform import Rotation

from flexlib.errors import InputError
from flexlib.images.noise import Calibration
from flexlib.images.sources import PreparedImages
from flexlib.layout import TrainFolder
from flexlib.mesh.lattice import bcc_mesh
from flexlib.model.flex_model import FlexModel
from flexlib.model.flow import FlowGenerator, rigid_modes_A
from flexlib.particles import read_particles
from flexlib.particles.cs_file import read_cs_file
from flexlib.particles.pose_change import PoseChange
from flexlib.particles.refined_write import refined_particles, write_refined_cs, write_refined_star
from flexlib.particles.star import read_tables
from flexlib.particles.star_text import read_star_text
from flexlib.particles.star_write import write_star
from flexlib.train.results import write_refined

DATA = Path(__file__).parent / "data"
KEPT = np.array([0, 2, 3, 5, 6, 9, 11])
DROPPED = np.setdiff1d(np.arange(COUNT), KEPT)
POINTS_A = np.random.default_rng(3).normal(size=(20, 3)) * 60
ANGLES = ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")


def a_change(count, seed=0, angle=0.1, contrast=True):
    """Of ``count`` particles, ``angle`` radians about each axis and some Angstrom."""
    rng = np.random.default_rng(seed)
    factor = rng.uniform(0.7, 1.3, count) if contrast else np.ones(count)
    turn, shift_A = angle * rng.normal(size=(count, 3)), 3 * rng.normal(size=(count, 2))
    return PoseChange(turn.astype(np.float32), shift_A.astype(np.float32), factor.astype(np.float32))


def errors(count):
    """Standard errors of rotations and shifts."""
    return 0.01 + 0.001 * np.arange(count), 0.5 + 0.1 * np.arange(count)


def cross(vector):
    x, y, z = vector
    return np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])


def seen_A(particles, change=None):
    """(n, points, 2) where the particles see the points: the definition, written out."""
    views = []
    for i in range(len(particles)):
        turn, shift_A = np.eye(3), np.zeros(2)
        if change is not None:
            turn, shift_A = expm(cross(change.rotation_rad[i].astype(float))), change.shift_A[i]
        views.append((POINTS_A @ (turn @ particles.rotation[i]).T)[:, :2] - particles.origin_A[i] + shift_A)
    return np.array(views)


def for_everyone(change, kept=KEPT, count=COUNT):
    """The change of the whole file: none of dropped particles."""
    whole = PoseChange.none(count)
    arrays = {name: getattr(whole, name).astype(np.float64) for name in ("rotation_rad", "shift_A", "contrast")}
    for name, array in arrays.items():
        array[kept] = getattr(change, name)
    return PoseChange(**arrays)


def write(folder, change, out):
    """Write the star, and of a .cs input also the .cs; the files written."""
    refined = refined_particles(folder, change, *errors(len(change)))
    write_refined_star(refined, out.with_suffix(".star"))
    return [out.with_suffix(".star"), *([out.with_suffix(".cs")] * write_refined_cs(refined, out.with_suffix(".cs")))]


# what comes back -----------------------------------------------------------------------------------------------------


def relion_3_0(path):
    """One table, origins in pixels, pixel size from detector and magnification; without scale."""
    angles = np.random.default_rng(5).uniform(-170, 170, (COUNT, 3))
    columns = {name: angles[:, axis] for axis, name in enumerate(ANGLES)}
    shifts_px = np.random.default_rng(6).normal(scale=2, size=(COUNT, 2))
    columns |= {"rlnOriginX": shifts_px[:, 0], "rlnOriginY": shifts_px[:, 1]}
    optics = {"rlnVoltage": 300.0, "rlnSphericalAberration": 2.7, "rlnAmplitudeContrast": 0.1}
    optics |= {"rlnDetectorPixelSize": 5.0, "rlnMagnification": 35000.0}  # 1.43 A per pixel
    names = [f"{i + 1:06d}@a.mrcs" for i in range(COUNT)]
    frame = pd.DataFrame({"rlnImageName": names, **columns, "rlnDefocusU": 1e4, "rlnDefocusV": 9e3, **optics})
    write_star({"images": frame}, path)
    return path


def without_origins(path):
    write_relion_star(path)
    text = path.read_text().replace("rlnOriginX", "someX").replace("rlnOriginY", "someY")
    path.write_text(text)
    return path


def with_scales(path):
    table = read_tables(relion_3_0(path)).particles
    write_star({"particles": table.assign(flexScale=np.linspace(0.5, 1.5, COUNT))}, path)
    return path


def with_alpha(path):
    records = cs_records()
    kinds = [*[(name, records.dtype[name]) for name in records.dtype.names], ("alignments3D/alpha", "<f4")]
    new = np.zeros(COUNT, kinds)
    for name in records.dtype.names:
        new[name] = records[name]
    new["alignments3D/alpha"] = np.linspace(0.5, 1.5, COUNT)
    new["alignments3D/psize_A"] = 3.0  # aligned on a coarser grid than the images'
    return save_cs(path, new)


INPUTS = {
    "RELION 3.1": lambda folder: write_relion_star(folder / "in.star"),
    "RELION 3.0": lambda folder: relion_3_0(folder / "in.star"),
    "no origins": lambda folder: without_origins(folder / "in.star"),
    "scales": lambda folder: with_scales(folder / "in.star"),
    "cs": lambda folder: save_cs(folder / "in.cs", cs_records()),
    "cs with alpha": lambda folder: with_alpha(folder / "in.cs"),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_what_is_written_is_read_again(tmp_path, kind):
    """The poses that the definition gives, from every file that is written, and from a second run's as well."""
    path = INPUTS[kind](tmp_path)
    change = a_change(len(KEPT))
    given, whole = read_particles(path), for_everyone(change)
    expected = whole.of(given)
    for out in write(prepared_poses(tmp_path / "prepared", path, KEPT), change, tmp_path / "out"):
        again = read_particles(out)
        tolerance = 1e-7 if out.suffix == ".star" else 1e-6  # nine digits, or CryoSPARC's float32
        np.testing.assert_allclose(again.rotation, expected.rotation, atol=tolerance)
        np.testing.assert_allclose(again.origin_A, expected.origin_A, atol=10 * tolerance)
        np.testing.assert_allclose(again.particle_scale, expected.particle_scale, rtol=1e-6)
        np.testing.assert_allclose(seen_A(again), seen_A(given, whole), atol=3e2 * tolerance)
        np.testing.assert_array_equal(again.image_index, given.image_index)

        more = a_change(len(KEPT), seed=1)
        (second, *_) = write(prepared_poses(tmp_path / out.suffix, out, KEPT), more, tmp_path / "second")
        twice = for_everyone(more).of(again)
        np.testing.assert_allclose(read_particles(second).rotation, twice.rotation, atol=tolerance)
        np.testing.assert_allclose(read_particles(second).particle_scale, twice.particle_scale, rtol=1e-6)


WRONG = {
    "hand": lambda change, rotation: replace(change, rotation_rad=change.rotation_rad * [-1, -1, 1]),
    "sign of the rotation": lambda change, rotation: replace(change, rotation_rad=-change.rotation_rad),
    "sign of the shift": lambda change, rotation: replace(change, shift_A=-change.shift_A),
    # R exp(w) is exp(R w) R
    "side": lambda change, rotation: replace(
        change, rotation_rad=np.einsum("nij,nj->ni", rotation, change.rotation_rad)
    ),
    "axes of the shift": lambda change, rotation: replace(change, shift_A=change.shift_A[:, ::-1]),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_update_moves_points_by_a_thousand_times_the_tolerance(tmp_path, what):
    path = write_relion_star(tmp_path / "in.star")
    given, change = read_particles(path), a_change(COUNT)
    wrong = WRONG[what](change, given.rotation)
    folder = prepared_poses(tmp_path / "prepared", path, np.arange(COUNT))
    (out,) = write(folder, wrong, tmp_path / "out")
    assert np.abs(seen_A(read_particles(out)) - seen_A(given, change)).max((1, 2)).min() > 0.3


# what stays as it was ------------------------------------------------------------------------------------------------


def test_star_keeps_all_else_and_the_old_poses(tmp_path):
    path = write_relion_star(tmp_path / "in.star")
    change = a_change(len(KEPT))
    (out,) = write(prepared_poses(tmp_path / "prepared", path, KEPT), change, tmp_path / "out")
    before, after = path.read_text(), out.read_text()
    head = before[: before.index("_someoneElses")]
    assert after.startswith(head) and after.endswith(STAR_TAIL)
    text, given = read_star_text(out), read_star_text(path)
    poses = (*ANGLES, "rlnOriginXAngst", "rlnOriginYAngst")
    added = text.particles.labels[len(given.particles.labels) :]
    assert "flexInputAngleRot" in added and not any("Prior" in name for name in text.particles.labels)
    rows = zip(*(list(t.cells(t.particles, np.arange(COUNT))) for t in (given, text)), star_rows(), strict=True)
    for row, (old, new, _) in enumerate(rows):
        old, new = (dict(zip(t.particles.labels, cells, strict=True)) for t, cells in ((given, old), (text, new)))
        for name, value in old.items():
            if name not in poses:
                assert new[name] == value
            else:
                assert new["flexInput" + name[3:]] == value
                assert (new[name] == value) == (row in DROPPED)
    table = starfile.read(out)["particles"]
    rotation_error, shift_error_A = errors(len(KEPT))
    sizes = {
        "flexRotationChangeDeg": np.rad2deg(np.linalg.norm(change.rotation_rad, axis=1)),
        "flexShiftChangeAngst": np.linalg.norm(change.shift_A, axis=1),
        "flexRotationStdErrDeg": np.rad2deg(rotation_error),
        "flexShiftStdErrAngst": shift_error_A,
        "flexContrast": change.contrast,
    }
    for name, values in sizes.items():
        np.testing.assert_allclose(table[name].to_numpy()[KEPT], values, rtol=1e-6)
        assert table[name][DROPPED].isna().all()
    assert "rlnRandomSubset" not in table

    folder = prepared_poses(tmp_path / "second", out, KEPT, half_sets="random")
    (again,) = write(folder, a_change(len(KEPT), seed=2), tmp_path / "again")
    renewed = starfile.read(again)["particles"]
    assert list(renewed) == [*table, "flexInputScale", "rlnRandomSubset"]  # replaced, not doubled
    for name in poses:
        np.testing.assert_allclose(renewed["flexInput" + name[3:]], table[name])
    assert renewed["rlnRandomSubset"][KEPT].tolist() == [1, 2, 1, 2, 1, 2, 1]


def test_particles_that_do_not_change_keep_their_text(tmp_path):
    path = write_relion_star(tmp_path / "in.star")
    (out,) = write(prepared_poses(tmp_path / "prepared", path, KEPT), PoseChange.none(len(KEPT)), tmp_path / "out")
    written = [line for line in out.read_text().splitlines() if "@Extract" in line]
    for line, given in zip(written, star_rows(), strict=True):
        assert line.startswith(given.rstrip() + " ")


@pytest.mark.parametrize("layout", ["numpy", "compressed"])
def test_cs_keeps_all_else_and_the_old_poses(tmp_path, layout):
    path = tmp_path / "in.cs"
    if layout == "numpy":
        save_cs(path, cs_records())
    else:
        shutil.copy(DATA / "compressed_stream.cs", path)
    given = read_cs_file(path)
    kept = np.arange(len(given))[1:]
    change = a_change(len(kept))
    folder = prepared_poses(tmp_path / "prepared", path, kept)
    _, out = write(folder, change, tmp_path / "particles_refined")
    table = read_cs_file(out)
    assert table.names[: len(given.names)] == given.names and (table.records is None) == (layout == "compressed")
    for name in given.names:
        same = name not in ("alignments3D/pose", "alignments3D/shift")
        np.testing.assert_array_equal(
            table.column(name)[: None if same else 1], given.column(name)[: None if same else 1]
        )
        assert table.column(name).dtype == given.column(name).dtype
        if not same:
            np.testing.assert_array_equal(table.column("flex/input_" + name[13:]), given.column(name))
            assert (table.column(name)[1:] != given.column(name)[1:]).all()
    np.testing.assert_allclose(table.column("alignments3D/alpha")[kept], change.contrast)
    np.testing.assert_allclose(table.column("flex/shift_change_A")[1:], np.linalg.norm(change.shift_A, axis=1), 1e-6)
    assert np.isnan(table.column("flex/rotation_std_err_deg")[0])
    group = yaml.safe_load(out.with_suffix(".csg").read_text())
    assert set(group["results"]) == {name.split("/")[0] for name in given.names if "/" in name}  # none of ours
    assert group["results"]["alignments3D"] == {
        "metafile": ">particles_refined.cs", "num_items": len(given), "type": "particle.alignments3D"
    }  # fmt: skip


def test_poses_of_a_passthrough_file_come_into_the_cs(tmp_path):
    records = cs_records()
    names = records.dtype.names
    poses = ["uid", *(name for name in names if name.startswith("alignments3D/"))]
    path = save_cs(tmp_path / "in.cs", records[[name for name in names if name not in poses or name == "uid"]])
    other = save_cs(tmp_path / "passthrough.cs", records[poses][::-1])
    change = a_change(len(KEPT))
    folder = prepared_poses(tmp_path / "prepared", path, KEPT, passthrough=other)
    _, out = write(folder, change, tmp_path / "out")
    expected = for_everyone(change).of(read_particles(path, other))
    for passthrough in (None, other):  # whose poses are the old ones
        again = read_particles(out, passthrough)
        np.testing.assert_allclose(again.rotation, expected.rotation, atol=1e-6)
        np.testing.assert_array_equal(again.half_set, expected.half_set)


def test_another_number_of_particles_is_refused(tmp_path):
    path = write_relion_star(tmp_path / "in.star")
    folder = prepared_poses(tmp_path / "prepared", path, KEPT)
    with pytest.raises(ValueError, match="changes of 3 particles, with their errors, for 7 prepared ones"):
        refined_particles(folder, a_change(3), *errors(3))
    path.write_text(path.read_text().replace(star_rows()[4] + "\n", ""))
    with pytest.raises(InputError, match=r"in\.star: 11 particles, but prepare read 12"):
        refined_particles(folder, a_change(len(KEPT)), *errors(len(KEPT)))


def test_training_writes_the_files_and_removes_old_ones(tmp_path):
    path = save_cs(tmp_path / "in.cs", cs_records())
    folder, out = prepared_poses(tmp_path / "prepared", path, KEPT), TrainFolder(tmp_path / "train")
    change = a_change(len(KEPT))
    write_refined(out, folder, change, *errors(len(KEPT)))
    expected = for_everyone(change).of(read_particles(path)).rotation
    for file in (out.refined, out.refined_cs):
        np.testing.assert_allclose(read_particles(file).rotation, expected, atol=1e-6)
    write_refined(out, folder, change)  # errors that nobody knows
    assert np.isnan(read_cs_file(out.refined_cs).column("flex/shift_std_err_A")).all()
    write_refined(out, folder, None)
    assert not list(out.path.iterdir())


# symmetry, magnification ---------------------------------------------------------------------------------------------


def test_with_symmetry_a_particle_changes_by_the_mean_over_its_copies(tmp_path):
    """All copies see the same change of the view: the written pose is any copy's, changed and turned back."""
    path = write_relion_star(tmp_path / "in.star")
    folder = prepared_poses(tmp_path / "prepared", path, KEPT, symmetry="C3")
    mean, scatter = a_change(len(KEPT)), a_change(3 * len(KEPT), seed=4, angle=0.02)
    jitter = {
        name: getattr(scatter, name).reshape(len(KEPT), 3, -1).astype(np.float64)
        for name in ("rotation_rad", "shift_A", "contrast")
    }
    copies = {
        name: (getattr(mean, name).reshape(len(KEPT), 1, -1) + values - values.mean(1, keepdims=True)).squeeze()
        for name, values in jitter.items()
    }
    change = PoseChange(
        copies["rotation_rad"].reshape(-1, 3), copies["shift_A"].reshape(-1, 2), copies["contrast"].ravel()
    )
    (out,) = write(folder, change, tmp_path / "out")
    again, given = read_particles(out), read_particles(path)
    assert len(again) == COUNT
    np.testing.assert_allclose(seen_A(again), seen_A(given, for_everyone(mean)), atol=3e-4)
    table = read_tables(out).particles
    error_A = errors(3 * len(KEPT))[1].reshape(-1, 3).mean(1)
    np.testing.assert_allclose(table["flexShiftStdErrAngst"].to_numpy()[KEPT], error_A, rtol=1e-6)
    expanded = read_particles(folder / "particles.star")
    alike = PoseChange(*(np.repeat(getattr(mean, name), 3, 0) for name in ("rotation_rad", "shift_A", "contrast")))
    turned_back = alike.of(expanded).rotation[2::3] @ expanded.rotation[2::3].transpose(0, 2, 1) @ given.rotation[KEPT]
    np.testing.assert_allclose(again.rotation[KEPT], turned_back, atol=1e-6)


DISTORTED = ((1.03, 0.02), (0.01, 0.96))
TRAIN_PIXEL_A = 2.0


def distorted_star(path, count=COUNT):
    """Two optics groups, the second of another pixel size and with a magnification matrix."""
    matrix = {f"rlnMagMat{i}{j}": [float(i == j), DISTORTED[i][j]] for i in (0, 1) for j in (0, 1)}
    optics = {"rlnOpticsGroup": [1, 2], "rlnOpticsGroupName": ["a", "b"], "rlnVoltage": 300.0}
    optics |= {"rlnSphericalAberration": 2.7, "rlnAmplitudeContrast": 0.1, "rlnImagePixelSize": [2.0, 2.5]}
    optics |= {"rlnImageSize": [64, 52], **matrix}
    angles = np.random.default_rng(7).uniform(-170, 170, (count, 3))
    poses = {name: angles[:, axis] for axis, name in enumerate(ANGLES)}
    poses |= {"rlnOriginXAngst": np.linspace(-3, 4, count), "rlnOriginYAngst": np.linspace(2, -1, count)}
    names = [f"{i + 1:06d}@a.mrcs" for i in range(count)]
    frame = {"rlnImageName": names, "rlnOpticsGroup": 1 + np.arange(count) % 2, **poses, "rlnDefocusU": 1e4}
    write_star({"optics": pd.DataFrame(optics), "particles": pd.DataFrame(frame)}, path)
    return path


def source_of(particles):
    """Images of 32 pixels of nominally 2 A; none is read."""
    flat = Calibration(np.ones(2), np.ones((2, 16)), 32, TRAIN_PIXEL_A)
    return PreparedImages(particles, 32, TRAIN_PIXEL_A, np.array([32, 26]), flat)


def views_px(batch):
    """(b, points, 2) where the images of a batch see the points."""
    seen = POINTS_A @ batch.rotation.double().numpy().transpose(0, 2, 1) / TRAIN_PIXEL_A
    return seen[:, :, :2] - batch.origin_px.double().numpy()[:, None]


def trained_views_px(batch, change):
    """The same with the change to the left of all that the batch does: what training fits to images."""
    turns = np.array([expm(cross(vector.astype(float))) for vector in change.rotation_rad])
    turned = torch.from_numpy(turns) @ batch.rotation.double()
    origin_px = batch.origin_px.double() - torch.from_numpy(change.shift_A.astype(float)) / TRAIN_PIXEL_A
    return views_px(replace(batch, rotation=turned, origin_px=origin_px))


def test_magnified_optics_groups(tmp_path):
    """Posed images and those of the written file see what training fitted, to first order in the rotation."""
    path = distorted_star(tmp_path / "in.star")
    given, rows = read_particles(path), np.arange(COUNT)
    # as prepare has them: 2.5 A by 26 of 32 pixels is 2.03 A, of nominally 2 A
    training = (given.optics[0], replace(given.optics[1], pixel_size_A=2.5 * 26 / 32))
    folder = prepared_poses(tmp_path / "prepared", path, rows, optics=training)
    source = source_of(replace(given, optics=training))
    plain = rows % 2 == 0
    for angle, axes, tolerance_px in ((0.1, (1, 1, 1), 2.0), (1e-3, (1, 1, 0), 1e-3)):
        change = a_change(COUNT, angle=angle)
        change = replace(change, rotation_rad=change.rotation_rad * np.array(axes, np.float32))
        (out,) = write(folder, change, tmp_path / "out")
        again = read_particles(out)
        posed = source.posed(change).geometry(rows)
        read = source_of(replace(again, optics=training)).geometry(rows)
        np.testing.assert_allclose(views_px(posed), views_px(read), atol=1e-4)
        np.testing.assert_allclose(posed.transfer, read.transfer, rtol=1e-5)
        error_px = np.abs(views_px(posed) - trained_views_px(source.geometry(rows), change)).max((1, 2))
        assert error_px[plain].max() < 1e-4 and error_px[~plain].max() < tolerance_px
        own_A = change.shift_A.astype(float) * 2.03125 / TRAIN_PIXEL_A
        np.testing.assert_allclose(again.origin_A[~plain], (given.origin_A - own_A)[~plain], atol=1e-7)
        error_A = read_tables(out).particles["flexShiftStdErrAngst"].to_numpy()
        np.testing.assert_allclose(error_A, errors(COUNT)[1] * np.where(plain, 1, 2.03125 / TRAIN_PIXEL_A), rtol=1e-6)
    wrong = source_of(change.of(source.particles)).geometry(rows)  # magnification not thought of
    error_px = np.abs(views_px(wrong) - trained_views_px(source.geometry(rows), change)).max((1, 2))
    assert error_px[~plain].min() > 5e-3


def test_in_the_plane_the_turn_of_a_distorted_image_is_the_nearest(tmp_path):
    """Least squares over all points of the plane: no other angle is nearer."""
    particles = read_particles(distorted_star(tmp_path / "in.star", 2)).subset([1])
    change = PoseChange(np.array([[0, 0, 1e-4]]), np.zeros((1, 2)), np.ones(1))
    found = change.as_of_poses(particles, 2.5).rotation_rad[0, 2]
    matrix = np.array(DISTORTED).T
    quarter = np.array([[0, -1], [1, 0]])

    def distance(angle):
        return np.linalg.norm(1e-4 * quarter @ matrix - angle * matrix @ quarter)

    assert distance(found) < min(distance(0.999 * found), distance(1.001 * found))


# the model's file ----------------------------------------------------------------------------------------------------


def small_model(pose=None, rigid_pose=None):
    ball = np.linalg.norm(np.indices((12,) * 3) - 6, axis=0) < 4
    mesh = bcc_mesh(ball, 4.0, 16.0)
    flow = FlowGenerator(torch.from_numpy(rigid_modes_A(mesh.vertices_A).astype(np.float32)), 2, 1, 4)
    return FlexModel(mesh, flow, np.zeros((COUNT, 2), np.float32), ball.astype(np.float32), 12, 4.0,
                     pose=pose, rigid_pose=rigid_pose)  # fmt: skip


def test_a_model_keeps_its_poses(tmp_path):
    poses = {"pose": a_change(COUNT), "rigid_pose": a_change(COUNT, seed=1)}
    small_model(**poses).save(tmp_path / "model.pt")
    again = FlexModel.load(tmp_path)
    for name, pose in poses.items():
        for column in ("rotation_rad", "shift_A", "contrast"):
            np.testing.assert_array_equal(getattr(getattr(again, name), column), getattr(pose, column))


def test_a_model_without_poses_has_none(tmp_path):
    small_model(pose=a_change(COUNT)).save(tmp_path / "model.pt")
    assert FlexModel.load(tmp_path).rigid_pose is None
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    for name in ("pose", "rigid_pose"):  # of a version that knew of none
        del content[name]
    torch.save(content, tmp_path / "model.pt")
    again = FlexModel.load(tmp_path)
    assert again.pose is None and again.rigid_pose is None


def test_rotations_of_any_size_are_written(tmp_path):
    """Half a turn, and views along the pole, where two Euler angles are one."""
    path = write_relion_star(tmp_path / "in.star")
    given = read_particles(path)
    to_pole = Rotation.from_matrix(given.rotation.transpose(0, 2, 1)).as_rotvec()
    to_pole[6:] = np.pi * np.eye(3)[np.arange(COUNT - 6) % 3]
    change = PoseChange(to_pole, np.zeros((COUNT, 2)), np.ones(COUNT))
    for out in write(prepared_poses(tmp_path / "prepared", path, np.arange(COUNT)), change, tmp_path / "out"):
        np.testing.assert_allclose(read_particles(out).rotation, change.of(given).rotation, atol=1e-7)
