"""Quasi-rigid bodies and their hinges, against exact motions of a bar whose pieces and axes are known."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hinged_bar import AXES, PIVOTS_A, BarModel, adjusted_rand_index, angles, piece
from json_records import agreement_record
from scipy.spatial.transform import Rotation

from flexlib.interpret.bodies import find_bodies, one_body
from flexlib.interpret.body_files import untold
from flexlib.interpret.hinges import body_motions, find_hinges
from flexlib.interpret.strain import deformation
from flexlib.model.rigid_bodies import States
from flexlib.tetra.voxels import voxelise

NUM = 120


def found_in(model, number="auto"):
    bodies = find_bodies(States.of_model(model), model.mesh.cells, number)
    return bodies, find_hinges(model, bodies, body_motions(model, bodies, model.latents))


def true_pieces(model, bodies, num):
    """True and found body of each voxel, with its density."""
    voxels = voxelise(model.mesh, model.canonical > 0, model.pixel_size_A)
    z_A = (voxels.index // model.box**2 - model.box // 2) * model.pixel_size_A
    return piece(z_A, num), bodies.label_voxels(voxels), model.canonical.ravel()[voxels.index]


def off_by_deg(axis, true_axis):
    return np.degrees(np.arccos(min(abs(axis @ true_axis), 1.0)))


@pytest.mark.parametrize("noise_A", [0.0, 0.5])
@pytest.mark.parametrize("num", [2, 3])
def test_bodies_and_hinges_are_the_simulated_ones(num, noise_A):
    """With noise, too, of half an Angstrom at each vertex."""
    model = BarModel(angles(NUM, num - 1), noise_A=noise_A)
    bodies, hinges = found_in(model)
    assert bodies.num == num and not bodies.reason
    assert bodies.explained[-1] == pytest.approx(1 - 3 * (noise_A / bodies.motion_A) ** 2, abs=0.02)
    truth, found, mass = true_pieces(model, bodies, num)
    assert adjusted_rand_index(truth, found, mass) > 0.9
    true_of = [np.bincount(truth[found == body], mass[found == body]).argmax() for body in range(num)]
    touching = [hinge for hinge in hinges if hinge.touching]
    assert len(touching) == num - 1 and len(hinges) == num * (num - 1) // 2
    assert all(hinge.touching for hinge in hinges[: num - 1])  # those come first
    for hinge in touching:
        pair = {true_of[hinge.first], true_of[hinge.second]}
        end = max(pair) - 1
        assert pair == {0, end + 1} and hinge.kind == "hinge" and hinge.share > 0.98
        assert off_by_deg(hinge.axis, AXES[end]) < 2
        assert np.linalg.norm(np.cross(hinge.point_A - PIVOTS_A[end], AXES[end])) < 1.5
        true_deg = np.degrees(model.latents[:, end])
        true_range = np.ptp(np.percentile(true_deg, (2, 98)))
        assert hinge.range_deg == pytest.approx(true_range, rel=0.05)
        assert hinge.sd_deg == pytest.approx(true_deg.std(), rel=0.05)
        assert hinge.along_A < 0.5 and hinge.across_A < 0.7


def test_angles_are_right_handed_about_the_axis_and_of_the_second_body():
    """All angles are to one side, so that their sign is seen."""
    model = BarModel(np.abs(angles(NUM, 1)))
    bodies, (hinge,) = found_in(model)
    truth, found, mass = true_pieces(model, bodies, 2)
    lower_moves = np.bincount(truth[found == hinge.second], mass[found == hinge.second]).argmax() == 1
    sign = np.sign(hinge.axis @ AXES[0]) * (1 if lower_moves else -1)
    true_deg = np.sort(sign * np.percentile(np.degrees(model.latents[:, 0]), (2, 98)))
    np.testing.assert_allclose([hinge.low_deg, hinge.high_deg], true_deg, atol=0.5)


def test_a_shift_is_no_hinge():
    """One end slides along a line: its direction is told, and no angle."""
    bodies, (hinge,) = found_in(BarModel(angles(NUM, 1), slides=True))
    assert bodies.num == 2 and hinge.kind == "shift" and hinge.range_deg == 0
    assert off_by_deg(hinge.axis, AXES[0]) < 1
    assert hinge.along_A == pytest.approx(30 * 0.4 / 3**0.5, rel=0.1)


def test_what_does_not_move_against_itself_is_one_body():
    """It tumbles as a whole, which is its pose; or it stands still."""
    for model in (BarModel(angles(NUM, 1), still=True), BarModel(np.zeros((NUM, 1)))):
        bodies, hinges = found_in(model)
        assert bodies.num == 1 and not hinges and bodies.reason == "nothing moves"
        assert bodies.motion_A < 1e-3 and (bodies.label == 0).all()


def test_a_rod_that_bends_all_over_is_told_from_a_hinge():
    """Pieces of an arc leave some motion unexplained, and its strain lies inside the bodies."""
    bends = {}
    for name, model in (("rod", BarModel(angles(NUM, 1), bends=True)), ("hinge", BarModel(angles(NUM, 1)))):
        bodies, _ = found_in(model)
        strain = deformation(model.mesh, model.displacements_A(model.latents[::6])).strain
        bends[name] = bodies.bend(model.mesh.cells, strain)
        assert bodies.num <= 3
    assert bends["rod"] > 0.8 and bends["hinge"] < 0.05


def test_a_number_that_is_asked_for_is_what_is_found():
    model = BarModel(angles(NUM, 2))
    for number in (1, 2, 3):
        bodies, _ = found_in(model, number)
        assert bodies.num == number and len(bodies.explained) == number
        assert (np.diff(bodies.mass) <= 0).all() and bodies.mass.sum() == pytest.approx(1)
    assert list(bodies.explained) == sorted(bodies.explained)


def test_a_number_that_cannot_be_found_is_told(caplog):
    bodies, _ = found_in(BarModel(angles(NUM, 1), still=True), 4)
    assert bodies.num == 1
    model = BarModel(angles(NUM, 1))
    bodies, _ = found_in(model, 12)
    assert bodies.num < 12 and "of 12 that were asked for" in caplog.text


def test_angles_are_widened_by_the_latents_own_errors():
    """Means of posteriors vary less than what they are of: by 36 % of the variance here."""
    true = angles(1500, 1)
    noise = 0.75 * true.std()  # of the estimate; the shrunk mean has 1 / (1 + 0.75^2) of the variance
    shrink = 1 / (1 + 0.75**2)
    means = shrink * (true + noise * np.random.default_rng(5).normal(size=true.shape))
    covariance = np.full((len(true), 1, 1), shrink * noise**2)
    _, (hinge,) = found_in(BarModel(means, latent_covariance=covariance))
    assert hinge.sd_deg == pytest.approx(np.degrees(true.std()), rel=0.04)
    assert hinge.noise_factor == pytest.approx(shrink**-0.5, rel=0.03)


def test_what_is_no_particle_does_not_widen_a_hinge():
    model = BarModel(np.concatenate([angles(NUM, 1), np.full((16, 1), 1.2)]))
    model.probability = np.r_[np.ones(NUM), np.zeros(16)]
    _, (hinge,) = found_in(model)
    assert hinge.range_deg == pytest.approx(np.degrees(np.ptp(np.percentile(model.latents[:NUM], (2, 98)))), rel=0.05)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ""),
        ({"at_rest": [True, False]}, "stands still"),
        ({"cross_gain": 0.5, "cross_gain_se": 0.4}, "do not predict"),
        ({"cross_gain": None, "cross_gain_se": None}, ""),
        ({"motion_error_A": 3.0, "motion_size_A": 2.0}, "as large as it is"),
    ],
)
def test_no_bodies_are_claimed_of_a_motion_that_is_not_told(change, said):
    record = replace(agreement_record(20.0, 1.0, 100), motion_error_A=1.0, motion_size_A=4.0)
    reason = untold(replace(record, **change))
    assert said in reason and bool(reason) == bool(said)
    assert untold(None) == ""


def test_one_body_for_a_reason_explains_nothing():
    bodies = one_body(States.of_model(BarModel(angles(NUM, 1))), "not told")
    assert bodies.num == 1 and bodies.explained == (0.0,) and bodies.reason == "not told" and bodies.motion_A > 1


# rotation and strain -------------------------------------------------------------------------------------------------


def test_rotation_and_strain_of_a_known_deformation():
    """F = R U: the rms over two states, each the same in all cells; and nothing of a rotation is strain."""
    mesh = BarModel(angles(2, 1)).mesh
    turns = [Rotation.from_rotvec(np.radians(angle) * AXES[0]) for angle in (30.0, -10.0)]
    stretch = [np.diag([1.2, 1.0, 0.9]), np.eye(3)]
    states = [turn.apply(mesh.vertices_A @ one) - mesh.vertices_A for turn, one in zip(turns, stretch, strict=True)]
    found = deformation(mesh, torch.from_numpy(np.array(states)))
    np.testing.assert_allclose(found.rotation_deg, np.sqrt((30.0**2 + 10.0**2) / 2), rtol=1e-6)
    np.testing.assert_allclose(found.strain, np.sqrt((0.2**2 + 0.1**2) / 2), rtol=1e-6)


def test_maps_of_a_uniform_figure_are_uniform():
    model = BarModel(angles(2, 1))
    voxels = voxelise(model.mesh, model.canonical > 0, model.pixel_size_A)
    found = deformation(model.mesh, model.displacements_A(model.latents))
    volume = found.at_voxels(np.full(len(model.mesh.cells), 7.0), voxels)
    np.testing.assert_allclose(volume[model.canonical > 0], 7.0, rtol=1e-5)
    assert (volume[model.canonical == 0] == 0).all()
    turned = found.at_voxels(found.rotation_deg, voxels)
    z_A = (np.arange(model.box) - model.box // 2) * model.pixel_size_A
    per_layer = turned[:, model.box // 2, model.box // 2]
    assert per_layer[np.abs(z_A + 45) < 10].min() > 5 > 0.01 > per_layer[np.abs(z_A - 20) < 20].max()
