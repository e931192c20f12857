"""Ten thousand damaged files and more for each reader: ``tests/test_fuzz_readers.py`` with another seed (minutes)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

import fuzzing

COUNT, SEED = 10_500, 1


@pytest.mark.parametrize("reader", fuzzing.READERS)
def test_ten_thousand_damaged_files_are_read_or_refused_in_one_line(tmp_path, reader):
    fuzzing.write_seeds(tmp_path)
    outcome = fuzzing.run(tmp_path, SEED, COUNT, [reader], seconds=900)[reader]
    print(f"{reader}: {outcome.read} read, {outcome.refused} refused, {outcome.grown_bytes >> 20} MB")
    assert not outcome.wrong, "\n".join(outcome.wrong)
    assert outcome.read + outcome.refused == COUNT and outcome.read > 100 and outcome.refused > 1000
    assert outcome.grown_bytes < fuzzing.MEMORY_BYTES
