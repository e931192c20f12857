"""What comes from files and configs is data: never code, never a shell's words, never markup, never a way out."""

import ast
import json
import pickle
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from particle_files import cs_records, save_cs, write_relion_star, write_stacks
from run_snakemake import ROOT, snakemake
from test_bad_particles import star_with

import flexlib
from flexlib.errors import InputError
from flexlib.generate.chimerax import chimerax_script
from flexlib.imaging.maps import write_map
from flexlib.model.flex_model import FlexModel
from flexlib.particles import read_particles
from flexlib.particles.latents_read import read_latents
from flexlib.records import ChecksumsRecord
from flexlib.render.chimerax import chimerax_text
from flexlib.report.formats import shell_word
from flexlib.report.markup import script_json
from flexlib.runtime import load_saved
from flexlib.train.start import start_or_resume
from flexlib.workflow_support.checks import check_config, check_paths
from flexlib.workflow_support.series import parse_series
from flexlib.workflow_support.srun import run_tasks

SOURCES = [*Path(flexlib.__file__).parent.rglob("*.py"), *(ROOT / "workflow/scripts").glob("*.py")]
SHELL_NAMES = ["$(touch harmed)", "`touch harmed`", "; touch harmed;", "a'b\"c && touch harmed", "-rf", "a  b", "$HOME"]


class Bomb:
    """Makes a file where it is unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("harmed"),))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, where nothing may have been harmed in the end."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not list(tmp_path.rglob("harmed*"))


# code ----------------------------------------------------------------------------------------------------------------


def called(tree: ast.AST):
    """(dotted name, keywords) of every call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            keywords = {word.arg: word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)}
            yield ast.unparse(node.func), keywords


def forbidden(path: Path) -> list[str]:
    """Calls that could run what a file holds or a config says."""
    found = []
    for name, keywords in called(ast.parse(path.read_text())):
        wrong = (
            name in ("eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load")
            or name in ("pickle.load", "pickle.loads", "subprocess.getoutput", "pd.read_pickle", "joblib.load")
            or keywords.get("shell")
            or (name == "np.load" and keywords.get("allow_pickle", False))
            or (name == "torch.load" and keywords.get("weights_only") is not True)
        )
        found += [f"{path.name}: {name}"] if wrong else []
    return found


def test_no_source_runs_what_a_file_holds(tmp_path):
    assert len(SOURCES) > 150
    assert [call for path in SOURCES for call in forbidden(path)] == []
    for line in (
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "subprocess.run(text, shell=True)",
        "pickle.loads(data)",
    ):
        (tmp_path / "wrong.py").write_text(line)
        assert forbidden(tmp_path / "wrong.py"), line


def test_no_rule_has_a_shell_command():
    rules = [path.read_text() for path in (ROOT / "workflow").rglob("*.smk")]
    assert len(rules) > 5
    assert not [text for text in rules if re.search(r"^\s*(shell|run):|\bshell\(", text, re.M)]


@pytest.mark.parametrize("kind", ["pickle", "torch", "text", "cut"])
def test_models_and_checkpoints_are_tensors_or_refused_in_one_line(here, kind):
    path = here / "model.pt"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb(), protocol=2))  # torch's own
    elif kind == "torch":
        torch.save({"format_version": Bomb()}, path)
    else:
        torch.save({"format_version": torch.zeros(1000)}, path)
        path.write_bytes(b"not a model" if kind == "text" else path.read_bytes()[:2000])
    for read in (load_saved, FlexModel.load):
        with pytest.raises(InputError, match=r"model\.pt: damaged, or not a file of tensors") as refused:
            read(path)
        assert "\n" not in str(refused.value)

    class Run:
        device = "cpu"

    with pytest.raises(InputError, match=r"model\.pt: damaged, or not a file of tensors"):
        start_or_resume(Run(), path, {}, discard_other=True)


def test_arrays_of_objects_are_not_loaded(here):
    star = write_relion_star(here / "particles.star")
    with (here / "latents.npy").open("wb") as file:
        np.save(file, np.array([Bomb()] * 12, object), allow_pickle=True)
    with pytest.raises(InputError, match=r"latents\.npy: not a readable \.npy file"):
        read_latents(here / "latents.npy", read_particles(star))


def test_yaml_makes_no_objects(here):
    """Neither does Snakemake's reader."""
    (here / "my.yaml").write_text(
        "name: !!python/object/apply:os.system ['touch harmed']\nparticles: p\nconsensus: c\n"
    )
    result = snakemake(here, "--configfile", "my.yaml", "--dry-run")
    assert result.returncode != 0


# the shell -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SHELL_NAMES[:4], "-rf", "", "a b", "a/b", "../a", "..", "run\n", "a\nb", "{x}"])
def test_a_runs_name_is_a_plain_word(name):
    with pytest.raises(InputError, match="config: name: "):
        check_config({"name": name, "particles": "p.star", "consensus": "c.mrc"})


@pytest.mark.parametrize("name", ["{cells}.star", "a\nb.star", "a\x1b[2J.star"])
def test_a_path_that_snakemake_would_take_for_more_is_refused(here, name):
    (here / name).touch()
    (here / "c.mrc").touch()
    with pytest.raises(InputError, match=r"config: particles: .* (braces|holds a control character)") as refused:
        check_paths(check_config({"name": "run", "particles": name, "consensus": "c.mrc"}))
    assert str(refused.value).isprintable()


