"""The simulator against independent formulas, and against flexlib's own readers, CTF and operator."""

from __future__ import annotations

import itertools
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch
from scipy.ndimage import center_of_mass
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from flexlib.errors import InputError
from flexlib.images.ctf import ctf_images
from flexlib.imaging.fourier import shell_radius
from flexlib.imaging.maps import read_map
from flexlib.particles.read import read_particles
from flexlib.projection.op import VoxelTensors, project, view_vertices
from flexlib.simulate import particle_set
from flexlib.simulate.phantoms import PHANTOMS, make_phantom, phantom_from_pdb
from flexlib.simulate.run import SimulationTruth, simulate_particles
from flexlib.simulate.settings import Simulation
from flexlib.simulate.signal import atoms_to_map, project_atoms
from flexlib.tetra.tetmesh import single_cell_mesh
from flexlib.tetra.voxels import voxelise

BOX, PIXEL_A = 48, 5.0


@pytest.fixture(scope="module")
def flexible(tmp_path_factory) -> SimulationTruth:
    """200 particles of the antibody at the default signal/noise ratio."""
    return simulate_particles(
        tmp_path_factory.mktemp("flexible"), Simulation(num_particles=200, box=BOX, pixel_size_A=PIXEL_A, seed=3)
    )


@pytest.fixture(scope="module")
def still(tmp_path_factory) -> SimulationTruth:
    """150 particles without motion, so that one truth map predicts every image."""
    return simulate_particles(
        tmp_path_factory.mktemp("still"),
        Simulation(phantom="rigid", num_particles=150, box=BOX, pixel_size_A=PIXEL_A, seed=5),
    )


def images_of(truth: SimulationTruth) -> np.ndarray:
    with mrcfile.open(truth.stack) as file:
        return file.data.astype(np.float64)


def transforms_of(images: np.ndarray) -> np.ndarray:
    return np.fft.rfft2(np.fft.ifftshift(images, axes=(-2, -1)))


def predicted(truth: SimulationTruth, metadata: Path) -> np.ndarray:
    """(n, N, N//2+1) noise-free transforms from the truth map by flexlib's own reader, CTF and operator."""
    particles = read_particles(metadata)
    volume = read_map(truth.truth_states[0])
    mesh = single_cell_mesh(volume.box * volume.pixel_size_A)
    voxels = voxelise(mesh, np.ones((volume.box,) * 3, bool), volume.pixel_size_A)
    tensors = VoxelTensors.from_mesh_voxels(voxels, dtype=torch.float32)
    vertices_px = view_vertices(
        torch.as_tensor(mesh.vertices_A),
        torch.as_tensor(particles.rotation),
        torch.as_tensor(particles.origin_A / volume.pixel_size_A),
        volume.pixel_size_A,
    ).float()
    values = torch.as_tensor(volume.data).reshape(-1)[tensors.index]
    spectra = project(values, vertices_px, tensors, "cubic", 2)
    ctf = ctf_images(particles, np.arange(len(particles)), volume.box, volume.pixel_size_A)
    return (spectra * ctf).numpy()


def frequency(box: int) -> np.ndarray:
    return np.hypot(np.fft.fftfreq(box)[:, None], np.fft.rfftfreq(box)[None])


def test_projection_is_the_direct_sum_over_atoms():
    generator = np.random.default_rng(0)
    position = generator.uniform(-9, 9, (2, 7, 2))
    mass = generator.uniform(1, 3, 7)
    found = project_atoms(position, mass, 24, 0.6)
    ky, kx = np.fft.fftfreq(24)[:, None], np.fft.rfftfreq(24)[None]
    inside = np.hypot(ky, kx) < 0.5
    for spectrum, atoms in zip(found, position, strict=True):
        expected = sum(m * np.exp(-2j * np.pi * (kx * x + ky * y)) for m, (x, y) in zip(mass, atoms, strict=True))
        expected = expected * np.exp(-2 * np.pi**2 * 0.6**2 * (kx**2 + ky**2)) * inside
        assert np.abs(spectrum - expected).max() < 1e-5 * mass.sum()


def test_projection_at_identity_is_the_sum_of_the_map_over_z():
    phantom = make_phantom("clamp")
    atoms_px = phantom.atoms_A / 4.0
    volume = atoms_to_map(atoms_px, phantom.mass, 64, 0.4)
    from_map = transforms_of(volume.astype(np.float64).sum(0))
    exact = project_atoms(atoms_px[None, :, :2], phantom.mass, 64, 0.4)[0]
    assert np.linalg.norm(from_map - exact) < 1e-4 * np.linalg.norm(exact)
    assert volume.sum() == pytest.approx(phantom.mass.sum(), rel=1e-5)


