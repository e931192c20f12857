"""Reconstruction: the linear algebra against autograd and exact data, and what motion may and may not do to a map."""

import logging
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from exact_images import BOX, PIXEL_SIZE_A, FakeSource, Problem, bends_A, radius_px
from scipy.spatial.transform import Rotation

from flexlib.errors import InputError
from flexlib.files import read_json
from flexlib.imaging.fsc import fsc
from flexlib.imaging.image_transforms import plane_weight
from flexlib.imaging.maps import read_map
from flexlib.imaging.masks import soft_edge
from flexlib.mesh.lattice import bcc_mesh
from flexlib.model.flex_model import FlexModel
from flexlib.model.flow import FlowGenerator, rigid_modes_A
from flexlib.particles import read_particles
from flexlib.particles.pose_change import PoseChange
from flexlib.particles.star_write import relion_tables, write_star
from flexlib.projection.op import gather_volume, project, project_adjoint, scatter_volume, view_vertices
from flexlib.reconstruct.fsc_table import fsc_table
from flexlib.reconstruct.kinds import warn_if_stopped
from flexlib.reconstruct.map_solver import SolverSettings
from flexlib.reconstruct.run import reconstruct
from flexlib.workflow_support.settings import MaskSettings, PrepareSettings, ReconstructSettings

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kernel, oversampling", [("linear", 1), ("cubic", 1), ("cubic", 2)])
def test_adjoint_is_that_of_the_projection(kernel, oversampling):
    problem = Problem(18.0, torch.float64)
    source = FakeSource(3, problem.values, problem.points_A(), noise=1.0)
    batch = source.geometry(np.arange(3))
    vertices = view_vertices(
        torch.from_numpy(problem.mesh.vertices_A), batch.rotation.double(), batch.origin_px.double(), PIXEL_SIZE_A
    )
    weight = plane_weight(BOX).double()
    images = torch.from_numpy(source.images).to(torch.complex128)
    values = torch.from_numpy(problem.values).double()
    projected = project(values, vertices, problem.voxels, kernel, oversampling)
    in_images = float((weight * (projected.conj() * images).real).sum())
    in_volume = float(values @ project_adjoint(images, vertices, problem.voxels, kernel, oversampling))
    assert in_volume == pytest.approx(in_images, rel=1e-10)


