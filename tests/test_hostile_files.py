"""What users' files and configs hold is data: it runs nothing, reads nothing from elsewhere, and shows as text."""

import ast
import bz2
import gzip
import json
import pickle
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import h5py
import mrcfile
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from fuzz_seeds import seg_files
from particle_files import cs_records, save_cs, write_relion_star, write_stacks
from run_snakemake import snakemake

from flexlib import untrusted
from flexlib.errors import InputError
from flexlib.first_config.config_text import _line
from flexlib.first_config.picture import draw_mask
from flexlib.generate.chimerax import chimerax_script
from flexlib.images.stack import open_stacks
from flexlib.imaging.maps import Map, read_map, write_map
from flexlib.layout import MeshFolder, RunFolder
from flexlib.mesh.chimerax import write_chimerax
from flexlib.mesh.lattice import bcc_mesh
from flexlib.mesh.segments import read_segments
from flexlib.mesh.weights import read_cell_weights
from flexlib.model.flex_model import FlexModel
from flexlib.particles import read_particles
from flexlib.particles.cs_file import read_cs_file
from flexlib.particles.latents_read import read_frame_latents
from flexlib.records import ChecksumsRecord
from flexlib.render.chimerax import chimerax_text
from flexlib.report import write_report
from flexlib.report.markup import environment
from flexlib.workflow_support.checks import check_config, check_paths
from flexlib.workflow_support.series import parse_series
from flexlib.workflow_support.srun import run_tasks

NAMES = ("two words", "it's", 'say "x"', "$(touch touched)", "`touch touched`", "a;touch touched", "-x", "é|b&$HOME>y")
MINIMAL = {"name": "run", "particles": "p.star", "consensus": "c.mrc"}


def test_a_message_is_one_line_of_printable_text():
    text = str(InputError("two\nlines\r\x1b[31mred\x00 \ud800é"))
    assert text == r"two\nlines\r\x1b[31mred\x00 \ud800é"
    assert str(InputError(text)) == text and text.encode()
    long = str(InputError("begin" + "x" * 10**6 + "end"))
    assert len(long) < 2100 and long.startswith("begin") and long.endswith("end")


# nothing runs --------------------------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("touched"),)


