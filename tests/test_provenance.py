"""Checksums of the inputs, and the file that says what a run was."""

import hashlib
import json
import os
import platform
import subprocess
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import yaml
from crate_rules import read_crate
from fake_results import POINT, write_fake_results
from particle_files import write_relion_star, write_stacks

import flexlib
from flexlib.errors import InputError
from flexlib.layout import RunFolder
from flexlib.provenance import checksum_inputs, checksums, write_provenance
from flexlib.provenance.machine import code_commit, public_command
from flexlib.records import ChecksumsRecord, InputFile
from flexlib.workflow_support.checks import check_config

STACKS = [f"project/Extract/job1/{name}.mrcs" for name in "ab"]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The working folder, with a RELION project of two stacks below it."""
    write_stacks(tmp_path / "project")
    write_relion_star(tmp_path / "project/Refine3D/job2/run_data.star")
    (tmp_path / "consensus.mrc").write_bytes(bytes(1000))
    monkeypatch.chdir(tmp_path)
    return tmp_path


INPUTS = {"particles": ["project/Refine3D/job2/run_data.star"], "consensus": ["consensus.mrc"]}


def found(out_json: Path = Path("checksums.json")) -> dict[str, InputFile]:
    return {file.path: file for file in ChecksumsRecord.read(out_json).files}


def sha256(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@pytest.fixture
def hashed(monkeypatch):
    """Names of the files that are read for their checksums."""
    names, read = [], checksums._sha256

    def watched(path):
        names.append(path.name)
        return read(path)

    monkeypatch.setattr(checksums, "_sha256", watched)
    return names


def test_every_input_and_every_stack_once(project, hashed):
    checksum_inputs({**INPUTS, "generate.volume": ["consensus.mrc"]}, "checksums.json")
    files = found()
    assert list(files) == [*INPUTS["particles"], "consensus.mrc", *STACKS]
    for path, file in files.items():
        assert file.sha256 == sha256(path)
        assert (file.size_bytes, file.modified_ns) == (Path(path).stat().st_size, Path(path).stat().st_mtime_ns)
    assert files["consensus.mrc"].used_as == ["consensus", "generate.volume"]
    assert files[STACKS[0]].used_as == ["images"]
    assert sorted(hashed) == ["a.mrcs", "b.mrcs", "consensus.mrc", "run_data.star"]


def test_unchanged_files_are_not_read_again(project, hashed):
    checksum_inputs(INPUTS, "checksums.json")
    before = found()
    hashed.clear()
    checksum_inputs(INPUTS, "checksums.json")
    assert not hashed and found() == before
    content = bytearray(Path(STACKS[1]).read_bytes())
    content[-1] ^= 1
    Path(STACKS[1]).write_bytes(content)
    os.utime(STACKS[1], ns=(0, before[STACKS[1]].modified_ns + 1))  # however coarse the clock of the disk
    checksum_inputs(INPUTS, "checksums.json")
    assert hashed == ["b.mrcs"]
    changed = {path for path, file in found().items() if file.sha256 != before[path].sha256}
    assert changed == {STACKS[1]}
    assert found()[STACKS[1]].sha256 == sha256(STACKS[1])


def test_stacks_can_be_left_out(project, hashed):
    checksum_inputs(INPUTS, "checksums.json", stacks=False)
    assert sorted(hashed) == ["consensus.mrc", "run_data.star"]
    assert found()[STACKS[0]].sha256 is None
    assert found()[STACKS[0]].size_bytes == Path(STACKS[0]).stat().st_size


def test_a_folder_stands_for_its_files(project):
    Path("trained/checkpoints").mkdir(parents=True)
    for name in ("model.pt", "log.csv", "checkpoints/model.pt"):
        Path("trained", name).write_text(name)
    checksum_inputs({**INPUTS, "train.init_from": ["trained"]}, "checksums.json")
    used = {path: file.sha256 for path, file in found().items() if file.used_as == ["train.init_from"]}
    assert used == {name: sha256(name) for name in ("trained/log.csv", "trained/model.pt")}


def test_what_cannot_be_described_is_an_error(project, monkeypatch):
    with pytest.raises(InputError, match=r"nowhere\.mrc: cannot be read \(No such file"):
        checksum_inputs({**INPUTS, "mask": ["nowhere.mrc"]}, "checksums.json")

    def grow(path):
        with path.open("ab") as file:
            file.write(b"more")
        return ""

    monkeypatch.setattr(checksums, "_sha256", grow)
    with pytest.raises(InputError, match="changed while its checksum was taken"):
        checksum_inputs(INPUTS, "checksums.json")
    assert not Path("checksums.json").exists()


def test_an_older_record_that_cannot_be_read_is_made_anew(project, caplog):
    Path("checksums.json").write_text('{"files": [{"name": "a"}]}')
    checksum_inputs(INPUTS, "checksums.json")
    assert "checksums.json: not what this version's checksum writes" in caplog.text
    assert found()["consensus.mrc"].sha256 == sha256("consensus.mrc")


def test_paths_are_told_as_the_config_would(project, monkeypatch):
    monkeypatch.chdir(project / "project")
    monkeypatch.setenv("HOME", str(project / "home/bob"))
    given = ["../project/Refine3D/run.star", None]
    cases = {
        project / "project/Extract/a.mrcs": "Extract/a.mrcs",
        project / "home/bob/a.mrcs": "~/a.mrcs",
        Path("/data/a.mrcs"): "/data/a.mrcs",
    }
    for path, told in cases.items():
        assert checksums.spell(path, given) == told
    assert checksums.spell(project / "elsewhere/a.mrcs", [project / "elsewhere/set/p.star"]) == str(
        project / "elsewhere/a.mrcs"
    )


# The crate


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The results of a run and their config."""
    root = tmp_path_factory.mktemp("provenance") / "results/tiny"
    write_fake_results(root, box=32, pixel_size_A=7.0, num_particles=60, frames=2)
    config = {
        "name": "tiny",
        "particles": "input.star",
        "consensus": "consensus.mrc",
        "mesh": {"cells": POINT.cells},
        "train": {"latent_dims": [1, 2], "seed": [0, 3]},
        "sweep": {"exclude": [{"latent_dims": 1, "seed": 3}]},
    }
    return root, check_config(config)


