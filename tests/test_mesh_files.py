"""Meshes from outside: meshio's formats, CryoSPARC's pickle (read without running it), surfaces for TetGen."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import meshio
import numpy as np
import pytest

from flexlib.errors import InputError
from flexlib.imaging.maps import Map, write_map
from flexlib.mesh.build import build_mesh, count_bodies, make_mesh, mesh_quality
from flexlib.mesh.cryosparc import load_arrays, read_flex_mesh, write_flex_mesh
from flexlib.mesh.lattice import bcc_mesh
from flexlib.mesh.segments import Segmentation
from flexlib.mesh.surface import relax, surface_mesh, surface_net
from flexlib.tetra.io import read_mesh, write_mesh
from flexlib.tetra.tetmesh import TetraMesh, boundary_faces
from flexlib.tetra.voxels import tetra_index_map, voxelise
from flexlib.workflow_support.settings import MeshSettings

BOX, PIXEL_SIZE_A = 40, 3.0
AXIS = np.arange(BOX) - BOX // 2
Z, Y, X = np.meshgrid(AXIS, AXIS, AXIS, indexing="ij")
MASK = (X / 15) ** 2 + (Y / 9) ** 2 + (Z / 7) ** 2 <= 1
HALVES = np.where(X < 2, 0, 1).astype(np.int32)
PARTED = Segmentation(HALVES, (0, 1), ())
JOINED = Segmentation(HALVES, (0, 1), ((0, 1),))


def lattice(segmentation=None) -> TetraMesh:
    mesh = bcc_mesh(MASK, PIXEL_SIZE_A, 13.0, segmentation)
    weight = np.random.default_rng(0).uniform(0.5, 2.0, len(mesh.cells)).astype(np.float32).astype(float)
    return TetraMesh(mesh.vertices_A, mesh.cells, weight, mesh.segment, mesh.segment_map, mesh.segment_map_pixel_size_A)


def consensus(origin_A=(0.0, 0.0, 0.0)) -> Map:
    density = MASK * np.exp(-0.5 * (X / 9.0) ** 2)
    return Map(density.astype(np.float32), PIXEL_SIZE_A, origin_A)


def custom(path, origin_A=(0.0, 0.0, 0.0), **settings):
    return make_mesh(consensus(origin_A), MASK, MeshSettings(cells=9, custom=path, lowpass_A=8.0, **settings))


# meshio --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".vtu", ".vtk", ".msh"])
@pytest.mark.parametrize("frame", ["box centre", "header"])
def test_meshes_of_other_programs_come_to_lie_over_the_mask(tmp_path, suffix, frame):
    """Angstrom from the box centre, or in the frame of the map's header: the one that covers the mask."""
    mesh, origin_A = lattice(), (-300.0, 40.0, 0.0)
    shift = np.zeros(3) if frame == "box centre" else np.array(origin_A) + BOX // 2 * PIXEL_SIZE_A
    meshio.write(
        tmp_path / f"m{suffix}", meshio.Mesh(mesh.vertices_A + shift, [("tetra", mesh.cells.astype(np.int64))])
    )
    back, voxels = custom(tmp_path / f"m{suffix}", origin_A)
    np.testing.assert_allclose(back.vertices_A, mesh.vertices_A, atol=1e-4)
    assert np.array_equal(back.cells, mesh.cells) and len(voxels) == MASK.sum()
    assert 0.5 <= back.rigidity.min() < back.rigidity.max() <= 1.0  # from the density: the file has none


def test_own_weights_and_segments_are_kept(tmp_path):
    mesh = lattice(PARTED)
    write_mesh(tmp_path / "own.vtu", mesh)
    back, voxels = custom(tmp_path / "own.vtu")
    np.testing.assert_array_equal(back.rigidity, mesh.rigidity)
    assert np.array_equal(back.segment[voxels.cell], HALVES.ravel()[voxels.index])
    stiff, _ = custom(tmp_path / "own.vtu", rigid_segments=(1,))
    np.testing.assert_array_equal(stiff.rigidity, np.where(mesh.segment == 1, 20.0, mesh.rigidity))
    with pytest.raises(InputError, match=r"mesh\.segmentation: a mesh from a file"):
        (tmp_path / "consensus").mkdir()
        build_mesh(
            tmp_path, tmp_path / "out", MeshSettings(custom=tmp_path / "own.vtu", segmentation=tmp_path / "s.seg")
        )


