"""The CTF against a scalar formula written out term by term, values known by hand, and RELION's aberration terms."""

import cmath
from math import asin, atan2, cos, exp, pi, sin, sqrt
from pathlib import Path

import numpy as np
import pytest
import torch

from flexlib.images.ctf import ctf_images, even_zernike_index, odd_zernike_index, zernike
from flexlib.particles.table import OpticsGroup, Particles, wavelength_A


def make_particles(optics, groups, **columns):
    count = len(groups)
    rng = np.random.default_rng(5)
    defaults = {
        "defocus_u_A": rng.uniform(5000, 30000, count),
        "defocus_v_A": rng.uniform(5000, 30000, count),
        "defocus_angle_rad": rng.uniform(-pi, pi, count),
        "phase_shift_rad": np.zeros(count),
        "ctf_bfactor_A2": np.zeros(count),
        "ctf_scale": np.ones(count),
    }
    return Particles(
        optics=tuple(optics),
        optics_index=np.array(groups, np.int32),
        rotation=np.tile(np.eye(3), (count, 1, 1)),
        origin_A=np.zeros((count, 2)),
        half_set=np.zeros(count, np.int8),
        contrast_sign=np.ones(count),
        stack_paths=(Path("a.mrcs"),),
        stack_index=np.zeros(count, np.int32),
        image_index=np.arange(count),
        source_path=Path("a.star"),
        source_row=np.arange(count),
        **(defaults | {name: np.asarray(values, float) for name, values in columns.items()}),
    )


def scalar_ctf(particles, row, kx, ky):
    """RELION's CTF at one frequency (1/A), written term by term."""
    optics = particles.optics[particles.optics_index[row]]
    (m00, m01), (m10, m11) = optics.magnification_matrix
    kx, ky = m00 * kx + m01 * ky, m10 * kx + m11 * ky
    k, theta = sqrt(kx**2 + ky**2), atan2(ky, kx)
    volt = optics.voltage_kV * 1000
    wavelength = 12.2643247 / sqrt(volt * (1 + 0.978466e-6 * volt))
    cs = optics.spherical_aberration_mm * 1e7
    u, v = particles.defocus_u_A[row], particles.defocus_v_A[row]
    defocus = (u + v) / 2 + (u - v) / 2 * cos(2 * (theta - particles.defocus_angle_rad[row]))
    gamma = -pi * wavelength * defocus * k**2 + pi / 2 * cs * wavelength**3 * k**4
    gamma -= particles.phase_shift_rad[row] + asin(optics.amplitude_contrast)
    even = [1, k**2 * sin(2 * theta), 2 * k**2 - 1, k**2 * cos(2 * theta), k**4 * sin(4 * theta)]
    gamma += sum(a * b for a, b in zip(optics.even_zernike, even, strict=False))
    value = -sin(gamma) * exp(-particles.ctf_bfactor_A2[row] * k**2 / 4) * particles.ctf_scale[row]
    odd = [k * sin(theta), k * cos(theta), k**3 * sin(3 * theta), (3 * k**3 - 2 * k) * sin(theta)]
    phase = sum(a * b for a, b in zip(optics.odd_zernike, odd, strict=False))
    tilt_x, tilt_y = (1e-3 * tilt for tilt in optics.beam_tilt_mrad)
    phase -= 2 * pi * cs * wavelength**2 * k**2 * (tilt_x * kx + tilt_y * ky)
    return value * cmath.exp(1j * phase)


