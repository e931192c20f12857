"""Damaged files of every kind that is read: a result or one line that names the file, in bounded time and memory.

The quick part: some 300 inputs a reader. The long part is ``tests/faults/test_fuzz_readers_long.py``.
"""

from __future__ import annotations

import gzip
import json
import pickle
import struct
import subprocess
import sys
import zlib
from base64 import b64encode
from pathlib import Path

import fuzzing
import h5py
import mrcfile
import numpy as np
import pytest
import yaml
from mutations import alias_bomb
from particle_files import write_relion_star

from flexlib.errors import InputError
from flexlib.particles import read_particles

COUNT, SEED = 300, 20
_HUGE = 10**12

# reads files one after the other; prints the line that each is refused with, and by how many MB the largest resident
# size rose
READ = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import fuzzing
from flexlib.errors import InputError
cases, results = json.loads(sys.argv[2]), {}
for reader, _, whole in cases:
    fuzzing.complaint(fuzzing.READERS[reader], Path(whole))  # what is imported is no reader's memory
for reader, path, whole in cases:
    before = fuzzing.peak_bytes()
    try:
        fuzzing.READERS[reader](Path(path))
    except InputError as error:
        results[Path(path).name] = [(fuzzing.peak_bytes() - before) / 2**20, str(error)]
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def seeds(tmp_path_factory) -> Path:
    return fuzzing.write_seeds(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(scope="module")
def outcomes(seeds) -> dict[str, fuzzing.Outcome]:
    return fuzzing.run(seeds, SEED, COUNT, list(fuzzing.READERS), seconds=240)


@pytest.mark.parametrize("reader", fuzzing.READERS)
def test_damaged_files_are_read_or_refused_in_one_line(outcomes, reader):
    outcome = outcomes[reader]
    assert not outcome.wrong, "\n".join(outcome.wrong)
    assert outcome.read + outcome.refused == COUNT
    assert outcome.read > 0.02 * COUNT and outcome.refused > 0.3 * COUNT, "the damage is not of the right strength"
    assert outcome.grown_bytes < fuzzing.MEMORY_BYTES


def test_the_harness_sees_tracebacks_hangs_and_lines_that_name_nothing():
    """Readers with each of the faults that the fuzzing is there to find."""
    program = (
        "import signal, sys; sys.path.insert(0, sys.argv[1]); import fuzzing; fuzzing.SECONDS = 0.2\n"
        "from pathlib import Path; from flexlib.errors import InputError\n"
        "signal.signal(signal.SIGPROF, fuzzing.stop)\n"
        "def hang(path):\n    while True: pass\n"
        "def unnamed(path): raise InputError('something is wrong')\n"
        "def raises(path): {}['key']\n"
        "def refuses(path): raise InputError(f'{path}: bad')\n"
        "for read in (hang, unnamed, raises, refuses): print(fuzzing.complaint(read, Path('x')))\n"
    )
    tests = str(Path(__file__).parent)
    done = subprocess.run([sys.executable, "-c", program, tests], capture_output=True, text=True, check=True)
    hung, without_name, raised, refused = done.stdout.splitlines()
    assert hung.startswith("TooLong") and without_name.startswith("no line that names the file")
    assert raised.startswith("KeyError") and refused == ""


# headers that claim 10^12 voxels -------------------------------------------------------------------------------------


def huge_mrc(path: Path, whole: Path, extended: bool = False) -> None:
    """10^12 voxels, or an extended header of 2 GB."""
    content = bytearray(whole.read_bytes())
    if extended:
        content[92:96] = struct.pack("<i", 2**31 - 1)
    else:
        content[:12] = struct.pack("<3i", 10**4, 10**4, 10**4)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else bytes(content))


def huge_npy(path: Path, whole: Path) -> None:
    """The header of a whole file with a shape of 10^12 rows."""
    content = whole.read_bytes()
    header = content[10 : 10 + struct.unpack("<H", content[8:10])[0]].decode()
    shape = header[header.index("'shape': ") + 9 : header.index(")") + 1]
    if "descr': [" in header:
        shape = header[header.rindex("'shape': ") + 9 : header.rindex("),") + 1]
    header = header.replace(f"'shape': {shape}", f"'shape': ({_HUGE},)")
    path.write_bytes(content[:8] + struct.pack("<H", len(header)) + header.encode() + content[10:])


def huge_stream(path: Path, whole: Path) -> None:
    content = whole.read_bytes()
    size = int.from_bytes(content[6:10], "little")
    header = json.dumps({**json.loads(content[10 : 10 + size]), "length": _HUGE}).encode()
    path.write_bytes(content[:6] + len(header).to_bytes(4, "little") + header + content[10 + size :])


def huge_seg(path: Path, whole: Path) -> None:
    """A mask of 10^12 voxels of which none is stored."""
    path.write_bytes(whole.read_bytes())
    with h5py.File(path, "r+") as file:
        del file["mask"]
        file.create_dataset("mask", (10**4,) * 3, "u4", chunks=(16, 16, 16), compression="gzip")


def huge_vtu(path: Path, whole: Path, size: int = 2**10) -> None:
    """10^12 points, in a compressed block that swells to ``size``."""
    block = zlib.compress(bytes(size), 9)
    head = struct.pack("<4I", 1, size, size, len(block))
    data = b64encode(head).decode() + b64encode(block).decode()
    path.write_text(
        '<VTKFile type="UnstructuredGrid" version="0.1" header_type="UInt32" byte_order="LittleEndian" '
        f'compressor="vtkZLibDataCompressor"><UnstructuredGrid><Piece NumberOfPoints="{_HUGE}" NumberOfCells="{_HUGE}">'
        '<Points><DataArray type="Float64" Name="Points" NumberOfComponents="3" format="binary">'
        f"{data}</DataArray></Points></Piece></UnstructuredGrid></VTKFile>"
    )


