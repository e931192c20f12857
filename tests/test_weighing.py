"""Junk that counts for nothing and parts that are missing: the expected objective, and maps with known truth."""

from __future__ import annotations

import itertools
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from exact_images import BOX, PIXEL_SIZE_A, FakeSource, Problem, bends_A

from flexlib.errors import InputError
from flexlib.files import read_json
from flexlib.imaging.fsc import fsc
from flexlib.imaging.image_transforms import plane_weight
from flexlib.imaging.maps import read_map
from flexlib.mesh.lattice import bcc_mesh
from flexlib.model.flex_model import FlexModel
from flexlib.model.flow import FlowGenerator, rigid_modes_A
from flexlib.model.part_labels import labels_at
from flexlib.prepare.run import prepare_particles
from flexlib.projection.op import project, scatter_volume, view_vertices
from flexlib.reconstruct.run import reconstruct
from flexlib.reconstruct.weighing import OccupancyOperator, WeighedImages
from flexlib.simulate.nuisances import PARTICLE
from flexlib.simulate.run import simulate_particles
from flexlib.simulate.settings import Simulation
from flexlib.workflow_support.settings import MaskSettings, PrepareSettings, ReconstructSettings

pytestmark = pytest.mark.usefixtures("one_thread")


def parts_of(problem: Problem) -> np.ndarray:
    """(nvox,) labels of the problem's voxels: 1 above, 2 to the right below, 0 the rest."""
    z, _, x = np.unravel_index(problem.voxels.index.numpy(), (BOX,) * 3)
    return np.where(z > BOX // 2 + 1, 1, np.where(x > BOX // 2 + 2, 2, 0))


def test_normal_equations_are_the_gradient_of_the_expected_objective():
    """Of the squared residuals, each combination of parts weighed by its probability, and of each image by its own."""
    problem = Problem(18.0, torch.float64)
    displacements_A = bends_A(problem.mesh, np.array([0.5, -1.0, 0.2, 0.0]))
    source = FakeSource(4, problem.values, problem.points_A(displacements_A), noise=1.0)
    probability = np.array([1.0, 0.3, 0.0, 0.8])
    occupancy = np.array([[0.2, 0.9], [0.5, 0.5], [1.0, 0.0], [0.0, 0.3]])
    labels = parts_of(problem)
    problem.operator = OccupancyOperator.of_labels(problem.operator, labels, occupancy)
    equations = problem.equations(WeighedImages(source, probability), displacements_A, batch_size=3)
    x = torch.randn(len(problem.values), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    batch = source.batch(np.arange(4))
    moved_A = torch.from_numpy(problem.mesh.vertices_A + displacements_A)
    vertices = view_vertices(moved_A, batch.rotation.double(), batch.origin_px.double(), PIXEL_SIZE_A)
    mean = np.array([1.0, *occupancy.mean(0)])
    density = x * problem.mask_values.double() / torch.from_numpy(np.sqrt(mean)[labels])
    objective = torch.zeros((), dtype=torch.float64)
    for has_first, has_second in itertools.product((0, 1), repeat=2):
        there = torch.from_numpy(np.array([1, has_first, has_second])[labels])
        chance = np.where(has_first, occupancy[:, 0], 1 - occupancy[:, 0])
        chance *= np.where(has_second, occupancy[:, 1], 1 - occupancy[:, 1])
        residual = batch.images - batch.transfer * project(density * there, vertices, problem.voxels, "cubic", 2)
        misfit = 0.5 * (plane_weight(BOX) * residual.abs() ** 2).sum((1, 2))
        objective = objective + (torch.from_numpy(probability * chance) * misfit).sum()
    spectrum = torch.fft.fftn(scatter_volume(x, problem.voxels), norm="ortho")
    prior = equations.filters.prior
    prior = torch.cat([prior, prior.flip(2)[:, :, 1:-1]], 2)
    objective = objective + 0.5 * (prior * spectrum.abs() ** 2).sum()
    (gradient,) = torch.autograd.grad(objective, x)
    x = x.detach()
    mine = equations.hessian(x) - equations.data
    assert torch.linalg.norm(mine - gradient) < 1e-6 * torch.linalg.norm(gradient)
    value = equations.energy + float(x @ (0.5 * equations.hessian(x) - equations.data))
    assert value == pytest.approx(objective.item(), rel=1e-6)
    y = torch.randn(len(x), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert float(y @ equations.hessian(x)) == pytest.approx(float(x @ equations.hessian(y)), rel=1e-10)


def test_certainty_is_the_plain_problem():
    """All parts there and all images particles: the same map, in the same number of iterations."""
    problem = Problem(18.0)
    amounts = bends_A(problem.mesh, np.random.default_rng(1).normal(0, 1, 100))
    source = FakeSource(100, problem.values, problem.points_A(amounts), noise=1.0)
    plain, course = problem.solve(source, amounts)
    problem.operator = OccupancyOperator.of_labels(problem.operator, parts_of(problem), np.ones((100, 2)))
    certain, same = problem.solve(WeighedImages(source, np.ones(100)), amounts)
    assert np.linalg.norm(certain - plain) < 1e-4 * np.linalg.norm(plain)
    assert same.iterations == course.iterations


def contrast(volume: np.ndarray, truth: np.ndarray) -> float:
    return float((volume * truth).sum() / (truth**2).sum())


def test_a_part_comes_out_at_the_contrast_of_those_that_have_it():
    """With posteriors that are far from certain, and as sharp as where they are known."""
    problem, count, share = Problem(), 600, 0.4
    labels = parts_of(problem)
    in_part = np.zeros((BOX,) * 3, bool)
    in_part.reshape(-1)[problem.voxels.index.numpy()[labels == 1]] = True
    noise = {"noise": 1.0, "seed": 2, "amplitude": 0.25}
    whole = FakeSource(count, problem.values, problem.points_A(), **noise)
    lacking = FakeSource(count, problem.values * (labels != 1), problem.points_A(), **noise)
    absent = np.random.default_rng(5).uniform(size=count) > share
    part = whole.images - lacking.images  # the noise is the same
    seen = np.where(absent[:, None, None], lacking.images, whole.images)
    middle = (
        seen - 0.5 * part - (lacking.images - FakeSource(count, 0 * problem.values, problem.points_A(), **noise).images)
    )
    likelier = (plane_weight(BOX).numpy() * (part.conj() * middle).real).sum((1, 2))  # log-likelihood ratio
    present = 1 / (1 + (1 - share) / share * np.exp(-likelier))
    uncertain = (present * (1 - present)).mean()
    assert 0.03 < uncertain < 0.15  # of at most 0.25
    whole.images = seen
    found, plain = {}, problem.operator
    for name, known in (("posterior", present), ("truth", ~absent), ("ignored", None)):
        if known is not None:
            two = np.stack([known, np.ones(count)], 1)
            problem.operator = OccupancyOperator.of_labels(plain, labels, two)
        else:
            problem.operator = plain
        volume, _ = problem.solve(whole)
        found[name] = contrast(volume[in_part], problem.truth[in_part])
        assert contrast(volume[~in_part], problem.truth[~in_part]) == pytest.approx(1.0, abs=0.06)
    assert found["ignored"] == pytest.approx(share, abs=0.08)
    assert found["truth"] == pytest.approx(1.0, abs=0.08)
    assert found["posterior"] == pytest.approx(1.0, abs=0.08)


@pytest.fixture(scope="module")
def dirty(tmp_path_factory):
    """Particles at rest of which a third is junk and half lack a part; a model that knows it; the truth in the mask."""
    folder, count, box, pixel_size_A = tmp_path_factory.mktemp("dirty"), 400, 32, 8.0
    settings = Simulation(
        phantom="rigid", num_particles=count, box=box, pixel_size_A=pixel_size_A, snr=0.1,
        junk_fraction=0.4, missing_part_fraction=0.5,
    )  # fmt: skip
    sim = simulate_particles(folder / "data", settings)
    prepare_particles(
        sim.particles_star,
        sim.consensus,
        folder / "particles",
        settings=PrepareSettings(train_box=24),
        mask_settings=MaskSettings(lowpass_A=30.0, dilate_A=8.0, pad_A=16.0),
    )
    mask = read_map(folder / "particles" / "full" / "mask.mrc").data
    mesh = bcc_mesh(mask > 0, pixel_size_A, 60.0)
    flow = FlowGenerator(torch.from_numpy(rigid_modes_A(mesh.vertices_A).astype(np.float32)), 2, 1, 4)  # at rest
    with np.load(sim.truth_npz) as known:
        shown, absent = known["kind"] == PARTICLE, known["absent"]
    labels = read_map(folder / "data" / "truth_part.mrc").data == 2
    rough = np.rint((np.arange(24) - 12) * 4 / 3).astype(int) + 16  # the voxels of the training box
    model = FlexModel(
        mesh, flow, np.zeros((count, 2), np.float32), np.zeros((24,) * 3, np.float32), 24, pixel_size_A * 32 / 24,
        probability=shown.astype(np.float32),
        parts=labels[np.ix_(rough, rough, rough)].astype(np.uint8),
        occupancy=(~absent[:, None]).astype(np.float32),
        occupancy_share=np.array([0.5], np.float32),
    )  # fmt: skip
    return folder / "particles", model, read_map(sim.truth_mean).data * mask


def test_a_model_keeps_what_it_knows_of_junk_and_parts(dirty, tmp_path):
    _, model, _ = dirty
    model.save(tmp_path / "model.pt")
    loaded = FlexModel.load(tmp_path)
    for name in ("probability", "parts", "occupancy", "occupancy_share"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(model, name))
        assert getattr(loaded, name).dtype == getattr(model, name).dtype
    replace(model, probability=None, parts=None, occupancy=None).save(tmp_path / "model.pt")
    assert FlexModel.load(tmp_path).probability is None and FlexModel.load(tmp_path).parts is None


def test_labels_are_the_nearest_ones_at_any_box(dirty):
    _, model, _ = dirty
    np.testing.assert_array_equal(labels_at(model, model.box, model.pixel_size_A), model.parts)
    fine = labels_at(model, 72, model.pixel_size_A / 3)
    np.testing.assert_array_equal(fine[::3, ::3, ::3], model.parts)
    np.testing.assert_array_equal(fine[1::3, 1::3, 1::3][:-1, :-1, :-1], model.parts[:-1, :-1, :-1])
    wide = labels_at(model, 30, model.pixel_size_A)
    np.testing.assert_array_equal(wide[3:27, 3:27, 3:27], model.parts)
    assert wide.sum() == model.parts.sum()
    assert not labels_at(replace(model, parts=None), 8, 3.0).any()


def test_stage_weighs_images_and_shows_the_part_at_full_contrast(dirty, tmp_path, caplog):
    particles, model, truth = dirty
    runs = {
        "all": (model, True),
        "not weighed": (model, False),
        "no probability": (replace(model, probability=None), True),
        "no occupancy": (replace(model, occupancy=None), True),
    }
    maps, records = {}, {}
    for name, (used, weigh) in runs.items():
        used.save(tmp_path / name / "model.pt")
        with caplog.at_level(logging.INFO):
            reconstruct(particles, tmp_path / name, tmp_path / name, ReconstructSettings(weigh_particles=weigh), "cpu")
        maps[name] = {kind: read_map(tmp_path / name / f"{kind}_map.mrc").data for kind in ("flex", "rigid")}
        records[name] = read_json(tmp_path / name / "resolution.json")["effective_particles"]
    assert records == {"all": 240.0, "not weighed": None, "no probability": None, "no occupancy": 240.0}
    assert "400 images weighed by their probability count as 240.0 particles" in caplog.text
    for kind in ("flex", "rigid"):
        np.testing.assert_array_equal(maps["not weighed"][kind], maps["no probability"][kind])
        gain = fsc(maps["all"][kind], truth) - fsc(maps["not weighed"][kind], truth)
        assert gain[3:13].mean() > 0.01 and gain[3:13].min() > -0.02
    np.testing.assert_array_equal(maps["all"]["rigid"], maps["no occupancy"]["rigid"])
    in_part = labels_at(model, len(truth), 8.0) == 1
    relative = {
        name: contrast(found["flex"][in_part], truth[in_part]) / contrast(found["flex"][~in_part], truth[~in_part])
        for name, found in maps.items()
    }
    assert relative["all"] == pytest.approx(1.0, abs=0.1)
    assert relative["no occupancy"] == pytest.approx(0.5, abs=0.1)


def test_what_does_not_belong_to_the_particles_is_refused(dirty, tmp_path):
    particles, model, _ = dirty
    for wrong, message in (
        (replace(model, probability=model.probability[1:]), "has probabilities of 399 rows, .* holds 400"),
        (replace(model, occupancy=model.occupancy[1:]), "has occupancies of 399 rows, .* holds 400"),
        (replace(model, probability=np.zeros(400, np.float32)), "hardly an image of half-set 1 shows a particle"),
    ):
        wrong.save(tmp_path / "model.pt")
        with pytest.raises(InputError, match=message):
            reconstruct(particles, tmp_path, tmp_path / "maps", ReconstructSettings(), device="cpu")
