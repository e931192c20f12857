"""One undisturbed run for all tests."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from bench import IN_NAMESPACE, Bench, can_mount
from small_run import OUTPUTS, Runner, jobs


@pytest.fixture(scope="session")
def bench(tmp_path_factory) -> Iterator[Bench]:
    """After an undisturbed run of all stages."""
    folder, reference = (tmp_path_factory.mktemp(name) for name in ("work", "reference"))
    with Runner(folder, IN_NAMESPACE if can_mount() else []) as runner:
        opened = {}
        for stage, job in jobs().items():
            listing = reference / stage
            ended = runner.run(job, kind="record", folder=str(folder), listing=str(listing))
            assert ended.status == 0, ended.said[-3000:]
            opened[stage] = listing.read_text().splitlines()
            listing.unlink()
        shutil.copytree(folder, reference, dirs_exist_ok=True)
        assert opened.keys() == OUTPUTS.keys()
        yield Bench(runner, folder, reference, opened)
