"""Which files are the same, to the last bit or to rounding, with another number of threads (docs/trust.md)."""

from __future__ import annotations

from collections.abc import Iterator

import mrcfile
import numpy as np
import pytest
from bench import Bench
from small_run import OUTPUTS, THREADS, Runner, files_of, jobs

# relative difference of maps (L2), where there is any: a training carries rounding on, this one, of few images, to .03
ROUNDED = {"train": 0.1, "reconstruct": 1e-4, "interpret": 1e-4}


@pytest.fixture(scope="module")
def with_two_threads(bench) -> Iterator[Runner]:
    """Beside the bench's own runner, which has one."""
    inside = ["nsenter", "--mount", "--target", str(bench.runner.process.pid)]
    with Runner(bench.folder, inside, dict.fromkeys(THREADS, "2")) as runner:
        yield runner


@pytest.mark.parametrize("stage", OUTPUTS)
def test_two_threads_give_what_one_gives(bench: Bench, with_two_threads, stage):
    bench.clear(stage)
    ended = with_two_threads.run(jobs(threads=2)[stage])
    assert ended.status == 0, ended.said[-2000:]
    if stage not in ROUNDED:
        bench.check_whole(stage, complete=True)
        return
    wanted, found = files_of(bench.reference, stage), files_of(bench.seen, stage)
    assert wanted.keys() == found.keys()
    maps = [name for name in wanted if name.endswith(".mrc") and "resolution" not in name]
    assert maps
    for name in maps:
        one, two = (mrcfile.read(files[name]).astype(np.float64) for files in (wanted, found))
        assert np.linalg.norm(one - two) <= ROUNDED[stage] * np.linalg.norm(one), name
