"""Images that show no particle: told as such, and neither learnt from nor sold as motion."""

import json
from dataclasses import replace
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import starfile
import torch
from scipy.stats import rankdata
from training_sets import bent_flow, latents_of, masked_consensus, neighbour_r2, prepared, small_setup

from flexlib.mesh.build import build_mesh
from flexlib.model.flex_model import FlexModel
from flexlib.model.moving_map import MovingMap
from flexlib.model.views import ViewPrior
from flexlib.prepare.run import prepare_particles
from flexlib.train.fields import displacement_basis
from flexlib.train.junk import Junk, nats_of_search, noise_loss
from flexlib.train.rigid import rigid_model
from flexlib.train.run import train
from flexlib.train.score import score_held_out
from flexlib.train.step import MiniBatch, find_step
from flexlib.workflow_support.settings import MeshSettings, PrepareSettings, TrainSettings

NUM, BOX = 800, 32


def area_under_curve(good: np.ndarray, score: np.ndarray) -> float:
    """Of the ROC curve: the chance that one of the ``good`` (n,) bool has a higher ``score`` (n,) than another."""
    ranks, num_good, num_bad = rankdata(score), good.sum(), (~good).sum()
    return float((ranks[good].sum() - num_good * (num_good + 1) / 2) / (num_good * num_bad))


def spoil(folder: Path, share: float) -> np.ndarray:
    """Turn a ``share`` of a simulated set into junk, half noise and half with another's pose; (n,) bool which."""
    sim, generator = folder / "sim", np.random.default_rng(8)
    tables = starfile.read(sim / "particles.star")
    particles = tables["particles"]
    chosen = generator.permutation(len(particles))[: round(share * len(particles))]
    noise, swapped = np.array_split(chosen, 2)
    angles = ["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]
    particles.loc[swapped, angles] = particles.loc[np.roll(swapped, 1), angles].to_numpy()
    starfile.write(tables, sim / "particles.star", overwrite=True)
    with mrcfile.open(sim / "particles.mrcs", "r+") as stack:
        sd = np.sqrt(np.median(stack.data.astype(np.float64).var((1, 2))))
        stack.data[noise] = generator.normal(scale=sd, size=stack.data[noise].shape).astype(stack.data.dtype)
    prepare_particles(
        sim / "particles.star", sim / "consensus.mrc", folder / "particles", settings=PrepareSettings(train_box=BOX)
    )
    build_mesh(folder / "particles", folder / "mesh", MeshSettings(cells=10))
    is_junk = np.zeros(len(particles), bool)
    is_junk[chosen] = True
    return is_junk


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


def test_junk_is_found_and_motion_survives_it(tmp_path):
    clean = prepared(tmp_path, "clamp", NUM, 0.15, box=BOX)
    settings = TrainSettings(latent_dims=1, validation_fraction=0.1, epochs=8)
    train(clean / "particles", clean / "mesh", tmp_path / "clean", settings, "cpu")
    truth = np.load(tmp_path / "sim/truth.npz")["angles_rad"][:, 0]
    assert json.loads((tmp_path / "clean/validation.json").read_text())["junk_share"] < 0.02
    is_junk = spoil(tmp_path, 0.25)
    train(tmp_path / "particles", tmp_path / "mesh", tmp_path / "spoilt", settings, "cpu")
    record = json.loads((tmp_path / "spoilt/validation.json").read_text())
    assert record["junk_share"] == pytest.approx(0.25, abs=0.03)
    assert record["rejected_gain"] is None
    probability = latents_of(tmp_path / "spoilt", "flexParticleProbability")[:, 0]
    assert np.allclose(probability, FlexModel.load(tmp_path / "spoilt").probability, atol=1e-5)
    assert area_under_curve(~is_junk, probability) > 0.98
    of_clean, of_spoilt = (latents_of(tmp_path / name)[~is_junk] for name in ("clean", "spoilt"))
    assert neighbour_r2(of_spoilt, truth[~is_junk]) > neighbour_r2(of_clean, truth[~is_junk]) - 0.03


@pytest.mark.parametrize("find_junk", [True, False])
def test_junk_is_not_motion(tmp_path, find_junk):
    """Rigid particles and a third of junk: whoever takes all for particles sells it as six nats of motion."""
    prepared(tmp_path, "rigid", NUM, 0.15, box=BOX)
    spoil(tmp_path, 0.3)
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
