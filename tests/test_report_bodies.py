"""The report's section on bodies and hinges: what it says, and that it claims nothing where there is nothing."""

from dataclasses import replace

import pandas as pd
import pytest
from fake_results import POINT, finished_report, write_fake_results

from flexlib.layout import RunFolder
from flexlib.records import InterpretationRecord
from flexlib.report import bodies
from flexlib.report.morph import Gallery
from flexlib.report.results import Results

RECORD = InterpretationRecord(
    wall_s=1.0, std_err_from="train", num_bodies=2, bodies_explained=0.95, bodies_motion_A=6.1, bodies_bend=0.2
)


@pytest.fixture
def run(tmp_path):
    root = tmp_path / "run"
    write_fake_results(root, box=32, num_particles=60, frames=3)
    return RunFolder(root)


def section(run):
    return str(bodies.bodies_section(Results(run.path, {}, None), Gallery([], None, [])))


def test_the_page_has_picture_tables_and_sentences(tmp_path_factory):
    page = (finished_report(tmp_path_factory.getbasetemp()) / "report.html").read_text()
    assert "Bodies and hinges" in page and "2 bodies that move as rigid ones explain 95 % of the motion" in page
    assert "The map coloured by body, with the axes of its hinges" in page
    assert "Body 2 against body 1: turns about one axis, by 39.5°" in page
    assert "39.5" in page and "body_1.star" in page


def test_nothing_is_shown_of_a_point_that_was_not_interpreted(run):
    assert "2 bodies" in section(run)
    run.interpret(POINT.path).record.unlink()
    assert section(run) == ""


def test_a_motion_that_is_not_told_has_no_bodies(run):
    folder = run.interpret(POINT.path)
    replace(RECORD, num_bodies=1, bodies_reason="nothing moves").write(folder.record)
    shown = section(run)
    assert "No bodies are told: nothing moves." in shown and "<img" not in shown and "<table" not in shown


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ""),
        ({"bodies_bend": 0.9}, "describe the motion but are no parts"),
        ({"bodies_explained": 0.7}, "It bends: 30 % of the motion is no rigid body's."),
        ({"bodies_reason": "nothing moves", "bodies_bend": 0.9}, ""),
    ],
)
def test_what_bends_is_said(change, said):
    warning = bodies.warning(replace(RECORD, **change))
    assert said in warning and bool(warning) == bool(said)


def test_joints_and_shifts_are_no_hinges(run):
    table = pd.read_csv(run.interpret(POINT.path).hinges)
    joint, shift = (bodies.hinge_sentences(table.assign(kind=kind, axis_share=0.57))[0] for kind in ("joint", "shift"))
    assert "57 % of it about one axis" in joint and "no axis can be told" in shift
    assert bodies.hinge_sentences(table.assign(touching=0)) == []
    assert "39.5" not in bodies.hinge_table(table.assign(kind="shift")).rows[0]


def test_files_that_are_gone_are_named(run):
    folder = run.interpret(POINT.path)
    for path in (folder.bodies, folder.hinges, folder.labels):
        path.unlink()
    shown = section(run)
    assert "bodies.csv is not there" in shown and "hinges.csv is not there" in shown and "No picture" in shown
