"""Whole files of every kind that users give, for the fuzzing to damage, and which of them are wrong by design."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import gemmi
import h5py
import meshio
import mrcfile
import numpy as np
import yaml
from particle_files import cs_records, save_cs, write_relion_star
from small_protein import atom, protein, write_protein

from flexlib.mesh.cryosparc import write_flex_mesh
from flexlib.mesh.lattice import bcc_mesh
from flexlib.particles.cs_file import CsFile
from flexlib.tetra.io import write_mesh
from flexlib.tetra.tetmesh import TetraMesh, boundary_faces

ROWS = 4  # of the particle files: what is read by row is quick then


def write_seeds(folder: Path) -> Path:
    """The files, in a folder for each reader."""
    for name, write in SEEDS.items():
        (folder / name).mkdir(parents=True)
        write(folder / name)
    return folder


# particles, latents and weights --------------------------------------------------------------------------------------


def star_files(folder: Path) -> None:
    path = write_relion_star(folder / "relion.star", halves=True)
    lines = path.read_text().splitlines(keepends=True)
    images = [line for line in lines if "@" in line]
    text = "".join(line for line in lines if line not in images[ROWS:])
    path.write_text(text)
    (folder / "windows.star").write_bytes(text.replace("\n", "\r\n").encode())
    (folder / "quoted.star").write_text(text.replace("opticsGroup1", "'optics group 1'").replace("abc", '"a b"'))
    optics = text[text.index("data_optics") : text.index("data_particles")]
    old = text.replace(optics, "").replace("_rlnRandomSubset #12\n", "_rlnRandomSubset\n_rlnPixelSize\n_rlnVoltage\n")
    old = old.replace("_rlnVoltage\n", "_rlnVoltage\n_rlnSphericalAberration\n_rlnOddZernike\n")
    rows = (line + " 2.0 300 2.7 [0,1.5,0]" if "@" in line else line for line in old.split("\n"))
    (folder / "old.star").write_text("\n".join(rows))


def cs_files(folder: Path) -> None:
    """Records of NumPy, and CryoSPARC's stream."""
    records = cs_records()[:ROWS]
    save_cs(folder / "numpy.cs", records)
    paths = sorted(set(records["blob/path"].tolist()))
    heap = b"\0" + b"\0".join(paths) + b"\0"
    stream = {name: records[name] for name in records.dtype.names}
    stream["blob/path"] = np.array([heap.index(path) for path in records["blob/path"].tolist()], np.uint64)
    kinds = [[name, v.dtype.str, *([list(v.shape[1:])] if v.ndim > 1 else [])] for name, v in stream.items()]
    kinds = [[name, "|O"] if name == "blob/path" else [name, *kind] for name, *kind in kinds]
    for compression in ("lz4", "snappy", None):
        header = {"length": ROWS, "dtype": kinds, "compression": compression, "compressed_fields": list(stream)[1:]}
        CsFile(folder, None, stream, header, heap).write(folder / f"{compression}.cs")


def point_files(folder: Path) -> None:
    (folder / "path.csv").write_text("flexLatent1,flexLatent2\n0.5,1\n-1e-2,2\n")
    (folder / "path.txt").write_text("# a comment\n0.5 1\n-1e-2 2\n")
    (folder / "path.star").write_text("data_\nloop_\n_flexLatent1\n_flexLatent2\n0.5 1\n-1e-2 2\n")
    np.save(folder / "path.npy", np.random.default_rng(0).normal(size=(5, 2)))
    modes = np.zeros(4, [("uid", "<u8"), ("components_mode_0/value", "<f4"), ("components_mode_1/value", "<f4")])
    save_cs(folder / "path.cs", modes)


def weight_files(folder: Path) -> None:
    (folder / "segments.csv").write_text("segment,weight\n0,1.5\n3,20\n")
    np.save(folder / "cells.npy", np.linspace(1, 2, 40))


# maps, stacks and segments -------------------------------------------------------------------------------------------


def map_files(folder: Path) -> None:
    values = np.random.default_rng(0).normal(size=(8, 8, 8))
    for name, kind in (("float", "f4"), ("int", "i2"), ("byte", "i1"), ("half", "f2"), ("complex", "c8")):
        with mrcfile.new(folder / f"{name}.mrc") as file:
            file.set_data((3 * values).astype(kind))
            file.voxel_size = 1.5
    (folder / "packed.mrc").write_bytes(gzip.compress((folder / "float.mrc").read_bytes()))


