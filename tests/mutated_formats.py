"""Damage to files, for the fuzzing: of what a format is made of, be it arrays and their headers or keys and values.

Random, but the same for the same seed.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import pickle
import re
import struct
from collections.abc import Callable
from random import Random
from typing import Any

import h5py
import numpy as np
from mutations import FLOATS, INTS, NUMBERS, WORDS, any_value, anyhow

_TEXT_SUFFIXES = (
    ".star",
    ".csv",
    ".txt",
    ".yaml",
    ".json",
    ".vtu",
    ".msh",
    ".vtk",
    ".ply",
    ".stl",
    ".obj",
    ".cif",
    ".pdb",
)


def damaged(content: bytes, suffix: str, rng: Random) -> bytes:
    """A damaged file: in half of the cases in what its format is made of, else by bytes, or by lines if it is text."""
    if suffix in _OF_FORMAT and rng.random() < 0.5:
        return _OF_FORMAT[suffix](content, rng)
    return anyhow(content, rng, 0.7 if suffix in _TEXT_SUFFIXES else 0.0)


# of arrays and their headers -----------------------------------------------------------------------------------------

_KINDS = ["<f2", "<f8", ">f4", "<f16", "<c8", "<i2", "<i8", "<u8", "|b1", "|i1", "|S0", "|S3", "<U5", "|O", "|V4"]
_KINDS.append("<M8[s]")


def array(rng: Random, values: np.ndarray) -> np.ndarray:
    """An array in another type, shape or scale, or with an extreme value."""
    kind = rng.choice(("type", "shape", "scale", "value", "value", "part", "more"))
    if kind == "type":
        try:
            with np.errstate(all="ignore"):
                return values.astype(rng.choice(_KINDS))
        except (TypeError, ValueError):
            return values
    if kind == "shape":
        return rng.choice((values.ravel(), values[None], values[..., None], values[:1], values.T))
    if kind == "part":
        return values.ravel()[: rng.randrange(values.size + 1)]
    if kind == "more":
        return np.concatenate([values, values])
    if not values.size or values.dtype.kind not in "fiu":
        return values
    changed = np.array(values)
    with np.errstate(all="ignore"):
        if kind == "scale":
            return changed * rng.choice((-1.0, 1e30, np.nan))
        changed.flat[rng.randrange(changed.size)] = np.float64(rng.choice((*FLOATS, *INTS, 1e308))).astype(
            changed.dtype
        )
    return changed


def _npy(content: bytes, rng: Random) -> bytes:
    """A .npy file with a column more, less or of another kind, or a header that claims something else."""
    if rng.random() < 0.4:
        return _npy_header(content, rng)
    records = np.load(io.BytesIO(content), allow_pickle=False)
    changed = array(rng, records)
    if records.dtype.names is not None:
        columns = {name: records[name] for name in records.dtype.names}
        for _ in range(rng.choice((1, 1, 2))):
            name, other, kind = rng.choice(list(columns)), rng.choice(list(columns)), rng.randrange(5)
            if kind == 0 and len(columns) > 1:
                del columns[name]
            elif kind == 1:
                columns[name], columns[other] = columns[other], columns[name]
            else:
                value = array(rng, columns[name])
                tail = rng.choice((value.shape[1:], value.shape[1:], (), (1,), (2,), (3,), (2, 2), (0,)))
                columns[name] = np.resize(value, (len(records), *tail))
        count = rng.choice((len(records), len(records), len(records), 1, 0))
        changed = np.empty(count, [(name, values.dtype, values.shape[1:]) for name, values in columns.items()])
        for name, values in columns.items():
            changed[name] = values[:count]
    file = io.BytesIO()
    np.save(file, changed, allow_pickle=True)
    return file.getvalue()


def _npy_header(content: bytes, rng: Random) -> bytes:
    size = struct.unpack("<H", content[8:10])[0]
    header, kind = content[10 : 10 + size], rng.random()
    if kind < 0.4:
        header = anyhow(header, rng, 0.7)
    elif kind < 0.5:
        odd = (b"[" * 900, b"-" * 9000 + b"1", b"{'descr': 1}", b"__import__('os')", b"{" * 50, header * 2)
        header = rng.choice(odd)
    else:
        shapes = (b"(1000000000000,)", b"(-1,)", b"(4, 1)", b"()", b"(0,)", b"(True,)", b"(4.0,)", b"('4',)", b"4")
        if rng.random() < 0.6:
            header = re.sub(rb"\([^()]*\)(?=, \}\s*$)", rng.choice(shapes), header)
        kinds = re.findall(rb"'[<>|][^']*'", header)
        for _ in range(rng.randrange(3)):
            new = rng.choice(("1", *(f"'{one}'" for one in _KINDS))).encode()
            header = header.replace(rng.choice(kinds), new, rng.randrange(1, 4))
    header = header[: 2**16 - 1]
    version = rng.choice((content[6:8], content[6:8], content[6:8], b"\3\0"))
    return content[:6] + version + struct.pack("<H", len(header)) + header + content[10 + size :]


def _stream(content: bytes, rng: Random) -> bytes:
    """CryoSPARC's compressed stream with another header, or another length of its first column."""
    size = int.from_bytes(content[6:10], "little")
    packed, rest, kind = content[10 : 10 + size], content[10 + size :], rng.randrange(8)
    header = json.loads(packed)
    column, other = (rng.choice(header["dtype"]) for _ in range(2))
    if kind == 0:
        odd = (*INTS, None, "", [], {}, 1.5, 1e300, math.inf, "lz4", [["uid"]], [[1, 2, 3]])
        header[rng.choice(list(header))] = rng.choice(odd)
    elif kind == 1:
        column[1] = rng.choice((*_KINDS, "<u8,<f4", "S", "V0", "f4" * 99, "(2,)f4", 7, None))
    elif kind == 2:
        column[2:] = [rng.choice(([10**12], [-1], [0], [2**40, 2**40], [], 5, None, ["x"], [1.5]))]
    elif kind == 3:
        column[:] = other
    elif kind == 4:
        rest = struct.pack("<I", rng.choice(INTS) & 0xFFFFFFFF) + rest[4:]
    packed = json.dumps(header).encode() if kind < 5 else anyhow(packed, rng, 0.7)
    if rng.random() < 0.02:
        packed = b"[" * rng.choice((10, 100_000))
    return content[:6] + len(packed).to_bytes(4, "little") + packed + rest


