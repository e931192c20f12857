"""Segments of the mask: files, growing, connections, sub-meshes that join or part, their free motions, weights."""

from __future__ import annotations

import h5py
import mrcfile
import numpy as np
import pytest
import torch

from flexlib.errors import InputError
from flexlib.imaging.maps import LabelGrid, Map, read_label_map, read_map, write_label_map, write_map
from flexlib.layout import MeshFolder, ParticlesFolder
from flexlib.mesh.build import build_mesh, count_bodies, make_mesh
from flexlib.mesh.lattice import bcc_mesh
from flexlib.mesh.segments import (
    SOLVENT,
    Segmentation,
    fill_box,
    labels_on_grid,
    load_segmentation,
    read_segments,
    touching_pairs,
)
from flexlib.mesh.weights import RIGID_SEGMENT_WEIGHT
from flexlib.tetra.elastic import elastic_modes, free_motions, rigid_motions, vertex_masses
from flexlib.tetra.io import read_mesh, write_mesh
from flexlib.tetra.rigidity import RigidityTensors, mesh_rigidity
from flexlib.tetra.tetmesh import TetraMesh, boundary_faces
from flexlib.tetra.voxels import voxelise
from flexlib.train.run import run_identity
from flexlib.workflow_support.connections import parse_connections
from flexlib.workflow_support.settings import MeshSettings, TrainSettings

BOX, PIXEL_SIZE_A = 40, 3.0
AXIS = np.arange(BOX) - BOX // 2
Z, Y, X = np.meshgrid(AXIS, AXIS, AXIS, indexing="ij")
MASK = (X / 15) ** 2 + (Y / 9) ** 2 + (Z / 9) ** 2 <= 1
THIRDS = np.where(X < -5, 0, np.where(X < 5, 1, 2)).astype(np.int32)  # three slabs along x


def segmented(pairs=(), labels=THIRDS) -> Segmentation:
    return Segmentation(labels, tuple(int(one) for one in np.unique(labels[MASK])), tuple(pairs))


def positions_A(voxels, vertices_A: np.ndarray) -> np.ndarray:
    return np.einsum("nk,nki->ni", voxels.bary.astype(float), vertices_A[voxels.cells[voxels.cell]])


