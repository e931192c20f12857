r"""CryoSPARC's .cs files as they stand: records are read, chosen and written back unchanged.

Two layouts, which their first bytes distinguish:

* ``\x93NUMPY``: a NumPy structured array (``.npy``, any version and header width);
* ``\x95CSDAT``: the compressed stream of CryoSPARC 4 and later. Little-endian: uint32 size of a JSON header with
  ``length``, ``dtype`` ([name, type] or [name, type, shape]), ``compression`` ("lz4" blocks, "snappy" or null) and
  ``compressed_fields``; then each column as uint32 size and bytes; then a heap of NUL-terminated texts, to which
  columns of type ``|O`` hold uint64 offsets.

Nothing is ever unpickled: columns of Python objects in a NumPy file are refused. Source of the layouts: the public
``cryosparc-tools`` (``cryosparc/dataset``), which also wrote the test's example file. It was considered for the job
itself, but is tied to the version of one's CryoSPARC.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cramjam
import numpy as np

from flexlib.errors import InputError
from flexlib.files import atomic_path, reading
from flexlib.untrusted import parsing, read_npy

_NUMPY, _STREAM = b"\x93NUMPY", b"\x95CSDAT"
_MAX_RATIO = 256  # no LZ4 or snappy block shrinks data further
_COMPRESSIONS = ("lz4", "snappy")
_OURS = "flex"  # prefix of our own columns
_RESULT_KINDS = {r"components_mode_\d+": "components", r"alignments_class_\d+": "alignments3D"}


@dataclass(frozen=True)
class CsFile:
    """The n rows of one .cs file: ``records`` of a NumPy file, or ``stream`` columns and their text heap."""

    path: Path
    records: np.ndarray | None  # (n,) structured
    stream: Mapping[str, np.ndarray]  # (n, ...) each, as stored: texts are offsets into heap
    header: Mapping[str, Any]  # of the stream
    heap: bytes = b""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the columns."""
        return tuple(self.stream) if self.records is None else tuple(self.records.dtype.names or ())

    def __len__(self) -> int:
        return len(next(iter(self.stream.values()))) if self.records is None else len(self.records)

    def column(self, name: str) -> np.ndarray:
        """(n, ...) values; texts as bytes (NumPy's ``S``). Raises InputError where a text's offset is wrong."""
        if self.records is not None:
            values = self.records[name]
            return np.char.encode(values, "utf-8") if values.dtype.kind == "U" else values
        values = self.stream[name]
        if _is_text(self.header, name):
            offsets, index = np.unique(values, return_inverse=True)
            return np.array([self._text(name, int(offset)) for offset in offsets], np.bytes_)[index]
        return values

    def _text(self, name: str, offset: int) -> bytes:
        end = self.heap.find(b"\0", offset) if offset < len(self.heap) else -1
        if end < 0:
            raise InputError(f"{self.path}: column {name}: a text lies outside the file: damaged, or not CryoSPARC's")
        return self.heap[offset:end]

    def take(self, rows: np.ndarray) -> CsFile:
        """The file with the rows at ``rows`` ((m,) int or (n,) bool) only, each byte as it was."""
        if self.records is not None:
            return replace(self, records=self.records[rows])
        return replace(self, stream={name: values[rows] for name, values in self.stream.items()})

    def with_columns(self, columns: Mapping[str, np.ndarray]) -> CsFile:
        """The file with ``columns``, (n, ...) numbers each; all other values as they were.

        One that the file has is replaced, in the type that it has there; others come after the last.
        """
        added = {name: values for name, values in columns.items() if name not in self.names}
        if self.records is not None:
            kinds = [(name, self.records.dtype[name]) for name in self.names]
            kinds += [(name, np.dtype((values.dtype, values.shape[1:]))) for name, values in added.items()]
            records = np.empty(len(self), kinds)
            for name in records.dtype.names or ():
                records[name] = columns[name] if name in columns else self.records[name]
            return replace(self, records=records)
        shapes = {name: [list(values.shape[1:])] if values.ndim > 1 else [] for name, values in added.items()}
        dtype = [[name, values.dtype.str, *shapes[name]] for name, values in added.items()]
        stream = {
            name: columns[name].astype(values.dtype) if name in columns else values
            for name, values in self.stream.items()
        }
        return replace(self, stream=stream | added, header={**self.header, "dtype": [*self.header["dtype"], *dtype]})

    def write(self, path: str | Path) -> None:
        """Write in the layout that the file was read in, atomically."""
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            if self.records is not None:
                np.save(file, self.records, allow_pickle=False)
                return
            header = json.dumps({**self.header, "length": len(self)}).encode()
            file.write(_STREAM + _uint32(len(header)) + header)
            for name, values in self.stream.items():
                data = np.ascontiguousarray(values).tobytes()
                if self.header["compression"] is not None and name in self.header["compressed_fields"]:
                    data = _compress(data, self.header["compression"])
                file.write(_uint32(len(data)) + data)
            file.write(self.heap)


