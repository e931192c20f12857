"""The settings of ``simulate:``."""

# ruff: noqa: RUF009 (see ``settings.py``)

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flexlib.workflow_support.setting import Auto, setting


@dataclass(frozen=True)
class SimulateSettings:
    """``simulate:`` (demo and tests only)."""

    phantom: str = setting("antibody", "Which moving phantom.")
    num_particles: int = setting(1000, "Number of particles.", minimum=20)
    box: int = setting(64, "Box in pixels.", minimum=16, multipleOf=2)
    pixel_size_A: float = setting(4.0, "Pixel size, Angstrom.", exclusiveMinimum=0)
    snr: float = setting(0.08, "Signal's variance over the noise's, per pixel.", exclusiveMinimum=0)
    seed: int = setting(0, "Seed of the random numbers.")
    poses: Literal["perturbed", "consensus"] = setting(
        "perturbed",
        "Which poses are written, perturbed (the true ones with the random errors below, none by default) or consensus "
        "(those then aligned to the rigid half-maps, as a consensus refinement leaves them).",
    )
    pose_error_deg: float = setting(0.0, "Random error of the written rotations, rms angle, degrees.", minimum=0)
    shift_error_A: float = setting(0.0, "Random error of the written shifts, rms along each axis, Angstrom.", minimum=0)
    contrast_sd: float = setting(
        0.0,
        "Spread of the particles' contrast, standard deviation of its logarithm; its mean is 1, and no file but the "
        "truth tells it.",
        minimum=0,
    )
    junk_fraction: float = setting(
        0.0,
        "Share of the images that are junk. Half of them show noise alone, in the other half a particle is written "
        "with the pose of another.",
        minimum=0,
        exclusiveMaximum=1,
    )
    missing_part_fraction: float = setting(
        0.0, "Share of the particles that lack a part of the phantom.", minimum=0, maximum=1
    )
    missing_part: int | Auto = setting(
        "auto",
        "Which part, the number of a chain of the phantom, or auto (the domain that lies farthest out).",
        minimum=0,
    )
