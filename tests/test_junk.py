"""Images that show no particle: told as such, and neither learnt from nor sold as motion."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from training_sets import area_under_roc, bent_flow, latents_of, masked_consensus, neighbour_r2, prepared, small_setup

from flexlib.model.flex_model import FlexModel
from flexlib.model.moving_map import MovingMap
from flexlib.model.views import ViewPrior
from flexlib.simulate.nuisances import PARTICLE
from flexlib.train.fields import displacement_basis
from flexlib.train.junk import Junk, nats_of_search, noise_loss
from flexlib.train.rigid import rigid_model
from flexlib.train.run import train
from flexlib.train.score import score_held_out
from flexlib.train.step import MiniBatch, find_step
from flexlib.workflow_support.settings import TrainSettings

NUM, BOX = 800, 32


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    return small_setup(prepared(tmp_path_factory.mktemp("clamp"), "clamp", 300, 0.1, box=BOX, cells=8), 2)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3])
def test_share_and_probabilities_are_right_where_they_overlap(share):
    """A particle of power P has normal advantages of mean P / 2 and variance P, junk those of mean -P / 2."""
    generator = np.random.default_rng(1)
    for power in (6.0, 20.0):
        is_junk = generator.random(20_000) < share
        mean = np.where(is_junk, -0.5, 0.5) * power
        junk = Junk(torch.as_tensor(generator.normal(mean, np.sqrt(power)), dtype=torch.float32))
        rows = torch.arange(len(is_junk))
        junk.learn_share(rows)
        if share == 0.0:
            assert junk.share == 0.0
            assert (junk.probability() == 1).all()
            continue
        assert junk.share == pytest.approx(share, abs=4 * np.sqrt(share / len(is_junk)))
        probability = junk.probability(rows).numpy()
        for low, high in ((0.0, 0.2), (0.2, 0.8), (0.8, 1.0)):  # of those called particles by p, p are
            some = (probability >= low) & (probability <= high)
            error = 4 * np.sqrt(0.25 / some.sum())
            assert (~is_junk[some]).mean() == pytest.approx(probability[some].mean(), abs=error)


def test_loss_of_noise_is_that_of_an_empty_map(setup):
    batch, weight = setup.source.batch(np.arange(5)), setup.weight(12.0)
    empty = MovingMap(setup.operator, None, torch.zeros(len(setup.operator.voxels.index)))
    loss = empty.loss(batch, weight, torch.zeros((5, 0)))
    assert torch.allclose(noise_loss(batch, weight), loss, rtol=1e-5)


def test_junk_moves_nothing_but_its_own_latents(setup):
    """With probability zero an image leaves flow and map alone, and still looks for the latents that fit it best."""
    flow = bent_flow(displacement_basis(setup.mesh, setup.ranks, setup.device), 0.1)
    rows = setup.training_rows[:20]
    batch = MiniBatch(rows, setup.source.batch(rows), setup.weight(12.0), 12.0, 0.1, True, False)
    parameters, information = torch.zeros(20, 2), 10 * torch.eye(2).repeat(20, 1, 1)
    model = MovingMap(setup.operator, flow, masked_consensus(setup))
    found = []
    for probability in (torch.ones(20), torch.zeros(20)):
        torch.manual_seed(0)
        flow.zero_grad()
        assembled = replace(model, flow=flow.assembled())
        found.append(find_step(setup, assembled, batch, parameters, information, probability))
    counted, left_out = found
    assert left_out.map_gradient.norm() < 2e-3 * counted.map_gradient.norm()
    assert left_out.strain == 0.0
    assert torch.allclose(left_out.parameters, counted.parameters, atol=1e-4)
    assert torch.allclose(left_out.advantage, counted.advantage)
    assert counted.parameters.abs().max() > 0.1


def test_score_of_noise_is_nobodys(setup):
    """On images of noise one model's nats are another's, once junk is thought of; particles' scores hardly change."""
    model = MovingMap(
        setup.operator,
        bent_flow(displacement_basis(setup.mesh, setup.ranks, setup.device), 0.1).assembled(),
        masked_consensus(setup),
    )
    rigid = rigid_model(setup, 0.5 * masked_consensus(setup), None)
    held_out, start = setup.held_out(), torch.zeros((len(setup.validation_rows), 2))

    class NoiseOnly:
        def __getattr__(self, name):
            return getattr(setup.source, name)

        def __len__(self):
            return len(setup.source)

        def batch(self, rows, device="cpu"):
            images = torch.randn(len(rows), BOX, BOX, generator=torch.Generator().manual_seed(int(rows[0])))
            return replace(setup.source.batch(rows), images=torch.fft.rfft2(images, norm="ortho"))

    def gain(source, log_odds):
        some = replace(held_out, source=source, particle_log_odds=log_odds)
        return score_held_out(some, model, rigid, start, start[:, :0], steps=2).gain

    assert abs(gain(NoiseOnly(), 1.0)) < 0.02 * abs(gain(NoiseOnly(), np.inf))
    assert gain(setup.source, 1.0) == pytest.approx(gain(setup.source, np.inf), rel=0.15)


