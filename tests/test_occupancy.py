"""Parts of the molecule that particles may lack: the marginal likelihood, its gradient and its information."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from moving_ball import ball_mesh, linear_model
from training_sets import bent_flow, masked_consensus, prepared, small_setup

from flexlib.imaging.image_transforms import plane_weight
from flexlib.model.flex_model import FlexModel
from flexlib.model.forward import EXACT, log_likelihood_loss
from flexlib.model.moving_map import MovingMap, fisher_information
from flexlib.model.occupancy import Parts
from flexlib.model.views import ViewPrior
from flexlib.train.fields import displacement_basis
from flexlib.train.latents import friedel_halves
from flexlib.train.setup import Setup

BOX = 64
SHARE = torch.tensor([0.7, 0.4])
PRIOR = ViewPrior(0.02, 2.0, 0.2)


@pytest.fixture(scope="module")
def setup(tmp_path_factory) -> Setup:
    return small_setup(prepared(tmp_path_factory.mktemp("clamp"), "clamp", 100, 0.01, box=BOX, cells=12), 1)


@pytest.fixture(scope="module")
def labels(setup) -> torch.Tensor:
    """Two opposite sides of the molecule."""
    found = torch.zeros((BOX,) * 3, dtype=torch.uint8)
    found[:, :, BOX // 2 + 12 :] = 1
    found[:, :, : BOX // 2 - 12] = 2
    return found


@pytest.fixture(scope="module")
def model(setup, labels) -> MovingMap:
    operator = replace(setup.operator, accuracy=EXACT)
    flow = bent_flow(displacement_basis(setup.mesh, setup.ranks, setup.device), 0.3)
    values = masked_consensus(setup)
    parts = Parts.of_labels(labels, SHARE, operator, setup.coarse)
    return MovingMap(operator, flow, values, setup.coarse, views=PRIOR, parts=parts)


@pytest.fixture(scope="module")
def batch(setup):
    return setup.source.batch(np.arange(8))


@pytest.fixture(scope="module")
def parameters() -> torch.Tensor:
    return 0.5 * torch.randn((8, 8), generator=torch.Generator().manual_seed(0))


def state_losses(model, labels, batch, weight, parameters) -> torch.Tensor:
    """(b, 4) prior and loss of each state, each with a map of its own without the parts that are absent."""
    label = labels.flatten()[model.operator.voxels.index]
    seen, moved = model.seen(batch, parameters), model.displacements_A(parameters)
    found = []
    for has in product((True, False), repeat=2):
        prior = torch.where(torch.tensor(has), SHARE, 1 - SHARE).log().sum()
        values = model.values * ~sum((label == p + 1) & (not has[p]) for p in range(2)).bool()
        found.append(log_likelihood_loss(model.operator, values, seen, moved, weight) - prior)
    return torch.stack(found, 1)


def test_loss_is_the_sum_over_all_states(model, labels, batch, parameters):
    """Against four maps, with and without each part."""
    weight = plane_weight(BOX, 20)
    with torch.no_grad():
        states = state_losses(model, labels, batch, weight, parameters)
        torch.testing.assert_close(
            model.loss(batch, weight, parameters), -torch.logsumexp(-states, 1), rtol=1e-4, atol=2e-2
        )
        chance = torch.softmax(-states, 1)
        present = model.quadratic(batch, weight, parameters).present(model.parts.log_prior)
    assert chance.max(1).values.min() < 0.9  # it is no matter of one state
    torch.testing.assert_close(present[:, 0], chance[:, :2].sum(1), rtol=0, atol=1e-2)
    torch.testing.assert_close(present[:, 1], chance[:, [0, 2]].sum(1), rtol=0, atol=1e-2)


def test_gradient_is_that_of_the_sum_over_states(model, labels, batch, parameters):
    """By map, latents, pose and contrast: against autograd through four maps."""
    weight, found = plane_weight(BOX, 20), []
    for marginal in (True, False):
        at, values = parameters.clone().requires_grad_(), model.values.clone().requires_grad_()
        own = replace(model, values=values)
        if marginal:
            loss = own.loss(batch, weight, at)
        else:
            loss = -torch.logsumexp(-state_losses(own, labels, batch, weight, at), 1)
        found.append(torch.autograd.grad(loss.sum(), (at, values)))
    for ours, brute in zip(*found, strict=True):
        assert (ours - brute).norm() < 2e-3 * brute.norm()


def test_gradient_by_finite_differences(model, batch, parameters):
    weight, at = plane_weight(BOX, 14), parameters.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model.loss(batch, weight, at).sum(), at)
    step = 0.02
    with torch.no_grad():
        for axis in range(parameters.shape[1]):
            away = torch.zeros_like(parameters)
            away[:, axis] = step
            ends = [model.loss(batch, weight, parameters + sign * away).double() for sign in (1, -1)]
            slope = (ends[0] - ends[1]) / (2 * step)
            assert (slope - gradient[:, axis]).norm() < 0.03 * slope.norm() + 0.05, axis


def test_information_is_that_of_a_map_with_the_parts_in_part(model, labels, batch, parameters):
    """Each particle's parts count with their posterior probability: against a map made so for one particle."""
    weight = plane_weight(BOX, 20)
    known = fisher_information(model, batch, weight, parameters)
    with torch.no_grad():
        present = model.quadratic(batch, weight, parameters).present(model.parts.log_prior)
    label = labels.flatten()[model.operator.voxels.index]
    for row in range(3):
        factor = torch.cat([torch.ones(1), present[row]])[label.long()]
        own = replace(model, values=model.values * factor, parts=None)
        one = torch.tensor([row])
        alone = fisher_information(own, batch.take(one), weight, parameters[one])[0]
        assert (known[row] - alone).norm() < 2e-3 * alone.norm()


