"""The config: schema and settings say the same, mistakes are reported in one line, numbers are numbers."""

import json
import re
import tomllib
from dataclasses import MISSING, asdict, fields
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import yaml
from packaging.specifiers import SpecifierSet

from flexlib.errors import InputError
from flexlib.imaging.maps import write_map
from flexlib.simulate.settings import Simulation
from flexlib.workflow_support.checks import (
    check_conditions,
    check_config,
    check_maps,
    check_paths,
    settle_validation,
)
from flexlib.workflow_support.gpus import gpu_complaint, tasks_complaint, tasks_of
from flexlib.workflow_support.run_settings import SECTIONS
from flexlib.workflow_support.schema import made_files
from flexlib.workflow_support.settings import (
    MaskSettings,
    MeshSettings,
    ReconstructSettings,
    TrainSettings,
    make_settings,
)
from flexlib.workflow_support.simulate_settings import SimulateSettings

ROOT = Path(__file__).parents[1]
SCHEMA = yaml.safe_load((ROOT / "workflow/schemas/config.schema.yaml").read_text())
MINIMAL = {"name": "run", "particles": "p.star", "consensus": "c.mrc"}


def check(text: str) -> dict:
    return check_config({**MINIMAL, **yaml.safe_load(text)})


def schema_keys() -> dict[str, dict]:
    """Dotted key -> its subschema."""
    keys = {}
    for key, subschema in SCHEMA["properties"].items():
        keys[key] = subschema
        keys |= {f"{key}.{name}": item for name, item in subschema.get("properties", {}).items()}
    return keys


@pytest.mark.parametrize("section", SECTIONS)
def test_schema_and_dataclass_have_the_same_keys_and_defaults(section):
    properties = SCHEMA["properties"][section]["properties"]
    defaults = {
        item.name: item.default if item.default is not MISSING else item.default_factory()
        for item in fields(SECTIONS[section])
    }
    schema_defaults = {key: subschema["default"] for key, subschema in properties.items()}
    assert {
        key: list(value) if isinstance(value, tuple) else value for key, value in defaults.items()
    } == schema_defaults
    assert list(properties) == list(defaults)
    assert SCHEMA["properties"][section]["additionalProperties"] is False


def test_filled_defaults_make_the_default_settings():
    config = check_config(MINIMAL)
    for section, kind in SECTIONS.items():
        if section != "simulate":
            assert make_settings(kind, config[section]) == kind()
    assert config["simulate"] is None


def test_simulation_defaults_are_the_simulators():
    everything = asdict(Simulation())
    assert {item.name: everything[item.name] for item in fields(SimulateSettings)} == asdict(SimulateSettings())


def test_every_key_is_documented_as_the_schema_says():
    reference = (ROOT / "config/README.md").read_text().splitlines()
    for key, subschema in schema_keys().items():
        if "properties" in subschema:
            assert f"## `{key}`" in reference
            continue
        default = subschema.get("default", "required")
        text = default if isinstance(default, str) else json.dumps(default)
        cell = f"`{text}`" if "default" in subschema else text
        assert f"| `{key}` | {cell} | {subschema['description']} |" in reference


@pytest.mark.parametrize("path", made_files(), ids=lambda path: path.name)
def test_schema_and_reference_are_what_the_settings_make(path):
    assert path.read_text() == made_files()[path], "make docs"


def test_mask_keys_are_mesh_keys():
    shared = [item.name for item in fields(MaskSettings)]
    assert shared == ["lowpass_A", "threshold", "dilate_A", "pad_A"]
    assert [item.name for item in fields(MeshSettings)][:5] == ["cells", *shared]


