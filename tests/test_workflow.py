"""The workflow as a user meets it, by dry runs: how many jobs of which rule, what a mistake in the config says."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from subprocess import DEVNULL, PIPE

import numpy as np
import pytest
import yaml
from json_records import prepared_record
from run_snakemake import ROOT, snakemake, start_snakemake
from snakemake_executor_plugin_slurm.partitions import read_partition_file

from flexlib.imaging.maps import write_map
from flexlib.layout import RunFolder
from flexlib.records import ChoiceRecord
from flexlib.workflow_support.gpus import gpus_of
from flexlib.workflow_support.points import SweepPoint

CONFIG = {"name": "tiny", "particles": "data/p.star", "consensus": "data/c.mrc", "prepare": {"train_box": 32}}
GPU_RULES = ["train", "train_half", "reconstruct", "validate"]
DONE = "{train: {rigidity: 2.0}, reconstruct: {points: all}}"  # of a finished run


class DryRun:
    """Dry runs with ``CONFIG`` and more in a folder, which keeps what runs leave."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "data").mkdir()
        for name in ("p.star", "c.mrc"):
            (folder / "data" / name).touch()

    def output(self, text: str = "{}", *arguments: str) -> str:
        """What Snakemake says to the given YAML."""
        (self.folder / "my.yaml").write_text(yaml.safe_dump({**CONFIG, **yaml.safe_load(text)}))
        result = snakemake(self.folder, "--configfile", "my.yaml", "--dry-run", *arguments)
        assert result.returncode == 0, result.stderr + result.stdout
        return result.stdout + result.stderr

    def __call__(self, text: str = "{}", *arguments: str) -> dict[str, int]:
        """Job counts per rule."""
        return counted(self.output(text, *arguments))


def counted(said: str) -> dict[str, int]:
    """Job counts per rule in what Snakemake says."""
    return {rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", said, re.M)}


@pytest.fixture
def dry_run(tmp_path):
    return DryRun(tmp_path)


def jobs(mesh=1, train=1, generate=1, reconstruct=0, choose=0, validate=0, interpret=None) -> dict[str, int]:
    counts = dict(prepare=1, mesh=mesh, train=train, generate=generate, reconstruct=reconstruct, choose=choose)
    counts |= dict(train_half=2 * validate, validate=validate)
    counts |= dict(interpret=reconstruct if interpret is None else interpret)
    counts = {
        rule: count
        for rule, count in (counts | dict(checksum=1, summarise=1, report=1, provenance=1, all=1)).items()
        if count
    }
    return counts | {"total": sum(counts.values())}


def test_one_point_needs_no_choice(dry_run):
    assert dry_run() == jobs(reconstruct=1, validate=1)


def test_shared_work_is_done_once(dry_run):
    sweep = "{mesh: {cells: [10, 20]}, train: {latent_dims: [2, 3], rigidity: [0.5, 1e-3]}, reconstruct: {points: all}}"
    assert dry_run(sweep) == jobs(mesh=2, train=8, generate=8, reconstruct=8, choose=1)
    more = sweep.replace("1e-3", "1e-3, 4")
    assert dry_run(more) == jobs(mesh=2, train=12, generate=12, reconstruct=12, choose=1)


def test_best_is_chosen_after_all_trainings(dry_run):
    # reconstruct and validate are planned after it
    assert dry_run("train: {rigidity: [0.5, 2.0]}") == jobs(train=2, generate=2, choose=1)


def test_named_points_are_reconstructed(dry_run):
    sweep = "{train: {rigidity: [0.5, 2.0], seed: [0, 1]}, reconstruct: {points: [{rigidity: 2}]}}"
    assert dry_run(sweep) == jobs(train=4, generate=4, reconstruct=2, choose=1)


def test_excluded_and_single_points(dry_run):
    sweep = "mesh: {cells: [10, 20]}, train: {rigidity: [0.5, 2.0]}, reconstruct: {points: all}"
    assert dry_run(f"{{{sweep}, sweep: {{exclude: [{{cells: 20, rigidity: 0.5}}]}}}}") == jobs(2, 3, 3, 3, choose=1)
    assert dry_run(f"{{{sweep}, sweep: {{points: [{{cells: 30}}, {{rigidity: 9}}]}}}}") == jobs(3, 6, 6, 6, choose=1)


SWEEP = "train: {rigidity: [0.5, 2.0]}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{{{SWEEP}, validate: none}}", jobs(train=2, generate=2, choose=1)),
        (f"{{{SWEEP}, validate: {{points: none}}, reconstruct: {{points: all}}}}", jobs(1, 2, 2, 2)),
        (f"{{{SWEEP}, validate: {{points: all}}}}", jobs(train=2, generate=2, choose=1, validate=2)),
        (f"{{{SWEEP}, validate: {{points: [{{rigidity: 2}}]}}}}", jobs(train=2, generate=2, choose=1, validate=1)),
        # best is one of those that are reconstructed: of one there is no choice
        (f"{{{SWEEP}, reconstruct: {{points: [{{rigidity: 2}}]}}}}", jobs(1, 2, 2, 1, validate=1)),
        # the choice waits for all, and for nothing that waits for it
        (f"{{{SWEEP}, sweep: {{choose_by: cross}}}}", jobs(train=2, generate=2, choose=1, validate=2)),
        (f"{{{SWEEP}, sweep: {{choose_by: cross}}, reconstruct: {{points: all}}}}", jobs(1, 2, 2, 2, validate=2)),
        ("{sweep: {choose_by: cross}, train: {seed: 3}}", jobs(reconstruct=1, validate=1)),
        ("train: {freeze_latents: true}", jobs(reconstruct=1)),
    ],
)
def test_points_are_validated_as_the_config_has_it(dry_run, text, expected):
    assert dry_run(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{{{SWEEP}, interpret: {{points: all}}}}", jobs(train=2, generate=2, choose=1, interpret=2)),
        ("interpret: none", jobs(reconstruct=1, validate=1, interpret=0)),
        (
            f"{{{SWEEP}, interpret: {{points: [{{rigidity: 2}}]}}, validate: none}}",
            jobs(train=2, generate=2, choose=1, interpret=1),
        ),
        (
            f"{{{SWEEP}, interpret: {{points: all}}, validate: {{points: all}}}}",
            jobs(train=2, generate=2, choose=1, validate=2, interpret=2),
        ),
    ],
)
def test_points_are_interpreted_as_the_config_has_it(dry_run, text, expected):
    assert dry_run(text) == expected