def test_no_array_or_model_runs_code(tmp_path, monkeypatch):
    """Arrays of objects for every reader of .npy, and pickles in a model's place."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.npy", "a.cs"):
        with Path(name).open("wb") as file:
            np.save(file, np.array([Bomb()], object), allow_pickle=True)
    torch.save({"format_version": 1, "flow": Bomb()}, "a.pt")
    Path("b.pt").write_bytes(pickle.dumps(Bomb()))
    for reader, name in (
        (read_frame_latents, "a.npy"),
        (read_frame_latents, "a.cs"),
        (read_cs_file, "a.cs"),
        (lambda path: read_cell_weights(path, 1), "a.npy"),
        (FlexModel.load, "a.pt"),
        (FlexModel.load, "b.pt"),
    ):
        with pytest.raises(InputError, match=re.escape(name)):
            reader(Path(name))
    assert not Path("touched").exists()
    pickle.loads(Path("b.pt").read_bytes())
    assert Path("touched").exists()  # it would have shown


def test_a_config_is_plain_values_and_not_too_many():
    mappings = {"a": "x"}
    for _ in range(60):
        mappings = {"a": mappings, "b": mappings}
    lists: list = ["x"]
    for _ in range(9):
        lists = [lists] * 9
    circle: list = []
    circle.append(circle)
    for value in (mappings, lists, circle, [1] * 10**6):
        with pytest.raises(InputError, match="more values, or deeper in one another"):
            check_config({**MINIMAL, "mesh": {"cells": value}})
    for value in (float("nan"), float("inf"), "1e400", 10**400):
        with pytest.raises(InputError, match=r"config: train.rigidity: is not a number that any setting can have"):
            check_config({**MINIMAL, "train": {"rigidity": value}})
    for text in ("2001-01-01", "!!set {a}", "!!binary aGk="):
        with pytest.raises(InputError, match=r"config: image_root: .* is read as a .*: quote it"):
            check_config({**MINIMAL, "image_root": yaml.safe_load(text)})
    for value in ("a\0b", "\x1b[2J", "\u2028"):
        with pytest.raises(InputError, match=r"config: image_root: .* holds a control character"):
            check_config({**MINIMAL, "image_root": value})
    for name in (*NAMES, "run\n", "../run", ".run"):
        with pytest.raises(InputError, match=r"config: name: .* is not understood"):
            check_config({**MINIMAL, "name": name})
    with pytest.raises(InputError, match=r"config: .*not a list"):
        check_config([1, 2])
    with pytest.raises(InputError, match=r"config: unknown key '1' in mesh"):
        check_config({**MINIMAL, "mesh": {1: 2}})
    for path in ("{wildcards}.star", "a\nb.star"):
        with pytest.raises(InputError, match=r"config: particles: .* braces"):
            check_paths(check_config({**MINIMAL, "particles": path}))


def test_names_are_data_to_the_workflow(tmp_path):
    """A dry run of everything, and a job that reads the files, of names that are commands to a shell."""
    folder = tmp_path / NAMES[3] / " ".join(NAMES[:3])
    write_stacks(folder)
    particles = write_relion_star(folder / "".join((*NAMES[3:6], ".star")))
    write_map(folder / f"{NAMES[6]}.mrc", np.ones((16, 16, 16)), 2.0)
    write_map(folder / f"{NAMES[7]}.mrc", np.ones((16, 16, 16)), 2.0)
    config = {"particles": str(particles), "image_root": str(folder), "consensus": f"{folder}/{NAMES[6]}.mrc"}
    config |= {"name": "run", "mask": f"{folder}/{NAMES[7]}.mrc", "prepare": {"train_box": 16}}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(config, allow_unicode=True))
    for more in (["--dry-run"], [str(RunFolder(Path("results/run")).checksums)]):
        done = snakemake(tmp_path, "--configfile", "my.yaml", "--cores", "1", *more)
        assert done.returncode == 0, done.stdout + done.stderr
    record = ChecksumsRecord.read(tmp_path / RunFolder(Path("results/run")).checksums)
    assert {Path(file.path).name for file in record.files} == {
        particles.name, f"{NAMES[6]}.mrc", f"{NAMES[7]}.mrc", "a.mrcs", "b.mrcs",
    }  # fmt: skip
    assert not list(tmp_path.rglob("touched"))


def test_srun_is_given_arguments_and_no_command_line(tmp_path, monkeypatch):
    """A stand-in for srun writes down what it is started with."""
    fake = tmp_path / "srun"
    fake.write_text(f"#!{sys.executable}\nimport json, sys\njson.dump(sys.argv[1:], open('seen.json', 'w'))\n")
    fake.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *NAMES, "two\nlines"])
    assert run_tasks({"mpi": str(fake), "nodes": "2"}, 4, 3) == 0
    seen = json.loads(Path("seen.json").read_text())
    assert seen[-len(NAMES) - 2 :] == ["train.py", *NAMES, "two\nlines"] and not Path("touched").exists()


def test_names_stay_values_in_a_first_config_and_its_picture(tmp_path):
    for name in (*NAMES, "two\nlines: 3", "# a", "{a: 1}", "*a", "$a_{$"):
        line, comment = _line("particles", name, f"from {name}")
        assert yaml.safe_load(f"{line}  # {comment}") == {"particles": name}
    draw_mask(tmp_path / "m.png", np.ones((4, 4, 4)), np.ones((4, 4, 4)), 1.0, "$a_{$ " + "".join(NAMES))


# nothing is read from elsewhere --------------------------------------------------------------------------------------


def _star_of(path: Path, image: str) -> Path:
    path = write_relion_star(path)
    path.write_text(re.sub(r"\S+@\S+", f"1@{image}", path.read_text()))
    return path


def _cs_of(path: Path, image: str) -> Path:
    records = cs_records()
    kinds = {name: (kind.base, kind.shape) for name, (kind, *_) in records.dtype.fields.items()}
    records = records.astype([(name, *kind) for name, kind in (kinds | {"blob/path": ("S400", ())}).items()])
    records["blob/path"], records["blob/idx"] = f">{image}".encode(), 0
    return save_cs(path, records)


@pytest.mark.parametrize(("suffix", "column"), [("star", "rlnImageName"), ("cs", "blob/path")])
def test_image_paths_stay_in_their_folders(tmp_path, monkeypatch, suffix, column):
    project, secret = tmp_path / "project", tmp_path / "secret"
    write_stacks(project)
    write_stacks(secret)
    (project / "jobs").mkdir()
    monkeypatch.chdir(tmp_path / "secret")
    write = _star_of if suffix == "star" else _cs_of
    climbing = ("../../secret/Extract/job1/a.mrcs", "a/../../../secret/Extract/job1/a.mrcs", "../" * 30 + "etc/passwd")
    monkeypatch.chdir(project)
    for image in climbing:
        path = write(project / f"jobs/p.{suffix}", image)
        for root in (None, project, project / "jobs"):
            with pytest.raises(InputError, match=rf"p\.{suffix}: row 1, column {column}: \S+ leads out of"):
                read_particles(path, image_root=root)
        if "secret" in image:  # and is asked for
            assert open_stacks(read_particles(path, image_root=tmp_path))
    # what users have: from the particle file's folder, from image_root, through links, and by absolute paths
    (project / "link").symlink_to(secret / "Extract")
    wanted = {"../Extract/job1/a.mrcs": "project/Extract", "Extract/../Extract/job1/a.mrcs": "project/Extract"}
    wanted |= {"link/job1/a.mrcs": "project/link", str(secret / "Extract/job1/a.mrcs"): "secret/Extract"}
    for image, where in wanted.items():
        for root in (None, project):
            path = write(project / f"jobs/p.{suffix}", image)
            (found,) = read_particles(path, image_root=root).stack_paths
            assert found == tmp_path / where / "job1/a.mrcs" and open_stacks(read_particles(path, image_root=root))


def test_segments_are_in_the_very_file(tmp_path):
    """HDF5 can point into other files, as raw bytes too."""
    seg_files(tmp_path)
    (tmp_path / "secret").write_bytes(bytes(500))
    with h5py.File(tmp_path / "plain.seg", "a") as file:
        del file["mask"]
        file.create_dataset("mask", (5, 5, 5), np.uint32, external=[(str(tmp_path / "secret"), 0, 500)])
    for name in ("plain", "external"):
        with pytest.raises(InputError, match=f"{name}.seg: mask is no array of whole numbers in this very file"):
            read_segments(tmp_path / f"{name}.seg")


# no more than a file can hold ----------------------------------------------------------------------------------------


def test_packed_maps_of_an_honest_size_are_read(tmp_path, monkeypatch):
    """A mask is nearly empty, and packed to a thousandth; its memory is not counted by the packed file's size."""
    monkeypatch.setattr(untrusted, "_MEMORY_BYTES", 2**25)
    write_map(tmp_path / "m.mrc", np.zeros((224,) * 3), 1.0)
    for packer in (lambda data: gzip.compress(data, 6), bz2.compress):
        (tmp_path / "p.mrc").write_bytes(packer((tmp_path / "m.mrc").read_bytes()))
        assert (tmp_path / "p.mrc").stat().st_size < 50_000 and read_map(tmp_path / "p.mrc").box == 224
    with h5py.File(tmp_path / "p.seg", "w") as file:
        file.attrs["format"], file.attrs["ijk_to_xyz_transform"] = "segger", np.eye(3, 4)
        file.create_dataset("mask", (224,) * 3, np.uint32, chunks=(56,) * 3, fillvalue=1)
        file["region_ids"], file["parent_ids"] = [1], [0]
    assert (tmp_path / "p.seg").stat().st_size < 20_000 and (read_segments(tmp_path / "p.seg").labels == 1).all()


