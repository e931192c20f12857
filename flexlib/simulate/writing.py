"""What simulate writes as a user would have it: noisy images, and their metadata for RELION and CryoSPARC."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from scipy import fft
from scipy.spatial.transform import Rotation

from flexlib.files import atomic_path
from flexlib.images.stack import ImageStackWriter
from flexlib.particles.star_write import write_star
from flexlib.simulate.particle_set import ParticleSet, batches
from flexlib.simulate.signal import noise_amplitude

_PARTICLES_PER_MICROGRAPH = 100


def write_images(path: Path, particles: ParticleSet, density_scale: float, generator: np.random.Generator) -> None:
    """Stream the noisy images to ``path``.

    Parameters
    ----------
    path
        An MRC stack.
    particles
        Without noise.
    density_scale
        By which they are multiplied, so that the noise has unit variance.
    generator
        Of the noise.
    """
    settings, count = particles.settings, len(particles)
    box = settings.box
    amplitude = noise_amplitude(box, settings.noise_power_law)
    with (
        atomic_path(path) as temporary,
        ImageStackWriter(temporary, count, box, settings.pixel_size_A) as stack,
    ):
        for rows in batches(count):
            images = density_scale * particles.images(rows)
            noise = generator.standard_normal(images.shape, dtype=np.float32)
            if settings.noise_power_law:
                noise = fft.irfft2(fft.rfft2(noise) * amplitude, s=(box, box))
            images += noise
            stack.append(images)


def write_metadata_star(path: Path, stack_name: str, particles: ParticleSet) -> None:
    """Write a RELION 3.1 STAR file with an optics table."""
    settings, metadata, count = particles.settings, particles.metadata, len(particles)
    optics_table = pd.DataFrame(
        {
            "rlnOpticsGroup": [1],
            "rlnOpticsGroupName": ["opticsGroup1"],
            "rlnAmplitudeContrast": [settings.amplitude_contrast],
            "rlnSphericalAberration": [settings.spherical_aberration_mm],
            "rlnVoltage": [settings.voltage_kV],
            "rlnImagePixelSize": [settings.pixel_size_A],
            "rlnImageSize": [settings.box],
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


def write_metadata_cs(path: Path, stack_name: str, particles: ParticleSet, uid: np.ndarray) -> None:
    """Write a CryoSPARC .cs file of the same particles: transposed rotations, shifts in pixels, ``uid`` (n,)."""
    settings, metadata, count = particles.settings, particles.metadata, len(particles)
    columns: dict[str, tuple[str, object]] = {
        "uid": ("<u8", uid),
        "blob/path": (f"S{len(stack_name)}", stack_name.encode()),
        "blob/idx": ("<u4", np.arange(count)),
        "blob/shape": ("(2,)<u4", settings.box),
        "blob/psize_A": ("<f4", settings.pixel_size_A),
        "blob/sign": ("<f4", 1.0),
        "ctf/accel_kv": ("<f4", settings.voltage_kV),
        "ctf/cs_mm": ("<f4", settings.spherical_aberration_mm),
        "ctf/amp_contrast": ("<f4", settings.amplitude_contrast),
        "ctf/df1_A": ("<f4", metadata.defocus_u_A),
        "ctf/df2_A": ("<f4", metadata.defocus_v_A),
        "ctf/df_angle_rad": ("<f4", np.deg2rad(metadata.defocus_angle_deg)),
        "ctf/phase_shift_rad": ("<f4", 0.0),
        "ctf/exp_group_id": ("<u4", 0),
        "alignments3D/split": ("<u4", metadata.half_set),
        "alignments3D/shift": ("(2,)<f4", metadata.origin_A / settings.pixel_size_A),
        "alignments3D/pose": ("(3,)<f4", Rotation.from_matrix(metadata.rotation.transpose(0, 2, 1)).as_rotvec()),
        "alignments3D/psize_A": ("<f4", settings.pixel_size_A),
        "alignments3D/alpha": ("<f4", 1.0),
    }
    table = np.zeros(count, dtype=[(name, kind) for name, (kind, _) in columns.items()])
    for name, (_, value) in columns.items():
        table[name] = value
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, table)