def test_a_validation_that_is_left_out_is_told_once(dry_run):
    said = dry_run.output("train: {freeze_latents: true}")
    assert said.count("Nothing is validated: train.freeze_latents: true ") == 1
    assert "Nothing is validated" not in dry_run.output("{train: {freeze_latents: true}, validate: none}")


def test_the_chosen_point_is_validated_after_the_choice(dry_run):
    dry_run(SWEEP)
    make_outputs(dry_run.folder)
    write_choice(dry_run.folder, SweepPoint(20, 2, 2.0, 0))
    arguments = ("--configfile", "my.yaml", "--cores", "1", "--touch", "--until", "choose", "generate", "checksum")
    assert snakemake(dry_run.folder, *arguments).returncode == 0
    said = dry_run.output(SWEEP)
    last = dict(summarise=1, report=1, provenance=1, all=1)
    assert counted(said) == dict(train_half=2, validate=1, reconstruct=1, interpret=1, **last, total=9)
    messages = "Train half-set . alone", "Compare the models of the half-sets", "Interpret the motion"
    points = re.findall(rf"(?:{'|'.join(messages)}): (.*)", said)
    assert len(points) == 4 and all("rigidity=2.0" in point for point in points)


def write_choice(folder: Path, point: SweepPoint) -> None:
    """What choose leaves."""
    scores = dict(validation_gain=9.0, validation_gain_se=1.0, highest_validation_gain=9.0)
    differences = dict(difference_to_best=0.0, difference_to_best_se=0.0)
    chosen = dict(**asdict(point), path=point.path, highest_validation_gain_path=point.path)
    ChoiceRecord(**chosen, **scores, **differences).write(RunFolder(folder / "results/tiny").best_point)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Dry runs after a run of ``DONE``."""
    dry_run = DryRun(tmp_path_factory.mktemp("finished"))
    dry_run(DONE)
    make_outputs(dry_run.folder)
    assert snakemake(dry_run.folder, "--configfile", "my.yaml", "--cores", "1", "--touch", "--forceall").returncode == 0
    assert dry_run(DONE) == {}
    return dry_run


@pytest.mark.parametrize(
    ("text", "again"),
    [
        # another point is trained; nothing is prepared or meshed again, and the first point is left alone
        (
            "{train: {rigidity: [2.0, 4.0]}, reconstruct: {points: all}}",
            # (which of the two will be validated, and has corrected errors, is not known yet)
            dict(train=1, generate=1, reconstruct=1, choose=1, interpret=2),
        ),
        (
            "{mesh: {cells: [20, 30]}, reconstruct: {points: all}, validate: none}",
            dict(mesh=1, train=1, generate=1, reconstruct=1, interpret=2),
        ),
        (
            "{train: {epochs: 30}, reconstruct: {points: all}}",
            dict(train=1, generate=1, reconstruct=1, train_half=2, validate=1, interpret=1),
        ),
        ("{generate: {frames: 5}, reconstruct: {points: all}}", dict(generate=1, interpret=1)),
        ("{generate: {series: curve}, reconstruct: {points: all}}", dict(generate=1)),
        ("{interpret: {bodies: 2}, reconstruct: {points: all}}", dict(interpret=1)),
        (
            "{mesh: {min_rigidity_weight: 0.4}, reconstruct: {points: all}}",
            dict(mesh=1, train=1, generate=1, reconstruct=1, train_half=2, validate=1, interpret=1),
        ),
        ("{validate: {points: all}, reconstruct: {points: all}}", {}),  # the same point
        ("{validate: none, reconstruct: {points: all}}", dict(interpret=1)),  # without corrected errors
        ("{device: cpu, reconstruct: {points: all}}", {}),
        ("{train: {rigidity: [2.0]}, sweep: {points: [{rigidity: 8}]}}", dict(train=1, choose=1, generate=1)),
    ],
)
def test_a_change_repeats_only_what_depends_on_it(finished, text, again):
    counts = finished(text)
    for rule in ("all", "summarise", "report", "provenance", "total"):
        counts.pop(rule, None)
    assert counts == again


def test_other_checksums_repeat_only_the_record_of_the_run(finished):
    again = finished("{checksums: tables, train: {rigidity: 2.0}, reconstruct: {points: all}}")
    assert again == dict(checksum=1, provenance=1, all=1, total=3)


def test_another_command_repeats_nothing(finished):
    assert finished(DONE, "--cores", "3", "--keep-going") == {}


def make_outputs(folder: Path) -> None:
    """Every output of the workflow as an empty file, from Snakemake's own list of what it would write."""
    result = snakemake(folder, "--configfile", "my.yaml", "--summary")
    for line in result.stdout.splitlines()[1:]:
        path = folder / line.split("\t")[0]
        if not path.suffix:  # a folder
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    prepared_record(num_rows=100, crop_box=32, train_box=32).write(folder / "results/tiny/particles/prepared.json")


