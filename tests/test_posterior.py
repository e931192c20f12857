"""Posterior means and errors of single particles, against integrals of the objective on a fine grid."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from training_sets import bent_flow, masked_consensus, predicted_images, prepared, small_setup

from flexlib.imaging.image_transforms import plane_weight
from flexlib.model.flow import FlowGenerator
from flexlib.model.moving_map import MovingMap
from flexlib.train.fields import BASIS_UNIT_A, displacement_basis
from flexlib.train.latents import UNIT_PRIOR, LatentPrior, infer_latents
from flexlib.train.modes import Modes, find_modes, latent_centres
from flexlib.train.posterior import draw_posterior, laplace_log_evidence, standard_points
from flexlib.train.step import POSTERIOR_PART, posterior_noise

BOX, NUM = 32, 24
WEIGHT = plane_weight(BOX, 10)


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    return small_setup(prepared(tmp_path_factory.mktemp("clamp"), "clamp", 200, 0.3, box=BOX, cells=8), 2)


@pytest.fixture(scope="module")
def fields(setup) -> torch.Tensor:
    return displacement_basis(setup.mesh, setup.ranks, setup.device)


def weak_images(setup, model, truth, strength):
    """The model's own images at latents ``truth`` (b, K), ``strength`` times as strong as the set's."""
    batch = setup.source.batch(np.arange(len(truth)))
    return predicted_images(model, replace(batch, transfer=strength * batch.transfer), truth, 3)


def grid_posterior(model, batch, axes):
    """Means (b, K), covariances (b, K, K) and log evidence (b,) from the objective at every point of a grid."""
    points = torch.cartesian_prod(*axes).view(-1, len(axes))
    with torch.no_grad():
        objective = torch.stack(
            [model.loss(batch, WEIGHT, z.expand(len(batch.rows), -1)) + 0.5 * z.square().sum() for z in points], 1
        )
    share = torch.softmax(-objective.double(), 1)
    mean = share @ points.double()
    away = points.double() - mean[:, None]
    point_volume = np.prod([float(axis[1] - axis[0]) / np.sqrt(2 * np.pi) for axis in axes])
    evidence = torch.logsumexp(-objective.double(), 1) + np.log(point_volume)
    return mean, torch.einsum("bs,bsi,bsj->bij", share, away, away), evidence


def test_points_have_the_moments_of_the_unit_normal():
    for dims in (1, 2, 8, 14):
        points, log_weight = (part.double() for part in standard_points(dims))
        weight = log_weight.exp()
        assert float(weight.sum()) == pytest.approx(1, abs=1e-5)
        assert (weight @ points).abs().max() < 1e-5
        assert ((points * weight[:, None]).T @ points - torch.eye(dims)).abs().max() < 1e-5


def test_means_and_errors_are_those_of_the_integral(setup, fields):
    """A bent motion in weak images: the mean is not the mode, and the errors are not the parabola's."""
    flow = bent_flow(fields, 1.0)
    model = MovingMap(setup.operator, flow, masked_consensus(setup))
    truth = torch.randn(NUM, 2, generator=torch.Generator().manual_seed(4))
    batch = weak_images(setup, model, truth, 0.35)
    centres = torch.as_tensor(latent_centres(np.random.default_rng(0).normal(size=(500, 2)), 0))
    modes = find_modes(model, batch, WEIGHT, torch.zeros(NUM, 2), 8, centres)
    draws = draw_posterior(model, batch, WEIGHT, modes, UNIT_PRIOR)
    mean, precision = draws.summary(modes.best)
    axis = torch.linspace(-4, 4, 41)
    expected, covariance, evidence = grid_posterior(model, batch, [axis, axis])
    assert (draws.log_evidence - evidence).square().mean().sqrt() < 0.1
    parabola = laplace_log_evidence(modes.best, UNIT_PRIOR)
    without_volume = -modes.best.objective
    assert (parabola - evidence).square().mean() < 0.25 * (without_volume - evidence).square().mean()
    spread = covariance.diagonal(dim1=1, dim2=2).sqrt()
    assert 0.1 < float(spread.mean()) < 0.9  # weak, not blind
    off, mode_off = ((z.double() - expected) / spread for z in (mean, modes.best.latents))
    assert off.square().mean().sqrt() < 0.12
    assert off.square().mean() < 0.3 * mode_off.square().mean()
    found = torch.linalg.inv(precision.double()).diagonal(dim1=1, dim2=2).sqrt()
    normal = torch.linalg.inv(modes.best.precision.double()).diagonal(dim1=1, dim2=2).sqrt()
    assert (found / spread).log().square().mean() < 0.5 * (normal / spread).log().square().mean()


