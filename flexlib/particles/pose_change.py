"""How poses and contrasts of particles differ from those that the input gives."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.spatial.transform import Rotation

from flexlib.particles.table import Particles


@dataclass(frozen=True)
class PoseChange:
    """A small rotation, a shift and a contrast of each of n particles, in the frame of its own view.

    With the input's rotation R and origin o a voxel at x is seen at ``(R x)_xy - o``; with the change it is seen at
    ``(exp([rotation_rad]) R x)_xy - o + shift_A``, and its image is ``contrast`` times as strong. The third component
    of the rotation is in the plane of the image.
    """

    rotation_rad: np.ndarray  # (n, 3) rotation vector about the view's x, y, z
    shift_A: np.ndarray  # (n, 2)
    contrast: np.ndarray  # (n,) factor

    @classmethod
    def none(cls, num: int) -> PoseChange:
        """Of ``num`` particles that stay as they are."""
        zeros = np.zeros((num, 5), np.float32)
        return cls(zeros[:, :3], zeros[:, 3:], np.ones(num, np.float32))

    def __len__(self) -> int:
        return len(self.contrast)

    def of(self, particles: Particles) -> Particles:
        """``particles`` with poses and per-particle scale changed."""
        turn = Rotation.from_rotvec(self.rotation_rad.astype(np.float64)).as_matrix()
        scale = np.ones(len(self)) if particles.particle_scale is None else particles.particle_scale
        return replace(
            particles,
            rotation=turn @ particles.rotation,
            origin_A=particles.origin_A - self.shift_A.astype(np.float64),
            particle_scale=scale * self.contrast,
        )
