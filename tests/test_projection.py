"""The projection operator against the exact non-uniform DFT, finite differences and its own adjoint."""

from __future__ import annotations

from dataclasses import replace

import finufft
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from flexlib.imaging.image_transforms import plane_weight
from flexlib.projection import cpu
from flexlib.projection.fitted import OVERSAMPLING, kernel_coefficients, kernel_transfer
from flexlib.projection.op import (
    VoxelTensors,
    gather_volume,
    image_grid,
    project,
    project_adjoint,
    scatter_volume,
    splat_voxels,
    view_vertices,
)
from flexlib.tetra.tetmesh import MeshVoxels

pytestmark = pytest.mark.usefixtures("one_thread")

# The Kuhn split of a cube into 6 tetra: one per order in which the axes are walked from corner (0,0,0) to (1,1,1).
KUHN_ORDERS = [(0, 1, 2), (1, 2, 0), (2, 0, 1), (0, 2, 1), (2, 1, 0), (1, 0, 2)]

# Relative L2 error allowed per band of 0.1 cycles/pixel, from 0 to 0.5: what was measured on this volume, times 1.5.
ERROR_BOUNDS = {
    ("linear", 1): (3.4e-4, 6.0e-3, 3.6e-2, 1.6e-1, 5.5e-1),
    ("cubic", 1): (1.6e-6, 1.6e-4, 2.7e-3, 2.7e-2, 2.0e-1),
    ("linear", 2): (1.7e-4, 3.0e-3, 2.1e-2, 6.7e-2, 2.2e-1),
    ("cubic", 2): (2.4e-7, 1.6e-5, 3.0e-4, 1.5e-3, 1.0e-2),
    ("fitted", OVERSAMPLING): (7.1e-6, 3.9e-5, 1.9e-4, 1.6e-3, 5.3e-3),
}
ALL_KERNELS = list(ERROR_BOUNDS)
SPLINES = [kernel for kernel in ALL_KERNELS if kernel[0] != "fitted"]  # those with gradients


