"""The sweep: its points, the one-standard-error rule, the table."""

import csv
import math
from dataclasses import replace
from statistics import fmean, stdev

import pytest
from json_records import resolution_record, validation_record

from flexlib.errors import InputError
from flexlib.files import read_json
from flexlib.layout import RunFolder
from flexlib.workflow_support.points import SweepPoint, select_points, sweep_points
from flexlib.workflow_support.scores import Score, choose_point
from flexlib.workflow_support.sweep import COLUMNS, choose_from_files, summarise_sweep


def config(cells=20, dims=2, rigidity=2.0, seed=0, exclude=(), points=()):
    return {
        "mesh": {"cells": cells},
        "train": {"latent_dims": dims, "rigidity": rigidity, "seed": seed},
        "sweep": {"exclude": list(exclude), "points": list(points)},
    }


def score(gain, error=1.0, dims=2, rigidity=2.0, cells=20, seed=0):
    return Score(SweepPoint(cells, dims, rigidity, seed), gain, error)


def write_training(folder, point, gains, wall_s=12.5):
    """validation.json and held_out.csv of a point with these gains of its held-out particles."""
    error = stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else None
    gain = fmean(gains) if gains else None
    train = RunFolder(folder).train(point.path)
    record = replace(validation_record(gain, error, wall_s), validation_particles=len(gains))
    record.write(train.validation)
    lines = ["row,gain", *(f"{7 * row},{value}" for row, value in enumerate(gains))]
    train.held_out.write_text("\n".join(lines) + "\n")


def test_sweep_is_the_product_of_the_lists():
    assert [point.path for point in sweep_points(config())] == ["cells~20/dims~2/rigidity~2.0/seed~0"]
    points = sweep_points(config([10, 20], [1, 2, 3], [0.5, 2], [0, 1]))
    assert len(points) == len(set(points)) == 24
    assert points[0].path == "cells~10/dims~1/rigidity~0.5/seed~0"
    assert {point.mesh_path for point in points} == {"cells~10", "cells~20"}


def test_more_points_than_any_machine_could_train_are_refused_before_they_are_made():
    values = list(range(1, 400))
    with pytest.raises(InputError, match=rf"the sweep's lists make {len(values) ** 4} points"):
        sweep_points(config(values, values, values, values))


def test_paths_do_not_depend_on_how_a_number_is_written():
    assert sweep_points(config(rigidity=2)) == sweep_points(config(rigidity=[2.0]))
    assert sweep_points(config(rigidity=1e-7))[0].path.endswith("rigidity~1e-07/seed~0")
    with pytest.raises(InputError, match=r"train\.rigidity: .* names one value twice"):
        sweep_points(config(rigidity=[2, 2.0]))


def test_points_are_selected_by_some_or_all_keys():
    points = sweep_points(config([10, 20], 2, [0.5, 2.0]))
    assert select_points(points, [{"cells": 10}]) == points[:2]
    assert select_points(points, [{"cells": 20, "rigidity": 2}, {"cells": 10, "rigidity": 0.5}]) == [
        points[0],
        points[3],
    ]
    with pytest.raises(InputError, match="is no point of the sweep"):
        select_points(points, [{"cells": 30}])


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([score(10), score(5)], 0),  # clearly better
        ([score(10), score(9.5, rigidity=8.0)], 1),  # stiffer, within one standard error
        ([score(10), score(8.9, rigidity=8.0)], 0),  # stiffer, but beyond it
        ([score(10, dims=3), score(9.5, dims=2)], 1),  # fewer dimensions
        ([score(10), score(9.5, cells=10)], 1),  # coarser mesh
        ([score(9.5, rigidity=0.5), score(10)], 1),  # softer is not simpler
        ([score(10, rigidity=8.0), score(10, cells=10)], 1),  # a coarser mesh is simpler than a stiffer one
        ([score(10, cells=10, dims=3), score(10)], 1),  # and fewer dimensions than either
        ([score(9.9, seed=0), score(10, seed=1)], 1),  # seeds are equally simple
        ([score(math.nan), score(-3)], 1),  # without a score there is nothing to choose
    ],
)
def test_one_standard_error_rule(scores, expected):
    assert choose_point(scores) == scores[expected]


