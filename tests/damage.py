"""Files to damage, and ways to damage them that know how a format is built. Random, but the same for the same seed."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path

import h5py
import meshio
import mrcfile
import numpy as np
from particle_files import cs_records, save_cs, write_relion_star

from flexlib.mesh.cryosparc import write_flex_mesh
from flexlib.mesh.lattice import bcc_mesh
from flexlib.particles.cs_file import CsFile
from flexlib.tetra.tetmesh import boundary_faces

Random = random.Random

EXTREME_INTS = (0, 1, -1, 2, 7, 255, 2**15, 2**16 - 1, 2**24, 10**6, 2**31 - 1, -(2**31), 2**32 - 1, 10**12, 2**62)
EXTREME_TEXTS = (
    *(
        "nan",
        "inf",
        "-inf",
        "-1",
        "0",
        "1e400",
        "-1e308",
        "1e-400",
        "9" * 30,
        "0x10",
        "1_0",
        "True",
        "",
        "''",
        '"',
        "'",
    ),
    *("#", "data_", "data_x", "loop_", "_rlnImageName", "_", "1@", "@", "0@x", "1.5@x", "1e300@x", "[" * 3000, "[NaN]"),
    *("1@../../../../etc/passwd", "1@/etc/passwd", "\0", "a\0b", "\r", "\f1", "é", "\U0001f4a5", "\ufeff", "\u2028"),
    *("{}", "{x}", "$(touch touched)", "`touch touched`", "<script>", "x" * 3000, "-x", ";", "\x1b[31m", "None"),
)


def spoil_bytes(content: bytes, rng: Random) -> bytes:
    """Bytes flipped, inserted, deleted, repeated or cut off, or a word made extreme; most often near the start."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        size = len(data)
        if not size:
            break
        at = min(size - 1, int(size * rng.random() ** rng.choice((1, 4))))
        kind, length = rng.randrange(8), rng.choice((1, 1, 2, 4, 8, 64))
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.choice((0, 1, 10, 13, 34, 39, 127, 128, 255, rng.randrange(256)))
        elif kind == 2:
            data[at:at] = rng.choice((bytes(length), rng.randbytes(length), b"\xff" * length, data[at : at + length]))
        elif kind == 3:
            del data[at : at + length]
        elif kind == 4:
            del data[at:]
        elif kind == 5:
            other = rng.randrange(size)
            data[at : at + length] = data[other : other + length]
        else:
            word = struct.pack(rng.choice("<>") + "q", min(rng.choice(EXTREME_INTS), 2**62))
            width = rng.choice((2, 4, 8))
            data[at : at + width] = word[:width] if rng.random() < 0.5 else word[-width:]
    return bytes(data)


def spoil_lines(content: bytes, rng: Random) -> bytes:
    """Lines repeated, left out, moved or swapped, columns too, and values that no column has."""
    lines = content.decode("utf-8", "surrogateescape").split("\n")
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, other, kind = rng.randrange(len(lines)), rng.randrange(len(lines)), rng.randrange(8)
        words = lines[at].split()
        if kind == 0:
            lines.insert(other, lines[at])
        elif kind == 1 and len(lines) > 1:
            del lines[at]
        elif kind == 2:
            lines[at], lines[other] = lines[other], lines[at]
        elif kind == 3 and lines[at].startswith("_"):  # a label that another column has
            lines[at] = next((line for line in lines[other:] if line.startswith("_")), lines[at])
        elif kind == 4:  # a column less, or twice
            column, twice = rng.randrange(max(1, len(words))), rng.random() < 0.5
            for row in range(at, len(lines)):
                cells = lines[row].split()
                if len(cells) > column and len(cells) == len(words):
                    lines[row] = " ".join(
                        [*cells[:column], *cells[column : column + 1] * 2 * twice, *cells[column + 1 :]]
                    )
        elif words:
            words[rng.randrange(len(words))] = rng.choice(EXTREME_TEXTS)
            lines[at] = rng.choice((" ", " ", "\t", ", ")).join(words)
        else:
            lines[at] = rng.choice(EXTREME_TEXTS)
    return "\n".join(lines).encode("utf-8", "surrogateescape")


def spoil_text(content: bytes, rng: Random) -> bytes:
    """By lines, by bytes, or both."""
    content = spoil_lines(content, rng) if rng.random() < 0.75 else content
    return spoil_bytes(content, rng) if rng.random() < 0.4 else content


# particles -----------------------------------------------------------------------------------------------------------


