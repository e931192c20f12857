"""Sums over Fourier shells against the full complex transform, in which every coefficient is there to be counted."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from flexlib.imaging import fourier

GRIDS = [(box, ndim) for ndim in (2, 3) for box in (16, 20, 24)]


def field(box, ndim):
    """A real field with power in all coefficients, those without a mate to be doubled (kx = 0, N/2) above all."""
    values = np.random.default_rng(box + ndim).normal(size=(box,) * ndim)
    x = np.arange(box)
    return values + 3.0 * (-1.0) ** x + 2.0 * np.cos(2 * np.pi * 3 * x / box)[:, None]


def full_radius(box, ndim):
    """|k| of every coefficient of ``fftn``."""
    k = np.rint(np.fft.fftfreq(box, 1.0 / box))
    return np.sqrt(sum(np.square(axis) for axis in np.meshgrid(*[k] * ndim, indexing="ij")))


def full_sums(values, box, ndim, rim=False):
    """(N/2,) sums of ``values``, one for each coefficient of ``fftn``, over the shells below N/2."""
    radius = full_radius(box, ndim)
    edges = np.append(np.arange(box // 2), box / 2) - 0.5
    if rim:
        edges[-1] = box / 2
    return np.array([values[(radius >= low) & (radius < high)].sum() for low, high in pairwise(edges)])


def disagreement(box, ndim):
    """Largest relative difference between shell sums of the power over the half-space and over the full transform."""
    values = field(box, ndim)
    expected = full_sums(np.abs(np.fft.fftn(values)) ** 2, box, ndim)
    found = fourier.shell_sums(np.abs(np.fft.rfftn(values)) ** 2, ndim)
    return np.abs(found / expected - 1).max()


@pytest.mark.parametrize(("box", "ndim"), GRIDS)
def test_radii_are_those_of_the_full_transform(box, ndim):
    radius = full_radius(box, ndim)[..., : box // 2 + 1]
    np.testing.assert_allclose(fourier.shell_radius(box, ndim), radius, rtol=1e-6)
    np.testing.assert_array_equal(fourier.shell_number(box, ndim), np.rint(radius))


@pytest.mark.parametrize("rim", [False, True])
@pytest.mark.parametrize(("box", "ndim"), GRIDS)
def test_sums_means_and_counts_are_those_of_the_full_transform(box, ndim, rim):
    """Of a field's power, and of the real cross terms of two; with ``rim`` up to |k| = N/2."""
    first, second = field(box, ndim), np.roll(field(box, ndim), 1, axis=-1)
    full = (np.fft.fftn(first) * np.fft.fftn(second).conj()).real
    half = (np.fft.rfftn(first) * np.fft.rfftn(second).conj()).real
    counts = full_sums(np.ones_like(full), box, ndim, rim)
    sums = full_sums(full, box, ndim, rim)
    scale = full_sums(np.abs(full), box, ndim, rim)
    np.testing.assert_array_equal(fourier.shell_counts(box, ndim, rim), counts)
    assert (np.abs(fourier.shell_sums(half, ndim, rim) - sums) < 1e-12 * scale).all()
    assert (np.abs(fourier.shell_means(half, ndim, rim) - sums / counts) < 1e-12 * scale / counts).all()
    assert disagreement(box, ndim) < 1e-12


@pytest.mark.parametrize(("box", "ndim"), GRIDS)
def test_means_of_what_is_stored_weigh_the_first_column_double(box, ndim):
    """The plain mean over the half-space; of white noise it is the full transform's but for the scatter."""
    power = np.abs(np.fft.rfftn(field(box, ndim))) ** 2
    shell = np.rint(fourier.shell_radius(box, ndim)).astype(int)
    stored = [power[shell == number].mean() for number in range(box // 2)]
    np.testing.assert_allclose(fourier.stored_means(power, ndim), stored, rtol=1e-12)
    assert np.abs(fourier.shell_means(power, ndim) / stored - 1)[1:].max() > 1e-4  # not the same mean


@pytest.mark.parametrize("box", [16, 20, 24])
def test_weights_count_every_coefficient_once(box):
    """Parseval: the weighted half is the whole."""
    values = field(box, 2)
    power = (np.abs(np.fft.rfftn(values)) ** 2 * fourier.friedel_weight(box)).sum()
    assert power == pytest.approx(box**2 * (values**2).sum(), rel=1e-6)


@pytest.mark.parametrize("ndim", [2, 3])
def test_weights_of_one_are_seen_as_wrong(ndim, monkeypatch):
    """The comparison with the full transform fails where Friedel mates are forgotten, or all are doubled."""
    correct = fourier.friedel_weight
    for wrong in (lambda box: np.ones_like(correct(box)), lambda box: np.full_like(correct(box), 2.0)):
        fourier._image_shells.cache_clear()
        monkeypatch.setattr(fourier, "friedel_weight", wrong)
        assert disagreement(20, ndim) > 0.01
    fourier._image_shells.cache_clear()
    monkeypatch.undo()
    assert disagreement(20, ndim) < 1e-12


@pytest.mark.parametrize(("box", "ndim"), GRIDS)
def test_arrays_and_tensors_agree(box, ndim):
    """With leading dimensions; float32 in, float64 out."""
    values = np.random.default_rng(0).normal(size=(2, 3, *(box,) * (ndim - 1), box // 2 + 1)).astype(np.float32)
    for function in (fourier.shell_sums, fourier.shell_means):
        array, tensor = function(values, ndim), function(torch.from_numpy(values), ndim)
        assert isinstance(array, np.ndarray) and isinstance(tensor, torch.Tensor)
        assert array.dtype == np.float64 and array.shape == (2, 3, box // 2)
        np.testing.assert_array_equal(array, tensor.numpy())
        np.testing.assert_array_equal(array[1, 2], function(values[1, 2], ndim))


@pytest.mark.parametrize(("old", "new"), [(24, 16), (16, 24), (20, 20)])
@pytest.mark.parametrize("ndim", [2, 3])
def test_resampled_spectra_hold_the_same_field(old, new, ndim):
    """Arrays and tensors alike: a field without its Nyquist planes, sampled anew, comes back when resampled back."""
    half = min(old, new) // 2
    spectrum = np.fft.rfftn(field(old, ndim))
    k = np.abs(np.rint(np.fft.fftfreq(old, 1.0 / old)))
    inside = np.ix_(*[k < half] * (ndim - 1), np.arange(old // 2 + 1) < half)
    band = np.zeros_like(spectrum)
    band[inside] = spectrum[inside]
    resampled = fourier.resample_spectrum(spectrum, new, ndim)
    assert resampled.shape == (*(new,) * (ndim - 1), new // 2 + 1)
    np.testing.assert_array_equal(fourier.resample_spectrum(torch.from_numpy(spectrum), new, ndim).numpy(), resampled)
    np.testing.assert_array_equal(fourier.resample_spectrum(resampled, old, ndim), band)
    axes = tuple(range(-ndim, 0))
    samples = np.fft.irfftn(resampled, s=(new,) * ndim, axes=axes) * (new / old) ** ndim
    expected = np.fft.irfftn(band, s=(old,) * ndim, axes=axes)
    step = np.gcd(old, new)  # positions that both grids have
    at = [np.ix_(*[np.arange(0, box, box // step)] * ndim) for box in (old, new)]
    np.testing.assert_allclose(samples[at[1]], expected[at[0]], atol=1e-12)


def test_fft_workers_are_torchs_threads():
    """A rule's threads, which torch is given, are those that FFTs take, and not every core."""
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert fourier.fft_workers() == threads
    finally:
        torch.set_num_threads(before)