@pytest.mark.parametrize("axis", range(3))
def test_map_axes_and_centre(axis):
    position = np.zeros((1, 3))
    position[0, axis] = 5.0
    volume = atoms_to_map(position, np.ones(1), 32, 1.0)
    expected = [16, 16, 16]
    expected[2 - axis] += 5
    assert list(np.unravel_index(volume.argmax(), volume.shape)) == expected


@pytest.mark.parametrize("metadata", ["particles_star", "particles_cs"])
def test_images_agree_with_reader_ctf_and_operator(tmp_path, metadata):
    settings = {"box": BOX, "pixel_size_A": PIXEL_A, "snr": 1e8, "shift_sd_A": 8.0}
    smooth = {"gaussian_sigma_A": 5.0}  # nothing left at Nyquist, so the truth map does not ring across the box edge
    truth = simulate_particles(tmp_path, Simulation(phantom="rigid", num_particles=6, seed=1, **settings, **smooth))
    found = transforms_of(images_of(truth))
    expected = predicted(truth, getattr(truth, metadata))
    band = (frequency(BOX) < 0.3) & (frequency(BOX) > 0)
    error = np.linalg.norm((found - expected)[:, band], axis=1) / np.linalg.norm(expected[:, band], axis=1)
    assert error.max() < 5e-4, error


def test_noise_and_signal_have_the_variances_asked_for(still):
    clean = np.fft.fftshift(np.fft.irfft2(predicted(still, still.particles_star)), axes=(1, 2))
    noise = images_of(still) - clean
    assert noise.var() == pytest.approx(1.0, rel=0.01)
    assert abs(noise.mean()) < 0.01
    assert clean.var(axis=(1, 2)).mean() == pytest.approx(0.08, rel=0.02)
    assert abs(np.mean(noise * clean)) < 0.003
    power = np.abs(np.fft.rfft2(noise)) ** 2 / BOX**2
    bands = [power[:, (frequency(BOX) >= low) & (frequency(BOX) < low + 0.1)].mean() for low in np.arange(5) / 10]
    assert np.abs(np.array(bands) - 1).max() < 0.05


def test_coloured_noise_follows_its_power_law(tmp_path):
    truth = simulate_particles(
        tmp_path,
        Simulation(phantom="rigid", num_particles=150, box=BOX, pixel_size_A=PIXEL_A, snr=1e-6, noise_power_law=1.5),
    )
    images = images_of(truth)
    assert images.var() == pytest.approx(1.0, rel=0.03)
    power = np.mean(np.abs(np.fft.rfft2(images)) ** 2, axis=0)
    low, high = (power[np.abs(frequency(BOX) - k) < 0.02].mean() for k in (0.2, 0.4))
    assert np.log2(low / high) == pytest.approx(1.5, abs=0.15)


def test_half_sets_are_balanced_and_written(flexible):
    for path in (flexible.particles_star, flexible.particles_cs):
        half_set = read_particles(path).half_set
        np.testing.assert_array_equal(half_set, flexible.half_set)
        assert np.bincount(half_set).tolist() == [100, 100]
    angles = np.abs(flexible.angles_rad)
    assert abs(angles[flexible.half_set == 0].mean() - angles[flexible.half_set == 1].mean()) < 0.05


def test_star_and_cs_describe_the_same_particles(flexible):
    star, cs = read_particles(flexible.particles_star), read_particles(flexible.particles_cs)
    np.testing.assert_allclose(star.rotation, cs.rotation, atol=1e-6)
    np.testing.assert_allclose(star.origin_A, cs.origin_A, atol=1e-5)
    np.testing.assert_allclose(star.defocus_u_A, cs.defocus_u_A, atol=0.01)
    np.testing.assert_allclose(star.defocus_angle_rad, cs.defocus_angle_rad, atol=1e-5)
    assert star.optics[0].pixel_size_A == cs.optics[0].pixel_size_A == PIXEL_A
    assert (star.contrast_sign == 1).all() and (cs.contrast_sign == 1).all()
    with np.load(flexible.truth_npz) as saved:
        np.testing.assert_array_equal(saved["angles_rad"], flexible.angles_rad)
        np.testing.assert_array_equal(saved["half"], flexible.half_set + 1)


