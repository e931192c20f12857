"""The rigid core of a motion, and displacements with it at rest, against bodies whose rotations are known."""

import numpy as np
import pytest
import torch
from moving_ball import BOX, ball, ball_mesh, linear_model
from scipy.spatial.transform import Rotation

from flexlib.model.frame import MotionFrame, find_rigid_core, model_core

STATES = 80


def cloud(generator, num, centre_A, radii_A):
    """(num, 3) vertices in an ellipsoid."""
    points = generator.normal(size=(4 * num, 3))
    points *= (generator.random(4 * num) ** (1 / 3) / np.linalg.norm(points, axis=1))[:, None]
    return centre_A + points[:num] * radii_A


def turned(vertices_A, rotation, pivot_A):
    """(s, nv, 3) positions of vertices turned about a point in each state."""
    return np.stack([one.apply(vertices_A - pivot_A) + pivot_A for one in rotation])


def tumbled(positions_A, generator, largest_deg=40.0):
    """Each state's positions after a rotation and shift of the whole."""
    rotation = Rotation.from_rotvec(np.radians(largest_deg) * generator.uniform(-1, 1, (len(positions_A), 3)) / 1.8)
    shift_A = generator.normal(0, 10, (len(positions_A), 1, 3))
    return np.stack([one.apply(state) for one, state in zip(rotation, positions_A, strict=True)]) + shift_A


def core_of(positions_A, vertices_A, share):
    moved = torch.from_numpy(positions_A - vertices_A)
    return find_rigid_core(moved, torch.from_numpy(vertices_A), torch.from_numpy(share)), moved


@pytest.mark.parametrize("tumbling", [False, True])
def test_swinging_head_is_seen_from_the_body_at_rest(tumbling):
    """The head swings by up to 40 degrees to one side; 70 % of the vertices are its own, but 12 % of the density."""
    generator = np.random.default_rng(1)
    body, head = cloud(generator, 300, [0, 0, -20], [40, 40, 30]), cloud(generator, 700, [0, 5, 40], [12, 12, 20])
    share = np.r_[np.full(300, 0.88 / 300), np.full(700, 0.12 / 700)]
    swing = Rotation.from_rotvec(np.c_[np.radians(np.linspace(-10, 40, STATES)), np.zeros((STATES, 2))])
    vertices_A = np.r_[body, head]
    seen_from_body_A = np.concatenate([np.tile(body, (STATES, 1, 1)), turned(head, swing, [0, 0, 20])], axis=1)
    positions_A = tumbled(seen_from_body_A, generator) if tumbling else seen_from_body_A
    core, moved = core_of(positions_A, vertices_A, share)
    assert core.share == pytest.approx(0.88, abs=0.02)
    assert core.weight[:300].min() > 0.99
    aligned_A = core.aligned(moved).numpy()
    assert np.abs(aligned_A[:, :300]).max() < 0.02
    np.testing.assert_allclose(aligned_A, seen_from_body_A - vertices_A, atol=0.03)
    assert aligned_A[-1, 300:, 1].mean() < -5 < 5 < -aligned_A[0, 300:, 1].mean() * -4  # to either side, its own
    assert core.aligned(moved.float()).dtype == torch.float32


@pytest.mark.parametrize("long_part", ["lighter", "heavier"])
def test_the_larger_of_two_hinged_domains_is_the_core(long_part):
    """60 to 40 by density; a long light arm has the larger moment of inertia, and all as one body follows it."""
    generator = np.random.default_rng(2)
    ball_share, arm_share = (0.6, 0.4) if long_part == "lighter" else (0.4, 0.6)
    compact, arm = cloud(generator, 400, [-15, 0, 0], [15, 15, 15]), cloud(generator, 400, [70, 0, 0], [70, 8, 8])
    share = np.r_[np.full(400, ball_share / 400), np.full(400, arm_share / 400)]
    bend = Rotation.from_rotvec(np.radians(generator.uniform(-40, 40, (STATES, 3))) * [0.3, 1, 1])
    vertices_A = np.r_[compact, arm]
    opened_A = np.concatenate([np.tile(compact, (STATES, 1, 1)), turned(arm, bend, np.zeros(3))], axis=1)
    core, moved = core_of(tumbled(opened_A, generator), vertices_A, share)
    larger = slice(0, 400) if long_part == "lighter" else slice(400, 800)
    aligned_A = core.aligned(moved).numpy()
    assert core.share == pytest.approx(0.6, abs=0.03)
    assert np.abs(aligned_A[:, larger]).max() < 0.05
    if long_part == "lighter":
        np.testing.assert_allclose(aligned_A, opened_A - vertices_A, atol=0.2)  # at the arm's end, 140 A away


