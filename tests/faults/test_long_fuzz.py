"""10,000 damaged files of every kind; a quick part is in ``tests/test_fuzz.py``."""

import damage
import pytest
from test_fuzz import check


@pytest.mark.parametrize("kind", damage.KINDS)
def test_10_000_damaged_files_are_read_or_refused_in_one_line(kind, tmp_path):
    check(kind, 2, 10_000, tmp_path)
