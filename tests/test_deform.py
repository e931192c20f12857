"""The push-forward of density: against the exact transform of moved voxels, and moved phantoms, at any box."""

import finufft
import numba
import numpy as np
import pytest
from moving_ball import BOX, PIXEL_SIZE_A, ball, ball_mesh, centre_A, linear_model
from scipy.spatial.transform import Rotation

from flexlib.imaging.maps import Map
from flexlib.imaging.masks import soft_edge
from flexlib.model.deformed import deform_at_latent
from flexlib.tetra.deform import VolumeDeformer, deform_volume, moving_mask
from flexlib.tetra.voxels import voxelise


@pytest.fixture(scope="module")
def mesh():
    return ball_mesh()


def bend_A(vertices_A):
    """A smooth bend of a few Angstrom."""
    x, y, z = (vertices_A / 30.0).T
    return 4.0 * np.stack([np.sin(z) + 0.2, 0.5 * x * z, np.cos(y) * 0.7], 1)


def test_volume_at_rest_is_given_back(mesh):
    volume = np.random.default_rng(0).standard_normal((BOX,) * 3).astype(np.float32)
    mask = soft_edge(ball(BOX, 8), PIXEL_SIZE_A, 0.0, 9.0)
    moved = deform_volume(volume, PIXEL_SIZE_A, mask, mesh, np.zeros_like(mesh.vertices_A))
    assert np.abs(moved - volume).max() < 1e-5 * np.abs(volume).max()


def test_mass_is_kept_and_density_outside_the_mask_stays(mesh):
    generator = np.random.default_rng(1)
    inside = ball(BOX, 8)
    volume = np.where(inside, generator.uniform(1, 2, inside.shape), 0)
    volume[2, 2, 2] = 5.0
    moved = deform_volume(volume, PIXEL_SIZE_A, inside, mesh, bend_A(mesh.vertices_A))
    assert moved.sum() == pytest.approx(volume.sum(), rel=1e-5)
    assert np.abs(moved - volume).max() > 0.5
    without = deform_volume(volume * inside, PIXEL_SIZE_A, inside, mesh, bend_A(mesh.vertices_A))
    assert (moved - without)[2, 2, 2] == pytest.approx(5.0, rel=1e-4)


def test_push_forward_is_the_transform_of_the_moved_voxels(mesh):
    inside = ball(BOX, 9)
    volume = np.where(inside, np.random.default_rng(2).standard_normal(inside.shape), 0).astype(np.float32)
    displacements_A = bend_A(mesh.vertices_A)
    moved = np.fft.fftn(deform_volume(volume, PIXEL_SIZE_A, inside, mesh, displacements_A))
    exact = exact_transform(volume, inside * 1.0, PIXEL_SIZE_A, mesh, displacements_A)
    k = np.fft.fftfreq(BOX)
    radius = np.sqrt(k[:, None, None] ** 2 + k[None, :, None] ** 2 + k[None, None, :] ** 2)
    for low, high, tolerance in (
        (0, 0.1, 1e-4),
        (0.1, 0.2, 1e-3),
        (0.2, 0.3, 3e-3),
        (0.3, 0.4, 1e-2),
        (0.4, 0.5, 3e-2),
    ):
        band = (radius >= low) & (radius < high)
        error = np.linalg.norm((moved - exact)[band]) / np.linalg.norm(exact[band])
        assert error < tolerance, (low, high, error)


def test_whole_voxel_shift_moves_whole_voxels(mesh):
    inside = ball(BOX, 8)
    volume = np.where(inside, np.random.default_rng(3).standard_normal(inside.shape), 0)
    shift_A = np.broadcast_to(np.array([2, -1, 3]) * PIXEL_SIZE_A, mesh.vertices_A.shape)
    moved = deform_volume(volume, PIXEL_SIZE_A, inside, mesh, shift_A)
    assert np.abs(moved - np.roll(volume, (3, -1, 2), (0, 1, 2))).max() < 1e-4


def test_same_bits_for_any_number_of_threads(mesh):
    volume = np.random.default_rng(4).standard_normal((BOX,) * 3).astype(np.float32)
    deformer = VolumeDeformer(volume, PIXEL_SIZE_A, np.ones_like(volume), mesh)
    threads = numba.get_num_threads()
    try:
        results = []
        for count in (1, min(2, numba.config.NUMBA_NUM_THREADS)):
            numba.set_num_threads(count)
            results.append(deformer.deform(bend_A(mesh.vertices_A)))
    finally:
        numba.set_num_threads(threads)
    assert np.array_equal(*results)


