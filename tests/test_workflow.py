"""The workflow as a user meets it, by dry runs: how many jobs of which rule, what a mistake in the config says."""

import re
from pathlib import Path

import pytest
import yaml
from run_snakemake import ROOT, snakemake

CONFIG = {"name": "tiny", "particles": "data/p.star", "consensus": "data/c.mrc"}


@pytest.fixture
def dry_run(tmp_path):
    """Job counts per rule of a dry run with ``CONFIG`` and the given YAML; the folder keeps what runs leave."""
    (tmp_path / "data").mkdir()
    for name in ("p.star", "c.mrc"):
        (tmp_path / "data" / name).touch()

    def run(text: str = "{}", *arguments: str) -> dict[str, int]:
        (tmp_path / "my.yaml").write_text(yaml.safe_dump({**CONFIG, **yaml.safe_load(text)}))
        result = snakemake(tmp_path, "--configfile", "my.yaml", "--dry-run", *arguments)
        assert result.returncode == 0, result.stderr + result.stdout
        return {rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", result.stdout + result.stderr, re.M)}

    run.folder = tmp_path
    return run


def jobs(mesh=1, train=1, generate=1, reconstruct=0, choose=0) -> dict[str, int]:
    counts = dict(prepare=1, mesh=mesh, train=train, generate=generate, reconstruct=reconstruct, choose=choose)
    counts = {rule: count for rule, count in (counts | dict(summarise=1, report=1, all=1)).items() if count}
    return counts | {"total": sum(counts.values())}


def test_one_point_needs_no_choice(dry_run):
    assert dry_run() == jobs(reconstruct=1)


def test_shared_work_is_done_once(dry_run):
    sweep = "{mesh: {cells: [10, 20]}, train: {latent_dims: [2, 3], rigidity: [0.5, 1e-3]}, reconstruct: {points: all}}"
    assert dry_run(sweep) == jobs(mesh=2, train=8, generate=8, reconstruct=8)
    more = sweep.replace("1e-3", "1e-3, 4")
    assert dry_run(more) == jobs(mesh=2, train=12, generate=12, reconstruct=12)


def test_best_is_chosen_after_all_trainings(dry_run):
    assert dry_run("train: {rigidity: [0.5, 2.0]}") == jobs(train=2, generate=2, choose=1)  # then one reconstruct


def test_named_points_are_reconstructed(dry_run):
    sweep = "{train: {rigidity: [0.5, 2.0], seed: [0, 1]}, reconstruct: {points: [{rigidity: 2}]}}"
    assert dry_run(sweep) == jobs(train=4, generate=4, reconstruct=2)


def test_adding_a_rigidity_repeats_nothing_that_is_done(dry_run):
    first = "{train: {rigidity: 2.0}, reconstruct: {points: all}}"
    dry_run(first)
    make_outputs(dry_run.folder)
    assert snakemake(dry_run.folder, "--configfile", "my.yaml", "--cores", "1", "--touch").returncode == 0
    assert dry_run(first) == {}
    counts = dry_run("{train: {rigidity: [2.0, 4.0]}, reconstruct: {points: all}}")
    assert counts == dict(train=1, generate=1, reconstruct=1, summarise=1, report=1, all=1, total=6)


def make_outputs(folder: Path) -> None:
    """Every output of the workflow as an empty file, from Snakemake's own list of what it would write."""
    result = snakemake(folder, "--configfile", "my.yaml", "--summary")
    for line in result.stdout.splitlines()[1:]:
        path = folder / line.split("\t")[0]
        if "/generate/" in str(path):
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()


def test_users_config_does_not_inherit_the_demo(dry_run):
    assert "simulate" not in dry_run()
    assert not list(dry_run.folder.glob("resources"))


def test_demo_is_the_default():
    result = snakemake(ROOT, "--dry-run", "--forceall", "--nolock")
    assert result.returncode == 0, result.stderr
    counts = dict(re.findall(r"^(\w+) +(\d+)$", result.stdout, re.M))
    assert (counts["simulate"], counts["mesh"], counts["train"]) == ("1", "2", "4")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("particles: nowhere.star", "ERROR config: particles: nowhere.star does not exist"),
        ("train: {rigidty: 2}", "ERROR config: unknown key 'rigidty' in train; did you mean 'rigidity'?"),
        ("mesh: {connections: 0>1}", "ERROR mesh.connections: there is nothing to connect"),
        (
            "mesh: {segmentation: c.mrc, connections: '0>1, 1>0'}",
            "ERROR mesh.connections: 1>0: segment 0 is joined already, this closes a cycle",
        ),
        ("generate: {series: axis}", "ERROR generate.series: 'axis' is not understood; known are axes, curve, "),
        ("generate: {series: 'between 1,2,3 4'}", "ERROR generate.series: between: the point 1,2,3 has 3 of 2"),
        (
            "reconstruct: {points: [{cells: 5}]}",
            "ERROR config: reconstruct.points: {'cells': 5} is no point of the sweep",
        ),
    ],
)
def test_mistakes_end_the_run_in_one_line(tmp_path, text, message):
    for name in ("p.star", "c.mrc"):
        (tmp_path / name).touch()
    config = {"name": "tiny", "particles": "p.star", "consensus": "c.mrc", **yaml.safe_load(text)}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(config))
    result = snakemake(tmp_path, "--configfile", "my.yaml", "--cores", "1")
    assert result.returncode != 0
    assert [line for line in result.stderr.splitlines() if "ERROR" in line] == [
        line for line in result.stderr.splitlines() if line.startswith(message)
    ]
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "results").exists()


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
    assert dry_run("{}", "--profile", "slurm") == jobs(reconstruct=1)
    profile = yaml.safe_load((ROOT / "slurm/config.yaml").read_text())
    default = yaml.safe_load((ROOT / "workflow/profiles/default/config.yaml").read_text())
    assert profile["executor"] == "slurm"
    assert profile["retries"] >= 1
    assert profile["set-resources"]["train"]["gpu"] == 1
    assert "--signal=TERM@120" in profile["set-resources"]["train"]["slurm_extra"]
    assert not set(profile) & set(default)  # the default profile would win
    assert [path.name for path in (ROOT / "slurm").iterdir()] == ["config.yaml"]  # names beside it would be paths


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
                "message:",
            ):
                assert directive in body, f"rule {name} has no {directive}"
            assert (ROOT / f"workflow/scripts/{name}.py").exists()