def test_users_config_does_not_inherit_the_demo(dry_run):
    assert "simulate" not in dry_run()
    assert not list(dry_run.folder.glob("resources"))


@pytest.mark.parametrize("snakefile", [None, ROOT / "workflow/Snakefile"])
def test_demo_is_the_default_in_a_clone(snakefile):
    result = snakemake(ROOT, "--dry-run", "--forceall", "--nolock", snakefile=snakefile)
    assert result.returncode == 0, result.stderr
    assert "Using workflow specific profile profiles/default" in result.stderr
    counts = dict(re.findall(r"^(\w+) +(\d+)$", result.stdout, re.M))
    assert (counts["simulate"], counts["mesh"], counts["train"]) == ("1", "2", "4")


@pytest.mark.parametrize("snakefile", ["Snakefile", "workflow/Snakefile"])
def test_another_working_folder(dry_run, tmp_path_factory, snakefile):
    dry_run()
    arguments = ("--directory", str(dry_run.folder), "--configfile", str(dry_run.folder / "my.yaml"), "--dry-run")
    result = snakemake(tmp_path_factory.mktemp("elsewhere"), *arguments, snakefile=ROOT / snakefile)
    assert result.returncode == 0, result.stderr
    assert f"Using workflow specific profile {(ROOT / snakefile).parent}/profiles/default" in result.stderr
    assert dict(re.findall(r"^(\w+) +(\d+)$", result.stdout, re.M))["total"] == str(
        jobs(reconstruct=1, validate=1)["total"]
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("particles: nowhere.star", "config: particles: nowhere.star does not exist"),
        ("train: {rigidty: 2}", "config: unknown key 'rigidty' in train; did you mean 'rigidity'?"),
        ("train: {rigidity: []}", "config: train.rigidity: [] should be non-empty"),
        (
            "mask: other_box.mrc",
            "config: mask: other_box.mrc is 100 A wide (20 voxels of 5 A), but the consensus map.mrc is",
        ),
        ("device: cuda", "config: device: cuda, but this machine shows no GPU: set device: auto, or run on a cluster"),
        ("generate: {frames: 1000000000}", "results/tiny: no room for the results of 1 points, about "),
        (
            "mesh: {segmentation: c.mrc, connections: '0>1, 1>0'}",
            "mesh.connections: 1>0: segment 0 is joined already, this closes a cycle",
        ),
        ("generate: {series: axis}", "generate.series: 'axis' is not understood; known are axes, curve, "),
        ("reconstruct: {points: [{cells: 5}]}", "config: reconstruct.points: {'cells': 5} is no point of the sweep"),
        (
            "train: {validation_fraction: 0, rigidity: [1, 2]}",
            "config: train.validation_fraction: 0 holds no particle out, so that none of 2 points is best",
        ),
        ("validate: {points: [{cells: 5}]}", "config: validate.points: {'cells': 5} is no point of the sweep"),
        (
            "{sweep: {choose_by: cross}, validate: none}",
            "config: sweep.choose_by: cross chooses by the scores of a validation, which validate.points: none leaves",
        ),
        ("sweep: {exclude: [{cells: 5}]}", "config: sweep.exclude: {'cells': 5} is no point of the sweep"),
    ],
)
def test_mistakes_end_the_run_in_one_line(tmp_path, monkeypatch, text, message):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in ("p.star", "c.mrc"):
        (tmp_path / name).touch()
    write_map(tmp_path / "map.mrc", np.zeros((40,) * 3, np.float32), 5.0)
    write_map(tmp_path / "other_box.mrc", np.zeros((20,) * 3, np.float32), 5.0)
    config = {"name": "tiny", "particles": "p.star", "consensus": "map.mrc", **yaml.safe_load(text)}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(config))
    result = snakemake(tmp_path, "--configfile", "my.yaml", "--cores", "1")
    assert result.returncode != 0
    assert [line for line in result.stderr.splitlines() if "ERROR" in line] == [
        line for line in result.stderr.splitlines() if line.startswith(f"ERROR {message}")
    ]
    assert f"ERROR {message}" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "results").exists()


