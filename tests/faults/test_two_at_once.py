"""Two drivers, or two processes of one stage, in one folder."""

import re
import time

import pytest
import yaml
from run_snakemake import snakemake, start_snakemake, wait_for
from small_run import CONFIG, Runner, jobs


@pytest.mark.parametrize("stage", ["prepare", "train", "summarise"])
def test_the_same_stage_twice_takes_turns(bench, stage):
    """The second says that it waits, and starts when the first, which is held at its last file, has ended."""
    bench.clear(stage)
    held = bench.folder / "held"
    with Runner(bench.folder, ["nsenter", "--mount", "--target", str(bench.runner.process.pid)]) as second:
        last = bench.renamed(stage)
        bench.runner.start(jobs()[stage], kind="at_replace", at=last, number=0, witness=str(held))
        deadline = time.monotonic() + 120
        while not held.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        second.start(jobs()[stage])
        while "this job still runs" not in second.said.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        held.unlink()
        first, then = bench.runner.end(), second.end()
    assert (first.status, then.status) == (0, 0), (first.said, then.said)
    bench.check_whole(stage, complete=True)


def test_a_second_driver_is_refused_in_one_line(tmp_path):
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(CONFIG))
    command = ("--configfile", "my.yaml", "--cores", "1")
    log = tmp_path / "first.log"
    first = start_snakemake(tmp_path, log, *command, "sim/particles.star")
    try:
        wait_for("its lock", lambda: list(tmp_path.glob(".snakemake/locks/*")), first, log)
        second = snakemake(tmp_path, *command, "sim/particles.star")
        asked = [snakemake(tmp_path, *command, question) for question in ("--dry-run", "--summary")]
    finally:
        status = first.wait()
    assert status == 0, log.read_text()
    assert second.returncode != 0
    said = [line for line in second.stderr.splitlines() if re.search("ERROR|Lock|Error|Traceback", line)]
    assert len(said) == 1 and said[0].startswith("ERROR") and "tiny" in said[0], second.stderr
    assert [one.returncode for one in asked] == [0, 0], [one.stderr for one in asked]  # they write nothing
