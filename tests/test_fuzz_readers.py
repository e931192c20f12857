"""Damaged files of every kind that is read: a result or one line that names the file, in bounded time and memory.

300 inputs a reader here; ``tests/faults/test_fuzz_readers_long.py`` has 10,000 of each.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import fuzzing
import pytest

COUNT, SEED = 300, 20


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, fuzzing.Outcome]:
    return fuzzing.run(tmp_path_factory.mktemp("fuzz"), SEED, COUNT, seconds=240)


@pytest.mark.parametrize("reader", fuzzing.READERS)
def test_damaged_files_are_read_or_refused_in_one_line(outcomes, reader):
    fuzzing.check(outcomes[reader], COUNT)


FAULTY = """
import sys, warnings
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import fuzz_limits, numpy
from flexlib.errors import InputError

def hangs(path):
    while True:
        try: sum(range(1000))
        except Exception: pass  # as parsers do
def raises(path): {}["key"]
def names_nothing(path): raise InputError("something is wrong")
def prints(path): print("read", file=sys.stderr)
def warns(path): warnings.warn("odd", RuntimeWarning)
def is_hungry(path): numpy.ones(2**28)
def refuses(path): raise InputError(f"{path}: bad")
def reads(path): return path

fuzz_limits.SECONDS = 0.2
fuzz_limits.watch()
fuzz_limits.limit_memory()
for read in (hangs, raises, names_nothing, prints, warns, is_hungry, refuses, reads):
    print(repr(fuzz_limits.complaint(read, Path("x"))))
"""


def test_the_harness_sees_what_it_is_there_to_find():
    """Readers with each of the faults, one that refuses as it should, and one that reads."""
    tests = str(Path(__file__).parent)
    done = subprocess.run([sys.executable, "-c", FAULTY, tests], capture_output=True, text=True, check=True)
    *seen, refused, read = map(ast.literal_eval, done.stdout.splitlines())
    wanted = ("TooLong", "KeyError", "no line that names the file", "printed", "printed", "MemoryError")
    assert all(map(str.startswith, seen, wanted)) and len(seen) == len(wanted), seen
    assert refused == "" and read is None