def test_a_mask_of_another_box_but_the_same_extent_is_taken(dry_run):
    write_map(dry_run.folder / "data/c.mrc", np.zeros((40,) * 3, np.float32), 5.0)
    write_map(dry_run.folder / "mask.mrc", np.zeros((80,) * 3, np.float32), 2.5)
    assert dry_run("mask: mask.mrc") == jobs(reconstruct=1, validate=1)


def test_a_job_whose_output_has_no_room_ends_in_one_line(tmp_path):
    for name in ("p.star", "c.mrc"):
        (tmp_path / name).touch()
    (tmp_path / "my.yaml").write_text(yaml.safe_dump({**CONFIG, "particles": "p.star", "consensus": "c.mrc"}))
    result = snakemake(
        tmp_path, "--configfile", "my.yaml", "--cores", "1", "--set-resources", "prepare:disk_mb=1000000000"
    )
    assert result.returncode != 0
    log = (tmp_path / "logs/tiny/prepare.log").read_text().splitlines()
    assert len(log) == 1
    assert "ERROR prepare: results/tiny/particles: no room for what prepare writes, about 976562.5 GB" in log[0]


def test_bad_particles_end_the_job_in_one_line(tmp_path):
    (tmp_path / "p.star").write_text("data_\n\nloop_\n_rlnAngleRot #1\n1.0\n")
    (tmp_path / "c.mrc").touch()
    (tmp_path / "my.yaml").write_text(yaml.safe_dump({"name": "tiny", "particles": "p.star", "consensus": "c.mrc"}))
    result = snakemake(tmp_path, "--configfile", "my.yaml", "--cores", "1")
    assert result.returncode != 0
    log = (tmp_path / "logs/tiny/prepare.log").read_text().splitlines()
    assert len(log) == 1
    assert "ERROR prepare: p.star: " in log[0]
    assert "rlnImageName" in log[0]
    assert log[0] in result.stderr
    assert "Traceback" not in result.stderr