def test_demo_config_is_valid():
    demo = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    assert check_config(demo)["simulate"]["phantom"] == "antibody"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {rigidty: 2}", "unknown key 'rigidty' in train; did you mean 'rigidity'?"),
        ("partciles: x.star", "unknown key 'partciles'; did you mean 'particles'?"),
        ("mesh: {xyz: 1}", "unknown key 'xyz' in mesh; known keys are cells, "),
        ("train: {rigidity: []}", "train.rigidity: [] should be non-empty"),
        ("train: {rigidity: [1, 1]}", "train.rigidity: [1, 1] has non-unique elements"),
        ("train: {rigidity: -1}", "train.rigidity: -1 is less than the minimum of 0"),
        ("train: {latent_dims: 1.5}", "train.latent_dims: 1.5 is not of type 'integer', 'array'"),
        ("train: {epochs: many}", "train.epochs: 'many' is not understood; Passes over the particles"),
        ("mesh: {threshold: high}", "mesh.threshold: 'high' is not understood; Density level"),
        ("prepare: {train_box: 65}", "prepare.train_box: 65 is not a multiple of 2"),
        ("prepare: {symmetry: X3}", "prepare.symmetry: 'X3' is not understood; Point group"),
        ("reconstruct: {points: [{lambda: 1}]}", "reconstruct.points: [{'lambda': 1}] is not understood"),
        ("reconstruct: {points: []}", "reconstruct.points: [] is not understood; Which points"),
        ("validate: {points: some}", "validate.points: 'some' is not understood; Which points"),
        ("validate: {points: [{lambda: 1}]}", "validate.points: [{'lambda': 1}] is not understood"),
        ("validate: all", "validate: 'all' is not understood; Two models, one of each half-set"),
        ("validate: [none]", "validate: ['none'] is not of type 'object', 'string'"),
        ("sweep: {choose_by: score}", "sweep.choose_by: 'score' is not one of ['held_out', 'cross']"),
        ("generate: {series: []}", "generate.series: [] is not understood; Which series."),
        ("train: {rigidity: 1e-x}", "train.rigidity: '1e-x' is not of type 'number', 'array'"),
        ("sweep: {exclude: [{cell: 20}]}", "unknown key 'cell' in sweep.exclude.0; did you mean 'cells'?"),
        ("device: gpu", "device: 'gpu' is not one of ['auto', 'cpu', 'cuda']"),
        ("name: a/b", "name: 'a/b' is not understood"),
        ("particles: null", "particles: None is not of type 'string'"),
    ],
)
def test_mistakes_are_reported_in_one_line(text, message):
    with pytest.raises(InputError) as caught:
        check(text)
    assert str(caught.value).startswith(f"config: {message}")
    assert "\n" not in str(caught.value)


def test_missing_key_is_named():
    with pytest.raises(InputError, match="config: the key 'consensus' is missing"):
        check_config({"name": "run", "particles": "p.star"})


def test_yaml_text_that_is_a_number_is_read_as_one():
    assert yaml.safe_load("1e-3") == "1e-3"  # YAML 1.1 wants a point
    config = check("train: {rigidity: [1e-3, 2], centering: 5E-1}")
    assert config["train"]["rigidity"] == [0.001, 2]
    assert config["train"]["centering"] == 0.5


def test_empty_sections_and_the_given_config_stay_as_they_are():
    given = {**MINIMAL, "mesh": None, "train": {"seed": 3}}
    config = check_config(given)
    assert config["mesh"]["cells"] == 20
    assert given["mesh"] is None
    assert given["train"] == {"seed": 3}
    assert "cells" not in SCHEMA["properties"]["mesh"]["default"]


