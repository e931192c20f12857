"""Two models that never met: their common frame, the motion's error, modes, latents; and that they never met."""

from __future__ import annotations

import shutil
from dataclasses import replace

import mrcfile
import numpy as np
import pandas as pd
import pytest
import torch
from moving_ball import BOX, PIXEL_SIZE_A, ball, ball_mesh
from scipy import ndimage
from training_sets import latents_of, prepared

from flexlib.errors import InputError
from flexlib.imaging.fsc import fsc
from flexlib.layout import MeshFolder, ParticlesFolder, TrainFolder, ValidateFolder
from flexlib.model.flex_model import FlexModel
from flexlib.model.flow import FlowGenerator, displacement_basis_A
from flexlib.particles.pose_change import PoseChange
from flexlib.records import AgreementRecord
from flexlib.tetra.deform import deform_volume
from flexlib.tetra.elastic import elastic_modes
from flexlib.tetra.gradients import directional_derivative
from flexlib.train import train
from flexlib.train.setup import canonical_map, set_up
from flexlib.train.start import mean_transfer2
from flexlib.validate import validate
from flexlib.validate.common_frame import CommonFrame
from flexlib.validate.latent_errors import latent_errors
from flexlib.validate.mode_agreement import MODES_A_BAND, mode_agreement
from flexlib.validate.motion_error import errors_by_region, latent_regions, motion_error
from flexlib.validate.rest_shape import rest_shape_shift_A
from flexlib.workflow_support.settings import ReconstructSettings, TrainSettings

pytestmark = pytest.mark.usefixtures("one_thread")

NUM = 600


@pytest.fixture(scope="module")
def mesh():
    return ball_mesh()


@pytest.fixture(scope="module")
def modes_A(mesh):
    """(m, nv, 3) of a flow's basis."""
    stiffness, modes = elastic_modes(mesh, 60)
    return displacement_basis_A(modes, stiffness, mesh.vertices_A)


def lumps(seed: int = 0) -> np.ndarray:
    """Smooth density with features of some voxels, in a ball."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(BOX,) * 3), 1.5)
    inside = ndimage.gaussian_filter(ball(BOX, 9).astype(float), 1.0)
    return ((1.0 + 8.0 * noise) * inside).astype(np.float32)


def model_of(mesh, fields_A, latents, canonical=None, covariance=None) -> FlexModel:
    """A model that moves by ``fields_A`` (K, nv, 3) a unit of each latent (n, K)."""
    flow = FlowGenerator(torch.as_tensor(np.asarray(fields_A), dtype=torch.float32), len(fields_A), 1, 4)
    with torch.no_grad():
        flow.linear.copy_(torch.eye(len(fields_A)))
    canonical = lumps() if canonical is None else canonical
    model = FlexModel(mesh, flow, latents.astype(np.float32), canonical, BOX, PIXEL_SIZE_A)
    return replace(model, latent_covariance=None if covariance is None else covariance.astype(np.float32))


def frame_of(first: FlexModel, second: FlexModel, shift_A=None) -> CommonFrame:
    num = len(first.mesh.vertices_A)
    shift_A = np.zeros((num, 3)) if shift_A is None else shift_A
    return CommonFrame(first, second, torch.as_tensor(shift_A).float(), torch.full((num,), 1.0 / num))


def latents(dims: int = 2, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(NUM, dims))


# the common frame ----------------------------------------------------------------------------------------------------


def test_a_linear_field_is_exactly_carried_to_shifted_places(mesh):
    rng = np.random.default_rng(0)
    matrix, offset = rng.normal(size=(3, 3)), rng.normal(size=3)
    shift_A = rng.normal(size=mesh.vertices_A.shape)
    values = mesh.vertices_A @ matrix.T + offset
    moved = (mesh.vertices_A + shift_A) @ matrix.T + offset
    np.testing.assert_allclose(values + directional_derivative(mesh, shift_A) @ values, moved, atol=1e-9)


def test_the_second_model_moves_as_seen_from_the_firsts_rest_shape(mesh):
    """A rotation about the box centre: a vertex that lies elsewhere in the second's rest shape turns from there."""
    turn = np.cross([0, 0, 1.0], mesh.vertices_A)[None]
    second = model_of(mesh, turn, latents(1))
    shift_A = np.tile([2.0, -1.0, 0.5], (len(mesh.vertices_A), 1))
    frame = frame_of(second, second, shift_A)
    found = frame.of_second(torch.tensor([[0.0], [0.1]])).numpy()
    np.testing.assert_allclose(found[0], shift_A, atol=1e-5)
    np.testing.assert_allclose(found[1], shift_A + 0.1 * np.cross([0, 0, 1.0], mesh.vertices_A + shift_A), atol=1e-4)


