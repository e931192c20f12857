"""Wrong poses and contrasts of simulated particles: their statistics, and what a consensus refinement leaves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mrcfile
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from flexlib.errors import InputError
from flexlib.images.stack import read_stack_header
from flexlib.imaging.maps import read_map
from flexlib.particles.read import read_particles
from flexlib.simulate.alignment import Poses, Reference, align
from flexlib.simulate.consensus import refine_poses
from flexlib.simulate.limits import _plane_weight
from flexlib.simulate.particle_set import ParticleSet, draw_metadata, perturbed
from flexlib.simulate.phantoms import make_phantom
from flexlib.simulate.run import SimulationTruth, simulate_particles
from flexlib.simulate.settings import Simulation
from flexlib.simulate.signal import project_atoms

COARSE = {"box": 16, "pixel_size_A": 16.0}
RIGID = Simulation(phantom="rigid", num_particles=300, box=32, pixel_size_A=7.5, snr=0.3, seed=5)


@pytest.fixture(scope="module")
def rigid(tmp_path_factory) -> SimulationTruth:
    """300 particles without motion, poses as they are."""
    return simulate_particles(tmp_path_factory.mktemp("rigid"), RIGID)


def true_set(settings: Simulation) -> ParticleSet:
    """What the simulator draws, without noise."""
    phantom = make_phantom(settings.phantom)
    return ParticleSet(phantom, draw_metadata(phantom, settings, np.random.default_rng(settings.seed)), settings)


def pose_errors(rotation: np.ndarray, origin_A: np.ndarray, truth: Path) -> np.ndarray:
    """(n, 5) rotation vector of R_written R_true^T, in the view's frame, radians; shift, Angstrom."""
    with np.load(truth) as known:
        turn = Rotation.from_matrix(rotation @ known["rotation"].transpose(0, 2, 1)).as_rotvec()
        return np.concatenate([turn, origin_A - known["origin_A"]], 1)


def written_errors(truth: SimulationTruth, metadata: Path | None = None) -> np.ndarray:
    particles = read_particles(metadata or truth.particles_star)
    return pose_errors(particles.rotation, particles.origin_A, truth.truth_npz)


def pose_information(settings: Simulation, density_scale: float) -> np.ndarray:
    """(n, 5, 5) Fisher information of each image on its pose (radians, Angstrom), the map known: exact atoms."""
    particles = true_set(settings)
    metadata, phantom, pixel_A = particles.metadata, particles.phantom, settings.pixel_size_A
    rows = slice(0, len(particles))
    atoms_A = phantom.positions_A(metadata.angles_rad)

    def transforms(step: np.ndarray) -> np.ndarray:
        turn = Rotation.from_rotvec(step[:3]).as_matrix() @ metadata.rotation
        view_A = atoms_A @ turn[:, :2].transpose(0, 2, 1) - (metadata.origin_A + step[3:])[:, None]
        exact = project_atoms(view_A / pixel_A, phantom.mass, settings.box, settings.gaussian_sigma_A / pixel_A)
        return density_scale * exact * particles.ctf(rows, settings.box)

    steps = np.diag([1e-3] * 3 + [0.02] * 2)
    slopes = [(transforms(step) - transforms(-step)) / (2 * step.max()) for step in steps]
    weight = _plane_weight(settings.box)
    return np.array([[np.einsum("nkx,nkx,x->n", a, b.conj(), weight).real for b in slopes] for a in slopes]).T


def over_the_bound(errors: np.ndarray, information: np.ndarray) -> float:
    """Rms of the errors over that at the Cramer-Rao bound, of all five together."""
    return float(np.sqrt(np.einsum("ni,nij,nj->n", errors, information, errors).mean() / 5))


def content(star: Path) -> list[str]:
    return [line for line in star.read_text().splitlines() if line[:1] != "#"]


def images_of(truth: SimulationTruth) -> np.ndarray:
    with mrcfile.open(truth.stack) as file:
        return file.data.copy()


