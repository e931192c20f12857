"""Large sets: memory and time a row, a sweep of hundreds, and many readers of one stack."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from json_records import resolution_record
from test_sweep import config, write_training

from flexlib.layout import RunFolder
from flexlib.workflow_support.points import select_points, sweep_points
from flexlib.workflow_support.sweep import choose_from_files, summarise_sweep

ROOT = Path(__file__).parents[2]
ROWS = 200_000
MOST_KB_A_ROW = {"star": 3.0, "cs": 2.2, "stream": 2.5}  # measured: 2.0, 1.5 and 1.6 (docs/metadata.md)
MOST_US_A_ROW = 400.0  # of CPU for all steps, which take some 70 on the machine of docs/metadata.md


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What the benchmark says of each format: seconds and CPU seconds of its steps, GB of memory."""
    out = tmp_path_factory.mktemp("load") / "measured.json"
    script = ROOT / "benchmarks/bench_metadata.py"
    done = subprocess.run([sys.executable, script, "--count", str(ROWS), "--out", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())["formats"]


@pytest.mark.parametrize("kind", MOST_KB_A_ROW)
def test_metadata_takes_little_memory_and_time_a_row(measured, kind):
    """Read, write latents.star, read it, choose half: 2,000,000 particles then fit a common workstation."""
    kilobytes = (measured[kind]["peak GB"] - measured[kind]["GB of libraries"]) * 2**20 / ROWS
    assert 0.2 < kilobytes < MOST_KB_A_ROW[kind]
    steps = {step: cpu_s for step, (_, cpu_s) in ((s, v) for s, v in measured[kind].items() if isinstance(v, list))}
    assert len(steps) >= 5 and sum(steps.values()) / ROWS * 1e6 < MOST_US_A_ROW, steps


def test_a_sweep_of_200_points_is_chosen_from_and_tabled_at_once(tmp_path):
    """Each with the scores of 2,000 held-out particles; planning 500 is timed by ``tests/test_workflow.py``."""
    points = sweep_points(config([10, 20, 30, 40], [1, 2, 3, 4, 5], [0.5, 1.0, 2.0, 4.0, 8.0], [0, 1]))
    assert len(points) == 200
    rng = np.random.default_rng(0)
    for number, point in enumerate(points):
        write_training(tmp_path, point, (rng.normal(number / 200, 1.0, 2000)).tolist())
        resolution_record({"flex_0.143": 5.0, "rigid_0.143": 6.0}).write(
            RunFolder(tmp_path).reconstruct(point.path).resolution
        )
    start = time.process_time()
    validations = [RunFolder(tmp_path).train(point.path).validation for point in points]
    chosen = choose_from_files(points, validations, tmp_path / "best.json")
    summarise_sweep(points, tmp_path, points, [], tmp_path / "sweep.csv")
    assert select_points(points, [{"cells": 10}, {"seed": 1}], "sweep.exclude")
    assert time.process_time() - start < 10  # some 1.5 s
    lines = (tmp_path / "sweep.csv").read_text().splitlines()
    assert len(lines) == 201 and sum(",true," in line for line in lines) == 1
    assert f"{chosen.gain:.6g}" in next(line for line in lines if ",true," in line)


READERS = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
from flexlib.images.stack import read_stack_header

path, count, box = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
header = read_stack_header(path)


def agrees(number):
    rows = np.random.default_rng(number).permutation(count)[:400]
    images = header.read(rows)
    expected = (rows[:, None] * 7919 + np.arange(box * box)) % 8191
    crops = header.read(rows[:50], box // 2)
    inner = slice(box // 2 - box // 4, box // 2 + box // 4)
    whole = np.array_equal(images.reshape(len(rows), -1), expected.astype(np.float32))
    return whole and np.array_equal(crops, images[:50, inner, inner])


children = []
for number in range(50):  # before any thread
    child = os.fork()
    if child == 0:
        os._exit(0 if agrees(number) else 1)
    children.append(child)
statuses = [os.waitpid(child, 0)[1] for child in children]
with ThreadPoolExecutor(50) as pool:
    threads = list(pool.map(agrees, range(50)))
print(statuses.count(0), threads.count(True))
"""


def test_50_readers_of_one_stack_see_the_right_pixels(tmp_path):
    from flexlib.images.stack import ImageStackWriter

    count, box = 1000, 32
    with ImageStackWriter(tmp_path / "s.mrcs", count, box, 1.0) as stack:
        values = (np.arange(count)[:, None] * 7919 + np.arange(box * box)) % 8191
        stack.append(values.reshape(count, box, box).astype(np.float32))
    command = [sys.executable, "-c", READERS, tmp_path / "s.mrcs", str(count), str(box)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["50", "50"], done.stdout + done.stderr