def true_positions_A(voxels) -> np.ndarray:
    zyx = np.stack(np.unravel_index(voxels.index, (voxels.box,) * 3), axis=1)
    return (zyx[:, ::-1] - voxels.box // 2) * voxels.pixel_size_A


# sub-meshes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", [(), ((0, 1),), ((1, 0), (1, 2))])
@pytest.mark.parametrize("cell_size_A", [6.0, 13.0])
def test_every_voxel_has_a_cell_of_its_own_segment_that_reproduces_its_position(pairs, cell_size_A):
    mesh = bcc_mesh(MASK, PIXEL_SIZE_A, cell_size_A, segmented(pairs))
    voxels = voxelise(mesh, MASK, PIXEL_SIZE_A)
    assert np.array_equal(np.sort(voxels.index), np.flatnonzero(MASK))
    assert np.array_equal(mesh.segment[voxels.cell], THIRDS.ravel()[voxels.index])
    assert voxels.bary.min() > -1e-6
    true = true_positions_A(voxels)
    assert np.abs(positions_A(voxels, mesh.vertices_A) - true).max() < 1e-5 * PIXEL_SIZE_A
    matrix = np.eye(3) + np.random.default_rng(0).normal(0, 0.3, (3, 3))
    moved = positions_A(voxels, mesh.vertices_A @ matrix.T + [1.0, -2.0, 3.0])
    assert np.abs(moved - (true @ matrix.T + [1.0, -2.0, 3.0])).max() < 3e-5 * PIXEL_SIZE_A
    assert count_bodies(mesh) == 3 - len(pairs)


def test_other_boxes_keep_the_segments():
    """Voxels of a finer grid take the segment of the nearest labelled voxel, and a cell of it."""
    mesh = bcc_mesh(MASK, PIXEL_SIZE_A, 13.0, segmented())
    fine = np.kron(MASK, np.ones((2, 2, 2), bool))
    voxels = voxelise(mesh, fine, PIXEL_SIZE_A / 2)
    assert len(voxels) == fine.sum()
    true = true_positions_A(voxels)
    segment = mesh.segment[voxels.cell]
    assert (segment[true[:, 0] < -5.6 * PIXEL_SIZE_A] == 0).all()
    assert (segment[true[:, 0] > 4.6 * PIXEL_SIZE_A] == 2).all()
    assert np.abs(positions_A(voxels, mesh.vertices_A) - true).max() < 1e-4


def gap_A(mesh: TetraMesh, moved_A: np.ndarray, left: int, right: int) -> float:
    """Largest jump of the displacement between voxels side by side in two segments, beyond what its slope explains.

    The displacement of a point is the same whichever segment's cells extrapolate to it, if the field is continuous.
    """
    displacement = moved_A - mesh.vertices_A
    at_boundary = MASK & (left == THIRDS) & (np.roll(THIRDS, -1, axis=2) == right) & np.roll(MASK, -1, axis=2)
    values = []
    for segment in (left, right):
        only = TetraMesh(
            mesh.vertices_A, mesh.cells[mesh.segment == segment], mesh.rigidity[mesh.segment == segment],
            mesh.segment[mesh.segment == segment],
        )  # fmt: skip
        voxels = voxelise(only, at_boundary, PIXEL_SIZE_A)
        inside = voxels.bary.min(1) > -1e-6
        order = np.argsort(voxels.index)
        values.append((positions_A(voxels, displacement)[order], inside[order]))
    both = values[0][1] & values[1][1]
    assert both.sum() > 20
    return float(np.abs(values[0][0] - values[1][0])[both].max())


def test_the_field_is_continuous_where_joined_and_free_where_not():
    """Joined: one value at the boundary from either side. Parted: a motion of one leaves the other untouched."""
    mesh = bcc_mesh(MASK, PIXEL_SIZE_A, 13.0, segmented([(0, 1)]))
    moved = mesh.vertices_A + np.random.default_rng(1).normal(0, 2.0, mesh.vertices_A.shape)
    assert gap_A(mesh, moved, 0, 1) < 1e-4
    assert gap_A(mesh, moved, 1, 2) > 0.5
    free = np.setdiff1d(mesh.cells[mesh.segment == 2], mesh.cells[mesh.segment < 2])
    assert np.array_equal(free, np.unique(mesh.cells[mesh.segment == 2]))  # not one vertex in common
    slid = mesh.vertices_A.copy()
    slid[free] += [0.0, 7.0, 0.0]
    voxels = voxelise(mesh, MASK, PIXEL_SIZE_A)
    shift = positions_A(voxels, slid) - positions_A(voxels, mesh.vertices_A)
    expected = np.where(THIRDS.ravel()[voxels.index] == 2, 7.0, 0.0)
    np.testing.assert_allclose(shift[:, 1], expected, atol=1e-4)
    tensors = RigidityTensors.from_mesh(mesh)
    energy = mesh_rigidity(tensors, torch.as_tensor(slid[None], dtype=torch.float32))
    assert energy.item() < 1e-9  # sliding past a neighbour costs nothing


def test_fully_joined_segments_move_as_the_plain_mesh():
    """Every field of the plain mesh is one of the joined mesh, and no others: same points, same motion of voxels."""
    plain = bcc_mesh(MASK, PIXEL_SIZE_A, 13.0)
    joined = bcc_mesh(MASK, PIXEL_SIZE_A, 13.0, segmented([(0, 1), (1, 2)]))
    assert {tuple(v) for v in plain.vertices_A.round(6)} == {tuple(v) for v in joined.vertices_A.round(6)}
    assert len(joined.vertices_A) == len(plain.vertices_A)

    def bent(mesh):
        return mesh.vertices_A + np.sin(mesh.vertices_A[:, [1, 2, 0]] / 11.0)

    first, second = (voxelise(mesh, MASK, PIXEL_SIZE_A) for mesh in (plain, joined))
    a = positions_A(first, bent(plain))[np.argsort(first.index)]
    b = positions_A(second, bent(joined))[np.argsort(second.index)]
    np.testing.assert_allclose(a, b, atol=1e-4)


# free motions --------------------------------------------------------------------------------------------------


def test_parted_segments_slide_in_the_basis_at_no_cost():
    """Six motions per body beyond the first; the relative slide of two segments lies in their span."""
    mesh = bcc_mesh(MASK, PIXEL_SIZE_A, 13.0, segmented([(0, 1)]))
    mass = vertex_masses(mesh)
    free = free_motions(mesh, mass)
    assert len(free) == 6
    values, modes = elastic_modes(mesh, 30)
    np.testing.assert_allclose(np.einsum("avi,bvi,v->ab", modes, modes, mass), np.eye(30), atol=1e-7)
    assert values[0] == values[5] == values[6] > 0
    overlap = np.einsum("avi,bvi,v->ab", modes[:6], free, mass)
    np.testing.assert_allclose(np.linalg.svd(overlap, compute_uv=False), 1.0, atol=1e-7)
    slide = np.zeros_like(mesh.vertices_A)
    slide[np.unique(mesh.cells[mesh.segment == 2])] = [0.0, 1.0, 0.3]
    basis = np.concatenate([rigid_motions(mesh.vertices_A, mass), modes[:6]])
    coefficient = np.einsum("vi,avi,v->a", slide, basis, mass)
    np.testing.assert_allclose(np.einsum("a,avi->vi", coefficient, basis), slide, atol=1e-7)
    tensors = RigidityTensors.from_mesh(mesh, dtype=torch.float64)
    energy = mesh_rigidity(tensors, torch.as_tensor(mesh.vertices_A + 1e-3 * modes[:7])) / 1e-6
    assert energy[:6].max() < 1e-4 * energy[6]


@pytest.mark.parametrize(("shared", "expected"), [(0, 6), (1, 3), (2, 1), (3, 0)])
def test_free_motions_of_two_cells_are_those_of_their_joint(shared, expected):
    """Two tetrahedra apart, at a vertex, an edge and a face: 6, 3, 1 and 0 motions without strain."""
    first = np.array([[0.0, 0, 0], [10, 0, 0], [0, 10, 0], [0, 0, 10]])
    second = np.array([[0.0, 0, 0], [10, 0, 0], [0, 10, 0], [3, 3, -9]]) + ([0, 0, -3] if shared == 0 else [0, 0, 0])
    own = [4, 5, 6, 7]
    keep = list(range(shared)) + own[shared:]
    if shared == 1:  # so that only the first vertex coincides
        second = second * [[1], [-1], [-1], [1]]
    if shared == 2:
        second = second * [[1, 1, 1], [1, 1, 1], [1, -1, 1], [1, 1, 1]]
    points = np.concatenate([first, second])
    used, cells = np.unique([[0, 1, 2, 3], keep], return_inverse=True)
    cells = cells.reshape(2, 4)
    points = points[used]
    edges = points[cells[:, 1:]] - points[cells[:, :1]]
    for cell in np.flatnonzero(np.linalg.det(edges) < 0):
        cells[cell, 2:] = cells[cell, 3:1:-1]
    mesh = TetraMesh(points, cells.astype(np.int32), np.ones(2), np.zeros(2, np.int32))
    assert len(free_motions(mesh, vertex_masses(mesh))) == expected


def test_loose_dust_rides_on_the_body_next_to_it():
    body = bcc_mesh(MASK, PIXEL_SIZE_A, 13.0)
    far = body.vertices_A[:, 0].argmax()
    crumb = body.vertices_A[far] + [8.0, 0, 0] + np.array([[0.0, 0, 0], [5, 0, 0], [0, 5, 0], [0, 0, 5]])
    count = len(body.vertices_A)
    mesh = TetraMesh(
        np.vstack([body.vertices_A, crumb]),
        np.vstack([body.cells, [[count, count + 1, count + 2, count + 3]]]).astype(np.int32),
        np.ones(len(body.cells) + 1),
        np.zeros(len(body.cells) + 1, np.int32),
    )
    values, modes = elastic_modes(mesh, 12)
    assert count_bodies(mesh) == 2 and len(free_motions(mesh, vertex_masses(mesh))) == 0
    near = np.linalg.norm(body.vertices_A - crumb.mean(0), axis=1).argmin()
    np.testing.assert_allclose(modes[:, count:], np.repeat(modes[:, [near]], 4, axis=1), atol=1e-9)
    np.testing.assert_allclose(values, elastic_modes(body, 12)[0], rtol=0.02)


# connections ---------------------------------------------------------------------------------------------------


def test_connections_are_read_root_first():
    assert parse_connections("0>3, 0>4,3>2", (0, 2, 3, 4)) == ((0, 3), (0, 4), (3, 2))
    assert parse_connections("948>947", (947, 948)) == ((948, 947),)
    assert parse_connections("2>1, 0", (0, 1, 2)) == ((2, 1),)
    assert parse_connections("0, 1", (0, 1)) == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0>1, 1>2, 2>0", "segment 0 is joined already, this closes a cycle"),
        ("0>1, 0>2, 1>2", "segment 2 is joined already"),
        ("0>7, 0>1, 0>2", "unknown segment 7; the segmentation has 0, 1, 2"),
        ("0>1", "segment 2 is not reached from the root"),
        ("1>2, 0>1", "segment 0 is not reached by what stands before"),
        ("0>1; 1>2", "'0>1; 1>2' is not understood"),
        ("0>1, 1", "segment 1 is a root, but is reached already"),
        ("0>0", "segment 0 is joined already"),
    ],
)
def test_bad_connections_are_named(text, message):
    with pytest.raises(InputError, match=message) as error:
        parse_connections(text, (0, 1, 2))
    assert "\n" not in str(error.value)


