"""The Hessian of particles at rest as a convolution: against exact sums, and against passes over the views."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from exact_images import BOX, PIXEL_SIZE_A, FakeSource, Problem, bends_A, exact_transform

from flexlib.distributed import ALONE
from flexlib.imaging.fsc import fsc
from flexlib.imaging.image_transforms import plane_weight
from flexlib.model.forward import SOLVING, solving_accuracy
from flexlib.projection.op import scatter_volume
from flexlib.reconstruct import at_rest
from flexlib.reconstruct.at_rest import RestingSum
from flexlib.reconstruct.map_solver import conjugate_gradients

pytestmark = pytest.mark.usefixtures("one_thread")


def resting_sum(problem, source, dtype=torch.float32, batch_size=7):
    """Summed up from all views of the source, a batch at a time."""
    total = RestingSum(problem.voxels, dtype)
    for first in range(0, len(source), batch_size):
        batch = source.geometry(np.arange(first, min(first + batch_size, len(source))))
        total.add(batch.transfer**2, batch.rotation)
    return total


def resting_hessian(problem, source, dtype=torch.float32):
    return resting_sum(problem, source, dtype).total(ALONE)


def exact_product(problem, source, values):
    """(nvox,) ``A^T W A`` times (nvox,) values, every term of it."""
    times = plane_weight(BOX).double().numpy()
    ky, kx = np.fft.fftfreq(BOX, 1 / BOX)[:, None], np.arange(BOX // 2 + 1)[None]
    total = np.zeros(len(values))
    for rotation, origin, transfer in zip(source.rotation, source.origin_px, source.transfer, strict=True):
        view = problem.points_A() @ rotation[:2].T / PIXEL_SIZE_A - origin
        weighted = (times * transfer**2 * exact_transform(values, view, BOX)).ravel()
        phase = np.outer(view[:, 0], np.broadcast_to(kx, times.shape).ravel())
        phase += np.outer(view[:, 1], np.broadcast_to(ky, times.shape).ravel())
        total += (np.exp(2j * np.pi / BOX * phase) @ weighted).real
    return total


def relative(found, expected):
    found, expected = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def seen():
    """A rigid problem, a few views of it, and white values with their exact product."""
    problem = Problem()
    source = FakeSource(12, problem.values, problem.points_A())
    values = np.random.default_rng(2).standard_normal(len(problem.values))
    return problem, source, values, exact_product(problem, source, values)


def test_products_are_the_exact_sums(seen):
    """Nearer to them than projection and adjoint with the cubic kernel are, in white and in smooth values."""
    problem, source, values, expected = seen
    batch = source.geometry(np.arange(len(source)))
    views = problem.operator.vertices_px(batch)
    smooth = problem.values.astype(np.float64)
    for some, product, bound in (
        (values, expected, 1.5e-3),
        (smooth, exact_product(problem, source, smooth), 1e-3),
    ):
        some = torch.as_tensor(some, dtype=torch.float32)
        spectra = problem.operator.project(some, views) * batch.transfer**2
        by_cubic = relative(problem.operator.project_adjoint(spectra, views), product)
        assert relative(resting_hessian(problem, source)(some), product) < min(bound, by_cubic)
        in_double = resting_hessian(problem, source, torch.float64)(some.double())
        assert relative(in_double, product) < min(bound, by_cubic)


def test_the_fast_sum_is_that_of_plain_torch_for_any_threads(seen):
    problem, source, *_ = seen
    sums = [resting_sum(problem, source, dtype)._grid for dtype in (torch.float32, torch.float64)]
    assert relative(*sums) < 1e-5
    torch.set_num_threads(2)
    assert torch.equal(resting_sum(problem, source)._grid, sums[0])


def test_products_are_symmetric_and_positive(seen):
    problem, source, *_ = seen
    hessian = resting_hessian(problem, source, torch.float64)
    one, two = torch.randn((2, len(problem.values)), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert float(one @ hessian(two)) == pytest.approx(float(two @ hessian(one)), rel=1e-10)
    assert float(one @ hessian(one)) > 0


def test_a_mask_off_the_centre_and_of_unequal_sides_is_as_good(seen):
    problem, source, *_ = seen
    z, y, x = np.unravel_index(problem.voxels.index.numpy(), (BOX,) * 3)
    chosen = np.flatnonzero((z > 10) & (y < 14) & (x > 8) & (x < 15))
    voxels = replace(problem.voxels, index=problem.voxels.index[chosen])
    total = RestingSum(voxels, torch.float64)
    batch = source.geometry(np.arange(len(source)))
    total.add(batch.transfer**2, batch.rotation)
    hessian = total.total(ALONE)
    assert len(set(hessian.block.extent)) > 1
    values = np.zeros(len(problem.values))
    values[chosen] = np.random.default_rng(2).standard_normal(len(chosen))
    expected = exact_product(problem, source, values)[chosen]
    assert relative(hessian(torch.from_numpy(values[chosen])), expected) < 2e-3


def test_a_rigid_map_is_that_of_passes_over_the_views():
    problem = Problem()
    source = FakeSource(200, problem.values, problem.points_A(), noise=1.0)
    equations = problem.equations(source)
    assert equations.at_rest

    def no_views(*arguments):
        raise AssertionError("a view was gone through")

    source.geometry = no_views
    x, course = conjugate_gradients(equations, 20, 1e-4)
    assert course.converged and course.iterations <= 8
    del source.geometry
    by_passes, _ = conjugate_gradients(replace(equations, resting=None), 60, 1e-4)
    maps = [scatter_volume(equations.density(solution), problem.voxels).numpy() for solution in (x, by_passes)]
    assert fsc(*maps)[1 : BOX // 2].min() > 0.99999
    assert relative(*maps) < 2e-3


def test_a_flexible_map_is_the_same_in_fewer_passes():
    problem = Problem(18.0)
    displacements_A = bends_A(problem.mesh, np.random.default_rng(7).normal(0, 1, 200))
    source = FakeSource(200, problem.values, problem.points_A(displacements_A), noise=1.0)
    equations = problem.equations(source, displacements_A)
    assert not equations.at_rest
    x, course = conjugate_gradients(equations, 20, 2e-3)
    assert course.converged and course.iterations <= 8
    by_shells, slower = conjugate_gradients(replace(equations, resting=None), 60, 1e-4)
    assert slower.converged
    maps = [scatter_volume(equations.density(solution), problem.voxels).numpy() for solution in (x, by_shells)]
    assert fsc(*maps)[1 : BOX // 2].min() > 0.999
    assert relative(*maps) < 0.01
    _, as_often = conjugate_gradients(replace(equations, resting=None), course.iterations, 0.0)
    assert course.objective[-1] < as_often.objective[-1]


def test_a_sum_too_large_for_memory_is_done_without(monkeypatch):
    problem = Problem()
    source = FakeSource(60, problem.values, problem.points_A(), noise=1.0)
    with_it, _ = problem.solve(source, tolerance=1e-4)
    monkeypatch.setattr(at_rest, "largest_grid_mb", lambda box: 0)
    assert problem.equations(source).resting is None
    without, course = problem.solve(source, tolerance=1e-4, max_iterations=60)
    assert course.converged and relative(with_it, without) < 2e-3


def test_maps_of_the_fitted_kernel_are_those_of_the_cubic_one():
    """The same problem solved with both operators on exact images; the truth is as near to either."""
    problem = Problem(18.0)
    displacements_A = bends_A(problem.mesh, np.random.default_rng(7).normal(0, 1, 200))
    source = FakeSource(200, problem.values, problem.points_A(displacements_A), noise=0.5)
    cubic, _ = problem.solve(source, displacements_A, tolerance=1e-4)
    problem.operator = replace(problem.operator, accuracy=SOLVING)
    fitted, _ = problem.solve(source, displacements_A, tolerance=1e-4)
    assert fsc(cubic, fitted)[1 : BOX // 2].min() > 0.9999
    truths = [fsc(volume, problem.truth)[1 : BOX // 2] for volume in (cubic, fitted)]
    assert np.abs(truths[0] - truths[1]).max() < 1e-3
    assert solving_accuracy("cpu") == SOLVING
