"""The particle set as the rest of flexlib sees it, whatever file it came from.

Conventions (docs/conventions.md): rotation maps volume to view coordinates, ``view = rotation @ (x, y, z)``;
a projection of the volume is moved by ``-origin`` to lie on the image (RELION's sign);
angles are radians, lengths Angstrom; white density is positive once ``contrast_sign`` is applied.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class OpticsGroup:
    """What a group of particles shares: microscope and sampling.

    ``odd_zernike``/``even_zernike`` follow RELION's order and units (rad A^n); ``magnification_matrix`` is RELION's
    (2, 2) MagMat; ``beam_tilt_mrad`` is (x, y). Source: RELION ``metadata_label.h``, ``obs_model.cpp``.
    """

    name: str
    voltage_kV: float
    spherical_aberration_mm: float
    amplitude_contrast: float
    pixel_size_A: float
    box: int
    beam_tilt_mrad: tuple[float, float] = (0.0, 0.0)
    odd_zernike: tuple[float, ...] = ()
    even_zernike: tuple[float, ...] = ()
    magnification_matrix: tuple[tuple[float, float], tuple[float, float]] = ((1.0, 0.0), (0.0, 1.0))


@dataclass(frozen=True)
class Particles:
    """n particles with poses, CTF parameters, half-sets and where their images lie.

    All arrays have n rows in the order of the input file.
    """

    optics: tuple[OpticsGroup, ...]
    optics_index: np.ndarray  # (n,) int32, into optics
    rotation: np.ndarray  # (n, 3, 3) float64, view = rotation @ volume
    origin_A: np.ndarray  # (n, 2) float64, RELION's rlnOriginX/YAngst
    defocus_u_A: np.ndarray  # (n,) float64, underfocus positive
    defocus_v_A: np.ndarray  # (n,) float64
    defocus_angle_rad: np.ndarray  # (n,) float64, x axis to U
    phase_shift_rad: np.ndarray  # (n,) float64
    ctf_bfactor_A2: np.ndarray  # (n,) float64, envelope exp(-B k^2 / 4)
    ctf_scale: np.ndarray  # (n,) float64
    half_set: np.ndarray  # (n,) int8, 0 or 1; -1 where the input has none
    contrast_sign: np.ndarray  # (n,) float64, multiply an image by it and density is white
    stack_paths: tuple[Path, ...]
    stack_index: np.ndarray  # (n,) int32, into stack_paths
    image_index: np.ndarray  # (n,) int64, 0-based slice of the stack
    source_path: Path  # the .star or .cs file
    source_row: np.ndarray  # (n,) int64, row in source_path
    uid: np.ndarray | None = None  # (n,) uint64, CryoSPARC only
    extra: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.optics_index)

    def subset(self, rows: np.ndarray) -> Particles:
        """The particles at ``rows`` ((m,) int or (n,) bool), in that order; shared fields are kept whole."""
        per_row = {
            name: getattr(self, name)[rows]
            for name in (
                "optics_index",
                "rotation",
                "origin_A",
                "defocus_u_A",
                "defocus_v_A",
                "defocus_angle_rad",
                "phase_shift_rad",
                "ctf_bfactor_A2",
                "ctf_scale",
                "half_set",
                "contrast_sign",
                "stack_index",
                "image_index",
                "source_row",
            )
        }
        return replace(self, **per_row, uid=None if self.uid is None else self.uid[rows])