def star_files(folder: Path) -> None:
    path = write_relion_star(folder / "relion.star", halves=True)
    text = path.read_text()
    (folder / "windows.star").write_bytes(text.replace("\n", "\r\n").encode())
    (folder / "quoted.star").write_text(text.replace("opticsGroup1", "'optics group 1'").replace("abc", '"a b"'))
    optics = text[text.index("data_optics") : text.index("data_particles")]
    old = text.replace(optics, "").replace("_rlnRandomSubset #12\n", "_rlnRandomSubset\n_rlnPixelSize\n_rlnVoltage\n")
    old = old.replace("_rlnVoltage\n", "_rlnVoltage\n_rlnSphericalAberration\n_rlnOddZernike\n")
    rows = (line + " 2.0 300 2.7 [0,1.5,0]" if "@" in line else line for line in old.split("\n"))
    (folder / "old.star").write_text("\n".join(rows))


def cs_files(folder: Path) -> None:
    records = cs_records()
    save_cs(folder / "numpy.cs", records)
    paths = sorted(set(records["blob/path"].tolist()))
    heap = b"\0" + b"\0".join(paths) + b"\0"
    stream = {name: records[name] for name in records.dtype.names}
    stream["blob/path"] = np.array([heap.index(path) for path in records["blob/path"].tolist()], np.uint64)
    kinds = [[name, v.dtype.str, *([list(v.shape[1:])] if v.ndim > 1 else [])] for name, v in stream.items()]
    kinds = [[name, "|O"] if name == "blob/path" else [name, *kind] for name, *kind in kinds]
    for compression in ("lz4", "snappy", None):
        header = {"length": 12, "dtype": kinds, "compression": compression, "compressed_fields": list(stream)[1:]}
        CsFile(folder, None, stream, header, heap).write(folder / f"{compression}.cs")


def spoil_cs(content: bytes, rng: Random) -> bytes:
    """A .cs file with another header or other columns, of either layout, or with other bytes."""
    if rng.random() < 0.35:
        return spoil_bytes(content, rng)
    if content.startswith(b"\x93NUMPY"):
        return _spoil_npy_header(content, rng) if rng.random() < 0.4 else _spoil_records(content, rng)
    return _spoil_stream(content, rng)


def _spoil_npy_header(content: bytes, rng: Random) -> bytes:
    size = int.from_bytes(content[8:10], "little")
    header = content[10 : 10 + size].decode("latin1")
    shape = rng.choice(("(1000000000000,)", "(-1,)", "(12, 1)", "()", "(0,)", "(True,)", "(12.0,)", "('12',)", "12"))
    kinds = ("'|O'", "'<f2'", "'<c16'", "'<U9'", "'|S0'", "'|V4'", "'|b1'", "'<M8[s]'", "'>f4'", "'<f16'", "'<i8'", "1")
    header = header.replace("(12,)", shape) if rng.random() < 0.5 else header
    for _ in range(rng.randrange(3)):
        header = header.replace(
            rng.choice(("'<f4'", "'<u4'", "'<u8'", "'|S24'")), rng.choice(kinds), rng.randrange(1, 4)
        )
    if rng.random() < 0.1:
        header = rng.choice(("[" * 900, "-" * 9000 + "1", "{'descr': 1}", "__import__('os')", "{" * 50, header * 2))
    packed = header.encode()[:65000]
    return (
        content[:6]
        + rng.choice((b"\1\0", b"\1\0", b"\1\0", b"\3\0"))
        + struct.pack("<H", len(packed))
        + packed
        + content[10 + size :]
    )


def _spoil_records(content: bytes, rng: Random) -> bytes:
    records = np.load(io.BytesIO(content))
    columns = {name: records[name] for name in records.dtype.names}
    for _ in range(rng.choice((1, 1, 2, 3))):
        name = rng.choice(list(columns))
        kind, values = rng.randrange(5), columns[name]
        if kind == 0 and len(columns) > 1:
            del columns[name]
        elif kind == 1:  # another type or shape
            retyped = np.zeros(rng.choice(((12,), (12, 1), (12, 3), (12, 2, 2), (12, 0))), rng.choice(_TYPES))
            columns[name] = retyped
        elif kind == 2:
            columns[name], columns[other] = columns[other := rng.choice(list(columns))], values
        elif values.dtype.kind in "fui" and values.size:
            worst = rng.choice((np.nan, np.inf, -1, 0, 3e38, 2**31, 0.5, 1e-40))
            spoilt = values.copy()
            with np.errstate(all="ignore"):
                spoilt.ravel()[rng.randrange(values.size)] = np.float64(worst).astype(values.dtype)
            columns[name] = spoilt
    count = rng.choice((12, 12, 12, 1, 0))
    table = np.zeros(count, [(name, v.dtype, v.shape[1:]) for name, v in columns.items()])
    for name, values in columns.items():
        table[name] = values[:count]
    out = io.BytesIO()
    np.save(out, table)
    return out.getvalue()


