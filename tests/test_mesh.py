"""The mesh stage: lattice, voxels in cells, rigidity, elastic modes, files."""

from __future__ import annotations

import json

import meshio
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from flexlib.errors import InputError
from flexlib.imaging.maps import Map, read_map, write_map
from flexlib.imaging.masks import soft_edge
from flexlib.mesh.build import build_mesh, mesh_quality
from flexlib.mesh.lattice import BccLattice, bcc_mesh
from flexlib.mesh.weights import density_rigidity
from flexlib.tetra import elastic
from flexlib.tetra.elastic import elastic_modes, rigid_motions, vertex_masses
from flexlib.tetra.io import read_mesh, write_mesh
from flexlib.tetra.rigidity import (
    RigidityTensors,
    deformation_gradients,
    mesh_rigidity,
    nearest_rotations,
    rigidity_energy,
)
from flexlib.tetra.tetmesh import TetraMesh, single_cell_mesh
from flexlib.tetra.voxels import covered, tetra_index_map, voxelise
from flexlib.workflow_support.settings import MeshSettings

PIXEL_SIZE_A = 3.0


def ellipsoid(box: int = 32, radii_px=(12.0, 8.0, 6.0)) -> np.ndarray:
    """(N, N, N) bool, radii along (x, y, z)."""
    axis = np.arange(box) - box // 2
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
    return (x / radii_px[0]) ** 2 + (y / radii_px[1]) ** 2 + (z / radii_px[2]) ** 2 <= 1