@pytest.mark.parametrize(
    ("text", "points", "told"),
    [
        ("{}", "best", None),
        ("validate: none", "none", None),
        ("validate: null", "best", None),
        ("validate: {points: [{cells: 20}]}", [{"cells": 20}], None),
        ("sweep: {choose_by: cross}", "all", None),
        ("{sweep: {choose_by: cross}, validate: {points: [{cells: 20}]}}", "all", None),
        ("{sweep: {choose_by: cross}, train: {validation_fraction: 0}}", "all", None),
        ("train: {freeze_latents: true}", "none", "train.freeze_latents: true gives both half-sets' models latents"),
        ("train: {validation_fraction: 0}", "none", "train.validation_fraction: 0 holds no particle out, so that none"),
        ("{train: {validation_fraction: 0}, validate: {points: all}}", "all", None),
        ("{train: {freeze_latents: true}, validate: none}", "none", None),
    ],
)
def test_what_is_validated_is_settled(text, points, told):
    given = {**MINIMAL, **yaml.safe_load(text)}
    config = check_config(given)
    found = settle_validation(given, config, 3)
    assert config["validate"] == {"points": points}
    assert found is None if told is None else found.startswith(told) and found.endswith(", or validate: none")
    assert settle_validation(config, check_config(config), 3) is None  # as the record of the run has it


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "{sweep: {choose_by: cross}, validate: none}",
            r"sweep\.choose_by: cross .* validate\.points: none leaves out",
        ),
        ("{train: {freeze_latents: true}, validate: {points: best}}", r"train\.freeze_latents: .*, or validate: none$"),
        (
            "{train: {freeze_latents: true}, sweep: {choose_by: cross}}",
            r"train\.freeze_latents: .*, or sweep\.choose_by: held_out$",
        ),
        (
            "{train: {validation_fraction: 0}, validate: {points: best}}",
            r"train\.validation_fraction: 0 .* none of 3 points is best: set it above 0, or validate: none$",
        ),
    ],
)
def test_a_validation_that_cannot_be_is_refused_where_it_is_asked_for(text, message):
    given = {**MINIMAL, **yaml.safe_load(text)}
    with pytest.raises(InputError, match=f"^config: {message}") as refused:
        settle_validation(given, check_config(given), 3)
    assert "\n" not in str(refused.value)


def test_order_of_the_keys_does_not_matter():
    one = check("{train: {seed: 0, rigidity: 2.0}, mesh: {cells: 20}}")
    assert json.dumps(one) == json.dumps(check("{}"))  # as text, which is what Snakemake compares


def test_settings_are_typed():
    mesh = make_settings(MeshSettings, {"segmentation": "seg.mrc", "rigid_segments": [1, 2], "lowpass_A": 8})
    assert mesh.segmentation == Path("seg.mrc")
    assert mesh.rigid_segments == (1, 2)
    assert isinstance(mesh.lowpass_A, float)
    assert mesh.threshold == "auto"
    assert make_settings(TrainSettings, {"latent_init": "random"}).latent_init == "random"
    assert make_settings(TrainSettings, {"latent_init": "a/latents.star"}).latent_init == Path("a/latents.star")
    assert make_settings(TrainSettings, {"epochs": 5}).epochs == 5
    assert make_settings(ReconstructSettings, {"cache_dir": None}).cache_dir is None
    with pytest.raises(InputError, match="no key 'cell'"):
        make_settings(MeshSettings, {"cell": 1})


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("{}", "particles"),
        ("{particles: here.star, mask: mask.mrc}", "mask"),
        ("{particles: here.star, mesh: {custom: mesh.p}}", "mesh.custom"),
        ("{particles: here.star, train: {latent_init: latents.star}}", "train.latent_init"),
        ("{particles: here.star, generate: {volume: v.mrc}}", "generate.volume"),
        ("{particles: here.star, generate: {series: [axes, path.csv]}}", "generate.series"),
    ],
)
def test_missing_files_are_named(tmp_path, monkeypatch, text, key):
    monkeypatch.chdir(tmp_path)
    for name in ("here.star", "c.mrc"):
        Path(name).touch()
    config = check(text)
    with pytest.raises(InputError, match=f"^config: {re.escape(key)}: .* does not exist"):
        check_paths(config)


def write_size(path, voxels, voxel_A):
    write_map(path, np.zeros((8, 8, 8), np.float32), 1.0)  # headers alone are read, so the rest may be wrong
    with mrcfile.open(path, "r+", permissive=True, header_only=True) as file:
        file.header.nx, file.header.ny, file.header.nz = voxels
        file.header.cella = tuple(side * voxel_A for side in voxels)