_TYPES = ("<f2", "<f8", ">f4", "<f16", "<c8", "<U5", "|S3", "<M8[s]", "|b1", "|i1", "<u8", "|V4")


def _spoil_stream(content: bytes, rng: Random) -> bytes:
    size = int.from_bytes(content[6:10], "little")
    header, kind = json.loads(content[10 : 10 + size]), rng.randrange(6)
    rest = content[10 + size :]
    odd = rng.choice((*EXTREME_INTS, None, "", [], {}, 1.5, 1e300, float("inf"), "lz4", [["uid"]], [[1, 2, 3]]))
    column = rng.randrange(len(header["dtype"]))
    if kind == 0:
        header[rng.choice(list(header))] = odd
    elif kind == 1:
        header["dtype"][column][1] = rng.choice((*_TYPES, "|O", "<u8,<f4", "S", "V0", "f4" * 99, "(2,)f4", 7, None))
    elif kind == 2:
        header["dtype"][column][2:] = [rng.choice(([10**12], [-1], [0], [2**40, 2**40], [], 5, None, ["x"], [1.5]))]
    elif kind == 3:
        header["dtype"][column] = header["dtype"][rng.randrange(len(header["dtype"]))]
    elif kind == 4:
        rest = struct.pack("<I", rng.choice(EXTREME_INTS) & 0xFFFFFFFF) + rest[4:]
    packed = json.dumps(header).encode() if kind < 5 else b"[" * rng.choice((10, 100000))
    return content[:6] + struct.pack("<I", len(packed)) + packed + rest


# maps and stacks -----------------------------------------------------------------------------------------------------


def map_files(folder: Path) -> None:
    values = np.random.default_rng(0).normal(size=(8, 8, 8))
    for name, kind in (("float", "f4"), ("int", "i2"), ("byte", "i1"), ("half", "f2"), ("complex", "c8")):
        with mrcfile.new(folder / f"{name}.mrc", overwrite=True) as file:
            file.set_data((3 * values).astype(kind))
            file.voxel_size = 1.5
    (folder / "packed.mrc").write_bytes(gzip.compress((folder / "float.mrc").read_bytes()))


def stack_files(folder: Path) -> None:
    for name, kind in (("float", "f4"), ("int", "i2"), ("byte", "i1"), ("half", "f2"), ("word", "u2")):
        with mrcfile.new(folder / f"{name}.mrcs", overwrite=True) as file:
            file.set_data(np.arange(3 * 36).reshape(3, 6, 6).astype(kind))
            file.set_image_stack()


