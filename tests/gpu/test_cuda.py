"""The CUDA backend on a real device: against the reference, without waiting for the device, at real sizes."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from operator_cases import (
    CASES,
    Case,
    assert_matches_reference,
    random_case,
    reference_results,
    relative_error,
    rigidity_results,
    twisted_bodies,
)

from flexlib.projection.op import KERNELS, VoxelTensors, project, splat_voxels
from flexlib.runtime import has_triton
from flexlib.tetra.rigidity import RigidityTensors, mesh_rigidity

BOX = 64


@pytest.fixture(scope="module", autouse=True)
def device():
    assert torch.cuda.is_available(), "torch sees no CUDA device: these tests are for a machine that has one"
    assert has_triton()


def large_case() -> Case:
    """40,000 voxels in 2,000 cells, 100 images of 128^2: many programs at once on every vertex and pixel."""
    return random_case(num_voxels=40_000, batch=100, grid=128, num_cells=2000, spread=25.0).to("cuda")


def both_ways(case: Case, taps: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images and both gradients, through the operator and its autograd rule."""
    values, vertices = case.values.clone().requires_grad_(), case.vertices.clone().requires_grad_()
    images = splat_voxels(values, vertices, *case.mesh(), case.grid, taps)
    images.backward(case.grad_images)
    return images.detach(), values.grad, vertices.grad


@pytest.mark.parametrize("taps", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_forward_and_both_gradients_match_reference(name, taps):
    case = CASES[name].to("cuda")
    assert_matches_reference(name, case, taps, both_ways(case, taps))


@pytest.mark.parametrize("taps", [2, 4])
def test_many_programs_add_to_the_same_numbers(taps):
    case = large_case()
    found = both_ways(case, taps)
    parts = [reference_results(part, taps) for part in pieces(case, 10)]
    images, grad_vertices = (torch.cat([part[i] for part in parts]) for i in (0, 2))
    # where rounding puts a voxel on the other side of a pixel, the linear kernel's derivative is another
    bounds = (2e-5, 2e-5, 1e-2 if taps == 2 else 2e-5)
    for one, expected, bound in zip(found, (images, sum(p[1] for p in parts), grad_vertices), bounds, strict=True):
        assert relative_error(one, expected) < bound
    for one, other in zip(found, both_ways(case, taps), strict=True):
        assert relative_error(one, other.double()) < 2e-6  # atomics in another order


def pieces(case: Case, size: int) -> list[Case]:
    """The case a few images at a time: the reference needs memory."""
    return [
        Case(case.values, vertices, *case.mesh(), grad_images)
        for vertices, grad_images in zip(case.vertices.split(size), case.grad_images.split(size), strict=True)
    ]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("oversampling", [1, 2])
def test_projection_and_gradients_agree_with_the_cpu(kernel, oversampling):
    case = random_case(num_voxels=5000, batch=4, num_cells=200, spread=10.0)
    residual = torch.as_tensor(np.random.default_rng(0).normal(size=(4, BOX, BOX // 2 + 1, 2)), dtype=torch.float32)
    results = []
    for device in ("cuda", "cpu"):
        here = case.to(device)
        voxels = VoxelTensors(BOX, here.vertices.shape[1], *here.mesh(), torch.arange(5000, device=device))
        values, vertices = here.values.clone().requires_grad_(), here.vertices.clone().requires_grad_()
        spectra = project(values, vertices, voxels, kernel, oversampling)
        torch.view_as_real(spectra).backward(residual.to(device))
        results.append((torch.view_as_real(spectra.detach()), values.grad, vertices.grad))
    for gpu, cpu in zip(*results, strict=True):
        assert relative_error(gpu.cpu(), cpu.double()) < 2e-5


@pytest.mark.parametrize("taps", [2, 4])
def test_nothing_waits_for_the_device(taps):
    case = large_case()
    mesh, moved = twisted_bodies()
    tensors, moved = RigidityTensors.from_mesh(mesh, "cuda"), moved.cuda().requires_grad_()
    both_ways(case, taps)  # compiles
    mesh_rigidity(tensors, moved).sum().backward()
    try:
        with warnings.catch_warnings():  # torch says that it may not see every wait
            warnings.simplefilter("ignore", UserWarning)
            torch.cuda.set_sync_debug_mode("error")
        both_ways(case, taps)
        mesh_rigidity(tensors, moved).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_vertices_that_are_not_finite_stay_inside_their_image():
    case = random_case(num_voxels=1000, batch=4).to("cuda")
    for image, bad in enumerate((torch.nan, torch.inf, 1e30)):
        case.vertices[image] = bad
    images, _, grad_vertices = both_ways(case, 4)
    torch.cuda.synchronize()  # an address outside would show here
    assert images[:2].isnan().any((1, 2)).all() and images[2:].isfinite().all()
    assert grad_vertices[3].isfinite().all()


def test_rigidity_energy_and_gradient_match_reference():
    mesh, moved = twisted_bodies()
    moved = moved.cuda().requires_grad_()
    energy = mesh_rigidity(RigidityTensors.from_mesh(mesh, "cuda"), moved)
    energy.sum().backward()
    expected_energy, expected_gradient = rigidity_results(mesh, moved.detach())
    assert relative_error(energy.detach(), expected_energy) < 1e-5
    for found, expected in zip(moved.grad, expected_gradient, strict=True):
        assert relative_error(found, expected) < 1e-4