def test_slurm_profile_is_found_and_understood(dry_run):
    (dry_run.folder / "slurm").symlink_to(ROOT / "slurm")
    assert dry_run("{}", "--profile", "slurm") == jobs(reconstruct=1, validate=1)
    profile = yaml.safe_load((ROOT / "slurm/profile.yaml").read_text())
    default = yaml.safe_load((ROOT / "profiles/default/profile.yaml").read_text())
    assert profile["executor"] == "slurm"
    assert profile["retries"] >= 1
    assert {rule: given["gpu"] for rule, given in profile["set-resources"].items()} == dict.fromkeys(GPU_RULES, 1)
    assert set(GPU_RULES) < set(profile["set-threads"])
    for rule in ("train", "train_half"):
        assert "--signal=TERM@120" in profile["set-resources"][rule]["slurm_extra"]
    assert not [key for key in set(profile) & set(default) if profile[key] != default[key]]  # the default would win
    assert profile["rerun-incomplete"] is default["rerun-incomplete"] is True
    names = {path.name for path in (ROOT / "slurm").iterdir()}
    assert names == {"profile.yaml", "config.yaml"}  # of any other beside them, a value of that name becomes its path
    for folder in ("slurm", "profiles/default"):
        assert (ROOT / folder / "config.yaml").readlink() == Path("profile.yaml")  # its name before Snakemake 9.19


def test_the_profile_spreads_processes_over_nodes(dry_run):
    """Its commented lines, with the comment taken off."""
    text = (ROOT / "slurm/profile.yaml").read_text()
    commented = re.findall(r"^#  (\w+): (\{mpi.*\})$", text, re.M)
    resources = {rule: yaml.safe_load(given) for rule, given in commented}
    assert set(resources) == set(GPU_RULES)
    for rule, given in yaml.safe_load(text)["set-resources"].items():
        assert resources[rule].get("slurm_extra") == given.get("slurm_extra")
    (dry_run.folder / "slurm").symlink_to(ROOT / "slurm")
    (dry_run.folder / "Snakefile").write_text(
        f'include: "{ROOT}/Snakefile"\nfor name in {GPU_RULES}:\n'
        "    print(name, TASKS[name], A_NODE[name], GPUS[name], file=sys.stderr)\n"
    )
    (dry_run.folder / "my.yaml").write_text(yaml.safe_dump({**CONFIG, "train": {"processes": 4}}))
    given = [f"{rule}:{key}={value}" for rule, each in resources.items() for key, value in each.items()]
    arguments = ("--configfile", "my.yaml", "--dry-run", "--profile", "slurm", "--set-resources", *given)
    result = snakemake(dry_run.folder, *arguments, snakefile=dry_run.folder / "Snakefile")
    assert result.returncode == 0, result.stderr
    assert "".join(f"{rule} 4 2 4\n" for rule in GPU_RULES) in result.stderr


HEAVY = ("numpy", "scipy", "pandas", "torch", "numba", "mrcfile", "h5py", "matplotlib", "skimage", "plotly", "PIL")

# Imports what is named, where HEAVY packages are not installed
LIGHT = """
import importlib, sys
heavy, *modules = sys.argv[1:]
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in heavy.split(","):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
for name in modules:
    importlib.import_module(name)
"""