def values(entities, names) -> dict:
    return {
        entities[link["@id"]]["name"]: entities[link["@id"]]["value"]
        for link in names
        if "value" in entities[link["@id"]]
    }


def test_the_crate_is_valid_and_complete(finished):
    root, config = finished
    write_provenance(root, config, "snakemake --cores 2")
    entities = read_crate(root)
    run = RunFolder(root)
    action = entities["#run"]
    assert action["description"] == "snakemake --cores 2"
    results = {link["@id"] for link in action["result"]}
    folder = run.reconstruct(POINT.path)
    validated = run.validate(POINT.path)
    expected = [run.table, run.train(POINT.path).latents, folder.half("flex", 1), folder.half("rigid", 2), folder.fsc]
    expected += [validated.record, validated.half_map(2), validated.motion_error, validated.half(1).validation]
    assert {path.relative_to(root).as_posix() for path in expected} <= results
    assert f"generate/{POINT.path}/axis_1/" in results
    inputs = [entity for name, entity in entities.items() if name.startswith("#input-")]
    assert [(one["name"], one["contentSize"], one.get("sha256")) for one in inputs] == [
        ("input.star", "1234567", "ab" * 32),
        ("stacks/big.mrcs", "9876543210", None),
    ]
    assert inputs[0]["dateModified"] == "2023-11-14T22:13:20+00:00"
    assert {one["@id"] for one in inputs} | {"config.yaml"} <= {link["@id"] for link in action["object"]}


def test_the_config_is_there_for_readers_and_for_machines(finished):
    root, config = finished
    write_provenance(root, config)
    assert yaml.safe_load((root / "config.yaml").read_text()) == config
    entities = read_crate(root)
    assert "description" not in entities["#run"]
    told = values(entities, entities["#run"]["object"])
    assert told["train.latent_dims"] == [1, 2]
    assert (told["mesh.cells"], told["train.rigidity"], told["mask"]) == (POINT.cells, 2.0, "null")
    assert json.loads(told["sweep.exclude"]) == [{"latent_dims": 1, "seed": 3}]
    assert len(told) == sum(len(value) if isinstance(value, dict) else 1 for value in config.values())


