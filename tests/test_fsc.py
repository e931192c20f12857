"""FSC: known signal-to-noise ratios, and the mask's own correlation taken out."""

from __future__ import annotations

import numpy as np
import pytest

from flexlib.imaging.fourier import lowpass_map
from flexlib.imaging.fsc import corrected_fsc, frequencies_1_per_A, fsc, phase_randomise, resolution_at
from flexlib.imaging.masks import soft_edge


def noise(seed: int, box: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((box,) * 3).astype(np.float32)


def ball(box: int, radius: float) -> np.ndarray:
    axis = np.arange(box) - box // 2
    return np.sqrt(axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[None, None, :] ** 2) < radius


def test_matches_a_plain_full_fft_shell_by_shell():
    a, b = noise(1, 16), noise(2, 16) + 0.5 * noise(1, 16)
    fa, fb = np.fft.fftn(a), np.fft.fftn(b)
    k = np.fft.fftfreq(16, 1 / 16)
    shell = np.round(np.sqrt(k[:, None, None] ** 2 + k[None, :, None] ** 2 + k[None, None, :] ** 2))
    expected = [1.0]
    for s in range(1, 8):
        on = shell == s
        norm = np.sqrt((np.abs(fa[on]) ** 2).sum() * (np.abs(fb[on]) ** 2).sum())
        expected.append((fa[on] * fb[on].conj()).sum().real / norm)
    np.testing.assert_allclose(fsc(a, b), expected, atol=1e-5)


@pytest.mark.parametrize("ratio", [0.1, 1.0, 10.0])
def test_known_signal_to_noise_ratio(ratio):
    """Two maps of one signal with independent noise: FSC = snr / (1 + snr)."""
    signal = np.sqrt(ratio) * noise(0, 48)
    curve = fsc(signal + noise(1, 48), signal + noise(2, 48))
    count = 2 * np.pi * np.arange(1, 24) ** 2  # independent coefficients
    assert (np.abs(curve[1:] - ratio / (1 + ratio)) < 4.5 / np.sqrt(count)).all()


def test_identical_maps_and_empty_shells():
    assert np.allclose(fsc(noise(0), 3 * noise(0)), 1.0)
    smooth = np.zeros((16, 16, 16), np.float32)
    assert fsc(smooth, smooth)[1:].sum() == 0


def test_phase_randomising_keeps_amplitudes_and_low_shells():
    volume = noise(0)
    random = phase_randomise(volume, 6, seed=3)
    assert np.abs(np.abs(np.fft.rfftn(random)) - np.abs(np.fft.rfftn(volume))).max() < 1e-2
    curve = fsc(volume, random)
    assert np.allclose(curve[:6], 1.0, atol=1e-4)
    assert np.abs(curve[8:]).max() < 0.2
    np.testing.assert_array_equal(random, phase_randomise(volume, 6, seed=3))
    assert np.abs(random - phase_randomise(volume, 6, seed=4)).max() > 0.1


def test_correction_removes_the_correlation_made_by_a_mask():
    """Signal below shell 8 alone; a small tight mask spreads its correlation to shells that hold noise only."""
    box = 48
    signal = 30 * lowpass_map(noise(0, box) * ball(box, 10), 1.0, box / 8.0, edge_shells=1.0)
    map1, map2 = signal + noise(1, box), signal + noise(2, box)
    mask = soft_edge(ball(box, 10), 1.0, 0.0, 2.0)
    result = corrected_fsc(map1, map2, mask)
    start = result["randomise_from"]
    np.testing.assert_array_equal(result["corrected"][: start + 2], result["masked"][: start + 2])
    beyond = np.arange(start + 4, box // 2)
    assert 6 <= start <= 12
    assert np.abs(result["corrected"][beyond].mean()) < 0.05
    assert result["masked"][beyond].mean() > 0.2
    assert result["corrected"][:6].min() > 0.9


def test_correction_keeps_true_correlation():
    """White signal of ratio 1 everywhere: nothing in the masked FSC is due to the mask."""
    box = 32
    map1, map2 = noise(0, box) + noise(1, box), noise(0, box) + noise(2, box)
    result = corrected_fsc(map1, map2, soft_edge(ball(box, 10), 1.0, 0.0, 3.0), randomise_from=4)
    assert result["corrected"][8:].mean() == pytest.approx(0.5, abs=0.06)


def test_resolution_is_interpolated_between_shells():
    curve = np.array([1.0, 1.0, 0.9, 0.5, 0.1, 0.0, 0.0, 0.0])
    assert resolution_at(curve, 0.5, 16, 2.0) == pytest.approx(32 / 3)
    assert resolution_at(curve, 0.3, 16, 2.0) == pytest.approx(32 / 3.5)
    assert resolution_at(np.ones(8), 0.143, 16, 2.0) == pytest.approx(32 / 7)
    assert frequencies_1_per_A(16, 2.0)[3] == pytest.approx(3 / 32)
