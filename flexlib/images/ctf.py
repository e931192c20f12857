"""Contrast transfer functions as RELION defines them (``ctf.cpp``, ``obs_model.cpp``, ``tilt_helper.cpp``).

With k the physical frequency after the magnification matrix and theta its angle::

    gamma = -pi lambda df(theta) k^2 + pi/2 Cs lambda^3 k^4 + even Zernike - phase shift - asin(Q0)
    df(theta) = (U + V)/2 + (U - V)/2 cos 2(theta - angle)
    CTF = -sin(gamma) exp(-B k^2 / 4) scale,  times exp(i phase) with odd Zernike terms or beam tilt.

So CTF(0) = +Q0 and particles are white. The defocus phase is linear in (kx^2, ky^2, kx ky): one matrix product for a
whole batch. It reaches thousands of radians, hence float64 turns until whole turns are dropped, then float32.

``tests/test_relion.py`` holds all of this against RELION: values on a delta's projection (``test_ctf_is_relions``),
odd terms and magnification through ``relion_reconstruct``. The field's library torch-ctf 0.6.0 is not used, for reasons
that ``tests/test_ctf_library.py`` shows: computed in float32, it is off by 4e-3 at 6 um and 1.2 A/px and 6e-3 at 3 um
and 0.5 A/px (this module: 3e-7); it is NaN where rlnDefocusU < rlnDefocusV; its beam tilt has the opposite sign of
RELION's; and of the Zernike terms it knows only the leading power of some (no Z1, Z3^+-1, Z2 or full Z4^+-2), so
RELION's lists cannot be passed on. Its magnification (its inverse transposed, in y, x order), phase shift, trefoil and
four-fold terms agree; its speed is similar.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import factorial, pi

import numpy as np
import torch

from flexlib.images.batch import to_device
from flexlib.particles.table import OpticsGroup, Particles, wavelength_A

_MIN_CTF = 0.02  # premultiplied images are divided by no less; float16 rounding is then below 2 % of the noise


def has_odd_aberrations(particles: Particles) -> bool:
    """Whether transfer functions of these particles are complex: any group with beam tilt or odd Zernike terms."""
    return any(any(group.beam_tilt_mrad) or any(group.odd_zernike) for group in particles.optics)


def ctf_images(
    particles: Particles,
    rows: np.ndarray,
    box: int,
    pixel_size_A: float | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """CTFs of the particles at ``rows``, on the grid of images of ``box`` pixels.

    Parameters
    ----------
    particles, rows
        (b,) rows of the particles.
    box, pixel_size_A
        The grid, which may be a Fourier-cropped one: only physical frequencies matter. None takes the pixel size of
        each particle's own optics group.
    device
        Where to compute.

    Returns
    -------
    images
        (b, box, box//2+1) in rfft2 layout, float32, or complex64 where any optics group has odd aberrations. Values at
        Nyquist mean nothing.
    """
    rows = np.asarray(rows)
    dtype = torch.complex64 if has_odd_aberrations(particles) else torch.float32
    group_of_row = particles.optics_index[rows]
    groups = np.unique(group_of_row)

    def group_ctf(members: np.ndarray, group: int) -> torch.Tensor:
        size_A = particles.optics[group].pixel_size_A if pixel_size_A is None else pixel_size_A
        return _group_ctf(particles, members, group, (box, float(size_A), str(device)), dtype)

    if len(groups) == 1:
        return group_ctf(rows, groups[0]).view(-1, box, box // 2 + 1)
    result = torch.empty((len(rows), box * (box // 2 + 1)), dtype=dtype, device=device)
    for group in groups:
        members = np.flatnonzero(group_of_row == group)
        result[to_device(members, device)] = group_ctf(rows[members], group)
    return result.view(-1, box, box // 2 + 1)


def without_odd_aberrations(particles: Particles) -> Particles:
    """The same particles without beam tilt and odd Zernike terms: their CTFs are real."""
    optics = tuple(replace(group, beam_tilt_mrad=(0.0, 0.0), odd_zernike=()) for group in particles.optics)
    return replace(particles, optics=optics)


def undo_applied_ctf(ctf: torch.Tensor, applied: str) -> torch.Tensor:
    """Filter that turns images that were multiplied with their CTF, or its sign, back into what was recorded.

    Premultiplied images carry noise that the CTF has weighted: dividing by the CTF makes it white again, and the
    likelihood is that of the images as recorded. The division stops growing where |CTF| < ``_MIN_CTF``: there signal
    and noise are left weaker than modelled, which loses next to nothing of the information.

    Parameters
    ----------
    ctf
        (b, box, box//2+1) real CTFs at the box at which it was applied.
    applied
        "phase_flipped" or "premultiplied".

    Returns
    -------
    filter
        As ``ctf``; to be multiplied with the images' transforms.
    """
    if applied == "phase_flipped":
        return torch.where(ctf < 0, -1.0, 1.0)
    if applied == "premultiplied":
        return ctf / torch.clamp(ctf.square(), min=_MIN_CTF**2)
    raise ValueError(f"not something done to images: {applied!r}")


def _group_ctf(
    particles: Particles, rows: np.ndarray, group: int, grid: tuple[int, float, str], dtype: torch.dtype
) -> torch.Tensor:
    """(b, box * (box//2+1)) CTFs of particles of one optics group."""
    optics, device = particles.optics[group], grid[2]
    quadratic, constant, odd = _group_tensors(optics, *grid)
    mean = 0.5 * (particles.defocus_u_A[rows] + particles.defocus_v_A[rows])
    half = 0.5 * (particles.defocus_u_A[rows] - particles.defocus_v_A[rows])
    along = half * np.cos(2 * particles.defocus_angle_rad[rows])
    across = half * np.sin(2 * particles.defocus_angle_rad[rows])
    coefficients = -pi * wavelength_A(optics.voltage_kV) * np.stack([mean + along, mean - along, 2 * across], 1)
    phase_shift = particles.phase_shift_rad[rows][:, None]
    turns = torch.addmm(constant[None], to_device(coefficients / (2 * pi), device), quadratic)
    if phase_shift.any():
        turns -= to_device(phase_shift / (2 * pi), device)
    turns -= turns.round()
    ctf = turns.to(torch.float32).mul_(-2 * pi).sin_()
    scale, bfactor = particles.ctf_scale[rows][:, None], particles.ctf_bfactor_A2[rows][:, None]
    if (scale != 1).any():
        ctf *= to_device(scale.astype(np.float32), device)
    if bfactor.any():
        square = (quadratic[0] + quadratic[1]).to(torch.float32)
        ctf *= torch.exp(to_device((-bfactor / 4).astype(np.float32), device) * square)
    if dtype == torch.complex64:
        ctf = ctf * odd if odd is not None else ctf.to(dtype)
    return ctf


@lru_cache(maxsize=64)
def _group_tensors(
    optics: OpticsGroup, box: int, pixel_size_A: float, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What the particles of a group share, over the flattened half plane.

    Returns
    -------
    quadratic
        (3, p) float64 (kx^2, ky^2, kx ky).
    constant
        (p,) float64 phases, in turns, without defocus and phase shift.
    odd
        (p,) complex64 phase factor or None.
    """
    kx, ky = physical_frequencies(optics, box, pixel_size_A)
    square = kx**2 + ky**2
    wavelength, cs_A = wavelength_A(optics.voltage_kV), 1e7 * optics.spherical_aberration_mm
    constant = pi / 2 * cs_A * wavelength**3 * square**2 - np.arcsin(optics.amplitude_contrast)
    for index, value in enumerate(optics.even_zernike):
        if value:
            constant = constant + value * zernike(*even_zernike_index(index), kx, ky)
    odd = np.zeros_like(square)
    for index, value in enumerate(optics.odd_zernike):
        if value:
            odd = odd + value * zernike(*odd_zernike_index(index), kx, ky)
    tilt_x, tilt_y = 1e-3 * np.asarray(optics.beam_tilt_mrad)
    odd = odd - 2 * pi * cs_A * wavelength**2 * square * (tilt_x * kx + tilt_y * ky)
    return (
        torch.as_tensor(np.stack([kx**2, ky**2, kx * ky]), device=device),
        torch.as_tensor(constant / (2 * pi), device=device),
        torch.as_tensor(np.exp(1j * odd).astype(np.complex64), device=device) if odd.any() else None,
    )


def physical_frequencies(optics: OpticsGroup, box: int, pixel_size_A: float) -> tuple[np.ndarray, np.ndarray]:
    """kx, ky in 1/A of the flattened (box, box//2+1) half plane, after the magnification matrix; float64."""
    ky, kx = np.meshgrid(np.fft.fftfreq(box), np.arange(box // 2 + 1) / box, indexing="ij")
    flat = np.stack([kx.ravel(), ky.ravel()]) / pixel_size_A
    mapped = np.asarray(optics.magnification_matrix) @ flat
    return mapped[0], mapped[1]


def odd_zernike_index(index: int) -> tuple[int, int]:
    """(m, n) of RELION's odd order: Z1^-1, Z1^1, Z3^-3, Z3^-1, Z3^1, Z3^3, Z5^-5, ..."""
    n = 1
    while index > n:
        index -= n + 1
        n += 2
    return 2 * index - n, n


def even_zernike_index(index: int) -> tuple[int, int]:
    """(m, n) of RELION's even order: Z0^0, Z2^-2, Z2^0, Z2^2, Z4^-4, ..."""
    n = 0
    while index > n:
        index -= n + 1
        n += 2
    return 2 * index - n, n


def zernike(m: int, n: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Zernike polynomial Z_n^m at (x, y), not normalised: cos(m theta) for m >= 0, sin(|m| theta) below."""
    order = abs(m)
    square = x**2 + y**2
    radial = np.zeros_like(square)
    for k in range((n - order) // 2 + 1):
        weight = (-1) ** k * factorial(n - k)
        weight //= factorial(k) * factorial((n + order) // 2 - k) * factorial((n - order) // 2 - k)
        radial = radial + weight * square ** ((n - order) // 2 - k)  # the remaining rho^order is in the angular part
    angular = (x + 1j * y) ** order
    return radial * (angular.real if m >= 0 else angular.imag)