# files ---------------------------------------------------------------------------------------------------------


def write_labels(path, labels, voxel_A=PIXEL_SIZE_A, origin_A=(0.0, 0.0, 0.0), dtype=np.int16):
    with mrcfile.new(path, overwrite=True) as file:
        file.set_data(np.ascontiguousarray(labels, dtype=dtype))
        file.voxel_size = voxel_A
        for axis, value in zip("xyz", origin_A, strict=True):
            file.header.origin[axis] = value


def write_segger(path, mask, parents: dict[int, int], voxel_A=PIXEL_SIZE_A, origin_A=(0.0, 0.0, 0.0)):
    """A file as Segger writes it (format version 2)."""
    with h5py.File(path, "w") as file:
        file.attrs["format"], file.attrs["format_version"] = np.bytes_("segger"), 2
        file.attrs["map_size"] = np.array(mask.shape[::-1], np.int32)
        transform = np.column_stack([voxel_A * np.eye(3), origin_A])
        file.attrs["ijk_to_xyz_transform"] = transform.astype(np.float32)
        file.create_dataset("mask", data=mask.astype(np.uint32), compression="gzip")
        file["region_ids"] = np.array(list(parents), np.int32)
        file["parent_ids"] = np.array(list(parents.values()), np.int32)


def consensus(origin_A=(0.0, 0.0, 0.0), box=BOX) -> Map:
    return Map(np.zeros((box,) * 3, np.float32), PIXEL_SIZE_A * BOX / box, origin_A)


