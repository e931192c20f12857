"""The benchmarks run and report what they should, and the page is what they say. No time is ever asserted."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import starfile

from flexlib.imaging.maps import write_map
from flexlib.layout import RunFolder

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"


def run(script: str, *options: object) -> None:
    command = [sys.executable, BENCHMARKS / script, *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_driver_measures_every_part_and_its_page_is_made(tmp_path):
    out = tmp_path / "results" / "machine.json"
    run("bench.py", "--quick", "--out", out, "--parts", "operator", "training")
    run("bench.py", "--quick", "--out", out, "--parts", "reconstruction")
    result = json.loads(out.read_text())
    assert {"cpu", "cores", "memory_GB", "gpu", "python", "torch", "numba", "date"} == set(result["machine"])
    assert {"operator", "training", "reconstruction"} < set(result)  # the second run keeps what the first measured
    rows = result["operator"]["rows"]
    assert {row["kernel"] for row in rows} == {"linear", "cubic"} and {row["threads"] for row in rows} >= {1}
    for row in rows:
        assert row["voxels"] == pytest.approx(0.2 * 32**3, rel=0.02)
        assert row["forward_and_adjoint_ns"] > row["forward_ns"] > 0
        assert row["forward_share_of_adds"] > 0 and row["forward_share_of_copy"] > 0
    assert [row["latent_dims"] for row in result["training"]["latent_dims"]] == [2]
    for row in result["training"]["latent_dims"]:
        assert row["epoch_s"] > 0 and row["epoch_s"] + row["start_s"] < row["wall_s"]
        assert row["peak_GB"] > 0.1 and row["voxels"] == pytest.approx(0.143 * 32**3, rel=0.02)
    assert result["reconstruction"]["rows"][0]["both_halves_20_iterations_s_scaled"] > 0
    run("make_page.py", "--results", out.parent, "--out", tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert result["machine"]["cpu"] in page and "Provisional" in page and "Against latent dims" in page


@pytest.mark.slow
def test_check_of_a_gpu_is_rehearsed_without_one(tmp_path):
    steps = ("data", "operator", "training_20", "reconstruction_32")
    command = [BENCHMARKS / "gpu_check.sh", "--quick", "--device", "cpu", "--steps", *steps]
    environment = os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert all(found[step]["status"] == 0 for step in steps)
    trained = found["training_20"]
    laps = sum(trained[f"{lap}_s"] for lap in ("set_up", "start", "first_epoch", "second_epoch", "third_epoch"))
    assert 0 < laps < trained["seconds"] and len(trained["log"]) == 3
    assert 0 < trained["profile"]["operator_ms"] < trained["profile"]["wall_ms"]
    assert found["reconstruction_32"]["ms_per_image_and_iteration"] > 0


def fake_run(folder: Path, shift: float) -> RunFolder:
    """One sweep point with latents, a canonical map and a row of the table."""
    run = RunFolder(folder)
    trained = run.train("cells~1/dims~1/rigidity~1.0/seed~0")
    trained.path.mkdir(parents=True)
    latents = pd.DataFrame({"rlnImageName": [f"{k}@a.mrcs" for k in range(5)], "flexLatent1": np.arange(5.0) + shift})
    starfile.write({"particles": latents}, trained.latents)
    write_map(trained.canonical, np.ones((8, 8, 8), np.float32), 1.0)
    run.table.write_text(f"cells,validation_gain,wall_s\n1,{2 + shift},{np.random.default_rng().random()}\n")
    return run


@pytest.mark.parametrize(("shift", "status"), [(0.0, 0), (1e-5, 0), (0.1, 1)])
def test_results_of_two_checkouts_are_compared(tmp_path, shift, status):
    folders = [fake_run(tmp_path / name, size).path for name, size in (("before", 0.0), ("after", shift))]
    command = [sys.executable, BENCHMARKS / "compare_checkouts.py", *folders]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert ("DIFFERS" in done.stdout) == bool(status) and "latents 1 - R^2" in done.stdout


def test_performance_page_is_made_of_the_committed_results(tmp_path):
    run("make_page.py", "--out", tmp_path / "performance.md")
    assert (tmp_path / "performance.md").read_text() == (ROOT / "docs" / "performance.md").read_text()


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("bench_peers")


def test_quality_of_latents_is_that_of_angles_not_seen(peers):
    """A straight and a bent copy of an angle, noise that says nothing of it, and a fit that cannot learn by heart."""
    random = np.random.default_rng(0)
    angle = random.uniform(-1, 1, (400, 1))
    noise = random.standard_normal((400, 4))
    bent = np.column_stack([np.cos(3 * angle), np.sin(3 * angle)])
    by_sine = (np.sin(3) / 9 - np.cos(3) / 3) ** 2 / ((0.5 - np.sin(6) / 12) / 3)  # the exact integrals
    for latents, linear, kernel in ((2 * angle + 1, 1.0, 1.0), (bent, by_sine, 1.0), (noise, 0.0, 0.0)):
        assert peers.linear_r2(latents, angle) == pytest.approx(linear, abs=0.05)
        assert peers.kernel_r2(latents, angle) == pytest.approx(kernel, abs=0.05)
    known = angle + 0.5 * noise[:, :1]  # all that can be known is angle's share of the sum, 1/3 over 1/3 + 1/4
    assert peers.linear_r2(known, angle) == pytest.approx((1 / 3) / (1 / 3 + 1 / 4), abs=0.05)
