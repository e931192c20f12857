"""Sets too small to mean anything: refused in one line before any work; the least that is taken goes through."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from training_sets import prepared

from flexlib.errors import InputError
from flexlib.layout import TrainFolder
from flexlib.particles.read import read_particles
from flexlib.prepare.selection import LEAST_IN_HALF, LEAST_PARTICLES, check_enough, warn_of_few
from flexlib.records import PreparedRecord, ValidationRecord
from flexlib.simulate import Simulation, simulate_particles
from flexlib.train import train
from flexlib.train.score import choose_held_out
from flexlib.workflow_support.checks import check_choice, check_config
from flexlib.workflow_support.settings import TrainSettings


@pytest.fixture(scope="module")
def particles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("few")
    simulate_particles(folder, Simulation(num_particles=2 * LEAST_PARTICLES, box=24, pixel_size_A=9.0))
    found = read_particles(folder / "particles.star")
    return replace(found, half_set=(np.arange(len(found)) % 2).astype(np.int8))


@pytest.mark.parametrize(
    ("count", "in_second", "message"),
    [
        (LEAST_PARTICLES, LEAST_PARTICLES // 2, None),
        (LEAST_PARTICLES - 1, LEAST_PARTICLES // 2, rf"particles\.star: {LEAST_PARTICLES - 1} particles can be used"),
        (LEAST_PARTICLES, LEAST_IN_HALF, None),
        (LEAST_PARTICLES, LEAST_IN_HALF - 1, rf"half-set 2 has {LEAST_IN_HALF - 1} particles .*\(prepare.resplit"),
        (LEAST_PARTICLES, 0, "half-set 2 has 0 particles"),
        (2, 1, r"particles\.star: 2 particles can be used"),
    ],
)
def test_least_number_in_all_and_in_each_half(particles, count, in_second, message):
    half_set = (np.arange(count) >= count - in_second).astype(np.int8)
    few = replace(particles.subset(np.arange(count)), half_set=half_set)
    if message is None:
        check_enough(few)
        return
    with pytest.raises(InputError, match=message) as refused:
        check_enough(few)
    assert "\n" not in str(refused.value)


def test_rows_of_one_image_count_once(particles):
    """As another program's symmetry expansion has them."""
    rows = np.repeat(np.arange(LEAST_PARTICLES - 1), 4)
    with pytest.raises(InputError, match=f"{LEAST_PARTICLES - 1} particles can be used"):
        check_enough(particles.subset(rows))


@pytest.mark.parametrize("count", [2, 12, LEAST_PARTICLES - 1])
def test_preparing_a_handful_is_refused_in_one_line(tmp_path, count):
    with pytest.raises(InputError, match=rf"particles\.star: {count} particles can be used: at least 20 are needed"):
        prepared(tmp_path, "antibody", count, snr=1.0)
    assert not list(tmp_path.glob("particles/*"))


def test_small_sets_are_warned_of(particles, caplog):
    warn_of_few(particles)
    (record,) = caplog.records
    assert "with only 40 particles motion can hardly be told from noise" in record.message
    caplog.clear()
    warn_of_few(particles.subset(np.repeat(np.arange(20), 25)))
    assert not caplog.records


def test_the_least_set_trains_and_its_score_has_an_error(tmp_path, caplog, one_thread):
    folder = prepared(tmp_path, "antibody", LEAST_PARTICLES, snr=1.0)
    assert PreparedRecord.read(folder / "particles/prepared.json").num_particles == LEAST_PARTICLES
    assert "with only 20 particles" in caplog.text
    settings = TrainSettings(latent_dims=1, epochs=2)  # 5 % of 20 is one particle
    train(folder / "particles", folder / "mesh", folder / "train", settings, "cpu")
    validation = ValidationRecord.read(TrainFolder(folder / "train").validation)
    assert np.isfinite([validation.gain, validation.gain_se]).all()
    assert len(Path(TrainFolder(folder / "train").held_out).read_text().splitlines()) == 1 + 2


@pytest.mark.parametrize(
    ("images", "fraction", "held_out"),
    [(20, 0.05, 2), (20, 0.5, 10), (20, 0.0, 0), (4, 0.01, 2), (3, 0.3, 0), (100, 0.05, 5)],
)
def test_held_out_are_two_or_none(images, fraction, held_out):
    choice = choose_held_out(np.repeat(np.arange(images), 2), fraction)
    assert len(choice.held_out) == 2 * held_out and len(choice.training) == 2 * (images - held_out)


@pytest.mark.parametrize(
    ("fraction", "points", "count", "refused"),
    [
        (0, "best", 3, True),
        (0, "best", 1, False),
        (0, "all", 3, False),
        (0, [{"seed": 1}], 3, False),
        (0.01, "best", 3, False),
    ],
)
def test_best_of_a_sweep_needs_a_score(fraction, points, count, refused):
    config = check_config(
        {
            "name": "run",
            "particles": "p.star",
            "consensus": "c.mrc",
            "train": {"validation_fraction": fraction, "seed": [0, 1, 2]},
            "reconstruct": {"points": points},
        }
    )
    if not refused:
        check_choice(config, count)
        return
    with pytest.raises(
        InputError, match=r"train\.validation_fraction: 0 holds no particle out, so that none of 3 points"
    ):
        check_choice(config, count)