def test_normal_equations_are_the_gradient_of_the_objective():
    problem = Problem(18.0, torch.float64)
    displacements_A = bends_A(problem.mesh, np.array([0.5, -1.0, 0.2, 0.0]))
    source = FakeSource(4, problem.values, problem.points_A(displacements_A), noise=1.0)
    equations = problem.equations(source, displacements_A, batch_size=3)
    x = torch.randn(len(problem.values), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    batch = source.batch(np.arange(4))
    moved_A = torch.from_numpy(problem.mesh.vertices_A + displacements_A)
    vertices = view_vertices(moved_A, batch.rotation.double(), batch.origin_px.double(), PIXEL_SIZE_A)
    projected = project(x * problem.mask_values.double(), vertices, problem.voxels, "cubic", 2)
    residual = batch.images - batch.transfer * projected
    spectrum = torch.fft.fftn(scatter_volume(x, problem.voxels), norm="ortho")
    prior = equations.filters.prior
    prior = torch.cat([prior, prior.flip(2)[:, :, 1:-1]], 2)  # isotropic: the other half's the same
    objective = 0.5 * (plane_weight(BOX) * residual.abs() ** 2).sum() + 0.5 * (prior * spectrum.abs() ** 2).sum()
    (gradient,) = torch.autograd.grad(objective, x)
    x = x.detach()
    mine = equations.hessian(x) - equations.data
    assert torch.linalg.norm(mine - gradient) < 1e-6 * torch.linalg.norm(gradient)
    value = equations.energy + float(x @ (0.5 * equations.hessian(x) - equations.data))
    assert value == pytest.approx(objective.item(), rel=1e-6)


def test_preconditioner_knows_the_shells_of_the_hessian():
    problem = Problem()
    source = FakeSource(300, problem.values, problem.points_A())
    equations = problem.equations(source, mask_values=None)
    x = torch.randn(len(problem.values), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whitened = equations.precondition(equations.hessian(x))
    assert float(x @ whitened) / float(x @ x) == pytest.approx(1.0, abs=0.1)


def test_a_half_set_shows_its_own_signal_to_noise():
    """FSC of two halves = snr / (1 + snr) of either; of noise alone no signal is found."""
    problem = Problem()
    sources = [FakeSource(200, problem.values, problem.points_A(), noise=1.0, seed=s, amplitude=0.5) for s in (1, 2)]
    halves = [problem.equations(source) for source in sources]
    snr = np.mean([half.signal_to_noise.numpy() for half in halves], axis=0)
    curve = fsc(*(problem.solve(source)[0] for source in sources))
    assert 0.3 < curve[3:11].min() < 0.9  # neither trivial
    np.testing.assert_allclose((snr / (1 + snr))[3:11], curve[3:11], atol=0.12)
    nothing = FakeSource(200, 0 * problem.values, problem.points_A(), noise=1.0)
    noise = problem.equations(nothing)
    assert noise.signal_to_noise[4:11].max() < 0.4  # 0.25 is the least that is assumed


def test_exact_images_give_back_the_map_rigid_and_flexible():
    for cell_A in (None, 18.0):
        problem = Problem(cell_A)
        amounts = np.random.default_rng(3).uniform(-1, 1, 300)
        displacements_A = None if cell_A is None else bends_A(problem.mesh, amounts)
        moved = problem.points_A() if displacements_A is None else problem.points_A(displacements_A)
        source = FakeSource(300, problem.values, moved, amplitude=1e2)
        volume, convergence = problem.solve(source, displacements_A, max_iterations=60, tolerance=1e-4)
        assert convergence.converged
        curve = fsc(volume, problem.truth)
        assert curve[: BOX // 2 - 2].min() > 0.995, curve  # to 0.4 cycles/pixel
        # the prior costs up to 3 % of the amplitude where the transfer function is weak or the sphere |k| < N/2 ends
        assert (volume * problem.truth).sum() / (problem.truth**2).sum() == pytest.approx(1.0, abs=0.03)
        assert source.reads == len(source)  # each image is read once, however many iterations


def test_motion_that_is_known_costs_no_resolution():
    """Particles that bend by 8 A, with known bends, give as good a map as particles at rest; ignoring it does not."""
    problem, rigid = Problem(18.0), Problem()
    amounts = np.random.default_rng(4).normal(0, 1, 400)
    displacements_A = bends_A(problem.mesh, amounts)
    moving = FakeSource(400, problem.values, problem.points_A(displacements_A), noise=1.0)
    resting = FakeSource(400, rigid.values, rigid.points_A(), noise=1.0)
    curves = [
        fsc(volume, problem.truth)
        for volume, _ in (problem.solve(moving, displacements_A), rigid.solve(resting), rigid.solve(moving))
    ]
    middle = slice(5, 11)
    assert np.abs(curves[0] - curves[1])[middle].max() < 0.01
    assert (curves[0] - curves[2])[middle].min() > 0.02
    assert (curves[0] - curves[2])[middle].mean() > 0.05


def test_on_rigid_data_the_flexible_map_is_not_worse():
    rigid, flexible = Problem(), Problem(18.0)
    source = FakeSource(400, rigid.values, rigid.points_A(), noise=1.0, seed=5)
    baseline, _ = rigid.solve(source)
    still, _ = flexible.solve(source, np.zeros((400, *flexible.mesh.vertices_A.shape)))
    assert np.linalg.norm(still - baseline) < 1e-3 * np.linalg.norm(baseline)
    # latents that are all noise, with a model that turns them into a tenth of a voxel
    jitter_A = bends_A(flexible.mesh, np.random.default_rng(6).normal(0, 1, 400), sd_A=0.3)
    jittered, _ = flexible.solve(source, jitter_A)
    loss = fsc(baseline, rigid.truth) - fsc(jittered, rigid.truth)
    assert loss.max() < 0.01


def test_batch_size_changes_rounding_only():
    problem = Problem(18.0)
    displacements_A = bends_A(problem.mesh, np.random.default_rng(7).normal(0, 1, 60))
    source = FakeSource(60, problem.values, problem.points_A(displacements_A), noise=1.0)
    volumes = [problem.solve(source, displacements_A, batch_size=size)[0] for size in (7, 60)]
    kept, _ = problem.solve(source, displacements_A, batch_size=7, keep_views=True)
    assert np.linalg.norm(volumes[0] - volumes[1]) < 1e-4 * np.linalg.norm(volumes[0])
    assert np.array_equal(kept, volumes[0])


def test_threads_change_rounding_only():
    problem = Problem(18.0)
    displacements_A = bends_A(problem.mesh, np.random.default_rng(7).normal(0, 1, 40))
    source = FakeSource(40, problem.values, problem.points_A(displacements_A), noise=1.0)
    one, _ = problem.solve(source, displacements_A)
    torch.set_num_threads(2)
    try:
        two, _ = problem.solve(source, displacements_A)
    finally:
        torch.set_num_threads(1)
    assert np.linalg.norm(one - two) < 1e-5 * np.linalg.norm(one)


def test_twice_the_iterations_change_a_converged_map_by_less_than_a_per_cent():
    problem = Problem(18.0)
    displacements_A = bends_A(problem.mesh, np.random.default_rng(7).normal(0, 1, 200))
    source = FakeSource(200, problem.values, problem.points_A(displacements_A), noise=1.0)
    once, convergence = problem.solve(source, displacements_A)
    assert convergence.converged
    twice, _ = problem.solve(source, displacements_A, tolerance=0.0, max_iterations=2 * convergence.iterations)
    assert np.linalg.norm(twice - once) < 0.01 * np.linalg.norm(twice)


class Expanded:
    """A source with each image in two poses: as it is, and after half a turn of the molecule about z."""

    def __init__(self, source):
        self.box, self.pixel_size_A = source.box, source.pixel_size_A
        self.half_set = np.tile(source.half_set, 2)
        self._source, self._count = source, len(source)
        self._turn = torch.diag(torch.tensor([-1.0, -1.0, 1.0]))

    def __len__(self):
        return 2 * self._count

    def batch(self, rows, device="cpu"):
        batch = self._source.batch(rows % self._count, device)
        turned = torch.as_tensor(rows >= self._count)[:, None, None]
        rotation = torch.where(turned, batch.rotation @ self._turn, batch.rotation)
        return replace(batch, rows=rows, rotation=rotation)


def half_turn(volume):
    """(N, N, N) turned by 180 degrees about z through voxel N//2."""
    return np.roll(volume[:, ::-1, ::-1], 1, (1, 2))


def test_symmetry_copies_make_the_rigid_map_symmetric():
    """So averaging it under the point group would change nothing; the molecule itself need not have the symmetry."""
    problem = Problem()
    source = FakeSource(120, problem.values, problem.points_A(), noise=1.0)
    alone, _ = problem.solve(source)
    assert np.linalg.norm(alone - half_turn(alone)) > 0.5 * np.linalg.norm(alone)
    volume, _ = problem.solve(Expanded(source), tolerance=1e-3)
    assert np.linalg.norm(volume - half_turn(volume)) < 1e-3 * np.linalg.norm(volume)
    one_by_hand = 0.5 * (alone + half_turn(alone))
    assert fsc(volume, one_by_hand)[1:10].min() > 0.97


def test_averaging_would_blur_the_subunit_that_the_flow_follows():
    """Two like subunits move apart from each other; in every copy the flow knows the motion of the one at x > 0."""
    problem, count = Problem(12.0), 400
    symmetric = problem.truth + half_turn(problem.truth)
    values = gather_volume(symmetric, problem.voxels).numpy()
    x_A = problem.mesh.vertices_A[:, 0]
    swing_A = np.zeros((2, *problem.mesh.vertices_A.shape))
    swing_A[0, :, 1] = np.maximum(x_A, 0.0) * 0.5
    swing_A[1, :, 1] = np.minimum(x_A, 0.0) * 0.5  # the same after half a turn
    amounts = np.random.default_rng(11).normal(0, 1, (2, count))
    truly_A = np.einsum("sn,svd->nvd", amounts, swing_A)
    source = Expanded(FakeSource(count, values, problem.points_A(truly_A), noise=0.3))
    followed_A = amounts.reshape(-1)[:, None, None] * swing_A[0]
    volume, _ = problem.solve(source, followed_A)
    subunit = soft_edge((np.arange(BOX) - BOX // 2 > 3) & (radius_px() < 6), 1.0, 0.0, 2.0)
    kept = fsc(volume, symmetric, subunit)
    averaged = fsc(0.5 * (volume + half_turn(volume)), symmetric, subunit)
    assert (kept - averaged)[5:11].mean() > 0.02 and kept[5:10].min() > 0.9


def test_a_half_set_never_sees_the_other():
    problem = Problem()
    source = FakeSource(80, problem.values, problem.points_A(), noise=1.0)
    rows = np.flatnonzero(source.half_set == 0)
    alone, _ = problem.solve(source, rows=rows, max_iterations=3)
    source.images[source.half_set == 1] = np.nan
    again, _ = problem.solve(source, rows=rows, max_iterations=3)
    assert np.array_equal(alone, again)


def test_objective_falls_and_the_reason_to_stop_is_logged(caplog):
    problem = Problem()
    source = FakeSource(100, problem.values, problem.points_A(), noise=1.0)
    with caplog.at_level(logging.WARNING, "flexlib.reconstruct"):
        _, convergence = problem.solve(source, max_iterations=40)
        warn_if_stopped("flex half 1", convergence, SolverSettings(max_iterations=40))
        assert convergence.converged and not caplog.records
        assert np.all(np.diff(convergence.objective) < 0)
        assert convergence.relative_gradient[0] == 1.0 and convergence.relative_gradient[-1] <= 2e-3
        # white noise of unit variance: half a nat a pixel, less the degrees of freedom of the map
        pixels = float(plane_weight(BOX).sum()) * len(source)
        assert convergence.objective[-1] == pytest.approx(0.5 * pixels, rel=0.06)
        _, convergence = problem.solve(source, max_iterations=2)
        warn_if_stopped("flex half 1", convergence, SolverSettings(max_iterations=2))
    assert not convergence.converged and convergence.iterations == 2
    assert len(caplog.records) == 1
    assert "flex half 1: stopped by reconstruct.max_bfgs_iterations = 2" in caplog.records[0].getMessage()


def test_fsc_of_pure_noise_in_a_mask_is_corrected_to_zero():
    mask = soft_edge(radius_px(32) < 7, PIXEL_SIZE_A, 0.0, 9.0)
    generator = np.random.default_rng(8)
    halves = [generator.standard_normal((32,) * 3) * mask for _ in range(2)]
    table, resolutions = fsc_table({"flex": halves}, mask, PIXEL_SIZE_A)
    assert list(table.columns[:4]) == ["shell", "frequency_1_per_A", "resolution_A", "fsc_flex"]
    assert abs(table.fsc_flex[4:].mean()) < 0.1
    assert set(resolutions) == {"flex_0.143", "flex_0.5"}
    moving = soft_edge(radius_px(32) < 5, PIXEL_SIZE_A, 0.0, 9.0)
    table, resolutions = fsc_table({"flex": halves}, mask, PIXEL_SIZE_A, moving)
    assert abs(table.fsc_flex_moving[6:].mean()) < 0.2
    assert {"flex_moving_0.143", "flex_moving_0.5"} <= set(resolutions)


def test_stage_writes_half_maps_in_the_consensus_units(tmp_path, caplog):
    from flexlib.prepare.run import prepare_particles
    from flexlib.simulate.run import simulate_particles
    from flexlib.simulate.settings import Simulation

    box, pixel_size_A = 32, 8.0
    truth = simulate_particles(
        tmp_path / "data", Simulation(num_particles=400, box=box, pixel_size_A=pixel_size_A, snr=1.0)
    )
    particles, train, out = tmp_path / "particles", tmp_path / "train", tmp_path / "out"
    prepare_particles(
        truth.particles_star,
        truth.consensus,
        particles,
        settings=PrepareSettings(train_box=box),
        mask_settings=MaskSettings(lowpass_A=30.0, dilate_A=8.0, pad_A=16.0),
    )
    mask = read_map(particles / "full" / "mask.mrc")
    mesh = bcc_mesh(mask.data > 0, pixel_size_A, 60.0)
    basis = torch.from_numpy(rigid_modes_A(mesh.vertices_A).astype(np.float32))
    flow = FlowGenerator(basis, 2, 1, 4)  # as it starts: no displacement
    latents = np.zeros((400, 2), np.float32)
    FlexModel(mesh, flow, latents, np.zeros((box,) * 3, np.float32), box, pixel_size_A).save(train / "model.pt")
    settings = ReconstructSettings(max_bfgs_iterations=20, cache_dir=tmp_path / "scratch", all_in_ram=True)
    reconstruct(particles, train, out, settings, device="cpu")

    for model in ("flex", "rigid"):
        maps = [read_map(out / f"{model}_{name}.mrc") for name in ("half1", "half2", "map")]
        assert maps[0].pixel_size_A == pytest.approx(pixel_size_A)
        np.testing.assert_allclose(maps[2].data, (maps[0].data + maps[1].data) / 2, atol=1e-5 * maps[2].data.max())
    expected = read_map(truth.truth_mean).data * mask.data
    assert fsc(maps[2].data, expected)[1:12].min() > 0.95
    assert (maps[2].data * expected).sum() / (expected**2).sum() == pytest.approx(1.0, abs=0.05)
    flexible = read_map(out / "flex_map.mrc").data
    assert np.linalg.norm(flexible - maps[2].data) < 0.01 * np.linalg.norm(flexible)

    table = pd.read_csv(out / "fsc.csv")
    assert len(table) == box // 2
    names = [
        f"fsc_{m}{k}" for m in ("flex", "rigid") for k in ("", "_unmasked", "_masked", "_randomised", "_corrected")
    ]
    assert set(names) <= set(table.columns)
    course = pd.read_csv(out / "convergence.csv")
    assert list(course.columns) == ["half", "model", "iteration", "objective", "relative_gradient"]
    assert set(zip(course.half, course.model, strict=True)) == {(h, m) for h in (1, 2) for m in ("flex", "rigid")}
    results = read_json(out / "resolution.json")
    assert results["converged"] == {f"{m}_half{h}": True for m in ("flex", "rigid") for h in (1, 2)}
    # nothing moves: no region, and no curves of it
    assert not read_map(out / "moving_mask.mrc").data.any()
    assert results["moving_rms_displacement"]["threshold_A"] == 0.0 and "fsc_flex_moving" not in table
    for name in ("flex_sharpened", "flex_local_resolution"):
        derived = read_map(out / f"{name}.mrc")
        assert derived.box == box and derived.pixel_size_A == pytest.approx(pixel_size_A)
    assert results["flex_local_A"]["percentile_5"] >= 2 * pixel_size_A
    assert not list(tmp_path.glob("scratch/*"))

    caplog.clear()
    reconstruct(particles, train, tmp_path / "short", replace(settings, max_bfgs_iterations=1), device="cpu")
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len([line for line in warnings if "stopped by reconstruct.max_bfgs_iterations = 1" in line]) == 4


# Poses that training refined


@pytest.fixture(scope="module")
def astray(tmp_path_factory):
    """Particles some degrees and Angstrom off, prepared; a model that knows it; the truth inside the mask.

    Under the model a particle's whole body is moved by its latents, which the images know nothing of: the shift of its
    pose takes that back, so that the pose under the flexible model is not that under the rigid one.
    """
    from flexlib.prepare.run import prepare_particles
    from flexlib.simulate.run import simulate_particles
    from flexlib.simulate.settings import Simulation

    folder, count, box, pixel_size_A = tmp_path_factory.mktemp("astray"), 300, 32, 8.0
    sim = simulate_particles(
        folder / "data", Simulation(phantom="rigid", num_particles=count, box=box, pixel_size_A=pixel_size_A, snr=1.0)
    )
    true, generator = read_particles(sim.particles_star), np.random.default_rng(3)
    turns, shifts_A = generator.normal(0, 0.1, (count, 3)), generator.normal(0, 8, (count, 2))
    turned = Rotation.from_rotvec(turns).as_matrix() @ true.rotation
    wrong = replace(true, rotation=turned, origin_A=true.origin_A - shifts_A)
    write_star(relion_tables(wrong), folder / "data" / "astray.star")
    prepare_particles(
        folder / "data" / "astray.star",
        sim.consensus,
        folder / "particles",
        settings=PrepareSettings(train_box=box),
        mask_settings=MaskSettings(lowpass_A=30.0, dilate_A=8.0, pad_A=16.0),
    )
    mask = read_map(folder / "particles" / "full" / "mask.mrc").data
    mesh = bcc_mesh(mask > 0, pixel_size_A, 60.0)
    flow = FlowGenerator(torch.from_numpy(rigid_modes_A(mesh.vertices_A).astype(np.float32)), 2, 1, 4)
    with torch.no_grad():
        flow.linear[0, 0] = flow.linear[1, 2] = 1.0  # Angstrom along x and z
    latents = generator.normal(0, 14, (count, 2)).astype(np.float32)
    moved_A = np.stack([latents[:, 0], 0 * latents[:, 0], latents[:, 1]], 1)
    taken_back_A = np.einsum("nij,nj->ni", true.rotation, moved_A)[:, :2]
    model = FlexModel(
        mesh, flow, latents, np.zeros((box,) * 3, np.float32), box, pixel_size_A,
        pose=PoseChange(-turns, -shifts_A - taken_back_A, np.ones(count)),
        rigid_pose=PoseChange(-turns, -shifts_A, np.ones(count)),
    )  # fmt: skip
    return folder / "particles", model, read_map(sim.truth_mean).data * mask


def test_refined_poses_give_better_maps(astray, tmp_path):
    """Each map is made from the poses that were refined under its own model, unless those of the input are wanted."""
    particles, model, truth = astray
    runs = {
        "refined": (model, "refined"),
        "input": (model, "input"),
        "swapped": (replace(model, pose=model.rigid_pose, rigid_pose=model.pose), "refined"),
        "rigid only": (replace(model, pose=None), "refined"),
    }
    curves, poses = {}, {}
    for name, (used, chosen) in runs.items():
        used.save(tmp_path / name / "model.pt")
        cache = tmp_path / "scratch" if name == "refined" else None
        settings = ReconstructSettings(max_bfgs_iterations=8, poses=chosen, cache_dir=cache)
        out = tmp_path / name / "maps"
        reconstruct(particles, tmp_path / name, out, settings, device="cpu")
        poses[name] = read_json(out / "resolution.json")["poses"]
        curves[name] = {kind: fsc(read_map(out / f"{kind}_map.mrc").data, truth)[1:13] for kind in ("flex", "rigid")}
    for kind in ("flex", "rigid"):
        assert curves["refined"][kind].min() > 0.9
        for worse in ("input", "swapped"):
            assert (curves["refined"][kind] - curves[worse][kind])[6:].min() > 0.1
    np.testing.assert_allclose(curves["rigid only"]["flex"], curves["input"]["flex"], atol=1e-3)
    np.testing.assert_allclose(curves["rigid only"]["rigid"], curves["refined"]["rigid"], atol=1e-3)
    assert poses["refined"] == {"flex": "refined", "rigid": "refined"}
    assert poses["input"] == {"flex": "input", "rigid": "input"}
    assert poses["rigid only"] == {"flex": "input", "rigid": "refined"}


def test_poses_of_other_particles_are_refused(astray, tmp_path):
    particles, model, _ = astray
    replace(model, rigid_pose=PoseChange.none(299)).save(tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"has poses under the rigid map of 299 rows, .* holds 300"):
        reconstruct(particles, tmp_path, tmp_path / "maps", ReconstructSettings(), device="cpu")