def test_inside_out_cells_are_turned_and_flat_ones_refused_by_number(tmp_path, caplog):
    mesh = lattice()
    cells = mesh.cells.astype(np.int64).copy()
    cells[::3, :2] = cells[::3, 1::-1]
    extra = np.vstack([mesh.vertices_A, [[500.0, 0, 0]]])  # a vertex without a cell
    meshio.write(tmp_path / "m.vtu", meshio.Mesh(extra, [("tetra", cells)]))
    with caplog.at_level("INFO"):
        back = read_mesh(tmp_path / "m.vtu")
    assert back.cell_volumes_A3().min() > 0 and len(back.vertices_A) == len(mesh.vertices_A)
    assert f"{len(cells[::3])} cells were inside out" in caplog.text and "1 vertices without a cell" in caplog.text
    assert np.array_equal(np.sort(back.cells, axis=1), np.sort(mesh.cells, axis=1))
    cells[17, 3] = cells[17, 2]
    meshio.write(tmp_path / "flat.vtu", meshio.Mesh(mesh.vertices_A, [("tetra", cells)]))
    with pytest.raises(InputError, match=r"flat\.vtu: cell 17 has no volume"):
        read_mesh(tmp_path / "flat.vtu")


def test_a_mesh_of_something_else_is_refused_and_gaps_are_reported(tmp_path):
    mesh = lattice()
    nanometre = TetraMesh(mesh.vertices_A / 10, mesh.cells, mesh.rigidity, mesh.segment)
    write_mesh(tmp_path / "nm.vtu", nanometre)
    with pytest.raises(InputError, match=r"nm\.vtu: covers \d+ % of the mask"):
        custom(tmp_path / "nm.vtu")
    kept = mesh.cells[mesh.vertices_A[mesh.cells].mean(1)[:, 0] < 25]
    write_mesh(
        tmp_path / "cut.vtu", TetraMesh(mesh.vertices_A, kept, np.ones(len(kept)), np.zeros(len(kept), np.int32))
    )
    part, voxels = custom(tmp_path / "cut.vtu")
    quality = mesh_quality(part, voxels)
    holes = MASK.ravel()[voxels.index] & (voxels.bary.min(1) < -1e-5)
    assert 0 < quality["uncovered_voxels"] == holes.sum() < 0.4 * MASK.sum()


@pytest.mark.parametrize("name", ["real tags.msh", "text tags.msh", "ansys.msh", "header.ply"])
def test_files_that_end_before_what_they_promise_are_not_read_for_ever(tmp_path, name):
    mesh = lattice()
    tetra = meshio.Mesh(mesh.vertices_A, [("tetra", mesh.cells.astype(np.int64))])
    meshio.write(tmp_path / name, tetra, {"header.ply": "ply", "ansys.msh": "ansys"}.get(name, "gmsh"))
    content = (tmp_path / name).read_bytes()
    damaged = {
        "real tags.msh": content + b"$ElementData\n0\n1000000000000\n",
        "text tags.msh": content + b"$ElementData\n1000000000000\n",
        "ansys.msh": content + b"(39 (\n",
        "header.ply": content[: content.find(b"end_header")],
    }
    (tmp_path / name).write_bytes(damaged[name])
    with pytest.raises(InputError, match=rf"{name}: not a readable mesh \(truncated or damaged: it ends before what"):
        custom(tmp_path / name)


# CryoSPARC -----------------------------------------------------------------------------------------------------