def test_rest_shapes_are_brought_together_and_noise_is_not_made_to_agree(mesh, modes_A):
    wanted_A = 2.5 * modes_A[0] / np.sqrt((modes_A[0] ** 2).sum(1).mean()) + [0.8, 0.0, -0.6]
    mask = ndimage.gaussian_filter(ball(BOX, 11).astype(np.float32), 0.7)
    first = lumps()
    second = deform_volume(first, PIXEL_SIZE_A, (mask > 1e-3).astype(np.float32), mesh, wanted_A)
    rng = np.random.default_rng(5)
    size = 0.15 * first[mask > 0.5].std()
    noisy = [(volume + size * rng.normal(size=volume.shape) * mask).astype(np.float32) for volume in (first, second)]
    models = [model_of(mesh, modes_A[:40], latents(40), canonical) for canonical in noisy]
    found_A = rest_shape_shift_A(*models, mask)
    inside = np.linalg.norm(mesh.vertices_A, axis=1) < 9 * PIXEL_SIZE_A
    error_A = np.sqrt(((found_A - wanted_A)[inside] ** 2).sum(1).mean())
    assert error_A < 0.25  # of 1.2, in voxels of 3
    support = (mask > 1e-3).astype(np.float32)
    brought = deform_volume(noisy[0], PIXEL_SIZE_A, support, mesh, found_A)
    before, after = fsc(*noisy, mask), fsc(brought, noisy[1], mask)
    truly = fsc(deform_volume(noisy[0], PIXEL_SIZE_A, support, mesh, wanted_A), noisy[1], mask)
    assert after[6:10].mean() > before[6:10].mean() + 0.02
    assert np.abs(after - truly).max() < 0.03


# errors --------------------------------------------------------------------------------------------------------------


