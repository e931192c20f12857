"""The displacement fields that a flow is made of, and what the rigidity says of them."""

from __future__ import annotations

import numpy as np
import torch

from flexlib.distributed import Ranks
from flexlib.model.flow import displacement_basis_A, without_rigid_motion
from flexlib.tetra.elastic import elastic_modes
from flexlib.tetra.rigidity import RigidityTensors, mesh_rigidity
from flexlib.tetra.tetmesh import TetraMesh

NUM_MODES = 800  # a hinge is sharp: with 150 the IgG set's second angle is known to .983, with 800 to .985
SPECTRAL_MODES = 150  # the softest, in which motion is looked for at the start
BASIS_UNIT_A = 5.0  # rms displacement of the softest field per unit network output


def displacement_basis(
    mesh: TetraMesh, ranks: Ranks, device: torch.device | str, density_share: torch.Tensor | None = None
) -> torch.Tensor:
    """(m, nv, 3) float32 fields in Angstrom per unit coefficient: elastic modes, then six rigid-body motions.

    With ``density_share`` (nv,), the density by the vertex that it rides on, there are no rigid-body motions: neither
    at the end nor, as the density feels them, in any of the fields.
    """
    stiffness, modes = ranks.from_first(lambda: elastic_modes(mesh, NUM_MODES))
    basis = displacement_basis_A(modes, stiffness, mesh.vertices_A) * BASIS_UNIT_A
    if density_share is not None:
        basis = without_rigid_motion(basis[:-6], mesh.vertices_A, density_share.cpu().numpy())
    return torch.as_tensor(basis, device=device)


def rigid_fields(vertices_A: torch.Tensor) -> torch.Tensor:
    """(6, nv, 3) float32 translations by an Angstrom and rotations about the box centre, of vertices (nv, 3).

    Rotations are such that the vertices move by an Angstrom rms.
    """
    axes = torch.eye(3, dtype=vertices_A.dtype, device=vertices_A.device)
    turns = torch.linalg.cross(axes[:, None].expand(-1, len(vertices_A), -1), vertices_A.expand(3, -1, -1))
    size = turns.square().sum(2).mean(1).sqrt()
    return torch.cat([axes[:, None].expand(-1, len(vertices_A), -1), turns / size[:, None, None]])


def spectral_fields(num_fields: int, rigid: bool = True) -> np.ndarray:
    """Which fields of a basis the spectral start uses: the softest modes, and the ``rigid``-body motions at the end."""
    modes = num_fields - (6 if rigid else 0)
    return np.r_[: min(SPECTRAL_MODES, modes), modes:num_fields]


def rigidity_precision(
    rigidity: RigidityTensors, vertices_A: torch.Tensor, basis_A: torch.Tensor, nats: float
) -> np.ndarray:
    """(m,) float64 precision that the rigidity, as a prior, gives the coefficient of each displacement field.

    Its energy is taken at a thousandth of the field's size, where it is quadratic.

    Parameters
    ----------
    rigidity, vertices_A
        Of the mesh at rest, (nv, 3).
    basis_A
        (m, nv, 3) fields.
    nats
        Per unit of mean squared strain.
    """
    energy = 1e6 * mesh_rigidity(rigidity, vertices_A + 1e-3 * basis_A)
    return (2 * nats * energy).cpu().double().numpy()
