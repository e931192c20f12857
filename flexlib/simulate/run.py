"""Simulate a flexible particle set with known truth: phantom -> exact projections -> CTF -> noise -> files.

Signal is the Fourier transform of the pseudo-atoms evaluated at the Fourier pixels themselves, without any grid in
between; it and the truth maps are zero at and beyond ``|k| = N/2``. The CTF is written out here on purpose instead of
shared with ``images/ctf.py``: an error in one of the two shows as a disagreement, and would cancel if they were one.

    python -m flexlib.simulate --phantom antibody --num-particles 2000 --out simulated/
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pandas as pd
import torch
from scipy import fft
from scipy.spatial.transform import Rotation

from flexlib.errors import InputError
from flexlib.files import atomic_path
from flexlib.imaging.maps import write_map
from flexlib.particles.star_write import write_star
from flexlib.simulate.backprojection import Backprojector, consensus_map, padded_box
from flexlib.simulate.phantoms import PHANTOMS, Phantom, make_phantom

_GAUSSIAN_SIGMA_A = 1.6  # of a pseudo-atom: a B-factor of 200 A^2
_BATCH = 64
_SCALE_PARTICLES = 256  # particles whose signal variance sets the density scale
_MEAN_STATES = 48  # quantiles of each hinge angle that stand for the whole set in the mean map
_PARTICLES_PER_MICROGRAPH = 100
_LIMIT_PARTICLES = 512  # whose information on the hinge angles is averaged
_LIMIT_STEP_RAD = 0.01
_LIMIT_ANGLES = 61  # of the exact posterior's grid
_NOISE_CORNER = 0.05  # cycles/pixel below which coloured noise is flat


@dataclass(frozen=True)
class SimulationTruth:
    """What was simulated and where it was written."""

    particles_star: Path
    particles_cs: Path
    stack: Path
    consensus: Path
    truth_npz: Path
    truth_mean: Path
    truth_states: tuple[Path, ...]
    angles_rad: np.ndarray  # (n, d) hinge angles of the particles
    half_set: np.ndarray  # (n,) int8, 0 or 1
    states_rad: np.ndarray  # (s, d) hinge angles of truth_states
    density_scale: float  # maps are the phantom's density times this, so that the images' noise variance is 1


@dataclass(frozen=True)
class _Metadata:
    """Per-particle parameters as written to the files; n rows."""

    euler_deg: np.ndarray  # (n, 3) rot, tilt, psi
    origin_A: np.ndarray  # (n, 2)
    defocus_u_A: np.ndarray  # (n,)
    defocus_v_A: np.ndarray  # (n,)
    defocus_angle_deg: np.ndarray  # (n,)
    half_set: np.ndarray  # (n,) int8
    angles_rad: np.ndarray  # (n, d)

    @property
    def rotation(self) -> np.ndarray:
        """(n, 3, 3), view = rotation @ volume."""
        return Rotation.from_euler("ZYZ", self.euler_deg, degrees=True).as_matrix().transpose(0, 2, 1)


@dataclass(frozen=True)
class _Optics:
    """Microscope and sampling."""

    box: int
    pixel_size_A: float
    voltage_kV: float
    spherical_aberration_mm: float
    amplitude_contrast: float


# --- Exact signal ----------------------------------------------------------------------------------------------------


def _inside_nyquist(box: int) -> np.ndarray:
    """(box, box//2+1) bool, the pixels with ``|k| < N/2``."""
    return np.hypot(fft.fftfreq(box, 1.0 / box)[:, None], np.arange(box // 2 + 1)[None]) < box / 2


def _waves(position_px: np.ndarray, box: int, mass: np.ndarray | float = 1.0) -> np.ndarray:
    """mass * exp(-2 pi i k p / box) for k = 0 ... box/2 at (..., na) positions.

    Returns (2, ..., box//2+1, na) float32, real and imaginary parts; powers are taken in double precision.
    """
    first = np.exp(-2j * np.pi / box * position_px)
    wave = np.ones_like(first) * mass
    waves = np.empty((2, *position_px.shape[:-1], box // 2 + 1, position_px.shape[-1]), np.float32)
    for k in range(box // 2 + 1):
        waves[0, ..., k, :], waves[1, ..., k, :] = wave.real, wave.imag
        wave *= first
    return waves


def _matmul(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Matrix product on one thread: these are small, and BLAS threads that wait for a busy core cost tenfold."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return (torch.from_numpy(left) @ torch.from_numpy(right)).numpy()
    finally:
        torch.set_num_threads(threads)


def project_atoms(position_px: np.ndarray, mass: np.ndarray, box: int, sigma_px: float) -> np.ndarray:
    """Exact Fourier transforms of projected Gaussian pseudo-atoms.

    Parameters: ``position_px`` (b, na, 2) view positions (x, y) in pixels from the box centre; ``mass`` (na,);
    ``sigma_px`` standard deviation of each Gaussian. Returns (b, box, box//2+1) complex64
    ``sum_a mass_a exp(-2 pi^2 sigma^2 k^2 / box^2) exp(-2 pi i k . p_a / box)``, zero for ``|k| >= box/2``.
    """
    half = box // 2
    waves_x = _waves(position_px[..., 0], box, mass).swapaxes(2, 3)
    waves_y = _waves(position_px[..., 1], box)
    cos_cos, cos_sin = (_matmul(waves_y[0], part) for part in waves_x)  # y part, x part; summed over atoms
    sin_cos, sin_sin = (_matmul(waves_y[1], part) for part in waves_x)
    spectrum = np.zeros((len(position_px), box, half + 1), np.complex64)
    spectrum[:, :half] = ((cos_cos - sin_sin) + 1j * (sin_cos + cos_sin))[:, :half]
    spectrum[:, half + 1 :] = ((cos_cos + sin_sin) + 1j * (cos_sin - sin_cos))[:, half - 1 : 0 : -1]  # ky < 0
    ky, kx = fft.fftfreq(box)[:, None], fft.rfftfreq(box)[None]
    envelope = np.exp(-2 * np.pi**2 * sigma_px**2 * (ky**2 + kx**2)) * _inside_nyquist(box)
    return spectrum * envelope.astype(np.float32)


def atoms_to_map(position_px: np.ndarray, mass: np.ndarray, box: int, sigma_px: float) -> np.ndarray:
    """Exact map of Gaussian pseudo-atoms at (na, 3) positions, (x, y, z) in pixels from the box centre.

    Returns (box, box, box) float32, axes (z, y, x), centre at voxel ``box//2``, band-limited to ``|k| < box/2``;
    its sum over z has the transform that ``project_atoms`` gives.
    """
    half = box // 2
    x, y, z = (real + 1j * imaginary for real, imaginary in (_waves(p, box) for p in position_px.T))
    y, z = (np.concatenate([wave, wave[half - 1 : 0 : -1].conj()]) for wave in (y, z))
    weighted_x = (x * mass).astype(np.complex64).T
    spectrum = np.stack([_matmul(y * wave, weighted_x) for wave in z])
    k = fft.fftfreq(box) ** 2
    square = k[:, None, None] + k[None, :, None] + fft.rfftfreq(box)[None, None] ** 2
    spectrum *= np.where(square < 0.25, np.exp(-2 * np.pi**2 * sigma_px**2 * square), 0).astype(np.float32)
    return fft.fftshift(fft.irfftn(spectrum, s=(box,) * 3)).astype(np.float32)


def simulated_ctf(
    box: int,
    pixel_size_A: float,
    defocus_u_A: np.ndarray,
    defocus_v_A: np.ndarray,
    defocus_angle_rad: np.ndarray,
    voltage_kV: float = 300.0,
    spherical_aberration_mm: float = 2.7,
    amplitude_contrast: float = 0.07,
) -> np.ndarray:
    """(b, box, box//2+1) float32 contrast transfer functions in rfft2 layout, RELION's sign: CTF(0) = + contrast."""
    volts = 1e3 * voltage_kV
    wavelength_A = 12.2642598 / np.sqrt(volts * (1 + 0.978475598e-6 * volts))
    ky, kx = fft.fftfreq(box, pixel_size_A)[:, None], fft.rfftfreq(box, pixel_size_A)[None]
    square, angle = kx**2 + ky**2, np.arctan2(ky, kx)
    mean, difference = ((defocus_u_A + s * defocus_v_A)[:, None, None] / 2 for s in (1, -1))
    defocus_A = mean + difference * np.cos(2 * (angle - defocus_angle_rad[:, None, None]))
    aberration = 0.5 * np.pi * spherical_aberration_mm * 1e7 * wavelength_A**3 * square**2
    return np.sin(np.pi * wavelength_A * defocus_A * square - aberration + np.arcsin(amplitude_contrast)).astype(
        np.float32
    )


def noise_amplitude(box: int, power_law: float) -> np.ndarray:
    """(box, box//2+1) standard deviation per Fourier pixel of noise of unit variance in the image.

    Power falls as ``|k|^-power_law`` beyond 0.05 cycles/pixel; 0 is white noise.
    """
    k = np.hypot(fft.fftfreq(box)[:, None], fft.fftfreq(box)[None])
    power = (1 + (k / _NOISE_CORNER) ** 2) ** (-power_law / 2)
    return np.sqrt(power / power.mean())[:, : box // 2 + 1].astype(np.float32)


# --- Particles -------------------------------------------------------------------------------------------------------


def _draw_metadata(
    phantom: Phantom,
    count: int,
    generator: np.random.Generator,
    defocus_range_A: tuple[float, float],
    astigmatism_sd_A: float,
    shift_sd_A: float,
    view_preference: float,
) -> _Metadata:
    """Random parameters, rounded to the digits that the STAR file holds."""
    cosine = np.empty(0)
    while len(cosine) < count:  # density of views proportional to 1 + view_preference * cos(tilt)^2
        trial = generator.uniform(-1, 1, 2 * count)
        keep = generator.uniform(0, 1 + view_preference, 2 * count) < 1 + view_preference * trial**2
        cosine = np.concatenate([cosine, trial[keep]])
    rot, psi = generator.uniform(-180, 180, (2, count))
    euler = np.stack([rot, np.rad2deg(np.arccos(cosine[:count])), psi], 1)
    mean_defocus = generator.uniform(*defocus_range_A, count)
    astigmatism = generator.normal(0, astigmatism_sd_A, count)
    half_set = np.arange(count) % 2
    generator.shuffle(half_set)
    return _Metadata(
        euler.round(5),
        generator.normal(0, shift_sd_A, (count, 2)).round(5),
        (mean_defocus + astigmatism / 2).round(2),
        (mean_defocus - astigmatism / 2).round(2),
        generator.uniform(0, 180, count).round(3),
        half_set.astype(np.int8),
        phantom.sample_angles(count, generator),
    )


def _ctf(metadata: _Metadata, rows: slice, optics: _Optics, box: int) -> np.ndarray:
    """CTFs of ``rows`` at ``box``, which may be a padded one at the same pixel size."""
    return simulated_ctf(
        box,
        optics.pixel_size_A,
        metadata.defocus_u_A[rows],
        metadata.defocus_v_A[rows],
        np.deg2rad(metadata.defocus_angle_deg[rows]),
        optics.voltage_kV,
        optics.spherical_aberration_mm,
        optics.amplitude_contrast,
    )


def _clean_transforms(
    phantom: Phantom, metadata: _Metadata, rows: slice, optics: _Optics, sigma_A: float
) -> np.ndarray:
    """(b, box, box//2+1) noise-free transforms, phase origin at the box centre, CTF and shift applied."""
    atoms_A = phantom.positions_A(metadata.angles_rad[rows])
    view_A = atoms_A @ metadata.rotation[rows, :2].transpose(0, 2, 1) - metadata.origin_A[rows, None]
    pixel_size_A = optics.pixel_size_A
    spectrum = project_atoms(view_A / pixel_size_A, phantom.mass, optics.box, sigma_A / pixel_size_A)
    return spectrum * _ctf(metadata, rows, optics, optics.box)


def information_limit_r2(
    phantom: Phantom, metadata: _Metadata, optics: _Optics, sigma_A: float, density_scale: float
) -> np.ndarray:
    """(d,) R^2 with which the hinge angles can be told from single images at best, given map, motion and white noise.

    The Cramer-Rao bound: the information of an image on the angles is the squared change of its exact transform per
    radian, over the unit variance of the noise; a hinge angle's variance is at least the inverse's diagonal. A prior
    on the angles is not used. Where the signal is weak, noise makes far angles likely too, and no estimate comes near
    this bound: ``posterior_limit_r2`` is then the limit.
    """
    spread = metadata.angles_rad.var(axis=0)
    box, dims = optics.box, metadata.angles_rad.shape[1]
    weight = np.where(np.arange(box // 2 + 1) == 0, 1.0, 2.0) / box**2  # the full plane, orthonormal
    bounds = []
    for rows in _batches(min(len(metadata.angles_rad), _LIMIT_PARTICLES)):
        slopes = []
        for axis in range(dims):
            ends = []
            for sign in (0.5, -0.5):
                moved = metadata.angles_rad.copy()
                moved[:, axis] += sign * _LIMIT_STEP_RAD
                turned = replace(metadata, angles_rad=moved)
                ends.append(_clean_transforms(phantom, turned, rows, optics, sigma_A))
            slopes.append(density_scale * (ends[0] - ends[1]) / _LIMIT_STEP_RAD)
        slope = np.stack(slopes, 1)
        information = np.einsum("bikx,bjkx,x->bij", slope, slope.conj(), weight).real
        bounds.append(np.linalg.inv(information).diagonal(axis1=1, axis2=2))
    return 1.0 - np.concatenate(bounds).mean(axis=0) / spread


def posterior_limit_r2(
    phantom: Phantom, metadata: _Metadata, optics: _Optics, sigma_A: float, density_scale: float, stack: Path
) -> float:
    """R^2 of the best estimate there is of a single hinge's angle from an image, map and motion known.

    The posterior mean, from the exact likelihood of the noisy images of ``stack`` on a grid of angles. No estimate has
    a smaller squared error on average.
    """
    (hinge,) = phantom.hinges
    count, box = min(len(metadata.angles_rad), _LIMIT_PARTICLES), optics.box
    angles = (hinge.range_rad + 4.0 * hinge.state_sd_rad) * np.linspace(-1.0, 1.0, _LIMIT_ANGLES)
    weight = np.where(np.arange(box // 2 + 1) == 0, 1.0, 2.0) / box**2
    log_posterior = np.tile(hinge.log_prior(angles), (count, 1))
    with mrcfile.mmap(stack) as file:
        for rows in _batches(count):
            images = fft.rfft2(fft.ifftshift(np.asarray(file.data[rows], np.float64), axes=(1, 2)))
            for number, angle in enumerate(angles):
                turned = replace(metadata, angles_rad=np.full_like(metadata.angles_rad, angle))
                clean = density_scale * _clean_transforms(phantom, turned, rows, optics, sigma_A)
                log_posterior[rows, number] -= 0.5 * (np.abs(images - clean) ** 2 * weight).sum((1, 2))
    posterior = np.exp(log_posterior - log_posterior.max(1, keepdims=True))
    mean = posterior @ angles / posterior.sum(1)
    truth = metadata.angles_rad[:count, 0]
    return float(1.0 - ((mean - truth) ** 2).mean() / truth.var())


def _batches(count: int) -> Iterator[slice]:
    for first in range(0, count, _BATCH):
        yield slice(first, min(count, first + _BATCH))


def _to_images(spectrum: np.ndarray) -> np.ndarray:
    """(b, N, N//2+1) transforms with phase origin at the centre -> (b, N, N) float32 images."""
    box = spectrum.shape[1]
    return fft.fftshift(fft.irfft2(spectrum, s=(box, box)), axes=(1, 2)).astype(np.float32)


def _write_images(
    path: Path,
    phantom: Phantom,
    metadata: _Metadata,
    optics: _Optics,
    sigma_A: float,
    density_scale: float,
    noise_power_law: float,
    generator: np.random.Generator,
) -> tuple[Backprojector, Backprojector]:
    """Stream the noisy images to ``path`` and into one back-projection per half-set."""
    count, box = len(metadata.half_set), optics.box
    amplitude = noise_amplitude(box, noise_power_law)
    rotation = metadata.rotation
    halves = (Backprojector(box), Backprojector(box))
    with (
        atomic_path(path) as temporary,
        mrcfile.new_mmap(temporary, (count, box, box), mrc_mode=2, overwrite=True) as file,
    ):
        file.set_image_stack()
        file.voxel_size = optics.pixel_size_A
        for rows in _batches(count):
            images = density_scale * _to_images(_clean_transforms(phantom, metadata, rows, optics, sigma_A))
            noise = generator.standard_normal(images.shape, dtype=np.float32)
            if noise_power_law:
                noise = fft.irfft2(fft.rfft2(noise) * amplitude, s=(box, box))
            images += noise
            file.data[rows] = images
            ctf = _ctf(metadata, rows, optics, padded_box(box))
            for half, sums in enumerate(halves):
                chosen = metadata.half_set[rows] == half
                origin_px = metadata.origin_A[rows][chosen] / optics.pixel_size_A
                sums.add(images[chosen], ctf[chosen], rotation[rows][chosen], origin_px)
    return halves


def _write_star(path: Path, stack_name: str, metadata: _Metadata, optics: _Optics) -> None:
    """RELION 3.1 STAR file with an optics table."""
    count = len(metadata.half_set)
    optics_table = pd.DataFrame(
        {
            "rlnOpticsGroup": [1],
            "rlnOpticsGroupName": ["opticsGroup1"],
            "rlnAmplitudeContrast": [optics.amplitude_contrast],
            "rlnSphericalAberration": [optics.spherical_aberration_mm],
            "rlnVoltage": [optics.voltage_kV],
            "rlnImagePixelSize": [optics.pixel_size_A],
            "rlnImageSize": [optics.box],
            "rlnImageDimensionality": [2],
        }
    )
    columns: dict[str, object] = {
        "rlnImageName": [f"{number + 1:06d}@{stack_name}" for number in range(count)],
        "rlnMicrographName": [f"mic{number // _PARTICLES_PER_MICROGRAPH:05d}.mrc" for number in range(count)],
    }
    for axis, name in enumerate(("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")):
        columns[name] = metadata.euler_deg[:, axis]
    for axis, name in enumerate(("rlnOriginXAngst", "rlnOriginYAngst")):
        columns[name] = metadata.origin_A[:, axis]
    columns |= {
        "rlnDefocusU": metadata.defocus_u_A,
        "rlnDefocusV": metadata.defocus_v_A,
        "rlnDefocusAngle": metadata.defocus_angle_deg,
        "rlnPhaseShift": np.zeros(count),
        "rlnRandomSubset": metadata.half_set.astype(int) + 1,
        "rlnOpticsGroup": np.ones(count, int),
    }
    write_star({"optics": optics_table, "particles": pd.DataFrame(columns)}, path)


def _write_cs(
    path: Path, stack_name: str, metadata: _Metadata, optics: _Optics, generator: np.random.Generator
) -> None:
    """CryoSPARC .cs file of the same particles: rotation is that of the transposed pose, shifts are in pixels."""
    count = len(metadata.half_set)
    columns: dict[str, tuple[str, object]] = {
        "uid": ("<u8", generator.integers(1, 2**63, count)),
        "blob/path": (f"S{len(stack_name)}", stack_name.encode()),
        "blob/idx": ("<u4", np.arange(count)),
        "blob/shape": ("(2,)<u4", optics.box),
        "blob/psize_A": ("<f4", optics.pixel_size_A),
        "blob/sign": ("<f4", 1.0),
        "ctf/accel_kv": ("<f4", optics.voltage_kV),
        "ctf/cs_mm": ("<f4", optics.spherical_aberration_mm),
        "ctf/amp_contrast": ("<f4", optics.amplitude_contrast),
        "ctf/df1_A": ("<f4", metadata.defocus_u_A),
        "ctf/df2_A": ("<f4", metadata.defocus_v_A),
        "ctf/df_angle_rad": ("<f4", np.deg2rad(metadata.defocus_angle_deg)),
        "ctf/phase_shift_rad": ("<f4", 0.0),
        "ctf/exp_group_id": ("<u4", 0),
        "alignments3D/split": ("<u4", metadata.half_set),
        "alignments3D/shift": ("(2,)<f4", metadata.origin_A / optics.pixel_size_A),
        "alignments3D/pose": ("(3,)<f4", Rotation.from_matrix(metadata.rotation.transpose(0, 2, 1)).as_rotvec()),
        "alignments3D/psize_A": ("<f4", optics.pixel_size_A),
        "alignments3D/alpha": ("<f4", 1.0),
    }
    table = np.zeros(count, dtype=[(name, kind) for name, (kind, _) in columns.items()])
    for name, (_, value) in columns.items():
        table[name] = value
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, table)


def _mean_states(angles_rad: np.ndarray) -> np.ndarray:
    """(s, d) states whose maps average to the mean over all particles.

    Density is a sum over atoms and each follows one hinge, so only the distribution of each angle matters.
    """
    ticks = (np.arange(_MEAN_STATES) + 0.5) / _MEAN_STATES
    return np.quantile(angles_rad, ticks, axis=0) if angles_rad.shape[1] else angles_rad[:1]


def simulate_particles(
    out_dir: str | os.PathLike[str],
    *,
    phantom: str | Phantom = "antibody",
    num_particles: int = 1000,
    box: int = 64,
    pixel_size_A: float = 4.0,
    snr: float = 0.08,
    seed: int = 0,
    defocus_range_A: tuple[float, float] = (8000.0, 25000.0),
    astigmatism_sd_A: float = 300.0,
    voltage_kV: float = 300.0,
    spherical_aberration_mm: float = 2.7,
    amplitude_contrast: float = 0.07,
    shift_sd_A: float = 4.0,
    view_preference: float = 0.0,
    noise_power_law: float = 0.0,
    gaussian_sigma_A: float = _GAUSSIAN_SIGMA_A,
    exact_limit: bool = False,
) -> SimulationTruth:
    """Simulate a particle set and write it as a user would have it after a rigid refinement, with the truth beside it.

    Parameters
    ----------
    phantom : name in ``flexlib.simulate.phantoms.PHANTOMS``, or a ``Phantom``.
    snr : variance of the CTF-modulated signal over that of the noise, over the whole box. Noise has unit variance.
    defocus_range_A : the mean defocus is uniform in this range, underfocus positive.
    shift_sd_A : standard deviation of the origins along x and y.
    view_preference : views are distributed as ``1 + view_preference * cos(tilt)^2``; 0 is uniform.
    noise_power_law : noise power falls as ``|k|^-noise_power_law``; 0 is white.
    exact_limit : also tell how well the angle can be told at best (one hinge and white noise only; half a minute).

    Writes ``particles.star`` (RELION 3.1), ``particles.cs`` (CryoSPARC), ``particles.mrcs`` (float32, contrast white),
    ``consensus.mrc`` (a rigid reconstruction of the noisy images), ``truth_mean.mrc``, ``truth_state_*.mrc`` (exact,
    in the density units of a reconstruction from the images) and ``truth.npz`` (angles_rad (n, d), half (n,) 1 or 2,
    states_rad (s, d), noise_sd, density_scale, for white noise information_limit_r2 (d,), and with ``exact_limit``
    posterior_limit_r2). The same arguments give the same files, whatever the thread count up to rounding. Raises
    ``InputError`` for settings out of range or a phantom larger than the box.
    """
    model = make_phantom(phantom) if isinstance(phantom, str) else phantom
    if num_particles < 2 or box < 16 or box % 2 or snr <= 0 or pixel_size_A <= 0:
        raise InputError(
            "simulate: at least 2 particles, an even box of at least 16, a positive snr and pixel size are needed, "
            f"not num_particles={num_particles}, box={box}, snr={snr}, pixel_size_A={pixel_size_A}"
        )
    if exact_limit and (len(model.hinges) != 1 or noise_power_law != 0):
        raise InputError("simulate: exact_limit needs a phantom of one hinge and white noise")
    states_rad = model.states_rad()
    radius_A = max(np.linalg.norm(atoms, axis=1).max() for atoms in model.positions_A(states_rad))
    if radius_A > 0.5 * box * pixel_size_A:
        raise InputError(f"simulate: phantom {model.name} has radius {radius_A:.0f} A and does not fit the box")
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    optics = _Optics(box, pixel_size_A, voltage_kV, spherical_aberration_mm, amplitude_contrast)
    generator = np.random.default_rng(seed)
    metadata = _draw_metadata(
        model, num_particles, generator, defocus_range_A, astigmatism_sd_A, shift_sd_A, view_preference
    )
    scale_rows = min(num_particles, _SCALE_PARTICLES)
    variance = sum(
        float(_to_images(_clean_transforms(model, metadata, rows, optics, gaussian_sigma_A)).var(axis=(1, 2)).sum())
        for rows in _batches(scale_rows)
    )
    density_scale = float(np.sqrt(snr * scale_rows / variance))

    stack = folder / "particles.mrcs"
    _write_star(folder / "particles.star", stack.name, metadata, optics)
    _write_cs(folder / "particles.cs", stack.name, metadata, optics, generator)
    halves = _write_images(stack, model, metadata, optics, gaussian_sigma_A, density_scale, noise_power_law, generator)
    write_map(folder / "consensus.mrc", consensus_map(*halves), pixel_size_A)

    def exact_map(angles_rad: np.ndarray) -> np.ndarray:
        atoms_px = model.positions_A(angles_rad)[0] / pixel_size_A
        return density_scale * atoms_to_map(atoms_px, model.mass, box, gaussian_sigma_A / pixel_size_A)

    truth_states = tuple(folder / f"truth_state_{number}.mrc" for number in range(len(states_rad)))
    for path, state in zip(truth_states, states_rad, strict=True):
        write_map(path, exact_map(state), pixel_size_A)
    mean_states = _mean_states(metadata.angles_rad)
    mean_map = np.zeros((box,) * 3)
    for state in mean_states:
        mean_map += exact_map(state) / len(mean_states)
    write_map(folder / "truth_mean.mrc", mean_map, pixel_size_A)
    flexible = bool(model.hinges) and noise_power_law == 0
    limit = information_limit_r2(model, metadata, optics, gaussian_sigma_A, density_scale) if flexible else np.zeros(0)
    known: dict[str, Any] = {
        "angles_rad": metadata.angles_rad,
        "half": metadata.half_set.astype(np.int64) + 1,
        "states_rad": states_rad,
        "noise_sd": 1.0,
        "density_scale": density_scale,
        "information_limit_r2": limit,
    }
    if exact_limit:
        known["posterior_limit_r2"] = posterior_limit_r2(
            model, metadata, optics, gaussian_sigma_A, density_scale, stack
        )
    with atomic_path(folder / "truth.npz") as temporary:
        np.savez(temporary, **known)
    return SimulationTruth(
        folder / "particles.star",
        folder / "particles.cs",
        stack,
        folder / "consensus.mrc",
        folder / "truth.npz",
        folder / "truth_mean.mrc",
        truth_states,
        metadata.angles_rad,
        metadata.half_set,
        states_rad,
        density_scale,
    )


def main() -> int:
    """Command line: ``python -m flexlib.simulate``."""
    parser = argparse.ArgumentParser(description="Simulate a flexible particle set with known truth.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--phantom", choices=list(PHANTOMS), default="antibody")
    parser.add_argument("--num-particles", type=int, default=1000)
    parser.add_argument("--box", type=int, default=64, help="pixels")
    parser.add_argument("--pixel-size", type=float, default=4.0, help="Angstrom")
    parser.add_argument("--snr", type=float, default=0.08, help="signal variance over noise variance")
    parser.add_argument("--noise-power-law", type=float, default=0.0, help="0 is white noise")
    parser.add_argument("--view-preference", type=float, default=0.0, help="0 is uniform views")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        truth = simulate_particles(
            options.out,
            phantom=options.phantom,
            num_particles=options.num_particles,
            box=options.box,
            pixel_size_A=options.pixel_size,
            snr=options.snr,
            noise_power_law=options.noise_power_law,
            view_preference=options.view_preference,
            seed=options.seed,
        )
    except InputError as error:
        raise SystemExit(str(error)) from None
    print(truth.particles_star)
    return 0