@pytest.mark.slow
def test_junk_is_found_and_motion_survives_it(tmp_path):
    settings = TrainSettings(latent_dims=1, validation_fraction=0.1, epochs=8)
    latents, records, probability = {}, {}, {}
    for name, fraction in (("clean", 0.0), ("spoilt", 0.25)):  # the same particles, but for the junk
        folder = prepared(tmp_path / name, "clamp", NUM, 0.15, box=BOX, junk_fraction=fraction)
        train(folder / "particles", folder / "mesh", folder / "train", settings, "cpu")
        records[name] = json.loads((folder / "train/validation.json").read_text())
        latents[name] = latents_of(folder / "train")
        probability[name] = latents_of(folder / "train", "flexParticleProbability")[:, 0]
        assert np.allclose(probability[name], FlexModel.load(folder / "train").probability, atol=1e-5)
    truth = np.load(folder / "sim/truth.npz")
    real, angle = truth["kind"] == PARTICLE, truth["angles_rad"][:, 0]
    assert records["clean"]["junk_share"] < 0.02
    assert records["spoilt"]["junk_share"] == pytest.approx(0.25, abs=0.03)
    assert records["spoilt"]["rejected_gain"] is None
    assert area_under_roc(probability["spoilt"], real) > 0.98
    told = {name: neighbour_r2(own[real], angle[real]) for name, own in latents.items()}
    assert told["spoilt"] > told["clean"] - 0.03


@pytest.mark.parametrize("find_junk", [True, False])
def test_junk_is_not_motion(tmp_path, find_junk):
    """Rigid particles and a third of junk: whoever takes all for particles sells it as six nats of motion."""
    prepared(tmp_path, "rigid", NUM, 0.15, box=BOX, junk_fraction=0.3)
    exact = TrainSettings(latent_dims=1, epochs=6, refine_poses=False, refine_contrast=False)
    settings = replace(exact, validation_fraction=0.2, find_junk=find_junk)
    train(tmp_path / "particles", tmp_path / "mesh", tmp_path / "train", settings, "cpu")
    record = json.loads((tmp_path / "train/validation.json").read_text())
    if find_junk:
        assert record["rejected_gain"] is not None  # set to rest
        assert record["junk_share"] == pytest.approx(0.3, abs=0.03)
    else:
        assert record["validation_gain"] > 2.0
        assert record["junk_share"] is None


def test_share_is_of_the_rows_that_are_learnt_from():
    """Rows that are not learnt from take no part in the share."""
    junk = Junk(torch.cat([torch.full((100,), 20.0), torch.full((100,), -20.0)]))
    junk.learn_share(torch.arange(100))
    assert junk.share == 0.0
    junk.learn_share(torch.arange(200))
    assert junk.share == pytest.approx(0.5, abs=1e-3)


def test_what_a_search_for_the_pose_wins_is_the_volume_that_it_searched(setup):
    """The likelihood averaged over all poses, against that which a prior about the pose that was found gives."""
    num, particles = 50, setup.source.particles
    prior = ViewPrior(rotation_rad=0.02, shift_A=0.8, log_contrast=0.2, fitted=True)
    deviations = np.array([0.03, 0.02, 0.025, 0.9, 1.1])  # that an image leaves its pose, in radians and Angstrom
    widths = np.array([0.02] * 3 + [0.8] * 2)
    information = torch.eye(6).repeat(num, 1, 1)
    information[:, :5, :5] = torch.diag(torch.as_tensor((widths / deviations) ** 2, dtype=torch.float32))
    spread_A = np.sqrt(np.mean((particles.origin_A - particles.origin_A.mean(0)) ** 2))
    variances = widths**2 + deviations**2
    found = np.random.default_rng(4).normal(scale=np.sqrt(variances), size=(200_000, 5))  # less the best
    about_found = np.mean(-0.5 * (found**2 / variances).sum(1)) - 0.5 * np.log(variances / deviations**2).sum()
    volume = np.prod(np.sqrt(2 * np.pi) * deviations)
    over_all = np.log(volume / (8 * np.pi**2) / (2 * np.pi * spread_A**2))
    assert nats_of_search(prior, information, particles) == pytest.approx(about_found - over_all, abs=0.02)
    for other in (None, replace(prior, fitted=False)):
        assert nats_of_search(other, information, particles) == 0.0
