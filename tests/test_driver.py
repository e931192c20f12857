"""The workflow where Snakemake has an environment with nothing of ours, and jobs have another one, made by --sdm conda.

conda is a stand-in (``tests/conda/bin/conda`` says what that shows and what not); the two environments are real.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import starfile
import yaml
from driver import IN_CONDA, Driver, assert_same_map, assert_same_training, clone, write_config
from run_snakemake import small_config, wait_for

pytestmark = pytest.mark.slow
RESULTS = Path("results/tiny")
PATIENCE_S = 600


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A clone that is used from elsewhere."""
    return clone(tmp_path_factory.mktemp("source"))


def content(folder: Path) -> dict[str, int]:
    """Every file below a folder and when it was written; but for what Python and numba keep of what they compiled."""
    files = [path for path in folder.rglob("*") if "__pycache__" not in path.parts and ".git" not in path.parts]
    return {str(path.relative_to(folder)): path.lstat().st_mtime_ns for path in files if not path.is_dir()}


@pytest.fixture(scope="module")
def finished(driver, source, tmp_path_factory):
    """The working folder of an undisturbed run, what its jobs imported, and the clone's content before it."""
    folder = tmp_path_factory.mktemp("finished")
    record = tmp_path_factory.mktemp("record")
    write_config(folder)
    before = content(source)
    recording = {"PYTHONPATH_IN_CONDA": str(Path(__file__).parent / "conda/record"), "RECORD_IMPORTS": str(record)}
    arguments = ("--snakefile", str(source / "workflow/Snakefile"), "--configfile", "my.yaml", "--cores", "2")
    driver.run(folder, *arguments, *IN_CONDA, **recording)
    return folder, [json.loads(path.read_text()) for path in record.iterdir()], before


def jobs_environment(finished) -> Path:
    """The one environment that all jobs ran in."""
    (prefix,) = {record["prefix"] for record in finished[1]}
    return Path(prefix)


def test_driver_has_nothing_of_ours(driver):
    listed = subprocess.run([driver.folder / "bin/pip", "list"], capture_output=True, text=True, check=True).stdout
    names = {line.split()[0].lower() for line in listed.splitlines()[2:]}
    assert "snakemake" in names
    assert not names & {"torch", "scipy", "mrcfile", "numba", "flexlib"}
    assert (driver.packages / "flexlib").exists()  # the poisoned one


def test_run_comes_to_its_report(finished):
    folder, _, _ = finished
    assert (folder / RESULTS / "report.html").stat().st_size > 10_000
    assert (folder / RESULTS / "sweep.csv").exists()


def test_jobs_import_from_their_own_environment_and_the_clone(driver, source, finished):
    _, records, _ = finished
    scripts = {re.sub(r"^tmp\w+\.", "", record["script"]) for record in records}
    assert scripts >= {f"{rule}.py" for rule in ("simulate", "prepare", "mesh", "train", "generate", "reconstruct")}
    of_driver = set()
    for record in records:
        for name, file in record["files"].items():
            if name.split(".")[0] == "flexlib":
                assert Path(file).is_relative_to(source), (record["script"], name, file)
            if Path(file).is_relative_to(driver.packages):
                of_driver.add(name.split(".")[0])
    assert "snakemake" in of_driver  # which unpickles what it hands over
    assert not of_driver & {"numpy", "pandas", "scipy", "torch", "yaml", "jsonschema", "jinja2"}


def test_environment_holds_flexlib_and_no_snakemake(finished):
    python = jobs_environment(finished) / "bin/python"
    code = "import flexlib, torch; print(flexlib.__file__)"
    where = subprocess.run([python, "-c", code], cwd="/", capture_output=True, text=True, check=True).stdout.strip()
    assert Path(where).is_relative_to(python.parents[1])
    assert (python.parent / "flex-select").exists()
    assert subprocess.run([python, "-c", "import snakemake"], cwd="/", capture_output=True).returncode != 0


def test_nothing_is_written_into_the_clone(source, finished):
    assert content(source) == finished[2]


def test_flexlib_of_the_driver_changes_nothing(driver, source, finished):
    command = ("--snakefile", str(source / "workflow/Snakefile"), "--configfile", "my.yaml", "--cores", "2", *IN_CONDA)
    assert "Nothing to be done" in driver.run(finished[0], *command)
    driver.cure()
    try:
        assert "Nothing to be done" in driver.run(finished[0], *command)
        assert re.search(r"^train +2$", driver.run(finished[0], *command, "--dry-run", "--forceall"), re.M)
    finally:
        driver.poison()


