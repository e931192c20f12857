"""The ChimeraX script of a run opens what is there, each once, by its place beside the script."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from fake_results import CONFIG, POINT, write_fake_results

from flexlib.imaging.maps import read_map, write_map
from flexlib.layout import RunFolder
from flexlib.report.chimerax import write_scene
from flexlib.report.results import Results

OPEN = re.compile(r'open (?:"([^"]+)"|(\S+)) .*?\bid (\d+)\b')


@pytest.fixture
def run(tmp_path) -> RunFolder:
    write_fake_results(tmp_path / "a run")
    run = RunFolder(tmp_path / "a run")
    shutil.copy(run.particles.consensus, run.train(POINT.path).canonical)
    return run


def scene(run: RunFolder) -> list[str]:
    write_scene(Results(run.path, CONFIG), run.scene)
    return run.scene.read_text().splitlines()


def opened(lines: list[str]) -> dict[int, str]:
    found = [OPEN.match(line) for line in lines if line.startswith("open ")]
    assert all(found)
    numbers = {int(one[3]): one[1] or one[2] for one in found}
    assert len(numbers) == len(found)  # no number twice
    return numbers


def test_everything_that_there_is_is_opened_once(run):
    interpreted, generated = run.interpret(POINT.path), run.generate(POINT.path)
    interpreted.path.mkdir(parents=True, exist_ok=True)
    interpreted.arrows.write_text(".color red\n")
    canonical = read_map(run.train(POINT.path).canonical)
    write_map(interpreted.labels, np.ones_like(canonical.data), canonical.pixel_size_A)
    generated.ensemble("axis_1").write_text("data_x\n")
    lines = scene(run)
    numbers = opened(lines)
    files = {path for text in numbers.values() for path in run.path.glob(text)}
    assert all(list(run.path.glob(text)) for text in numbers.values())  # each finds its file, and from there
    reconstructed = run.reconstruct(POINT.path)
    assert {reconstructed.map("flex"), run.validate(POINT.path).motion_size, interpreted.arrows} <= files
    assert {interpreted.labels, generated.ensemble("axis_1"), generated.frame("axis_2", 0)} <= files
    assert len(numbers) == 4 + 2 + 1
    # what is said of a model comes after it was opened
    known: set[int] = set()
    for line in lines:
        named = {int(number) for number in re.findall(r"#(\d+)(?![\da-f])", line)}
        assert named <= known, line
        if found := OPEN.match(line):
            known.add(int(found[3]))
    words = {line.split()[0] for line in lines}
    assert words == {"#", "open", "volume", "hide", "color", "transparency", "vseries", "coordset", "view"}


def test_the_map_is_coloured_by_its_motion(run):
    size = read_map(run.validate(POINT.path).motion_size).data
    (line,) = (line for line in scene(run) if line.startswith("color sample"))
    stops = [float(stop.split(",")[0]) for stop in line.split("palette ")[1].split()[0].split(":")]
    assert stops[0] == 0.0 and stops[1] == pytest.approx(stops[2] / 2, rel=0.01)
    assert 0.8 * size.max() < stops[2] <= size.max()


def test_a_run_that_was_only_trained_has_its_canonical_map(run):
    stages = run.reconstruct, run.validate, run.interpret, run.generate
    for folder in (stage(POINT.path) for stage in stages):
        for path in sorted(folder.path.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    numbers = opened(scene(run))
    assert [Path(text) for text in numbers.values()] == [run.train(POINT.path).canonical.relative_to(run.path)]