def test_segger_regions_are_followed_to_their_roots(tmp_path):
    """Leaves 1 and 2 belong to 4, which belongs to 948; 3 is its own root. 0 is solvent."""
    leaves = np.where(MASK, np.where(X < -5, 1, np.where(X < 5, 2, 3)), 0)
    write_segger(tmp_path / "s.seg", leaves, {1: 4, 2: 4, 4: 948, 948: 0, 3: 0})
    labels = read_segments(tmp_path / "s.seg").labels
    assert np.array_equal(labels, np.where(MASK, np.where(X < 5, 948, 3), SOLVENT))
    loaded = load_segmentation(tmp_path / "s.seg", consensus(), MASK, "948>3")
    assert loaded.ids == (3, 948) and loaded.pairs == ((948, 3),)


def test_bad_segger_files_are_refused(tmp_path):
    leaves = np.where(MASK, 1, 0)
    write_segger(tmp_path / "loop.seg", leaves, {1: 2, 2: 1})
    with pytest.raises(InputError, match="circle"):
        read_segments(tmp_path / "loop.seg")
    write_segger(tmp_path / "stray.seg", leaves * 5, {1: 0})
    with pytest.raises(InputError, match="region 5"):
        read_segments(tmp_path / "stray.seg")
    (tmp_path / "text.seg").write_text("nothing")
    with pytest.raises(InputError, match=r"text\.seg"):
        read_segments(tmp_path / "text.seg")
    with h5py.File(tmp_path / "other.seg", "w") as file:
        file["mask"] = leaves
    with pytest.raises(InputError, match=r"other\.seg: not a Segger"):
        read_segments(tmp_path / "other.seg")


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.float16, np.float32])
def test_label_maps_with_either_solvent(tmp_path, dtype):
    write_labels(tmp_path / "negative.mrc", np.where(MASK, THIRDS, -1), dtype=dtype)
    assert np.array_equal(read_segments(tmp_path / "negative.mrc").labels, np.where(MASK, THIRDS, SOLVENT))
    write_labels(tmp_path / "zero.mrc", np.where(MASK, THIRDS + 1, 0), dtype=dtype)
    assert np.array_equal(read_segments(tmp_path / "zero.mrc").labels, np.where(MASK, THIRDS + 1, SOLVENT))