def test_a_particle_with_two_modes_says_so(setup, fields):
    """A motion that comes back on itself: z and -z look alike, the mean lies between, and the error spans both."""

    class Back(torch.nn.Module):
        def forward(self, z):
            return torch.einsum("b,vc->bvc", z[:, 0] ** 2 + 0.02 * z[:, 0], fields[0] / BASIS_UNIT_A * 6.0)

    model = MovingMap(setup.operator, Back(), masked_consensus(setup))
    truth = torch.linspace(-1.6, 1.6, NUM)[:, None]
    batch = weak_images(setup, model, truth, 1.0)
    centres = torch.linspace(-2, 2, 9)[:, None]
    modes = find_modes(model, batch, WEIGHT, truth, 8, centres)
    draws = draw_posterior(model, batch, WEIGHT, modes, UNIT_PRIOR)
    far = truth[:, 0].abs() > 1.0
    assert (draws.num_modes[far] == 2).all()
    mean, precision = draws.summary(modes.best)
    expected, covariance, evidence = grid_posterior(model, batch, [torch.linspace(-4, 4, 801)])
    assert (draws.log_evidence - evidence)[far].abs().max() < 0.3
    spread = covariance[:, 0, 0].sqrt()
    assert ((mean[:, 0] - expected[:, 0])[far].abs() < 0.25 * spread[far]).all()
    assert ((precision[far, 0, 0].double() ** -0.5 / spread[far]).log().abs() < 0.2).all()
    single = draw_posterior(model, batch, WEIGHT, Modes.one_each(modes.best), UNIT_PRIOR)
    assert (single.num_modes == 1).all()


def test_known_parameters_stay_as_they_are(setup, fields):
    torch.manual_seed(2)
    flow = FlowGenerator(fields, 2, 2, 16)
    with torch.no_grad():
        flow.linear[:, :2] = torch.eye(2)
    model = MovingMap(setup.operator, flow, masked_consensus(setup))
    truth = torch.randn(NUM, 2, generator=torch.Generator().manual_seed(5))
    batch = weak_images(setup, model, truth, 0.5)
    best = infer_latents(model, batch, WEIGHT, truth, 6, fixed=1)
    draws = draw_posterior(model, batch, WEIGHT, Modes.one_each(best), UNIT_PRIOR, fixed=1)
    assert (draws.parameters[:, :, 0] == truth[:, 0]).all()
    assert draws.parameters[:, :, 1].std(0).min() > 0
    axis = torch.linspace(-4, 4, 161)
    for row in range(4):  # the evidence is that of what is not known
        known = [truth[row, :1], axis]
        points = torch.cartesian_prod(*known)
        with torch.no_grad():
            one = batch.take(torch.tensor([row]))
            objective = torch.stack([model.loss(one, WEIGHT, z[None])[0] + 0.5 * z[1] ** 2 for z in points])
        expected = torch.logsumexp(-objective, 0) + np.log(float(axis[1] - axis[0]) / np.sqrt(2 * np.pi))
        assert float(draws.log_evidence[row] - expected) == pytest.approx(0, abs=0.1)
        assert float(laplace_log_evidence(best, UNIT_PRIOR, 1)[row] - expected) == pytest.approx(0, abs=0.3)


def test_frozen_latents_are_seen_with_the_injected_noise_alone():
    """Though nothing is known of them (their information is zero); views get their part of the posterior."""
    prior, count = LatentPrior(num_views=6), 4000
    information = torch.zeros(count, 8, 8)
    information[:, 2:, 2:] = 3.0 * torch.eye(6)
    torch.manual_seed(0)
    for injected in (0.15, 0.0):
        noise = posterior_noise(prior, torch.zeros(count, 8), information, injected, fixed=2)
        assert torch.allclose(noise[:, :2].std(0), torch.tensor(injected), rtol=0.05)
        assert torch.allclose(noise[:, 2:].std(0), torch.tensor(POSTERIOR_PART / 2.0), rtol=0.05)