def brick(box: int, shape_px: tuple[int, int, int], start_px: tuple[int, int, int]) -> np.ndarray:
    """(N, N, N) bool brick of ``shape_px`` (x, y, z) voxels that starts at ``start_px`` from the box centre."""
    mask = np.zeros((box,) * 3, bool)
    x, y, z = (slice(box // 2 + s, box // 2 + s + n) for s, n in zip(start_px, shape_px, strict=True))
    mask[z, y, x] = True
    return mask


def faces_of(cells: np.ndarray) -> np.ndarray:
    return np.sort(np.concatenate([np.delete(cells, k, axis=1) for k in range(4)]), axis=1)


def voxel_positions_A(voxels) -> np.ndarray:
    """True positions (x, y, z) of the voxels, from their index."""
    zyx = np.stack(np.unravel_index(voxels.index, (voxels.box,) * 3), axis=1)
    return (zyx[:, ::-1] - voxels.box // 2) * voxels.pixel_size_A


def mixed_positions_A(voxels, vertices_A: np.ndarray) -> np.ndarray:
    """Positions by barycentric mixing of (moved) vertices."""
    return np.einsum("nk,nki->ni", voxels.bary.astype(float), vertices_A[voxels.cells[voxels.cell]])


@pytest.mark.parametrize("cell_size_A", [4.0, 14.4, 23.0])
def test_lattice_cells_are_congruent_and_conforming(cell_size_A):
    mesh = bcc_mesh(ellipsoid(), PIXEL_SIZE_A, cell_size_A)
    np.testing.assert_allclose(mesh.cell_volumes_A3(), cell_size_A**3 / 12, rtol=1e-9)
    _, count = np.unique(faces_of(mesh.cells), axis=0, return_counts=True)
    assert count.max() == 2
    assert np.array_equal(np.unique(mesh.cells), np.arange(len(mesh.vertices_A)))
    assert len(np.unique(mesh.vertices_A.round(6), axis=0)) == len(mesh.vertices_A)
    quality = mesh_quality(mesh, voxelise(mesh, ellipsoid(), PIXEL_SIZE_A))
    assert quality["dihedral_min_deg"] == pytest.approx(60) and quality["dihedral_max_deg"] == pytest.approx(90)
    assert quality["num_bodies"] == 1


def test_faces_inside_a_convex_region_are_all_shared():
    """A face whose centroid lies deep inside the mask belongs to two cells: the mesh has no holes."""
    for cell_size_A in (4.0, 12.0):
        mesh = bcc_mesh(ellipsoid(radii_px=(10, 10, 10)), PIXEL_SIZE_A, cell_size_A)
        face, count = np.unique(faces_of(mesh.cells), axis=0, return_counts=True)
        depth = np.linalg.norm(mesh.vertices_A[face].mean(1), axis=1)
        assert (count[depth < 10 * PIXEL_SIZE_A - 4] == 2).all() and (count == 1).any()


def test_lattice_lookup_equals_brute_force():
    """Of all cells around a point exactly the one that was looked up holds it."""
    lattice = BccLattice(10.0, 40.0)
    points = np.random.default_rng(0).uniform(-20, 20, (300, 3))
    found = lattice.locate(points)
    cube = np.stack(np.meshgrid(*[np.arange(1, lattice.cubes - 1)] * 3, indexing="ij"), -1).reshape(-1, 3)
    every = lattice.tetras_of_cubes(cube)
    corner = lattice.node_positions_A(lattice.tetra_nodes(every).ravel()).reshape(-1, 4, 3)
    edges = (corner[:, 1:] - corner[:, :1]).transpose(0, 2, 1)
    assert np.linalg.det(edges).min() > 0
    inverse = np.linalg.inv(edges)
    for point, tetra in zip(points, found, strict=True):
        last = np.einsum("nij,nj->ni", inverse, point - corner[:, 0])
        holding = np.flatnonzero((last.min(1) >= 0) & (last.sum(1) <= 1))
        assert every[holding].tolist() == [tetra]


def test_parts_that_touch_share_whole_faces():
    """No cell hangs on the mesh by an edge or a vertex alone, for masks however they are cut."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    for seed in range(6):
        radii = np.random.default_rng(seed).uniform(5, 13, 3)
        cells = bcc_mesh(ellipsoid(radii_px=radii), PIXEL_SIZE_A, 7.3 + seed).cells
        _, face = np.unique(faces_of(cells), axis=0, return_inverse=True)
        owner = np.tile(np.arange(len(cells)), 4)
        size = len(cells) + face.max() + 1
        graph = coo_array((np.ones(len(face)), (owner, len(cells) + face.ravel())), (size, size))
        assert connected_components(graph, directed=False)[0] == 1


@pytest.mark.parametrize("box", [32, 48, 80])
def test_affine_fields_are_reproduced_at_any_box(box):
    mesh = bcc_mesh(ellipsoid(), PIXEL_SIZE_A, 17.0)
    pixel_size_A = PIXEL_SIZE_A * 32 / box
    mask = ellipsoid(box, tuple(r * box / 32 for r in (12.0, 8.0, 6.0)))
    voxels = voxelise(mesh, mask, pixel_size_A)
    assert np.array_equal(np.sort(voxels.index), np.flatnonzero(mask))
    true = voxel_positions_A(voxels)
    assert np.abs(mixed_positions_A(voxels, mesh.vertices_A) - true).max() < 1e-5 * pixel_size_A
    matrix = np.eye(3) + np.random.default_rng(0).normal(0, 0.3, (3, 3))
    moved = mixed_positions_A(voxels, mesh.vertices_A @ matrix.T + [1.0, -2.0, 3.0])
    assert np.abs(moved - (true @ matrix.T + [1.0, -2.0, 3.0])).max() < 3e-5 * pixel_size_A


def test_positions_are_exact_in_a_large_box():
    """1e-5 voxel up to the corners of a box of 256, in single precision weights; a few voxels stand for all."""
    box = 256
    mask = np.random.default_rng(0).random((box,) * 3) < 2e-3
    mask[:: box - 1, :: box - 1, :: box - 1] = True
    mesh = bcc_mesh(mask, PIXEL_SIZE_A, box * PIXEL_SIZE_A / 12)
    voxels = voxelise(mesh, mask, PIXEL_SIZE_A)
    error = mixed_positions_A(voxels, mesh.vertices_A) - voxel_positions_A(voxels)
    assert len(voxels) == mask.sum() and np.abs(error).max() < 1e-5 * PIXEL_SIZE_A


def test_voxels_lie_in_their_cells_and_are_sorted():
    mesh = bcc_mesh(ellipsoid(), PIXEL_SIZE_A, 11.0)
    voxels = voxelise(mesh, ellipsoid(), PIXEL_SIZE_A)
    assert voxels.bary.min() > -1e-6
    order = np.lexsort((voxels.index, voxels.cell))
    assert np.array_equal(order, np.arange(len(voxels)))
    index = tetra_index_map(voxels)
    assert np.array_equal(index >= 0, ellipsoid())
    assert np.array_equal(index.ravel()[voxels.index], voxels.cell)


def test_voxels_outside_the_mesh_take_the_nearest_cell_and_extrapolate(caplog):
    mesh = bcc_mesh(ellipsoid(radii_px=(8, 6, 5)), PIXEL_SIZE_A, 12.0)
    wide = ellipsoid(radii_px=(14, 12, 11))
    with caplog.at_level("INFO"):
        voxels = voxelise(mesh, wide, PIXEL_SIZE_A)
    assert np.array_equal(np.sort(voxels.index), np.flatnonzero(wide))
    inside = covered(mesh, wide, PIXEL_SIZE_A)
    assert f"{int(wide.sum() - inside.sum())} of {int(wide.sum())}" in caplog.text
    assert np.array_equal(inside.ravel()[voxels.index], voxels.bary.min(1) > -1e-6)
    assert np.abs(mixed_positions_A(voxels, mesh.vertices_A) - voxel_positions_A(voxels)).max() < 1e-4
    centroid = mesh.vertices_A[mesh.cells].mean(1)
    true = voxel_positions_A(voxels)
    nearest = np.linalg.norm(true[:, None] - centroid, axis=2).min(1)
    assert (np.linalg.norm(true - centroid[voxels.cell], axis=1) < nearest + 2 * 12.0).all()


def test_single_cell_holds_the_whole_box():
    mask = np.ones((16, 16, 16), bool)
    voxels = voxelise(single_cell_mesh(16 * PIXEL_SIZE_A), mask, PIXEL_SIZE_A)
    assert len(voxels) == 16**3 and voxels.bary.min() > 0 and (voxels.cell == 0).all()
    mesh = single_cell_mesh(16 * PIXEL_SIZE_A)
    assert np.abs(mixed_positions_A(voxels, mesh.vertices_A) - voxel_positions_A(voxels)).max() < 1e-4


def test_bad_meshes_and_masks_are_refused():
    mask = ellipsoid()
    with pytest.raises(InputError, match="empty"):
        bcc_mesh(np.zeros((8, 8, 8), bool), 1.0, 4.0)
    with pytest.raises(InputError, match="cell size"):
        bcc_mesh(mask, 1.0, 0.0)
    flat = TetraMesh(np.zeros((4, 3)), np.array([[0, 1, 2, 3]], np.int32), np.ones(1), np.zeros(1, np.int32))
    with pytest.raises(InputError, match="volume"):
        voxelise(flat, mask, 1.0)


def random_gradients(size: float = 0.5, count: int = 500) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.eye(3, dtype=torch.float64) + size * torch.randn(2, count, 3, 3, dtype=torch.float64)


def test_nearest_rotation_equals_the_one_by_svd():
    gradients = random_gradients()
    u, _, vh = torch.linalg.svd(gradients)
    sign = torch.det(u) * torch.det(vh)
    fix = torch.diag_embed(torch.stack([torch.ones_like(sign), torch.ones_like(sign), sign], -1))
    expected = u @ fix @ vh
    assert (torch.det(gradients) < 0).sum() > 10  # inverted cells are among them
    error = (nearest_rotations(gradients) - expected).abs().amax((-1, -2))
    assert error.quantile(0.95) < 1e-6 and error.median() < 1e-12
    gentle = random_gradients(0.1)
    u, _, vh = torch.linalg.svd(gentle)
    assert (nearest_rotations(gentle.float()) - u @ vh).abs().max() < 3e-6


def test_rigidity_energy_and_gradient_match_singular_values():
    gradients = random_gradients(0.15)
    weight = torch.rand(500, dtype=torch.float64)
    gradients.requires_grad_()

    def by_svd(f):
        return ((torch.linalg.svdvals(f) - 1) ** 2).sum(-1) @ weight

    energy = rigidity_energy(gradients, weight)
    torch.testing.assert_close(energy, by_svd(gradients))
    (gradient,) = torch.autograd.grad(energy.sum(), gradients)
    direction = torch.randn_like(gradients)
    step = 1e-6
    with torch.no_grad():
        up, down = by_svd(gradients + step * direction), by_svd(gradients - step * direction)
    finite_difference = ((up - down) / (2 * step)).sum()
    torch.testing.assert_close((gradient * direction).sum(), finite_difference, rtol=1e-6, atol=1e-8)


def test_gradient_by_vertices_matches_finite_differences():
    mesh = bcc_mesh(ellipsoid(16, (5, 4, 3)), PIXEL_SIZE_A, 9.0)
    tensors = RigidityTensors.from_mesh(mesh, dtype=torch.float64)
    torch.manual_seed(0)
    vertices = torch.as_tensor(mesh.vertices_A)[None] + torch.randn(2, len(mesh.vertices_A), 3, dtype=torch.float64)
    vertices.requires_grad_()

    def energy(moved):
        return rigidity_energy(deformation_gradients(tensors, moved), tensors.weight)

    assert torch.autograd.gradcheck(energy, vertices, eps=1e-5, atol=1e-7, fast_mode=True)


def test_degenerate_cells_stay_finite():
    """Mirrored, collapsed and flat cells: the nearest rotation is not unique, energy and gradient are bounded."""
    diagonals = [[1, 1, -1], [-1, -1, -1], [1e-6, 1e-6, 1e-6], [1, 0, 0], [1, 1e-4, -1e-4], [0, 0, 0], [2, 1, -1.001]]
    gradients = torch.diag_embed(torch.tensor(diagonals, dtype=torch.float32))[None].requires_grad_()
    energy = rigidity_energy(gradients, torch.ones(len(diagonals)))
    energy.sum().backward()
    assert energy.item() < 50 and gradients.grad.abs().max() < 20


def test_rigid_motion_costs_nothing_and_a_stretch_its_square():
    mesh = bcc_mesh(ellipsoid(), PIXEL_SIZE_A, 13.0)
    mesh = TetraMesh(mesh.vertices_A, mesh.cells, np.full(len(mesh.cells), 0.7), mesh.segment)
    tensors = RigidityTensors.from_mesh(mesh)
    rest = torch.as_tensor(mesh.vertices_A, dtype=torch.float32)
    turn = torch.as_tensor(Rotation.from_rotvec([0.3, 2.0, -1.0]).as_matrix(), dtype=torch.float32)
    moved = torch.stack(
        [
            rest @ turn.T + 50.0,
            1.1 * rest @ turn.T,
            rest * torch.tensor([1.1, 1.0, 1.0]),
            rest * torch.tensor([1.0, 1.0, -0.5]),
        ]
    )
    energy = rigidity_energy(deformation_gradients(tensors, moved), tensors.weight)
    expected = 0.7 * np.array([0.0, 3 * 0.1**2, 0.1**2, 1.5**2])  # the last is inverted
    np.testing.assert_allclose(energy, expected, rtol=1e-4, atol=1e-10)


def test_an_inverted_cell_is_driven_back():
    corner = np.vstack([np.zeros(3), 10 * np.eye(3)])
    mesh = TetraMesh(corner, np.array([[0, 1, 2, 3]], np.int32), np.ones(1), np.zeros(1, np.int32))
    tensors = RigidityTensors.from_mesh(mesh)
    vertices = torch.as_tensor(corner, dtype=torch.float32)[None].clone()
    vertices[0, 3, 2] = -2.0  # pushed through the opposite face
    for _ in range(200):
        vertices = vertices.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(
            rigidity_energy(deformation_gradients(tensors, vertices), tensors.weight).sum(), vertices
        )
        vertices = vertices - 5.0 * gradient
    final = deformation_gradients(tensors, vertices.detach())
    assert torch.det(final).item() == pytest.approx(1.0, abs=0.01)


def test_rigidity_weights_follow_the_density():
    mask = ellipsoid(32, (13, 13, 13))
    axis = np.arange(32) - 16
    density = np.broadcast_to(np.clip(axis, 0, 8).astype(np.float32), mask.shape).copy()  # rises along x > 0
    mesh = bcc_mesh(mask, PIXEL_SIZE_A, 15.0)
    voxels = voxelise(mesh, mask, PIXEL_SIZE_A)
    weight = density_rigidity(voxels, density, min_rigidity_weight=0.4)
    x_px = mesh.vertices_A[mesh.cells].mean(1)[:, 0] / PIXEL_SIZE_A
    np.testing.assert_allclose(weight[x_px < -6], 0.4)
    np.testing.assert_allclose(weight[x_px > 11], 1.0, atol=0.02)
    middle = (x_px > 2) & (x_px < 6)
    np.testing.assert_allclose(weight[middle], 0.4 + 0.6 * x_px[middle] / 8, atol=0.12)
    stiff = density_rigidity(voxels, density, 0.4, stiffen_low_density=True)
    assert set(np.unique(stiff[(x_px > 2.0) & (x_px < 3.2)])) == {3.0}
    np.testing.assert_array_equal(stiff[x_px < -6], weight[x_px < -6])


@pytest.fixture(scope="module")
def bar() -> TetraMesh:
    return bcc_mesh(brick(40, (32, 6, 6), (-16, -3, -3)), PIXEL_SIZE_A, 9.0)


def test_modes_are_orthonormal_and_free_of_rigid_motion(bar):
    stiffness, modes = elastic_modes(bar, 20)
    mass = vertex_masses(bar)
    assert mass.sum() == pytest.approx(1.0)
    gram = np.einsum("avi,bvi,v->ab", modes, modes, mass)
    np.testing.assert_allclose(gram, np.eye(20), atol=1e-9)
    overlap = np.einsum("avi,bvi,v->ab", modes, rigid_motions(bar.vertices_A, mass), mass)
    assert np.abs(overlap).max() < 1e-7
    assert (stiffness > 0).all() and (np.diff(stiffness) >= -1e-12).all()


def test_stiffness_is_the_rigidity_energy_of_a_small_motion(bar):
    stiffness, modes = elastic_modes(bar, 6)
    tensors = RigidityTensors.from_mesh(bar, dtype=torch.float64)
    step_A = 1e-4
    moved = torch.as_tensor(bar.vertices_A + step_A * modes)
    energy = rigidity_energy(deformation_gradients(tensors, moved), tensors.weight) / step_A**2
    np.testing.assert_allclose(energy, stiffness, rtol=1e-3)


def test_lowest_modes_of_a_bar_are_its_two_bendings(bar):
    """Sideways motion that is an even function of x with two nodes: ends one way, middle the other."""
    stiffness, modes = elastic_modes(bar, 4)
    x = bar.vertices_A[:, 0]
    for mode in modes[:2]:
        power = (mode**2).sum(0)
        assert power[0] < 0.25 * power[1:].sum()
        direction = mode[np.abs(x).argmax()] * [0, 1, 1]
        sideways = mode @ (direction / np.linalg.norm(direction))
        ends, middle = sideways[np.abs(x) > 40], sideways[np.abs(x) < 12]
        assert np.sign(ends).min() == np.sign(ends).max() == -np.sign(middle).min() == -np.sign(middle).max()
    assert stiffness[1] < 1.5 * stiffness[0] < 0.5 * stiffness[2]


def test_modes_are_reproducible(bar):
    first, second = elastic_modes(bar, 10), elastic_modes(bar, 10)
    np.testing.assert_array_equal(first[1], second[1])
    assert (
        np.take_along_axis(first[1].reshape(10, -1), np.abs(first[1]).reshape(10, -1).argmax(1)[:, None], 1) > 0
    ).all()


@pytest.mark.parametrize("parted", [False, True])
def test_modes_of_large_meshes_are_found_among_smooth_fields(parted):
    """Never softer than the true modes, the softest nearly they; what costs nothing comes first and only once."""
    mask = brick(40, (32, 12, 12), (-16, -6, -6))
    if parted:
        mask[:, :, 19:21] = False
    mesh = bcc_mesh(mask, PIXEL_SIZE_A, 6.0)
    true_stiffness, true_modes = elastic_modes(mesh, 60)
    stiffness, modes = elastic_modes(mesh, 60, smooth_above=1000)
    assert 3 * len(mesh.vertices_A) > 4000 and len(stiffness) == 60
    mass = vertex_masses(mesh)
    np.testing.assert_allclose(np.einsum("avi,bvi,v->ab", modes, modes, mass), np.eye(60), atol=1e-7)
    costly = slice(6, None) if parted else slice(None)
    tensors = RigidityTensors.from_mesh(mesh, dtype=torch.float64)
    moved = torch.as_tensor(mesh.vertices_A + 1e-4 * modes[costly])
    energy = rigidity_energy(deformation_gradients(tensors, moved), tensors.weight) / 1e-8
    np.testing.assert_allclose(energy, stiffness[costly], rtol=1e-3)
    ratio = stiffness[costly] / true_stiffness[costly]
    assert (ratio > 1 - 1e-6).all() and ratio[:6].max() < 1.5
    overlap = np.einsum("avi,bvi,v->ab", true_modes[:12], modes, mass)
    assert (overlap**2).sum(1).min() > 0.95


def test_dense_and_sparse_factors_give_the_same_modes(monkeypatch):
    mesh = bcc_mesh(brick(40, (24, 12, 12), (-12, -6, -6)), PIXEL_SIZE_A, 8.0)
    assert elastic._DENSE_BELOW < 3 * len(mesh.vertices_A) < elastic._DENSE_FACTOR
    dense = elastic_modes(mesh, 40)
    monkeypatch.setattr(elastic, "_DENSE_FACTOR", 0)
    for ours, theirs in zip(elastic_modes(mesh, 40), dense, strict=True):
        np.testing.assert_allclose(ours[:20], theirs[:20], rtol=1e-5, atol=1e-4 * np.abs(theirs).max())


def test_separate_bodies_move_against_each_other_first():
    mask = brick(40, (10, 10, 10), (-18, -5, -5)) | brick(40, (8, 12, 8), (6, -6, -4))
    mesh = bcc_mesh(mask, PIXEL_SIZE_A, 10.0)
    stiffness, modes = elastic_modes(mesh, 12)
    mass = vertex_masses(mesh)
    gram = np.einsum("avi,bvi,v->ab", modes, modes, mass)
    np.testing.assert_allclose(gram, np.eye(12), atol=1e-9)
    assert (stiffness > 0).all()
    left = mesh.vertices_A[:, 0] < 0
    for part in (left, ~left):  # each of the first six is rigid in each body
        rigid = rigid_motions(mesh.vertices_A[part], mass[part])
        inside = np.einsum("avi,bvi,v->ab", modes[:6, part], rigid, mass[part])
        norm = np.einsum("avi,avi,v->a", modes[:6, part], modes[:6, part], mass[part])
        np.testing.assert_allclose((inside**2).sum(1), norm, atol=1e-9)
    assert np.abs(np.einsum("avi,bvi,v->ab", modes, rigid_motions(mesh.vertices_A, mass), mass)).max() < 1e-7


def test_a_loose_cell_makes_no_mode(bar):
    """A cell joined by one vertex can turn about it at no cost: such motions are not modes."""
    top = bar.vertices_A[:, 0].argmax()
    extra = bar.vertices_A[top] + np.array([[6.0, 0, 0], [6, 6, 0], [6, 0, 6]])
    cell = np.array([[top, *range(len(bar.vertices_A), len(bar.vertices_A) + 3)]], np.int32)
    loose = TetraMesh(
        np.vstack([bar.vertices_A, extra]),
        np.vstack([bar.cells, cell]),
        np.ones(len(bar.cells) + 1),
        np.zeros(len(bar.cells) + 1, np.int32),
    )
    assert loose.cell_volumes_A3().min() > 0
    stiffness, modes = elastic_modes(loose, 5)
    np.testing.assert_allclose(stiffness, elastic_modes(bar, 5)[0], rtol=0.1)
    assert np.abs(modes).max() < 10


def test_mesh_file_reads_back(tmp_path):
    mesh = bcc_mesh(ellipsoid(), PIXEL_SIZE_A, 20.0)
    number = np.arange(len(mesh.cells))
    mesh = TetraMesh(mesh.vertices_A, mesh.cells, 0.5 + number / 1e4, (number % 3).astype(np.int32))
    write_mesh(tmp_path / "mesh.vtu", mesh)
    back = read_mesh(tmp_path / "mesh.vtu")
    for name in ("vertices_A", "cells", "rigidity", "segment"):
        np.testing.assert_array_equal(getattr(back, name), getattr(mesh, name))
        assert getattr(back, name).dtype == getattr(mesh, name).dtype
    assert set(meshio.read(tmp_path / "mesh.vtu").cell_data) == {"rigidity", "segment"}
    (tmp_path / "bad.vtu").write_text("nothing")
    with pytest.raises(InputError, match=r"bad\.vtu"):
        read_mesh(tmp_path / "bad.vtu")


def prepared_maps(folder, box: int = 32) -> np.ndarray:
    mask = soft_edge(ellipsoid(box, (10, 7, 5)), PIXEL_SIZE_A, 2.0, 6.0)
    like = Map(mask, PIXEL_SIZE_A, (-48.0, -48.0, -40.0))
    write_map(folder / "consensus.mrc", mask * 5, PIXEL_SIZE_A, like=like)
    write_map(folder / "mask.mrc", mask, PIXEL_SIZE_A, like=like)
    return mask


def test_stage_writes_mesh_index_map_and_quality(tmp_path):
    mask = prepared_maps(tmp_path)
    build_mesh(tmp_path, tmp_path / "out", MeshSettings(cells=8))
    mesh = read_mesh(tmp_path / "out" / "mesh.vtu")
    assert 0.5 <= mesh.rigidity.min() < mesh.rigidity.max() == 1.0
    np.testing.assert_allclose(mesh.cell_volumes_A3(), (32 * PIXEL_SIZE_A / 8) ** 3 / 12)
    index = read_map(tmp_path / "out" / "tetra_index.mrc")
    assert np.array_equal(index.data >= 0, mask > 0)
    assert index.data.max() < len(mesh.cells)
    assert index.pixel_size_A == pytest.approx(PIXEL_SIZE_A) and index.origin_A == (-48.0, -48.0, -40.0)
    quality = json.loads((tmp_path / "out" / "mesh_quality.json").read_text())
    assert quality["num_cells"] == len(mesh.cells) and quality["num_voxels"] == (mask > 0).sum()
    assert quality["uncovered_voxels"] == 0


@pytest.mark.parametrize(
    "settings",
    [MeshSettings(connections="0>1"), MeshSettings(rigid_segments=(1,)), MeshSettings(cells=0)],
)
def test_stage_refuses_what_it_cannot_do(tmp_path, settings):
    prepared_maps(tmp_path)
    with pytest.raises(InputError, match="mesh"):
        build_mesh(tmp_path, tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()


def test_fused_rigidity_kernel_equals_plain_torch():
    """Energy and vertex gradient of the CPU kernel against float64 torch, inverted cells included; any thread count."""
    mesh = bcc_mesh(np.ones((12, 12, 12), bool), 4.0, 12.0)
    rng = np.random.default_rng(4)
    moved = mesh.vertices_A[None] * np.array([1.0, 0.8, -0.5])[:, None, None] + rng.normal(
        0, 2.0, (3, *mesh.vertices_A.shape)
    )
    results = []
    for threads, dtype in ((1, torch.float32), (2, torch.float32), (1, torch.float64)):
        torch.set_num_threads(threads)
        vertices = torch.tensor(moved, dtype=dtype, requires_grad=True)
        energy = mesh_rigidity(RigidityTensors.from_mesh(mesh, dtype=dtype), vertices)
        energy.sum().backward()
        results.append((energy.detach(), vertices.grad))
    (energy, gradient), (energy_2, gradient_2), (exact, exact_gradient) = results
    assert torch.equal(energy, energy_2)
    assert torch.equal(gradient, gradient_2)
    assert (energy - exact).abs().max() < 1e-4 * exact.abs().max()
    assert (gradient - exact_gradient).norm() < 1e-3 * exact_gradient.norm()