def stack_files(folder: Path) -> None:
    for name, kind in (("float", "f4"), ("int", "i2"), ("byte", "i1"), ("half", "f2"), ("word", "u2"), ("c", "c8")):
        with mrcfile.new(folder / f"{name}.mrcs") as file:
            file.set_data(np.arange(3 * 36).reshape(3, 6, 6).astype(kind))
            file.set_image_stack()


SEGGER_CHANGES: dict[str, dict[str, object]] = {  # of a whole file, by the name of the file that has them
    "plain": {},
    "claims": {"mask": (10**4, 10**4, 10**4)},
    "long": {"region_ids": (10**12,)},
    "group": {"mask": "group"},
    "external": {"mask": h5py.ExternalLink("plain.seg", "mask")},
    "circle": {"mask": h5py.SoftLink("/mask")},
    "dangling": {"parent_ids": h5py.SoftLink("/nowhere")},
    "texts": {"region_ids": "several"},
    "float": {"mask": np.ones((5, 5, 5))},
    "flat": {"mask": np.ones((5, 5), np.int32)},
    "empty": {"mask": np.ones((0, 5, 5), np.int32)},
    "huge": {"region_ids": np.array([1, 2, 3, 2**63], np.uint64)},
    "negative": {"mask": np.full((5, 5, 5), -7)},
    "chain": {"region_ids": np.arange(1, 1201), "parent_ids": np.arange(2, 1202)},
    "lists": {"parent_ids": np.array([9, 9, 0])},
    "nan": {"@ijk_to_xyz_transform": np.full((3, 4), np.nan)},
    "matrix": {"@ijk_to_xyz_transform": np.eye(3)},
    "word": {"@ijk_to_xyz_transform": "turned"},
    "format": {"@format": 7},
}


def seg_files(folder: Path) -> None:
    for name, changes in SEGGER_CHANGES.items():
        _segger(folder / f"{name}.seg", changes)
    _segger(folder / "latest.seg", {}, libver="latest")


def _segger(path: Path, changes: dict[str, object], libver: str | None = None) -> None:
    mask = np.random.default_rng(1).integers(0, 4, (5, 5, 5)).astype(np.uint32)
    content = {"mask": mask, "region_ids": np.array([1, 2, 3, 9]), "parent_ids": np.array([9, 9, 0, 0])}
    with h5py.File(path, "w", libver=libver) as file:
        file.attrs["format"] = np.bytes_("segger")
        file.attrs["ijk_to_xyz_transform"] = np.column_stack([2.0 * np.eye(3), np.zeros(3)]).astype(np.float32)
        for key, value in (content | changes).items():
            if key.startswith("@"):
                file.attrs[key[1:]] = value
            elif isinstance(value, tuple):  # claimed, never written
                file.create_dataset(key, value, np.uint32, chunks=(64,) * len(value), compression="gzip")
            elif isinstance(value, np.ndarray):
                file.create_dataset(key, data=value, compression="gzip" if value.ndim == 3 else None)
            elif value == "group":
                file.create_group(key)
            else:
                file[key] = value


# meshes --------------------------------------------------------------------------------------------------------------


def _mesh_and_mask() -> tuple[TetraMesh, np.ndarray]:
    mask = np.zeros((8, 8, 8), bool)
    mask[2:6, 2:6, 2:6] = True
    return bcc_mesh(mask, 2.0, 5.0, None), mask