@pytest.mark.parametrize(
    ("consensus", "mask", "message"),
    [
        (((40, 40, 40), 5.0), ((40, 40, 40), 5.0), None),
        (((40, 40, 40), 5.0), ((80, 80, 80), 2.5), None),  # resampled
        (((40, 40, 40), 5.0), ((81, 81, 81), 2.5), None),  # odd: within a voxel
        (
            ((40, 40, 40), 5.0),
            ((20, 20, 20), 5.0),
            r"mask: mask\.mrc is 100 A wide \(20 voxels of 5 A\), but the consensus",
        ),
        (((40, 40, 40), 5.0), ((40, 40, 40), 1.0), r"mask: mask\.mrc is 40 A wide"),
        (((40, 40, 40), 5.0), ((40, 40, 20), 5.0), r"mask: mask\.mrc has 40 x 40 x 20 voxels; a cubic map is needed"),
        (((40, 20, 40), 5.0), ((40, 40, 40), 5.0), r"consensus: c\.mrc has 40 x 20 x 40 voxels; a cubic map is needed"),
    ],
)
def test_maps_that_do_not_fit_are_refused_by_their_headers(tmp_path, monkeypatch, consensus, mask, message):
    monkeypatch.chdir(tmp_path)
    write_size(Path("c.mrc"), *consensus)
    write_size(Path("mask.mrc"), *mask)
    config = check("{mask: mask.mrc}")
    if message is None:
        check_maps(config)
    else:
        with pytest.raises(InputError, match=f"^config: {message}"):
            check_maps(config)


