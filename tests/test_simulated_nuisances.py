"""Simulated junk and missing parts: the shares asked for, in the images that the truth names and in no others."""

from __future__ import annotations

from dataclasses import replace

import mrcfile
import numpy as np
import pytest

from flexlib.errors import InputError
from flexlib.imaging.maps import read_map
from flexlib.particles.read import read_particles
from flexlib.simulate.nuisances import MISPLACED, NOISE, PARTICLE
from flexlib.simulate.phantoms import make_phantom
from flexlib.simulate.run import SimulationTruth, simulate_particles
from flexlib.simulate.settings import Simulation
from flexlib.simulate.signal import atoms_to_map

SETTINGS = Simulation(num_particles=120, box=32, pixel_size_A=7.5, snr=0.5, seed=4)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> SimulationTruth:
    """All images show a whole particle."""
    return simulate_particles(tmp_path_factory.mktemp("plain"), SETTINGS)


def images_of(truth: SimulationTruth) -> np.ndarray:
    with mrcfile.open(truth.stack) as file:
        return file.data.astype(np.float64)


def test_without_them_every_particle_is_whole(plain):
    with np.load(plain.truth_npz) as known:
        assert (known["kind"] == PARTICLE).all() and not known["absent"].any()
    assert not (plain.stack.parent / "truth_part.mrc").exists()


def test_junk_is_noise_or_in_the_pose_of_another(tmp_path, plain):
    truth = simulate_particles(tmp_path, replace(SETTINGS, junk_fraction=0.25))
    with np.load(truth.truth_npz) as known:
        kind, contrast, rotation, origin_A = (known[name] for name in ("kind", "contrast", "rotation", "origin_A"))
    assert [(kind == one).sum() for one in (NOISE, MISPLACED)] == [15, 15]
    np.testing.assert_array_equal(contrast == 0, kind == NOISE)
    changed = images_of(truth) - images_of(plain)
    np.testing.assert_array_equal(np.abs(changed).max((1, 2)) > 0, kind == NOISE)
    assert images_of(truth)[kind == NOISE].var() == pytest.approx(1.0, abs=0.03)  # and the noise is the same
    written = read_particles(truth.particles_star)
    own = np.abs(written.rotation - rotation).max((1, 2)) < 1e-5
    np.testing.assert_array_equal(own, kind != MISPLACED)
    for row in np.flatnonzero(kind == MISPLACED):
        (other,) = np.flatnonzero(np.abs(rotation - written.rotation[row]).max((1, 2)) < 1e-5)
        np.testing.assert_allclose(written.origin_A[row], origin_A[other], atol=1e-4)


def test_the_part_is_missing_from_the_particles_that_the_truth_names(tmp_path, plain):
    truth = simulate_particles(tmp_path, replace(SETTINGS, missing_part_fraction=0.4))
    with np.load(truth.truth_npz) as known:
        absent = known["absent"]
    assert absent.sum() == 48
    assert truth.density_scale == plain.density_scale
    lost = images_of(plain) - images_of(truth)
    np.testing.assert_array_equal(np.abs(lost).max((1, 2)) > 0, absent)
    # the sum of an image is the mass that it shows, times the CTF at zero, the amplitude contrast
    phantom = make_phantom("antibody")
    labels = read_map(truth.stack.parent / "truth_part.mrc").data
    part = phantom.chain == 12
    whole = atoms_to_map(phantom.atoms_A / 7.5, phantom.mass, 32, 0.5)
    only = atoms_to_map(phantom.atoms_A / 7.5, phantom.mass * part, 32, 0.5)
    assert only[labels == 2].sum() == pytest.approx(phantom.mass[part].sum(), rel=0.1)
    assert whole[labels > 0].sum() == pytest.approx(phantom.mass.sum(), rel=0.05)
    expected = phantom.mass[part].sum() * truth.density_scale * Simulation().amplitude_contrast
    np.testing.assert_allclose(lost[absent].sum((1, 2)), expected, rtol=1e-3)


def test_a_part_is_named_by_its_number(tmp_path):
    one = simulate_particles(tmp_path, replace(SETTINGS, phantom="clamp", missing_part_fraction=1.0, missing_part=0))
    phantom = make_phantom("clamp")
    labels = read_map(one.stack.parent / "truth_part.mrc").data
    z, y, x = (axis[labels == 2].mean() for axis in np.indices(labels.shape))
    np.testing.assert_allclose((np.array([x, y, z]) - 16) * 7.5, phantom.atoms_A[phantom.chain == 0].mean(0), atol=4)
    with np.load(one.truth_npz) as known:
        assert known["absent"].all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"junk_fraction": 1.0}, "junk_fraction"),
        ({"missing_part_fraction": -0.1}, "missing_part_fraction"),
        ({"missing_part_fraction": 0.1, "missing_part": 16}, "0 to 15"),
    ],
)
def test_shares_and_parts_out_of_range_are_refused(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        simulate_particles(tmp_path, replace(SETTINGS, **settings))
