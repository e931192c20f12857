"""Elastic modes of a mesh: the smooth motions that cost least strain.

The stiffness is the rigidity energy to second order about rest, ``u^T K u = sum_c weight_c |sym(grad u)_c|^2`` with
weight = rigidity x volume / total volume; the mass is that of the vertices, a quarter of the volume of each cell
around them, normalised to a total of 1. So a mode's eigenvalue is the rigidity energy, in 1/A^2, of moving along it
until the rms displacement is 1 A.
"""

from __future__ import annotations

import logging

import numpy as np
from scipy import linalg, sparse
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import LinearOperator, eigsh, splu

from flexlib.mesh.rigidity import barycentric_gradients
from flexlib.mesh.tetmesh import TetraMesh

logger = logging.getLogger(__name__)

_ZERO_ENERGY = 1e-9  # relative to the mean stiffness per mass: eigenvalues below are zero modes
_SHIFT = 1e-7  # of the same scale, below zero: keeps the factorised matrix positive definite
_SMALLEST_BODY = 0.02  # bodies with less than this part of the mass have no modes of their own
_DENSE_BELOW = 400  # degrees of freedom up to which a dense solver is quicker


def elastic_modes(mesh: TetraMesh, num_modes: int = 150) -> tuple[np.ndarray, np.ndarray]:
    """Lowest elastic modes of a mesh, softest first.

    The six rigid-body motions of the whole are left out. Where the mesh falls into bodies that share no vertex, their
    rigid motions relative to each other cost no strain: they come first, with the lowest elastic eigenvalue as
    theirs (any positive number would do, zero would be no scale). All other motions without energy, such as a loose
    cell that turns about a shared edge, are dropped.

    Parameters
    ----------
    mesh : TetraMesh with nv vertices.
    num_modes : int, number m of modes wanted; fewer come back if the mesh has fewer.

    Returns
    -------
    stiffness : (m,) float64, rigidity energy in 1/A^2 per squared rms displacement, positive.
    modes : (m, nv, 3) float64 vertex displacements in A, orthonormal under the vertex masses: rms 1 A each. The
        component of largest size is positive.
    """
    mass = vertex_masses(mesh)
    stiffness = stiffness_matrix(mesh)
    weight = np.repeat(mass, 3)
    scale = stiffness.diagonal().sum() / weight.sum() / 3
    free = _free_bodies(mesh, mass)
    wanted = max(num_modes - len(free), 1)
    size = len(weight)
    spare = 6 + len(free)
    while True:
        values, vectors = _lowest_eigenpairs(stiffness, weight, min(wanted + spare, size), _SHIFT * scale)
        elastic = values > _ZERO_ENERGY * scale
        if elastic.sum() >= wanted or len(values) == size:
            break
        spare *= 2
    dropped = int((~elastic).sum()) - 6 - len(free)
    if dropped > 0:
        logger.info("elastic modes: %d motions without energy are dropped (loosely joined cells)", dropped)
    values, vectors = values[elastic][:wanted], vectors[:, elastic][:, :wanted].T
    floor = values[0] if len(values) else scale
    values = np.concatenate([np.full(len(free), floor), values])[:num_modes]
    modes = np.concatenate([free.reshape(-1, size), vectors])[:num_modes]
    largest = np.take_along_axis(modes, np.abs(modes).argmax(1)[:, None], axis=1)
    return values, (modes * np.sign(largest)).reshape(len(modes), -1, 3)


def vertex_masses(mesh: TetraMesh) -> np.ndarray:
    """(nv,) share of the mesh's volume at each vertex; the sum is 1."""
    volume = mesh.cell_volumes_A3()
    mass = np.bincount(mesh.cells.ravel(), weights=np.repeat(volume, 4), minlength=len(mesh.vertices_A))
    mass = np.maximum(mass, 1e-9 * mass.max())  # vertices without a cell must not make the mass singular
    return mass / mass.sum()


