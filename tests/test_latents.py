"""Latents of single particles and the spectral start, against finite differences, Monte Carlo and known truth."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage
from training_sets import bent_flow, masked_consensus, neighbour_r2, predicted_images, prepared, small_setup

from flexlib.images.batch import split_batches
from flexlib.imaging.fourier import resample_spectrum
from flexlib.imaging.image_transforms import plane_weight
from flexlib.model import moving_map
from flexlib.model.flow import FlowGenerator
from flexlib.model.forward import EXACT, CoarseMap, Operator, log_likelihood_loss
from flexlib.model.moving_map import MovingMap, fisher_information
from flexlib.model.views import ViewPrior
from flexlib.projection.op import gather_volume, project, scatter_volume, view_vertices
from flexlib.train.fields import BASIS_UNIT_A, displacement_basis
from flexlib.train.latents import (
    LatentPrior,
    friedel_halves,
    infer_latents,
    learn_curvature,
)
from flexlib.train.modes import find_modes, latent_centres, search_latents
from flexlib.train.score import HeldOutScore, choose_held_out, score_held_out
from flexlib.train.setup import Setup
from flexlib.train.spectral import (
    FieldForces,
    FourierSampling,
    fields_of_latents,
    mean_information,
    measure_forces,
    spectral_start,
    suggest_dims,
)

BOX = 64


@pytest.fixture(scope="module")
def clamp(tmp_path_factory):
    """A jaw that opens and closes, in a box large enough for a coarse view."""
    return prepared(tmp_path_factory.mktemp("clamp"), "clamp", 300, 0.3, box=BOX, cells=12)


@pytest.fixture(scope="module")
def setup(clamp) -> Setup:
    return small_setup(clamp, 2)


@pytest.fixture(scope="module")
def basis(setup) -> torch.Tensor:
    return displacement_basis(setup.mesh, setup.ranks, setup.device)


@pytest.fixture(scope="module")
def values(setup) -> torch.Tensor:
    return masked_consensus(setup)


@pytest.fixture(scope="module")
def flow(basis) -> FlowGenerator:
    return bent_flow(basis, 0.3)


@pytest.fixture(scope="module")
def batch(setup):
    return setup.source.batch(np.arange(12))


def test_assembled_flow_is_the_flow(flow):
    """Displacements and their gradients by latents and parameters, with latents in another scale."""
    flow = copy.deepcopy(flow)
    with torch.no_grad():
        flow.output.bias.normal_()
    flow.rescale_latents(torch.tensor([[1.5, 0.0], [0.4, 0.7]]), torch.tensor([0.2, -0.3]))
    z = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    pull = torch.randn(flow(z).shape, generator=torch.Generator().manual_seed(1))
    results = []
    for moves in (flow, flow.assembled()):
        at = z.clone().requires_grad_()
        displacements = moves(at)
        wanted = (at, *flow.parameters())
        results.append((displacements, *torch.autograd.grad((displacements * pull).sum(), wanted)))
    for plain, assembled in zip(*results, strict=True):
        assert (plain - assembled).norm() < 1e-5 * plain.norm()


def test_information_is_the_squared_change_of_the_prediction(setup, flow, values, batch):
    weight = plane_weight(BOX, 20)
    z = 0.5 * torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    information = fisher_information(MovingMap(setup.operator, flow, values), batch, weight, z, probe=0.02)
    for direction in torch.tensor([[1.0, 0.0], [0.6, -0.8]]):
        with torch.no_grad():
            ends = [setup.operator.slices(values, batch, flow(z + s * 0.01 * direction)) for s in (1, -1)]
        slope = batch.transfer * (ends[0] - ends[1]) / 0.02
        expected = (weight * slope.abs() ** 2).sum((1, 2))
        found = torch.einsum("i,bij,j->b", direction, information, direction)
        assert ((found - expected).abs() < 0.05 * expected).all()


def test_information_is_the_same_however_many_parameters_are_probed_at_once(monkeypatch, setup, flow, values, batch):
    views = ViewPrior(0.02, 1.0, 0.1)
    parameters = torch.cat([torch.tensor([[0.5, -1.0], [1.2, 0.3]]), 0.3 * torch.ones((2, 6))], 1)
    model, weight = MovingMap(setup.operator, flow, values, views=views), setup.weight(setup.schedule.full_band)
    some = batch.take(torch.tensor([3, 7]))
    whole = fisher_information(model, some, weight, parameters)
    monkeypatch.setattr(moving_map, "PROBE_BYTES", 1)
    torch.testing.assert_close(fisher_information(model, some, weight, parameters), whole, rtol=1e-4, atol=1e-3)
    assert (whole.diagonal(dim1=1, dim2=2) > 0).all()


def test_information_in_the_coarse_view_is_that_of_its_shells(setup, flow, values, batch):
    """To shells that the half box holds both views measure the same; the given ratio is for finer ones."""
    weight = plane_weight(BOX, 10)
    z = 0.5 * torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    full = fisher_information(MovingMap(setup.operator, flow, values), batch, weight, z)
    ratios = (1.5, 1.0, 1.0, 1.0)
    coarse = MovingMap(setup.operator, flow, values, setup.coarse, ratios).information(batch, weight, z) / 1.5
    assert (coarse - full).norm() < 0.1 * full.norm()
    assert ((coarse - full).flatten(1).norm(dim=1) < 0.25 * full.flatten(1).norm(dim=1)).all()


def test_gradient_of_the_objective_and_its_optimum(setup, flow, values, batch):
    """Exact gradient against central differences; the inferred latents against a scan around them."""
    weight = plane_weight(BOX, 16)
    seen = predicted_images(MovingMap(setup.operator, flow, values), batch, torch.full((12, 2), 0.4), 2)
    model = MovingMap(setup.operator, flow, values)
    for prior in (LatentPrior(), LatentPrior(0.8, 4.0)):

        def objective(z, prior=prior):
            with torch.no_grad():
                return log_likelihood_loss(setup.operator, values, seen, flow(z), weight) + prior.energy(z)

        posterior = infer_latents(model, seen, weight, torch.zeros(12, 2), 15, prior)
        best = objective(posterior.latents)
        assert (best - posterior.objective).abs().max() < 1e-2
        for shift in ([0.3, 0], [-0.3, 0], [0, 0.3], [0, -0.3]):
            assert (objective(posterior.latents + torch.tensor(shift)) > best).all()
        z = torch.full((12, 2), 0.7)
        for axis in range(2):
            step = torch.zeros(2)
            step[axis] = 1e-2
            slope = (prior.energy(z + step) - prior.energy(z - step)) / 2e-2
            assert torch.allclose(slope, prior.gradient(z)[:, axis], rtol=1e-3)
            bend = (prior.gradient(z + step) - prior.gradient(z - step))[:, axis] / 2e-2
            assert torch.allclose(bend, prior.curvature(z)[:, axis, axis], rtol=5e-3)


def test_curvature_learns_from_steps_and_stays_positive_definite():
    """The secant condition where the gradient rose enough; damped where it fell; else untouched."""
    generator = torch.Generator().manual_seed(0)
    step = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    factor = torch.randn(6, 3, 3, generator=generator, dtype=torch.float64)
    hessian = factor @ factor.transpose(1, 2) + 0.1 * torch.eye(3)
    true = 2 * hessian + torch.eye(3)
    learnt = learn_curvature(hessian, step, (true @ step[..., None])[..., 0])
    assert torch.allclose(learnt @ step[..., None], true @ step[..., None])
    expected = (step[:, None] @ hessian @ step[..., None])[:, 0, 0]
    concave = learn_curvature(hessian, step, -(true @ step[..., None])[..., 0])
    assert torch.allclose((step[:, None] @ concave @ step[..., None])[:, 0, 0], 0.2 * expected)
    for matrices in (learnt, concave):
        assert (torch.linalg.eigvalsh(matrices) > 0).all()
    stiff = torch.diag(torch.tensor([1e9, 1e-3, 1.0], dtype=torch.float64)).expand(3, 3, 3)
    hopeless = torch.tensor([[0.0, 0.0, 0.0], [torch.nan, 1.0, 0.0], [0.0, 0.0, 1e-200]], dtype=torch.float64)
    assert torch.equal(learn_curvature(stiff, hopeless, torch.ones(3, 3, dtype=torch.float64)), stiff)


def test_latents_lie_as_far_from_the_truth_as_their_errors_say(setup, flow, values):
    """The posterior precision is that of the estimates: the mean squared normalised error is 1."""
    weight = plane_weight(BOX, 20)
    truth = torch.randn(120, 2, generator=torch.Generator().manual_seed(4))
    batch = predicted_images(MovingMap(setup.operator, flow, values), setup.source.batch(np.arange(120)), truth, 5)
    posterior = infer_latents(MovingMap(setup.operator, flow, values), batch, weight, truth, 6)
    error = (posterior.latents - truth)[:, None]
    squared = (error @ posterior.precision @ error.transpose(1, 2))[:, 0, 0]
    assert 0.7 < float(squared.median()) / 1.386 < 1.4  # the median of chi squared with two degrees of freedom


def deep_blob(setup) -> torch.Tensor:
    """Values of a smooth blob where the mask is deepest, so that the mask cuts nothing off."""
    inside = setup.mask.data > 0.01
    centre = np.unravel_index(ndimage.distance_transform_edt(inside).argmax(), inside.shape)
    distance = ((np.indices(inside.shape) - np.reshape(centre, (3, 1, 1, 1))) ** 2).sum(0)
    return gather_volume(torch.as_tensor(np.exp(-distance / (2 * 2.0**2)), dtype=torch.float32), setup.operator.voxels)


def test_coarse_map_predicts_the_same_images(setup, flow, batch):
    """Half the box, twice the pixel: what a map without fine detail projects to is the same."""
    coarse = setup.coarse
    assert isinstance(coarse, CoarseMap)
    smooth = deep_blob(setup)
    z = torch.full((12, 2), 0.5)
    weight = plane_weight(BOX, 10)
    with torch.no_grad():
        fine = batch.transfer * setup.operator.slices(smooth, batch, flow(z)) * weight
        small = coarse.batch(batch)
        found = small.transfer * coarse.operator.slices(coarse.values(smooth), small, flow(z)) * coarse.weight(weight)
    rows = torch.cat([torch.arange(BOX // 4), torch.arange(-BOX // 4, 0)])
    expected = fine[:, rows][:, :, : BOX // 4 + 1]
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_particles_in_a_wrong_local_minimum_are_found(setup, values):
    """A motion that comes back on itself makes several local minima; the search ends in the lowest one."""

    class Swing(torch.nn.Module):
        def forward(self, z):
            angle = 1.2 * z[:, :1]
            circle = torch.cat([torch.sin(angle), torch.cos(angle) - 1], 1) * 6.0
            return torch.einsum("bi,ivc->bvc", circle, fields)

    fields = displacement_basis(setup.mesh, setup.ranks, setup.device)[:2] / BASIS_UNIT_A
    weight = plane_weight(BOX, 20)
    truth = torch.linspace(-1.8, 1.8, 40)[:, None]
    batch = predicted_images(MovingMap(setup.operator, Swing(), values), setup.source.batch(np.arange(40)), truth, 7)
    centres = torch.as_tensor(latent_centres(truth.numpy(), 0))
    lost = -truth
    model = MovingMap(setup.operator, Swing(), values, setup.coarse)
    alone = infer_latents(model, batch, weight, lost, 8)
    found = find_modes(model, batch, weight, lost, 8, centres).best
    assert (found.objective <= alone.objective + 1e-3).all()
    far = (truth.abs() > 0.8)[:, 0]
    right = (found.latents - truth).abs()[:, 0] < 0.5
    assert right.float().mean() > 0.9
    assert right[far].sum() > ((alone.latents - truth).abs()[:, 0] < 0.5)[far].sum()
    _, lower = search_latents(
        model, batch, weight, found.latents, centres, model.information(batch, weight, found.latents)
    )
    assert (lower < 1.0).all()  # nothing is left to find


def test_noise_covariance_of_the_forces_is_the_models(setup, values, basis):
    """Mean Fisher information from 3D transforms against forces of white noise images (Monte Carlo)."""
    band = 16.0
    weight = plane_weight(BOX, band)
    sampling = FourierSampling(BOX, band)
    fields = basis[[0, 1, 2, 5, 20, -6, -5, -1]]
    outer, count = torch.zeros(len(fields), len(fields), dtype=torch.float64), 0
    generator = torch.Generator().manual_seed(3)
    for rows in split_batches(np.arange(300), 100):
        one = setup.source.batch(rows)
        sampling.add(one)
        vertices = view_vertices(
            setup.operator.vertices_A, one.rotation, one.origin_px, setup.operator.pixel_size_A
        ).requires_grad_()
        slices = project(values, vertices, setup.operator.voxels, "linear", 2) * one.transfer
        for _ in range(6):
            noise = torch.fft.rfft2(torch.randn(len(rows), BOX, BOX, generator=generator), norm="ortho")
            (slope,) = torch.autograd.grad(
                (weight * (noise.real * slices.real + noise.imag * slices.imag)).sum(), vertices, retain_graph=True
            )
            spatial = slope @ one.rotation[:, :2] / setup.operator.pixel_size_A
            force = (spatial.flatten(1) @ fields.flatten(1).T).double()
            outer += force.T @ force
            count += len(rows)
    monte_carlo = (outer / count).numpy()
    model = mean_information(setup.operator, values, fields, sampling)
    ratio = np.diag(model) / np.diag(monte_carlo)
    assert np.all(np.abs(ratio - 1) < 0.12), ratio
    assert np.linalg.norm(model - monte_carlo) < 0.12 * np.linalg.norm(monte_carlo)


def test_spectral_start_sees_the_motion_before_any_training(setup, values, basis, clamp):
    batches = [setup.source.batch(rows) for rows in split_batches(np.arange(300), 100)]
    forces = measure_forces(setup.operator, values, batches, 300, basis, setup.schedule.band(0))
    spectrum = spectral_start(forces, 1, np.ones(len(basis)))
    truth = np.load(clamp / "sim/truth.npz")["angles_rad"][:, 0]
    assert neighbour_r2(spectrum.latents, truth) > 0.5
    assert spectrum.eigenvalues[0] > 2 * spectrum.noise_edge
    assert np.abs(spectrum.latents.std() - 1) < 0.1
    # latents of any other source give their displacement fields by the same regression
    again = fields_of_latents(forces, 3.0 * spectrum.latents + 7.0, np.ones(len(basis)))
    assert np.allclose(again, spectrum.directions / 3.0, atol=1e-5 + 0.01 * np.abs(spectrum.directions).max())


def test_pure_noise_shows_no_dims():
    """Forces of noise alone, with a wide range of information: eigenvalues within the edge, nothing suggested."""
    generator = np.random.default_rng(0)
    mixing = generator.standard_normal((40, 40)) * np.geomspace(1, 1e-2, 40)
    force = (generator.standard_normal((5000, 40)) @ mixing).astype(np.float32)
    spectrum = spectral_start(FieldForces(force, mixing.T @ mixing), 2, np.zeros(40))
    assert spectrum.eigenvalues[0] < spectrum.noise_edge
    assert spectrum.suggested_dims == 0
    hidden = force + 4.0 * generator.standard_normal((5000, 1)) * mixing[3]
    assert (
        spectral_start(FieldForces(hidden.astype(np.float32), mixing.T @ mixing), 2, np.zeros(40)).suggested_dims == 1
    )


def test_suggested_dims_stop_at_the_deepest_drop():
    noise = np.full(50, 1.2)
    assert suggest_dims(np.array([22.8, 19.8, 8.1, 7.5, 6.3, 6.2, 5.8, 5.1, 4.7, 4.4, 4.1, *noise]), 1.5) == 2
    harmonics = np.array([30.8, 14.4, 10.3, 7.4, 6.8, 6.1, 5.8, 5.4, 5.0, 4.8, 4.5, 4.3])
    assert suggest_dims(np.array([*harmonics, *noise]), 2.3) == 1
    assert suggest_dims(np.array([5.0, 4.0, *noise]), 1.5) == 2
    assert suggest_dims(noise, 1.5) == 0


def test_friedel_halves_split_the_plane():
    box = 16
    first, second = friedel_halves(box, 5)
    assert torch.equal(first + second, torch.ones(box, box // 2 + 1))
    assert 0.3 < first.mean() < 0.7
    for ky in range(1, box):  # column kx = 0 holds both mates
        assert first[ky, 0] == first[-ky, 0]


def test_symmetry_copies_are_held_out_together():
    image_index = np.repeat(np.arange(200), 3)
    choice = choose_held_out(image_index, 0.1)
    training_rows, held = choice.training, choice.held_out
    assert len(held) == 60 and len(training_rows) == 540
    assert not set(image_index[held]) & set(image_index[training_rows])
    assert np.array_equal(held, choose_held_out(image_index, 0.1).held_out)


def test_score_of_nothing_held_out_is_not_a_number():
    score = HeldOutScore(
        gains=np.zeros(0), rows=np.zeros(0, int), parameters=torch.zeros(0, 2), rigid_views=torch.zeros(0, 0)
    )
    assert np.isnan(score.gain) and np.isnan(score.standard_error)


def test_symmetry_copies_change_neither_the_score_nor_its_error(setup, flow, values):
    """Every row twice, at the same latents: a particle counts once, whatever the number of its rows."""
    model = MovingMap(setup.operator, flow, values)
    rigid = MovingMap(setup.rigid, None, gather_volume(setup.consensus.data * setup.mask.data, setup.rigid.voxels))
    once, start = setup.held_out(), torch.randn(30, 2, generator=torch.Generator().manual_seed(3))
    twice = replace(once, rows=once.rows.repeat(2), particle=once.particle.repeat(2))
    expected = score_held_out(once, model, rigid, start, torch.zeros((30, 0)), steps=0)
    found = score_held_out(twice, model, rigid, start.repeat_interleave(2, 0), torch.zeros((60, 0)), steps=0)
    assert len(found.gains) == 30 and len(found.parameters) == 60
    np.testing.assert_array_equal(found.rows, once.rows)
    np.testing.assert_allclose(found.gains, expected.gains, rtol=1e-4, atol=1e-2)
    assert found.gain == pytest.approx(expected.gain, rel=1e-3)
    assert found.standard_error == pytest.approx(expected.standard_error, rel=1e-3)


@pytest.mark.parametrize("ndim", [2, 3])
def test_cropped_spectrum_holds_the_same_frequencies(ndim):
    full = torch.randn((2, *(12,) * ndim), generator=torch.Generator().manual_seed(0))
    cropped = resample_spectrum(torch.fft.rfftn(full, dim=tuple(range(1, ndim + 1))), 8, ndim)
    expected = torch.fft.fftn(full, dim=tuple(range(1, ndim + 1)))
    rows = torch.tensor([0, 1, 2, 3, -4, -3, -2, -1])
    for axis in range(1, ndim + 1):
        below_nyquist = (rows.abs() < 4).view(-1, *(1,) * (ndim - axis))
        expected = expected.index_select(axis, rows % 12) * below_nyquist
    torch.testing.assert_close(cropped, expected[..., :5])


def test_an_operator_takes_its_accuracy_and_device(setup):
    operator = Operator.on_mesh(setup.mesh, setup.mask.data > 0.5, setup.mask.pixel_size_A, "cpu", EXACT)
    assert operator.accuracy == EXACT and operator.voxels.box == BOX
    batch = setup.source.batch(np.arange(3))
    values = gather_volume(setup.consensus.data, operator.voxels)
    vertices = operator.vertices_px(batch)
    assert torch.equal(operator.slices(values, batch), project(values, vertices, operator.voxels, "cubic", 2))
    weight = plane_weight(BOX)
    spectra = batch.images * (weight > 0)
    in_images = (weight * (operator.project(values, vertices).conj() * spectra).real).double().sum()
    in_volume = (values * operator.project_adjoint(spectra, vertices)).double().sum()
    assert in_volume == pytest.approx(float(in_images), rel=1e-3)


def test_scatter_and_coarse_values_keep_the_mean(setup):
    """The coarse map of a smooth density holds the same mass."""
    smooth = deep_blob(setup)
    mass = scatter_volume(smooth, setup.operator.voxels).sum()
    assert 8 * setup.coarse.values(smooth).sum() == pytest.approx(float(mass), rel=0.02)