def test_flex_mesh_round_trip(tmp_path):
    """Written as CryoSPARC's pickle and read back: points, cells, weights, segments, index map."""
    for segmentation in (None, PARTED):
        mesh = lattice(segmentation)
        write_flex_mesh(tmp_path / "m.pkl", mesh, consensus().data, MASK.astype(np.float32), PIXEL_SIZE_A)
        back = read_flex_mesh(tmp_path / "m.pkl")
        np.testing.assert_allclose(back.vertices_A, mesh.vertices_A, atol=1e-4)
        for name in ("cells", "rigidity", "segment"):
            np.testing.assert_array_equal(getattr(back, name), getattr(mesh, name))
        content = load_arrays(tmp_path / "m.pkl")
        ours = tetra_index_map(voxelise(mesh, MASK, PIXEL_SIZE_A))
        assert np.array_equal(content["tm_tetraidx_map"], ours) and content["version"] == 1
        assert set(content) >= {"mask", "mask_soft", "N", "psize_A", "tm_points", "tm_cells", "tm_rweights"}
        again = tetra_index_map(voxelise(back, MASK, PIXEL_SIZE_A))
        assert (again == ours)[MASK].mean() > 0.999
        from_stage, _ = custom(tmp_path / "m.pkl")
        np.testing.assert_array_equal(from_stage.rigidity, mesh.rigidity)


def their_pickle(path, points, cells, index, protocol=4, **extra):
    content = {
        "mask": index >= 0, "mask_soft": (index >= 0).astype(np.float32), "N": BOX, "psize_A": np.float32(PIXEL_SIZE_A),
        "tm_points": points, "tm_cells": cells, "tm_tetraidx_map": index, "tm_rweights": np.ones(len(cells)),
        "version": 1, **extra,
    }  # fmt: skip
    path.write_bytes(pickle.dumps(content, protocol=protocol))


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize(
    ("unit", "axes"),
    [("voxel", "xyz"), ("voxel", "zyx"), ("A", "xyz"), ("box", "xyz"), ("half box", "zyx"), ("corner", "xyz")],
)
def test_units_and_axes_follow_from_the_index_map(tmp_path, unit, axes, protocol):
    """Whatever unit and axis order a pickle's points have, only one makes its index map true; cells may be mirrored."""
    mask = MASK & (Y + Z < 6)  # not symmetric: axes cannot be mistaken
    mesh = bcc_mesh(mask, PIXEL_SIZE_A, 13.0)
    index = tetra_index_map(voxelise(mesh, mask, PIXEL_SIZE_A)).astype(np.int64)
    extent_A = BOX * PIXEL_SIZE_A
    scale = {"voxel": PIXEL_SIZE_A, "A": 1, "box": extent_A, "half box": extent_A / 2, "corner": PIXEL_SIZE_A}[unit]
    points = mesh.vertices_A / scale + (BOX // 2 if unit == "corner" else 0)
    points = points if axes == "xyz" else points[:, ::-1]
    their_pickle(tmp_path / "m.pkl", np.ascontiguousarray(points), mesh.cells, index, protocol)
    back = read_flex_mesh(tmp_path / "m.pkl")
    np.testing.assert_allclose(back.vertices_A, mesh.vertices_A, atol=1e-6)
    assert back.cell_volumes_A3().min() > 0


def test_an_index_map_that_belongs_to_another_mesh_is_refused(tmp_path):
    mesh = lattice()
    index = tetra_index_map(voxelise(mesh, MASK, PIXEL_SIZE_A))
    shuffled = np.random.default_rng(0).permutation(len(mesh.cells))
    their_pickle(tmp_path / "m.pkl", mesh.vertices_A, mesh.cells[shuffled], index)
    with pytest.raises(InputError, match="tm_tetraidx_map and tm_cells disagree"):
        read_flex_mesh(tmp_path / "m.pkl")
    their_pickle(tmp_path / "m.pkl", mesh.vertices_A, mesh.cells, index[:-2])
    with pytest.raises(InputError, match="tm_tetraidx_map must be"):
        read_flex_mesh(tmp_path / "m.pkl")


class _Evil:
    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (os.system, "system"),
        (eval, "builtins.eval"),
        (__import__, "builtins.__import__"),
        (subprocess.Popen, "subprocess.Popen"),
        (np.load, "numpy.load"),
        (np.lib.format.read_array, "read_array"),
        (getattr, "builtins.getattr"),
    ],
)
def test_a_pickle_that_runs_code_is_refused_by_name(tmp_path, call, name):
    """Nothing but arrays is built; what else the file asks for is named and never called."""
    victim = tmp_path / "touched"
    argument = f"touch {victim}" if call is os.system else f"open({str(victim)!r}, 'w')"
    (tmp_path / "m.pkl").write_bytes(pickle.dumps({"mask": _Evil(call, argument)}))
    with pytest.raises(InputError, match=rf"refused: the pickle asks for .*{name.split('.')[-1]}"):
        read_flex_mesh(tmp_path / "m.pkl")
    # the same hidden in an array of objects
    array = np.empty(1, object)
    array[0] = _Evil(call, argument)
    (tmp_path / "m.pkl").write_bytes(pickle.dumps({"mask": array}))
    with pytest.raises(InputError, match="refused"):
        read_flex_mesh(tmp_path / "m.pkl")
    assert not victim.exists()


