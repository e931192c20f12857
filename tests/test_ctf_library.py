"""Why our own CTF and not torch-ctf, the field's library: where it agrees with RELION's CTF, and where it does not.

The measure is RELION's formula in float64, term by term, as in test_ctf.py; ours is measured beside it. When a newer
release makes one of these tests fail, the reason it shows is gone: see the docstring of ``flexlib.images.ctf``.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_ctf import expected_images, make_particles
from torch_ctf import calculate_ctf_2d

from flexlib.images.ctf import ctf_images, zernike
from flexlib.imaging.image_transforms import plane_radius
from flexlib.particles.table import OpticsGroup

BOX = 64
INSIDE = plane_radius(BOX).numpy() < BOX / 2
PLAIN = OpticsGroup("a", 300.0, 2.7, 0.1, 1.2, BOX)


def one_particle(optics=PLAIN, u_A=20000.0, v_A=18000.0, angle_rad=0.4, **columns):
    return make_particles([optics], [0], defocus_u_A=[u_A], defocus_v_A=[v_A], defocus_angle_rad=[angle_rad], **columns)


def theirs(particles, **more):
    """(BOX, BOX//2+1) torch-ctf's CTF of the first particle."""
    optics, (u_A,), (v_A,) = particles.optics[0], particles.defocus_u_A, particles.defocus_v_A
    return calculate_ctf_2d(
        defocus=(u_A + v_A) / 2e4,
        astigmatism=(u_A - v_A) / 2e4,
        astigmatism_angle=np.rad2deg(particles.defocus_angle_rad[0]),
        voltage=optics.voltage_kV,
        spherical_aberration=optics.spherical_aberration_mm,
        amplitude_contrast=optics.amplitude_contrast,
        phase_shift=np.rad2deg(particles.phase_shift_rad[0]),
        pixel_size=optics.pixel_size_A,
        image_shape=(BOX, BOX),
        rfft=True,
        fftshift=False,
        **more,
    ).numpy()


def errors(particles, **more):
    """Largest errors of ours and of theirs below Nyquist."""
    exact = expected_images(particles, [0], BOX, particles.optics[0].pixel_size_A)[0]
    ours = ctf_images(particles, np.arange(1), BOX)[0].numpy()
    return tuple(float(np.abs(found - exact)[INSIDE].max()) for found in (ours, theirs(particles, **more)))


def test_both_agree_on_astigmatism_and_phase_shift():
    ours, library = errors(one_particle(phase_shift_rad=[1.2]))
    assert ours < 1e-6 and library < 2e-3


def test_both_agree_on_magnification():
    """Its matrix is in real space and in y, x order: the inverse, transposed and flipped, of RELION's."""
    matrix = np.array([[1.02, 0.01], [-0.005, 0.97]])
    optics = replace(PLAIN, magnification_matrix=tuple(map(tuple, matrix)))
    real_space = np.ascontiguousarray(np.linalg.inv(matrix).T[::-1, ::-1])
    ours, library = errors(one_particle(optics), transform_matrix=torch.as_tensor(real_space, dtype=torch.float32))
    assert ours < 1e-6 and library < 2e-3
    _, other = errors(one_particle(optics), transform_matrix=torch.as_tensor(matrix, dtype=torch.float32))
    assert other > 0.1, "this test can see it"


def test_both_agree_on_trefoil_and_the_four_fold_term():
    optics = replace(PLAIN, odd_zernike=(0.0, 0.0, 0.8), even_zernike=(0.0, 0.0, 0.0, 0.0, 3.0))
    ours, library = errors(one_particle(optics), odd_zernike_coeffs={"Z33s": 0.8}, even_zernike_coeffs={"Z44s": 3.0})
    assert ours < 1e-6 and library < 2e-3


@pytest.mark.parametrize(("defocus_A", "pixel_size_A"), [(60000.0, 1.2), (30000.0, 0.5)])
def test_float32_phases_of_the_library_are_too_coarse(defocus_A, pixel_size_A):
    """Ours keeps turns in float64 until whole ones are dropped."""
    particles = one_particle(replace(PLAIN, pixel_size_A=pixel_size_A), defocus_A, defocus_A - 1000, 0.0)
    ours, library = errors(particles)
    assert ours < 1e-6 and library > 3e-3


def test_the_library_is_nan_where_defocus_u_is_the_smaller():
    particles = one_particle(u_A=18000.0, v_A=20000.0)
    assert np.isnan(theirs(particles)).all()
    assert errors(particles)[0] < 1e-6


def test_beam_tilt_of_the_library_has_the_opposite_sign():
    """RELION's own sign is proven by ``relion_reconstruct`` in test_relion.py."""
    tilted = one_particle(replace(PLAIN, beam_tilt_mrad=(1.5, -0.8)))
    tilt = torch.tensor([1.5, -0.8])
    ours, library = errors(tilted, beam_tilt_mrad=tilt)
    assert ours < 1e-6 and library > 0.1
    assert errors(tilted, beam_tilt_mrad=-tilt)[1] < 2e-3


def test_zernike_terms_of_the_library_are_leading_powers_of_some():
    """RELION's lists hold Z1 and Z2, and Z3^1 with its lower power."""
    particles = one_particle()
    for odd in ("Z11c", "Z11s"):
        with pytest.raises(ValueError, match="Unknown odd Zernike"):
            theirs(particles, odd_zernike_coeffs={odd: 1.0})
    for even in ("Z20", "Z22c"):
        with pytest.raises(ValueError, match="Unknown even Zernike"):
            theirs(particles, even_zernike_coeffs={even: 1.0})
    ky, kx = np.meshgrid(np.fft.fftfreq(BOX, 1.2), np.fft.rfftfreq(BOX, 1.2), indexing="ij")
    relions = np.exp(1j * 0.8 * zernike(1, 3, kx, ky))
    ratio = theirs(particles, odd_zernike_coeffs={"Z31c": 0.8}) / theirs(particles)
    leading = np.exp(1j * 0.8 * (kx**2 + ky**2) * kx)
    clear = INSIDE & (np.abs(theirs(particles)) > 0.1)
    np.testing.assert_allclose(ratio[clear], leading[clear], atol=1e-3)
    assert np.abs(ratio - relions)[clear].max() > 0.1
