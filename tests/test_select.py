"""Choosing particles by their latents: which ones, and that their rows come out as they stand in the user's file."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from particle_files import (
    COUNT,
    STAR_TAIL,
    cs_records,
    prepared_folder,
    save_cs,
    star_rows,
    write_relion_star,
)

from flexlib.errors import InputError
from flexlib.particles.cs_file import read_cs_file
from flexlib.particles.latents_table import read_latent_table
from flexlib.particles.latents_write import write_latents_star
from flexlib.particles.star import read_tables
from flexlib.select import in_box, in_cluster, in_polygon, main, nearest

KEPT = np.array([0, 2, 3, 5, 6, 9, 11])
# Two heaps: input rows 0, 2, 3, 5 at the left, 6, 9, 11 at the right
LATENTS = np.array([[-1.2, 0.0], [-1.0, 0.5], [-0.8, -0.5], [-1.0, 0.0], [1.0, 0.0], [1.1, 0.6], [1.4, -0.6]])
POINT = "train/cells~20/dims~2/rigidity~2.0/seed~0"


@pytest.fixture
def trained_star(tmp_path) -> Path:
    """The training folder of a run whose input is a STAR file."""
    particles = prepared_folder(tmp_path / "run/particles", write_relion_star(tmp_path / "in.star"), KEPT)
    write_latents_star(particles, LATENTS, tmp_path / "run" / POINT / "latents.star")
    return tmp_path / "run" / POINT


@pytest.fixture
def trained_cs(tmp_path) -> Path:
    """The same of a .cs and its passthrough file, whose rows are in another order."""
    records = cs_records()
    main_names = [name for name in records.dtype.names if not name.startswith(("ctf/", "vendor/"))]
    other_names = ["uid", *(name for name in records.dtype.names if name not in main_names)]
    path = save_cs(tmp_path / "in.cs", _only(records, main_names))
    other = save_cs(tmp_path / "other.cs", _only(records, other_names)[::-1])
    particles = prepared_folder(tmp_path / "run/particles", path, KEPT, passthrough=other)
    write_latents_star(particles, LATENTS, tmp_path / "run" / POINT / "latents.star")
    return tmp_path / "run" / POINT


def _only(records: np.ndarray, names: list[str]) -> np.ndarray:
    result = np.zeros(len(records), [(name, records.dtype[name]) for name in names])
    for name in names:
        result[name] = records[name]
    return result


def rows_inside(folder: Path, inside) -> list[int]:
    table = read_latent_table(folder)
    return table.input_row[inside(table)].tolist()


def test_regions(trained_star):
    def box(*limits):
        return rows_inside(trained_star, lambda table: in_box(table, limits))

    assert box("1=-1.1:0") == [2, 3, 5] and box("1=0:", "2=-1:0.1") == [6, 11] and box("flexLatent2=0.5:0.6") == [2, 9]
    outline = "1,2: -1.1,-1 -0.7,-1 -0.7,1 -1.1,1"
    assert rows_inside(trained_star, lambda table: in_polygon(table, outline)) == [2, 3, 5]
    notched = "1,2: -2,-1 2,-1 2,1 0,-0.9 -2,1"  # a V: the left arm holds rows 0, 3, 5 and not 2, the right 6 and 11
    inside = rows_inside(trained_star, lambda table: in_polygon(table, notched))
    assert inside == [row for row, (x, y) in zip(KEPT, LATENTS, strict=True) if y < -0.9 + 0.95 * abs(x)]
    assert rows_inside(trained_star, lambda table: nearest(table, "2:1,0.1")) == [6, 9]
    assert rows_inside(trained_star, lambda table: in_cluster(table, "1/2")) == [0, 2, 3, 5]
    assert rows_inside(trained_star, lambda table: in_cluster(table, "2/2")) == [6, 9, 11]


def test_star_rows_come_out_as_they_stood(trained_star, tmp_path):
    assert main([str(trained_star), "--out", str(tmp_path / "right.star"), "--box", "1=0:"]) == 0
    before, after = (tmp_path / "in.star").read_text(), (tmp_path / "right.star").read_text()
    rows = [row + "\n" for row in star_rows()]
    assert after == before.replace("".join(rows), "".join(rows[row] for row in (6, 9, 11)))
    assert after.endswith(STAR_TAIL)
    arguments = [str(trained_star), "--out", str(tmp_path / "left.star"), "--box", "1=0:", "--invert", "--latents"]
    assert main(arguments) == 0
    table = read_tables(tmp_path / "left.star").particles
    np.testing.assert_allclose(table["flexLatent1"], LATENTS[:4, 0])
    alone = tmp_path / "alone.star"  # a latents.star by itself
    alone.write_bytes((trained_star / "latents.star").read_bytes())
    assert main([str(alone), "--out", str(tmp_path / "out/of/alone.star"), "--nearest", "1:1.4,-0.6"]) == 0
    assert (tmp_path / "out/of/alone.star").read_text().count("flexLatent") == 2


def test_cs_records_come_out_as_they_stood(trained_cs, tmp_path):
    out = tmp_path / "subset.cs"
    assert main([str(trained_cs), "--out", str(out), "--cluster", "2/2", "--latents"]) == 0
    original, other = np.load(tmp_path / "in.cs"), np.load(tmp_path / "other.cs")
    assert np.load(out).tobytes() == original[[6, 9, 11]].tobytes() and np.load(out).dtype == original.dtype
    passthrough = np.load(tmp_path / "subset_passthrough.cs")
    assert passthrough.tobytes() == other[::-1][[6, 9, 11]].tobytes()
    latents = read_cs_file(tmp_path / "subset_latents.cs")
    np.testing.assert_array_equal(latents.column("uid"), original["uid"][[6, 9, 11]])
    np.testing.assert_allclose(latents.column("components_mode_1/value"), LATENTS[4:, 1], rtol=1e-6)
    group = yaml.safe_load((tmp_path / "subset.csg").read_text())["results"]
    assert {name: (result["metafile"], result["type"]) for name, result in group.items()} == {
        "blob": (">subset.cs", "particle.blob"),
        "alignments3D": (">subset.cs", "particle.alignments3D"),
        "ctf": (">subset_passthrough.cs", "particle.ctf"),
        "vendor": (">subset_passthrough.cs", "particle.vendor"),
        "components_mode_0": (">subset_latents.cs", "particle.components"),
        "components_mode_1": (">subset_latents.cs", "particle.components"),
    }
    assert {result["num_items"] for result in group.values()} == {3}
    assert main([str(trained_cs), "--out", str(tmp_path / "for_relion.star"), "--box", "1=0:"]) == 0
    table = read_tables(tmp_path / "for_relion.star").particles
    assert table["flexUid"].tolist() == original["uid"][[6, 9, 11]].tolist()
    assert table["rlnImageName"][0] == "000004@Extract/job1/a.mrc:mrcs"


@pytest.mark.parametrize("column", ["flexInputRow", "flexUid", "uid", "rlnImageName"])
def test_listed_particles(trained_cs, tmp_path, column):
    table = read_latent_table(trained_cs)
    key = "flexUid" if column == "uid" else column
    values = [str(table.named(key)[row]) for row in (9, 2)]
    (tmp_path / "lasso.csv").write_text(f"{column},z1\n" + "".join(f"{value},0.5\n" for value in values))
    assert main([str(trained_cs), "--out", str(tmp_path / "a.cs"), "--rows", str(tmp_path / "lasso.csv")]) == 0
    assert np.load(tmp_path / "a.cs").tobytes() == np.load(tmp_path / "in.cs")[[2, 9]].tobytes()


@pytest.fixture
def judged(trained_star) -> Path:
    """As ``trained_star``, of a training that judged the images and two parts."""
    probability = np.array([0.99, 0.4, 0.5, 0.9, 0.02, 0.8, 0.7])
    first = np.array([0.9, 0.1, 0.2, 0.5, 0.9, 0.0, 1.0])
    extra = {"flexParticleProbability": probability, "flexOccupancy1": first, "flexOccupancy2": 1 - first}
    particles = trained_star.parents[4] / "particles"
    write_latents_star(particles, LATENTS, trained_star / "latents.star", extra)
    return trained_star


@pytest.mark.parametrize(
    ("arguments", "rows", "told"),
    [
        (["--min-probability", "0.5"], [0, 3, 5, 9, 11], ["probability at least 0.5: 5 rows, below: 2"]),
        (["--part", "1", "--present"], [0, 5, 6, 11], ["part 1: present in 4 rows, absent in 3"]),
        (["--part", "2", "--absent"], [0, 6, 11], ["part 2: present in 4 rows, absent in 3"]),
        (
            ["--min-probability", "0.5", "--part", "1", "--absent"],
            [3, 9],
            ["probability at least 0.5: 5 rows, below: 2", "part 1: present in 3 rows, absent in 2"],
        ),
        (["--box", "1=0:", "--min-probability", "0.5"], [9, 11], ["probability at least 0.5: 5 rows, below: 2"]),
        (["--box", "1=0:", "--invert", "--part", "1", "--present"], [0, 5], ["part 1: present in 4 rows, absent in 3"]),
    ],
)
def test_particles_by_what_they_are(judged, tmp_path, caplog, arguments, rows, told):
    caplog.set_level("INFO")
    assert main([str(judged), "--out", str(tmp_path / "a.star"), *arguments]) == 0
    chosen = (tmp_path / "a.star").read_text()
    assert [row for row, line in enumerate(star_rows()) if line in chosen] == rows
    assert caplog.messages == [*told, f"{tmp_path}/a.star: {len(rows)} of 12 particles"]


def test_input_that_has_moved(trained_cs, tmp_path):
    """Given anew, and its rows shuffled: particles are found by uid."""
    shuffled = np.load(tmp_path / "in.cs")[::-1]
    save_cs(tmp_path / "moved.cs", shuffled)
    (tmp_path / "in.cs").unlink()
    arguments = [
        str(trained_cs),
        "--out",
        str(tmp_path / "a.cs"),
        "--box",
        "1=0:",
        "--input",
        str(tmp_path / "moved.cs"),
    ]
    assert main(arguments) == 0
    assert set(np.load(tmp_path / "a.cs")["uid"]) == set(cs_records()["uid"][[6, 9, 11]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--box", "1=5:6"], "no particle lies in that region"),
        (["--box", "3=0:1"], r"no latent dimension or column '3': there are flexLatent1, flexLatent2"),
        (["--box", "rlnImageName=0:1"], "column rlnImageName is not numeric"),
        (["--box", "1:0:1"], "'1:0:1' is not DIM=MIN:MAX"),
        (["--box", "1=a:1"], "'a' is not a number"),
        (["--polygon", "1,2: 0,0 1,1"], "three corners"),
        (["--nearest", "3:0.5"], "is not K:z1,z2,... with 2 coordinates"),
        (["--nearest", "8:0,0"], "8 particles wanted, but only 7 have latents"),
        (["--cluster", "3/2"], "is not I/N"),
        (["--cluster", "1/9"], "9 clusters of 7 particles"),
        (["--rows", "none.csv"], "none.csv not found"),
        (["--rows", "plain.csv"], "plain.csv: the first line must name a column"),
        (["--rows", "beyond.csv"], "beyond.csv: line 3, column flexInputRow: no particle '12'"),
        (["--rows", "uid.csv"], "column flexUid, which .*latents.star does not have"),
        ([], "which particles"),
        (["--min-probability", "0.5", "--invert"], "which particles"),
        (["--min-probability", "0.5"], r"latents.star has no column flexParticleProbability \(nor any such\)"),
        (["--min-probability", "50"], r"50 is not in \[0, 1\]"),
        (["--part", "1"], "--part: takes --present or --absent"),
        (["--box", "1=0:", "--absent"], "--part: takes --present or --absent"),
        (["--part", "1", "--absent"], "has no column flexOccupancy1"),
        (["--box", "1=0:", "--out", "a.cs"], "a.cs: the input is not a .cs file"),
        (["--box", "1=0:", "--out", "a.txt"], "written as .star or .cs"),
        (["--box", "1=0:", "--out", "in.star"], "in.star: is the file that particles are chosen from"),
    ],
)
def test_mistakes_are_told_in_one_line(trained_star, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("plain.csv").write_text("1\n2\n")
    Path("beyond.csv").write_text(f"flexInputRow\n0\n{COUNT}\n")
    Path("uid.csv").write_text("uid\n17\n")
    before = Path("in.star").read_bytes()
    assert main([str(trained_star), "--out", "a.star", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    with pytest.raises(InputError, match=message):
        raise InputError(error)
    assert not Path("a.star").exists() and Path("in.star").read_bytes() == before


def test_as_a_command(trained_star, tmp_path):
    command = [sys.executable, "-m", "flexlib.select", str(trained_star), "--out", str(tmp_path / "a.star")]
    done = subprocess.run([*command, "--cluster", "1/2"], capture_output=True, text=True)
    assert done.returncode == 0 and "a.star: 4 of 12 particles" in done.stderr and "cluster 2/2 at" in done.stderr
    failed = subprocess.run([*command, "--box", "1=9:"], capture_output=True, text=True)
    assert failed.returncode == 1 and failed.stderr == "flex-select: no particle lies in that region\n"
