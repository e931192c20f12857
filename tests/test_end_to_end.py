"""One real run of the whole workflow, on a few small simulated particles: every promised output is there and sound."""

import csv
import hashlib
import json
import shutil
from pathlib import Path

import meshio
import mrcfile
import numpy as np
import pytest
import starfile
import yaml
from crate_rules import read_crate
from run_snakemake import small_config, snakemake

CONFIG = small_config(
    simulate={"num_particles": 300, "box": 32, "pixel_size_A": 8.0, "snr": 1.0},
    train={"latent_dims": 2, "rigidity": [0.5, 2.0], "epochs": 5, "validation_fraction": 0.25},
)
POINTS = [f"cells~6/dims~2/rigidity~{rigidity}/seed~0" for rigidity in ("0.5", "2.0")]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "my.yaml").write_text(yaml.safe_dump(CONFIG))
    result = snakemake(folder, "--configfile", "my.yaml", "--cores", "2")
    assert result.returncode == 0, result.stderr[-5000:]
    return folder


@pytest.fixture(scope="module")
def results(run) -> Path:
    return run / "results/tiny"


def read_map(path: Path) -> tuple[np.ndarray, float]:
    """(data, pixel size in Angstrom)."""
    with mrcfile.open(path) as file:
        assert file.voxel_size.x == file.voxel_size.y == file.voxel_size.z
        return np.array(file.data), float(file.voxel_size.x)


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_prepared_particles(results, run):
    particles = starfile.read(results / "particles/particles.star", always_dict=True)["particles"]
    assert len(particles) == 300
    with mrcfile.mmap(results / "particles/train.mrcs") as stack:
        assert stack.data.shape == (300, 32, 32)
        assert np.isfinite(stack.data).all()
        assert 0.5 < float(np.std(stack.data)) < 2.0  # whitened
    for name in ("consensus", "mask"):
        data, pixel_size_A = read_map(results / f"particles/{name}.mrc")
        assert data.shape == (32, 32, 32)
        assert pixel_size_A == 8.0
    mask, _ = read_map(results / "particles/mask.mrc")
    assert 0 <= mask.min() < mask.max() <= 1
    assert 0.005 < mask.mean() < 0.5


def test_record_of_the_run(results, run):
    entities = read_crate(results)
    inputs = {one["name"]: one["sha256"] for name, one in entities.items() if name.startswith("#input-")}
    files = [f"sim/{name}" for name in ("particles.star", "consensus.mrc", "particles.mrcs")]
    assert inputs == {name: hashlib.sha256((run / name).read_bytes()).hexdigest() for name in files}
    assert entities["#run"]["description"].endswith("--configfile my.yaml --cores 2")
    assert entities["#device-training"]["value"].startswith(("cpu (", "cuda ("))
    report = (results / "report.html").read_text()
    assert all(sha256 in report for sha256 in inputs.values())


def test_mesh(results):
    mesh = meshio.read(results / "mesh/cells~6/mesh.vtu")
    assert list(mesh.cells_dict) == ["tetra"]
    assert {"rigidity", "segment"} <= set(mesh.cell_data)
    index, _ = read_map(results / "mesh/cells~6/tetra_index.mrc")
    assert index.shape == (32, 32, 32)
    assert index.min() == -1
    assert 0 < index.max() < len(mesh.cells_dict["tetra"])


@pytest.mark.parametrize("point", POINTS)
def test_trained_points(results, run, point):
    folder = results / "train" / point
    assert (folder / "model.pt").stat().st_size > 1000
    canonical, pixel_size_A = read_map(folder / "canonical.mrc")
    assert pixel_size_A == 8.0
    consensus, _ = read_map(results / "particles/consensus.mrc")
    assert np.corrcoef(canonical.ravel(), consensus.ravel())[0, 1] > 0.7
    given = starfile.read(run / "sim/particles.star", always_dict=True)["particles"]
    latents = starfile.read(folder / "latents.star", always_dict=True)["particles"]
    assert list(latents["rlnImageName"]) == list(given["rlnImageName"])
    assert set(given) <= set(latents)
    z = latents[["flexLatent1", "flexLatent2"]].to_numpy(float)
    assert np.isfinite(z).all()
    assert (z.std(axis=0) > 0).all()
    assert len(read_table(folder / "log.csv")) >= 1
    validation = json.loads((folder / "validation.json").read_text())
    assert np.isfinite(validation["validation_gain"])
    assert validation["validation_gain_se"] > 0
    assert 0 < validation["rms_displacement_A"] < 50