def test_file_names_are_no_commands(here):
    """Through Snakemake and a job of its own: folders and files with all that a shell would understand."""
    folder = here / "".join(SHELL_NAMES)
    write_relion_star(folder / "-p $(touch harmed).star")
    write_stacks(folder)
    write_map(folder / "--help;`touch harmed`.mrc", np.ones((16,) * 3, np.float32), 2.0)
    config = {
        "name": "run",
        "particles": f"{folder.name}/-p $(touch harmed).star",
        "consensus": f"{folder.name}/--help;`touch harmed`.mrc",
    }
    (here / "my.yaml").write_text(yaml.safe_dump(config))
    result = snakemake(here, "--configfile", "my.yaml", "--cores", "1", "results/run/checksums.json")
    assert result.returncode == 0, result.stderr
    files = {Path(file.path).name: file for file in ChecksumsRecord.read(here / "results/run/checksums.json").files}
    wanted = {"-p $(touch harmed).star", "--help;`touch harmed`.mrc", "a.mrcs", "b.mrcs"}
    assert set(files) == wanted and all(file.sha256 for file in files.values())
    assert not [path for path in here.rglob("*") if path.name == "harmed"]
    for path in sorted(folder.rglob("*harmed*")):  # the names themselves
        path.rename(folder / f"{path.suffix[1:]}")
    folder.rename(here / "done")


def test_tasks_of_srun_get_their_arguments_whole(here, monkeypatch):
    (here / "record.py").write_text("import json, sys\njson.dump(sys.argv[1:], open('arguments.json', 'w'))\n")
    monkeypatch.setattr(sys, "argv", ["train.py", *SHELL_NAMES, "a\nb"])
    starter = f"{shlex.quote(sys.executable)} record.py"
    assert run_tasks({"mpi": starter}, 2, 1) == 0
    assert json.loads((here / "arguments.json").read_text())[-len(SHELL_NAMES) - 2 :] == sys.argv


@pytest.mark.parametrize("name", SHELL_NAMES)
def test_a_command_shown_for_a_folder_is_one_word(name):
    (word,) = shlex.split(shell_word(name))
    assert Path(word) == Path(name) and not word.startswith("-")


# ChimeraX ------------------------------------------------------------------------------------------------------------

CHIMERAX_NAMES = ["a\nexit", "a; exit", 'a" ; exit ; "', "a b", "a\\", "a\r\nexit", "a\u2028exit", "#1"]


@pytest.mark.parametrize("name", CHIMERAX_NAMES)
def test_a_name_cannot_end_a_chimerax_command(name):
    table = pd.DataFrame({"frame": range(3), "num_particles": 5, "beyond_data": [0, 0, 1]})
    lines = chimerax_script(name, table, 0.5).splitlines()
    expected = chimerax_script("axis_1", table, 0.5).splitlines()
    assert len(lines) == len(expected)
    assert [line.split(" ")[0] for line in lines] == [line.split(" ")[0] for line in expected]
    (word,) = re.fullmatch(r'open ("(?:[^"\\]|\\.)*") vseries true', lines[1]).groups()
    assert ast.literal_eval(word) == f"{name}/frame_*.mrc"
    assert lines[2:] == expected[2:]


def test_plain_names_stay_plain():
    assert chimerax_text("../particles/consensus.mrc") == "../particles/consensus.mrc"


@pytest.mark.parametrize("name", [*CHIMERAX_NAMES, *SHELL_NAMES, "..", "a/../../b"])
def test_a_series_of_a_file_gets_a_plain_folder(name):
    (request,) = parse_series(f"/points/{name}.csv")
    assert re.fullmatch(r"\w[\w.-]*", request.name)


# images outside the folder they are looked for in --------------------------------------------------------------------


def test_control_characters_in_image_names_are_refused(here):
    records = cs_records()
    records["blob/path"][4] = "a\nb.mrc"
    with pytest.raises(InputError, match=r"row 5, column blob/path: 'a\\nb\.mrc' holds control characters") as refused:
        read_particles(save_cs(here / "p.cs", records))
    assert "\n" not in str(refused.value)


def test_names_that_stay_inside_links_and_absolute_paths_are_allowed(here):
    project, elsewhere = here / "project", here / "elsewhere"
    write_stacks(elsewhere)
    project.mkdir()
    (project / "Extract").symlink_to(elsewhere / "Extract")
    old = "000002@Extract/job1/a.mrcs"
    for name in ("Extract/../Extract/job1/a.mrcs", "./Extract/job1/a.mrcs", str(elsewhere / "Extract/job1/a.mrcs")):
        star = project / star_with(project, "p.star", old, f"000002@{name}")
        paths = read_particles(star, None, project).stack_paths
        assert all(path.is_file() for path in paths), name
        assert any(path.samefile(elsewhere / "Extract/job1/a.mrcs") for path in paths)


# the report; more in test_report.py --------------------------------------------------------------------------------

MARKUP = "</script><script>harmed()</script><img src=x onerror=harmed()>"


def test_json_cannot_end_its_script():
    content = json.dumps({MARKUP: ["<!--<script>", "</SCRIPT >", "]]>"]})
    shown = str(script_json(content))
    assert json.loads(shown) == json.loads(content)
    assert "</" not in shown and "<!--" not in shown