def test_the_core_is_the_largest_body_and_not_the_most_rigid_one():
    """40 % that breathes by 0.3 A, 33 % that is rigid, and 27 %, all turned at random by several Angstrom."""
    generator = np.random.default_rng(3)
    centres = [[0, 0, 0], [60, 0, 0], [0, 60, 0]]
    parts = [cloud(generator, 300, centre, [25, 25, 25]) for centre in centres]
    share = np.repeat([0.4 / 300, 0.33 / 300, 0.27 / 300], 300)
    turns = [Rotation.from_rotvec(generator.normal(0, 0.2, (STATES, 3))) for _ in parts]
    positions_A = np.concatenate([turned(p, t, c) for p, t, c in zip(parts, turns, centres, strict=True)], axis=1)
    positions_A[:, :300] += generator.normal(0, 0.3 / np.sqrt(3), (STATES, 300, 3))
    core, _ = core_of(positions_A, np.concatenate(parts), share)
    assert core.weight[:300].mean() > 0.6
    assert core.weight[300:].mean() < 0.1


def test_a_molecule_that_bends_all_over_keeps_a_core_of_some_size():
    generator = np.random.default_rng(4)
    rod = cloud(generator, 800, [0, 0, 0], [100, 10, 10])
    bend_1_per_A = np.linspace(-2e-3, 2e-3, STATES)[:, None]
    positions_A = np.stack([rod] * STATES)
    positions_A[:, :, 1] += bend_1_per_A * rod[:, 0] ** 2
    core, moved = core_of(tumbled(positions_A, generator), rod, np.full(800, 1 / 800))
    assert core.share > 0.2
    middle = core.weight > 0.5
    assert core.aligned(moved)[:, middle].square().sum(2).mean().sqrt() < core.tolerance_A


def test_what_does_not_move_or_moves_as_one_comes_to_rest():
    generator = np.random.default_rng(5)
    vertices_A = cloud(generator, 200, [5, 0, 0], [30, 20, 10])
    share = np.full(200, 1 / 200)
    at_rest = np.stack([vertices_A] * STATES)
    core, moved = core_of(at_rest, vertices_A, share)
    assert core.share == pytest.approx(1)
    assert core.aligned(moved).abs().max() < 1e-10
    core, moved = core_of(tumbled(at_rest, generator), vertices_A, share)
    assert core.share == pytest.approx(1)
    assert core.aligned(moved).abs().max() < 1e-4


def test_density_on_a_line_or_in_a_point_does_not_turn_about_itself():
    vertices_A = np.r_[np.c_[np.linspace(-50, 50, 50), np.zeros((50, 2))], [[0, 10, 0], [0, 0, 10]]]
    share, shift_A = np.r_[np.full(50, 1 / 50), 0, 0], np.array([1.0, 2, 3])
    core, moved = core_of(np.stack([vertices_A + shift_A] * 3), vertices_A, share)
    assert core.aligned(moved).abs().max() < 1e-5
    core, moved = core_of(np.stack([vertices_A + shift_A] * 3), vertices_A, np.eye(52)[0])
    assert core.aligned(moved).abs().max() < 1e-5


def test_a_models_frame_goes_by_its_own_density_and_particles():
    """Latents that shift the whole: with its core at rest nothing moves; a particle without latents does not count."""
    latents = np.random.default_rng(6).normal(0, 4, (700, 2))
    latents[5] = np.nan
    model = linear_model(ball_mesh(), ball(BOX, 8) * 1.0, latents)
    assert model_core(model).share == pytest.approx(1)
    z = torch.tensor([[3.0, -2.0], [0.0, 0.0]])
    as_it_is, at_rest = (MotionFrame.of(model, align).displacements_A(z) for align in ("density", "rigid_core"))
    torch.testing.assert_close(as_it_is, model.displacements_A(z))
    assert at_rest.dtype == torch.float32
    assert at_rest.abs().max() < 1e-4