class _Pointers:
    """An array of objects that are addresses in the file."""

    def __reduce__(self):
        kind = _Reduced(np.dtype, ("O8", False, True), (3, "|", None, None, None, -1, -1, 0))
        state = (1, (4,), kind, False, b"A" * 32)
        return np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), state


class _Reduced:
    def __init__(self, *parts):
        self.parts = parts

    def __reduce__(self):
        return self.parts


def test_bytes_of_a_pickle_are_never_taken_for_addresses(tmp_path):
    """numpy would follow them: the process would end (SIGSEGV)."""
    for value in (_Pointers(), [_Pointers()]):
        (tmp_path / "m.pkl").write_bytes(pickle.dumps({"N": value}))
        with pytest.raises(InputError, match=r"m\.pkl: not a readable pickle \(cannot create an OBJECT array"):
            load_arrays(tmp_path / "m.pkl")


def test_other_pickles_are_refused_in_one_line(tmp_path):
    for content, message in (([1, 2], "holds a list"), ({"mask": np.zeros(3)}, "no 'N' in this pickle")):
        (tmp_path / "m.pkl").write_bytes(pickle.dumps(content))
        with pytest.raises(InputError, match=message):
            read_flex_mesh(tmp_path / "m.pkl")
    (tmp_path / "m.pkl").write_bytes(b"not a pickle")
    with pytest.raises(InputError, match=r"m\.pkl: not a readable pickle"):
        read_flex_mesh(tmp_path / "m.pkl")