@pytest.mark.parametrize("metadata", ["particles_star", "particles_cs"])
def test_written_errors_are_the_ones_asked_for(tmp_path, metadata):
    settings = Simulation(num_particles=2000, **COARSE, seed=7, pose_error_deg=3.0, shift_error_A=2.0)
    truth = simulate_particles(tmp_path, settings)
    errors = written_errors(truth, getattr(truth, metadata))
    turns_deg, shifts_A = np.rad2deg(errors[:, :3]), errors[:, 3:]
    assert np.sqrt((turns_deg**2).sum(1).mean()) == pytest.approx(3.0, rel=0.05)
    assert np.sqrt((shifts_A**2).mean()) == pytest.approx(2.0, rel=0.05)
    np.testing.assert_allclose(np.cov(turns_deg.T), 3.0 * np.eye(3), atol=0.3)
    assert np.abs(errors.mean(0) / errors.std(0)).max() < 0.08
    drawn = np.random.default_rng((7, 17)).standard_normal((2000, 6))  # turns are about the view's axes, not the map's
    np.testing.assert_allclose(turns_deg, np.sqrt(3.0) * drawn[:, 1:4], atol=1e-3)
    np.testing.assert_allclose(shifts_A, 2.0 * drawn[:, 4:], atol=1e-3)


def test_truth_holds_what_the_images_were_made_with(rigid):
    with np.load(rigid.truth_npz) as known:
        metadata = true_set(RIGID).metadata
        for name in ("rotation", "euler_deg", "origin_A"):
            np.testing.assert_array_equal(known[name], getattr(metadata, name))
        np.testing.assert_array_equal(known["contrast"], np.ones(300))
    assert np.abs(written_errors(rigid)).max() < 1e-5


def test_pose_errors_change_no_image_but_the_consensus(tmp_path, rigid):
    wrong = simulate_particles(tmp_path, replace(RIGID, pose_error_deg=5.0, shift_error_A=3.0))
    np.testing.assert_array_equal(images_of(wrong), images_of(rigid))
    truth, good, bad = (read_map(path).data.ravel() for path in (rigid.truth_mean, rigid.consensus, wrong.consensus))
    assert np.corrcoef(truth, bad)[0, 1] < np.corrcoef(truth, good)[0, 1] - 0.02


def test_contrast_is_in_the_images_and_not_in_the_metadata(tmp_path):
    settings = Simulation(num_particles=1000, **COARSE, snr=1e8)
    plain = simulate_particles(tmp_path / "plain", settings)
    varied = simulate_particles(tmp_path / "varied", replace(settings, contrast_sd=0.3))
    assert content(plain.particles_star) == content(varied.particles_star)
    assert plain.particles_cs.read_bytes() == varied.particles_cs.read_bytes()
    assert plain.density_scale == varied.density_scale
    strengths = [np.linalg.norm(images_of(truth), axis=(1, 2)) for truth in (plain, varied)]
    with np.load(varied.truth_npz) as known:
        np.testing.assert_allclose(strengths[1] / strengths[0], known["contrast"], rtol=1e-3)
        assert np.log(known["contrast"]).std() == pytest.approx(0.3, rel=0.08)
        assert known["contrast"].mean() == pytest.approx(1.0, abs=0.03)