def cube_mesh(box: int, cubes: int) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (nv, 3) in pixels (x, y, z) and cells (nc, 4) of a box cut into ``cubes``^3 cubes of 6 tetra each."""
    ticks = np.linspace(-box / 2, box / 2, cubes + 1)
    vertices = np.stack(np.meshgrid(ticks, ticks, ticks, indexing="ij"), -1).reshape(-1, 3)
    stride = np.array([(cubes + 1) ** 2, cubes + 1, 1])
    corner = np.stack(np.meshgrid(*[np.arange(cubes)] * 3, indexing="ij"), -1).reshape(-1, 3) @ stride
    cells = [corner[:, None] + np.cumsum([0, *stride[list(order)]]) for order in KUHN_ORDERS]
    return vertices, np.stack(cells, 1).reshape(-1, 4).astype(np.int32)


def cube_voxels(box: int, cubes: int, radius: float) -> tuple[np.ndarray, MeshVoxels]:
    """The voxels of a ball on ``cube_mesh`` (1 A pixels): vertices and ``MeshVoxels``."""
    vertices, cells = cube_mesh(box, cubes)
    points = np.stack(np.meshgrid(*[np.arange(box) - box // 2] * 3, indexing="ij"), -1).reshape(-1, 3)[:, ::-1]
    index = np.flatnonzero((points**2).sum(1) <= radius**2)
    scaled = (points[index] + box / 2) * cubes / box
    cube = np.floor(scaled).astype(int)
    inside = scaled - cube
    walk = np.argsort(-inside, axis=1, kind="stable")  # the largest coordinate is walked first
    sorted_inside = np.take_along_axis(inside, walk, 1)
    edges = np.hstack([np.ones((len(index), 1)), sorted_inside, np.zeros((len(index), 1))])
    bary = edges[:, :-1] - edges[:, 1:]
    which = (walk[:, None] == np.array(KUHN_ORDERS)[None]).all(2).argmax(1)
    cell = (cube @ np.array([cubes**2, cubes, 1])) * 6 + which
    order = np.lexsort((index, cell))
    voxels = MeshVoxels(
        box, 1.0, index[order], cell[order].astype(np.int32), bary[order].astype(np.float32), cells, len(vertices)
    )
    return vertices, voxels


def smooth_density(box: int) -> np.ndarray:
    """A cluster of Gaussians of sigma 0.8 px: some signal up to 0.5 cycles/pixel, (z, y, x)."""
    generator = np.random.default_rng(3)
    axis = np.arange(box) - box // 2
    density = np.zeros((box,) * 3)
    for centre in generator.uniform(-box / 5, box / 5, (40, 3)):
        gz, gy, gx = (np.exp(-((axis - c) ** 2) / (2 * 0.8**2)) for c in centre)
        density += gz[:, None, None] * gy[None, :, None] * gx[None, None, :]
    return density


def bent(vertices: np.ndarray, box: int) -> np.ndarray:
    """A smooth bend with 3 px of travel at the edge of the box."""
    moved = vertices.copy()
    moved[:, 0] += 12.0 * (vertices[:, 2] / box) ** 2
    moved[:, 1] += 6.0 * np.sin(2.0 * vertices[:, 0] / box)
    return moved


def views(vertices: np.ndarray, count: int, seed: int = 0) -> torch.Tensor:
    """(count, nv, 2) float64: rotated, shifted view positions."""
    rotation = torch.as_tensor(Rotation.random(count, rng=seed).as_matrix())
    origin = torch.as_tensor(np.random.default_rng(seed).uniform(-1.5, 1.5, (count, 2)))
    return view_vertices(torch.as_tensor(vertices), rotation, origin, 1.0)


def exact_transform(values: torch.Tensor, vertices_px: torch.Tensor, voxels: VoxelTensors) -> np.ndarray:
    """(b, box, box//2+1) non-uniform DFT of the moved voxels, rfft2 layout."""
    corner = voxels.cells.long()[voxels.cell.long()]
    position = (vertices_px[:, corner] * voxels.bary[None, :, :, None]).sum(2).numpy() * (2 * np.pi / voxels.box)
    density = values.numpy().astype(complex)
    planes = [
        finufft.nufft2d1(p[:, 1].copy(), p[:, 0].copy(), density, (voxels.box,) * 2, isign=-1, eps=1e-12)
        for p in position
    ]
    return np.fft.ifftshift(np.stack(planes), axes=(1, 2))[:, :, : voxels.box // 2 + 1]


def band_errors(found: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """(5,) relative L2 errors in bands of 0.1 cycles/pixel, |k| < 0.5 only."""
    box = found.shape[1]
    radius = np.hypot(np.fft.fftfreq(box)[:, None], np.arange(box // 2 + 1)[None] / box)
    errors = []
    for low in np.arange(5) / 10:
        band = (radius >= low) & (radius < low + 0.1) & (radius < 0.5)
        errors.append(np.linalg.norm((found - exact)[:, band]) / np.linalg.norm(exact[:, band]))
    return np.array(errors)


@pytest.fixture(scope="module")
def bend():
    """A bent volume at 48^3 in 3 views: values, vertices, voxels, exact transform; all float64."""
    box = 48
    vertices, mesh_voxels = cube_voxels(box, 4, 16.0)
    voxels = VoxelTensors.from_mesh_voxels(mesh_voxels, dtype=torch.float64)
    values = gather_volume(smooth_density(box), voxels)
    vertices_px = views(bent(vertices, box), 3)
    return values, vertices_px, voxels, exact_transform(values, vertices_px, voxels)


@pytest.fixture
def tiny():
    """40 voxels at 8^3 in 2 views, float64, for finite differences."""
    vertices, mesh_voxels = cube_voxels(8, 1, 2.5)
    keep = np.arange(0, len(mesh_voxels), 2)
    mesh_voxels = replace(
        mesh_voxels, index=mesh_voxels.index[keep], cell=mesh_voxels.cell[keep], bary=mesh_voxels.bary[keep]
    )
    voxels = VoxelTensors.from_mesh_voxels(mesh_voxels, dtype=torch.float64)
    values = torch.as_tensor(np.random.default_rng(1).normal(size=len(mesh_voxels)))
    return values, views(bent(vertices, 8), 2, seed=5), voxels


def as_float32(voxels: VoxelTensors) -> VoxelTensors:
    return replace(voxels, bary=voxels.bary.float())


def test_test_mesh_reproduces_voxel_positions():
    vertices, voxels = cube_voxels(16, 4, 7.0)
    z, y, x = np.unravel_index(voxels.index, (16,) * 3)
    position = (vertices[voxels.cells[voxels.cell]] * voxels.bary[:, :, None]).sum(1)
    np.testing.assert_allclose(position, np.stack([x, y, z], 1) - 8.0, atol=1e-5)
    assert (voxels.bary > -1e-6).all() and (np.diff(voxels.cell) >= 0).all()


@pytest.mark.parametrize(("kernel", "oversampling"), ALL_KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_error_against_exact_dft(bend, kernel, oversampling, dtype):
    values, vertices_px, voxels, exact = bend
    if dtype == torch.float32:
        voxels = as_float32(voxels)
    found = project(values.to(dtype), vertices_px.to(dtype), voxels, kernel, oversampling)
    errors = band_errors(found.numpy(), exact)
    rounding = 1e-6 if dtype == torch.float32 else 0.0
    assert (errors < np.array(ERROR_BOUNDS[kernel, oversampling]) + rounding).all(), errors


def test_unmoved_volume_seen_along_z_is_its_sum(bend):
    values, _, voxels, _ = bend
    vertices = torch.as_tensor(cube_mesh(48, 4)[0])
    found = project(values, vertices[None, :, :2], voxels, "cubic", 2)
    image = scatter_volume(values, voxels).sum(0)
    expected = torch.fft.rfft2(torch.fft.ifftshift(image))[None]
    assert band_errors(found.numpy(), expected.numpy())[:4].max() < 2e-3


@pytest.mark.parametrize(("kernel", "oversampling"), SPLINES)
def test_gradients_against_finite_differences(tiny, kernel, oversampling):
    values, vertices_px, voxels = tiny
    torch.autograd.gradcheck(
        lambda v, p: project(v, p, voxels, kernel, oversampling),
        (values.requires_grad_(), vertices_px.requires_grad_()),
        eps=1e-6,
        atol=1e-6,
    )


def backends_agree(values, vertices_px, voxels, taps, bound):
    """Images and both gradients of the float32 backend against the float64 reference."""
    cotangent = torch.as_tensor(np.random.default_rng(4).normal(size=(len(vertices_px), 48, 48)))
    results = []
    for dtype in (torch.float32, torch.float64):
        v = values.to(dtype, copy=True).requires_grad_()
        p = vertices_px.to(dtype, copy=True).requires_grad_()
        images = splat_voxels(v, p, voxels.cells, voxels.cell, voxels.bary.to(dtype), 48, taps)
        (images * cotangent.to(dtype)).sum().backward()
        results.append((images.detach().double(), v.grad.double(), p.grad.double()))
    for fast, reference in zip(*results, strict=True):
        assert (fast - reference).norm() / reference.norm() < bound


@pytest.mark.parametrize("taps", [2, 4])
@pytest.mark.parametrize("shift", [0.0, 21.3, -131.7], ids=["centred", "across the edge", "boxes away"])
def test_cpu_backend_matches_reference(bend, taps, shift):
    values, vertices_px, voxels, _ = bend
    backends_agree(values, vertices_px + shift, voxels, taps, 1e-5 if abs(shift) < 100 else 1e-4)


@pytest.mark.parametrize("taps", [2, 4])
def test_cpu_backend_matches_reference_over_blocks_of_images(bend, taps, monkeypatch):
    """19 images are two blocks of eight and a part of one; the map's gradient is summed a block at a time."""
    values, vertices_px, voxels, _ = bend
    monkeypatch.setattr(cpu, "PARTIAL_SUMS", len(values))
    many = torch.cat([vertices_px * (1 - 0.03 * k) + 0.7 * k for k in range(7)])[:19]
    backends_agree(values, many, voxels, taps, 1e-5)


@pytest.mark.parametrize("taps", [2, 4])
def test_one_gradient_alone_is_the_same(bend, taps):
    values, vertices_px, voxels, _ = bend
    voxels, values, vertices_px = as_float32(voxels), values.float(), vertices_px.float()
    cotangent = torch.as_tensor(np.random.default_rng(4).normal(size=(3, 48, 48))).float()
    mesh = (voxels.cells, voxels.cell, voxels.bary)
    both = cpu.splat_adjoint(cotangent, values, vertices_px, *mesh, taps, (True, True))
    only_values, none = cpu.splat_adjoint(cotangent, values, vertices_px, *mesh, taps, (True, False))
    assert none.numel() == 0
    torch.testing.assert_close(only_values, both[0], rtol=0, atol=1e-6 * float(both[0].abs().max()))
    none, only_vertices = cpu.splat_adjoint(cotangent, values, vertices_px, *mesh, taps, (False, True))
    assert none.numel() == 0
    assert torch.equal(only_vertices, both[1])


@pytest.mark.parametrize("taps", [2, 4])
def test_vertices_far_beyond_float_precision_stay_inside_the_image(bend, taps):
    values, vertices_px, voxels, _ = bend
    vertices_px = (vertices_px * torch.tensor([1e12, -1e9])).float()
    images = splat_voxels(values.float(), vertices_px, voxels.cells, voxels.cell, voxels.bary.float(), 45, taps)
    torch.testing.assert_close(images.double().sum((1, 2)), values.sum().expand(3), rtol=1e-4, atol=0)


@pytest.mark.parametrize("oversampling", [1, 2])
def test_moving_by_one_box_changes_nothing(bend, oversampling):
    values, vertices_px, voxels, _ = bend
    near = project(values, vertices_px, voxels, "cubic", oversampling)
    far = project(values, vertices_px + torch.tensor([48.0, -96.0]), voxels, "cubic", oversampling)
    assert (near - far).norm() < 1e-5 * near.norm()  # barycentric weights are stored in float32


@pytest.mark.parametrize("kernel", ["linear", "cubic"])
def test_results_do_not_depend_on_thread_count(bend, kernel):
    values, vertices_px, voxels, _ = bend
    voxels = as_float32(voxels)
    vertices_px = torch.cat([vertices_px, vertices_px + 0.3, vertices_px - 0.4, vertices_px * 0.9]).float()
    cotangent = torch.as_tensor(np.random.default_rng(4).normal(size=(len(vertices_px), 48, 48))).float()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        v, p = values.float().requires_grad_(), vertices_px.clone().requires_grad_()
        taps = {"linear": 2, "cubic": 4}[kernel]
        images = splat_voxels(v, p, voxels.cells, voxels.cell, voxels.bary, 48, taps)
        images.backward(cotangent)
        results.append((images.detach(), v.grad, p.grad))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(("kernel", "oversampling"), SPLINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_backward_is_the_adjoint(bend, kernel, oversampling, dtype):
    _, vertices_px, voxels, _ = bend
    if dtype == torch.float32:
        voxels = as_float32(voxels)
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(len(voxels.index), generator=generator, dtype=dtype, requires_grad=True)
    images = project(values, vertices_px.to(dtype), voxels, kernel, oversampling)
    residual = torch.randn(images.shape, generator=generator, dtype=images.dtype)
    forward = (images.detach() * residual.conj()).real.double().sum()
    (images * residual.conj()).real.sum().backward()
    adjoint = (values.detach() * values.grad).double().sum()
    scale = float(images.detach().norm() * residual.norm())
    assert abs(forward - adjoint) < (1e-6 if dtype == torch.float32 else 1e-12) * scale


def test_vertices_that_are_not_finite_raise(bend):
    values, vertices_px, voxels, _ = bend
    broken = vertices_px.float()
    broken[1, 7, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        project(values.float(), broken, as_float32(voxels))


@pytest.mark.parametrize("shared", [True, False], ids=["one mesh", "a mesh an image"])
@pytest.mark.parametrize("displaced", [True, False])
def test_view_of_vertices_and_its_gradients_in_float32(shared, displaced):
    """The CPU's own kernel against float64 in plain torch."""
    generator = torch.Generator().manual_seed(0)
    rotation = torch.as_tensor(Rotation.random(4, rng=0).as_matrix())
    vertices, moved = (30 * torch.randn((4, 11, 3), generator=generator, dtype=torch.float64) for _ in range(2))
    origin, pull = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((4, 2), (4, 11, 2)))
    given = [vertices[0] if shared else vertices, *([moved] if displaced else [])]
    results = []
    for dtype in (torch.float32, torch.float64):
        at = [x.to(dtype, copy=True).requires_grad_() for x in given]
        views = view_vertices(at[0], rotation.to(dtype), origin.to(dtype), 1.3, *at[1:])
        results.append((views, *torch.autograd.grad(views, at, pull.to(dtype))))
    assert results[0][0].shape == (4, 11, 2)
    by_hand = rotation[2, 1] @ (
        given[0].view(-1, 11, 3)[-2 if not shared else 0, 5] + (moved[2, 5] if displaced else 0)
    )
    assert results[1][0][2, 5, 1].item() == pytest.approx(float(by_hand / 1.3 - origin[2, 1]), rel=1e-12)
    for fast, plain in zip(*results, strict=True):
        assert fast.dtype == torch.float32
        torch.testing.assert_close(fast.double(), plain, rtol=1e-5, atol=1e-4)


def test_unknown_kernel_raises(bend):
    values, vertices_px, voxels, _ = bend
    with pytest.raises(KeyError):
        project(values, vertices_px, voxels, "quintic")


def test_fitted_kernel_aliases_less_than_the_spline_where_maps_are_weak():
    """Amplitude of all images of the band relative to the band, at equal taps; the spline on the larger grid."""

    def aliasing(transfer, oversampling):
        band = np.array([0.05, 0.1, 0.2, 0.3, 0.4, 0.5]) / oversampling
        images = [transfer(band + m) for m in range(-9, 10) if m]
        return np.sqrt(np.square(images).sum(0)) / np.abs(transfer(band))

    fitted = aliasing(kernel_transfer, OVERSAMPLING)
    assert (fitted < [8e-5, 1.4e-4, 3.6e-4, 8e-4, 1.7e-3, 2.1e-3]).all(), fitted
    spline = aliasing(lambda k: np.sinc(k) ** 4, 2)
    assert (fitted[3:] < spline[3:]).all() and fitted[-1] < 0.2 * spline[-1]
    flipped = [np.polyval(kernel_coefficients()[:, tap], 0.8) for tap in range(4)]
    weights = [np.polyval(kernel_coefficients()[:, tap], 0.2) for tap in range(4)]
    np.testing.assert_allclose(weights, flipped[::-1], rtol=1e-9)


def test_grids_of_the_fitted_kernel_have_fast_transforms_and_are_wide_enough():
    assert image_grid(256, OVERSAMPLING) == 448 and image_grid(64, 2) == 128
    for box in range(16, 520, 2):
        grid = image_grid(box, OVERSAMPLING)
        assert grid % 2 == 0 and OVERSAMPLING * box <= grid < 2.1 * box


@pytest.mark.parametrize("shift", [0.0, 21.3, -131.7], ids=["centred", "across the edge", "boxes away"])
def test_fitted_kernel_on_the_cpu_matches_the_reference(bend, shift, monkeypatch):
    """11 images are a block of eight and a part of one, and the map's sums are added a block at a time."""
    values, vertices_px, voxels, _ = bend
    monkeypatch.setattr(cpu, "PARTIAL_SUMS", len(values))
    vertices_px = torch.cat([vertices_px * (1 - 0.03 * k) + 0.7 * k for k in range(4)])[:11] + shift
    spectra = torch.as_tensor(np.random.default_rng(4).normal(size=(11, 48, 48)))
    spectra = torch.fft.rfft2(spectra) * (plane_weight(48) > 0)
    results = []
    for dtype, complex_dtype in ((torch.float32, torch.complex64), (torch.float64, torch.complex128)):
        own = replace(voxels, bary=voxels.bary.to(dtype))
        at = (vertices_px.to(dtype), own, "fitted", OVERSAMPLING)
        results.append((project(values.to(dtype), *at), project_adjoint(spectra.to(complex_dtype), *at)))
    for fast, reference in zip(*results, strict=True):
        assert (fast - reference).norm() / reference.norm() < (1e-5 if abs(shift) < 100 else 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fitted_adjoint_is_that_of_the_projection(bend, dtype):
    _, vertices_px, voxels, _ = bend
    own = replace(voxels, bary=voxels.bary.to(dtype))
    values = torch.randn(len(voxels.index), generator=torch.Generator().manual_seed(2), dtype=dtype)
    images = torch.as_tensor(np.random.default_rng(3).normal(size=(3, 48, 48))).to(dtype)
    spectra = torch.fft.rfft2(images) * (plane_weight(48) > 0)
    projected = project(values, vertices_px.to(dtype), own, "fitted", OVERSAMPLING)
    back = project_adjoint(spectra, vertices_px.to(dtype), own, "fitted", OVERSAMPLING)
    in_images = (plane_weight(48).double() * (projected.conj() * spectra).real.double()).sum()
    scale = float(projected.norm() * spectra.norm())
    assert abs(in_images - (values.double() @ back.double())) < (1e-6 if dtype == torch.float32 else 1e-12) * scale


def test_fitted_results_do_not_depend_on_thread_count(bend):
    values, vertices_px, voxels, _ = bend
    vertices_px = torch.cat([vertices_px, vertices_px + 0.3, vertices_px - 0.4, vertices_px * 0.9]).float()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        spectra = project(values.float(), vertices_px, as_float32(voxels), "fitted", OVERSAMPLING)
        results.append((spectra, project_adjoint(spectra, vertices_px, as_float32(voxels), "fitted", OVERSAMPLING)))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_fitted_kernel_refuses_what_it_cannot_do(bend):
    values, vertices_px, voxels, _ = bend
    with pytest.raises(ValueError, match="no gradients"):
        project(values.clone().requires_grad_(), vertices_px, voxels, "fitted", OVERSAMPLING)
    broken = vertices_px.float()
    broken[1, 7, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        project(values.float(), broken, as_float32(voxels), "fitted", OVERSAMPLING)
    far = (vertices_px * torch.tensor([1e12, -1e9])).float()
    spectra = project(values.float(), far, as_float32(voxels), "fitted", OVERSAMPLING)
    torch.testing.assert_close(spectra[:, 0, 0].real.double(), values.sum().expand(3), rtol=2e-3, atol=0)
