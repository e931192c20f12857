"""Training on small simulated sets: the motion is found, interruptions change nothing, bad checkpoints are refused."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import starfile
import torch
from scipy.spatial import cKDTree

from flexlib import training
from flexlib.errors import InputError
from flexlib.latents import (
    LatentPrior,
    Search,
    fisher_information,
    friedel_halves,
    infer_everywhere,
    infer_latents,
    latent_centres,
    log_likelihood_loss,
)
from flexlib.maps import read_map
from flexlib.mesh.build import build_mesh
from flexlib.mesh.elastic import elastic_modes
from flexlib.model import FlexModel, FlowGenerator, displacement_basis_A
from flexlib.particles.images import plane_weight, split_batches
from flexlib.prepare import prepare_particles
from flexlib.settings import MeshSettings, PrepareSettings, TrainSettings
from flexlib.simulate import simulate_particles
from flexlib.spectral import measure_forces, spectral_start, suggest_dims

QUICK = TrainSettings(latent_dims=1, epochs=3, validation_fraction=0.1)


def prepared(folder: Path, phantom: str, num_particles: int, snr: float) -> Path:
    simulate_particles(
        folder / "sim", phantom=phantom, num_particles=num_particles, box=32, pixel_size_A=7.0, snr=snr, seed=3
    )
    prepare_particles(
        folder / "sim/particles.star",
        folder / "sim/consensus.mrc",
        folder / "particles",
        mask=None,
        passthrough=None,
        image_root=None,
        settings=PrepareSettings(train_box=32),
        mask_settings=MeshSettings(),
    )
    build_mesh(folder / "particles", folder / "mesh", MeshSettings(cells=10))
    return folder


@pytest.fixture(scope="module")
def clamp(tmp_path_factory) -> Path:
    """A jaw that opens and closes: one hinge angle."""
    return prepared(tmp_path_factory.mktemp("clamp"), "clamp", 600, 0.3)


@pytest.fixture(scope="module")
def rigid(tmp_path_factory) -> Path:
    """No motion at all."""
    return prepared(tmp_path_factory.mktemp("rigid"), "rigid", 600, 0.3)


@pytest.fixture(scope="module")
def trained(clamp) -> Path:
    training.train(clamp / "particles", clamp / "mesh", clamp / "train", replace(QUICK, epochs=6))
    return clamp / "train"


def neighbour_r2(latents: np.ndarray, truth: np.ndarray) -> float:
    _, nearest = cKDTree(latents[::2]).query(latents[1::2], k=15)
    error = truth[::2][nearest].mean(1) - truth[1::2]
    return float(1 - (error**2).mean() / truth[1::2].var())


def latents_of(train_dir: Path) -> np.ndarray:
    table = starfile.read(train_dir / "latents.star", always_dict=True)["particles"]
    return table.filter(regex=r"^flexLatent\d+$").to_numpy(np.float64)


def test_motion_is_found(trained, clamp):
    truth = np.load(clamp / "sim/truth.npz")["angles_rad"][:, 0]
    assert neighbour_r2(latents_of(trained), truth) > 0.8
    scores = json.loads((trained / "validation.json").read_text())
    assert scores["validation_gain"] > 3 * scores["validation_gain_se"]
    assert 0.5 < scores["rms_displacement_A"] < 20


def test_model_file_holds_what_was_trained(trained):
    model = FlexModel.load(trained)
    assert np.abs(model.latents - latents_of(trained)).max() < 1e-5
    assert model.displacements_A(torch.zeros(2, 1)).shape == (2, len(model.mesh.vertices_A), 3)
    canonical = read_map(trained / "canonical.mrc")
    assert canonical.pixel_size_A == pytest.approx(7.0)
    assert np.array_equal(canonical.data, model.canonical)


def test_latents_are_standardised_and_carry_their_error(trained):
    latents = latents_of(trained)
    assert abs(latents.mean()) < 0.2
    assert 0.7 < latents.std() < 1.3
    table = starfile.read(trained / "latents.star", always_dict=True)["particles"]
    error = table["flexLatentStdErr1"].to_numpy(np.float64)
    assert ((error > 0) & (error < 1)).all()  # the images always add to the unit prior


def test_no_motion_is_invented(rigid):
    """With nothing to find the held-out gain is not above zero by more than its error."""
    training.train(rigid / "particles", rigid / "mesh", rigid / "train", replace(QUICK, epochs=6))
    scores = json.loads((rigid / "train/validation.json").read_text())
    assert scores["validation_gain"] < 3 * scores["validation_gain_se"]


def test_interrupted_run_ends_like_an_undisturbed_one(clamp, tmp_path, monkeypatch):
    settings = replace(QUICK, latent_dims=2)
    arguments = (clamp / "particles", clamp / "mesh")
    training.train(*arguments, tmp_path / "whole", settings)

    steps = {"done": 0}
    take_step = training._step

    def step_then_sigterm(*args):
        steps["done"] += 1
        if steps["done"] == 30:  # in the middle of the second epoch
            signal.raise_signal(signal.SIGTERM)
        return take_step(*args)

    monkeypatch.setattr(training, "_step", step_then_sigterm)
    with pytest.raises(SystemExit) as stopped:
        training.train(*arguments, tmp_path / "parts", settings)
    assert stopped.value.code == training.EXIT_INTERRUPTED
    assert not (tmp_path / "parts/model.pt").exists()
    training.train(*arguments, tmp_path / "parts", settings)
    assert np.abs(latents_of(tmp_path / "whole") - latents_of(tmp_path / "parts")).max() < 1e-6


def test_checkpoint_of_other_settings_is_refused(clamp, tmp_path):
    training.train(clamp / "particles", clamp / "mesh", tmp_path, replace(QUICK, epochs=1))
    with pytest.raises(InputError, match=r"checkpoint\.pt: a checkpoint of another run \(different settings\)"):
        training.train(clamp / "particles", clamp / "mesh", tmp_path, replace(QUICK, epochs=1, rigidity=0.1))


@pytest.fixture(scope="module")
def setup(clamp) -> training.Setup:
    return training._set_up(clamp / "particles", clamp / "mesh", QUICK, "cpu")


def test_spectral_start_sees_the_motion_before_any_training(setup, clamp):
    basis = training._basis(setup)
    start = training._start(setup)
    batches = [setup.source.batch(rows) for rows in split_batches(np.arange(len(setup.source)), 100)]
    forces = measure_forces(
        setup.operator, start.canonical.values, batches, len(setup.source), basis, setup.band(0)
    )
    spectrum = spectral_start(forces, 1, np.ones(len(basis)))
    truth = np.load(clamp / "sim/truth.npz")["angles_rad"][:, 0]
    assert neighbour_r2(spectrum.latents, truth) > 0.5
    assert spectrum.eigenvalues[0] > 2 * spectrum.noise_edge
    assert np.abs(spectrum.latents.std() - 1) < 0.1


def test_latent_inference_has_the_gradient_of_the_loss(setup):
    """Forward differences against autograd, and the optimum against a scan of the objective."""
    stiffness, modes = elastic_modes(setup.mesh, 30)
    basis = torch.as_tensor(displacement_basis_A(modes, stiffness, setup.mesh.vertices_A)) * 5
    torch.manual_seed(1)
    flow = FlowGenerator(basis, 2, 2, 16)
    with torch.no_grad():
        flow.linear[:, :3] = torch.randn(2, 3)
    batch = setup.source.batch(np.arange(8))
    values = torch.as_tensor(setup.consensus.data).reshape(-1)[setup.operator.voxels.index]
    weight = plane_weight(32, 12)
    z = (0.3 * torch.randn(8, 2)).requires_grad_()
    loss = log_likelihood_loss(setup.operator, values, batch, flow(z), weight)
    (exact,) = torch.autograd.grad(loss.sum(), z)
    from flexlib.latents import _objective_and_gradient

    prior = LatentPrior()
    found, gradient = _objective_and_gradient(setup.operator, flow, values, batch, weight, z.detach(), prior)
    assert (gradient - exact - z.detach()).norm() < 1e-4 * exact.norm()
    assert (found - loss.detach() - 0.5 * (z.detach() ** 2).sum(1)).abs().max() < 1e-2

    posterior = infer_latents(setup.operator, flow, values, batch, weight, torch.zeros(8, 2), steps=15)

    def objective(latents):
        with torch.no_grad():
            nats = log_likelihood_loss(setup.operator, values, batch, flow(latents), weight)
        return nats + 0.5 * (latents**2).sum(1)

    best = objective(posterior.latents)
    for shift in ([0.3, 0], [-0.3, 0], [0, 0.3], [0, -0.3]):
        assert (objective(posterior.latents + torch.tensor(shift)) > best - 1e-3).all()


def test_friedel_halves_split_the_plane():
    box = 16
    first, second = friedel_halves(box, 5)
    assert torch.equal(first + second, torch.ones(box, box // 2 + 1))
    assert 0.3 < first.mean() < 0.7
    for ky in range(1, box):  # column kx = 0 holds both mates
        assert first[ky, 0] == first[-ky, 0]


def test_rescaling_latents_moves_nothing():
    torch.manual_seed(0)
    flow = FlowGenerator(torch.randn(5, 7, 3), 2, 3, 8)
    with torch.no_grad():
        flow.output.weight.normal_()
        flow.linear.normal_()
    z = torch.randn(4, 2)
    before = flow(z).detach()
    matrix, offset = torch.tensor([[2.0, 0.0], [0.7, 0.5]]), torch.tensor([0.3, -1.0])
    flow.rescale_latents(matrix, offset)
    flow.rescale_latents(torch.eye(2), torch.zeros(2))
    moved = torch.linalg.solve(matrix, (z - offset).T).T
    assert (flow(moved) - before).abs().max() < 1e-4


def test_missing_model_is_told_in_one_line(tmp_path):
    with pytest.raises(InputError, match="no trained model"):
        FlexModel.load(tmp_path)


def test_suggested_dims_stop_at_the_deepest_drop():
    noise = np.full(50, 1.2)
    assert suggest_dims(np.array([22.8, 19.8, 8.1, 7.5, 6.3, 6.2, 5.8, 5.1, 4.7, 4.4, 4.1, *noise]), 1.5) == 2
    harmonics = np.array([30.8, 14.4, 10.3, 7.4, 6.8, 6.1, 5.8, 5.4, 5.0, 4.8, 4.5, 4.3])
    assert suggest_dims(np.array([*harmonics, *noise]), 2.3) == 1
    assert suggest_dims(np.array([5.0, 4.0, *noise]), 1.5) == 2
    assert suggest_dims(noise, 1.5) == 0


def test_unconfirmed_motion_is_not_kept(rigid):
    """The rigid set's model stands still, so that its reconstruction is the rigid one."""
    training.train(rigid / "particles", rigid / "mesh", rigid / "still", replace(QUICK, epochs=2))
    model = FlexModel.load(rigid / "still")
    assert model.displacements_A(torch.randn(5, 1)).abs().max() == 0
    assert json.loads((rigid / "still/validation.json").read_text())["rms_displacement_A"] == 0