@pytest.mark.parametrize("point", POINTS)
def test_series(results, point):
    for axis in (1, 2):
        frames = [read_map(results / f"generate/{point}/axis_{axis}/frame_{frame:03d}.mrc")[0] for frame in range(3)]
        assert all(np.isfinite(frame).all() for frame in frames)
        assert np.abs(frames[0] - frames[2]).max() > 0
        assert np.allclose([frame.sum() for frame in frames], frames[0].sum(), rtol=1e-2)  # density is kept
        assert f"axis_{axis}" in (results / f"generate/{point}/axis_{axis}.cxc").read_text()
        assert (results / f"generate/{point}/axis_{axis}.webp").read_bytes()[8:12] == b"WEBP"
        assert "displacement_A" in meshio.read(results / f"generate/{point}/axis_{axis}/frame_002.vtu").point_data


def test_one_point_is_chosen_and_reconstructed(results):
    best = json.loads((results / "best_point.json").read_text())
    assert best["path"] in POINTS
    assert [path.parent.relative_to(results / "reconstruct") for path in results.glob("reconstruct/**/fsc.csv")] == [
        Path(best["path"])
    ]
    folder = results / "reconstruct" / best["path"]
    for kind in ("flex", "rigid"):
        half1, half2, mean = (read_map(folder / f"{kind}_{name}.mrc")[0] for name in ("half1", "half2", "map"))
        assert mean.shape == (32, 32, 32)
        assert np.allclose(mean, 0.5 * (half1 + half2), atol=1e-5 * np.abs(mean).max())
        assert np.abs(half1 - half2).max() > 0
    curve = read_table(folder / "fsc.csv")
    assert float(curve[1]["fsc_flex"]) > 0.9
    assert float(curve[1]["fsc_rigid"]) > 0.9


def test_sweep_table(results):
    rows = read_table(results / "sweep.csv")
    assert [(row["cells"], row["latent_dims"], row["rigidity"], row["seed"]) for row in rows] == [
        ("6", "2", "0.5", "0"),
        ("6", "2", "2", "0"),
    ]
    assert all(float(row["wall_s"]) > 0 for row in rows)
    chosen = [row for row in rows if row["chosen"] == "true"]
    assert len(chosen) == 1
    assert 16 <= float(chosen[0]["resolution_flex_A"]) < 100
    assert 16 <= float(chosen[0]["resolution_rigid_A"]) < 100
    assert [row["resolution_flex_A"] for row in rows if row["chosen"] == "false"] == [""]


def test_report_is_self_contained(results):
    page = (results / "report.html").read_text()
    assert len(page) > 10_000
    assert 'src="http' not in page
    assert '<link rel="stylesheet" href="http' not in page


def test_snakemakes_own_report(run):
    result = snakemake(run, "--configfile", "my.yaml", "--report", "all.html")
    assert result.returncode == 0, result.stderr[-3000:]
    page = (run / "all.html").read_text()
    assert all(f'"{category}"' in page for category in ("Report", "Sweep", "Training", "Motion", "Resolution"))
    assert page.count("image/webp") >= 4  # a film for each series of both points
    assert "the simplest point within one standard error of the best" in page.replace("\\n", " ")


def test_finished_run_has_nothing_left_to_do(run):
    again = snakemake(run, "--configfile", "my.yaml", "--cores", "2", "--dry-run")
    assert "Nothing to be done" in again.stdout + again.stderr
    assert not list(run.glob("results/**/.*.part*"))  # no half-written file is left


def test_another_rigidity_trains_one_point_more(run, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(run, folder, copy_function=shutil.copy2)
    config = CONFIG | {"train": CONFIG["train"] | {"rigidity": [0.5, 2.0, 8.0]}}
    (folder / "my.yaml").write_text(yaml.safe_dump(config))
    result = snakemake(folder, "--configfile", "my.yaml", "--dry-run")
    assert "rigidity~8.0" in result.stdout
    counts = {line.split()[0]: line.split()[1] for line in result.stdout.splitlines() if len(line.split()) == 2}
    assert counts["train"] == counts["generate"] == "1"
    assert not {"simulate", "prepare", "mesh"} & set(counts)
