"""Which micrograph a particle is from: as RELION and CryoSPARC name it, and as prepare hands it on."""

import numpy as np
import pandas as pd
import pytest
import starfile
from numpy.lib import recfunctions
from particle_files import COUNT, cs_records, prepared_poses, save_cs, write_relion_star

from flexlib.errors import InputError
from flexlib.particles import read_particles
from flexlib.particles.cs_file import CsFile
from flexlib.particles.latents_write import write_latents_star
from flexlib.particles.star import read_star, read_tables
from flexlib.particles.star_write import write_star

NUMBERS = [0, 0, 1, 0, 2, 2, 3, 1, 1, 4, 4, 0]  # in the order in which they first appear
NAMES = ["MotionCorr/job2/mic_7.mrc", "MotionCorr/job2/mic_1.mrc", "b/mic_7.mrc", "0003", "3"]
UIDS = np.array([2**60 + 1, 2**60, 7, 2**63 + 5, 2**63 + 4], np.uint64)  # floating point would take some for the same


def star_with(path, names=None, layout="3.1"):
    """A STAR file of COUNT particles with the column rlnMicrographName, if there are names."""
    tables = read_tables(write_relion_star(path))
    table = tables.particles if names is None else tables.particles.assign(rlnMicrographName=names)
    if layout == "3.0":
        optics = tables.optics.drop(columns=["rlnOpticsGroup", "rlnImageDimensionality"]).iloc[0]
        table = table.drop(columns="rlnOpticsGroup").assign(**optics)
    blocks = {"particles": table} if layout == "3.0" else {"optics": tables.optics, "particles": table}
    write_star(blocks, path)
    return path


def with_columns(records, **columns):
    """Records of a .cs file with further columns of its location."""
    names = [f"location/{name}" for name in columns]
    return recfunctions.append_fields(records, names, list(columns.values()), usemask=False)


@pytest.mark.parametrize("layout", ["3.0", "3.1"])
@pytest.mark.parametrize("quoted", [False, True])
def test_star_names_them(tmp_path, layout, quoted):
    names = [NAMES[number] + (" x" if quoted else "") for number in NUMBERS]
    particles = read_particles(star_with(tmp_path / "in.star", names, layout))
    assert particles.micrograph.tolist() == NUMBERS and particles.micrograph.dtype == np.int32
    rows = np.array([11, 4, 4])
    assert particles.subset(rows).micrograph.tolist() == [0, 2, 2]


@pytest.mark.parametrize("names", [None, [""] * COUNT, ["a", ""] * (COUNT // 2)])
def test_star_may_name_none(tmp_path, names):
    particles = read_particles(star_with(tmp_path / "in.star", names))
    assert particles.micrograph is None and particles.subset(np.arange(3)).micrograph is None


def in_cs():
    uids, paths = UIDS[NUMBERS], np.array([name.encode() for name in NAMES])[NUMBERS]
    zeros = np.zeros(COUNT, np.uint64)
    return {
        "uid": (dict(micrograph_uid=uids), NUMBERS),
        "path": (dict(micrograph_path=paths), NUMBERS),
        "uid before path": (dict(micrograph_uid=uids, micrograph_path=np.full(COUNT, b"one.mrc")), NUMBERS),
        "uid not set": (dict(micrograph_uid=zeros, micrograph_path=paths), NUMBERS),
        "neither set": (dict(micrograph_uid=zeros, micrograph_path=np.full(COUNT, b"", "S4")), None),
        "no such column": (dict(center_x_frac=np.linspace(0, 1, COUNT)), None),
        "no whole number": (dict(micrograph_uid=uids.astype(float)), None),
    }


@pytest.mark.parametrize("case", in_cs())
@pytest.mark.parametrize("in_passthrough", [False, True])
def test_cs_names_them(tmp_path, case, in_passthrough):
    columns, numbers = in_cs()[case]
    records = cs_records()
    passthrough = None
    if in_passthrough:
        order = np.random.default_rng(0).permutation(COUNT)  # rows are matched on uid
        passthrough = save_cs(tmp_path / "pass.cs", with_columns(records[["uid"]], **columns)[order])
    else:
        records = with_columns(records, **columns)
    found = read_particles(save_cs(tmp_path / "in.cs", records), passthrough).micrograph
    assert found is None if numbers is None else found.tolist() == numbers


@pytest.mark.parametrize("at", [1, 10**6])
def test_names_in_a_compressed_stream(tmp_path, at):
    """Texts lie in a heap, where a wrong offset is refused as that of an image's name is."""
    records, heap = cs_records(), b"\0a.mrc\0b.mrc\0>Extract/job1/a.mrc\0"
    stream = {name: records[name] for name in records.dtype.names}
    stream["blob/path"] = np.full(COUNT, heap.index(b">"), np.uint64)
    stream["location/micrograph_path"] = np.where(np.arange(COUNT) % 2, at, heap.index(b"b")).astype(np.uint64)
    dtype = [
        [
            name,
            "|O" if name.endswith("path") else values.dtype.str,
            *([list(values.shape[1:])] if values.ndim > 1 else []),
        ]
        for name, values in stream.items()
    ]
    header = {"length": COUNT, "dtype": dtype, "compression": None, "compressed_fields": []}
    path = tmp_path / "in.cs"
    CsFile(path, None, stream, header, heap).write(path)
    if at > len(heap):
        with pytest.raises(InputError, match="column location/micrograph_path: a text lies outside the file"):
            read_particles(path)
    else:
        assert read_particles(path).micrograph.tolist() == [0, 1] * (COUNT // 2)


@pytest.mark.parametrize("symmetry", ["C1", "C3"])
def test_prepare_hands_them_on(tmp_path, symmetry):
    """Of kept particles, each row of a particle the same; nothing of it comes into the user's files."""
    kept, copies = np.array([1, 2, 4, 6, 7, 11]), int(symmetry[1])
    path = star_with(tmp_path / "in.star", [NAMES[number] for number in NUMBERS])
    folder = prepared_poses(tmp_path / "particles", path, kept, symmetry=symmetry)
    table = starfile.read(folder / "particles.star")["particles"]
    assert table["flexMicrograph"].tolist() == np.repeat(np.array(NUMBERS)[kept] + 1, copies).tolist()
    again = read_star(folder / "particles.star")
    numbers = pd.factorize(np.array(NUMBERS)[kept])[0]
    assert again.micrograph.tolist() == np.repeat(numbers, copies).tolist()
    write_latents_star(folder, np.zeros((len(kept) * copies, 1)), tmp_path / "latents.star")
    assert "flexMicrograph" not in (tmp_path / "latents.star").read_text()


def test_prepare_hands_on_nothing_where_none_are_named(tmp_path):
    folder = prepared_poses(tmp_path / "particles", star_with(tmp_path / "in.star"), np.arange(COUNT))
    assert "flexMicrograph" not in (folder / "particles.star").read_text()
    assert read_star(folder / "particles.star").micrograph is None
