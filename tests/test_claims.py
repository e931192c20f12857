"""Small files that promise more than they can hold, or unfold to gigabytes, are refused before they get memory."""

from __future__ import annotations

import bz2
import gzip
import json
import pickle
import re
import struct
import subprocess
import sys
import zlib
from base64 import b64encode
from pathlib import Path

import pytest
from fuzz_seeds import write_seeds

from flexlib.errors import InputError
from flexlib.untrusted import read_npy

_HUGE = 10**12

# reads files one after the other; prints the line that each is refused with, and by how many MB the largest resident
# size rose
READ = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import fuzzing
from fuzz_limits import peak_bytes
from flexlib.errors import InputError
cases, results = json.loads(sys.argv[2]), {}
for reader, _, whole in cases:
    fuzzing.READERS[reader](Path(whole))  # what is imported is no reader's memory
for reader, path, whole in cases:
    before = peak_bytes()
    try:
        fuzzing.READERS[reader](Path(path))
    except InputError as error:
        results[Path(path).name] = [(peak_bytes() - before) / 2**20, str(error)]
print(json.dumps(results))
"""


def _mrc(content: bytes) -> bytes:
    """10^12 voxels."""
    return struct.pack("<3i", 10**4, 10**4, 10**4) + content[12:]


def _extended_header(content: bytes) -> bytes:
    """One of 2 GB."""
    return content[:92] + struct.pack("<i", 2**31 - 1) + content[96:]


def _npy(content: bytes) -> bytes:
    """10^12 rows."""
    size = struct.unpack("<H", content[8:10])[0]
    header = re.sub(rb"\([^()]*\)(?=, \}\s*$)", b"(1000000000000,)", content[10 : 10 + size])
    return content[:8] + struct.pack("<H", len(header)) + header + content[10 + size :]


def _stream(content: bytes) -> bytes:
    size = int.from_bytes(content[6:10], "little")
    header = json.dumps({**json.loads(content[10 : 10 + size]), "length": _HUGE}).encode()
    return content[:6] + len(header).to_bytes(4, "little") + header + content[10 + size :]


def _zeros(content: bytes) -> bytes:
    """10^10 rows, of 10^5 bytes that are no block of LZ4."""
    header = {"length": 10**10, "dtype": [["uid", "|u1"]], "compression": "lz4", "compressed_fields": ["uid"]}
    packed, size = json.dumps(header).encode(), 10**5
    return content[:6] + struct.pack("<I", len(packed)) + packed + struct.pack("<I", size) + bytes(size)


def _vtu(content: bytes) -> bytes:
    return re.sub(rb'NumberOf(Points|Cells)="\d+"', rb'NumberOf\1="1000000000000"', content)


def _entities(content: bytes) -> bytes:
    entities = "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 10))
    return f'<!DOCTYPE x [<!ENTITY a0 "ha">{entities}]><VTKFile>&a9;</VTKFile>'.encode()


def _zlib_bomb(content: bytes) -> bytes:
    """A mesh whose first array unfolds to 4 GB."""
    packer = zlib.compressobj(9)
    start = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    chunk = packer.compress(bytes(2**24)) + packer.flush(zlib.Z_FULL_FLUSH)
    data = start + chunk * 256  # nothing in a chunk refers to what is before it
    encoded = b64encode(struct.pack("<4I", 1, 2**31, 0, len(data))) + b64encode(data)
    return re.sub(rb"(<DataArray[^>]*>)\s*[^<\s]+", rb"\g<1>" + encoded, content, count=1)


def _msh(content: bytes) -> bytes:
    at = content.index(b"$Nodes") + 7
    return content[:at] + struct.pack("<4Q", 1, _HUGE, 1, _HUGE) + content[content.index(b"\n", at) :]


def _pickled(content: bytes) -> bytes:
    """An array made by calling numpy.ndarray with a shape."""
    return b"\x80\x02cnumpy\nndarray\n" + pickle.dumps((_HUGE,), 2)[2:-1] + b"\x85R."


_PROMISES = r"header promises \d{13} bytes"
CLAIMS = {  # by the name of the file: its reader, the whole file, what makes it of that, and what the message says
    "plain.mrc": ("map", "float.mrc", _mrc, _PROMISES),
    "gzip.mrc": ("map", "float.mrc", lambda content: gzip.compress(_mrc(content)), _PROMISES),
    "bzip2.mrc": ("map", "float.mrc", lambda content: bz2.compress(_mrc(content)), ""),
    "extended.mrc": ("map", "float.mrc", _extended_header, ""),
    "stack.mrcs": ("stack", "float.mrcs", _mrc, ""),
    "records.cs": ("cs", "numpy.cs", _npy, ""),
    "stream.cs": ("cs", "lz4.cs", _stream, ""),
    "zeros.cs": ("cs", "lz4.cs", _zeros, ""),
    "points.npy": ("points", "path.npy", _npy, ""),
    "weights.npy": ("weights", "cells.npy", _npy, ""),
    "claims.seg": ("seg", "claims.seg", bytes, _PROMISES),
    "long.seg": ("seg", "long.seg", bytes, _PROMISES),
    "text.vtu": ("mesh", "tetraFalse.vtu", _vtu, ""),
    "binary.vtu": ("mesh", "tetraTrue.vtu", _vtu, ""),
    "entities.vtu": ("mesh", "tetraTrue.vtu", _entities, ""),
    "nodes.msh": ("mesh", "tetraTrue.msh", _msh, ""),
    "array.pkl": ("flex_mesh", "flex.pkl", _pickled, ""),
    "bomb.vtu": ("mesh", "tetraTrue.vtu", _zlib_bomb, "memory"),  # last: it gets the most
}


@pytest.fixture(scope="module")
def claims(tmp_path_factory) -> dict[str, tuple[float, str]]:
    """Megabytes and message of each file that claims too much."""
    folder, cases = tmp_path_factory.mktemp("claims"), []
    seeds = write_seeds(folder / "whole")
    for name, (reader, seed, make, _) in CLAIMS.items():
        (folder / name).write_bytes(make((seeds / reader / seed).read_bytes()))
        whole = seeds / reader / ("plain.seg" if reader == "seg" else seed)
        assert (folder / name).read_bytes() != whole.read_bytes()
        cases.append((reader, str(folder / name), str(whole)))
    assert sum((folder / name).stat().st_size for name in CLAIMS) < 2**24
    command = [sys.executable, "-c", READ, str(Path(__file__).parent), json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CLAIMS)
def test_what_a_file_cannot_hold_is_refused_before_it_gets_memory(claims, name):
    """Measured: the largest resident size does not rise by what a parser would take for the claim."""
    grown_mb, message = claims[name]
    assert f"{name}: " in message and len(message.splitlines()) == 1 and re.search(CLAIMS[name][3], message), message
    assert grown_mb < (1000 if name == "bomb.vtu" else 40), message


@pytest.mark.parametrize(("kind", "shape"), [("|S0", "(-1,)"), ("|S0", "(5,)"), ("<f8", "(-1,)"), ("<f8", "(2, -1)")])
def test_an_array_of_fewer_values_than_none_or_of_no_size_is_refused(tmp_path, kind, shape):
    """NumPy divides by the size, which ends the process (SIGFPE), or takes -1 for all there are."""
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + bytes(80))
    with pytest.raises(InputError, match=r"a\.npy: not a readable file of mine \(its header promises"):
        read_npy(tmp_path / "a.npy", "file of mine")