def test_a_density_map_is_no_segmentation(tmp_path):
    write_map(tmp_path / "density.mrc", np.random.default_rng(0).normal(size=(16, 16, 16)), 2.0)
    with pytest.raises(InputError, match=r"density\.mrc: labels are whole numbers"):
        read_segments(tmp_path / "density.mrc")


@pytest.mark.parametrize("box", [20, 40, 80])
def test_labels_at_any_box_land_on_the_right_voxels(box):
    """A plane at x = 0 A, in labels of other sampling, cuts the consensus grid within half a coarse voxel of there."""
    voxel_A = PIXEL_SIZE_A * BOX / box
    x_A = (np.arange(box) - box // 2) * voxel_A
    labels = np.broadcast_to((x_A >= 0).astype(np.int32), (box,) * 3)
    on_grid = labels_on_grid(LabelGrid(labels, (voxel_A,) * 3, (0.0, 0.0, 0.0)), consensus())
    cut_A = AXIS[np.argmax(on_grid[5, 5])] * PIXEL_SIZE_A
    assert abs(cut_A) <= 0.5 * voxel_A + 1e-9
    assert (on_grid[1:-1, 1:-1, 1:-1] >= 0).all()


def test_labels_of_a_cropped_or_shifted_map_follow_its_origin(tmp_path):
    """A box cut out of the labels, its position in ORIGIN, gives the same labels; a lost origin of the same box too."""
    labels = np.where(MASK, THIRDS, -1).astype(np.int32)
    origin_A = (-30.0, 12.0, 45.0)
    whole = labels_on_grid(LabelGrid(labels, (PIXEL_SIZE_A,) * 3, origin_A), consensus(origin_A))
    assert np.array_equal(whole, labels)
    part = labels[9:31, 10:32, 4:37]
    corner = tuple(o + PIXEL_SIZE_A * s for o, s in zip(origin_A, (4, 10, 9), strict=True))
    cropped = labels_on_grid(LabelGrid(part, (PIXEL_SIZE_A,) * 3, corner), consensus(origin_A))
    inside = np.zeros_like(MASK)
    inside[9:31, 10:32, 4:37] = True
    assert np.array_equal(cropped, np.where(inside, labels, SOLVENT))
    lost = labels_on_grid(LabelGrid(labels, (PIXEL_SIZE_A,) * 3, (0.0, 0.0, 0.0)), consensus(origin_A))
    assert np.array_equal(lost, labels)


def test_coarse_segments_grow_to_fill_the_mask():
    seeds = np.full(MASK.shape, SOLVENT, np.int32)
    seeds[20, 20, 10], seeds[20, 20, 30] = 5, 8
    filled = fill_box(seeds, MASK)
    assert (filled[X < 0] == 5).all() and (filled[X > 0] == 8).all()


def test_crumbs_of_a_segment_go_to_their_neighbours():
    labels = np.where(MASK, THIRDS, SOLVENT).astype(np.int32)
    labels[20, 20, 33] = 0  # a voxel of the left segment at the right end
    assert (fill_box(labels, MASK)[MASK] == THIRDS[MASK]).all()


def test_touching_and_named_pairs(tmp_path):
    assert touching_pairs(THIRDS, MASK) == ((0, 1), (1, 2))
    write_labels(tmp_path / "s.mrc", np.where(MASK, THIRDS, -1))
    assert load_segmentation(tmp_path / "s.mrc", consensus(), MASK, None).pairs == ((0, 1), (1, 2))
    assert load_segmentation(tmp_path / "s.mrc", consensus(), MASK, "1>0, 2").pairs == ((1, 0),)
    with pytest.raises(InputError, match="segments 0 and 2 do not touch"):
        load_segmentation(tmp_path / "s.mrc", consensus(), MASK, "0>2, 2>1")
    with pytest.raises(InputError, match="none of its segments lies in the mask"):
        write_labels(tmp_path / "far.mrc", np.where(MASK, THIRDS, -1), origin_A=(900.0, 0.0, 0.0))
        load_segmentation(tmp_path / "far.mrc", consensus((1.0, 1.0, 1.0)), MASK, None)


def test_mesh_file_keeps_the_segment_map(tmp_path):
    """Labels survive the files, so that voxels of any later box find their segment."""
    mesh = bcc_mesh(MASK, PIXEL_SIZE_A, 13.0, segmented(labels=THIRDS * 40000))
    write_mesh(tmp_path / "mesh.vtu", mesh)
    back = read_mesh(tmp_path / "mesh.vtu")
    assert np.array_equal(back.segment_map, THIRDS * 40000) and back.segment_map_pixel_size_A == PIXEL_SIZE_A
    assert back.segment_map.dtype == mesh.segment_map.dtype == np.int32
    first, second = (voxelise(one, MASK, PIXEL_SIZE_A) for one in (mesh, back))
    assert np.array_equal(first.cell, second.cell)
    faces, owner = boundary_faces(back)
    assert len(faces) == len(owner) and set(mesh.segment[owner]) == {0, 40000, 80000}


@pytest.mark.parametrize("pixel_size_A", [0.83, 1.0605, 3.301])
def test_the_segment_map_is_an_integer_mrc_that_keeps_its_voxel_size(tmp_path, pixel_size_A):
    """Of a voxel size from another map's header nothing is lost: ties of finer grids fall as they did."""
    write_map(tmp_path / "map.mrc", MASK, pixel_size_A)
    of_header_A = read_map(tmp_path / "map.mrc").pixel_size_A
    mesh = bcc_mesh(MASK, of_header_A, 4.3 * of_header_A, segmented([(0, 1)]))
    write_mesh(tmp_path / "mesh.vtu", mesh)
    with mrcfile.open(tmp_path / "segments.mrc") as file:
        assert file.data.dtype == np.int16 and np.array_equal(file.data, THIRDS)
    back = read_mesh(tmp_path / "mesh.vtu")
    assert back.segment_map_pixel_size_A == of_header_A and back.segment_map.dtype == np.int16
    fine = [one.segments_on_grid(2 * BOX, of_header_A / 2) for one in (mesh, back)]
    assert np.array_equal(*fine)


def test_a_mesh_without_a_segment_map_leaves_none_of_another(tmp_path):
    write_mesh(tmp_path / "mesh.vtu", bcc_mesh(MASK, PIXEL_SIZE_A, 13.0, segmented()))
    write_mesh(tmp_path / "mesh.vtu", bcc_mesh(MASK, PIXEL_SIZE_A, 13.0))
    back = read_mesh(tmp_path / "mesh.vtu")
    assert back.segment_map.size == 0 and back.segment_map_pixel_size_A == 0
    (tmp_path / "segments.mrc").unlink()  # as beside a mesh of another program
    assert read_mesh(tmp_path / "mesh.vtu").segment_map.size == 0
    write_map(tmp_path / "segments.mrc", np.zeros((8, 4, 4)), PIXEL_SIZE_A, dtype=np.int16)
    with pytest.raises(InputError, match=r"segments\.mrc: the segments of a mesh must be a cube"):
        read_mesh(tmp_path / "mesh.vtu")


def test_a_checkpoint_belongs_to_its_segments(tmp_path):
    folders = (ParticlesFolder(tmp_path), MeshFolder(tmp_path))
    write_mesh(tmp_path / "mesh.vtu", bcc_mesh(MASK, PIXEL_SIZE_A, 13.0, segmented()))
    before = run_identity(*folders, TrainSettings())
    write_label_map(tmp_path / "segments.mrc", np.roll(THIRDS, 1, axis=2), PIXEL_SIZE_A)
    after = run_identity(*folders, TrainSettings())
    assert {name for name in before if before[name] != after[name]} == {"segments.mrc"}


def test_a_segment_number_that_no_mrc_file_holds_is_refused(tmp_path):
    mesh = bcc_mesh(MASK, PIXEL_SIZE_A, 13.0, segmented(labels=THIRDS * 2**24))
    with pytest.raises(InputError, match=r"segments\.mrc: the label 33554432 is above 16777216"):
        write_mesh(tmp_path / "mesh.vtu", mesh)


# weights -------------------------------------------------------------------------------------------------------


def blob() -> Map:
    return Map((MASK * np.exp(-0.5 * (X / 9.0) ** 2)).astype(np.float32), PIXEL_SIZE_A, (-60.0, -60.0, -60.0))


def weights(tmp_path, **settings) -> TetraMesh:
    write_labels(tmp_path / "s.mrc", np.where(MASK, THIRDS, -1))
    chosen = MeshSettings(cells=9, segmentation=tmp_path / "s.mrc", lowpass_A=8.0, **settings)
    return make_mesh(blob(), MASK, chosen)[0]


def test_rigid_segments_and_weights_per_segment(tmp_path):
    plain = weights(tmp_path)
    assert 0.5 <= plain.rigidity.min() < plain.rigidity.max() <= 1.0
    (tmp_path / "w.csv").write_text("segment,weight\n1, 4.5\n2,7\n")
    mesh = weights(tmp_path, rigid_segments=(2,), rigidity_weights=tmp_path / "w.csv")
    np.testing.assert_array_equal(mesh.rigidity[mesh.segment == 0], plain.rigidity[plain.segment == 0])
    assert set(mesh.rigidity[mesh.segment == 1]) == {4.5}
    assert set(mesh.rigidity[mesh.segment == 2]) == {RIGID_SEGMENT_WEIGHT} == {20.0}
    with pytest.raises(InputError, match=r"mesh\.rigid_segments: unknown segment 3; the mesh has 0, 1, 2"):
        weights(tmp_path, rigid_segments=(3,))
    (tmp_path / "w.csv").write_text("segment,weight\n1,-2\n")
    with pytest.raises(InputError, match=r"w\.csv: line 2: the weight must be positive"):
        weights(tmp_path, rigidity_weights=tmp_path / "w.csv")


def test_weights_from_an_array_or_a_map(tmp_path):
    plain = weights(tmp_path)
    own = np.random.default_rng(0).uniform(0.5, 3, len(plain.cells))
    np.save(tmp_path / "w.npy", own)
    np.testing.assert_array_equal(weights(tmp_path, rigidity_weights=tmp_path / "w.npy").rigidity, own)
    np.save(tmp_path / "short.npy", own[:-1])
    with pytest.raises(InputError, match=f"{len(own)} numbers, one per cell"):
        weights(tmp_path, rigidity_weights=tmp_path / "short.npy")
    np.save(tmp_path / "large.npy", np.append(own[:-1].astype(np.longdouble), np.longdouble("1e4000")))
    with pytest.raises(InputError, match=f"weights must be positive; cell {np.argmin(own[:-1])} has"):
        weights(tmp_path, rigidity_weights=tmp_path / "large.npy")
    # a map that rises along x, of another voxel size and with its own origin
    step_A = 2.0
    x_A = (np.arange(80) - 40) * step_A
    ramp = np.broadcast_to(2.0 + x_A / 100, (80,) * 3)
    write_map(tmp_path / "w.mrc", ramp, step_A, like=Map(np.zeros((80,) * 3, np.float32), step_A, (-80.0,) * 3))
    mesh = weights(tmp_path, rigidity_weights=tmp_path / "w.mrc")
    centre = mesh.vertices_A[mesh.cells].mean(1)
    np.testing.assert_allclose(mesh.rigidity, 2.0 + centre[:, 0] / 100, atol=1e-5)


# the stage -----------------------------------------------------------------------------------------------------


def test_stage_builds_a_segmented_mesh(tmp_path, caplog):
    """From prepared maps and a label map at twice the box: files, quality per segment, colours for ChimeraX."""
    like = Map(blob().data, PIXEL_SIZE_A, (-60.0, -60.0, -60.0))
    write_map(tmp_path / "consensus.mrc", like.data, PIXEL_SIZE_A, like=like)
    write_map(tmp_path / "mask.mrc", MASK, PIXEL_SIZE_A, like=like)
    fine = np.kron(np.where(MASK, THIRDS, -1), np.ones((2, 2, 2)))
    # voxel pairs about each coarse voxel: the corner lies a quarter of a coarse voxel before it
    write_labels(tmp_path / "s.mrc", fine, PIXEL_SIZE_A / 2, origin_A=(-60.0 - PIXEL_SIZE_A / 4,) * 3)
    settings = MeshSettings(
        cells=9, segmentation=tmp_path / "s.mrc", connections="1>0, 2", rigid_segments=(1,), lowpass_A=8.0
    )
    with caplog.at_level("INFO"):
        build_mesh(tmp_path, tmp_path / "out", settings)
    mesh = read_mesh(tmp_path / "out" / "mesh.vtu")
    voxels = voxelise(mesh, MASK, PIXEL_SIZE_A)
    assert np.array_equal(mesh.segment[voxels.cell], THIRDS.ravel()[voxels.index])
    assert count_bodies(mesh) == 2 and set(mesh.rigidity[mesh.segment == 1]) == {20.0}
    stored = read_label_map(tmp_path / "out" / "segments.mrc")
    assert np.array_equal(stored.labels[MASK], THIRDS[MASK]) and stored.corner_A == (-60.0, -60.0, -60.0)
    assert "segment 2:" in caplog.text and "rigidity 20 to 20" in caplog.text
    bild = (tmp_path / "out" / "mesh_segments.bild").read_text()
    assert len({line for line in bild.splitlines() if line.startswith(".color")}) == 3
    ends = np.array([line.split()[1:] for line in bild.splitlines() if line.startswith(".vector")], float)
    # in the map's frame, whose first voxel is at -60 A: the box centre is at its origin
    centre = (ends[:, :3].max(0) + ends[:, :3].min(0)) / 2
    assert np.abs(centre).max() < 10 and np.abs(ends).max() > 40
    assert "open ../consensus.mrc id 1" in (tmp_path / "out" / "mesh.cxc").read_text()


def test_connections_without_segments_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"mesh\.connections: there is nothing to connect"):
        build_mesh(tmp_path, tmp_path / "out", MeshSettings(connections="0>1"))
