"""Poses and contrasts: what their parameters mean, what images say of them, and that a run finds them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from training_sets import latents_of, masked_consensus, neighbour_r2, prepared, small_setup

from flexlib.imaging.image_transforms import plane_weight
from flexlib.layout import MeshFolder, ParticlesFolder
from flexlib.model.flow import FlowGenerator, rigid_modes_A, without_rigid_motion
from flexlib.model.forward import EXACT, Operator, log_likelihood_loss
from flexlib.model.moving_map import MovingMap, fisher_information
from flexlib.model.views import PoseFrame, ViewPrior, mean_rigid_motion, pose_change
from flexlib.particles.read import read_particles
from flexlib.projection.op import gather_volume
from flexlib.records import ValidationRecord
from flexlib.train import train
from flexlib.train.fields import displacement_basis, rigid_fields
from flexlib.train.latents import LatentPrior, infer_latents
from flexlib.train.learn_views import measure_widths
from flexlib.train.rigid import rigid_model, rigid_start
from flexlib.train.settle import take_out_mean_pose
from flexlib.train.setup import Setup, set_up
from flexlib.train.spectral import FieldForces, measure_forces
from flexlib.train.start import mean_transfer2, start
from flexlib.train.views import Views
from flexlib.train.widths import WidthEvidence
from flexlib.workflow_support.settings import TrainSettings

BOX = 64
PRIOR = ViewPrior(np.deg2rad(3.0), 3.0, 0.2)


@pytest.fixture(scope="module")
def clamp(tmp_path_factory):
    """Particles in a box large enough for a coarse map."""
    return prepared(tmp_path_factory.mktemp("clamp"), "clamp", 300, 0.3, box=BOX, cells=10)


@pytest.fixture(scope="module")
def setup(clamp) -> Setup:
    return small_setup(clamp, 1)


@pytest.fixture(scope="module")
def values(setup) -> torch.Tensor:
    return masked_consensus(setup)


@pytest.fixture(scope="module")
def flow(setup) -> FlowGenerator:
    torch.manual_seed(1)
    basis = displacement_basis(setup.mesh, setup.ranks, setup.device, setup.density_share)
    flow = FlowGenerator(basis, 1, 2, 16)
    with torch.no_grad():
        flow.linear[0, :3] = torch.tensor([1.0, -0.5, 0.3])
        flow.output.weight[:4].normal_(std=0.3)
    return flow


@pytest.fixture(scope="module")
def batch(setup):
    return setup.source.batch(np.arange(24))


def units(num: int, seed: int = 0) -> torch.Tensor:
    return torch.randn((num, 6), generator=torch.Generator().manual_seed(seed))


def test_view_parameters_change_images_as_files_say(setup, batch):
    """The same change, as training applies it to a batch and as it is applied to the particles of a file."""
    own = units(len(setup.source))
    source = setup.source.posed(pose_change(own * PRIOR.widths))
    expected, found = (
        source.batch(batch.rows),
        PRIOR.posed(batch, own[: len(batch.rows)], own[:0], setup.source.pixel_size_A),
    )
    assert (found.rotation - batch.rotation).abs().max() > 0.05  # there is something to compare
    torch.testing.assert_close(found.rotation, expected.rotation, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.origin_px, expected.origin_px, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.transfer, expected.transfer, rtol=1e-4, atol=1e-5)


def test_turned_and_shifted_views_are_the_exact_transform(setup, values, batch):
    """Against the non-uniform DFT of points that scipy has turned: its hand, side, sign and units."""
    operator = Operator.on_mesh(setup.mesh, setup.mask.data > 0, setup.source.pixel_size_A, accuracy=EXACT)
    model = MovingMap(
        operator, None, gather_volume(setup.consensus.data * setup.mask.data, operator.voxels), views=PRIOR
    )
    some, own = batch.take(torch.arange(3)), units(3)
    seen = model.seen(some, own)
    found = operator.slices(model.values, seen) * seen.contrast[:, None, None]
    own = own * PRIOR.widths
    z, y, x = np.unravel_index(operator.voxels.index.numpy(), (BOX,) * 3)
    points_px = np.stack([x, y, z], 1) - BOX // 2
    ky, kx = np.meshgrid(np.fft.fftfreq(BOX) * BOX, np.arange(BOX // 2 + 1), indexing="ij")
    inside = np.hypot(kx, ky) < 0.3 * BOX
    for image, change in enumerate(own.double().numpy()):
        turned = Rotation.from_rotvec(change[:3]).as_matrix() @ some.rotation[image].double().numpy()
        where = points_px @ turned[:2].T - some.origin_px[image].numpy() + change[3:5] / setup.source.pixel_size_A
        phase = np.exp(-2j * np.pi / BOX * (kx[inside, None] * where[:, 0] + ky[inside, None] * where[:, 1]))
        exact = np.exp(change[5]) * (phase @ model.values.double().numpy())
        assert np.abs(found[image].numpy()[inside] - exact).max() < 2e-3 * np.abs(exact).max()


def test_gradient_by_latents_and_views(setup, flow, values, batch):
    """Against central differences along each parameter, of an operator smooth enough for them."""
    accurate = replace(setup.operator, accuracy=EXACT)
    model = MovingMap(accurate, flow, values, views=PRIOR)
    some = batch.take(torch.arange(6))
    weight, at = plane_weight(BOX, 20), torch.cat([torch.full((6, 1), 0.4), 0.5 * units(6)], 1).requires_grad_()
    (gradient,) = torch.autograd.grad(model.loss(some, weight, at).sum(), at)
    step = 0.05
    with torch.no_grad():
        for axis in range(7):
            ends = []
            for sign in (1, -1):
                moved = at.detach().clone()
                moved[:, axis] += sign * step
                ends.append(model.loss(some, weight, moved).double())
            slope = (ends[0] - ends[1]) / (2 * step)
            assert (slope - gradient[:, axis]).norm() < 0.02 * slope.norm() + 0.02, axis


def test_gradient_by_pose_is_the_plain_torch_operators(setup, values, batch):
    """The fused kernel's gradients by rotation and origin are autograd's through plain matrix products."""
    some = batch.take(torch.arange(5))
    displacements = torch.randn((5, len(setup.mesh.vertices_A), 3), generator=torch.Generator().manual_seed(0))
    weight, results = plane_weight(BOX, 20), []
    for dtype in (torch.float32, torch.float64):
        operator = replace(
            setup.operator,
            vertices_A=setup.operator.vertices_A.to(dtype),
            voxels=replace(setup.operator.voxels, bary=setup.operator.voxels.bary.to(dtype)),
        )
        rotation, origin = some.rotation.to(dtype).requires_grad_(), some.origin_px.to(dtype).requires_grad_()
        posed = replace(
            some,
            rotation=rotation,
            origin_px=origin,
            images=some.images.to(torch.complex64 if dtype == torch.float32 else torch.complex128),
            transfer=some.transfer.to(dtype),
        )
        loss = log_likelihood_loss(operator, values.to(dtype), posed, displacements.to(dtype), weight.to(dtype))
        results.append([g.double() for g in torch.autograd.grad(loss.sum(), (rotation, origin))])
    for fused, plain in zip(*results, strict=True):
        assert (fused - plain).norm() < 5e-3 * plain.norm()


def test_information_is_the_squared_change_of_the_prediction(setup, flow, values, batch):
    """All seven parameters, with cross terms, against wide central differences."""
    model = MovingMap(replace(setup.operator, accuracy=EXACT), flow, values, views=PRIOR)
    some, weight = batch.take(torch.arange(4)), plane_weight(BOX, 18)
    at = torch.cat([torch.zeros((4, 1)), 0.3 * units(4)], 1)

    def predicted(parameters):
        seen = model.seen(some, parameters)
        slices = model.operator.slices(values, seen, model.displacements_A(parameters))
        return some.transfer * slices * seen.contrast[:, None, None]

    step, slopes = 0.04, []
    with torch.no_grad():
        for axis in range(7):
            shift = step * torch.eye(7)[axis]
            slopes.append((predicted(at + shift) - predicted(at - shift)) / (2 * step))
        slope = torch.stack(slopes, 1)
        expected = torch.einsum("bikx,bjkx,kx->bij", slope, slope.conj(), weight.to(slope.dtype)).real
    found = fisher_information(model, some, weight, at)
    size = expected.diagonal(dim1=1, dim2=2).sqrt()
    assert ((found - expected).abs() / (size[:, :, None] * size[:, None])).max() < 0.06


def test_poses_and_contrasts_are_found_as_well_as_images_tell_them(setup, flow, values, batch):
    """Images that the model makes at known parameters, with white noise: errors are as large as the precision says."""
    source, num = setup.source, 120
    some = source.batch(np.arange(num))
    model, weight = MovingMap(setup.operator, flow, values, views=PRIOR), plane_weight(BOX, 22)
    truth = torch.cat([torch.randn((num, 1), generator=torch.Generator().manual_seed(9)), units(num, 4)], 1)
    torch.manual_seed(2)
    with torch.no_grad():
        seen = model.seen(some, truth)
        clean = model.operator.slices(values, seen, model.displacements_A(truth)) * seen.contrast[:, None, None]
        noise = torch.fft.rfft2(torch.randn(num, BOX, BOX), norm="ortho")
    some = replace(some, images=some.transfer * clean + noise)
    found = infer_latents(model, some, weight, torch.zeros_like(truth), 12, LatentPrior(num_views=6))
    error = (found.latents - truth)[..., None]
    normalised = (error.transpose(1, 2) @ found.precision @ error)[:, 0, 0]
    assert 0.75 < float(normalised.median()) / 6.35 < 1.3  # the median of chi squared with seven degrees of freedom
    for name, kind in (("rotation", slice(1, 4)), ("shift", slice(4, 6)), ("contrast", slice(6, 7))):
        left = float((error[:, kind] ** 2).mean() / (truth[:, kind] ** 2).mean())
        assert left < 0.35, (name, left)


def test_flow_has_no_rigid_part_at_any_latent(setup, flow):
    """Density-weighted momentum and angular momentum of a bent flow vanish for latents near and far."""
    share = setup.density_share.double()
    with torch.no_grad():
        moved = flow(torch.tensor([[-3.0], [0.1], [2.0], [10.0]])).double()
    momentum = (share[:, None] * moved).sum(1)
    vertices = setup.operator.vertices_A.double().expand_as(moved)
    spin = (share[:, None] * torch.linalg.cross(vertices, moved)).sum(1)
    size = (share[:, None] * moved.square()).sum((1, 2)).sqrt()
    assert (size > 0.1).all()
    assert (momentum.norm(dim=1) < 1e-5 * size).all()
    assert (spin.norm(dim=1) < 1e-5 * size * vertices.norm(dim=2).max()).all()


def test_rigid_motion_is_all_that_is_taken_out():
    generator = np.random.default_rng(0)
    vertices, weight = generator.normal(size=(50, 3)), generator.uniform(0.1, 1, 50)
    rigid, other = rigid_modes_A(vertices), generator.normal(size=(3, 50, 3))
    assert np.abs(without_rigid_motion(rigid, vertices, weight)).max() < 1e-6
    once = without_rigid_motion(other, vertices, weight)
    np.testing.assert_allclose(without_rigid_motion(once + 5 * rigid[:3], vertices, weight), once, atol=1e-5)


def test_common_motion_of_all_poses_is_the_maps(setup, values, batch):
    """Moved map and changed poses predict the images that the poses alone did."""
    num = len(setup.source)
    rotation = torch.as_tensor(setup.source.particles.rotation, dtype=torch.float32)
    turn, push = torch.tensor([0.02, -0.03, 0.01]), torch.tensor([1.0, -0.5, 2.0])
    own = torch.cat([rotation @ turn, rotation[:, :2] @ push, torch.zeros((num, 1))], 1) / PRIOR.widths
    own = own + 0.2 * units(num, 3)
    torch.testing.assert_close(
        mean_rigid_motion(rotation, (own * PRIOR.widths)[:, :3], (own * PRIOR.widths)[:, 3:5]).float(),
        torch.cat([turn, push]),
        rtol=0.1,
        atol=5e-3 * 30,
    )
    views = Views(own.clone(), own[:0], PRIOR)
    removed_A = take_out_mean_pose(setup, views, own[:, :0], torch.arange(len(own)))
    changed = views.own(own[:, :0], setup.rotation)
    left = mean_rigid_motion(rotation, changed[:, :3], changed[:, 3:5])
    assert left.abs().max() < 1e-5
    before, after = (
        of.seen(batch, own[batch.rows], own[batch.rows, :0], setup.source.pixel_size_A) for of in (PRIOR, views.prior)
    )
    with torch.no_grad():
        was = setup.operator.slices(values, before)
        now = setup.operator.slices(values, after, removed_A.expand(len(batch.rows), -1, -1))
        unmoved = setup.operator.slices(values, after)
    low = plane_weight(BOX, 12) > 0
    assert ((now - was) * low).norm() < 0.03 * (was * low).norm()
    assert ((unmoved - was) * low).norm() > 0.08 * (was * low).norm()


def test_frame_of_the_poses_follows_latents_in_any_scale():
    """Poses of a frame are those of its polynomial in the volume's axes, whatever becomes of the latents' scale."""
    generator = torch.Generator().manual_seed(3)
    frame = replace(PoseFrame.at_rest(2), coefficients=0.1 * torch.randn((10, 6), generator=generator))
    latents = torch.randn((5, 2), generator=generator)
    rotation = torch.as_tensor(Rotation.random(5, random_state=0).as_matrix(), dtype=torch.float32)
    x, y = latents.double().numpy().T
    terms = np.stack([x**0, x, y, x * x, x * y, y * y, x**3, x * x * y, x * y * y, y**3], 1)
    motion = terms @ frame.coefficients.double().numpy()
    turned = np.einsum("nij,nj->ni", rotation.double().numpy(), motion[:, :3])
    shifted = np.einsum("nij,nj->ni", rotation[:, :2].double().numpy(), motion[:, 3:])
    expected = torch.as_tensor(np.concatenate([turned, shifted], 1)).float()
    torch.testing.assert_close(frame.poses(latents, rotation), expected, rtol=1e-4, atol=1e-5)
    matrix, offset = torch.tensor([[2.0, 0.0], [0.5, 0.7]]), torch.tensor([0.3, -1.0])
    new = torch.linalg.solve(matrix, (latents - offset).T).T
    torch.testing.assert_close(frame.rescaled(matrix, offset).poses(new, rotation), expected, rtol=1e-3, atol=1e-4)
    units = torch.randn((5, 6), generator=generator)
    prior = replace(PRIOR, frame=frame)
    other = prior.in_frame(PoseFrame.at_rest(2), units, latents, rotation)
    torch.testing.assert_close(other * PRIOR.widths, prior.own(units, latents, rotation), rtol=1e-4, atol=1e-5)


def test_evidence_tells_a_width_from_none():
    """Estimates with unequal errors: the variance on top of them is found, and none where there is none."""
    generator = torch.Generator().manual_seed(0)
    information = torch.diag_embed(0.3 + 3 * torch.rand((4000, 6), generator=generator))
    noise = torch.randn((4000, 6), generator=generator) * information.diagonal(dim1=1, dim2=2).rsqrt()
    for variance in (0.0, 0.5):
        truth = variance**0.5 * torch.randn((4000, 6), generator=generator)
        at = torch.randn((4000, 6), generator=generator)  # wherever the gradient is measured
        gradient = (information @ (at - truth - noise)[..., None])[..., 0]
        evidence = WidthEvidence.nothing(torch.device("cpu"))
        evidence.add(at[:2500], gradient[:2500], information[:2500], torch.ones(2500))
        evidence.add(at[2500:], gradient[2500:], information[2500:], torch.ones(len(at) - 2500))
        found, error = evidence.of_kind(slice(0, 3))
        assert abs(found - variance) < 4 * error
        assert error < 0.05


def test_forces_freed_of_poses_and_contrast():
    """What a pose explains is gone, in the noise and in its covariance; what it does not explain stays."""
    generator = np.random.default_rng(0)
    slopes = generator.normal(size=(40, 9))  # of 40 pixels by 6 fields and 3 nuisances
    slopes[:, :6] += slopes[:, 6:] @ generator.normal(size=(3, 6))
    pixels = generator.normal(size=(20000, 40))
    nuisance = 5 * generator.normal(size=(20000, 3)) @ slopes[:, 6:].T
    forces = FieldForces(((pixels + nuisance) @ slopes).astype(np.float32), slopes.T @ slopes)
    freed = forces.freed_of(6)
    assert freed.force.shape == (20000, 6)
    scale = np.sqrt(freed.information.diagonal())
    covariance = np.cov(freed.force.T) / scale[:, None] / scale
    np.testing.assert_allclose(covariance, freed.information / scale[:, None] / scale, atol=0.05)
    untouched = np.cov(forces.force[:, :6].T) / scale[:, None] / scale
    assert np.abs(untouched - freed.information / scale[:, None] / scale).max() > 1


def test_noise_covariance_of_freed_forces_is_the_models(setup, values, batch):
    """Forces of pure noise on motion, rigid-body motions and contrast have the covariance that is computed."""
    moving = displacement_basis(setup.mesh, setup.ranks, "cpu", setup.density_share)[:4]
    fields = torch.cat([moving, rigid_fields(setup.operator.vertices_A)])
    rows = np.arange(300)
    torch.manual_seed(5)

    def noisy():
        for some in np.array_split(rows, 6):
            seen = setup.source.batch(some)
            with torch.no_grad():
                clean = seen.transfer * setup.operator.slices(values, seen)
            yield replace(seen, images=clean + torch.fft.rfft2(torch.randn(len(some), BOX, BOX), norm="ortho"))

    forces = measure_forces(setup.operator, values, noisy(), 300, fields, 14.0, contrast=True)
    assert forces.information.shape == (11, 11)
    scale = np.sqrt(forces.information.diagonal())
    found = np.cov(forces.force.T) / scale[:, None] / scale
    np.testing.assert_allclose(found, forces.information / scale[:, None] / scale, atol=0.3)
    assert np.abs(found.diagonal().mean() - 1) < 0.12


def test_exact_poses_of_a_rigid_set_are_left_alone_and_wrong_ones_are_found(tmp_path_factory):
    """``auto``: nothing is refined where nothing is wrong; errors of poses are found with their width, and mended."""
    folder = prepared(tmp_path_factory.mktemp("rigid"), "rigid", 600, 0.2, box=BOX, cells=10)
    setup = set_up(ParticlesFolder(folder / "particles"), MeshFolder(folder / "mesh"), TrainSettings(), "cpu")
    rigid, views, _ = rigid_start(setup, mean_transfer2(setup))
    assert views.prior is None and views.num == 0
    torch.manual_seed(0)
    num, errors = len(setup.source), ViewPrior(np.deg2rad(2.0) / 3**0.5, 3.0, 0.2)
    wrong = pose_change(torch.randn(num, 6) * errors.widths)
    _, views, _ = rigid_start(replace(setup, source=setup.source.posed(wrong)), mean_transfer2(setup))
    assert views.prior is not None
    assert views.prior.shift_A == pytest.approx(3.0, rel=0.15)
    assert views.prior.rotation_rad == pytest.approx(errors.rotation_rad, rel=0.4)
    assert views.prior.log_contrast == pytest.approx(0.2, rel=0.25)
    found = pose_change(views.units * views.prior.widths)
    assert np.mean((found.shift_A + wrong.shift_A) ** 2) < 0.15 * np.mean(wrong.shift_A**2)
    assert np.std(np.log(found.contrast * wrong.contrast)) < 0.6 * 0.2
    assert rigid_model(setup, rigid.values, None).views is None


@pytest.mark.slow
def test_poses_of_a_refinement_are_known_for_what_they_are(tmp_path):
    """Poses fitted to these very images agree with them too well: held at first, and open under the rigid map."""
    folder = prepared(tmp_path, "rigid", 600, 0.1, box=BOX, cells=10, poses="consensus")
    setup = set_up(ParticlesFolder(folder / "particles"), MeshFolder(folder / "mesh"), TrainSettings(), "cpu")
    state = start(setup)
    rigid, views = state.rigid_views, state.views
    assert rigid.prior.fitted and views.prior.fitted
    assert set(views.prior.learnt) <= {"contrast"}
    assert rigid.prior.shift_A > 2 * views.prior.shift_A > 0
    assert (views.units[:, :5] == 0).all()
    measure_widths(setup, state)
    assert state.views.prior.shift_A == pytest.approx(rigid.prior.shift_A, rel=0.4)
    assert state.views.prior.rotation_rad == pytest.approx(rigid.prior.rotation_rad, rel=0.4)


ERRORS = dict(pose_error_deg=4.0, shift_error_A=6.0, contrast_sd=0.2)


def errors_left(folder, particles_file) -> tuple[float, float]:
    """Rms angle in degrees and rms shift in Angstrom between a file's poses and the true ones."""
    truth, found = np.load(folder / "sim/truth.npz"), read_particles(particles_file)
    turn_rad = Rotation.from_matrix(found.rotation @ truth["rotation"].transpose(0, 2, 1)).magnitude()
    shift_A = found.origin_A - truth["origin_A"]
    return float(np.rad2deg(np.sqrt((turn_rad**2).mean()))), float(np.sqrt((shift_A**2).mean()))


