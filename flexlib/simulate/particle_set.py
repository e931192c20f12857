"""The particles that are simulated: poses, defoci, hinge angles, contrast, and what of them no noise has touched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from scipy import fft
from scipy.spatial.transform import Rotation

from flexlib.simulate.nuisances import NOISE, Kinds, draw_kinds, missing_part
from flexlib.simulate.phantoms import Phantom
from flexlib.simulate.settings import Simulation
from flexlib.simulate.signal import atoms_to_map, project_atoms, simulated_ctf

BATCH = 64  # particles computed at a time
_ERRORS_STREAM = 17  # beside the seed: of what is drawn apart from the images, so that it changes none of them
_POSE_DIGITS = 5  # decimals of angles in degrees and origins in Angstrom


@dataclass(frozen=True)
class Metadata:
    """Per-particle parameters, all but the last three as written to the files; n rows."""

    euler_deg: np.ndarray  # (n, 3) rot, tilt, psi
    origin_A: np.ndarray  # (n, 2)
    defocus_u_A: np.ndarray  # (n,)
    defocus_v_A: np.ndarray  # (n,)
    defocus_angle_deg: np.ndarray  # (n,)
    half_set: np.ndarray  # (n,) int8
    angles_rad: np.ndarray  # (n, d)
    contrast: np.ndarray  # (n,) factor of the signal, 0 where there is no particle
    kinds: Kinds

    @property
    def rotation(self) -> np.ndarray:
        """(n, 3, 3), view = rotation @ volume."""
        return Rotation.from_euler("ZYZ", self.euler_deg, degrees=True).as_matrix().transpose(0, 2, 1)

    def with_poses(self, rotation: np.ndarray, origin_A: np.ndarray) -> Metadata:
        """The same with other rotations (n, 3, 3) and origins (n, 2), rounded to the digits of the STAR file."""
        euler = Rotation.from_matrix(rotation.transpose(0, 2, 1)).as_euler("ZYZ", degrees=True)
        return replace(self, euler_deg=euler.round(_POSE_DIGITS), origin_A=origin_A.round(_POSE_DIGITS))


def draw_metadata(phantom: Phantom, settings: Simulation, generator: np.random.Generator) -> Metadata:
    """Random parameters of ``num_particles`` particles, rounded to the digits that the STAR file holds."""
    count, preference = settings.num_particles, settings.view_preference
    cosine = np.empty(0)
    while len(cosine) < count:  # density of views proportional to 1 + view_preference * cos(tilt)^2
        trial = generator.uniform(-1, 1, 2 * count)
        keep = generator.uniform(0, 1 + preference, 2 * count) < 1 + preference * trial**2
        cosine = np.concatenate([cosine, trial[keep]])
    rot, psi = generator.uniform(-180, 180, (2, count))
    euler = np.stack([rot, np.rad2deg(np.arccos(cosine[:count])), psi], 1)
    mean_defocus = generator.uniform(*settings.defocus_range_A, count)
    astigmatism = generator.normal(0, settings.astigmatism_sd_A, count)
    half_set, kinds = np.arange(count) % 2, draw_kinds(settings)
    generator.shuffle(half_set)
    return Metadata(
        euler_deg=euler.round(_POSE_DIGITS),
        origin_A=generator.normal(0, settings.shift_sd_A, (count, 2)).round(_POSE_DIGITS),
        defocus_u_A=(mean_defocus + astigmatism / 2).round(2),
        defocus_v_A=(mean_defocus - astigmatism / 2).round(2),
        defocus_angle_deg=generator.uniform(0, 180, count).round(3),
        half_set=half_set.astype(np.int8),
        angles_rad=phantom.sample_angles(count, generator),
        contrast=np.where(kinds.kind == NOISE, 0.0, _contrast(settings)),
        kinds=kinds,
    )


def perturbed(metadata: Metadata, settings: Simulation) -> Metadata:
    """``metadata`` as it is written: junk in another's pose, and the random errors that the settings ask for.

    Errors are independent and normal. A rotation R becomes ``exp([w]) R``; each component of w, in the frame of the
    view, has a standard deviation of ``pose_error_deg / sqrt(3)``, so that the rms angle is ``pose_error_deg``.
    """
    posed_as = metadata.kinds.posed_as
    metadata = replace(metadata, euler_deg=metadata.euler_deg[posed_as], origin_A=metadata.origin_A[posed_as])
    if settings.pose_error_deg == 0 and settings.shift_error_A == 0:
        return metadata
    error = _standard_normals(settings)
    turn = Rotation.from_rotvec(np.deg2rad(settings.pose_error_deg) / np.sqrt(3) * error[:, 1:4]).as_matrix()
    return metadata.with_poses(turn @ metadata.rotation, metadata.origin_A + settings.shift_error_A * error[:, 4:])


def _contrast(settings: Simulation) -> np.ndarray:
    """(n,) log-normal factors of mean 1; exactly 1 without a spread."""
    spread = settings.contrast_sd
    return np.exp(spread * _standard_normals(settings)[:, 0] - 0.5 * spread**2)


def _standard_normals(settings: Simulation) -> np.ndarray:
    """(n, 6) of contrast, rotation and shift: of a generator of their own, the same whichever of them are used."""
    generator = np.random.default_rng((settings.seed, _ERRORS_STREAM))
    return generator.standard_normal((settings.num_particles, 6))


@dataclass(frozen=True)
class ParticleSet:
    """Particles of a phantom as the microscope would see them without noise, in the phantom's units of density."""

    phantom: Phantom
    metadata: Metadata
    settings: Simulation

    def __len__(self) -> int:
        return len(self.metadata.half_set)

    def with_angles(self, angles_rad: np.ndarray) -> ParticleSet:
        """The same with other hinge angles (n, d)."""
        return replace(self, metadata=replace(self.metadata, angles_rad=angles_rad))

    def with_metadata(self, metadata: Metadata) -> ParticleSet:
        """The same with other parameters."""
        return replace(self, metadata=metadata)

    def complete(self) -> ParticleSet:
        """The same particles with every part, at a contrast of 1."""
        whole = replace(self.metadata.kinds, absent=np.zeros(len(self), bool))
        return self.with_metadata(replace(self.metadata, contrast=np.ones(len(self)), kinds=whole))

    def mass(self, rows: slice | np.ndarray) -> np.ndarray:
        """(b, na) of the atoms of ``rows``: 0 where the part that they belong to is missing; (na,) if all are there."""
        absent, mass = self.metadata.kinds.absent[rows], self.phantom.mass
        if not absent.any():
            return mass
        return mass * ~(absent[:, None] & missing_part(self.phantom, self.settings))

    def ctf(self, rows: slice | np.ndarray, box: int) -> np.ndarray:
        """(b, box, box//2+1) CTFs of ``rows``; the box may be a padded one at the same pixel size."""
        settings, metadata = self.settings, self.metadata
        return simulated_ctf(
            box,
            settings.pixel_size_A,
            metadata.defocus_u_A[rows],
            metadata.defocus_v_A[rows],
            np.deg2rad(metadata.defocus_angle_deg[rows]),
            settings.voltage_kV,
            settings.spherical_aberration_mm,
            settings.amplitude_contrast,
        )

    def transforms(self, rows: slice | np.ndarray) -> np.ndarray:
        """(b, box, box//2+1) transforms, phase origin at the box centre; CTF, shift and contrast applied."""
        metadata, pixel_size_A = self.metadata, self.settings.pixel_size_A
        atoms_A = self.phantom.positions_A(metadata.angles_rad[rows])
        view_A = atoms_A @ metadata.rotation[rows, :2].transpose(0, 2, 1) - metadata.origin_A[rows, None]
        box, sigma_px = self.settings.box, self.settings.gaussian_sigma_A / pixel_size_A
        strength = metadata.contrast[rows, None, None].astype(np.float32) * self.ctf(rows, box)
        return project_atoms(view_A / pixel_size_A, self.mass(rows), box, sigma_px) * strength

    def images(self, rows: slice | np.ndarray) -> np.ndarray:
        """(b, box, box) float32 images."""
        box = self.settings.box
        return fft.fftshift(fft.irfft2(self.transforms(rows), s=(box, box)), axes=(1, 2)).astype(np.float32)

    def map_at(self, angles_rad: np.ndarray) -> np.ndarray:
        """(box, box, box) float32 exact map at hinge angles (d,)."""
        pixel_size_A = self.settings.pixel_size_A
        atoms_px = self.phantom.positions_A(angles_rad)[0] / pixel_size_A
        return atoms_to_map(
            atoms_px, self.phantom.mass, self.settings.box, self.settings.gaussian_sigma_A / pixel_size_A
        )


def batches(count: int) -> Iterator[slice]:
    """Consecutive rows, ``BATCH`` at a time."""
    for first in range(0, count, BATCH):
        yield slice(first, min(count, first + BATCH))
