"""Fuzzing of the readers: damaged files in, and out comes a result or one line of our own, in bounded time and memory.

The inputs are read in a process of their own, which has a limit of memory and of time for each; this module is that
process too: ``python tests/fuzzing.py FOLDER SEED COUNT READER ...``.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

MEMORY_BYTES = 2**30  # beyond what the libraries take
SECONDS = 5  # of the processor, for one input


@dataclass
class Outcome:
    """What came of one reader's inputs."""

    reader: str
    read: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)
    grown_bytes: int = 0  # by how much the largest resident size rose


# the readers ---------------------------------------------------------------------------------------------------------


def _star(path: Path) -> None:
    from flexlib.particles import read_particles
    from flexlib.particles.star_text import read_star_text

    read_particles(path)
    text = read_star_text(path)
    text.write(path.with_name("copy.star"), text.particles, [0], {"flexLatent1": ["1.5"]})


def _cs(path: Path) -> None:
    from flexlib.particles import read_particles
    from flexlib.particles.cs_file import read_cs_file

    read_particles(path)
    read_cs_file(path).write(path.with_name("copy.cs"))


def _map(path: Path) -> None:
    from flexlib.errors import InputError
    from flexlib.imaging.maps import read_label_map, read_map

    refusal = None
    for read in (read_map, read_label_map):
        try:
            read(path)
        except InputError as error:
            refusal = error
    if refusal is not None:
        raise refusal


def _stack(path: Path) -> None:
    import numpy as np

    from flexlib.images.stack import read_stack_header

    header = read_stack_header(path)
    header.read(np.unique([0, header.num_images - 1]))


def _seg(path: Path) -> None:
    from flexlib.mesh.segments import read_segments

    read_segments(path)


def _mesh(path: Path) -> None:
    from flexlib.tetra.io import read_grid, read_mesh, surface_of

    if path.suffix not in (".stl", ".ply"):
        mesh = read_mesh(path)
        assert len(mesh.cells) == len(mesh.rigidity) == len(mesh.segment) and (mesh.rigidity > 0).all()
        return
    grid = read_grid(path)
    if any(block.type == "triangle" for block in grid.cells):
        surface_of(grid, path)


def _flex_mesh(path: Path) -> None:
    from flexlib.mesh.cryosparc import read_flex_mesh

    read_flex_mesh(path)


def _points(path: Path) -> None:
    from flexlib.particles.latents_read import read_frame_latents

    read_frame_latents(path)


def _weights(path: Path) -> None:
    from flexlib.mesh.weights import read_cell_weights, read_segment_weights

    read_segment_weights(path) if path.suffix == ".csv" else read_cell_weights(path, 40)


def check(config: Any) -> None:
    """All that the workflow asks of a config before any job."""
    from flexlib.workflow_support.checks import check_config, check_maps, check_paths, settle_validation
    from flexlib.workflow_support.connections import check_mesh_keys
    from flexlib.workflow_support.points import sweep_points, wanted_points
    from flexlib.workflow_support.series import check_series, count_maps
    from flexlib.workflow_support.settings import MeshSettings, make_settings

    complete = check_config(config)
    points = sweep_points(complete)
    check_mesh_keys(make_settings(MeshSettings, {**complete["mesh"], "cells": 1}))
    check_series(complete["generate"]["series"], sorted({point.latent_dims for point in points}))
    count_maps(complete["generate"]["series"], complete["generate"]["frames"], 2)
    candidates = wanted_points(points, complete, "reconstruct")
    wanted_points(points, complete, "validate")
    settle_validation(config, complete, len(candidates))
    check_paths(complete)
    check_maps(complete)