def stiffness_matrix(mesh: TetraMesh) -> sparse.csc_array:
    """(3 nv, 3 nv) matrix K of the linearised rigidity energy, in 1/A^2, three rows (x, y, z) to a vertex."""
    volume = mesh.cell_volumes_A3()
    weight = mesh.rigidity * volume / volume.sum()
    gradient = barycentric_gradients(mesh)
    # |sym G|^2 = (|G|^2 + tr G^2) / 2 with G = sum_k u_k grad_k^T
    block = 0.5 * np.einsum("nlb,nka->nkalb", gradient, gradient).transpose(0, 1, 4, 3, 2)
    dot = 0.5 * np.einsum("nka,nla->nkl", gradient, gradient)
    for axis in range(3):
        block[:, :, axis, :, axis] += dot
    block = weight[:, None, None] * block.reshape(len(weight), 12, 12)
    row = (3 * mesh.cells[:, :, None] + np.arange(3)).reshape(len(weight), 12)
    rows = np.repeat(row, 12, axis=1).ravel()
    columns = np.tile(row, (1, 12)).ravel()
    size = 3 * len(mesh.vertices_A)
    return sparse.coo_array((block.ravel(), (rows, columns)), (size, size)).tocsc()


def rigid_motions(vertices_A: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """(6, nv, 3) translations and infinitesimal rotations of points with the given (nv,) masses, mass-orthonormal."""
    centred = vertices_A - (mass[:, None] * vertices_A).sum(0) / mass.sum()
    motions = [np.broadcast_to(axis, centred.shape) for axis in np.eye(3)]
    motions += [np.cross(axis, centred) for axis in np.eye(3)]
    return _orthonormalise(np.stack(motions).reshape(6, -1), np.repeat(mass, 3)).reshape(-1, *vertices_A.shape)


def _free_bodies(mesh: TetraMesh, mass: np.ndarray) -> np.ndarray:
    """(6 (B - 1), nv, 3) rigid motions of the mesh's B bodies relative to each other, mass-orthonormal."""
    nv = len(mass)
    first, second = mesh.cells[:, [0, 0, 0]].ravel(), mesh.cells[:, 1:].ravel()
    graph = sparse.coo_array((np.ones(len(first)), (first, second)), (nv, nv))
    count, body = connected_components(graph, directed=False)
    large = [b for b in range(count) if mass[body == b].sum() >= _SMALLEST_BODY]
    if len(large) < 2:
        return np.zeros((0, nv, 3))
    motions = np.zeros((len(large), 6, nv, 3))
    for motion, b in zip(motions, large, strict=True):
        motion[:, body == b] = rigid_motions(mesh.vertices_A[body == b], mass[body == b])
    basis = motions.reshape(-1, 3 * nv)
    weight = np.repeat(mass, 3)
    together = rigid_motions(mesh.vertices_A, mass).reshape(6, -1)
    basis = basis - (basis * weight) @ together.T @ together
    return _orthonormalise(basis, weight)[: 6 * (len(large) - 1)].reshape(-1, nv, 3)


def _orthonormalise(vectors: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Orthonormal rows that span the rows of ``vectors`` under the inner product with ``weight``; null rows dropped."""
    root = np.sqrt(weight)
    _, size, rows = linalg.svd(vectors * root, full_matrices=False)
    return rows[size > 1e-6 * size[0]] / root


def _lowest_eigenpairs(
    stiffness: sparse.csc_array, weight: np.ndarray, count: int, shift: float
) -> tuple[np.ndarray, np.ndarray]:
    """The ``count`` lowest solutions of ``K x = value diag(weight) x``: (count,) ascending and (size, count)."""
    size = len(weight)
    if size <= _DENSE_BELOW or count >= size // 2:
        values, vectors = linalg.eigh(stiffness.toarray(), np.diag(weight), subset_by_index=(0, count - 1))
        return values, vectors
    mass = sparse.dia_array((weight[None], [0]), shape=(size, size)).tocsc()
    factor = splu(
        (stiffness + shift * mass).tocsc(),
        permc_spec="MMD_AT_PLUS_A",
        diag_pivot_thresh=0.0,
        options={"SymmetricMode": True},
    )
    inverse = LinearOperator((size, size), matvec=factor.solve, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(size)
    values, vectors = eigsh(stiffness, k=count, M=mass, sigma=-shift, OPinv=inverse, v0=start)
    order = np.argsort(values)
    return values[order], vectors[:, order]
