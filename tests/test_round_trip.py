"""Metadata out and in again: nothing that flexlib did not touch may change, latents find their particles."""

import pickle
import subprocess
from pathlib import Path

import numpy as np
import pytest
import starfile
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from particle_files import (
    COUNT,
    STAR_TAIL,
    cs_records,
    prepared_folder,
    save_cs,
    star_rows,
    write_relion_star,
    write_stacks,
)

from flexlib.errors import InputError
from flexlib.particles import read_particles
from flexlib.particles.cs_file import CsFile, read_cs_file
from flexlib.particles.latents_read import read_latents
from flexlib.particles.latents_write import write_latents_cs, write_latents_star
from flexlib.particles.star import read_tables
from flexlib.particles.star_text import read_star_text

DATA = Path(__file__).parent / "data"
KEPT = np.array([0, 2, 3, 5, 6, 9, 11])
LATENTS = np.random.default_rng(0).normal(size=(len(KEPT), 3)).astype(np.float32)
RELAXED = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])

plain = st.text("abcXYZ019.+-_/@[],'\"#é", min_size=1, max_size=12).filter(
    lambda text: text[0] not in "#_'\"" and not text.startswith(("data_", "loop_"))
)
number = st.sampled_from(["1.500000e+00", "-0", "+3.", ".5", "1e4", "nan", "inf", "0007", "1.00000000000000000001"])
quoted = st.sampled_from(["'two words'", '""', '"a # no comment"', "'it''s'"])
cell = st.one_of(number, plain, quoted)
label = st.text("abcdefgXYZ0123", min_size=1, max_size=8)


@st.composite
def star_files(draw) -> tuple[str, list[str], list[list[str]]]:
    """A STAR file's text, the labels of its particle table and the cells of its rows."""
    names = ["rlnImageName", *draw(st.lists(label, max_size=4, unique=True))]
    rows = draw(st.lists(st.lists(cell, min_size=len(names), max_size=len(names)), min_size=1, max_size=6))
    newline = draw(st.sampled_from(["\n", "\r\n"]))
    blanks = st.sampled_from([" ", "  ", "\t", " \t "])
    noise = st.sampled_from(["", newline, f"# note{newline}", f"  # note 2 {newline}"])
    lines = [draw(noise), f"data_optics{newline}{newline}_rlnOpticsGroup 1{newline}", draw(noise)]
    lines += [f"data_particles{newline}", draw(noise), f"loop_ {newline}"]
    numbered = draw(st.booleans())
    lines += [f"_{name}{f' #{at}' if numbered else ''}{newline}" for at, name in enumerate(names, 1)]
    for row in rows:
        gap = draw(blanks)
        comment = draw(st.sampled_from(["", "", " ", " # a remark"]))
        lines.append(draw(st.sampled_from(["", "  "])) + gap.join(row) + comment + newline + draw(noise))
    lines += [
        draw(noise),
        draw(st.sampled_from(["", f"data_last{newline}_x 1", f"data_last{newline}loop_{newline}_y"])),
    ]
    return "".join(lines), names, rows


def unquoted(text: str) -> bytes:
    return (text[1:-1] if text[0] in "'\"" else text).encode()


def without_last_column(content: bytes, text) -> bytes:
    """A STAR file less its particle table's last column: the label's line, and in each row the value and one blank."""
    table = text.particles
    for start, end, cells in reversed(
        list(zip(table.starts, table.ends, text.cells(table, np.arange(len(table))), strict=True))
    ):
        row = content[start:end].partition(b" # a remark")
        assert row[0].endswith(b" " + cells[-1])
        content = content[:start] + row[0].removesuffix(b" " + cells[-1]) + row[1] + row[2] + content[end:]
    before = content[: table.labels_end].splitlines(keepends=True)
    return b"".join(before[:-1]) + content[table.labels_end :]


def with_last_newline(content: bytes, text) -> bytes:
    """The file as it stands; a last row that ends the file gets the newline that writing gives it."""
    end = int(text.particles.ends[-1])
    return content if b"\n" in content[end:] else content + (b"\r\n" if b"\r\n" in content else b"\n")


