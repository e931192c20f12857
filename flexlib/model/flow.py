"""The flow: latents to displacements of the mesh's vertices."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

FRAME_UNIT_A, FRAME_UNIT_RAD = 5.0, 0.1  # of the perceptron's outputs for the poses' frame


class FlowGenerator(nn.Module):
    """Latent coordinates (b, K) to displacements of the mesh vertices (b, nv, 3) in Angstrom.

    A multilayer perceptron (3DFlex: 6 layers of 64 units) plus a linear path from z, both onto a basis of smooth
    displacement fields: the mesh's elastic modes, each scaled so that one unit costs the same strain, and, where poses
    are taken for exact, the six rigid-body motions. The linear path carries the spectral start; the perceptron starts
    at zero.
    """

    basis_A: torch.Tensor
    input_matrix: torch.Tensor
    input_offset: torch.Tensor

    def __init__(
        self, basis_A: torch.Tensor, latent_dims: int, layers: int, hidden_units: int, frame: bool = False
    ) -> None:
        """A flow without motion.

        Parameters
        ----------
        basis_A
            (m, nv, 3) displacement in Angstrom per unit coefficient.
        latent_dims
            K.
        layers, hidden_units
            Of the perceptron.
        frame
            Whether it also learns the frame that the input's poses refer to (``frame_motion``).
        """
        super().__init__()
        num_fields = len(basis_A)
        self.register_buffer("basis_A", basis_A)
        # the standardised latents are mapped back to the scale that the network first saw (see ``rescale_latents``)
        self.register_buffer("input_matrix", torch.eye(latent_dims))
        self.register_buffer("input_offset", torch.zeros(latent_dims))
        widths = [latent_dims] + [hidden_units] * layers
        blocks: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(widths):
            blocks += [nn.Linear(fan_in, fan_out), nn.SiLU()]
        self.hidden = nn.Sequential(*blocks)
        self.output = nn.Linear(hidden_units, num_fields)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        self.linear = nn.Parameter(torch.zeros(latent_dims, num_fields))
        self.frame = nn.Linear(hidden_units, 6, bias=False) if frame else None
        if self.frame is not None:
            nn.init.zeros_(self.frame.weight)

    def frame_motion(self, z: torch.Tensor) -> torch.Tensor:
        """(b, K) latents to (b, 6) of the frame's motion: a rotation vector in radians and a translation in Angstrom.

        The perceptron's part of it, which is none at the start; for the rest see ``views.PoseFrame``.
        """
        assert self.frame is not None
        raw = z @ self.input_matrix.T + self.input_offset
        turn, push = self.frame(self.hidden(raw)).split(3, 1)
        return torch.cat([FRAME_UNIT_RAD * turn, FRAME_UNIT_A * push], 1)

    def coefficients(self, z: torch.Tensor) -> torch.Tensor:
        """(b, K) latents to (b, m) basis coefficients."""
        raw = z @ self.input_matrix.T + self.input_offset
        return raw @ self.linear + self.output(self.hidden(raw))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """(b, K) latents to (b, nv, 3) displacements in Angstrom."""
        coefficients = self.coefficients(z)
        return (coefficients @ self.basis_A.flatten(1)).view(len(z), -1, 3)

    def assembled(self) -> AssembledFlow:
        """The same flow with its last layer multiplied by the basis once, for as long as the parameters stay."""
        last = torch.cat([self.output.weight.T, self.linear, self.output.bias[None]])
        return AssembledFlow(self, last @ self.basis_A.flatten(1))

    @property
    def stands_still(self) -> bool:
        """Whether every displacement is zero."""
        return not any(bool(values.any()) for values in (self.linear, self.output.weight, self.output.bias))

    @torch.no_grad()
    def stand_still(self) -> None:
        """Make every displacement zero."""
        self.linear.zero_()
        self.output.weight.zero_()
        self.output.bias.zero_()

    @torch.no_grad()
    def rescale_latents(self, matrix: torch.Tensor, offset: torch.Tensor) -> None:
        """Keep every displacement while latents change: ``z_old = matrix @ z_new + offset``, (K, K) and (K,)."""
        self.input_offset += self.input_matrix @ offset
        self.input_matrix.copy_(self.input_matrix @ matrix)


@dataclass(frozen=True)
class AssembledFlow:
    """A flow as a sum of few fields: a batch's displacements cost a fraction of what the whole basis does."""

    flow: FlowGenerator
    fields_A: torch.Tensor  # (hidden units + K + 1, 3 nv)

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        """(b, K) latents to (b, nv, 3) displacements in Angstrom."""
        return (self.factors(z) @ self.fields_A).view(len(z), -1, 3)

    def factors(self, z: torch.Tensor) -> torch.Tensor:
        """(b, K) latents to (b, hidden units + K + 1) of the fields."""
        raw = z @ self.flow.input_matrix.T + self.flow.input_offset
        return torch.cat([self.flow.hidden(raw), raw, raw.new_ones((len(raw), 1))], dim=1)


def rigid_modes_A(vertices_A: np.ndarray) -> np.ndarray:
    """Rigid-body displacement fields (6, nv, 3) of a mesh with vertices (nv, 3), each of unit rms displacement.

    Three translations along x, y, z, then three infinitesimal rotations about the vertices' mean. In Angstrom.
    """
    centred = vertices_A - vertices_A.mean(0)
    fields = [np.broadcast_to(axis, centred.shape) for axis in np.eye(3)]
    fields += [np.cross(axis, centred) for axis in np.eye(3)]
    return np.stack([f / np.sqrt((f**2).sum(1).mean()) for f in fields])


def without_rigid_motion(fields_A: np.ndarray, vertices_A: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Displacement fields freed of their rigid-body parts: the weighted mean displacement and rotation are zero.

    Parameters
    ----------
    fields_A
        (m, nv, 3).
    vertices_A
        (nv, 3) of the mesh at rest.
    weight
        (nv,) of the vertices, as the density that rides on each.

    Returns
    -------
    fields_A
        (m, nv, 3) float32. The same holds for every sum of them, as for a flow's displacements at any latents.
    """
    rigid = rigid_modes_A(vertices_A.astype(np.float64)).reshape(6, -1)
    weighted = rigid * np.repeat(weight.astype(np.float64), 3)
    flat = fields_A.reshape(len(fields_A), -1).astype(np.float64)
    part = np.linalg.solve(weighted @ rigid.T, weighted @ flat.T)
    return (flat - part.T @ rigid).reshape(fields_A.shape).astype(np.float32)


def displacement_basis_A(modes: np.ndarray, stiffness: np.ndarray, vertices_A: np.ndarray) -> np.ndarray:
    """Basis of the flow's output: elastic modes and rigid-body motions.

    A unit coefficient moves the softest mode by one Angstrom rms and a stiffer one by ``sqrt(softest / stiffness)`` of
    it. Modes that cost (nearly) nothing, such as the swing of a cell that hangs on one vertex, are scaled like the
    softest elastic one.

    Parameters
    ----------
    modes
        (m, nv, 3), of unit rms displacement.
    stiffness
        (m,) strain energy of each mode.
    vertices_A
        (nv, 3) of the mesh at rest.

    Returns
    -------
    basis_A
        (m + 6, nv, 3) float32.
    """
    softest = stiffness[stiffness > 1e-4 * stiffness.mean()].min()
    scale = np.sqrt(softest / np.maximum(stiffness, softest))
    return np.concatenate([modes * scale[:, None, None], rigid_modes_A(vertices_A)]).astype(np.float32)
