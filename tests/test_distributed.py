"""Several processes: the same results as one within rounding, one end for all, whatever happens to one of them."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from machines import Machines
from training_sets import latents_of, prepared

from flexlib.distributed import EXIT_INTERRUPTED, Ranks, check_processes, launch
from flexlib.errors import InputError
from flexlib.imaging.maps import read_map
from flexlib.layout import MeshFolder, ParticlesFolder, TrainFolder
from flexlib.model.forward import EXACT
from flexlib.reconstruct.run import reconstruct
from flexlib.train import epoch, run, train
from flexlib.workflow_support.settings import ReconstructSettings, TrainSettings

SETTINGS = TrainSettings(latent_dims=2, epochs=2, validation_fraction=0.1)


@pytest.fixture(scope="module")
def clamp(tmp_path_factory) -> Path:
    """A jaw that opens and closes; an odd number of particles, so that the shares differ."""
    return prepared(tmp_path_factory.mktemp("clamp"), "clamp", 151, 0.3)


def job_of(data: Path, out: Path) -> run.TrainJob:
    """A training of what ``prepared`` made."""
    folders = (ParticlesFolder(data / "particles"), MeshFolder(data / "mesh"), TrainFolder(out))
    return run.TrainJob(*folders, SETTINGS, accuracy=EXACT)


def train_smoothly(ranks: Ranks, device: str, data: Path, out: Path, stop_at: int | None = None) -> None:
    """One rank's part of ``train``, with the cubic kernel; at the step ``stop_at`` rank 1 sends the launcher SIGTERM.

    The gradient of the linear kernel jumps where a voxel crosses the border of a pixel. A difference of rounding makes
    some cross sooner, and each moves the latents of a particle by up to 1e-2: after six epochs the differences are
    700 times those with the cubic kernel, where they stay what rounding makes them.
    """
    take_step, done = epoch.take_step, [0]

    def counted(*of_step):
        done[0] += 1
        if done[0] == stop_at and ranks.rank == 1:
            os.kill(os.getppid(), signal.SIGTERM)
        return take_step(*of_step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(epoch, "take_step", counted)
        run.train_rank(ranks, device, job_of(data, out))


@pytest.fixture(scope="module")
def one(clamp) -> Path:
    """Trained by one process."""
    launch(train_smoothly, (clamp, clamp / "one"), 1, "cpu")
    return clamp / "one"


@pytest.fixture(scope="module")
def two(clamp) -> Path:
    """Trained by two."""
    launch(train_smoothly, (clamp, clamp / "two"), 2, "cpu")
    return clamp / "two"


def check_sums(ranks: Ranks, device: str) -> None:
    """What each method gives, with shares of unequal size."""
    assert device == "cpu" and ranks.size == 2
    assert ranks.share(np.arange(5)).tolist() == [[0, 1], [2, 3, 4]][ranks.rank]
    single, double, number = torch.full((2, 3), 1.0 + ranks.rank), torch.ones(4, dtype=torch.float64), torch.tensor(0.5)
    ranks.add(single.T, double, number)
    assert (single == 3).all() and (double == 2).all() and number == 1
    ranks.add(torch.empty(0))
    rows = torch.arange(10.0).reshape(5, 2)
    assert torch.equal(ranks.gather(ranks.share(rows), 5), rows)
    assert torch.equal(ranks.gather(ranks.share(rows[:1]), 1), rows[:1])  # rank 0 has none
    assert ranks.any(ranks.rank == 1) and not ranks.any(False)
    assert ranks.from_first(lambda: f"from {ranks.rank}") == "from 0"
    ranks.follow_first(rows.mul_(1 + ranks.rank))
    assert torch.equal(rows, torch.arange(10.0).reshape(5, 2))


def test_sums_and_shares():
    assert Ranks().gather(torch.ones(3), 3).sum() == 3 and Ranks().from_first(lambda: 1) == 1
    launch(check_sums, (), 2, "cpu")


def checkpoint_of(train_dir: Path) -> dict:
    """The state after the last epoch, before the final inference."""
    return torch.load(train_dir / "checkpoints/checkpoint.pt", weights_only=True)


def assert_same_but_for_rounding(one: Path, two: Path) -> None:
    """28 steps and what comes before and after: sums in another order, and no more.

    One step makes latents differ by 1e-5, for their information is a finite difference in float32.
    """
    first, second = checkpoint_of(one), checkpoint_of(two)
    assert (first["rigid_values"] - second["rigid_values"]).norm() < 1e-5 * first["rigid_values"].norm()
    canonical, other = first["canonical"]["values"], second["canonical"]["values"]
    assert (canonical - other).norm() < 1e-5 * canonical.norm()
    assert (first["latents"] - second["latents"]).abs().max() < 1e-3
    assert first["information_ratios"] == pytest.approx(second["information_ratios"], rel=1e-4)
    for name in ("loss", "rigidity", "rms_displacement_A", "validation_gain"):
        assert second["log"][-1][name] == pytest.approx(first["log"][-1][name], rel=1e-3), name
    assert np.abs(latents_of(one) - latents_of(two)).max() < 0.02
    scores = [json.loads((folder / "validation.json").read_text()) for folder in (one, two)]
    for name in ("validation_gain", "validation_gain_se", "pose_rotation_deg", "pose_shift_A", "contrast_sd"):
        assert scores[0][name] is not None, name
        assert scores[0][name] == pytest.approx(scores[1][name], rel=1e-3), name
    maps = [read_map(folder / "canonical.mrc").data for folder in (one, two)]
    assert np.linalg.norm(maps[0] - maps[1]) < 1e-5 * np.linalg.norm(maps[0])


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(one, two):
    assert_same_but_for_rounding(one, two)


@pytest.mark.slow
def test_two_machines_learn_what_one_process_learns_though_stopped_on_the_way(clamp, one):
    out = clamp / "machines"
    with Machines.joined() as machines:
        stopped = machines.run(train_smoothly, clamp, out, 20)
        assert [status for status, _ in stopped] == [EXIT_INTERRUPTED] * 2, stopped
        assert checkpoint_of(out)["epoch"] == 1 and checkpoint_of(out)["step"] > 0
        done = machines.run(train_smoothly, clamp, out)
    assert [status for status, _ in done] == [0, 0], done
    assert f"by {machines.interfaces[0]}" in done[0][1] and "resumed after epoch 1" in done[0][1]
    assert "INFO" not in done[1][1]  # the first logs
    assert_same_but_for_rounding(one, out)


@pytest.mark.slow
def test_sigterm_stops_all_at_the_same_batch_and_they_continue(clamp, two):
    out = clamp / "parts"
    with pytest.raises(SystemExit) as stopped:
        launch(train_smoothly, (clamp, out, 20), 2, "cpu")  # in the second epoch
    assert stopped.value.code == EXIT_INTERRUPTED
    assert checkpoint_of(out)["epoch"] == 1 and checkpoint_of(out)["step"] > 0
    assert not (out / "model.pt").exists()
    launch(train_smoothly, (clamp, out), 2, "cpu")
    assert np.abs(latents_of(two) - latents_of(out)).max() < 1e-6


def fail(ranks: Ranks, device: str, how: str) -> None:
    """Rank 1 fails while rank 0 waits for it."""
    if ranks.rank == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("what was wrong")
    ranks.any(False)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("error", "process 2 of 2 failed:(.|\n)*ValueError: what was wrong"),
        ("killed", "process 2 of 2 was ended by signal 9"),
    ],
)
def test_one_that_fails_ends_all_with_its_message(how, message):
    with pytest.raises(RuntimeError, match=message):
        launch(fail, (how,), 2, "cpu")


def test_what_is_wrong_with_the_input_is_told_as_by_one_process(clamp):
    with pytest.raises(InputError, match=r"nowhere/mesh\.vtu"):
        train(clamp / "particles", clamp / "nowhere", clamp / "no", replace(SETTINGS, processes=2), "cpu")


def test_a_checkpoint_fits_any_number_of_processes(clamp):
    folders = (ParticlesFolder(clamp / "particles"), MeshFolder(clamp / "mesh"))
    assert run.run_identity(*folders, SETTINGS) == run.run_identity(*folders, replace(SETTINGS, processes=2))


@pytest.mark.slow
def test_two_processes_reconstruct_what_one_does(clamp, one):
    settings = ReconstructSettings(max_bfgs_iterations=4, cache_dir=clamp / "cache")
    for processes in (1, 2):
        out = clamp / f"maps_{processes}"
        reconstruct(clamp / "particles", one, out, settings, "cpu", processes=processes)
    for name in ("flex_half1", "flex_half2", "rigid_map"):
        first, second = (read_map(clamp / f"maps_{processes}/{name}.mrc").data for processes in (1, 2))
        assert np.linalg.norm(first - second) < 1e-5 * np.linalg.norm(first), name
    first, second = (pd.read_csv(clamp / f"maps_{processes}/convergence.csv") for processes in (1, 2))
    np.testing.assert_allclose(first["objective"], second["objective"], rtol=1e-5)
    assert not list((clamp / "cache").glob("flexlib-*"))  # each rank has removed its copy


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert check_processes(2, "auto") == "cuda" and check_processes(3, "cpu") == "cpu"
    with pytest.raises(InputError, match=r"train\.processes: 3 processes need as many GPUs, and torch sees 2"):
        launch(fail, ("error",), 3, "auto")


def test_more_processes_than_a_batch_has_particles_are_refused(clamp):
    with pytest.raises(InputError, match=r"train\.processes: 12, but the mini-batches of these particles have 9 each"):
        run.train_rank(Ranks(0, 12), "cpu", job_of(clamp, clamp / "many"))