def _config(path: Path) -> None:
    import mutations
    import yaml

    from flexlib.errors import InputError

    content = path.read_bytes()
    try:
        config = yaml.load(content, yaml.CSafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: Snakemake refuses it") from error
    rng = Random(content)
    if isinstance(config, dict) and rng.random() < 0.5:
        config = mutations.config(config, rng)
    try:
        check(config)
    except InputError as error:
        where = f"{error}".startswith(("config", "mesh.", "generate.", "reconstruct.", "train."))
        raise InputError(f"{path}: {error}" if where else "names no key") from error


READERS: dict[str, Callable[[Path], None]] = {
    "star": _star,
    "cs": _cs,
    "map": _map,
    "stack": _stack,
    "seg": _seg,
    "mesh": _mesh,
    "flex_mesh": _flex_mesh,
    "points": _points,
    "weights": _weights,
    "config": _config,
}
_TEXT_SUFFIXES = (".star", ".csv", ".txt", ".yaml", ".vtu", ".msh", ".vtk", ".ply", ".stl")


# whole files to damage -----------------------------------------------------------------------------------------------


def write_seeds(folder: Path) -> Path:
    """Whole files of every kind, in a folder for each reader."""
    for name in READERS:
        (folder / name).mkdir(parents=True, exist_ok=True)
    _write_particles(folder)
    _write_volumes(folder)
    _write_meshes(folder)
    (folder / "config/run.yaml").write_text(_CONFIG)
    (folder / "here").mkdir()
    for name in ("p.star", "c.mrc", "s.seg"):
        (folder / "here" / name).write_bytes(b"")
    (folder / "weights/segments.csv").write_text("segment,weight\n0,1.5\n3,20\n")
    (folder / "points/path.csv").write_text("flexLatent1,flexLatent2\n0.5,1\n-1e-2,2\n")
    (folder / "points/path.txt").write_text("# a comment\n0.5 1\n-1e-2 2\n")
    return folder


_CONFIG = """\
name: run
particles: p.star
consensus: c.mrc
device: cpu
prepare: {crop_box: 64, train_box: 32, symmetry: C2}
mesh:
  cells: [10, 20]
  segmentation: s.seg
  connections: 0>1, 0>2
  rigid_segments: [0, 1]
train:
  latent_dims: [1, 2]
  rigidity: [1e-1, 2.0]
  epochs: auto
  occupancy: [1]
sweep:
  exclude: [{cells: 10, seed: 0}]
  points: [{rigidity: 5.0}]
generate: {series: [axes, kmeans 3, between 1 2], frames: 5}
reconstruct: {points: [{cells: 20, rigidity: 2.0}]}
validate: {points: [{cells: 20}]}
"""


def _write_particles(folder: Path) -> None:
    import numpy as np
    from particle_files import cs_records, save_cs, write_relion_star

    from flexlib.particles.cs_file import CsFile

    write_relion_star(folder / "star/relion.star", halves=True)
    old = (folder / "star/relion.star").read_text()
    begin, end = old.index("data_optics"), old.index("# version 30001\n\ndata_particles")
    extra = "_rlnVoltage #13\n_rlnSphericalAberration #14\n_rlnAmplitudeContrast #15\n_rlnPixelSize #16\n"
    body = old[end:].replace("_rlnRandomSubset #12\n", "_rlnRandomSubset #12\n" + extra)
    body = body.replace("   1 0.00000", "   1 '0.00000'").replace(" 1 \n", " 1 300 2.7 0.1 1.5\n")
    (folder / "star/old.star").write_text(old[:begin] + body.replace(" 2 \n", " 2 300 2.7 0.1 1.5\n"))
    records = cs_records()
    save_cs(folder / "cs/numpy.cs", records)
    stream = {name: records[name] for name in records.dtype.names if name != "blob/path"}
    stream["blob/path"] = np.array([0, 4] * (len(records) // 2), np.uint64)
    for compression in ("lz4", "snappy", None):
        kinds = [
            [name, values.dtype.str, *([list(values.shape[1:])] * (values.ndim > 1))] for name, values in stream.items()
        ]
        kinds[-1][1] = "|O"
        header = {"dtype": kinds, "compression": compression, "compressed_fields": list(stream)}
        CsFile(folder, None, stream, header, b"a.m\0b.m\0").write(folder / f"cs/{compression}.cs")
    np.save(folder / "points/path.npy", np.random.default_rng(0).normal(size=(5, 2)))
    (folder / "points/path.star").write_text("data_\nloop_\n_flexLatent1\n_flexLatent2\n0.5 1\n-1e-2 2\n")
    modes = np.zeros(4, [("uid", "<u8"), ("components_mode_0/value", "<f4"), ("components_mode_1/value", "<f4")])
    save_cs(folder / "points/path.cs", modes)
    np.save(folder / "weights/cells.npy", np.linspace(1, 2, 40))


def _write_volumes(folder: Path) -> None:
    import gzip

    import h5py
    import mrcfile
    import numpy as np

    values = np.random.default_rng(0).normal(size=(8, 8, 8))
    for name, kind in (("float", np.float32), ("short", np.int16), ("byte", np.int8), ("complex", np.complex64)):
        with mrcfile.new(folder / f"map/{name}.mrc", overwrite=True) as file:
            file.set_data((values * 3).astype(kind))
            file.set_volume()
            file.voxel_size = 1.5
        content = (folder / f"map/{name}.mrc").read_bytes()
        if name != "complex":
            with mrcfile.new(folder / f"stack/{name}.mrcs", overwrite=True) as file:
                file.set_data((values[:3] * 3).astype(kind))
                file.set_image_stack()
        else:
            (folder / "stack/complex.mrcs").write_bytes(content)
    (folder / "map/packed.mrc.gz").write_bytes(gzip.compress((folder / "map/float.mrc").read_bytes()))
    for name, options in (("packed", {"compression": "gzip"}), ("plain", {})):
        with h5py.File(folder / f"seg/{name}.seg", "w", libver="latest" if options else "earliest") as file:
            file.attrs["format"] = np.bytes_("segger")
            file.attrs["ijk_to_xyz_transform"] = np.column_stack([1.5 * np.eye(3), np.zeros(3)]).astype(np.float32)
            file.create_dataset("mask", data=np.arange(64, dtype=np.uint32).reshape(4, 4, 4) % 4, **options)
            file["region_ids"], file["parent_ids"] = np.array([1, 2, 3, 4], np.int32), np.array([4, 4, 0, 0], np.int32)


def _write_meshes(folder: Path) -> None:
    import meshio
    import numpy as np

    from flexlib.mesh.cryosparc import write_flex_mesh
    from flexlib.mesh.lattice import bcc_mesh
    from flexlib.tetra.io import write_mesh

    mask = np.zeros((8, 8, 8), bool)
    mask[2:6, 2:6, 2:6] = True
    mesh = bcc_mesh(mask, 2.0, 5.0, None)
    write_mesh(folder / "mesh/own.vtu", mesh)
    write_flex_mesh(folder / "flex_mesh/flex.pkl", mesh, mask.astype(np.float32), mask.astype(np.float32), 2.0)
    tetra = meshio.Mesh(mesh.vertices_A, [("tetra", mesh.cells[:9].astype(np.int64))])
    tetra.cell_data = {"rigidity": [np.ones(9)], "segment": [np.arange(9, dtype=np.int32) % 2]}
    meshio.write(folder / "mesh/plain.vtu", tetra, binary=False)
    tetra.cell_data = {}
    corners = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1.0]])
    faces = meshio.Mesh(corners, [("triangle", np.array([[0, 2, 1], [0, 1, 3], [1, 2, 3], [0, 3, 2]]))])
    for binary in (True, False):
        for suffix in ("vtk", "msh"):
            meshio.write(folder / f"mesh/{binary}.{suffix}", tetra, "gmsh" if suffix == "msh" else "vtk", binary=binary)
        for suffix in ("stl", "ply"):
            meshio.write(folder / f"mesh/{binary}.{suffix}", faces, binary=binary)
    (folder / "mesh/segments.mrc").unlink(missing_ok=True)


