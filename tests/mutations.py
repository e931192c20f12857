"""Damage to files, for the fuzzing: of any bytes, of lines and columns of text, of what a format is made of."""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
from collections.abc import Callable
from datetime import date
from random import Random
from typing import Any

import h5py
import numpy as np
import yaml

_NUMBERS = ["0", "-1", "nan", "-inf", "1e400", "1e-320", "9" * 30, "9" * 5000, "1000000000000", "2147483648", "0x10"]
_WORDS = ["", "é", "\u2028", "\ufeff", "\0", "\x1b[31m", '"', "'", "#", "'two words'", "[1,2", "[[[[", "loop_", "data_"]
_WORDS += ["_rlnImageName", "_", "None", "true", "@", "0@", "1@", "../../x", "x" * 9000, ",", ";", "\r", "\x85", "\f"]
_RAW = [
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\xc3",
    b"\0\0\0\0",
    b"\x1f\x8b",
    b"BZh9",
    b"PK\x03\x04",
    b"\x93NUMPY",
    b"\x80\x04",
]
_EXTREME = [
    *(struct.pack("<i", value) for value in (-1, 0, 1, 255, 65535, 2**31 - 1, -(2**31), 10**9)),
    *(struct.pack("<q", value) for value in (-1, 10**12, 2**62, -(2**63))),
    *(struct.pack("<f", value) for value in (math.nan, math.inf, -1.0, 3e38, 1e-40)),
    *(struct.pack("<d", value) for value in (math.nan, -math.inf, 1e308)),
    struct.pack(">i", 2**31 - 1),
    struct.pack(">i", 2),
]