def test_states_move_the_arm_by_the_expected_arc(flexible):
    phantom = make_phantom("antibody")
    hinge = phantom.hinges[0]
    moved = []
    for state in (0, 1):  # arm 1 at either end of its range
        volume = read_map(flexible.truth_states[state])
        moved.append((np.array(center_of_mass(volume.data))[::-1] - BOX // 2) * PIXEL_A)
        turn = Rotation.from_rotvec(flexible.states_rad[state, 0] * hinge.weight[:, None] * hinge.axis)
        expected = phantom.mass @ (turn.apply(phantom.atoms_A - hinge.pivot_A) + hinge.pivot_A) / phantom.mass.sum()
        np.testing.assert_allclose(moved[-1], expected, atol=0.1)
    arm = hinge.weight == 1
    arm_fraction = (phantom.mass * hinge.weight).sum() / phantom.mass.sum()
    lever = phantom.atoms_A[arm].mean(0) - hinge.pivot_A
    radius_A = np.linalg.norm(np.cross(hinge.axis, lever))
    chord_A = np.linalg.norm(moved[1] - moved[0]) / arm_fraction
    assert radius_A > 40
    assert chord_A == pytest.approx(2 * radius_A * np.sin(0.5), rel=0.02)


def test_mean_map_is_the_mean_over_particles(tmp_path):
    truth = simulate_particles(tmp_path, Simulation(num_particles=100, box=24, pixel_size_A=9.0))
    phantom = make_phantom("antibody")
    maps = [
        atoms_to_map(atoms / 9.0, phantom.mass, 24, Simulation().gaussian_sigma_A / 9.0)
        for atoms in phantom.positions_A(truth.angles_rad)
    ]
    expected = truth.density_scale * np.mean(maps, axis=0)
    found = read_map(truth.truth_mean).data
    still = read_map(truth.truth_states[0]).data
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)
    assert np.linalg.norm(still - expected) > 0.3 * np.linalg.norm(expected)


def test_consensus_is_a_noisy_reconstruction_in_the_truths_units(still):
    truth, consensus = read_map(still.truth_mean), read_map(still.consensus)
    assert consensus.pixel_size_A == truth.pixel_size_A == PIXEL_A
    spectra = [np.fft.rfftn(volume.data) for volume in (truth, consensus)]
    shell = np.rint(shell_radius(BOX)).astype(int)
    for low, high, least in ((1, 6, 0.97), (6, 10, 0.85)):
        band = (shell >= low) & (shell < high)
        cross = (spectra[0].conj() * spectra[1])[band].real.sum()
        assert cross / np.prod([np.linalg.norm(s[band]) for s in spectra]) > least
        assert cross / np.linalg.norm(spectra[0][band]) ** 2 == pytest.approx(1.0, abs=0.15)
    difference = np.linalg.norm(consensus.data - truth.data) / np.linalg.norm(truth.data)
    assert 0.1 < difference < 0.8  # not the truth


def test_the_seed_and_nothing_else_decides_the_files(tmp_path, monkeypatch):
    settings = {"num_particles": 20, "box": 32, "pixel_size_A": 8.0}
    first = simulate_particles(tmp_path / "a", Simulation(seed=1, **settings))
    monkeypatch.setattr(particle_set, "BATCH", 7)
    again = simulate_particles(tmp_path / "b", Simulation(seed=1, **settings))
    other = simulate_particles(tmp_path / "c", Simulation(seed=2, **settings))
    assert first.particles_cs.read_bytes() == again.particles_cs.read_bytes()
    tables = [path.read_text().splitlines() for path in (first.particles_star, again.particles_star)]
    assert [line for line in tables[0] if line[:1] != "#"] == [line for line in tables[1] if line[:1] != "#"]
    np.testing.assert_allclose(images_of(first), images_of(again), atol=1e-5)
    assert np.abs(images_of(first) - images_of(other)).max() > 1


def test_views_are_uniform_or_preferred(tmp_path):
    generator = np.random.default_rng(0)
    tilts = []
    for preference in (0.0, 3.0):
        settings = Simulation(num_particles=4000, defocus_range_A=(1e4, 2e4), view_preference=preference)
        drawn = particle_set.draw_metadata(make_phantom("rigid"), settings, generator)
        tilts.append(np.cos(np.deg2rad(drawn.euler_deg[:, 1])))
    assert np.mean(tilts[0] ** 2) == pytest.approx(1 / 3, abs=0.02)
    assert np.mean(tilts[1] ** 2) == pytest.approx((1 / 3 + 3 / 5) / (1 + 3 / 3), abs=0.02)


@pytest.mark.parametrize("name", list(PHANTOMS))
def test_phantoms_are_centred_and_keep_their_bodies_rigid(name):
    phantom = make_phantom(name)
    np.testing.assert_allclose(phantom.mass @ phantom.atoms_A / phantom.mass.sum(), 0, atol=1e-9)
    weights = np.stack([hinge.weight for hinge in phantom.hinges], 1) if phantom.hinges else np.zeros((1, 0))
    assert ((weights > 0) & (weights < 1)).any(1).mean() < 0.02  # a few residues bend
    rest = phantom.positions_A(np.zeros((1, len(phantom.hinges))))[0]
    np.testing.assert_allclose(rest, phantom.atoms_A, atol=1e-9)
    for state in phantom.states_rad():
        moved = phantom.positions_A(state)[0]
        for hinge in phantom.hinges:
            body = np.flatnonzero(hinge.weight == 1)[::20]
            pairs = np.array(list(itertools.combinations(body, 2)))
            before, after = (np.linalg.norm(a[pairs[:, 0]] - a[pairs[:, 1]], axis=1) for a in (rest, moved))
            np.testing.assert_allclose(before, after, atol=1e-6)
            clashes = cKDTree(moved[body]).count_neighbors(cKDTree(moved[(weights == 0).all(1)]), 1.0)
            assert clashes < 0.02 * len(body)


def test_clamp_moves_a_third_of_its_mass():
    phantom = make_phantom("clamp")
    assert (phantom.mass * phantom.hinges[0].weight).sum() / phantom.mass.sum() == pytest.approx(1 / 3, abs=0.05)


@pytest.mark.slow
def test_exact_limit_is_the_cramer_rao_bound_where_the_signal_is_strong(tmp_path):
    """It must also fall with the signal, and never below what the prior alone gives."""
    limits = []
    for snr in (2.0, 0.1):
        clamp = simulate_particles(
            tmp_path,
            Simulation(phantom="clamp", num_particles=100, box=24, pixel_size_A=8.0, snr=snr, seed=2, exact_limit=True),
        )
        truth = np.load(clamp.truth_npz)
        limits.append((float(truth["information_limit_r2"][0]), float(truth["posterior_limit_r2"])))
    (strong_bound, strong), (_, weak) = limits
    assert strong_bound > 0.99 and abs(strong - strong_bound) < 0.25 * (1 - strong_bound), limits
    assert 0.5 < weak < strong - 0.05, limits
    with pytest.raises(InputError, match="one hinge"):
        simulate_particles(tmp_path, Simulation(num_particles=4, exact_limit=True))


def test_slider_slides_in_its_plane_of_contact():
    """The upper layer stays above the lower one, touches it throughout, and moves along it, not away."""
    phantom = make_phantom("slider")
    moving = phantom.hinges[0].weight > 0
    assert moving.mean() == pytest.approx(0.41, abs=0.03)
    for state in phantom.states_rad():
        moved = phantom.positions_A(state)[0]
        shift = (moved - phantom.atoms_A)[moving]
        assert np.abs(shift[:, 2]).max() < 1e-9 and 14 < np.abs(shift[:, 0].mean()) < 18
        distance = cKDTree(moved[~moving]).query(moved[moving])[0]
        assert distance.min() > 3.0 and (distance < 15).mean() > 0.15


def test_phantom_from_pdb_moves_the_named_chain(tmp_path):
    path = tmp_path / "two.pdb"
    rows = [("A", 0.0), ("A", 4.0), ("B", 40.0), ("B", 44.0)]
    path.write_text(
        "".join(
            f"ATOM  {n:5d}  CA  ALA {chain}{n:4d}    {x:8.3f}{0:8.3f}{0:8.3f}  1.00  0.00           C\n"
            for n, (chain, x) in enumerate(rows, 1)
        )
    )
    phantom = phantom_from_pdb(path, [("B", (20.0, 0, 0), (0, 0, 2.0), 0.5)])
    moved = phantom.positions_A(np.array([[np.pi / 2]]))[0] + [22.0, 0, 0]
    np.testing.assert_allclose(moved, [[0, 0, 0], [4, 0, 0], [20, 20, 0], [20, 24, 0]], atol=1e-9)
    with pytest.raises(InputError, match="no chain 'Z'"):
        phantom_from_pdb(path, [("Z", (0, 0, 0), (0, 0, 1), 0.5)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"phantom": "banana"}, "no phantom is called 'banana'"),
        ({"box": 33}, "even box"),
        ({"snr": 0.0}, "positive snr"),
        ({"box": 32, "pixel_size_A": 4.0}, "does not fit the box"),
    ],
)
def test_settings_out_of_range_raise_one_line(tmp_path, settings, message):
    with pytest.raises(InputError, match=message) as caught:
        simulate_particles(tmp_path, Simulation(**settings))
    assert "\n" not in str(caught.value)