@given(star_files(), st.data())
@RELAXED
def test_star_text_is_kept(tmp_path, star, data):
    content, names, rows = star
    path, out = tmp_path / "in.star", tmp_path / "out.star"
    path.write_bytes(content.encode())
    text = read_star_text(path)
    table = text.particles
    assert list(table.labels) == names
    assert list(text.cells(table, np.arange(len(rows)))) == [[unquoted(value) for value in row] for row in rows]

    text.write(out, table)
    assert out.read_bytes() == path.read_bytes()

    added = [str(i) for i in range(len(rows))]
    text.write(out, table, columns={"flexLatent1": added})
    again = read_star_text(out)
    assert again.particles.labels == (*names, "flexLatent1")
    cells = list(again.cells(again.particles, np.arange(len(rows))))
    assert cells == [[*(unquoted(value) for value in row), at.encode()] for row, at in zip(rows, added, strict=True)]
    assert without_last_column(out.read_bytes(), again) == with_last_newline(path.read_bytes(), text)
    assert [block.labels for block in again.tables if block.block != "particles"] == [
        block.labels for block in text.tables if block.block != "particles"
    ]

    chosen = np.array(data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=8)))
    text.write(out, table, chosen)
    again = read_star_text(out)
    assert list(again.cells(again.particles, np.arange(len(chosen)))) == [
        [unquoted(value) for value in rows[row]] for row in chosen
    ]

    text.write(out, table, columns={names[-1]: added})  # in the old one's place
    again = read_star_text(out)
    assert list(again.cells(again.particles, np.arange(len(rows)))) == [
        [*(unquoted(value) for value in row[:-1]), at.encode()] for row, at in zip(rows, added, strict=True)
    ]


field_type = st.sampled_from(["<f4", "<f8", "<u4", "<u8", "<i2", "|u1", "S7", ("<f4", (3,)), ("<u4", (2, 2))])


@given(
    st.dictionaries(st.sampled_from(["blob/path", "ctf/df1_A", "x", "ünï/code", "a" * 300]), field_type, max_size=5),
    st.integers(1, 6),
    st.sampled_from([(1, 0), (2, 0), (3, 0), None]),
    st.data(),
)
@RELAXED
def test_cs_records_are_kept(tmp_path, kinds, count, version, data):
    dtype = np.dtype(
        [("uid", "<u8"), *((name, *(kind if isinstance(kind, tuple) else (kind,))) for name, kind in kinds.items())]
    )
    records = np.frombuffer(
        data.draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize)), dtype
    )
    if version in ((1, 0), (2, 0)) and any(not name.isascii() for name in dtype.names):
        version = None
    with (tmp_path / "in.cs").open("wb") as file:
        np.lib.format.write_array(file, records, version=version)
    table = read_cs_file(tmp_path / "in.cs")
    assert table.records.dtype == dtype and table.records.tobytes() == records.tobytes()
    rows = np.array(data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=8)))
    table.take(rows).write(tmp_path / "out.cs")
    again = read_cs_file(tmp_path / "out.cs")
    assert again.records.dtype == dtype and again.records.tobytes() == records[rows].tobytes()


def test_compressed_stream_of_cryosparc_tools():
    """``tests/data/compressed_stream.cs`` and its plain twin were both written by cryosparc-tools 5.0.3."""
    stream, plain_file = (
        read_cs_file(DATA / "compressed_stream.cs"),
        read_cs_file(DATA / "compressed_stream_as_numpy.cs"),
    )
    assert stream.names == plain_file.names
    for name in stream.names:
        np.testing.assert_array_equal(stream.column(name), plain_file.column(name))
    one, other = read_particles(stream.path), read_particles(plain_file.path)
    np.testing.assert_array_equal(one.rotation, other.rotation)
    assert one.stack_paths == other.stack_paths and one.stack_paths[0] == DATA / "J1/extract/a.mrc"