@pytest.mark.slow
def test_errors_of_poses_and_contrasts_are_no_motion(tmp_path):
    """A rigid molecule, seen at wrong poses and unknown contrasts: no motion is claimed, and they are mended."""
    folder = prepared(tmp_path, "rigid", 600, 0.3, **ERRORS)
    settings = TrainSettings(latent_dims=1, epochs=6, validation_fraction=0.25)
    train(folder / "particles", folder / "mesh", folder / "train", settings)
    record = ValidationRecord.read(folder / "train/validation.json")
    assert record.rejected_gain is not None and record.gain == 0  # set to rest
    assert record.pose_shift_A == pytest.approx(6.0, rel=0.15)
    assert record.contrast_sd == pytest.approx(0.2, rel=0.3)
    given = errors_left(folder, folder / "sim/particles.star")
    refined = errors_left(folder, folder / "train/particles_refined.star")
    assert refined[0] < 0.75 * given[0] and refined[1] < 0.4 * given[1], (given, refined)
    believed = replace(settings, refine_poses=False, refine_contrast=False)
    train(folder / "particles", folder / "mesh", folder / "believed", believed)
    sold = ValidationRecord.read(folder / "believed/validation.json")
    assert sold.gain > 1  # the motion that was sold before


@pytest.mark.slow
def test_motion_is_told_from_errors_of_poses(tmp_path):
    """A jaw that opens, seen at wrong poses: its angle is found far better where these are refined."""
    folder = prepared(tmp_path, "clamp", 600, 0.3, **ERRORS)
    truth = np.load(folder / "sim/truth.npz")["angles_rad"][:, 0]
    r2 = {}
    for refine in ("auto", False):
        settings = TrainSettings(latent_dims=1, epochs=6, refine_poses=refine, refine_contrast=refine)
        train(folder / "particles", folder / "mesh", folder / f"{refine}", settings)
        r2[refine] = neighbour_r2(latents_of(folder / f"{refine}"), truth)
    assert r2["auto"] > 0.6 and r2["auto"] > r2[False] + 0.2, r2
    assert not (folder / "False/particles_refined.star").exists()