def test_parsing_needs_nothing_that_snakemake_does_not_bring():
    text = "".join(path.read_text() for path in [*(ROOT / "workflow").rglob("*.smk"), ROOT / "workflow/Snakefile"])
    asked_for = re.findall(r"^from (flexlib\S*) import", text, re.M)
    support = [
        f"flexlib.workflow_support.{path.stem}" for path in (ROOT / "flexlib/workflow_support").glob("[a-z]*.py")
    ]
    assert "flexlib.workflow_support.checks" in asked_for
    command = [sys.executable, "-c", LIGHT, ",".join(HEAVY), *asked_for, *support]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_after_a_kill_the_same_command_goes_on(tmp_path):
    """A driver and its jobs are killed in the middle of a job: neither a lock nor half-made files ask for a flag."""
    simulate = {"num_particles": 60, "box": 32, "pixel_size_A": 8.0, "snr": 1.0}
    config = {**CONFIG, "particles": "sim/particles.star", "consensus": "sim/consensus.mrc", "simulate": simulate}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(config))
    arguments = ("--configfile", "my.yaml", "--cores", "1", "--", "sim/particles.star")
    first = start_snakemake(tmp_path, tmp_path / "first.log", *arguments)
    job_log = tmp_path / "logs/tiny/simulate.log"  # opened by the job as it starts; its imports alone last a second
    while not job_log.exists():
        assert first.poll() is None, (tmp_path / "first.log").read_text()
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGSTOP)  # so that it cannot end before it is killed
    half_made = tmp_path / "sim/consensus.mrc"
    half_made.parent.mkdir(exist_ok=True)
    half_made.write_bytes(b"half")
    second = snakemake(tmp_path, *arguments)
    assert "ERROR results/tiny: another Snakemake is at work on this run" in second.stderr  # the first lives
    assert first.poll() is None, "the job was too short to be killed"
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert list((tmp_path / ".snakemake/locks").iterdir())
    assert list((tmp_path / ".snakemake/incomplete").iterdir())
    again = snakemake(tmp_path, *arguments)
    assert again.returncode == 0, again.stderr
    assert half_made.stat().st_size > 4
    assert "Nothing to be done" in snakemake(tmp_path, *arguments).stderr