def test_command_line_writes_the_pickle(tmp_path):
    write_map(tmp_path / "consensus.mrc", consensus().data, PIXEL_SIZE_A)
    write_map(tmp_path / "mask.mrc", MASK, PIXEL_SIZE_A)
    build_mesh(tmp_path, tmp_path / "mesh", MeshSettings(cells=9))
    out = tmp_path / "out.pkl"
    command = [sys.executable, "-m", "flexlib.mesh.cryosparc", str(tmp_path / "mesh"), str(tmp_path), str(out)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == str(out)
    assert len(read_flex_mesh(out).cells) == len(read_mesh(tmp_path / "mesh" / "mesh.vtu").cells)


# surfaces ------------------------------------------------------------------------------------------------------


def test_surface_net_of_a_brick_is_its_surface():
    """A closed net around the labelled points; relaxed points stay within their cubes."""
    grid = np.full((6, 7, 8), -1)
    grid[2:4, 2:5, 2:6] = 0
    points, quads = surface_net(grid)
    assert len(quads) == 2 * (2 * 3 + 2 * 4 + 3 * 4) and len(points) == 3 * 4 * 5 - 1 * 2 * 3
    edges = np.sort(np.concatenate([quads[:, [k, (k + 1) % 4]] for k in range(4)]), axis=1)
    assert set(np.unique(edges, axis=0, return_counts=True)[1]) == {2}
    assert np.abs(relax(points, quads, 0.8) - points).max() <= 0.4 + 1e-12
    assert points.min(0).tolist() == [1.5, 1.5, 1.5] and points.max(0).tolist() == [5.5, 4.5, 3.5]


@pytest.mark.parametrize("segmentation", [None, PARTED, JOINED], ids=["one", "parted", "joined"])
def test_surface_meshes_follow_the_segments_and_join_where_named(segmentation):
    mesh = surface_mesh(MASK, PIXEL_SIZE_A, 12.0, segmentation)
    voxels = voxelise(mesh, MASK, PIXEL_SIZE_A)
    assert count_bodies(mesh) == (2 if segmentation is PARTED else 1)
    assert len(mesh.cells) == len(mesh.rigidity) == len(mesh.segment)
    assert mesh.cell_volumes_A3().min() > 0 and np.array_equal(np.sort(voxels.index), np.flatnonzero(MASK))
    zyx = np.stack(np.unravel_index(voxels.index, MASK.shape), axis=1)[:, ::-1] - BOX // 2
    mixed = np.einsum("nk,nki->ni", voxels.bary.astype(float), mesh.vertices_A[voxels.cells[voxels.cell]])
    assert np.abs(mixed - zyx * PIXEL_SIZE_A).max() < 1e-4
    outside = (voxels.bary.min(1) < -1e-5).mean()
    assert outside < (0.005 if segmentation is None else 0.1)
    # cells are not larger than asked for, nor the whole far larger than the mask
    assert mesh.cell_volumes_A3().max() < 12.0**3 / 6 * 1.25
    assert mesh.cell_volumes_A3().sum() < 1.35 * bcc_mesh(MASK, PIXEL_SIZE_A, 4.0).cell_volumes_A3().sum()
    if segmentation is not None:
        assert np.array_equal(mesh.segment[voxels.cell], HALVES.ravel()[voxels.index])
        x = mesh.vertices_A[mesh.cells].mean(1)[:, 0]
        assert x[mesh.segment == 0].max() < 16 and x[mesh.segment == 1].min() > -7
        # whole faces are shared where joined, none where parted
        faces = np.sort(np.concatenate([np.delete(mesh.cells, k, axis=1) for k in range(4)]), axis=1)
        owner = np.tile(mesh.segment, 4)
        _, number, count = np.unique(faces, axis=0, return_inverse=True, return_counts=True)
        assert count.max() == 2
        both = np.zeros((len(count), 2), bool)
        both[number.ravel(), owner] = True
        assert both.all(1).sum() > 10 if segmentation is JOINED else not both.all(1).any()


def test_a_closed_surface_from_a_file_is_filled(tmp_path):
    mesh = lattice()
    faces, _ = boundary_faces(mesh)
    meshio.write(tmp_path / "s.stl", meshio.Mesh(mesh.vertices_A.astype(np.float32), [("triangle", faces)]))
    filled, voxels = custom(tmp_path / "s.stl")
    assert len(voxels) == MASK.sum() and voxels.bary.min() > -1e-5
    assert filled.cell_volumes_A3().sum() == pytest.approx(mesh.cell_volumes_A3().sum(), rel=1e-4)
    assert count_bodies(filled) == 1
    meshio.write(tmp_path / "open.stl", meshio.Mesh(mesh.vertices_A.astype(np.float32), [("triangle", faces[5:])]))
    with pytest.raises(InputError, match="not closed"):
        custom(tmp_path / "open.stl")


def test_without_tetgen_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tetgen", None)
    with pytest.raises(InputError, match="pip install tetgen"):
        surface_mesh(MASK, PIXEL_SIZE_A, 12.0)


def test_only_a_surface_imports_tetgen():
    code = "import sys, flexlib.mesh.build; assert 'tetgen' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