def test_slope_and_information_are_those_of_the_misfit():
    generator = np.random.default_rng(0)
    box, count = 24, 3
    volume = generator.standard_normal((box,) * 3) * np.exp(-np.linalg.norm(np.indices((box,) * 3) - 12, axis=0) / 4)
    reference = Reference(volume, 10, 0.5 + generator.uniform(size=(box, box // 2 + 1)))
    poses = Poses(Rotation.random(count, random_state=1).as_matrix(), generator.normal(0, 1, (count, 2)))
    ctf = np.ones((count, len(reference.weight)), np.float32)
    images = reference.coefficients(generator.standard_normal((count, box, box)))
    _, slope, _ = reference.normal_equations(images, ctf, poses)
    for axis, step in enumerate(1e-4 * np.eye(5)):
        ends = [
            reference.normal_equations(images, ctf, poses.changed(sign * np.tile(step, (3, 1)))) for sign in (1, -1)
        ]
        np.testing.assert_allclose(
            (ends[1][0] - ends[0][0]) / 2e-4, slope[:, axis], rtol=0.05, atol=0.01 * np.abs(slope).max()
        )


def test_alignment_to_the_true_map_is_at_the_bound(rigid):
    """Turns, shifts and the weights of the likelihood are then right."""
    particles = true_set(RIGID)
    reference = Reference(read_map(rigid.truth_mean).data, 15, np.ones((32, 17)))
    start = perturbed(particles.metadata, replace(RIGID, pose_error_deg=3.0, shift_error_A=2.0))
    poses = Poses(start.rotation, start.origin_A / RIGID.pixel_size_A)
    images = read_stack_header(rigid.stack).read(np.arange(300))
    for _ in range(2):
        poses = align(reference, images, particles.ctf(slice(0, 300), 32), poses)
    errors = pose_errors(poses.rotation, poses.origin_px * RIGID.pixel_size_A, rigid.truth_npz)
    assert 0.9 < over_the_bound(errors, pose_information(RIGID, rigid.density_scale)) < 1.2


def test_consensus_brings_a_rigid_set_back_to_near_the_bound(tmp_path):
    settings = replace(RIGID, pose_error_deg=3.0, shift_error_A=2.0, poses="consensus")
    truth = simulate_particles(tmp_path, settings)
    information = pose_information(RIGID, truth.density_scale)
    start = true_set(RIGID).with_metadata(perturbed(true_set(RIGID).metadata, settings)).metadata
    before = over_the_bound(pose_errors(start.rotation, start.origin_A, truth.truth_npz), information)
    after = over_the_bound(written_errors(truth), information)
    assert before > 4 and 1.0 < after < 1.7, (before, after)  # maps of 112 noisy images are not the true one


def test_consensus_errs_most_where_the_state_is_far_from_the_mean(tmp_path):
    settings = Simulation(num_particles=500, box=32, pixel_size_A=7.2, snr=0.5, seed=2, poses="consensus")
    truth = simulate_particles(tmp_path, settings)
    angle = np.linalg.norm(written_errors(truth)[:, :3], axis=1)
    near = np.argsort(np.linalg.norm(truth.angles_rad, axis=1))
    rms = [np.sqrt((angle[rows] ** 2).mean()) for rows in (near[:170], near[-170:])]
    assert rms[1] > 1.3 * rms[0], np.rad2deg(rms)


def test_half_sets_never_mix(tmp_path, rigid):
    start = true_set(RIGID)
    other = tmp_path / "other.mrcs"
    other.write_bytes(rigid.stack.read_bytes())
    second = start.metadata.half_set == 1
    with mrcfile.open(other, mode="r+") as file:
        file.data[second] = file.data[second][::-1]
    refined = [refine_poses(path, start).metadata for path in (rigid.stack, other)]
    for name in ("euler_deg", "origin_A"):
        first, changed = (getattr(metadata, name) for metadata in refined)
        np.testing.assert_array_equal(first[~second], changed[~second])
        assert (first != changed)[second].any(1).mean() > 0.9


def test_poses_stay_where_there_is_no_signal_to_align_to(tmp_path):
    settings = Simulation(num_particles=40, **COARSE, snr=1e-8, poses="consensus", phantom="rigid")
    assert np.abs(written_errors(simulate_particles(tmp_path, settings))).max() < 1e-4


def test_consensus_poses_are_the_seeds(tmp_path):
    settings = replace(RIGID, num_particles=60, contrast_sd=0.2, pose_error_deg=2.0, poses="consensus")
    first, again = (simulate_particles(tmp_path / name, settings) for name in "ab")
    assert content(first.particles_star) == content(again.particles_star)
    assert first.particles_cs.read_bytes() == again.particles_cs.read_bytes()
    np.testing.assert_array_equal(read_map(first.consensus).data, read_map(again.consensus).data)


@pytest.mark.parametrize("name", ["pose_error_deg", "shift_error_A", "contrast_sd"])
def test_negative_errors_are_refused(tmp_path, name):
    with pytest.raises(InputError, match="must not be negative"):
        simulate_particles(tmp_path, Simulation(**{name: -1.0}))