# the process ---------------------------------------------------------------------------------------------------------


class TooLong(BaseException):
    """An input took longer than ``SECONDS``."""


def stop(*_: object) -> None:
    raise TooLong


def damaged(seed: Path, rng: Random) -> bytes:
    """A damaged copy of a whole file: in what its format is made of, or as lines or bytes."""
    import mutations

    content = seed.read_bytes()
    inner = {".npy": mutations.npy, ".seg": mutations.hdf5, ".pkl": mutations.pickled, ".yaml": mutations.yaml_text}
    inner[".cs"] = mutations.npy if content.startswith(b"\x93") else mutations.stream
    if seed.suffix in inner and rng.random() < 0.5:
        return inner[seed.suffix](content, rng)
    return mutations.damaged(content, rng, seed.suffix in _TEXT_SUFFIXES)


def complaint(read: Callable[[Path], None], path: Path) -> str | None:
    """What is wrong with how a file is read; "" where it is refused as it should be, None where it is read."""
    from flexlib.errors import InputError

    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        read(path)
        return None
    except InputError as error:
        if len(f"{error}".splitlines()) != 1 or str(path) not in f"{error}" or len(f"{error}") > 9000:
            return f"no line that names the file: {str(error)[:300]!r}"
        return ""
    except (Exception, TooLong) as error:
        place = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in place if "flexlib" in frame.filename]
        where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in [*place[:-4:-1], *ours[-1:]])
        return f"{type(error).__name__}: {str(error)[:150]!r} at {where}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def fuzz(name: str, folder: Path, seed: int, count: int) -> Outcome:
    """Read ``count`` damaged files by one reader; failures are kept beside the seeds, one of each kind."""
    seeds = sorted((folder / name).iterdir())
    work = folder / "work" / name
    work.mkdir(parents=True, exist_ok=True)
    outcome, before, kinds = Outcome(name), peak_bytes(), set()
    for number in range(count):
        rng = Random(f"{name} {seed} {number}")
        whole = seeds[number % len(seeds)]
        path = work / f"input{''.join(whole.suffixes)}"
        path.write_bytes(damaged(whole, rng) if number >= len(seeds) else whole.read_bytes())
        (work / "number").write_text(f"{number} of {whole.name}")
        complained = complaint(READERS[name], path)
        if complained is None:
            outcome.read += 1
        elif not complained:
            outcome.refused += 1
        else:
            kind = complained.partition(" at ")[2] or complained[:60]
            if kind not in kinds:
                kinds.add(kind)
                outcome.wrong.append(f"{name} {number} of {whole.name}: {complained}")
                path.replace(work / f"wrong_{number}{''.join(whole.suffixes)}")
    outcome.grown_bytes = peak_bytes() - before
    return outcome