def test_coarse_map_has_the_same_parts(model, batch, parameters):
    """At half the box the loss differs between the states as in the full one, where both see the same shells."""
    weight = plane_weight(BOX, 10)
    with torch.no_grad():
        fine = model.quadratic(batch, weight, parameters)
        small = model.coarse.quadratic(model.coarse_map.batch(batch), model.coarse_map.weight(weight), parameters)
    assert (small.gram - fine.gram).norm() < 0.05 * fine.gram.norm()
    assert (small.cross - fine.cross).norm() < 0.05 * fine.cross.norm() + 0.5


def test_prediction_knows_what_the_other_pixels_say_of_the_parts(model, batch, parameters):
    """The chain rule: known pixels, and unknown ones given them, are as likely as all at once."""
    known, unknown = (plane_weight(BOX, 20) * half for half in friedel_halves(BOX, 1))
    with torch.no_grad():
        given = model.prediction_loss(batch, known, unknown, parameters)
        chain = model.loss(batch, known, parameters) + given
        torch.testing.assert_close(chain, model.loss(batch, known + unknown, parameters), rtol=1e-4, atol=1e-2)
        assert (given - model.loss(batch, unknown, parameters)).abs().max() > 0.05


def test_model_file_holds_parts_and_older_ones_have_none(tmp_path):
    model = linear_model(ball_mesh(), np.zeros((32,) * 3), np.zeros((5, 2)))
    model.parts = np.zeros((32,) * 3, np.uint8)
    model.parts[:9] = 1
    model.occupancy, model.occupancy_share = np.full((5, 1), 0.25, np.float32), np.array([0.7], np.float32)
    model.save(tmp_path / "model.pt")
    loaded = FlexModel.load(tmp_path / "model.pt")
    for name in ("parts", "occupancy", "occupancy_share"):
        expected, found = getattr(model, name), getattr(loaded, name)
        assert found.dtype == expected.dtype and np.array_equal(found, expected)
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    for name in ("parts", "occupancy", "occupancy_share"):
        del content[name]
    torch.save(content, tmp_path / "old.pt")
    old = FlexModel.load(tmp_path / "old.pt")
    assert old.parts is None and old.occupancy is None and old.occupancy_share is None