def test_a_map_holds_real_numbers_at_a_place(tmp_path):
    for field, value in (("cella", np.nan), ("origin", np.inf)):
        write_map(tmp_path / "m.mrc", np.ones((8, 8, 8)), 1.0)
        with mrcfile.open(tmp_path / "m.mrc", "r+") as file:
            file.header[field].x = value
        for read in (read_map, read_segments):
            with pytest.raises(InputError, match=r"m\.mrc: voxel size or origin"):
                read(tmp_path / "m.mrc")
    with mrcfile.new(tmp_path / "m.mrc", np.ones((8, 8, 8), np.complex64), overwrite=True) as file:
        file.voxel_size = 1.0
    with pytest.raises(InputError, match=r"m\.mrc: holds complex numbers"):
        read_map(tmp_path / "m.mrc")


@pytest.mark.parametrize("where", ["rlnAngleRot", "rlnImageName", "rlnVoltage"])
def test_a_star_column_that_stands_twice_is_named(tmp_path, where):
    path = write_relion_star(tmp_path / "p.star")
    text = path.read_text()
    other = "_rlnAmplitudeContrast" if where == "rlnVoltage" else "_someoneElses"
    path.write_text(text.replace(other, f"_{where}"))
    with pytest.raises(InputError, match=rf"p\.star: data_\w+: the column {where} stands twice"):
        read_particles(path)


