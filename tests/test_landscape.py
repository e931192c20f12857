"""The landscape against known truth: mixtures, barriers, errors, and what naive deconvolution gets wrong."""

import numpy as np
import pytest
from latent_sets import left_share, noise, observed, posteriors, two_states

from flexlib.interpret.density import estimate_density
from flexlib.interpret.landscape import Landscape, find_basins, landscape_table, make_landscape
from flexlib.interpret.least_path import least_path, path_ends, path_table, with_others
from flexlib.interpret.observations import Observations, observe
from flexlib.train.latents import LatentPrior


def landscape_of(seen: Observations, bootstraps: int = 200) -> Landscape:
    return make_landscape(estimate_density(seen, bootstraps))


def spread(landscape: Landscape) -> float:
    """Variance of the first latent."""
    share = landscape.share @ landscape.density.weight
    x = landscape.points[:, 0]
    return float(share @ x**2 - (share @ x) ** 2)


@pytest.fixture(scope="module")
def states() -> tuple[Observations, Landscape]:
    """3,000 particles of two latents in two states, 70:30, and their landscape."""
    rng = np.random.default_rng(1)
    seen = observed(two_states(3000, 2, 0.7, rng), noise(3000, 2, rng), rng)
    return seen, landscape_of(seen)


def test_likelihood_is_the_posterior_without_its_prior():
    rng = np.random.default_rng(0)
    measured, covariance = rng.standard_normal((50, 3)), noise(50, 3, rng)
    information = np.linalg.inv(covariance)
    posterior = np.linalg.inv(information + np.eye(3))
    latents = np.einsum("nkl,nlm,nm->nk", posterior, information, measured)
    mean, found, believed = observe(latents, posterior, LatentPrior())
    np.testing.assert_allclose(found, covariance, rtol=0.02, atol=0.002)
    np.testing.assert_allclose(mean, measured, atol=0.02)
    np.testing.assert_array_equal(believed, posterior)


def test_an_error_of_the_model_is_stretched_as_the_latents_are():
    """A model that is off by a normal error in reported latents: the likelihood's variance is then that of truth."""
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((40_000, 1))
    latents, posterior = posteriors(truth, np.full((40_000, 1, 1), 0.25), rng)
    off = latents + 0.3 * rng.standard_normal(latents.shape)
    std_err = np.sqrt(posterior[:, 0] + 0.09)
    mean, covariance, _ = observe(off, posterior, LatentPrior(), std_err)
    assert np.var(mean - truth) == pytest.approx(covariance[0, 0, 0], rel=0.03)


def test_a_posterior_as_wide_as_the_prior_says_nothing():
    _, covariance, _ = observe(np.array([[0.3, 0.1]]), np.diag([1.5, 0.2])[None], LatentPrior())
    assert covariance[0, 0, 0] > 100
    assert covariance[0, 1, 1] == pytest.approx(0.25, rel=0.01)


def test_given_latents_are_measurements():
    latents, posterior = np.array([[0.3]]), np.array([[[0.2]]])
    mean, covariance, _ = observe(latents, posterior, None)
    np.testing.assert_array_equal(mean, latents)
    np.testing.assert_array_equal(covariance, posterior)


def test_naive_deconvolution_of_posterior_means_is_biased_and_this_is_not():
    rng = np.random.default_rng(3)
    truth = rng.uniform(-1.7, 1.7, (4000, 1))
    errors = noise(4000, 1, rng, 0.5, 0.9)
    right, naive = (
        spread(landscape_of(observed(truth, errors, np.random.default_rng(4), naive), 2)) for naive in (False, True)
    )
    assert right == pytest.approx(truth.var(), rel=0.06)
    assert naive < 0.8 * truth.var()


@pytest.mark.parametrize(("dims", "sets", "needed"), [(1, 20, 18), (2, 10, 9)])
def test_mixture_is_told_within_its_interval(dims: int, sets: int, needed: int):
    count, inside = 2000, 0
    for seed in range(sets):
        rng = np.random.default_rng(100 + seed)
        landscape = landscape_of(observed(two_states(count, dims, 0.7, rng), noise(count, dims, rng), rng))
        basin = find_basins(landscape)
        assert basin.max() == 1
        share, low, high = left_share(landscape, basin)
        assert high - low < 0.12
        assert share == pytest.approx(0.7, abs=0.06)
        inside += low <= 0.7 <= high
    assert inside >= needed


def test_what_is_smooth_along_one_latent_has_no_bumps():
    """Two sharp states of the second latent, all values of the first: one width for both makes three or four basins."""
    found, widths = [], []
    for seed in range(8):
        rng = np.random.default_rng(300 + seed)
        state = np.where(rng.random(1600) < 0.5, -1.0, 1.0) + 0.12 * rng.standard_normal(1600)
        truth = np.stack([rng.uniform(-1.7, 1.7, 1600), state], 1)
        landscape = landscape_of(observed(truth, noise(1600, 2, rng, 0.1, 0.25), rng), 100)
        found.append(find_basins(landscape).max() + 1)
        widths.append(landscape.density.width)
    assert found == [2] * 8
    smooth, sharp = np.median(widths, 0)
    assert smooth > 1.5 * sharp