@given(st.sampled_from(["lz4", "snappy", None]), st.integers(1, 400), st.integers(0, 2**32 - 1))
@RELAXED
def test_compressed_stream_round_trip(tmp_path, compression, count, seed):
    rng = np.random.default_rng(seed)
    heap = b"\0>a.mrc\0b.mrc\0"
    stream = {
        "uid": rng.integers(0, 2**63, count, np.uint64),
        "blob/path": rng.choice(np.array([0, 1, 8], np.uint64), count),
        "alignments3D/pose": rng.normal(size=(count, 3)).astype(np.float32),
        "blob/shape": np.full((count, 2), 64, np.uint32),
    }
    dtype = [["uid", "<u8"], ["blob/path", "|O"], ["alignments3D/pose", "<f4", [3]], ["blob/shape", "<u4", [2]]]
    header = {"length": count, "dtype": dtype, "compression": compression, "compressed_fields": list(stream)[1:]}
    CsFile(tmp_path, None, stream, header, heap).write(tmp_path / "a.cs")
    table = read_cs_file(tmp_path / "a.cs")
    texts = {0: b"", 1: b">a.mrc", 8: b"b.mrc"}
    assert table.column("blob/path").tolist() == [texts[int(at)] for at in stream["blob/path"]]
    for name in ("uid", "alignments3D/pose", "blob/shape"):
        np.testing.assert_array_equal(table.column(name), stream[name])
    table.take(np.arange(count)).write(tmp_path / "b.cs")
    assert (tmp_path / "a.cs").read_bytes() == (tmp_path / "b.cs").read_bytes()
    for size in (7, 40, len((tmp_path / "a.cs").read_bytes()) - len(heap) - 1):
        (tmp_path / "cut.cs").write_bytes((tmp_path / "a.cs").read_bytes()[:size])
        with pytest.raises(InputError, match=r"cut\.cs: .*(truncated|damaged)"):
            read_cs_file(tmp_path / "cut.cs")


class Bomb:
    """What unpickling would run."""

    def __reduce__(self):
        return Path.touch, (Path("unpickled"),)


def bomb_files(folder: Path) -> dict[str, Path]:
    """.cs files that hide a pickle: bare, as objects of a NumPy array, of one of its columns, in the stream."""
    paths = {name: folder / f"{name}.cs" for name in ("pickle", "objects", "column", "stream")}
    paths["pickle"].write_bytes(pickle.dumps(Bomb()))
    for name, array in (
        ("objects", np.array([Bomb()], object)),
        ("column", np.array([(1, Bomb())], [("uid", "u8"), ("blob/path", "O")])),
    ):
        with paths[name].open("wb") as file:
            np.save(file, array, allow_pickle=True)
    stream = {"uid": np.arange(2, dtype=np.uint64), "blob/path": np.array([9**9, 1], np.uint64)}
    header = {"length": 2, "dtype": [["uid", "<u8"], ["blob/path", "|O"]], "compression": None, "compressed_fields": []}
    CsFile(folder, None, stream, header, pickle.dumps(Bomb())).write(paths["stream"])
    return paths


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    messages = {
        "pickle": "a Python pickle, which is never loaded",
        "objects": r"column \(all\): Python objects",
        "column": "column blob/path: Python objects",
        "stream": "column blob/path: a text lies outside the file",
    }
    for name, path in bomb_files(tmp_path).items():
        with pytest.raises(InputError, match=f"{name}\\.cs: {messages[name]}"):
            read_cs_file(path).column("blob/path")
    assert not (tmp_path / "unpickled").exists()


# latents out ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def star(tmp_path):
    return write_relion_star(tmp_path / "project" / "run_data.star")


def rows_of(path: Path, block: str = "particles") -> list[bytes]:
    text = read_star_text(path)
    return [b" ".join(cells) for cells in text.cells(text.table(block), np.arange(len(text.table(block))))]