def huge_msh(path: Path, whole: Path) -> None:
    content = whole.read_bytes()
    at = content.index(b"$Nodes") + 7
    end = content.index(b"\n", at)
    path.write_bytes(content[:at] + struct.pack("<4Q", 1, _HUGE, 1, _HUGE) + content[end:])


def huge_pickle(path: Path, whole: Path) -> None:
    """An array made by calling numpy.ndarray with a shape, and a place of the pickle's memory that does not exist."""
    path.write_bytes(b"\x80\x02cnumpy\nndarray\n" + pickle.dumps((_HUGE,), 2)[2:-1] + b"\x85R.")


CLAIMS = {
    "map.mrc": ("map", "float.mrc", huge_mrc),
    "map.mrc.gz": ("map", "float.mrc", huge_mrc),
    "extended.mrc": ("map", "float.mrc", lambda path, whole: huge_mrc(path, whole, extended=True)),
    "stack.mrcs": ("stack", "float.mrcs", huge_mrc),
    "numpy.cs": ("cs", "numpy.cs", huge_npy),
    "stream.cs": ("cs", "lz4.cs", huge_stream),
    "points.npy": ("points", "path.npy", huge_npy),
    "weights.npy": ("weights", "cells.npy", huge_npy),
    "mask.seg": ("seg", "packed.seg", huge_seg),
    "cells.vtu": ("mesh", "own.vtu", huge_vtu),
    "nodes.msh": ("mesh", "True.msh", huge_msh),
    "array.pkl": ("flex_mesh", "flex.pkl", huge_pickle),
    "swollen.vtu": ("mesh", "own.vtu", lambda path, whole: huge_vtu(path, whole, 300 * 2**20)),  # last: the largest
}


@pytest.fixture(scope="module")
def claims(seeds, tmp_path_factory) -> dict[str, tuple[float, str]]:
    """Megabytes and message of each file that claims too much."""
    folder, cases = tmp_path_factory.mktemp("claims"), []
    for name, (reader, seed, make) in CLAIMS.items():
        make(folder / name, seeds / reader / seed)
        cases.append((reader, str(folder / name), str(seeds / reader / seed)))
    command = [sys.executable, "-c", READ, str(Path(__file__).parent), json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CLAIMS)
def test_a_header_that_claims_a_terabyte_is_refused_before_it_gets_memory(claims, name):
    """Measured: the largest resident size does not rise by what a parser would take for the claim."""
    grown_mb, message = claims[name]
    assert name in message and len(message.splitlines()) == 1
    assert grown_mb < (700 if name == "swollen.vtu" else 40), message  # zlib has made 300 MB of the block by then


# single faults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", ["optics", "particles"])
def test_a_star_column_that_stands_twice_is_one_line(tmp_path, block):
    path = write_relion_star(tmp_path / "twice.star")
    label = {"optics": "_rlnVoltage #3", "particles": "_rlnAngleTilt #4"}[block]
    other = {"optics": "_rlnImageSize #7", "particles": "_someoneElses #11"}[block]
    path.write_text(path.read_text().replace(other, label))
    with pytest.raises(InputError, match=rf"twice\.star.*{label.split()[0][1:]}.*twice"):
        read_particles(path)


def test_text_of_a_file_cannot_break_the_line_that_quotes_it():
    message = str(InputError("a\nb\x1b[31m \udc80 \u2028 \0 \r" + "x" * 10**6))
    assert len(message.splitlines()) == 1 and message.isprintable() and len(message) < 10_000
    message.encode()


@pytest.mark.parametrize(
    "text",
    [
        alias_bomb(fuzzing.Random(1)).decode(),
        "name: run\nparticles: p.star\nconsensus: c.mrc\nmesh: &m {cells: *m}",
        "name: &a [*a]\nparticles: p.star\nconsensus: c.mrc",
        "name: run\nparticles: p.star\nconsensus: c.mrc\ntrain: {rigidity: .nan}",
        "name: run\nparticles: p.star\nconsensus: c.mrc\ntrain: {rigidity: 1e999}",
        "name: run\nparticles: p.star\nconsensus: c.mrc\nmesh: {1: 2}",
        "[1, 2]",
    ],
    ids=["bomb", "circle of sections", "circle of lists", "nan", "inf", "key", "list"],
)
def test_yaml_that_means_no_config_is_one_line(text):
    with pytest.raises(InputError, match="config") as error:
        fuzzing.check(yaml.safe_load(text))
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 3000


def test_a_sweep_of_too_many_points_is_refused_before_they_are_made():
    lists = {key: list(range(1, 400)) for key in ("latent_dims", "rigidity", "seed")}
    config = {
        "name": "run",
        "particles": "p.star",
        "consensus": "c.mrc",
        "train": lists,
        "mesh": {"cells": lists["seed"]},
    }
    with pytest.raises(InputError, match="points"):
        fuzzing.check(config)


def test_labels_and_voxel_sizes_that_are_no_numbers_are_refused(tmp_path):
    from flexlib.imaging.maps import read_label_map, read_map

    for field, value in (("cella", np.nan), ("origin", np.inf)):
        with mrcfile.new(tmp_path / f"{field}.mrc") as file:
            file.set_data(np.zeros((4, 4, 4), np.float32))
            file.voxel_size = 1.0
            file.header[field]["x"] = value
        for read in (read_map, read_label_map):
            with pytest.raises(InputError, match=rf"{field}\.mrc"):
                read(tmp_path / f"{field}.mrc")
