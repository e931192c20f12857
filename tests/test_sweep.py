"""The sweep: its points, the one-standard-error rule, the table."""

import csv
import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import pytest
from json_records import agreement_record, resolution_record, validation_record

from flexlib.errors import InputError
from flexlib.files import read_json
from flexlib.layout import RunFolder
from flexlib.records import AgreementRecord
from flexlib.workflow_support.points import SweepPoint, select_points, sweep_points, wanted_points
from flexlib.workflow_support.scores import Score, choose_point, read_cross_score
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


def write_agreement(folder, point, gains):
    """validation.json and cross.csv of a point with these gains of all particles."""
    validate = RunFolder(folder).validate(point.path)
    error = stdev(gains) / math.sqrt(len(gains))
    agreement_record(fmean(gains), error, len(gains)).write(validate.record)
    validate.cross.write_text("\n".join(["row,gain", *(f"{row},{gain}" for row, gain in enumerate(gains))]) + "\n")


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
    assert select_points(points, [{"cells": 10}], "key") == points[:2]
    both = [{"cells": 20, "rigidity": 2}, {"cells": 10, "rigidity": 0.5}]
    assert select_points(points, both, "key") == [points[0], points[3]]
    with pytest.raises(InputError, match=r"key: \{'cells': 30\} is no point of the sweep"):
        select_points(points, [{"cells": 30}], "key")
    for words, expected in (("best", points), ("none", points), ([{"cells": 20}], points[2:])):
        assert wanted_points(points, {"validate": {"points": words}}, "validate") == expected


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
    others = {row + 1000: gain for row, gain in worse.items()}  # of an older version, at another seed: nothing to pair
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

    summarise_sweep(points, tmp_path, points[:1], [], tmp_path / "sweep.csv")
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
    assert {row[name] for row in rows for name in ("cross_gain", "cross_gain_se")} == {""}


def test_chosen_is_among_the_reconstructed(tmp_path):
    points = sweep_points(config([10, 20, 30]))
    for point, gain in zip(points, (9.0, 10.0, 7.0), strict=True):
        write_training(tmp_path, point, [gain - 1, gain, gain + 1] if gain == 10 else [gain, gain - 1, gain + 1])
        resolution_record({"flex_0.143": 5.0}).write(RunFolder(tmp_path).reconstruct(point.path).resolution)
    for reconstructed, chosen in ((points, 1), (points[2:], 2), ([points[0], points[2]], 0)):
        summarise_sweep(points, tmp_path, reconstructed, [], tmp_path / "sweep.csv")
        with (tmp_path / "sweep.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["chosen"] for row in rows].index("true") == chosen
        assert [row["resolution_flex_A"] != "" for row in rows] == [point in reconstructed for point in points]


def test_choice_by_the_cross_score(tmp_path):
    """The held-out score has the first point for the best, the cross score the second, and so the choice."""
    points = sweep_points(config([10, 20]))
    run = RunFolder(tmp_path)
    for point, held_out, cross in zip(points, (30.0, 20.0), (5.0, 9.0), strict=True):
        write_training(tmp_path, point, [held_out - 1, held_out, held_out + 1])
        write_agreement(tmp_path, point, [cross - 0.5, cross + 0.5, cross, cross])
        resolution_record({"flex_0.143": 5.0}).write(run.reconstruct(point.path).resolution)
    by_held_out = choose_from_files(points, [run.train(point.path).validation for point in points], run.best_point)
    assert by_held_out.point == points[0]
    assert read_json(run.best_point)["choose_by"] == "held_out"
    records = [run.validate(point.path).record for point in points]
    assert choose_from_files(points, records, run.best_point, "cross").point == points[1]
    best = read_json(run.best_point)
    assert (best["choose_by"], best["path"], best["validation_gain"]) == ("cross", points[1].path, 9.0)

    for choose_by, chosen in (("held_out", 0), ("cross", 1)):
        summarise_sweep(points, tmp_path, points, points, run.table, choose_by)
        with run.table.open() as file:
            rows = list(csv.DictReader(file))
        assert [row["chosen"] for row in rows].index("true") == chosen
        assert [row["cross_gain"] for row in rows] == ["5", "9"]
        assert [float(row["cross_gain_se"]) for row in rows] == pytest.approx([0.204124] * 2)
        assert [row["difference_to_best"] for row in rows] == ["0", "-10"]  # of the held-out score
    summarise_sweep(points, tmp_path, points, points[1:], run.table)
    assert tuple(run.table.read_text().splitlines()[0].split(",")) == COLUMNS
    assert COLUMNS[-2:] == ("cross_gain", "cross_gain_se")
    assert [line.split(",")[-2] for line in run.table.read_text().splitlines()[1:]] == ["", "9"]


def test_cross_scores_are_paired_over_all_particles(tmp_path):
    points = sweep_points(config(seed=[0, 1]))
    write_agreement(tmp_path, points[0], [1.0, 5.0, 9.0])
    write_agreement(tmp_path, points[1], [2.0, 6.0, 10.5])
    scores = [read_cross_score(point, RunFolder(tmp_path).validate(point.path).record) for point in points]
    difference, error = scores[1].difference(scores[0])
    assert (difference, error) == (pytest.approx(3.5 / 3), pytest.approx(0.5 / 3))
    cross = RunFolder(tmp_path).validate(points[0].path).cross
    cross.write_text("row,gain\n0,1.0\n")
    with pytest.raises(InputError, match=r"cross\.csv: 1 particles, 3 were scored"):
        read_cross_score(points[0], RunFolder(tmp_path).validate(points[0].path).record)


def test_records_of_a_validation_come_back_as_they_were(tmp_path):
    record = agreement_record(3.5, 0.25, 100)
    record.write(tmp_path / "validation.json")
    assert AgreementRecord.read(tmp_path / "validation.json") == record
    none = replace(record, cross_gain=None, cross_gain_se=math.nan, moving_error_A=None, mode_limit_A=None)
    none.write(tmp_path / "validation.json")
    again = AgreementRecord.read(tmp_path / "validation.json")
    assert math.isnan(again.gain) and math.isnan(again.gain_se)
    assert again.moving_error_A is None and again.mode_limit_A is None
    with pytest.raises(InputError, match="is this a folder that validate has written"):
        AgreementRecord.read(tmp_path / "nowhere.json")


def test_files_of_a_validation_lie_apart_from_those_of_its_halves():
    point = sweep_points(config())[0]
    folder, pattern = RunFolder(Path("results/x")).validate(point.path), RunFolder(Path("results/x")).validate()
    assert folder.path == Path(f"results/x/validate/{point.path}")
    halves = [folder.half(number) for number in (1, 2)]
    assert [half.model for half in halves] == [folder.path / f"half{number}/model.pt" for number in (1, 2)]
    wildcards = dict(cells=20, dims=2, rigidity=2.0, seed=0)
    assert [Path(str(pattern.half().cross).format(**wildcards, half=number)) for number in (1, 2)] == [
        half.cross for half in halves
    ]
    own = [folder.half_map(1), folder.half_map(2), folder.map, folder.cross, folder.fsc, folder.record]
    assert len({*own, *(half.cross for half in halves)}) == 8
    assert all(path.parent == folder.path for path in own)