def _main(folder: Path, seed: int, count: int, names: list[str]) -> None:
    signal.signal(signal.SIGPROF, stop)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "Data array contains NaN values")
    warnings.filterwarnings("ignore", "overflow encountered in scalar multiply", module="meshio.stl")
    logging.disable()
    results = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # meshio prints
    os.chdir(folder / "here")
    for name in names:
        fuzz(name, folder, seed, len(list((folder / name).iterdir())))  # what is imported is no reader's memory
    _limit_memory()
    for name in names:
        os.write(results, f"{json.dumps(asdict(fuzz(name, folder, seed, count)))}\n".encode())


def run(folder: Path, seed: int, count: int, names: list[str], seconds: float) -> dict[str, Outcome]:
    """Fuzz in a process with limits. Raises AssertionError, naming the input, where it dies or hangs."""
    command = [sys.executable, __file__, str(folder), str(seed), str(count), *names]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)
        problem = f"exit status {done.returncode}\n{done.stderr[-2000:]}" if done.returncode else ""
    except subprocess.TimeoutExpired:
        problem = f"no end after {seconds} s"
    last = {path.parent.name: path.read_text() for path in folder.glob("work/*/number")}
    assert not problem, f"{problem}\nlast inputs: {last}"
    outcomes = [Outcome(**json.loads(line)) for line in done.stdout.splitlines()]
    return {outcome.reader: outcome for outcome in outcomes}


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
