"""The particles that are simulated: their poses, defoci and hinge angles, and what of them no noise has touched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from scipy import fft
from scipy.spatial.transform import Rotation

from flexlib.simulate.phantoms import Phantom
from flexlib.simulate.settings import Simulation
from flexlib.simulate.signal import atoms_to_map, project_atoms, simulated_ctf

BATCH = 64  # particles computed at a time


@dataclass(frozen=True)
class Metadata:
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
    half_set = np.arange(count) % 2
    generator.shuffle(half_set)
    return Metadata(
        euler_deg=euler.round(5),
        origin_A=generator.normal(0, settings.shift_sd_A, (count, 2)).round(5),
        defocus_u_A=(mean_defocus + astigmatism / 2).round(2),
        defocus_v_A=(mean_defocus - astigmatism / 2).round(2),
        defocus_angle_deg=generator.uniform(0, 180, count).round(3),
        half_set=half_set.astype(np.int8),
        angles_rad=phantom.sample_angles(count, generator),
    )


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

    def ctf(self, rows: slice, box: int) -> np.ndarray:
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

    def transforms(self, rows: slice) -> np.ndarray:
        """(b, box, box//2+1) transforms, phase origin at the box centre, CTF and shift applied."""
        metadata, pixel_size_A = self.metadata, self.settings.pixel_size_A
        atoms_A = self.phantom.positions_A(metadata.angles_rad[rows])
        view_A = atoms_A @ metadata.rotation[rows, :2].transpose(0, 2, 1) - metadata.origin_A[rows, None]
        box, sigma_px = self.settings.box, self.settings.gaussian_sigma_A / pixel_size_A
        return project_atoms(view_A / pixel_size_A, self.phantom.mass, box, sigma_px) * self.ctf(rows, box)

    def images(self, rows: slice) -> np.ndarray:
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