def _cs(content: bytes, rng: Random) -> bytes:
    return (_npy if content.startswith(b"\x93NUMPY") else _stream)(content, rng)


def _mrc(content: bytes, rng: Random) -> bytes:
    """An MRC file with other words in its header, and some values that are no map's; packed where it was packed."""
    if content.startswith(b"\x1f\x8b"):
        return gzip.compress(_mrc(gzip.decompress(content), rng), 1)
    data, order = bytearray(content), rng.choice("<<<>")
    for _ in range(rng.choice((1, 1, 2, 3))):
        word = rng.choice((0, 1, 2, 3, 3, 4, 5, 7, 10, 11, 12, 16, 17, 18, 22, 23, 49, 52, 53, rng.randrange(56)))
        if rng.random() < 0.7:
            struct.pack_into(f"{order}I", data, 4 * word, rng.choice((*INTS, 3, 4, 6, 8, 101)) & 0xFFFFFFFF)
        else:
            struct.pack_into(f"{order}f", data, 4 * word, rng.choice(FLOATS))
    if rng.random() < 0.2:
        at = 1024 + 4 * rng.randrange((len(data) - 1024) // 4)
        struct.pack_into("<f", data, at, rng.choice(FLOATS))
    return bytes(data)


def _hdf5(content: bytes, rng: Random) -> bytes:
    """An HDF5 file in which something is of another kind, shape or type, a group, a link, or gone."""
    buffer = io.BytesIO(content)
    with h5py.File(buffer, "r+") as file:
        name = rng.choice([*file, *file.attrs])
        (_other_attribute if name in file.attrs else _other_dataset)(file, name, rng)
    return buffer.getvalue()


def _other_attribute(file: h5py.File, name: str, rng: Random) -> None:
    changed = array(rng, np.atleast_1d(np.array(file.attrs[name])))
    del file.attrs[name]
    new = rng.choice((changed if changed.dtype.kind in "fiubS" and changed.size else "é", h5py.Empty("f4"), None))
    if new is not None:
        file.attrs[name] = new


def _other_dataset(file: h5py.File, name: str, rng: Random) -> None:
    found = file.get(name) if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
    small = isinstance(found, h5py.Dataset) and found.shape and found.size < 10**5
    value = np.array(found) if small else np.arange(4)
    del file[name]
    what = rng.choice(("group", "gone", "link", "loop", "array", "array", "array", "huge", "text"))
    if what == "group":
        file.create_group(name)
    elif what == "link":
        file[name] = rng.choice((h5py.ExternalLink("none.h5", "/x"), h5py.SoftLink("/none")))
    elif what == "loop":
        file[name] = h5py.SoftLink(f"/{name}")
    elif what == "huge":
        shape = rng.choice(((10**4,) * 3, (10**12,), (2**31, 2, 2)))
        file.create_dataset(name, shape, rng.choice(("u1", "u4", "f8")), chunks=(1,) * len(shape))
    elif what == "text":
        file[name] = rng.choice(("text", ["a", "b"]))
    elif what == "array":
        changed = array(rng, value)
        file[name] = changed if changed.dtype.kind in "fiubcS" and changed.dtype.itemsize else value[..., 0]


def _pickled(content: bytes, rng: Random) -> bytes:
    """A pickle of a dict of arrays in which one or two values are others."""
    values = pickle.loads(content)  # ours, as written
    for _ in range(rng.choice((1, 1, 2))):
        name, kind = rng.choice(list(values)), rng.random()
        if kind < 0.1:
            del values[name]
        elif kind < 0.3:
            values[name] = nested(rng, 2)
        elif isinstance(values[name], np.ndarray) and values[name].ndim:
            values[name] = array(rng, values[name])
        else:
            values[name] = rng.choice((math.nan, -1, 10**12, 1e300, 10**400, 0, 1e-320, np.zeros(3), "3", None))
    return pickle.dumps(values, protocol=rng.choice((2, 4, 5)))


def _mesh(content: bytes, rng: Random) -> bytes:
    """A mesh with other numbers or words, most often of the headers: attributes of XML, words between blanks."""
    mark = b'"' if content.startswith(b"<") else b" "
    pieces = content.split(mark)
    for _ in range(rng.choice((1, 1, 2))):
        at = min(len(pieces) - 1, int(len(pieces) * rng.random() ** 3))
        kinds = (b"Float32", b"Int8", b"UInt64", b"binary", b"ascii")
        pieces[at] = rng.choice(kinds) if rng.random() < 0.1 else any_value(rng)
    return mark.join(pieces)


# of configs ----------------------------------------------------------------------------------------------------------

_YAML = [*WORDS, *NUMBERS, "[]", "{}", "null", ".nan", ".inf", "-.inf", "1" + "0" * 400, "2001-01-01", "~", "yes"]
_YAML += ["!!binary aGk=", "!!set {a, b}", "!!python/object/apply:os.system [touch touched]", "[[[[[1]]]]]", "[1, 1]"]
_YAML += ["{a: {b: {c: 1}}}", "*nobody", "&a [*a]", "&m {cells: *m}", "? x", "? [1, 2]\n: 3", "|\n  two\n  lines"]
_YAML += ["'$(touch touched)'", "0b11", "0o9", "1:30", "'\\x00'", '"\\0"', '"a\\nb"', "<<: {}", "<<: *none", "--- 1"]
_YAML += ["auto", "0.5", "[1, 2]", "axes", "between 1 2", "1>2", "files/c.mrc", "files/p.star"] * 3  # what may be right


def nested(rng: Random, depth: int = 4) -> Any:
    """Any value that JSON can give."""
    leaves = [None, True, 0, -1, 10**400, math.nan, math.inf, -0.0, "", "1e999", "auto", "a\0b", "x" * 5000, "\ud800"]
    leaves += ["axes", "kmeans 3", "between 1 2", "0>1, 1>0", 2, 3, 0.5]
    kind = rng.random()
    if depth == 0 or kind < 0.5:
        return rng.choice(leaves)
    if kind < 0.75:
        return [nested(rng, depth - 1) for _ in range(rng.randrange(4))]
    keys = ["cells", "rigidity", "seed", "latent_dims", "mesh", "1", "null", "é", ""]
    return {rng.choice(keys): nested(rng, depth - 1) for _ in range(rng.randrange(4))}


def _json(content: bytes, rng: Random) -> bytes:
    """A config in which one to three values are something else."""
    config = json.loads(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        section = rng.choice([config, *(value for value in config.values() if isinstance(value, dict))])
        section[rng.choice([*section, "x"])] = nested(rng)
    return json.dumps(config).encode()


def alias_bombs() -> tuple[bytes, bytes]:
    """Aliases that a few lines of YAML unfold to 10^9 values, in lists and in mappings."""
    lists = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True):
        lists += f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    mappings = "l0: &l0 {a: 1, b: 2}\n"
    mappings += "".join(f"l{i}: &l{i} {{a: *l{i - 1}, b: *l{i - 1}}}\n" for i in range(1, 40))
    return lists.encode(), mappings.encode()


def _yaml(content: bytes, rng: Random) -> bytes:
    """YAML with other values, keys or lines, or with aliases that unfold without end."""
    if rng.random() < 0.02:
        return content + rng.choice(alias_bombs()) + rng.choice((b"", b"mesh: {cells: *i}", b"name: *l39"))
    lines = content.decode("utf-8", "surrogateescape").split("\n")
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, kind, odd = rng.randrange(len(lines)), rng.choice((0, 0, 1, 1, 2, 3)), rng.choice(_YAML)
        key, colon, value = lines[at].partition(": ")
        marks = [mark for mark in ",:" if mark in value]
        if kind == 0 and colon:
            lines[at] = f"{key}: {odd}"
        elif kind == 1 and marks:
            mark = rng.choice(marks)
            parts = value.split(mark)
            parts[rng.randrange(len(parts))] = f" {odd}"
            lines[at] = f"{key}: {mark.join(parts)}"
        elif kind == 2:
            lines[at] = lines[at].replace(key.strip(), odd) if key.strip() else odd
        else:
            lines.insert(at, odd)
    return "\n".join(lines).encode("utf-8", "surrogateescape")


_OF_FORMAT: dict[str, Callable[[bytes, Random], bytes]] = {
    ".npy": _npy,
    ".cs": _cs,
    ".mrc": _mrc,
    ".mrcs": _mrc,
    ".seg": _hdf5,
    ".pkl": _pickled,
    ".json": _json,
    ".yaml": _yaml,
    **dict.fromkeys((".vtu", ".vtk", ".msh", ".ply", ".stl", ".obj"), _mesh),
}