def expected_images(particles, rows, box, pixel_size_A):
    ky = np.fft.fftfreq(box) / pixel_size_A
    kx = np.arange(box // 2 + 1) / (box * pixel_size_A)
    return np.array([[[scalar_ctf(particles, row, x, y) for x in kx] for y in ky] for row in rows])


PLAIN = OpticsGroup("a", 300.0, 2.7, 0.1, 1.1, 32)


def test_matches_scalar_formula():
    particles = make_particles(
        [PLAIN, OpticsGroup("b", 200.0, 1.4, 0.07, 1.1, 32)],
        [0, 1, 0, 1],
        phase_shift_rad=[0, 0.4, 1.5, 0],
        ctf_bfactor_A2=[0, 50, 0, 120],
        ctf_scale=[1, 0.8, 1.3, 1],
    )
    rows = np.array([2, 0, 1, 3])
    images = ctf_images(particles, rows, 32, 1.1)
    assert images.dtype == torch.float32
    np.testing.assert_allclose(images.numpy(), expected_images(particles, rows, 32, 1.1).real, atol=3e-6)


def test_matches_scalar_formula_with_aberrations():
    aberrated = OpticsGroup(
        "b", 300.0, 2.7, 0.1, 1.1, 24,
        beam_tilt_mrad=(0.3, -0.2),
        odd_zernike=(0.4, -0.7, 2.0, 1.5),
        even_zernike=(0.3, 4.0, -2.0, 6.0, 9.0),
        magnification_matrix=((1.02, 0.01), (-0.005, 0.97)),
    )  # fmt: skip
    particles = make_particles([PLAIN, aberrated], [0, 1, 1])
    rows = np.arange(3)
    images = ctf_images(particles, rows, 24, 1.1)
    assert images.dtype == torch.complex64
    np.testing.assert_allclose(images.numpy(), expected_images(particles, rows, 24, 1.1), atol=5e-6)
    only_plain = ctf_images(particles, rows[:1], 24, 1.1)
    assert only_plain.dtype == torch.complex64, "a source's batches must all have one type"


def test_values_known_by_hand():
    assert wavelength_A(300.0) == pytest.approx(0.019687, abs=1e-6)
    assert wavelength_A(200.0) == pytest.approx(0.025079, abs=1e-6)
    weak = OpticsGroup("a", 300.0, 0.0, 0.0, 2.0, 64)  # CTF = sin(pi lambda defocus k^2): first zero at k = 1/10 A here
    particles = make_particles(
        [weak, PLAIN], [0, 1], defocus_u_A=[100 / wavelength_A(300.0)] * 2, defocus_v_A=[100 / wavelength_A(300.0)] * 2
    )
    images = ctf_images(particles, np.arange(2), 60, 2.0).numpy()
    assert abs(images[0, 0, 12]) < 1e-6 and abs(images[0, -12, 0]) < 1e-6  # k = 12 / 120 A
    assert images[0, 0, 11] > 0.3 and images[0, 0, 13] < -0.3, "underfocus: positive up to the first zero"
    assert images[1, 0, 0] == pytest.approx(0.1, abs=1e-7), "CTF(0) is plus the amplitude contrast"


def test_astigmatism_points_along_its_angle():
    weak = OpticsGroup("a", 300.0, 0.0, 0.0, 2.0, 64)
    defocus_A = 100 / wavelength_A(300.0)
    particles = make_particles(
        [weak], [0, 0], defocus_u_A=[defocus_A] * 2, defocus_v_A=[0, 0], defocus_angle_rad=[0, pi / 2]
    )
    images = ctf_images(particles, np.arange(2), 60, 2.0).numpy()
    np.testing.assert_allclose([images[0, 0, 8], images[1, 8, 0]], np.sin(pi * (8 / 12) ** 2), atol=1e-6)
    np.testing.assert_allclose([images[0, 8, 0], images[1, 0, 8]], 0, atol=1e-6)


def test_fourier_crop_keeps_physical_frequencies():
    particles = make_particles([PLAIN], [0, 0, 0])
    rows = np.arange(3)
    full = ctf_images(particles, rows, 64, 1.1)
    cropped = ctf_images(particles, rows, 32, 2.2)
    torch.testing.assert_close(full[:, :16, :16], cropped[:, :16, :16], atol=2e-6, rtol=0)
    torch.testing.assert_close(full[:, -15:, :16], cropped[:, -15:, :16], atol=2e-6, rtol=0)


def test_precise_at_large_defocus_and_resolution():
    particles = make_particles([PLAIN], [0], defocus_u_A=[60000], defocus_v_A=[58000])
    image = ctf_images(particles, np.array([0]), 32, 0.5)  # phases of several thousand radians
    np.testing.assert_allclose(image.numpy(), expected_images(particles, [0], 32, 0.5).real, atol=1e-5)


def test_beam_tilt_is_coma_in_zernike_terms():
    """RELION (tilt_helper.cpp) stores beam tilt t as Z3^1 = -s t / 3 and Z1^1 = 2 Z3^1, s = 2 pi Cs lambda^2."""
    strength = 2 * pi * 2.7e7 * wavelength_A(300.0) ** 2
    z3 = -strength * 1e-3 * np.array([0.5, -0.3]) / 3
    as_zernike = (2 * z3[1], 2 * z3[0], 0.0, z3[1], z3[0], 0.0)
    tilted = OpticsGroup("a", 300.0, 2.7, 0.1, 1.1, 32, beam_tilt_mrad=(0.5, -0.3))
    coma = OpticsGroup("a", 300.0, 2.7, 0.1, 1.1, 32, odd_zernike=as_zernike)
    one, other = (ctf_images(make_particles([optics], [0, 0]), np.arange(2), 32, 1.1) for optics in (tilted, coma))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_zernike_order_and_values():
    assert [odd_zernike_index(i) for i in range(7)] == [(-1, 1), (1, 1), (-3, 3), (-1, 3), (1, 3), (3, 3), (-5, 5)]
    assert [even_zernike_index(i) for i in range(6)] == [(0, 0), (-2, 2), (0, 2), (2, 2), (-4, 4), (-2, 4)]
    x, y = np.array([0.3]), np.array([-0.4])  # radius 0.5
    theta = np.arctan2(y, x)
    np.testing.assert_allclose(zernike(0, 4, x, y), 6 * 0.5**4 - 6 * 0.5**2 + 1)
    np.testing.assert_allclose(zernike(-2, 4, x, y), (4 * 0.5**4 - 3 * 0.5**2) * np.sin(2 * theta))
    np.testing.assert_allclose(zernike(3, 3, x, y), 0.5**3 * np.cos(3 * theta))