def read_cs_file(path: str | Path) -> CsFile:
    """Read a .cs file of either layout.

    Raises
    ------
    InputError
        Not a .cs file, damaged, without rows, or holding Python objects (which are never loaded).
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: CryoSPARC file not found")
    with reading(path), path.open("rb") as file:
        start = file.read(6)
    if start == _STREAM:
        table = _read_stream(path)
    elif start == _NUMPY:
        table = _read_numpy(path)
    elif start[:1] == b"\x80":
        raise InputError(f"{path}: a Python pickle, which is never loaded: not a CryoSPARC .cs file")
    else:
        raise InputError(f"{path}: not a readable CryoSPARC .cs file (it begins with {start!r})")
    if len(table) == 0:
        raise InputError(f"{path}: no particle rows in this .cs file")
    return table


def _read_numpy(path: Path) -> CsFile:
    try:
        records = read_npy(path, "CryoSPARC .cs file")
    except InputError as error:
        if objects := _object_columns(path):
            raise InputError(
                f"{path}: column {objects[0]}: Python objects (a pickle), which are never loaded: save the file again "
                "with texts of fixed length"
            ) from error
        raise
    if records.dtype.names is None or records.ndim != 1:
        raise InputError(f"{path}: not a CryoSPARC .cs file: an array without named columns")
    return CsFile(path, records, {}, {})


def _object_columns(path: Path) -> list[str]:
    """Names of the columns of a .npy file whose type is Python objects; empty where its header says nothing."""
    with path.open("rb") as file:
        version = file.read(8)[6:7]
        size = int.from_bytes(file.read(2 if version == b"\x01" else 4), "little")
        header = file.read(min(size, path.stat().st_size))
    try:
        described = ast.literal_eval(header.decode("utf-8").strip())["descr"]
    except (ValueError, SyntaxError, KeyError, TypeError, MemoryError, RecursionError):
        return []
    if not isinstance(described, list):
        return ["(all)"] if "O" in str(described) else []
    return [
        str(column[0])
        for column in described
        if isinstance(column, tuple) and len(column) > 1 and "O" in str(column[1])
    ]


def _read_stream(path: Path) -> CsFile:
    with reading(path):
        content = path.read_bytes()
    with parsing(path, "CryoSPARC .cs file: damaged: the header of the compressed stream cannot be read"):
        at = 10 + int.from_bytes(content[6:10], "little")
        header = json.loads(content[10:at])
        count, described = int(header["length"]), [(str(name), kind, *shape) for name, kind, *shape in header["dtype"]]
        compression, compressed = header["compression"], set(header["compressed_fields"])
    if compression is not None and compression not in _COMPRESSIONS:
        raise InputError(f"{path}: compressed with {compression!r}, which is not known: save it as format NUMPY")
    stream = {}
    for name, kind, *shape in described if count else []:
        dtype = _stream_dtype(path, name, kind, shape)
        size = int.from_bytes(content[at : at + 4], "little")
        data = content[at + 4 : at + 4 + size]
        at += 4 + size
        expected = count * dtype.itemsize
        if len(data) != size or count < 0 or expected > _MAX_RATIO * max(size, 64):
            raise InputError(f"{path}: column {name}: truncated: {len(data)} bytes for {count} rows")
        if name in compressed and compression is not None:
            data = _decompress(data, expected, compression)
        if len(data) != expected:
            raise InputError(f"{path}: column {name}: damaged: {len(data)} bytes, {expected} expected")
        stream[name] = np.frombuffer(data, dtype)
    if not stream:
        raise InputError(f"{path}: no particle rows in this .cs file")
    return CsFile(path, None, stream, header, content[at:])


def _stream_dtype(path: Path, name: str, kind: Any, shape: Sequence[Any]) -> np.dtype:
    try:
        base = np.dtype(np.uint64) if kind == "|O" else np.dtype(str(kind))
        dtype = np.dtype((base, tuple(int(side) for side in shape[0]))) if shape else base
    except (TypeError, ValueError, SyntaxError, OverflowError) as error:
        raise InputError(f"{path}: column {name}: type {kind!r} is not known") from error
    if base.kind not in "fciub" or dtype.itemsize == 0:
        raise InputError(f"{path}: column {name}: type {kind!r} is not known")
    return dtype


def _is_text(header: Mapping[str, Any], name: str) -> bool:
    return any(column[0] == name and column[1] == "|O" for column in header["dtype"])


def _decompress(data: bytes, size: int, compression: str) -> bytes:
    """``size`` bytes, or nothing where the data are not a block of so many."""
    output = bytearray(size)
    into = cramjam.lz4.decompress_block_into if compression == "lz4" else cramjam.snappy.decompress_raw_into
    try:
        written = into(data, output)
    except cramjam.DecompressionError:
        return b""
    return bytes(output[:written])


def _compress(data: bytes, compression: str) -> bytes:
    if compression == "lz4":
        return bytes(cramjam.lz4.compress_block(data, store_size=False))
    return bytes(cramjam.snappy.compress_raw(data))


def _uint32(value: int) -> bytes:
    return value.to_bytes(4, "little")


def write_group(path: str | Path, files: Sequence[tuple[Path, CsFile]], title: str) -> None:
    """Write the .csg that describes .cs files (beside it, of the same particles) for CryoSPARC's Import Result Group.

    Each prefix of a column name (``blob/``, ``ctf/``, ``components_mode_0/``, ...) but ours is one result; a prefix in
    several files belongs to the first. Source: the .csg files that CryoSPARC exports.
    """
    import yaml

    results: dict[str, dict[str, Any]] = {}
    for path_of_part, file in files:
        prefixes = dict.fromkeys(name.split("/")[0] for name in file.names if "/" in name)
        for prefix in (prefix for prefix in prefixes if prefix != _OURS):
            kind = next((kind for pattern, kind in _RESULT_KINDS.items() if re.fullmatch(pattern, prefix)), prefix)
            about = {"metafile": f">{path_of_part.name}", "num_items": len(file), "type": f"particle.{kind}"}
            results.setdefault(prefix, about)
    group = {"description": title, "name": "particles", "title": title, "type": "particle"}
    with atomic_path(path) as temporary:
        temporary.write_text(yaml.safe_dump({"group": group, "results": results, "version": "v4.4.1"}))
