"""A stage that is killed, stopped or interrupted at any file that it writes: nothing half, the same command goes on.

The signal comes where a file is complete and about to take its final name, so the points are the same in every run.
"""

import re
import signal

import pytest
from bench import assert_one_line
from small_run import INPUTS, OUTPUTS, jobs

POLITE = {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
OF_ANY = re.compile(r"\.snakemake/|logs/")  # Snakemake's own, or ours to be read while it grows
CHECKPOINTED = 75


@pytest.mark.parametrize("stage", OUTPUTS)
def test_nothing_is_opened_for_writing_under_its_final_name(bench, stage):
    written = [line[2:] for line in bench.opened[stage] if line.startswith("w ")]
    assert any(".part" in path for path in written)
    assert not [path for path in written if ".part" not in path and not OF_ANY.match(path)]


@pytest.mark.parametrize("stage", INPUTS)
def test_what_a_stage_reads_is_in_the_tables_of_these_tests(bench, stage):
    assert {line[2:] for line in bench.opened[stage] if line.startswith("r ")} >= set(INPUTS[stage])


@pytest.mark.parametrize("stage", OUTPUTS)
def test_killed_at_every_file(bench, stage):
    """Killed before the first, then, by the same command in the same folder, before the second, and so on."""
    bench.clear(stage)
    points = bench.renamed(stage)
    for point in range(1, points + 1, 1 + points // 10):
        ended = bench.runner.run(jobs()[stage], kind="at_replace", at=point, number=signal.SIGKILL)
        if ended.status == 0:  # a training that resumes writes fewer
            break
        assert ended.status == -signal.SIGKILL
        bench.check_whole(stage)
    bench.finish(stage)


@pytest.mark.parametrize("name", POLITE)
@pytest.mark.parametrize("stage", OUTPUTS)
def test_stopped(bench, stage, name):
    bench.clear(stage)
    points = bench.renamed(stage)
    for point in sorted({1, points // 2, points} - {0}):
        fault = {"kind": "at_replace", "at": point, "when": "after" if point == points // 2 else "before"}
        ended = bench.runner.run(jobs()[stage], **fault, number=POLITE[name])
        if ended.status == 0:
            break
        assert ended.status in (128 + POLITE[name], CHECKPOINTED)
        assert_one_line(ended, name)
        assert not list(bench.seen.rglob("*.part*"))
        bench.check_whole(stage)
    bench.finish(stage)