def test_error_is_that_of_the_paired_difference():
    """Particles differ by 10 nats, settings by 0.5 +- 0.1 on the same ones. The choice asks for more than that."""
    particles = [10.0 * (row % 7) for row in range(100)]
    best = dict(enumerate(particles))
    worse = {row: gain - 0.5 + (0.1 if row % 2 else -0.1) for row, gain in best.items()}
    error = stdev(particles) / 10
    scores = [
        Score(SweepPoint(20, 2, 2.0, 0), fmean(best.values()), error, best),
        Score(SweepPoint(10, 2, 2.0, 0), fmean(worse.values()), error, worse),
    ]
    difference, paired_error = scores[1].difference(scores[0])
    assert difference == pytest.approx(-0.5)
    assert paired_error == pytest.approx(0.1 * math.sqrt(100 / 99) / 10)
    assert choose_point(scores) == scores[1]
    others = {row + 1000: gain for row, gain in worse.items()}  # another seed holds out others: nothing to pair
    unpaired = Score(scores[1].point, scores[1].gain, error, others)
    assert unpaired.difference(scores[0]) == (pytest.approx(-0.5), pytest.approx(math.sqrt(2) * error))


def test_exclude_and_points_change_the_product():
    swept = dict(cells=[10, 20], dims=[2, 3], rigidity=[0.5, 2])
    points = sweep_points(config(**swept, exclude=[{"cells": 20, "latent_dims": 3}], points=[{"rigidity": 50}]))
    assert len(points) == 2 * 2 * 2 - 2 + 1
    assert not [point for point in points if (point.cells, point.latent_dims) == (20, 3)]
    assert points[-1] == SweepPoint(10, 2, 50.0, 0)
    assert points[-1].path == "cells~10/dims~2/rigidity~50.0/seed~0"
    assert sweep_points(config(rigidity=[1, 2], exclude=[{"rigidity": 1}], points=[{"rigidity": 1, "seed": 4}])) == [
        SweepPoint(20, 2, 2.0, 0),
        SweepPoint(20, 2, 1.0, 4),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exclude": [{"cells": 30}]}, r"sweep\.exclude: \{'cells': 30\} is no point of the sweep"),
        ({"points": [{"cells": 20}]}, r"sweep\.points: \{'cells': 20\} is a point of the sweep already"),
        ({"points": [{"cells": 30}, {"cells": 30}]}, "is a point of the sweep already"),
        ({"exclude": [{"cells": 20}]}, r"sweep\.exclude: no point is left"),
    ],
)
def test_mistakes_in_the_sweep_are_named(change, message):
    with pytest.raises(InputError, match=message):
        sweep_points(config(**change))


def test_without_scores_nothing_is_best():
    with pytest.raises(InputError, match="validation_fraction"):
        choose_point([score(math.nan)])


def test_table_and_choice_from_files(tmp_path):
    points = sweep_points(config([10, 20]))
    write_training(tmp_path, points[0], [8.5, 9.5, 10.5])
    write_training(tmp_path, points[1], [9.0, 9.0, 12.0])
    run = RunFolder(tmp_path)
    resolutions_A = {"flex_0.143": 5.0, "flex_0.5": 7.0, "rigid_0.143": 6.5}
    resolution_record(resolutions_A).write(run.reconstruct(points[0].path).resolution)

    choose_from_files(points, [run.train(point.path).validation for point in points], tmp_path / "b.json")
    best = read_json(tmp_path / "b.json")
    assert best["path"] == points[0].path
    assert best["highest_validation_gain"] == 10.0
    assert best["highest_validation_gain_path"] == points[1].path
    assert (best["difference_to_best"], best["difference_to_best_se"]) == (-0.5, pytest.approx(0.577350))

    summarise_sweep(points, tmp_path, points[:1], tmp_path / "sweep.csv")
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [row["cells"] for row in rows] == ["10", "20"]
    assert [row["chosen"] for row in rows] == ["true", "false"]
    assert (rows[0]["resolution_flex_A"], rows[0]["resolution_rigid_A"]) == ("5", "6.5")
    assert rows[1]["resolution_flex_A"] == ""
    assert rows[1]["wall_s"] == "12.5"
    assert [row["difference_to_best"] for row in rows] == ["-0.5", "0"]
    assert [row["difference_to_best_se"] for row in rows] == ["0.57735", "0"]


def test_chosen_is_among_the_reconstructed(tmp_path):
    points = sweep_points(config([10, 20, 30]))
    for point, gain in zip(points, (9.0, 10.0, 7.0), strict=True):
        write_training(tmp_path, point, [gain - 1, gain, gain + 1] if gain == 10 else [gain, gain - 1, gain + 1])
        resolution_record({"flex_0.143": 5.0}).write(RunFolder(tmp_path).reconstruct(point.path).resolution)
    for reconstructed, chosen in ((points, 1), (points[2:], 2), ([points[0], points[2]], 0)):
        summarise_sweep(points, tmp_path, reconstructed, tmp_path / "sweep.csv")
        with (tmp_path / "sweep.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["chosen"] for row in rows].index("true") == chosen
        assert [row["resolution_flex_A"] != "" for row in rows] == [point in reconstructed for point in points]