def damaged(content: bytes, rng: Random, text: bool) -> bytes:
    """One to four changes; of ``text`` mostly of lines and columns."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        change = rng.choice(_TEXT if text and rng.random() < 0.7 else _BYTES)
        content = change(content, rng)
    return content


# of bytes ------------------------------------------------------------------------------------------------------------


def _span(content: bytes, rng: Random) -> tuple[int, int]:
    """Begin and end; near the beginning, where headers are, as often as anywhere."""
    begin = rng.randrange(min(len(content), rng.choice((256, 1100, 10**9))) + 1)
    return begin, min(len(content), begin + rng.choice((1, 2, 4, 8, 64, 1024)))


def _flip(content: bytes, rng: Random) -> bytes:
    begin, _ = _span(content, rng)
    return (
        content[:begin]
        + bytes(byte ^ 1 << rng.randrange(8) for byte in content[begin : begin + 1])
        + content[begin + 1 :]
    )


def _insert(content: bytes, rng: Random) -> bytes:
    begin, _ = _span(content, rng)
    return content[:begin] + rng.choice([rng.randbytes(rng.randrange(1, 9)), *_RAW]) + content[begin:]


def _delete(content: bytes, rng: Random) -> bytes:
    begin, end = _span(content, rng)
    return content[:begin] + content[end:]


def _overwrite(content: bytes, rng: Random) -> bytes:
    begin, _ = _span(content, rng)
    begin -= begin % 4 if rng.random() < 0.7 else 0
    value = rng.choice(_EXTREME)
    return content[:begin] + value + content[begin + len(value) :]


def _repeat(content: bytes, rng: Random) -> bytes:
    begin, end = _span(content, rng)
    return content[:end] + content[begin:end] * rng.choice((1, 2, 50)) + content[end:]


def _swap(content: bytes, rng: Random) -> bytes:
    (a, b), (c, d) = sorted((_span(content, rng), _span(content, rng)))
    return content if b > c else content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]


def _cut(content: bytes, rng: Random) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


_BYTES = [_flip, _insert, _delete, _overwrite, _overwrite, _repeat, _swap, _cut]


# of lines, columns and values ----------------------------------------------------------------------------------------


def _value(rng: Random) -> bytes:
    return rng.choice(_RAW) if rng.random() < 0.1 else rng.choice(_NUMBERS + _WORDS).encode()


def _lines(content: bytes, rng: Random) -> bytes:
    lines = content.split(b"\n")
    a, b = rng.randrange(len(lines)), rng.randrange(len(lines))
    kind = rng.choice(("repeat", "copy", "delete", "swap", "blank", "many"))
    if kind == "repeat":
        lines.insert(a, lines[a])
    elif kind == "copy":
        lines[a] = lines[b]
    elif kind == "delete":
        del lines[a]
    elif kind == "swap":
        lines[a], lines[b] = lines[b], lines[a]
    elif kind == "blank":
        lines.insert(a, b"")
    else:
        lines[a:a] = [lines[a]] * 300
    return b"\n".join(lines)


def _token(content: bytes, rng: Random) -> bytes:
    found = [match.span() for match in re.finditer(rb"[^\s,=\"'<>:]+", content[: 1 << 16])]
    if not found:
        return content
    begin, end = rng.choice(found)
    return content[:begin] + _value(rng) + content[end:]


def _number(content: bytes, rng: Random) -> bytes:
    found = [match.span() for match in re.finditer(rb"-?\d+(\.\d+)?", content[: 1 << 16])]
    if not found:
        return content
    begin, end = rng.choice(found)
    return content[:begin] + rng.choice(_NUMBERS).encode() + content[end:]


def _columns(content: bytes, rng: Random) -> bytes:
    """The same damage to a column of all lines that have as many values as one line."""
    lines = content.split(b"\n")
    count = len(rng.choice(lines).split())
    if count == 0:
        return content
    a, b = rng.randrange(count), rng.randrange(count)
    kind, value = rng.choice(("repeat", "delete", "swap", "set", "copy")), _value(rng)
    for at, line in enumerate(lines):
        values = line.split()
        if len(values) == count:
            if kind == "repeat":
                values.insert(a, values[a])
            elif kind == "delete":
                del values[a]
            elif kind == "swap":
                values[a], values[b] = values[b], values[a]
            elif kind == "copy":
                values[a] = values[b]
            else:
                values[a] = value
            lines[at] = b" ".join(values)
    return b"\n".join(lines)


def _ends(content: bytes, rng: Random) -> bytes:
    return content.replace(b"\n", rng.choice((b"\r\n", b"\r", b"\n\n", b" \n", b"\x0b", b"\0\n")))


_TEXT: list[Callable[[bytes, Random], bytes]] = [
    _lines,
    _lines,
    _token,
    _token,
    _token,
    _number,
    _columns,
    _columns,
    _ends,
]


# of what formats are made of -----------------------------------------------------------------------------------------

_KINDS = ["<f8", ">f4", "<i2", "<u8", "|b1", "<c16", "S4", "<U3", "O", "M8[s]", "f2", "V3", "S0"]


def array(rng: Random, values: np.ndarray) -> np.ndarray:
    """An array in another type, shape or with extreme values."""
    kind = rng.choice(("type", "shape", "value", "empty", "more"))
    if kind == "type":
        try:
            with np.errstate(all="ignore"):
                return values.astype(rng.choice(_KINDS))
        except (TypeError, ValueError):
            return values
    if kind == "shape":
        return rng.choice((values.ravel(), values[None], values[..., None], values[:1], values.T))
    if kind == "empty":
        return values[:0]
    if kind == "more":
        return np.concatenate([values, values])
    changed = np.array(values)
    if changed.size and changed.dtype.kind in "fiu":
        extreme = [math.nan, math.inf, 1e308, -1.0] if changed.dtype.kind == "f" else [-1, 2**31 - 1, 2**62, 0]
        with np.errstate(all="ignore"):
            changed.flat[rng.randrange(changed.size)] = np.array(rng.choice(extreme)).astype(changed.dtype)
    return changed


def npy(content: bytes, rng: Random) -> bytes:
    """A .npy file with a column more, less or of another kind, or a header that claims something else."""
    if rng.random() < 0.5:
        size = struct.unpack("<H", content[8:10])[0]
        header = damaged(content[10 : 10 + size], rng, text=True)[: 2**16 - 1]
        return content[:8] + struct.pack("<H", len(header)) + header + content[10 + size :]
    records = np.load(io.BytesIO(content), allow_pickle=False)
    if records.dtype.names is None:
        changed = array(rng, records)
    else:
        columns = {name: records[name] for name in records.dtype.names}
        name = rng.choice(list(columns))
        if rng.random() < 0.3:
            del columns[name]
        else:
            columns[name] = np.resize(array(rng, columns[name]), (len(records), *rng.choice(((), (2,), (3,)))))
        changed = np.empty(len(records), [(name, values.dtype, values.shape[1:]) for name, values in columns.items()])
        for name, values in columns.items():
            changed[name] = values
    file = io.BytesIO()
    np.save(file, changed, allow_pickle=True)
    return file.getvalue()


def stream(content: bytes, rng: Random) -> bytes:
    """CryoSPARC's compressed stream with another header."""
    size = int.from_bytes(content[6:10], "little")
    header = damaged(content[10 : 10 + size], rng, text=True)
    return content[:6] + len(header).to_bytes(4, "little") + header + content[10 + size :]