def test_the_error_of_the_motion_is_that_of_the_models_and_that_of_the_images(mesh):
    """Half-set models that err at right angles to each other: their mean errs by half their difference, exactly."""
    num = len(mesh.vertices_A)
    motion, along_x, along_y = (np.zeros((num, 3)) for _ in range(3))
    motion[:, 2] = 0.1 * mesh.vertices_A[:, 0]
    along_x[:, 0] = 0.02 * mesh.vertices_A[:, 1]
    along_y[:, 1] = 0.02 * mesh.vertices_A[:, 2]
    z = latents(1)
    z -= z.mean()
    covariance = np.full((NUM, 1, 1), 0.04)
    first, second = model_of(mesh, [motion + along_x], z), model_of(mesh, [motion + along_y], z)
    whole = model_of(mesh, [motion + (along_x + along_y) / 2], z, covariance=covariance)
    found = motion_error(frame_of(first, second), whole, np.ones(NUM))
    true_A2 = z.var() * (((along_x + along_y) / 2) ** 2).sum(1)
    np.testing.assert_allclose(found.model_A2, true_A2, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(
        found.image_A2, 0.04 * ((motion + (along_x + along_y) / 2) ** 2).sum(1), rtol=1e-3, atol=1e-6
    )
    own = (z**2)[:, 0] * (((along_x + along_y) / 2) ** 2).sum(1).mean()
    np.testing.assert_allclose(found.particle_model_A2, own, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found.motion_A2, z.var() * ((motion + (along_x + along_y) / 2) ** 2).sum(1), rtol=1e-3)
    regions = errors_by_region(found, whole.latents, latent_regions(whole.latents))
    assert sum(len(region.rows) for region in regions) == NUM
    far = max(regions, key=lambda region: abs(region.centre[0]))
    assert far.model_error_A == max(region.model_error_A for region in regions)


def test_what_poses_may_have_taken_over_is_no_error_of_the_motion(mesh):
    """Where poses are refined, a rigid-body motion that one model has and the other's poses hold does not count."""
    num = len(mesh.vertices_A)
    turn, z = 0.05 * np.cross([0.3, 1.0, -0.2], mesh.vertices_A), latents(1)
    bend = np.zeros((num, 3))
    bend[:, 1] = 2e-3 * mesh.vertices_A[:, 0] ** 2
    first, second = model_of(mesh, [bend], z), model_of(mesh, [bend + turn], z)
    whole = model_of(mesh, [bend], z, covariance=np.zeros((NUM, 1, 1)))
    exact = motion_error(frame_of(first, second), whole, np.ones(NUM))
    posed = replace(first, pose=PoseChange(np.zeros((NUM, 3)), np.zeros((NUM, 2)), np.ones(NUM)))
    refined = motion_error(frame_of(posed, second), whole, np.ones(NUM))
    assert exact.error_A2.mean() > 0.1
    assert refined.error_A2.max() < 1e-6


def test_modes_agree_as_far_as_both_models_share_them(mesh, modes_A):
    rng = np.random.default_rng(2)
    fields, z = modes_A[:54], rng.normal(size=(NUM, 54))
    soft, both = 18, z.copy()
    both[:, soft:] = rng.normal(size=(NUM, 54 - soft))  # stiffer ones are each model's own
    frame = frame_of(model_of(mesh, fields, z), model_of(mesh, fields, both))
    found = mode_agreement(frame, np.arange(NUM))
    assert found.num_agreeing == soft and found.num_agreeing % MODES_A_BAND == 0
    assert (found.correlation[:2] > 0.99).all() and (np.abs(found.correlation[4:9]) < 0.2).all()
    assert (np.diff(found.length_A) < 0).all() and found.limit_A == found.length_A[2]
    assert (found.motion_A[9:] < 1e-4).all()


def test_standard_errors_that_know_of_the_image_alone_are_corrected():
    """Two models that distort latent space, each with an error of its own."""
    rng = np.random.default_rng(3)
    true = rng.normal(size=(20_000, 2))
    image, model = 0.3, np.array([0.4, 0.05])  # errors of models of half the particles
    seen = true + image * rng.normal(size=true.shape)
    found = [seen + model * rng.normal(size=true.shape) for _ in range(2)]
    whole = seen + model / np.sqrt(2) * rng.normal(size=true.shape)
    first = found[0] @ [[0.8, 0.6], [-0.6, 0.8]] + 0.05 * found[0] ** 2
    others = first, -2.0 * found[1]
    errors = latent_errors(whole, np.full(whole.shape, image), others, np.ones(len(true)), latent_regions(whole))
    np.testing.assert_allclose(np.median(errors.model_std_err, 0), model / np.sqrt(2), rtol=0.15)
    np.testing.assert_allclose(errors.factor, np.sqrt(1 + model**2 / 2 / image**2), rtol=0.06)
    within = (np.abs(whole - true) <= errors.corrected).mean(0)
    assert (np.abs(within - 0.683) < 0.03).all()
    assert (np.abs(whole[:, 0] - true[:, 0]) <= errors.std_err[:, 0]).mean() < 0.58


# trainings -----------------------------------------------------------------------------------------------------------

SETTINGS = TrainSettings(latent_dims=1, epochs=3, layers=2, hidden_units=16)


@pytest.fixture(scope="module")
def clamp(tmp_path_factory):
    """A small set with a strong motion, and its trainings: of all, and of each half-set alone."""
    folder = prepared(tmp_path_factory.mktemp("validate"), "clamp", 400, 0.5)
    for name, half in (("all", None), ("half_1", 1), ("half_2", 2)):
        train(folder / "particles", folder / "mesh", folder / name, SETTINGS, "cpu", half=half)
    return folder


def test_a_half_sets_model_knows_nothing_of_the_other_images(clamp, tmp_path):
    """Noise in their place changes no bit of the model."""
    other, halves = tmp_path / "particles", _half_sets(clamp)
    shutil.copytree(clamp / "particles", other)
    with mrcfile.open(other / "train.mrcs", mode="r+") as stack:
        images = stack.data[halves == 2]
        stack.data[halves == 2] = np.random.default_rng(0).permutation(images.ravel()).reshape(images.shape)
    train(other, clamp / "mesh", tmp_path / "half_1", SETTINGS, "cpu", half=1)
    wanted, found = FlexModel.load(clamp / "half_1"), FlexModel.load(tmp_path / "half_1")
    for (name, one), another in zip(wanted.flow.state_dict().items(), found.flow.state_dict().values(), strict=True):
        assert torch.equal(one, another), name
    assert np.array_equal(wanted.canonical, found.canonical)
    assert np.array_equal(wanted.latents[halves == 1], found.latents[halves == 1])
    assert not np.array_equal(wanted.latents[halves == 2], found.latents[halves == 2])


def test_a_half_set_starts_from_the_low_band_of_the_consensus(clamp, tmp_path):
    """Whatever stands beyond it: that has seen the other half-set."""
    starts = []
    for name in ("as it is", "changed"):
        folder = tmp_path / name
        shutil.copytree(clamp / "particles", folder)
        with mrcfile.open(folder / "consensus.mrc", mode="r+") as volume:
            spectrum = np.fft.fftn(volume.data)
            axis = np.fft.fftfreq(len(volume.data)) * len(volume.data)
            radius = np.sqrt(axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2)
            spectrum[radius > 8] *= -1.0 if name == "changed" else 1.0
            volume.data[:] = np.fft.ifftn(spectrum).real
        setup = set_up(ParticlesFolder(folder), MeshFolder(clamp / "mesh"), SETTINGS, "cpu", half=1)
        values = canonical_map(setup, setup.operator, mean_transfer2(setup), inside_only=True).values
        starts.append((values, setup.density_share, torch.as_tensor(setup.consensus.data)))
    for same, changed in zip(*(start[:2] for start in starts), strict=True):
        torch.testing.assert_close(same, changed, rtol=1e-4, atol=1e-5 * float(same.abs().max()))
    assert float((starts[0][2] - starts[1][2]).norm()) > 0.05 * float(starts[0][2].norm())


def _half_sets(folder):
    import starfile

    table = starfile.read(folder / "particles/particles.star", always_dict=True)["particles"]
    return table["rlnRandomSubset"].to_numpy()


def test_each_model_places_the_particles_that_it_has_not_seen(clamp):
    """And predicts them: the motion is strong."""
    truth = np.load(clamp / "sim/truth.npz")["angles_rad"][:, 0]
    halves = _half_sets(clamp)
    for number in (1, 2):
        z = latents_of(clamp / f"half_{number}")[:, 0]
        own, others = (np.corrcoef(z[rows], truth[rows])[0, 1] for rows in (halves == number, halves != number))
        assert abs(own) > 0.85 and abs(others) > 0.85 and own * others > 0
        cross = pd.read_csv(TrainFolder(clamp / f"half_{number}").cross)
        assert set(cross["row"]) <= set(np.flatnonzero(halves != number))
        assert cross["gain"].mean() > 4 * cross["gain"].std() / len(cross) ** 0.5


def test_the_stage_writes_what_both_models_agree_on(clamp, tmp_path):
    halves = [clamp / "half_1", clamp / "half_2"]
    validate(clamp / "particles", clamp / "all", halves, tmp_path, ReconstructSettings(), "cpu")
    out = ValidateFolder(tmp_path)
    record = AgreementRecord.read(out.record)
    assert record.at_rest == [False, False] and all(record.converged.values())
    assert record.gain > 4 * record.gain_se and record.cross_particles == len(pd.read_csv(out.cross))
    assert 0 < record.motion_error_A < 0.5 * record.motion_size_A
    assert record.num_modes_agreeing >= MODES_A_BAND and record.mode_limit_A > 0
    assert all(factor >= 1 for factor in record.std_err_factor) and len(record.latent_coverage) == 1
    with mrcfile.open(out.motion_error) as error, mrcfile.open(out.motion_size) as size:
        assert error.data.shape == size.data.shape and np.isfinite(error.data).all()
        inside = mrcfile.read(ParticlesFolder(clamp / "particles").full_mask) > 0.5
        assert error.data[inside].mean() < 0.5 * size.data[inside].mean()
    curves = pd.read_csv(out.fsc)
    maps = [mrcfile.read(out.half_map(number)) for number in (1, 2)]
    np.testing.assert_allclose(curves["fsc_independent_unmasked"], fsc(*maps), atol=1e-4)
    table = latents_of(tmp_path, "^flexMotion.*Angst$|StdErr")
    assert np.isfinite(table).all() and (table >= 0).all() and len(table) == 400


def test_a_half_set_that_confirms_no_motion_stands_still_and_the_stage_says_so(clamp, tmp_path, monkeypatch):
    """As of a molecule at rest, whose held-out images confirm nothing; without poses to refine."""
    monkeypatch.setattr("flexlib.train.finish.confirms_motion", lambda gain, error: False)
    for refined in (True, False):
        settings = replace(SETTINGS, epochs=1, refine_poses=refined, refine_contrast=refined)
        train(clamp / "particles", clamp / "mesh", tmp_path / f"{refined}", settings, "cpu", half=1)
        halves = [tmp_path / f"{refined}", clamp / "half_2"]
        validate(clamp / "particles", clamp / "all", halves, tmp_path / "out", ReconstructSettings(), "cpu")
        record = AgreementRecord.read(ValidateFolder(tmp_path / "out").record)
        assert record.at_rest == [True, False]
        assert record.num_modes_agreeing == 0 and record.mode_limit_A is None
        assert pd.read_csv(TrainFolder(tmp_path / f"{refined}").cross)["gain"].abs().max() == 0


def test_models_of_other_particles_and_given_latents_are_refused_in_one_line(clamp, tmp_path):
    with pytest.raises(InputError, match=r"train\.freeze_latents"):
        frozen = replace(SETTINGS, freeze_latents=True)
        train(clamp / "particles", clamp / "mesh", tmp_path / "x", frozen, "cpu", half=1)
    other = replace(FlexModel.load(clamp / "half_2"), latents=np.zeros((3, 1), np.float32))
    other.save(TrainFolder(tmp_path / "other").model)
    with pytest.raises(InputError, match="3 rows"):
        validate(
            clamp / "particles",
            clamp / "all",
            [clamp / "half_1", tmp_path / "other"],
            tmp_path / "out",
            ReconstructSettings(),
            "cpu",
        )
