"""The resolution of the motion: up to which stiffness of the mesh's modes two models agree on it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from flexlib.tetra.elastic import elastic_modes, stiffness_matrix, vertex_masses
from flexlib.validate.common_frame import CommonFrame

NUM_MODES = 150
MODES_A_BAND = 6  # of consecutive stiffness, whose motions are compared together
AGREED = 0.5  # correlation at which each model is as much signal as error
SAMPLED = 2000  # particles


@dataclass(frozen=True)
class ModeAgreement:
    """Bands of modes, softest first."""

    first_mode: np.ndarray  # (m,) from 1
    last_mode: np.ndarray
    length_A: np.ndarray  # (m,) wavelength of a shear wave that costs as much
    correlation: np.ndarray  # (m,) of both models' motions, over particles and the band's modes
    motion_A: np.ndarray  # (m,) rms motion in the band, by the mass of the mesh: geometric mean of both models'

    @property
    def num_agreeing(self) -> int:
        """Modes up to the band before the first one that does not agree."""
        below = np.flatnonzero(self.correlation < AGREED)
        if not len(below):
            return int(self.last_mode[-1])
        return int(self.last_mode[below[0] - 1]) if below[0] else 0

    @property
    def limit_A(self) -> float | None:
        """Wavelength of the last band that agrees; None where none does."""
        agreeing = self.last_mode <= self.num_agreeing
        return float(self.length_A[agreeing][-1]) if agreeing.any() else None


@torch.no_grad()
def mode_agreement(frame: CommonFrame, rows: np.ndarray) -> ModeAgreement:
    """Compare both models' motions of the particles at ``rows``, mode by mode.

    Each particle's displacement field, about its mean over the particles, is projected on the mesh's elastic modes.
    """
    mesh = frame.first.mesh
    _, modes = elastic_modes(mesh, NUM_MODES)
    flat = modes.reshape(len(modes), -1)
    stiffness = np.einsum("mi,mi->m", flat, (stiffness_matrix(mesh) @ flat.T).T)  # free motions cost nothing
    mass = torch.as_tensor(np.repeat(vertex_masses(mesh), 3) * flat).float()  # (m, 3 nv)
    parts: list[list[torch.Tensor]] = [[], []]
    for _, one, other in frame.pairs(rows[:: max(1, -(-len(rows) // SAMPLED))]):
        for found, fields in zip(parts, (one, other), strict=True):
            found.append(fields.flatten(1) @ mass.T)
    first, second = (torch.cat(found).double() for found in parts)
    first, second = first - first.mean(0), second - second.mean(0)
    cross, power1, power2 = ((a * b).mean(0).numpy() for a, b in ((first, second), (first, first), (second, second)))
    starts = np.arange(0, len(modes), MODES_A_BAND)
    cross, power1, power2 = (np.add.reduceat(values, starts) for values in (cross, power1, power2))
    size = np.sqrt(power1 * power2)
    last = np.append(starts[1:], len(modes))
    soft = np.sqrt(np.maximum(np.add.reduceat(stiffness, starts) / (last - starts), 1e-12))
    return ModeAgreement(
        first_mode=starts + 1,
        last_mode=last,
        length_A=2 * np.pi / soft,
        correlation=np.divide(cross, size, out=np.zeros_like(cross), where=size > 0),
        motion_A=np.sqrt(size),
    )
