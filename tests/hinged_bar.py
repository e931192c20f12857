"""A bar of density on a mesh whose pieces turn exactly as rigid bodies about known hinges: what bodies are found in."""

from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.spatial.transform import Rotation

from flexlib.mesh.lattice import bcc_mesh

BOX, PIXEL_SIZE_A = 48, 3.0
HALF_LENGTH_A = 60.0
ENDS_A = (-20.0, 22.0)  # along z, where the outer pieces begin
AXES = np.array([[0.6, 0.8, 0.0], [1.0, 0.0, 0.0]])
PIVOTS_A = np.array([[0.0, 4.0, -20.0], [5.0, 0.0, 22.0]])


def bar():
    """(BOX,)*3 float32 density of a bar along z, somewhat denser at one end."""
    z, y, x = np.meshgrid(*[(np.arange(BOX) - BOX // 2) * PIXEL_SIZE_A] * 3, indexing="ij")
    return ((np.abs(x) < 21) & (np.abs(y) < 21) & (np.abs(z) < HALF_LENGTH_A)) * (1 + 0.002 * z).astype(np.float32)


def piece(z_A, num):
    """Which of ``num`` (2 or 3) pieces a height belongs to: 0 the middle one, 1 the lower, and 2 the upper."""
    return np.where(z_A < ENDS_A[0], 1, np.where((z_A > ENDS_A[1]) & (num == 3), 2, 0))


@dataclass
class BarModel:
    """What is asked of a ``FlexModel``, moving exactly: ``latents`` (n, K) are the angles of the ends, radians."""

    latents: np.ndarray
    still: bool = False
    bends: bool = False
    slides: bool = False
    noise_A: float = 0.0
    pose: object = None
    probability: object = None
    latent_covariance: object = None
    canonical: np.ndarray = field(default_factory=bar)
    box: int = BOX
    pixel_size_A: float = PIXEL_SIZE_A

    def __post_init__(self):
        self.mesh = bcc_mesh(self.canonical > 0, PIXEL_SIZE_A, 15.0)
        self.noise = np.random.default_rng(7)

    def displacements_A(self, z):
        vertices_A = self.mesh.vertices_A
        moved = np.stack([self._state(vertices_A, np.asarray(one, float)) for one in z]) - vertices_A
        return torch.from_numpy(moved + self.noise_A * self.noise.normal(size=moved.shape))

    def _state(self, vertices_A, angles):
        if self.still:
            return Rotation.from_rotvec([0.1, 0, angles[0]]).apply(vertices_A) + 5 * angles[0]
        if self.bends:  # an arc of a circle
            z, curvature = vertices_A[:, 2], angles[0] / HALF_LENGTH_A
            turn, x = curvature * z, vertices_A[:, 0]
            along = z if abs(curvature) < 1e-9 else np.sin(turn) / curvature
            aside = 0 * z if abs(curvature) < 1e-9 else (1 - np.cos(turn)) / curvature
            return np.stack([aside + x * np.cos(turn), vertices_A[:, 1], along - x * np.sin(turn)], 1)
        own = piece(vertices_A[:, 2], 1 + len(angles))
        moved = vertices_A.copy()
        for end, (angle, axis, pivot_A) in enumerate(zip(angles, AXES, PIVOTS_A, strict=False)):
            here = own == end + 1
            if self.slides:
                moved[here] += 30 * angle * axis
            else:
                moved[here] = Rotation.from_rotvec(angle * axis).apply(vertices_A[here] - pivot_A) + pivot_A
        return moved


def angles(num, dims, seed=1):
    """(num, dims) angles in radians: the first uniform in +-0.4, the second in two states about +-0.15."""
    rng = np.random.default_rng(seed)
    second = rng.choice([-0.15, 0.15], num) + 0.03 * rng.normal(size=num)
    return np.stack([rng.uniform(-0.4, 0.4, num), second], 1)[:, :dims]


def adjusted_rand_index(first, second, mass):
    """Of two partitions, by the pairs of units of mass that they have together."""
    table = np.zeros((first.max() + 1, second.max() + 1))
    np.add.at(table, (first, second), mass / mass.sum())
    both, one, other = (table**2).sum(), (table.sum(1) ** 2).sum(), (table.sum(0) ** 2).sum()
    return (both - one * other) / ((one + other) / 2 - one * other)