def spoil_mrc(content: bytes, rng: Random) -> bytes:
    """An MRC file with other words in its header, or other bytes; packed where it was packed."""
    if content.startswith(b"\x1f\x8b"):
        packed = gzip.compress(spoil_mrc(gzip.decompress(content), rng), 1)
        return packed if rng.random() < 0.8 else spoil_bytes(packed, rng)
    if rng.random() < 0.3:
        return spoil_bytes(content, rng)
    data, order = bytearray(content), rng.choice("<<<>")
    for _ in range(rng.choice((1, 1, 2, 3))):
        word = rng.choice((0, 1, 2, 3, 3, 4, 5, 7, 10, 11, 12, 16, 17, 18, 22, 23, 49, 52, 53, rng.randrange(56)))
        if rng.random() < 0.7:
            value = rng.choice((*EXTREME_INTS, 3, 4, 6, 8, 12, 101)) & 0xFFFFFFFF
            struct.pack_into(f"{order}I", data, 4 * word, value)
        else:
            struct.pack_into(f"{order}f", data, 4 * word, rng.choice((np.nan, np.inf, -1.0, 0.0, 3e38, 1e-40, 12.0)))
    if rng.random() < 0.2:
        at = 1024 + 4 * rng.randrange((len(data) - 1024) // 4)
        struct.pack_into("<f", data, at, rng.choice((np.nan, np.inf, 3e38, 2.0**31, 0.5)))
    return bytes(data[: rng.randrange(len(data))] if rng.random() < 0.1 else data)


# segments and meshes -------------------------------------------------------------------------------------------------


def _segger(folder: Path, name: str, changes: dict[str, object] | None = None) -> None:
    mask = np.random.default_rng(1).integers(0, 4, (5, 5, 5)).astype(np.uint32)
    content = {"mask": mask, "region_ids": np.array([1, 2, 3, 9]), "parent_ids": np.array([9, 9, 0, 0])}
    with h5py.File(folder / f"{name}.seg", "w") as file:
        file.attrs["format"] = np.bytes_("segger")
        file.attrs["ijk_to_xyz_transform"] = np.column_stack([2.0 * np.eye(3), np.zeros(3)]).astype(np.float32)
        for key, value in (content | (changes or {})).items():
            if key.startswith("@"):
                file.attrs[key[1:]] = value
            elif isinstance(value, tuple):  # claimed, never written
                file.create_dataset(key, value, np.uint32, chunks=(64,) * len(value))
            elif isinstance(value, np.ndarray) and value.dtype.kind != "O":
                file.create_dataset(key, data=value, compression="gzip" if value.ndim == 3 else None)
            elif value == "group":
                file.create_group(key)
            elif value is not None:
                file[key] = value


SEGGER_CHANGES: dict[str, dict[str, object]] = {
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
    "chain": {"region_ids": np.arange(1, 3001), "parent_ids": np.arange(2, 3002)},
    "lists": {"parent_ids": np.array([9, 9, 0])},
    "nan": {"@ijk_to_xyz_transform": np.full((3, 4), np.nan)},
    "matrix": {"@ijk_to_xyz_transform": np.eye(3)},
    "word": {"@ijk_to_xyz_transform": "turned"},
    "format": {"@format": 7},
}


def seg_files(folder: Path) -> None:
    for name, changes in SEGGER_CHANGES.items():
        _segger(folder, name, changes)


def mesh_files(folder: Path) -> None:
    """Meshes of tetrahedra, in text and binary, and closed surfaces."""
    mask = np.zeros((10, 10, 10), bool)
    mask[3:7, 3:7, 3:7] = True
    mesh = bcc_mesh(mask, 3.0, 7.0, None)
    grid = meshio.Mesh(
        mesh.vertices_A, [("tetra", mesh.cells.astype(np.int64))], cell_data={"rigidity": [mesh.rigidity]}
    )
    bare = meshio.Mesh(grid.points, grid.cells)
    surface = meshio.Mesh(mesh.vertices_A.astype(np.float32), [("triangle", boundary_faces(mesh)[0].astype(np.int32))])
    for binary in (False, True):
        for suffix, kind in ((".vtu", "vtu"), (".vtk", "vtk"), (".msh", "gmsh")):
            written = grid if binary or kind != "gmsh" else bare  # meshio writes no text of such data that it can read
            meshio.write(folder / f"tetra{binary}{suffix}", written, kind, binary=binary)
        for suffix in (".stl", ".ply"):
            meshio.write(folder / f"surface{binary}{suffix}", surface, suffix[1:], binary=binary)
    meshio.write(folder / "old.msh", bare, "gmsh22", binary=False)
    meshio.write(folder / "surface.obj", surface, "obj")
    soft = mask.astype(np.float32)
    write_flex_mesh(folder / "flex.pkl", mesh, soft, soft, 3.0)


def spoil_mesh(content: bytes, rng: Random) -> bytes:
    """A mesh with other numbers, most often of the headers, other lines or other bytes; a pickle with other values."""
    if content.startswith(b"\x80"):
        return _spoil_pickle(content, rng) if rng.random() < 0.5 else spoil_bytes(content, rng)
    if rng.random() < 0.4:
        return spoil_text(content, rng)
    pieces = content.split(b'"') if content.startswith(b"<") else content.split(b" ")
    for _ in range(rng.choice((1, 1, 2))):
        at = min(len(pieces) - 1, int(len(pieces) * rng.random() ** 3))
        odd = rng.choice((*map(str, EXTREME_INTS), *EXTREME_TEXTS, "Float32", "Int8", "UInt64", "binary", "ascii"))
        pieces[at] = odd.encode("utf-8", "surrogateescape")
    return (b'"' if content.startswith(b"<") else b" ").join(pieces)


def _spoil_pickle(content: bytes, rng: Random) -> bytes:
    whole = pickle.loads(content)  # ours, written above
    values = dict(whole)
    for _ in range(rng.choice((1, 1, 2))):
        key = rng.choice(
            ("mask", "N", "psize_A", "tm_points", "tm_cells", "tm_tetraidx_map", "tm_rweights", "tm_segmask")
        )
        old = np.asarray(whole[key])
        odd = [
            None,
            "x",
            -1,
            0,
            10**12,
            1e300,
            float("nan"),
            [],
            {},
            old.astype(object),
            old[..., None],
            old.astype("c8"),
        ]
        with np.errstate(all="ignore"):
            odd += [old * -1.0, old * 1e30, old * np.nan, old.ravel()[: rng.randrange(old.size + 1)], old.astype("U9")]
        values[key] = rng.choice(odd)
        if rng.random() < 0.1:
            values.pop(key)
    return pickle.dumps(values, protocol=rng.choice((2, 4)))


# configs -------------------------------------------------------------------------------------------------------------

CONFIG = """\
name: run
particles: files/p.star
image_root: .
consensus: files/c.mrc
device: cpu
prepare: {train_box: 64, symmetry: C2}
mesh:
  cells: [10, 20]
  segmentation: files/s.mrc
  connections: 0>1, 1>2
  rigid_segments: [1]
  threshold: auto
train:
  latent_dims: [1, 2]
  rigidity: [1e-1, 2.0]
  seed: 3
sweep:
  exclude: [{cells: 10, rigidity: 2.0}]
  points: [{cells: 20, latent_dims: 4}]
generate: {series: [axes, kmeans 3, 'between 1 2'], frames: 5}
reconstruct: {points: [{cells: 20}]}
validate: {points: best}
"""

_YAML_VALUES = (
    *EXTREME_TEXTS,
    *("[]", "{}", "null", ".nan", ".inf", "-.inf", "1" + "0" * 400, "2001-01-01", "!!binary aGk=", "!!set {a, b}", "~"),
    *(
        "!!python/object/apply:os.system [touch touched]",
        "[[[[[1]]]]]",
        "{a: {b: {c: 1}}}",
        "*nobody",
        "&a [*a]",
        "? x",
    ),
    *(
        "|\n  two\n  lines",
        "'$(touch touched)'",
        "[1, 1]",
        "0b11",
        "1:30",
        "yes",
        "'\\x00'",
        '"\\0"',
        '"a\\nb"',
        "<<: {}",
    ),
)


def _bombs() -> tuple[bytes, ...]:
    """Aliases that a few lines unfold to 10^9 values, in lists and in mappings."""
    lists = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True):
        lists += f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    mappings = "l0: &l0 {a: 1, b: 2}\n"
    mappings += "".join(f"l{i}: &l{i} {{a: *l{i - 1}, b: *l{i - 1}}}\n" for i in range(1, 40))
    return lists.encode(), mappings.encode()