def test_flow_is_carried_to_another_box_and_pixel_size(mesh):
    inside = ball(BOX, 8)
    model = linear_model(mesh, inside * 1.0, np.zeros((5, 2)))
    fine = Map(ball(48, 8, (1, 0, -1)).astype(np.float32), 2.0)
    moved = deform_at_latent(model, fine, np.array([5.0, -3.0]))
    assert moved.shape == (48, 48, 48)
    np.testing.assert_allclose(centre_A(moved, 2.0) - centre_A(fine.data, 2.0), [5.0, -3.0, 0.0], atol=0.02)


def exact_transform(volume, share, pixel_size_A, mesh, displacements_A):
    """Non-uniform DFT of the moved voxels plus the DFT of those that stay, as ``np.fft.fftn`` orders it."""
    box = len(volume)
    voxels = voxelise(mesh, share > 0, pixel_size_A)
    corners = (mesh.vertices_A + displacements_A)[mesh.cells[voxels.cell]]
    moved_px = (voxels.bary[:, None] @ corners)[:, 0] / pixel_size_A + box // 2
    x, y, z = np.ascontiguousarray(moved_px.T * 2 * np.pi / box)
    values = (share * volume).reshape(-1)[voxels.index].astype(complex)
    moved = np.fft.ifftshift(finufft.nufft3d1(z, y, x, values, (box,) * 3, isign=-1, eps=1e-9))
    return moved + np.fft.fftn((1 - share) * volume)


def test_at_double_the_box_the_push_forward_is_exact_and_keeps_mass(mesh):
    """The mesh and mask of a coarse model carry a map of half its pixel size; white noise is the hardest content."""
    box, pixel_size_A = 2 * BOX, PIXEL_SIZE_A / 2
    mask = moving_mask(ball(BOX, 9) * 1.0, PIXEL_SIZE_A, box, pixel_size_A)
    assert mask.sum() == pytest.approx(8 * ball(BOX, 9).sum(), rel=0.02)
    generator = np.random.default_rng(6)
    volume = (generator.standard_normal((box,) * 3) + ball(box, 18)).astype(np.float32)
    displacements_A = bend_A(mesh.vertices_A)
    moved = deform_volume(volume, pixel_size_A, mask, mesh, displacements_A)
    assert moved.sum(dtype=float) == pytest.approx(volume.sum(dtype=float), rel=1e-5)

    spectrum, exact = np.fft.fftn(moved), exact_transform(volume, mask, pixel_size_A, mesh, displacements_A)
    k = np.fft.fftfreq(box)
    radius = np.sqrt(k[:, None, None] ** 2 + k[None, :, None] ** 2 + k[None, None, :] ** 2)
    bands = ((0, 0.1, 1e-4), (0.1, 0.2, 1e-3), (0.2, 0.3, 3e-3), (0.3, 0.4, 1e-2), (0.4, 0.5, 3e-2))
    for low, high, tolerance in bands:
        band = (radius >= low) & (radius < high)
        error = np.linalg.norm((spectrum - exact)[band]) / np.linalg.norm(exact[band])
        assert error < tolerance, (low, high, error)


def blobs(box, pixel_size_A, rotation, shift_A=(0.0, 0.0, 0.0)):
    """Three Gaussians of 4 A, rotated about the box centre and shifted, sampled on a grid."""
    axis = (np.arange(box) - box // 2) * pixel_size_A
    result = np.zeros((box,) * 3)
    for centre, mass in (((9.0, 0.0, 3.0), 1.0), ((-6.0, 7.0, 0.0), 0.7), ((0.0, -8.0, -6.0), 0.4)):
        x, y, z = rotation.apply(centre) + shift_A
        gauss = [np.exp(-((axis - c) ** 2) / (2 * 4.0**2)) for c in (z, y, x)]
        result += mass * gauss[0][:, None, None] * gauss[1][None, :, None] * gauss[2][None, None, :]
    return result


@pytest.mark.parametrize("factor", [1, 2])
def test_turned_and_shifted_phantom_is_the_phantom_turned_and_shifted(mesh, factor):
    """A rigid motion is linear in every cell, so that the moved map is known in closed form."""
    box, pixel_size_A = BOX * factor, PIXEL_SIZE_A / factor
    rotation, shift_A = Rotation.from_rotvec([0.2, -0.3, 0.25]), np.array([3.0, -1.7, 2.2])
    at_rest = blobs(box, pixel_size_A, Rotation.identity())
    displacements_A = rotation.apply(mesh.vertices_A) + shift_A - mesh.vertices_A
    moved = deform_volume(at_rest, pixel_size_A, np.ones((box,) * 3), mesh, displacements_A)
    expected = blobs(box, pixel_size_A, rotation, shift_A)
    assert np.linalg.norm(moved - expected) < 2e-3 * np.linalg.norm(expected)
    assert np.linalg.norm(at_rest - expected) > 0.3 * np.linalg.norm(expected)