def mesh_files(folder: Path) -> None:
    """Meshes of tetrahedra, in text and binary, and closed surfaces."""
    mesh, _ = _mesh_and_mask()
    write_mesh(folder / "own.vtu", mesh)
    (folder / "segments.mrc").unlink(missing_ok=True)
    bare = meshio.Mesh(mesh.vertices_A, [("tetra", mesh.cells.astype(np.int64))])
    data = {"rigidity": [mesh.rigidity], "segment": [np.arange(len(mesh.cells), dtype=np.int32) % 2]}
    grid = meshio.Mesh(bare.points, bare.cells, cell_data=data)
    surface = meshio.Mesh(mesh.vertices_A.astype(np.float32), [("triangle", boundary_faces(mesh)[0].astype(np.int32))])
    for binary in (False, True):
        for suffix, kind in ((".vtu", "vtu"), (".vtk", "vtk"), (".msh", "gmsh")):
            written = grid if binary or kind != "gmsh" else bare  # meshio writes no text of such data that it can read
            meshio.write(folder / f"tetra{binary}{suffix}", written, kind, binary=binary)
        meshio.write(folder / f"ansys{binary}.msh", bare, "ansys", binary=binary)
        for suffix in (".stl", ".ply"):
            meshio.write(folder / f"surface{binary}{suffix}", surface, suffix[1:], binary=binary)
    meshio.write(folder / "old.msh", bare, "gmsh22", binary=False)
    meshio.write(folder / "surface.obj", surface, "obj")


def flex_mesh_files(folder: Path) -> None:
    mesh, mask = _mesh_and_mask()
    write_flex_mesh(folder / "flex.pkl", mesh, mask.astype(np.float32), mask.astype(np.float32), 2.0)


# atoms ---------------------------------------------------------------------------------------------------------------


def atom_files(folder: Path) -> None:
    """A peptide with alternates, an insertion code, a ligand and a second model, as mmCIF and as PDB."""
    structure = protein()
    del structure[0]["B"]
    while len(structure[0]["A"]) > 6:
        del structure[0]["A"][-1]
    structure[0]["A"][2].seqid = gemmi.SeqId(2, "A")
    structure[0]["A"][3].add_atom(atom("CG", np.array([-11.0, 5, 0]), "A"))
    structure[0]["A"][3].add_atom(atom("CG", np.array([-10.6, 5, 0]), "B"))
    structure.add_model(gemmi.Model(2))
    structure[1].add_chain(structure[0]["A"])
    for suffix in (".cif", ".pdb"):
        path = write_protein(folder / f"made{suffix}", structure)
        (folder / f"packed{suffix}.gz").write_bytes(gzip.compress(path.read_bytes()))


# configs -------------------------------------------------------------------------------------------------------------

CONFIG = """\
name: run
particles: files/p.star
image_root: .
consensus: files/c.mrc
device: cpu
prepare: {crop_box: 64, train_box: 32, symmetry: C2}
mesh:
  cells: [10, 20]
  segmentation: files/s.mrc
  connections: 0>1, 1>2
  segments: [A, 'B:1-20,C']
  rigid_segments: [1]
  threshold: auto
train:
  latent_dims: [1, 2]
  rigidity: [1e-1, 2.0]
  epochs: auto
  occupancy: [1]
sweep:
  exclude: [{cells: 10, rigidity: 2.0}]
  points: [{cells: 20, latent_dims: 4}]
generate: {series: [axes, kmeans 3, 'between 1 2'], frames: 5}
reconstruct: {points: [{cells: 20}]}
validate: {points: [{cells: 20}]}
"""


def config_files(folder: Path) -> None:
    """Either of the two that Snakemake reads; the files that they name are in ``config_paths``."""
    (folder / "run.yaml").write_text(CONFIG)
    (folder / "run.json").write_text(json.dumps(yaml.safe_load(CONFIG)))


def config_paths(folder: Path) -> None:
    """What a config names, where the paths in it start."""
    write_relion_star(folder / "files/p.star")
    for name in "cs":
        with mrcfile.new(folder / f"files/{name}.mrc", np.zeros((8, 8, 8), np.float32)) as file:
            file.voxel_size = 2.0


SEEDS = {
    "star": star_files,
    "cs": cs_files,
    "map": map_files,
    "labels": map_files,
    "stack": stack_files,
    "seg": seg_files,
    "mesh": mesh_files,
    "flex_mesh": flex_mesh_files,
    "points": point_files,
    "atoms": atom_files,
    "weights": weight_files,
    "config": config_files,
}
REFUSED = {  # the files that must be refused as they stand; all others must be read
    "map": {"complex"},
    "labels": {"complex", "float", "half", "packed"},  # which hold other than whole numbers
    "stack": {"c"},
    "seg": set(SEGGER_CHANGES) - {"plain", "chain"},
}
