"""Derivatives of fields that a mesh carries."""

from __future__ import annotations

import numpy as np
from scipy import sparse

from flexlib.tetra.tetmesh import TetraMesh


def barycentric_gradients(mesh: TetraMesh) -> np.ndarray:
    """(nc, 4, 3) float64 gradient, in 1/A, of the barycentric weight of each of a cell's vertices."""
    corner = mesh.vertices_A[mesh.cells]
    edges = corner[:, 1:] - corner[:, :1]
    last = np.linalg.inv(edges).transpose(0, 2, 1)
    return np.concatenate([-last.sum(1, keepdims=True), last], axis=1)


def directional_derivative(mesh: TetraMesh, shift_A: np.ndarray) -> sparse.csr_array:
    """What a field at the vertices changes by, to first order, at vertices that are shifted.

    A vertex has the gradients of its cells, averaged by volume.

    Parameters
    ----------
    mesh
        With nv vertices.
    shift_A
        (nv, 3).

    Returns
    -------
    derivative
        (nv, nv): its product with the values (nv, ...) of a field f is ``f(x + shift) - f(x)``.
    """
    gradients = barycentric_gradients(mesh)
    volumes = mesh.cell_volumes_A3()
    share = volumes[:, None] / np.bincount(mesh.cells.ravel(), np.repeat(volumes, 4))[mesh.cells]  # (nc, 4)
    along = np.einsum("ckd,cvd->cvk", gradients, shift_A[mesh.cells]) * share[:, :, None]
    rows, columns = np.repeat(mesh.cells, 4, axis=1), np.tile(mesh.cells, (1, 4))
    num = len(mesh.vertices_A)
    return sparse.csr_array((along.ravel(), (rows.ravel(), columns.ravel())), shape=(num, num))
