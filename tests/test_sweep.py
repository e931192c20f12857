"""The sweep: its points, the one-standard-error rule, the table."""

import csv
import math

import pytest

from flexlib.errors import InputError
from flexlib.files import read_json, write_json
from flexlib.sweep import (
    COLUMNS,
    Score,
    SweepPoint,
    choose_from_files,
    choose_point,
    select_points,
    summarise_sweep,
    sweep_points,
)


def config(cells=20, dims=2, rigidity=2.0, seed=0):
    return {"mesh": {"cells": cells}, "train": {"latent_dims": dims, "rigidity": rigidity, "seed": seed}}


def score(gain, error=1.0, dims=2, rigidity=2.0, cells=20, seed=0):
    return Score(SweepPoint(cells, dims, rigidity, seed), gain, error)


def test_sweep_is_the_product_of_the_lists():
    assert [point.path for point in sweep_points(config())] == ["cells~20/dims~2/rigidity~2.0/seed~0"]
    points = sweep_points(config([10, 20], [1, 2, 3], [0.5, 2], [0, 1]))
    assert len(points) == len(set(points)) == 24
    assert points[0].path == "cells~10/dims~1/rigidity~0.5/seed~0"
    assert {point.mesh_path for point in points} == {"cells~10", "cells~20"}


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
        ([score(10), score(8.5, rigidity=8.0)], 0),  # stiffer, but beyond it
        ([score(10, dims=3), score(9.5, dims=2)], 1),  # fewer dimensions
        ([score(10), score(9.5, cells=10)], 1),  # coarser mesh
        ([score(9.5, rigidity=0.5), score(10)], 1),  # softer is not simpler
        ([score(9.5, error=9.0), score(10, error=0.1, rigidity=0.5)], 1),  # the best one's standard error counts
        ([score(9.9, seed=0), score(10, seed=1)], 1),  # seeds are equally simple
        ([score(math.nan), score(-3)], 1),  # without a score there is nothing to choose
    ],
)
def test_one_standard_error_rule(scores, expected):
    assert choose_point(scores) == scores[expected]


def test_without_scores_nothing_is_best():
    with pytest.raises(InputError, match="validation_fraction"):
        choose_point([score(math.nan)])


def test_table_and_choice_from_files(tmp_path):
    points = sweep_points(config([10, 20]))
    for point, gain in zip(points, (9.5, 10.0), strict=True):
        record = {"validation_gain": gain, "validation_gain_se": 1.0, "wall_s": 12.5}
        write_json(tmp_path / "train" / point.path / "validation.json", record)
    resolutions = {"flex_0.143_A": 5.0, "flex_0.5_A": 7.0, "rigid_0.143_A": 6.5}
    write_json(tmp_path / "reconstruct" / points[0].path / "resolution.json", resolutions)

    choose_from_files(
        points, [tmp_path / "train" / point.path / "validation.json" for point in points], tmp_path / "b.json"
    )
    best = read_json(tmp_path / "b.json")
    assert best["path"] == points[0].path
    assert best["highest_validation_gain"] == 10.0

    summarise_sweep(points, tmp_path, points[:1], tmp_path / "sweep.csv")
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [row["cells"] for row in rows] == ["10", "20"]
    assert [row["chosen"] for row in rows] == ["true", "false"]
    assert (rows[0]["resolution_flex_A"], rows[0]["resolution_rigid_A"]) == ("5", "6.5")
    assert rows[1]["resolution_flex_A"] == ""
    assert rows[1]["wall_s"] == "12.5"


def test_chosen_is_among_the_reconstructed(tmp_path):
    points = sweep_points(config([10, 20, 30]))
    for point, gain in zip(points, (9.0, 10.0, 7.0), strict=True):
        record = {"validation_gain": gain, "validation_gain_se": 0.5}
        write_json(tmp_path / "train" / point.path / "validation.json", record)
        write_json(tmp_path / "reconstruct" / point.path / "resolution.json", {"flex_0.143_A": 5.0})
    for reconstructed, chosen in ((points, 1), (points[2:], 2), ([points[0], points[2]], 0)):
        summarise_sweep(points, tmp_path, reconstructed, tmp_path / "sweep.csv")
        with (tmp_path / "sweep.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["chosen"] for row in rows].index("true") == chosen
        assert [row["resolution_flex_A"] != "" for row in rows] == [point in reconstructed for point in points]