def test_only_dead_locks_of_the_run_are_removed(tmp_path):
    locks = tmp_path / "locks"
    locks.mkdir()
    (locks / "0.output.lock").write_text("results/tiny/report.html\n")
    (locks / "1.output.lock").write_text("results/tiny2/report.html\nother.txt\n")
    code = (
        "import sys; from flexlib.workflow_support.locks import remove_dead_locks;"
        f"remove_dead_locks('tiny', ['results/tiny/'], {str(tmp_path)!r}); print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=PIPE, stdout=PIPE) as living:
        living.stdout.readline()
        assert [path.name for path in locks.iterdir()] == ["1.output.lock"]
        (locks / "0.output.lock").write_text("results/tiny/report.html\n")
        subprocess.run([sys.executable, "-c", code], stdin=DEVNULL, check=True)
        assert len(list(locks.iterdir())) == 2
    subprocess.run([sys.executable, "-c", code], stdin=DEVNULL, check=True)
    assert [path.name for path in locks.iterdir()] == ["1.output.lock"]


def test_a_job_waits_for_its_orphan(tmp_path):
    code = (
        "import sys; from flexlib.workflow_support.locks import wait_for_orphan;"
        f"wait_for_orphan('logs/train.log', {str(tmp_path)!r}); print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE) as orphan:
        orphan.stdout.readline()
        with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True) as again:
            assert "this job still runs" in again.stderr.readline()
            assert again.poll() is None
            orphan.kill()
            orphan.wait()
            again.communicate(timeout=60)
            assert again.returncode == 0


def test_rules_leave_retries_to_profiles_and_have_their_script():
    for path in (ROOT / "workflow/rules").glob("*.smk"):
        text = path.read_text()
        assert "retries:" not in text, path
        for name in re.findall(r"^ *(?:rule|checkpoint) (\w+):", text, re.M):
            body = re.split(rf"(?:rule|checkpoint) {name}:", text)[1].split("\nrule ")[0]
            assert f"../scripts/{name}.py" in body
            for directive in (
                "log:",
                "benchmark:",
                "conda:",
                "threads:",
                "resources:",
                "mem_mb=",
                "runtime=",
                "disk_mb=",
                "message:",
            ):
                assert directive in body, f"rule {name} has no {directive}"
            assert (ROOT / f"workflow/scripts/{name}.py").exists()


@pytest.mark.parametrize(
    ("rigidity", "expected"),
    [([1, 2], jobs(train=2, generate=2, choose=1)), (1, jobs(reconstruct=1, validate=1))],
)
def test_another_workflow_uses_this_one_as_a_module(dry_run, rigidity, expected):
    (dry_run.folder / "Snakefile").write_text(
        f"""
configfile: "my.yaml"

module flex:
    snakefile: "{ROOT / "Snakefile"}"
    config: config["flex"]

use rule * from flex as flex_*

rule everything:
    default_target: True
    input: rules.flex_all.input
"""
    )
    (dry_run.folder / "my.yaml").write_text(yaml.safe_dump({"flex": {**CONFIG, "train": {"rigidity": rigidity}}}))
    result = snakemake(dry_run.folder, "--dry-run", snakefile=dry_run.folder / "Snakefile")
    assert result.returncode == 0, result.stderr
    counts = dict(re.findall(r"^flex_(\w+) +(\d+)$", result.stdout, re.M))
    assert counts == {rule: str(count) for rule, count in expected.items() if rule not in ("all", "total")}


def test_500_points_are_planned_and_submitted_in_groups(dry_run):
    (dry_run.folder / "slurm").symlink_to(ROOT / "slurm")
    sweep = {
        "mesh": {"cells": [6, 7, 8, 9, 10]},  # small ones: room for 500 finer points is not everywhere
        "train": {"latent_dims": [1, 2, 3, 4, 5], "rigidity": [2.0**k for k in range(-2, 8)], "seed": [0, 1]},
        "generate": {"frames": 2},
    }
    assert dry_run(yaml.safe_dump(sweep), "--profile", "slurm") == jobs(mesh=5, train=500, generate=500, choose=1)


def test_slurm_plugin_understands_the_example_of_partitions():
    partitions = {item.name: item.limits for item in read_partition_file(ROOT / "config/slurm-partitions.yaml")}
    assert partitions["gpu"].max_gpu == 4
    assert partitions["short"].max_runtime == 240  # minutes
    assert partitions["long"].max_gpu == 0
    profile = yaml.safe_load((ROOT / "slurm/profile.yaml").read_text())
    assert all(partitions["gpu"].max_cpus_per_task >= threads for threads in profile["set-threads"].values())


@pytest.mark.parametrize(
    ("resources", "gpus"),
    [
        ({}, None),
        ({"gpu": "2"}, 2),
        ({"gpu": 0}, 0),
        ({"gpu": 1, "gpu_model": "a100"}, 1),
        ({"gres": "gpu"}, 1),
        ({"gres": "gpu:v100"}, 1),
        ({"gres": "lscratch:10,gpu:h100:4"}, 4),
        ({"gres": "gpu:2", "nodes": "3"}, 6),
        ({"gres": "lscratch:5"}, None),
    ],
)
def test_gpus_are_asked_for_as_the_plugin_has_it(resources, gpus):
    assert gpus_of(resources) == gpus


@pytest.mark.parametrize(
    ("given", "gpu"), [([], "1"), (["train:gpu=3"], "3"), (["train:gres='gpu:a100:2'"], "0"), (["train:gpu=0"], "0")]
)
def test_device_cuda_asks_for_gpus_where_the_profile_does_not(dry_run, given, gpu):
    (dry_run.folder / "slurm").symlink_to(ROOT / "slurm")
    (dry_run.folder / "Snakefile").write_text(
        f'include: "{ROOT}/Snakefile"\nprint("asked for:", rules.train.rule.resources["gpu"].raw, file=sys.stderr)\n'
    )
    (dry_run.folder / "my.yaml").write_text(yaml.safe_dump({**CONFIG, "device": "cuda"}))
    arguments = ("--configfile", "my.yaml", "--dry-run", "--profile", "slurm", "--set-resources", "mesh:runtime=9")
    result = snakemake(dry_run.folder, *arguments, *given, snakefile=dry_run.folder / "Snakefile")
    assert f"asked for: {gpu}" in result.stderr, result.stderr
