"""Elastic modes of a mesh: the smooth motions that cost least strain.

The stiffness is the rigidity energy to second order about rest, ``u^T K u = sum_c weight_c |sym(grad u)_c|^2`` with
weight = rigidity x volume / total volume; the mass is that of the vertices, a quarter of the volume of each cell
around them, normalised to a total of 1. So a mode's eigenvalue is the rigidity energy, in 1/A^2, of moving along it
until the rms displacement is 1 A.

Eigenpairs by our own subspace iteration: ``scipy.sparse.linalg.eigsh`` (ARPACK) and ``lobpcg`` were considered; the
first solves for one vector at a time, several times slower for 150 of them, and the second needs a preconditioner.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import linalg, sparse
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import splu
from threadpoolctl import threadpool_limits

from flexlib.runtime import kd_tree
from flexlib.tetra.gradients import barycentric_gradients
from flexlib.tetra.tetmesh import TetraMesh

logger = logging.getLogger(__name__)

_ZERO_ENERGY = 1e-9  # relative to the mean stiffness per mass: eigenvalues below are zero modes
_SHIFT = 1e-7  # of the same scale, below zero: keeps the factorised matrix positive definite
_SMALLEST_BODY = 0.02  # bodies with less than this part of the mass have no modes of their own
_MOST_BODIES = 200  # parts joined by faces beyond which those that share a vertex are taken as one
_NULL = 1e-10  # relative eigenvalue of the joints' normal matrix below which a motion opens no joint
_DENSE_BELOW = 400  # degrees of freedom up to which a dense solver is quicker
SMOOTH_ABOVE = 8_000  # degrees of freedom above which modes are looked for among smooth fields only
_DENSE_FACTOR = 12_000  # degrees of freedom up to which a factor is dense: 1.2 GB
_SPARE_BLOCK = 60  # vectors beyond those wanted
_BLOCK_STEPS = 3


# more threads gain little here, and on shared cores they wait for each other
@threadpool_limits.wrap(limits=1, user_api="blas")
def elastic_modes(
    mesh: TetraMesh, num_modes: int = 150, smooth_above: int = SMOOTH_ABOVE
) -> tuple[np.ndarray, np.ndarray]:
    """Lowest elastic modes of a mesh, softest first, after the motions that cost nothing at all.

    The six rigid-body motions of the whole are left out. Bodies of the mesh (parts that hang together by faces) that
    share no vertex, or so few that they can turn about them, move against each other without strain: segments that
    slide, hinges. These free motions come first, with the lowest elastic eigenvalue as theirs: zero would be no scale,
    and with it one unit of a free motion is an rms displacement of the size of the softest elastic one's. All other
    motions without energy, such as a loose cell that turns about a shared edge, are dropped. Bodies of less than 2 %
    of the mass have no motions of their own; where they touch nothing, they ride on the nearest large one.

    Parameters
    ----------
    mesh : TetraMesh
        With nv vertices.
    num_modes : int
        Number m of modes wanted, free motions included; fewer come back if the mesh has fewer.
    smooth_above : int
        Degrees of freedom above which modes are looked for among smooth fields only.

    Returns
    -------
    stiffness : np.ndarray
        (m,) float64, rigidity energy in 1/A^2 per squared rms displacement, positive.
    modes : np.ndarray
        (m, nv, 3) float64 vertex displacements in A, orthonormal under the vertex masses: rms 1 A each. The component
        of largest size is positive.
    """
    mass = vertex_masses(mesh)
    stiffness = stiffness_matrix(mesh)
    weight = np.repeat(mass, 3)
    scale = stiffness.diagonal().sum() / weight.sum() / 3
    bodies = _bodies(mesh)
    free = free_motions(mesh, mass, bodies)
    wanted = max(num_modes - len(free), 1)
    size = len(weight)
    spare = 6 + len(free)
    null = np.concatenate([rigid_motions(mesh.vertices_A, mass), free]).reshape(-1, size)
    while True:
        asked = min(wanted + spare, size)
        values, vectors = _lowest_eigenpairs(stiffness, weight, asked, _SHIFT * scale, null, smooth_above)
        elastic = values > _ZERO_ENERGY * scale
        if elastic.sum() >= wanted or len(values) < asked or asked == size:
            break
        spare *= 2
    dropped = int((~elastic).sum()) - 6 - len(free)
    if dropped > 0:
        logger.info("elastic modes: %d motions without energy are dropped (loosely joined cells)", dropped)
    values, vectors = values[elastic][:wanted], vectors[:, elastic][:, :wanted].T.reshape(-1, *mesh.vertices_A.shape)
    floor = values[0] if len(values) else scale
    values = np.concatenate([np.full(len(free), floor), values])[:num_modes]
    modes = np.concatenate([free, _carry_dust(mesh, bodies, vectors)])[:num_modes].reshape(-1, size)
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


@dataclass(frozen=True)
class _Bodies:
    """Parts of a mesh that hang together by whole faces: each is rigid in itself, to first order."""

    of_cell: np.ndarray  # (nc,) body of each cell
    at_vertex: sparse.csr_array  # (nv, nb) with 1 where a body has a vertex
    large: np.ndarray  # (nb,) bool: at least ``_SMALLEST_BODY`` of the volume
    dust: np.ndarray  # (nb,) bool: small, and shares no vertex with another body


def _bodies(mesh: TetraMesh) -> _Bodies:
    cells, nc, nv = mesh.cells, len(mesh.cells), len(mesh.vertices_A)
    faces = np.sort(np.concatenate([np.delete(cells, k, axis=1) for k in range(4)]), axis=1).astype(np.int64)
    _, face = np.unique((faces[:, 0] * nv + faces[:, 1]) * nv + faces[:, 2], return_inverse=True)
    owner = np.tile(np.arange(nc), 4)
    size = nc + int(face.max()) + 1
    graph = sparse.coo_array((np.ones(len(face)), (owner, nc + face)), (size, size))
    count, label = connected_components(graph, directed=False)
    of_cell = label[:nc]
    if count > _MOST_BODIES:  # a mesh of loose cells: what shares a vertex is taken as one
        first, second = cells[:, [0, 0, 0]].ravel(), cells[:, 1:].ravel()
        count, of_vertex = connected_components(
            sparse.coo_array((np.ones(len(first)), (first, second)), (nv, nv)), False
        )
        of_cell = of_vertex[cells[:, 0]]
    volume = mesh.cell_volumes_A3()
    share = np.bincount(of_cell, weights=volume / volume.sum(), minlength=count)
    at_vertex = sparse.coo_array((np.ones(4 * nc), (cells.ravel(), np.repeat(of_cell, 4))), (nv, count)).tocsr()
    at_vertex.data[:] = 1.0
    shared = at_vertex.sum(1) > 1
    touching = (at_vertex.T @ shared.astype(float)) > 0
    large = share >= _SMALLEST_BODY
    return _Bodies(of_cell, at_vertex, large, ~large & ~touching)


def free_motions(mesh: TetraMesh, mass: np.ndarray, bodies: _Bodies | None = None) -> np.ndarray:
    """(f, nv, 3) motions of the mesh's bodies against each other that cost no strain, mass-orthonormal.

    Every body moves rigidly, and bodies that share a vertex move alike there: the null space of a small matrix. Six
    per body beyond the first where they share nothing, three where they share one vertex, one about a shared edge.
    """
    bodies = bodies or _bodies(mesh)
    nv, count = bodies.at_vertex.shape
    if bodies.large.sum() < 2:
        return np.zeros((0, nv, 3))
    centred = mesh.vertices_A - (mass[:, None] * mesh.vertices_A).sum(0)
    centred = centred / np.sqrt((mass[:, None] * centred**2).sum())
    entry = bodies.at_vertex.tocoo()
    unit = np.zeros((nv, 6, 3))  # displacement of each vertex per rigid motion of its body
    unit[:, :3] = np.eye(3)
    unit[:, 3:] = np.cross(np.eye(3), centred[:, None])
    rows = []
    order = np.argsort(entry.row, kind="stable")
    vertex, body = entry.row[order], entry.col[order]
    for k in np.flatnonzero(vertex[1:] == vertex[:-1]):  # bodies that share a vertex, one pair after the other
        row = np.zeros((3, count, 6))
        row[:, body[k]], row[:, body[k + 1]] = unit[vertex[k]].T, -unit[vertex[k]].T
        rows.append(row)
    solid = np.flatnonzero(bodies.at_vertex @ bodies.large > 0)
    anchors = kd_tree(mesh.vertices_A[solid])
    for one in np.flatnonzero(bodies.dust):
        own = np.flatnonzero(bodies.at_vertex[:, [one]].toarray().ravel())
        carrier = _first_large(bodies, solid[anchors.query(mesh.vertices_A[own].mean(0))[1]])
        row = np.zeros((6, count, 6))
        row[:, one], row[:, carrier] = np.eye(6), -np.eye(6)
        rows.append(row)
    if rows:
        constraint = np.concatenate(rows).reshape(-1, 6 * count)
        values, vectors = linalg.eigh(constraint.T @ constraint)
        allowed = vectors[:, values < _NULL * max(values[-1], 1.0)].T
    else:
        allowed = np.eye(6 * count)
    owner = body[np.searchsorted(vertex, np.arange(nv))]  # any body of a vertex: all agree there
    fields = np.einsum("fvk,vki->fvi", allowed.reshape(-1, count, 6)[:, owner], unit)
    counts = mass * bodies.large[owner]  # what small bodies do is no motion of its own
    weight = np.repeat(mass, 3)
    together = rigid_motions(mesh.vertices_A, mass).reshape(6, -1)
    flat = fields.reshape(len(fields), -1)
    flat = flat - (flat * weight) @ together.T @ together
    left, size, _ = linalg.svd(flat * np.sqrt(np.repeat(counts, 3)), full_matrices=False)
    kept = left[:, size > 1e-5 * max(size[0], 1e-300)].T @ flat
    if size[0] < 1e-8:
        return np.zeros((0, nv, 3))
    kept = kept - (kept * weight) @ together.T @ together
    return _orthonormalise(kept, weight).reshape(-1, nv, 3)


def _first_large(bodies: _Bodies, vertex: np.integer) -> int:
    row = slice(bodies.at_vertex.indptr[vertex], bodies.at_vertex.indptr[vertex + 1])
    return next(int(body) for body in bodies.at_vertex.indices[row] if bodies.large[body])


def _carry_dust(mesh: TetraMesh, bodies: _Bodies, modes: np.ndarray) -> np.ndarray:
    """Elastic modes (m, nv, 3) in which loose small bodies move as the nearest vertex of a large one does."""
    if not bodies.dust.any() or not bodies.large.any():
        return modes
    solid = np.flatnonzero(bodies.at_vertex @ bodies.large > 0)
    tree = kd_tree(mesh.vertices_A[solid])
    modes = modes.copy()
    for one in np.flatnonzero(bodies.dust):
        own = np.flatnonzero(bodies.at_vertex[:, [one]].toarray().ravel())
        modes[:, own] = modes[:, [solid[tree.query(mesh.vertices_A[own].mean(0))[1]]]]
    return modes


def _orthonormalise(vectors: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Orthonormal rows that span the rows of ``vectors`` under the inner product with ``weight``; null rows dropped."""
    root = np.sqrt(weight)
    _, size, rows = linalg.svd(vectors * root, full_matrices=False)
    return rows[size > 1e-6 * size[0]] / root