def hdf5(content: bytes, rng: Random) -> bytes:
    """An HDF5 file in which something is of another kind, shape or type, a group, a link, or gone."""
    file = io.BytesIO(content)
    with h5py.File(file, "r+") as content_of:
        name = rng.choice([*content_of, *content_of.attrs])
        what = rng.choice(("group", "gone", "link", "loop", "array", "array", "array", "huge", "text"))
        if name in content_of.attrs:
            value = np.array(content_of.attrs[name])
            del content_of.attrs[name]
            if what in ("array", "huge", "group"):
                changed = array(rng, value) if value.ndim else value[None]
                content_of.attrs[name] = changed if changed.dtype.kind in "fiubS" and changed.size else "é"
            elif what == "text":
                content_of.attrs[name] = h5py.Empty("f4")
        else:
            value = np.array(content_of[name])
            del content_of[name]
            if what == "group":
                content_of.create_group(name)
            elif what == "link":
                content_of[name] = rng.choice((h5py.ExternalLink("none.h5", "/x"), h5py.SoftLink("/none")))
            elif what == "loop":
                content_of[name] = h5py.SoftLink(f"/{name}")
            elif what == "huge":
                shape = rng.choice(((10**4,) * 3, (10**12,), (2**31, 2, 2)))
                content_of.create_dataset(name, shape, rng.choice(("u1", "u4", "f8")), chunks=(1,) * len(shape))
            elif what == "text":
                content_of[name] = rng.choice(("text", ["a", "b"]))
            elif what == "array":
                changed = array(rng, value)
                content_of[name] = (
                    changed if changed.dtype.kind in "fiubcS" and changed.dtype.itemsize else value[..., 0]
                )
    return file.getvalue()


def pickled(content: bytes, rng: Random) -> bytes:
    """A pickle of a dict of arrays in which a value is another."""
    values = pickle.loads(content)
    name = rng.choice(list(values))
    kind = rng.random()
    if kind < 0.15:
        del values[name]
    elif kind < 0.4:
        values[name] = nested(rng, 2)
    elif isinstance(values[name], np.ndarray):
        values[name] = array(rng, values[name])
    else:
        values[name] = rng.choice((math.nan, -1, 10**12, 10**400, 0, 1e-320, np.zeros(3), "3"))
    return pickle.dumps(values, protocol=rng.choice((2, 4, 5)))


def nested(rng: Random, depth: int = 4) -> Any:
    """Any Python value that YAML can give, and some that it cannot."""
    leaves = [None, True, 0, -1, 10**400, math.nan, math.inf, -0.0, "", "1e999", "auto", "a\0b", "x" * 5000, "\ud800"]
    leaves += ["axes", "kmeans 3", "between 1 2", "0>1, 1>0", 2, 3, 0.5, b"\xff", date(2024, 1, 1), (1, 2), {3}, object]
    kind = rng.random()
    if depth == 0 or kind < 0.5:
        return rng.choice(leaves)
    if kind < 0.75:
        return [nested(rng, depth - 1) for _ in range(rng.randrange(4))]
    keys = ["cells", "rigidity", "seed", "latent_dims", "mesh", 1, None, True, (1, 2), "é", ""]
    return {rng.choice(keys): nested(rng, depth - 1) for _ in range(rng.randrange(4))}


def config(given: dict[str, Any], rng: Random) -> dict[str, Any]:
    """A config with one to three values that are something else."""
    given = {key: dict(value) if isinstance(value, dict) else value for key, value in given.items()}
    for _ in range(rng.choice((1, 1, 2, 3))):
        section = rng.choice([given, *(value for value in given.values() if isinstance(value, dict))])
        key = rng.choice([*section, nested(rng, 0)]) if section else "name"
        if isinstance(key, (list, dict, set)):
            key = "mesh"
        section[key] = nested(rng)
    return given


def alias_bomb(rng: Random) -> bytes:
    """YAML of a few lines that stands for 10^9 values, under some key of a config."""
    lines = ["a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [
        f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    ]
    key = rng.choice(("name", "sweep", "simulate", "x"))
    return "\n".join([*lines, f"{key}: *i", "mesh: {cells: *i}", "particles: p.star", "consensus: c.mrc"]).encode()


def yaml_text(content: bytes, rng: Random) -> bytes:
    """YAML with aliases, circles, tags, or a value that is something else."""
    kind = rng.random()
    if kind < 0.02:
        return alias_bomb(rng)
    if kind < 0.3:
        return yaml.safe_dump(
            {key: value for key, value in config(yaml.safe_load(content), rng).items() if _plain({key: value})}
        ).encode()
    lines = content.split(b"\n")
    extra = [
        b"x: &x [*x]",
        b"mesh: &m {cells: *m}",
        b"? [1, 2]\n: 3",
        b"<<: *none",
        b"name: !!binary aGk=",
        b"name: 2024-01-01",
    ]
    extra += [
        b"train: !!set {a, b}",
        b"name: |\n  two\n  lines",
        b"seed: 0o9",
        b"name: !!python/object:os.system x",
        b"--- 1",
    ]
    lines.insert(rng.randrange(len(lines)), rng.choice(extra))
    return b"\n".join(lines)


def _plain(value: Any) -> bool:
    try:
        return bool(yaml.safe_dump(value))
    except (yaml.YAMLError, ValueError):
        return False
