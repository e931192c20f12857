"""Ten thousand damaged files for each reader: ``tests/test_fuzz_readers.py`` with another seed (a minute or two)."""

from __future__ import annotations

import fuzzing
import pytest

COUNT, SEED = 10_000, 1


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, fuzzing.Outcome]:
    return fuzzing.run(tmp_path_factory.mktemp("fuzz"), SEED, COUNT, seconds=900)


@pytest.mark.parametrize("reader", fuzzing.READERS)
def test_ten_thousand_damaged_files_are_read_or_refused_in_one_line(outcomes, reader):
    fuzzing.check(outcomes[reader], COUNT)