def _lowest_eigenpairs(
    stiffness: sparse.csc_array,
    weight: np.ndarray,
    count: int,
    shift: float,
    null: np.ndarray,
    smooth_above: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The ``count`` lowest solutions of ``K x = value diag(weight) x``: (count,) ascending and (size, count).

    Large problems by subspace iteration on a random block (Halko, Martinsson and Tropp, SIAM Review 53, 2011): the
    block's solves and products are several times quicker than Lanczos vectors one by one. The softest come out exact;
    the stiffest of many are mixed with their neighbours, which spans nearly the same space. The largest, whose
    factors would take minutes and gigabytes, are solved in a space of smooth fields (``_smooth_fields``).
    """
    size = len(weight)
    if size <= _DENSE_BELOW or (count >= size // 2 and size <= smooth_above):
        values, vectors = linalg.eigh(stiffness.toarray(), np.diag(weight), subset_by_index=(0, count - 1))
        return values, vectors
    fields = sparse.dia_array((1.0 / np.sqrt(weight)[None], [0]), shape=(size, size)).tocsc()
    if size > smooth_above:
        fields = _smooth_fields(stiffness, weight, shift, null)
    small = (fields.T @ stiffness @ fields).tocsc()
    mass = (fields.T @ (fields * weight[:, None])).tocsc()
    num = small.shape[0]
    count = min(count, num)
    if count >= num // 2:
        values, turn = linalg.eigh(small.toarray(), mass.toarray(), subset_by_index=(0, count - 1))
        return values, fields @ turn
    solve = _solver((small + shift * mass).tocsc())
    block = np.random.default_rng(0).standard_normal((num, min(count + count // 8 + _SPARE_BLOCK, num)))
    for _ in range(_BLOCK_STEPS):
        block = np.ascontiguousarray(solve(mass @ block))
        block = linalg.qr(block, mode="economic", check_finite=False)[0]
    values, turn = linalg.eigh(block.T @ (small @ block), block.T @ (mass @ block), subset_by_index=(0, count - 1))
    return values, fields @ (block @ turn)


def _solver(matrix: sparse.csc_array) -> Callable[[np.ndarray], np.ndarray]:
    """Solves with a positive definite matrix for many columns at once.

    A dense factor where it fits: those of elasticity in three dimensions are half full, and SuperLU takes the columns
    one by one (7,836 fields, 960 columns, three times: 142 s of CPU against 30).
    """
    if matrix.shape[0] <= _DENSE_FACTOR:
        factor = linalg.cho_factor(matrix.toarray(), lower=True, overwrite_a=True, check_finite=False)
        return lambda columns: linalg.cho_solve(factor, columns, check_finite=False)
    options = {"SymmetricMode": True}
    return splu(matrix, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options=options).solve


def _smooth_fields(stiffness: sparse.csc_array, weight: np.ndarray, shift: float, null: np.ndarray) -> sparse.csc_array:
    """(size, m) smooth displacement fields, of unit rms and an eighth as many as the mesh has.

    The first coarse space of an algebraic multigrid by smoothed aggregation (Vanek, Mandel and Brezina, Computing 56,
    1996), which holds the motions ``null`` (n, size). Vertices are aggregated along the mesh's own edges. The modes
    come out stiffer than they are: of the IgG set's mesh by a third, where motion is learnt as well from them.
    """
    from pyamg import smoothed_aggregation_solver

    shifted = sparse.bsr_matrix(stiffness + shift * sparse.dia_array((weight[None], [0]), shape=stiffness.shape))
    hierarchy = smoothed_aggregation_solver(
        shifted.tobsr(blocksize=(3, 3)),
        B=null.T.copy(),
        strength=("symmetric", {"theta": 0.0}),
        smooth=("jacobi", {"omega": 4 / 3, "degree": 2, "weighting": "local"}),  # otherwise by a random vector
        max_levels=2,
    )
    fields = sparse.csc_array(hierarchy.levels[0].P)
    size = np.sqrt((fields * fields * weight[:, None]).sum(0))
    return fields @ sparse.dia_array((1.0 / size[None], [0]), shape=(len(size), len(size)))