# everything is shown as text -----------------------------------------------------------------------------------------

NASTY = "</script><img src=x onerror=alert(1)>\"'<!--<script>{{ 7 * 7 }}"


class Page(HTMLParser):
    """The elements of a page, and the content of its scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.attributes: list[str] = []
        self.scripts: dict[str, str] = {}
        self.text = ""
        self._script: str | None = None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += [name for name, _ in attrs]
        self._script = dict(attrs).get("id") or f"script {len(self.scripts)}" if tag == "script" else None

    def handle_endtag(self, tag):
        self._script = None

    def handle_data(self, data):
        if self._script:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data
        self.text += data


def test_json_in_a_page_ends_no_script():
    content = json.dumps({NASTY: [NASTY, "<!--", "-->", "]]>"]})
    page = Page(str(environment().get_template("elements.html.j2").module.data("x", content)))
    assert page.elements == ["script"] and json.loads(page.scripts["x"]) == json.loads(content)


def test_a_report_shows_names_as_text(tmp_path):
    """A page of a run that holds only the user's texts, beside the same page of tame ones."""
    pages = {}
    for text in ("tame", NASTY):
        root = tmp_path / re.sub(r"\W", "_", text)
        ChecksumsRecord(**_checksums(text)).write(RunFolder(root).checksums)
        config = {"name": text, "particles": text, "image_root": text, "mesh": {"segmentation": text}}
        write_report(root, root / "r.html", config)
        pages[text] = Page((root / "r.html").read_text())
    assert pages[NASTY].elements == pages["tame"].elements and pages[NASTY].attributes == pages["tame"].attributes
    assert pages[NASTY].text.count(NASTY) == pages["tame"].text.count("tame") > 3


def _checksums(text: str) -> dict:
    from flexlib.records import InputFile

    file = InputFile(path=text, used_as=[text], size_bytes=1, modified_ns=1, sha256=text)
    return {"files": [file]}


def test_names_are_words_in_chimeraxs_scripts(tmp_path):
    """No name ends its command: what is quoted reads back as the name, as ChimeraX reads it."""
    names = (*NAMES, "two\nopen evil.cxc", 'a"; open evil', "back\\slash", "tab\t", "\u2028open evil", "plain_1.mrc")
    table = pd.DataFrame({"frame": [0, 1], "num_particles": [3, 4], "beyond_data": [0.0, 1.0]})
    for name in names:
        word = chimerax_text(name)
        assert (ast.literal_eval(word) if word.startswith('"') else word) == name and len(word.splitlines()) == 1
        script = chimerax_script(name, table, 0.5)
        tame = chimerax_script("axis_1", table, 0.5)
        assert len(script.splitlines()) == len(tame.splitlines())
        assert f"open {chimerax_text(f'{name}/frame_*.mrc')} vseries true" in script.splitlines()
    assert chimerax_text("plain_1.mrc") == "plain_1.mrc"
    mask = np.zeros((8, 8, 8), bool)
    mask[2:6, 2:6, 2:6] = True
    out = MeshFolder(tmp_path)
    write_chimerax(
        out, bcc_mesh(mask, 2.0, 6.0, None), Map(mask.astype(np.float32), 2.0), tmp_path / "a\nopen evil;b.mrc"
    )
    assert out.chimerax.read_text().splitlines()[1] == r'open "a\u000aopen evil;b.mrc" id 1'


def test_a_series_is_written_below_its_folder():
    for path in ("...csv", "..csv", "a/..csv", "../x y.csv", "-x.csv", "$(touch touched).csv", "a;b.npy"):
        (request,) = parse_series(path)
        assert re.fullmatch(r"\w[\w.-]*", request.name) and "/" not in request.name