def test_without_conda_or_torch_nothing_starts(driver, source, tmp_path):
    write_config(tmp_path)
    command = ["snakemake", "--snakefile", str(source / "Snakefile"), "--configfile", "my.yaml", "--cores", "1"]
    result = subprocess.run(command, cwd=tmp_path, env=driver.environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert re.search(r"^ERROR .*python\S* has no torch, .* add --sdm conda", result.stderr, re.M)
    assert not (tmp_path / "sim").exists()


@pytest.mark.parametrize(("device", "environment"), [("cuda", "cuda"), ("auto", "cpu"), ("cpu", "cpu")])
def test_device_chooses_the_environment(driver, source, tmp_path, device, environment):
    write_config(tmp_path, device=device)
    hidden = {"CUDA_VISIBLE_DEVICES": "", "SNAKEMAKE_CONDA_PREFIX": str(tmp_path / "none")}
    arguments = ("--snakefile", str(source / "Snakefile"), "--configfile", "my.yaml", "--dry-run", *IN_CONDA)
    assert f"envs/{environment}.yaml will be created" in driver.run(tmp_path, *arguments, **hidden)


def test_gpus_of_the_profile_choose_the_environment(driver, source, tmp_path):
    write_config(tmp_path)
    (tmp_path / "slurm").symlink_to(source / "slurm")
    arguments = ("--snakefile", str(source / "Snakefile"), "--configfile", "my.yaml", "--profile", "slurm")
    said = driver.run(tmp_path, *arguments, "--dry-run", *IN_CONDA, SNAKEMAKE_CONDA_PREFIX=str(tmp_path / "none"))
    assert "envs/cuda.yaml will be created" in said


def test_two_commands_from_particles_and_a_map(driver, source, finished, tmp_path):
    """The first of the environment that conda made, the second of Snakemake's."""
    for name in ("particles.star", "particles.mrcs", "consensus.mrc"):
        shutil.copy(finished[0] / "sim" / name, tmp_path)
    command = jobs_environment(finished) / "bin/flex-init"
    with (tmp_path / "my.yaml").open("w") as config:
        subprocess.run([command, "particles.star", "consensus.mrc"], cwd=tmp_path, stdout=config, check=True)
    name = yaml.safe_load((tmp_path / "my.yaml").read_text())["name"]
    arguments = ("--snakefile", str(source / "Snakefile"), "--configfile", "my.yaml", "--cores", "2", *IN_CONDA)
    assert re.search(r"^train +3$", driver.run(tmp_path, *arguments, "--dry-run"), re.M)
    driver.run(tmp_path, *arguments, "--", f"results/{name}/particles/particles.star")
    assert (tmp_path / f"results/{name}/particles/train.mrcs").exists()


# --- from afar: each runs one job, in the environment of the others


def assert_simulated(folder: Path) -> None:
    assert len(starfile.read(folder / "sim/particles.star", always_dict=True)["particles"]) == 160


def test_from_another_working_folder(driver, source, tmp_path):
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "folder"
    elsewhere.mkdir()
    folder.mkdir()
    before = content(source)
    arguments = ("--directory", str(folder), "--configfile", str(write_config(folder)), "--cores", "1", *IN_CONDA)
    driver.run(elsewhere, "--snakefile", str(source / "Snakefile"), *arguments, "--", "sim/particles.star")
    assert_simulated(folder)
    assert content(source) == before
    assert not list(elsewhere.iterdir())


def write_module(folder: Path, snakefile: str) -> None:
    """A workflow in ``folder`` that uses ours as a module."""
    (folder / "Snakefile").write_text(
        f"""
configfile: "my.yaml"

module flex:
    snakefile: {snakefile}
    config: config["flex"]

use rule * from flex as flex_*

rule everything:
    default_target: True
    input: rules.flex_all.input
"""
    )
    (folder / "my.yaml").write_text(yaml.safe_dump({"flex": small_config()}))


@pytest.mark.parametrize("snakefile", ["Snakefile", "workflow/Snakefile"])
def test_as_a_module(driver, source, tmp_path, snakefile):
    before = content(source)
    write_module(tmp_path, repr(str(source / snakefile)))
    assert re.search(r"^flex_train +2$", driver.run(tmp_path, "--dry-run"), re.M)
    driver.run(tmp_path, "--cores", "1", *IN_CONDA, "--", "sim/particles.star")
    assert_simulated(tmp_path)
    assert content(source) == before


@pytest.fixture
def from_github(source, tmp_path):
    """Variables that send git to the clone for what it would fetch from GitHub, and an empty cache for Snakemake."""
    git = {"GIT_CONFIG_COUNT": "2", "GIT_CONFIG_KEY_0": f"url.file://{source}.insteadOf"}
    git |= {"GIT_CONFIG_VALUE_0": "https://github.com/someone/flexlib", "GIT_CONFIG_KEY_1": "safe.directory"}
    return git | {"GIT_CONFIG_VALUE_1": "*", "XDG_CACHE_HOME": str(tmp_path / "cache")}


def test_as_a_module_from_github(driver, source, from_github, tmp_path):
    write_module(tmp_path, 'github("someone/flexlib", path="workflow/Snakefile", tag="v1")')
    record = tmp_path / "record"
    record.mkdir()
    recording = {"PYTHONPATH_IN_CONDA": str(Path(__file__).parent / "conda/record"), "RECORD_IMPORTS": str(record)}
    driver.run(tmp_path, "--cores", "1", *IN_CONDA, "--", "sim/particles.star", **from_github, **recording)
    assert_simulated(tmp_path)
    (imported,) = [json.loads(path.read_text())["files"] for path in record.iterdir()]
    assert Path(imported["flexlib.simulate"]).is_relative_to(tmp_path / "cache")


def test_snakedeploy(driver, source, from_github, tmp_path):
    deployed = tmp_path / "deployed"
    command = ["snakedeploy", "deploy-workflow", "https://github.com/someone/flexlib", str(deployed), "--tag", "v1"]
    subprocess.run(command, env=driver.environment | from_github, check=True, capture_output=True)
    counts = driver.run(deployed, "--dry-run", *IN_CONDA, **from_github)
    assert re.search(r"^train +4$", counts, re.M)  # the demo's
    assert "Using workflow specific profile profiles/default" in counts
    # of a folder it writes the same, but not where the workflow is, which its user has to fill in
    local = tmp_path / "local"
    command = ["snakedeploy", "deploy-workflow", str(source), str(local), "--branch", "main"]
    subprocess.run(command, env=driver.environment, check=True, capture_output=True)
    snakefile = local / "workflow/Snakefile"
    snakefile.write_text(snakefile.read_text().replace('"workflow/Snakefile"', f'"{source}/workflow/Snakefile"'))
    assert re.search(r"^train +4$", driver.run(local, "--dry-run", *IN_CONDA), re.M)
    write_config(local)
    assert re.search(r"^train +2$", driver.run(local, "--dry-run", "--configfile", "my.yaml", *IN_CONDA), re.M)


# --- a driver that is killed


MOMENTS = [
    ("logs/tiny/prepare.log", False),
    ("results/tiny/train/**/checkpoints/*", True),
    ("logs/tiny/reconstruct/**/*.log", False),
]


@pytest.fixture(scope="module")
def killed(driver: Driver, source, tmp_path_factory):
    """Working folder of a run whose driver was killed three times, once with all its jobs; what the last one said."""
    folder = tmp_path_factory.mktemp("killed")
    write_config(folder)
    log = folder / "snakemake.log"
    command = ("--snakefile", str(source / "workflow/Snakefile"), "--configfile", "my.yaml", "--cores", "2", *IN_CONDA)
    for pattern, with_jobs in MOMENTS:
        run = driver.start(folder, log, *command)
        wait_for(pattern, lambda pattern=pattern: list(folder.glob(pattern)), run, log, PATIENCE_S)
        if with_jobs:
            os.killpg(run.pid, signal.SIGKILL)
        else:
            os.kill(run.pid, signal.SIGKILL)
        run.wait()
    return folder, driver.run(folder, *command)


def test_after_kills_the_same_command_goes_on(driver, source, killed):
    folder, said = killed
    assert "LockException" not in said
    assert (folder / RESULTS / "report.html").exists()
    command = ("--snakefile", str(source / "workflow/Snakefile"), "--configfile", "my.yaml", "--cores", "2", *IN_CONDA)
    assert "Nothing to be done" in driver.run(folder, *command)


def test_after_kills_results_are_those_of_an_undisturbed_run(finished, killed):
    tables = []
    for folder in (finished[0], killed[0]):
        with (folder / RESULTS / "sweep.csv").open() as file:
            tables.append(
                [{key: value for key, value in row.items() if key != "wall_s"} for row in csv.DictReader(file)]
            )
    for expected, row in zip(*tables, strict=True):
        for key in expected:
            assert row[key] == expected[key] or float(row[key]) == pytest.approx(float(expected[key]), rel=1e-3), key
    undisturbed, disturbed = (folder / RESULTS for folder in (finished[0], killed[0]))
    trainings = [path.parent.relative_to(undisturbed) for path in undisturbed.glob("train/**/latents.star")]
    halves = [path.relative_to(undisturbed) for path in undisturbed.glob("reconstruct/**/*_half?.mrc")]
    assert (len(trainings), len(halves)) == (2, 4)
    for point in trainings:
        assert_same_training(disturbed / point, undisturbed / point)
    for path in halves:
        assert_same_map(disturbed / path, undisturbed / path)