def test_a_gpu_that_is_needed_must_be_there_or_asked_for(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu_complaint("auto", True, {"train": 0}) is None
    assert "this machine shows no GPU" in gpu_complaint("cuda", True, {"train": 1})
    assert "no GPU is asked for train and reconstruct" in gpu_complaint("cuda", False, {"train": 0, "reconstruct": "0"})
    assert gpu_complaint("cuda", False, {"train": 1, "reconstruct": "1"}) is None
    asked_for = {"train": 0, "reconstruct": 0, "validate": 0}
    assert "no GPU is asked for train, reconstruct and validate: " in gpu_complaint("cuda", False, asked_for)


def test_several_processes_need_a_gpu_each_where_there_are_gpus(monkeypatch):
    asked_for = {"train": 2, "reconstruct": "1"}
    assert "processes: 2, one a GPU, but jobs are given 1: raise gpu of train and reconstruct" in gpu_complaint(
        "auto", False, asked_for, 2
    )
    assert gpu_complaint("cuda", False, {"train": 2, "reconstruct": "2"}, 2) is None
    assert gpu_complaint("auto", False, {"train": 0, "reconstruct": 0}, 2) is None
    assert gpu_complaint("cpu", False, asked_for, 2) is None
    monkeypatch.setattr("flexlib.workflow_support.gpus.count_gpus", lambda: 2)
    assert gpu_complaint("cuda", True, {}, 2) is None
    assert "processes: 3, one a GPU, but this machine shows 2: lower it" in gpu_complaint("auto", True, {}, 3)


@pytest.mark.parametrize(
    ("resources", "tasks", "complaint"),
    [
        ({}, 1, None),
        ({"tasks": 4}, 1, None),  # without mpi, SLURM is told so and one process starts the others
        ({"mpi": "srun", "tasks": "4", "nodes": 2}, 4, None),
        ({"nodes": 2}, 1, "profile: train: nodes: 2 needs mpi: srun and tasks: 4 beside it"),
        ({"mpi": "srun", "tasks": 2}, 2, "train.processes: 4, but the profile has tasks: 2 for train"),
        ({"mpi": "srun", "tasks": 4, "nodes": 5}, 4, "train.processes: 4, but the profile has nodes: 5 for train"),
    ],
)
def test_tasks_of_srun_are_as_many_as_processes(resources, tasks, complaint):
    assert tasks_of(resources) == tasks
    told = tasks_complaint("train", resources, 4)
    assert told is None if complaint is None else complaint in told


def test_examples_are_valid():
    examples = sorted((ROOT / "config/examples").glob("*.yaml"))
    assert [path.stem for path in examples] == ["cryosparc", "empiar-10180", "relion"]
    for path in examples:
        assert check_config(yaml.safe_load(path.read_text()))["particles"]


def test_small_config_of_the_catalog_is_valid():
    config = check_config(yaml.safe_load((ROOT / ".test/config/config.yaml").read_text()))
    assert config["simulate"]["num_particles"] < 200
    catalog = yaml.safe_load((ROOT / ".snakemake-workflow-catalog.yml").read_text())
    assert catalog["usage"]["software-stack-deployment"] == {"conda": True}
    assert all((ROOT / name).exists() for name in ("workflow/Snakefile", "config/README.md", "profiles/README.md"))


def test_what_simulate_makes_is_not_missed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_paths(check("{particles: demo/p.star, consensus: demo/c.mrc, simulate: {}}"))
    with pytest.raises(InputError, match="config: mask"):
        check_paths(check("{particles: demo/p.star, consensus: demo/c.mrc, simulate: {}, mask: other/m.mrc}"))


# by environment: what it has in place of pyproject's torch
TORCH = {
    "cpu": {"pytorch-cpu ==2.13.0"},
    "cuda": {"pytorch-gpu ==2.13.0", "triton ==3.7.1", "cuda-version >=12.6,<13"},
}


@pytest.mark.parametrize("name", TORCH)
def test_conda_environment_agrees_with_pyproject(name):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {f"python {project['requires-python']}", "pip", "setuptools >=77"} | TORCH[name]
    for requirement in project["dependencies"]:
        package, version = re.fullmatch(r"([A-Za-z0-9-]+)(.*)", requirement).groups()
        wanted.add(f"{package.replace('matplotlib', 'matplotlib-base')} {version}")
    wanted.remove("torch ==2.13.0")
    environment = yaml.safe_load((ROOT / f"envs/{name}.yaml").read_text())
    assert set(environment["dependencies"]) == wanted
    assert environment["channels"] == ["conda-forge", "nodefaults"]


@pytest.mark.parametrize("name", TORCH)
def test_pins_are_of_the_environments_packages_and_in_their_ranges(name):
    lines = (ROOT / f"envs/{name}.linux-64.pin.txt").read_text().splitlines()
    pinned = dict(re.fullmatch(r"conda-forge::([\w-]+)(.*)", line).groups() for line in lines if line[0] != "#")
    environment = yaml.safe_load((ROOT / f"envs/{name}.yaml").read_text())
    wanted = dict(text.partition(" ")[::2] for text in environment["dependencies"])
    assert pinned.keys() == wanted.keys()
    for package, version in pinned.items():
        if package not in ("pip", "setuptools"):  # which install flexlib, in any version
            assert SpecifierSet(wanted[package]).contains(version.removeprefix("="))


@pytest.mark.parametrize("name", TORCH)
def test_environments_install_flexlib_itself(name):
    script = (ROOT / f"envs/{name}.post-deploy.sh").read_text()
    assert script == (ROOT / "envs/cpu.post-deploy.sh").read_text()
    assert all((ROOT / item).exists() for item in re.search(r"\{(.*)\}", script)[1].split(","))


@pytest.mark.parametrize("name", ["p.star", "p.cs"])
def test_conditions_by_a_column_that_is_not_there_are_refused_before_any_job(tmp_path, name):
    path = tmp_path / name
    config = check_config({**MINIMAL, "particles": str(path), "interpret": {"conditions": "rlnBeamTiltClass"}})
    check_conditions(config)  # not there yet: another check's business
    if name == "p.star":
        path.write_text("data_particles\n\nloop_\n_rlnImageName #1\n_rlnBeamTiltClassB #2\n1@s.mrcs 4\n")
    else:
        with path.open("wb") as file:
            np.save(file, np.zeros(3, [("uid", "<u8"), ("rlnBeamTiltClassB", "<u4")]))
    with pytest.raises(InputError, match=f"interpret.conditions: .*{name} has no column 'rlnBeamTiltClass'"):
        check_conditions(config)
    check_conditions({**config, "interpret": {"conditions": "rlnBeamTiltClassB"}})
    check_conditions({**config, "interpret": {"conditions": None}})
    check_conditions({**config, "interpret": {"conditions": [str(path)]}})