def test_one_state_has_no_barrier():
    found = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        seen = observed(rng.standard_normal((2000, 1)), noise(2000, 1, rng), rng)
        found.append(find_basins(landscape_of(seen, 60)).max() + 1)
    assert found.count(1) >= 9


def test_free_energy_of_a_normal_is_a_parabola_within_its_errors():
    rng = np.random.default_rng(5)
    seen = observed(0.8 * rng.standard_normal((8000, 1)), noise(8000, 1, rng, 0.2, 0.4), rng)
    landscape = landscape_of(seen)
    table = landscape_table(landscape, seen)
    known = table[table["free_energy_kT"].notna()]
    away = known["free_energy_kT"] - known["latent_1"] ** 2 / (2 * 0.8**2)
    away -= away.median()
    assert known["latent_1"].abs().max() > 1.4
    assert (np.abs(away) <= 3 * known["free_energy_se_kT"] + 0.15).mean() > 0.9
    beyond = table[table["latent_1"].abs() > 3.5]
    assert len(beyond) and beyond["free_energy_kT"].isna().all()
    assert table["density"].sum() * np.diff(table["latent_1"]).min() == pytest.approx(1, abs=0.02)


def test_path_goes_around_a_hill_in_steps_of_equal_motion():
    """Particles on a horseshoe: its ends are near each other, the way between them is along it."""
    rng = np.random.default_rng(6)
    angle = np.where(rng.random(4000) < 0.4, 0.25 * rng.standard_normal(4000), np.pi * rng.random(4000))
    angle = np.abs(np.where(rng.random(4000) < 0.5, angle, np.pi - angle))
    truth = 1.3 * np.stack([-np.cos(angle), np.sin(angle) - 0.5], 1) + 0.08 * rng.standard_normal((4000, 2))
    seen = observed(truth, noise(4000, 2, rng, 0.1, 0.2), rng)
    landscape, metric = landscape_of(seen, 20), np.diag([4.0, 4.0])
    path = least_path(landscape, np.array([[-1.3, -0.65], [1.3, -0.65]]), 21, metric)
    radius = np.linalg.norm(path + np.array([0, 0.65]), axis=1)
    assert radius.min() > 0.8 * 1.3
    assert path[10, 1] == pytest.approx(0.65, abs=0.2)
    steps = np.linalg.norm(np.diff(path, axis=0), axis=1)
    np.testing.assert_allclose(steps, steps.mean(), rtol=0.05)


def test_path_joins_the_two_basins_over_their_barrier(states: tuple[Observations, Landscape]):
    seen, landscape = states
    basin = find_basins(landscape)
    ends = path_ends(landscape, basin, seen, np.eye(2))
    np.testing.assert_allclose(ends[:, 0], [-1, 1], atol=0.3)
    path = least_path(landscape, ends, 15, np.eye(2))
    table = path_table(landscape, path, path, np.eye(2))
    assert table["latent_1"].is_monotonic_increasing
    middle = table["free_energy_kT"].iloc[5:10]
    assert middle.isna().any() or middle.max() > table["free_energy_kT"].iloc[[0, -1]].max() + 1
    np.testing.assert_allclose(path[[0, -1]], ends)


def test_further_latents_follow_the_path():
    rng = np.random.default_rng(7)
    first = rng.standard_normal((5000, 2))
    third = first[:, :1] ** 2 + 0.1 * rng.standard_normal((5000, 1))
    seen = observed(np.concatenate([first, third], 1), np.repeat(0.01 * np.eye(3)[None], 5000, 0), rng)
    path = np.stack([np.linspace(-1.5, 1.5, 7), np.zeros(7)], 1)
    whole = with_others(path, seen, np.array([0.1, 0.1]))
    np.testing.assert_array_equal(whole[:, :2], path)
    np.testing.assert_allclose(whole[:, 2], path[:, 0] ** 2, atol=0.25)


def test_symmetry_copies_are_drawn_together():
    """Three copies of each particle say no more than one of it: errors stay what they are."""
    rng = np.random.default_rng(8)
    seen = observed(two_states(1500, 1, 0.7, rng), noise(1500, 1, rng), rng)
    errors = []
    for copies in (1, 3):
        thrice = seen.take(np.tile(np.arange(1500), copies))
        landscape = landscape_of(thrice)
        errors.append(landscape.mass(landscape.points[:, 0] < 0)[1].std())
    assert errors[1] == pytest.approx(errors[0], rel=0.25)