def config_files(folder: Path) -> None:
    (folder / "run.yaml").write_text(CONFIG)
    for number, bomb in enumerate(_bombs()):
        (folder / f"bomb{number}.yaml").write_bytes(CONFIG.encode() + bomb)
    write_relion_star(folder / "files/p.star")
    for name in "cs":
        with mrcfile.new(folder / f"files/{name}.mrc", np.zeros((8, 8, 8), np.float32), overwrite=True) as file:
            file.voxel_size = 2.0


def spoil_config(content: bytes, rng: Random) -> bytes:
    """A config with other values, keys or lines."""
    if rng.random() < 0.01:
        content += rng.choice(_bombs())
    lines = content.decode("utf-8", "surrogateescape").split("\n")
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(lines))
        key, colon, value = lines[at].partition(": ")
        odd = rng.choice(_YAML_VALUES)
        kind = rng.randrange(4)
        if kind == 0 and colon:
            lines[at] = f"{key}: {odd}"
        elif kind == 1 and any(mark in value for mark in ",:"):
            mark = rng.choice([mark for mark in ",:" if mark in value])
            parts = value.split(mark)
            parts[rng.randrange(len(parts))] = f" {odd}"
            lines[at] = f"{key}: {mark.join(parts)}"
        elif kind == 2:
            lines[at] = lines[at].replace(key.strip(), odd) if key.strip() else odd
        else:
            return spoil_text("\n".join(lines).encode("utf-8", "surrogateescape"), rng)
    return "\n".join(lines).encode("utf-8", "surrogateescape")


KINDS: dict[str, tuple[Callable[[Path], None], Callable[[bytes, Random], bytes]]] = {
    "star": (star_files, spoil_text),
    "cs": (cs_files, spoil_cs),
    "map": (map_files, spoil_mrc),
    "labels": (map_files, spoil_mrc),
    "stack": (stack_files, spoil_mrc),
    "seg": (seg_files, spoil_bytes),
    "mesh": (mesh_files, spoil_mesh),
    "config": (config_files, spoil_config),
}
