"""What is derived from half-maps, on maps whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import fft

from flexlib.imaging.fourier import lowpass_map, shell_radius
from flexlib.imaging.fsc import corrected_fsc, fsc, predicted_truth_fsc, resolution_at
from flexlib.imaging.masks import soft_edge
from flexlib.mesh.lattice import bcc_mesh
from flexlib.model.motion import rms_displacement_A
from flexlib.reconstruct.postprocess import guinier_b_factor, local_resolution, moving_region, sharpened_map
from flexlib.tetra.voxels import voxelise


def noise(seed: int, box: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((box,) * 3).astype(np.float32)


def radius_px(box: int) -> np.ndarray:
    axis = np.arange(box) - box // 2
    return np.sqrt(axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[None, None, :] ** 2)


def filtered(volume: np.ndarray, weight_of_shell: np.ndarray) -> np.ndarray:
    weight = np.interp(shell_radius(len(volume)), np.arange(len(weight_of_shell)), weight_of_shell)
    return fft.irfftn(fft.rfftn(volume) * weight.astype(np.float32), s=volume.shape)


class StandIn:
    """A model whose displacements are given, one row a particle."""

    def __init__(self, mesh, moved_A):
        self.mesh, self._moved_A = mesh, moved_A
        self.latents = np.arange(len(moved_A), dtype=np.float32)[:, None]

    def displacements_A(self, z):
        import torch

        return torch.as_tensor(self._moved_A[z[:, 0].long()], dtype=torch.float32)


@pytest.fixture(scope="module")
def mesh_and_voxels():
    inside = radius_px(48) < 16
    mesh = bcc_mesh(inside, 2.0, 12.0)
    return inside.astype(np.float32), mesh, voxelise(mesh, inside, 2.0)


def test_predicted_fsc_is_that_of_the_mean_map_with_the_truth():
    """Half-maps of one signal with independent noise, its strength different in every shell."""
    box = 64
    ratio = np.geomspace(30, 0.03, box // 2)
    signal = filtered(noise(0, box), np.sqrt(ratio))
    halves = [signal + noise(seed, box) for seed in (1, 2)]
    predicted = predicted_truth_fsc(fsc(*halves))
    real = fsc(0.5 * (halves[0] + halves[1]), signal)
    assert np.abs(predicted - real)[8:].max() < 0.05
    assert np.abs((predicted - real)[8:].mean()) < 0.005
    wrong = predicted**2 - real  # without the root: what two such maps would have with each other
    assert np.abs(wrong[8:]).max() > 0.2


def test_predicted_fsc_at_both_ends():
    assert predicted_truth_fsc(np.array([1.0, 0.5, 0.143, 0.0, -0.1])) == pytest.approx(
        [1.0, 0.8165, 0.5002, 0.0, 0.0], abs=1e-4
    )


def test_moving_region_is_where_the_particles_differ(mesh_and_voxels):
    mask, mesh, voxels = mesh_and_voxels
    amounts = np.random.default_rng(0).normal(0, 1, 300)
    hinge_A = np.zeros_like(mesh.vertices_A)
    hinge_A[:, 1] = np.maximum(mesh.vertices_A[:, 0], 0.0)  # grows along x from the middle, towards y
    common_A = np.array([0.0, 0.0, 40.0])  # the same for all: no motion
    model = StandIn(mesh, amounts[:, None, None] * hinge_A + common_A)
    rms_A = rms_displacement_A(model, voxels)
    x_A = (np.unravel_index(voxels.index, mask.shape)[2] - 24) * 2.0
    away = np.abs(x_A) > 12.0  # beyond the cells that the bend cuts through
    np.testing.assert_allclose(rms_A[away], amounts.std() * np.maximum(x_A, 0)[away], atol=0.1)
    region, motion = moving_region(model, voxels, mask)
    at_x = region.max((0, 1))
    assert at_x[24 + 9 :][:6].min() == 1.0 and at_x[:24].max() == 0.0
    assert (region <= mask).all()
    assert motion["threshold_A"] == pytest.approx(motion["largest_A"] / 2)
    assert motion["largest_A"] == pytest.approx(amounts.std() * np.percentile(np.maximum(x_A, 0), 99), rel=0.05)


def test_nothing_moves_by_less_than_half_a_voxel(mesh_and_voxels):
    mask, mesh, voxels = mesh_and_voxels
    jitter_A = 0.3 * np.random.default_rng(0).standard_normal((50, len(mesh.vertices_A), 3))
    region, motion = moving_region(StandIn(mesh, jitter_A), voxels, mask)
    assert not region.any() and motion["threshold_A"] == 0.0


def test_local_resolution_sets_the_sharp_half_apart_from_the_blurred():
    """Left half to 8 A, right half to 16 A, white noise everywhere."""
    box, pixel_size_A = 64, 2.0
    mask = soft_edge(radius_px(box) < 26, 1.0, 0.0, 4.0)
    left = np.zeros(box, np.float32)
    left[: box // 2] = 1.0
    signal = left * lowpass_map(noise(0, box), pixel_size_A, 8.0)
    signal += (1 - left) * lowpass_map(noise(1, box), pixel_size_A, 16.0)
    # at the filters' half height the signal is as strong as the noise: FSC 0.5
    halves = [(signal + 0.5 * noise(seed, box)) * mask for seed in (2, 3)]
    local_A = local_resolution(*halves, mask, pixel_size_A, 9.0)
    sharp, blurred = local_A[20:44, 20:44, 12:22], local_A[20:44, 20:44, 42:52]
    assert np.median(sharp) == pytest.approx(8.0, rel=0.15)
    assert np.median(blurred) == pytest.approx(16.0, rel=0.2)
    assert local_A.shape == mask.shape and np.isfinite(local_A).all() and local_A.min() >= 2 * pixel_size_A


def test_local_resolution_of_noise_is_the_window_and_of_equal_maps_the_limit():
    mask = (radius_px(32) < 12).astype(np.float32)
    noise_A = local_resolution(noise(0, 32), noise(1, 32), mask, 2.0, 6.0)
    assert np.median(noise_A) > 15.0
    same_A = local_resolution(noise(0, 32), noise(0, 32), mask, 2.0, 6.0)
    assert same_A.max() < 4.5  # the window's last shell
    empty = local_resolution(noise(0, 32), noise(1, 32), 0 * mask, 2.0, 6.0)
    assert (empty > 30).all()


def test_a_window_that_is_low_from_the_first_shell_on_has_that_shells_resolution():
    curve = np.array([1.0, 0.2, 0.1, 0.6])
    assert resolution_at(curve, 0.5, 8, 2.0) == pytest.approx(16.0 / 0.625)
    assert resolution_at(curve, 0.5, 8, 2.0, first_shell=1) == 16.0
    later = np.array([1.0, 0.9, 0.1, 0.0])
    assert resolution_at(later, 0.5, 8, 2.0, first_shell=1) == resolution_at(later, 0.5, 8, 2.0)


def test_guinier_fit_finds_the_b_factor_through_noise():
    box, pixel_size_A, b_factor_A2 = 64, 1.2, 120.0
    frequency = np.arange(box) / (box * pixel_size_A)
    signal = filtered(noise(0, box), np.exp(-0.25 * b_factor_A2 * frequency**2))
    halves = [signal + 0.02 * noise(seed, box) for seed in (1, 2)]
    curve = fsc(*halves)
    mean = 0.5 * (halves[0] + halves[1])
    assert guinier_b_factor(mean, curve, pixel_size_A, 2.8) == pytest.approx(b_factor_A2, abs=8)
    flat = guinier_b_factor(noise(3, box), np.ones(box // 2), pixel_size_A, 2.8)
    assert flat == pytest.approx(0.0, abs=8)
    assert guinier_b_factor(mean, curve, pixel_size_A, 9.0) is None


def test_sharpening_restores_amplitudes_and_ends_at_the_resolution():
    box, pixel_size_A, b_factor_A2 = 64, 1.2, 120.0
    frequency = np.arange(box) / (box * pixel_size_A)
    white = noise(0, box)
    blurred = filtered(white, np.exp(-0.25 * b_factor_A2 * frequency**2))
    sharp = sharpened_map(blurred, np.ones(box // 2), pixel_size_A, 4.0, b_factor_A2)
    last = round(box * pixel_size_A / 4.0)
    spectrum, expected = np.abs(fft.rfftn(sharp)), np.abs(fft.rfftn(white))
    shell = shell_radius(box)
    passed = shell < last - 3
    np.testing.assert_allclose(spectrum[passed], expected[passed], rtol=2e-2, atol=1e-3 * expected.max())
    assert spectrum[shell > last + 3].max() < 1e-3 * expected.max()


def test_a_weak_shell_is_weighted_down():
    box = 32
    curve = np.where(np.arange(box // 2) < 6, 1.0, 0.2)
    sharp = sharpened_map(noise(0, box), curve, 1.0, 2.5, 0.0)
    shell = np.rint(shell_radius(box))
    ratio = np.abs(fft.rfftn(sharp)) / np.abs(fft.rfftn(noise(0, box)))
    assert np.median(ratio[shell == 4]) == pytest.approx(1.0, abs=1e-3)
    assert np.median(ratio[shell == 8]) == pytest.approx(np.sqrt(0.4 / 1.2), abs=1e-2)


def test_a_small_mask_correlates_noise_and_the_correction_takes_it_out():
    mask = soft_edge(radius_px(48) < 5, 1.0, 0.0, 3.0)
    smooth = lowpass_map(noise(5, 48), 1.0, 12.0) * 40
    halves = [smooth + noise(seed, 48) for seed in (6, 7)]
    curves = corrected_fsc(*halves, mask)
    beyond = slice(10, 16)
    assert np.asarray(curves["masked"])[beyond].mean() > np.asarray(curves["corrected"])[beyond].mean()
    assert abs(np.asarray(curves["corrected"])[beyond].mean()) < 0.15
