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

    def as_of_poses(self, particles: Particles, pixel_size_A: float) -> PoseChange:
        """Of poses, where this is of views that an optics group's magnification has already acted on.

        An image is predicted in pixels of nominally ``pixel_size_A``, and the view of a pose is first enlarged to them
        and distorted by the magnification matrix: R x becomes ``e M^T R x``, the origin ``e o``, with e the nominal
        pixel size over the group's own. What is fitted to images comes after that, ``exp([w]) e M^T R x``. The pose
        that does the same to first order is turned about x and y by what M^T makes into w; about z, where a distorted
        image cannot be turned by a pose alone, by the nearest in the least-squares sense. The shift is divided by e.

        Parameters
        ----------
        particles
            The n particles, with the optics groups of the images that the change was fitted to.
        pixel_size_A
            Nominal, of these images.
        """
        matrices = np.array([group.magnification_matrix for group in particles.optics], np.float64).transpose(0, 2, 1)
        in_plane = 2 * np.linalg.det(matrices) / (matrices**2).sum((1, 2))
        index = particles.optics_index
        x, y, z = self.rotation_rad.astype(np.float64).T
        # near the image a tilt (x, y) moves points at height h by h (y, -x)
        along = np.linalg.solve(matrices[index], np.stack([y, -x], 1)[:, :, None])[:, :, 0]
        rotation_rad = np.stack([-along[:, 1], along[:, 0], in_plane[index] * z], 1)
        return replace(
            self,
            rotation_rad=rotation_rad,
            shift_A=self.shift_A.astype(np.float64) * own_length(particles, pixel_size_A)[:, None],
        )

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


def own_length(particles: Particles, pixel_size_A: float) -> np.ndarray:
    """(n,) how long in a particle's own Angstrom, by its optics group, is what its image has as one Angstrom.

    ``pixel_size_A`` is the nominal pixel size of images whose optics groups are those of ``particles``.
    """
    own_A = np.array([group.pixel_size_A for group in particles.optics])
    return (own_A / pixel_size_A)[particles.optics_index]