def test_latents_star_keeps_the_text(star, tmp_path):
    folder = prepared_folder(tmp_path / "prepared", star, KEPT)
    errors = {"flexLatentStdErr1": np.full(len(KEPT), 0.25)}
    write_latents_star(folder, LATENTS, tmp_path / "latents.star", errors)
    before, after = star.read_text(), (tmp_path / "latents.star").read_text()
    head = before[: before.index("_someoneElses")]
    assert after.startswith(head) and after.endswith(STAR_TAIL)
    written = after[len(head) :].splitlines()
    assert [line.strip() for line in written[:5]] == [
        f"_{name} #{at}"
        for at, name in enumerate(
            ["someoneElses", "flexLatent1", "flexLatent2", "flexLatent3", "flexLatentStdErr1"], 11
        )
    ]
    for given_row, row in zip(star_rows(), written[5:], strict=False):
        assert row.startswith(given_row.rstrip() + " ") and len(row.split()) == len(given_row.split()) + 4
    table = starfile.read(tmp_path / "latents.star")["particles"]
    np.testing.assert_allclose(
        table[["flexLatent1", "flexLatent2", "flexLatent3"]].to_numpy()[KEPT], LATENTS, rtol=1e-6
    )
    assert np.isnan(table["flexLatent1"]).sum() == COUNT - len(KEPT) and "rlnRandomSubset" not in table
    write_latents_star(prepared_folder(tmp_path / "second", tmp_path / "latents.star", KEPT), LATENTS + 1, star)
    again = starfile.read(star)["particles"]  # trained from a latents.star: columns are replaced, not doubled
    np.testing.assert_allclose(again["flexLatent2"].to_numpy()[KEPT], LATENTS[:, 1] + 1, rtol=1e-6)
    assert list(again) == list(table)


@pytest.mark.parametrize("halves", [False, True])
def test_half_sets_drawn_by_prepare_are_written(star, tmp_path, halves):
    write_relion_star(star, halves)
    folder = prepared_folder(tmp_path / "prepared", star, KEPT, half_sets="random")
    write_latents_star(folder, LATENTS, tmp_path / "latents.star")
    table = starfile.read(tmp_path / "latents.star")["particles"]
    column = "flexRandomSubset" if halves else "rlnRandomSubset"
    assert table[column].to_numpy()[KEPT].tolist() == (1 + KEPT % 3 % 2).tolist() and set(table[column]) == {1, 2}
    if halves:
        assert table["rlnRandomSubset"].tolist() == [1 + i % 2 for i in range(COUNT)]


def test_symmetry_copies_have_rows_of_their_own(star, tmp_path):
    folder = prepared_folder(tmp_path / "prepared", star, KEPT, copies=2)
    latents = np.random.default_rng(1).normal(size=(2 * len(KEPT), 2))
    write_latents_star(folder, latents, tmp_path / "latents.star")
    table = starfile.read(tmp_path / "latents.star")["particles"]
    dropped = COUNT - len(KEPT)
    assert len(table) == 2 * len(KEPT) + dropped and (np.diff(table["flexInputRow"]) >= 0).all()
    kept = np.isfinite(table["flexLatent1"])
    np.testing.assert_allclose(table.loc[kept, "flexLatent2"], latents[:, 1], rtol=1e-6)
    np.testing.assert_allclose(table.loc[kept, "rlnAngleTilt"], np.arange(2 * len(KEPT)) + 0.25)
    np.testing.assert_allclose(table.loc[~kept, "rlnAngleRot"], 10.0 * table.loc[~kept, "flexInputRow"])
    np.testing.assert_allclose(read_latents(tmp_path / "latents.star", folder), latents, rtol=1e-6)
    text = read_star_text(tmp_path / "latents.star")  # the copies as another run's particles: rows are counted anew
    text.write(tmp_path / "in.star", text.particles, np.arange(4, 4 + COUNT))
    folder = prepared_folder(tmp_path / "second", tmp_path / "in.star", KEPT)
    write_latents_star(folder, LATENTS, tmp_path / "second.star")
    table = starfile.read(tmp_path / "second.star")["particles"]
    assert table["flexInputRow"].tolist() == list(range(COUNT)) and not table["flexSymmetryCopy"].any()