def test_versions_machine_and_seeds(finished):
    root, config = finished
    write_provenance(root, config)
    entities = read_crate(root)
    own = entities["#flexlib"]
    assert own["softwareVersion"] == flexlib.__version__
    needed = {entities[link["@id"]]["name"]: entities[link["@id"]] for link in own["softwareRequirements"]}
    assert needed["numpy"]["softwareVersion"] == np.__version__
    assert needed["Python"]["softwareVersion"] == platform.python_version()
    assert {"torch", "scipy", "numba", "mrcfile"} <= set(needed)
    told = values(entities, entities["#run"]["additionalProperty"])
    assert told["seeds of the random numbers"] == [0, 3]
    assert told["device of the training"] == "a GPU"  # of a half-set
    assert told["device of the validation"] == "cpu"
    assert told["operating system"] and told["processor of the machine that wrote this file"]
    assert platform.node() not in json.dumps(told)
    begin, end = (datetime.fromisoformat(entities["#run"][name]) for name in ("startTime", "endTime"))
    assert 312 <= (end - begin).total_seconds() <= 313  # of the one job


def test_no_name_and_no_home_is_told(finished, monkeypatch, tmp_path):
    root, config = finished
    monkeypatch.setenv("HOME", "/home/bob")
    monkeypatch.setenv("SECRET_TOKEN", "hush")
    command = "/home/bob/.venv/bin/snakemake --configfile /home/bob/my.yaml --directory /scratch/bob/run -n"
    write_provenance(root, config, command)
    text = (root / "ro-crate-metadata.json").read_text()
    assert "bob" not in text and "hush" not in text and str(root) not in text and str(Path.cwd()) not in text
    told = read_crate(root)["#run"]["description"]
    assert told == "snakemake --configfile ~/my.yaml --directory /scratch/USER/run -n"


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("/opt/python/snakemake/__main__.py --cores 2", "snakemake --cores 2"),
        ("snakemake", "snakemake"),
        ("x/snakemake --directory {here}", "snakemake --directory ./"),
        ("x/snakemake --directory {here}/ --cores 1", "snakemake --directory ./ --cores 1"),
        (
            "x/snakemake --config a=/nobody/lives/here,b=/nobody/lives/hereafter",
            "snakemake --config a=~,b=/nobody/lives/hereafter",
        ),
        ("x/snakemake --configfile {here}/my.yaml 'a b'", "snakemake --configfile ./my.yaml 'a b'"),
        ("x/snakemake --configfile {here}2/my.yaml", "snakemake --configfile {here}2/my.yaml"),
        ("x/snakemake --configfile '{here}/my run.yaml'", "snakemake --configfile './my run.yaml'"),
    ],
)
def test_command_without_names(tmp_path, monkeypatch, command, told):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/nobody/lives/here")
    assert public_command(command.format(here=tmp_path)) == told.format(here=tmp_path)


def test_without_a_home_there_is_nothing_to_hide(monkeypatch):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    assert public_command("snakemake --cores 2") == "snakemake --cores 2"
    assert checksums.spell(Path("/data/a.mrcs"), []) == "/data/a.mrcs"
    monkeypatch.setattr(Path, "home", lambda: Path("/"))
    assert checksums.spell(Path("/data/a.mrcs"), []) == "/data/a.mrcs"


def test_the_commit_of_a_checkout(tmp_path):
    assert code_commit(tmp_path) is None

    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", "-C", tmp_path, *who, *words], check=True, capture_output=True, text=True).stdout

    git("init")
    (tmp_path / "a.py").write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    commit = code_commit(tmp_path)
    assert commit is not None
    assert (commit.sha, commit.modified) == (git("rev-parse", "HEAD").strip(), False)
    (tmp_path / "a.py").write_text("2")
    assert code_commit(tmp_path).modified