def test_changed_input_is_refused(star, tmp_path):
    folder = prepared_folder(tmp_path / "prepared", star, KEPT)
    star.write_text(star.read_text().replace(star_rows()[4] + "\n", ""))
    with pytest.raises(InputError, match=r"run_data\.star: 11 particles, but prepare read 12"):
        write_latents_star(folder, LATENTS, tmp_path / "latents.star")
    star.unlink()
    with pytest.raises(InputError, match=r"run_data\.star: the particle file that prepare read is gone"):
        write_latents_star(folder, LATENTS, tmp_path / "latents.star")


def test_latents_cs(tmp_path):
    path = save_cs(tmp_path / "in.cs", cs_records())
    folder = prepared_folder(tmp_path / "prepared", path, KEPT)
    assert write_latents_cs(folder, LATENTS, tmp_path / "latents.cs")
    table = np.load(tmp_path / "latents.cs")
    assert table.dtype.descr[:3] == [
        ("uid", "<u8"),
        ("components_mode_0/component", "<u4"),
        ("components_mode_0/value", "<f4"),
    ]
    np.testing.assert_array_equal(table["uid"], cs_records()["uid"][KEPT])
    np.testing.assert_array_equal(table["components_mode_2/component"], 2)
    np.testing.assert_array_equal(table["components_mode_2/value"], LATENTS[:, 2])
    group = yaml.safe_load((tmp_path / "latents.csg").read_text())
    assert group["group"]["type"] == "particle" and list(group["results"]) == [f"components_mode_{k}" for k in range(3)]
    assert group["results"]["components_mode_1"] == {
        "metafile": ">latents.cs",
        "num_items": len(KEPT),
        "type": "particle.components",
    }
    np.testing.assert_array_equal(read_latents(tmp_path / "latents.cs", folder), LATENTS)


def test_star_input_gives_no_latents_cs(star, tmp_path):
    folder = prepared_folder(tmp_path / "prepared", star, KEPT)
    assert not write_latents_cs(folder, LATENTS, tmp_path / "latents.cs") and not (tmp_path / "latents.cs").exists()


@pytest.mark.parametrize("kind", ["star", "cs"])
def test_relion_reads_latents_star(tmp_path, kind):
    """RELION keeps the columns it does not know, and reconstructs; stacks of a .cs are named so that it can."""
    project = tmp_path / "project"
    write_stacks(project, "mrcs" if kind == "star" else "mrc")
    path = write_relion_star(project / "in.star") if kind == "star" else save_cs(project / "in.cs", cs_records(False))
    folder = prepared_folder(tmp_path / "prepared", path, KEPT, half_sets="random")
    write_latents_star(folder, LATENTS, project / "latents.star")

    def relion(*arguments: str) -> str:
        result = subprocess.run(arguments, cwd=project, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    table = relion("relion_star_printtable", "latents.star", "data_particles", "_rlnImageName", "_flexLatent2")
    names, latents = zip(*(line.split() for line in table.splitlines() if "@" in line), strict=True)
    assert list(names) == starfile.read(project / "latents.star")["particles"]["rlnImageName"].tolist()
    np.testing.assert_allclose(np.array(latents, float)[KEPT], LATENTS[:, 1], rtol=1e-6)
    relion("relion_reconstruct", "--i", "latents.star", "--o", "map.mrc", "--ctf", "--subset", "1")
    relion(
        "relion_star_handler", "--i", "latents.star", "--o", "half.star", "--select", "rlnRandomSubset", "--minval", "2"
    )
    assert "flexLatent3" in read_tables(project / "half.star").particles
    assert len(read_particles(project / "half.star")) == len(read_tables(project / "half.star").particles)


# latents in ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cs(tmp_path):
    return save_cs(tmp_path / "in.cs", cs_records())


def test_latents_are_joined_by_what_names_a_particle(star, cs, tmp_path):
    """A shuffled file gives the same latents: by uid, by image name; also for particles as read."""
    rng = np.random.default_rng(6)
    values = rng.normal(size=(COUNT, 2)).astype(np.float32)
    table = np.zeros(COUNT, [("uid", "u8"), ("components_mode_0/value", "f4"), ("components_mode_1/value", "f4")])
    order = rng.permutation(COUNT)
    table["uid"] = cs_records()["uid"][order]
    for k in range(2):
        table[f"components_mode_{k}/value"] = values[order, k]
    variability = save_cs(tmp_path / "variability.cs", table)
    from_cs = prepared_folder(tmp_path / "from_cs", cs, KEPT)
    np.testing.assert_array_equal(read_latents(variability, from_cs), values[KEPT])
    np.testing.assert_array_equal(read_latents(variability, read_particles(cs)), values)

    from_star = prepared_folder(tmp_path / "from_star", star, KEPT)
    write_latents_star(from_star, LATENTS, tmp_path / "latents.star")
    text = read_star_text(tmp_path / "latents.star")
    text.write(tmp_path / "shuffled.star", text.particles, order)
    np.testing.assert_allclose(read_latents(tmp_path / "shuffled.star", from_star), LATENTS, rtol=1e-6)
    some = read_particles(star).subset(KEPT[::-1])
    np.testing.assert_allclose(read_latents(tmp_path / "shuffled.star", some), LATENTS[::-1], rtol=1e-6)

    write_latents_star(from_cs, LATENTS, tmp_path / "with_uid.star")
    np.testing.assert_allclose(read_latents(tmp_path / "with_uid.star", from_cs), LATENTS, rtol=1e-6)


def test_latents_from_plain_tables(star, tmp_path):
    folder = prepared_folder(tmp_path / "prepared", star, KEPT)
    whole = np.random.default_rng(7).normal(size=(COUNT, 2))
    np.save(tmp_path / "whole.npy", whole)
    np.save(tmp_path / "kept.npy", whole[KEPT, 0])
    np.savetxt(tmp_path / "kept.csv", whole[KEPT], delimiter=",", header="z1,z2", comments="")
    np.testing.assert_array_equal(read_latents(tmp_path / "whole.npy", folder), whole[KEPT])
    np.testing.assert_array_equal(read_latents(tmp_path / "kept.npy", folder), whole[KEPT, :1])
    np.testing.assert_array_equal(read_latents(tmp_path / "kept.csv", folder), whole[KEPT])


def test_missing_latents_are_told(star, cs, tmp_path):
    from_star, from_cs = prepared_folder(tmp_path / "a", star, KEPT), prepared_folder(tmp_path / "b", cs, KEPT)
    write_latents_cs(from_cs, LATENTS, tmp_path / "latents.cs")
    write_latents_star(from_star, LATENTS, tmp_path / "latents.star")
    everything = prepared_folder(tmp_path / "c", cs, np.arange(COUNT))
    uid = cs_records()["uid"][1]
    cases = [
        (tmp_path / "latents.cs", everything, f"no latents for 5 of 12 particles; the first is uid {uid} "),
        (tmp_path / "latents.star", read_particles(star), r"no latents for 5 of 12 .* first is image 1@Extract/job1/b"),
        (tmp_path / "latents.cs", from_star, "joined on uid, which .* does not have"),
        (cs, from_cs, "column components_mode_0/value is missing"),
        (star, from_star, "column flexLatent1 is missing"),
        (tmp_path / "none.npy", from_star, "not found"),
        (tmp_path / "three.npy", from_star, r"3 rows, but there are 7 particles \(12 in"),
        (tmp_path / "objects.npy", from_star, "not a readable .npy"),
        (tmp_path / "bad.csv", from_star, "row 2: '1 x' is not 2 numbers"),
        (tmp_path / "a.tif", from_star, "latents are read from"),
    ]
    np.save(tmp_path / "three.npy", np.zeros((3, 2)))
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n1,x\n")
    (tmp_path / "a.tif").touch()
    for path, particles, message in cases:
        with pytest.raises(InputError, match=message) as error:
            read_latents(path, particles)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
