"""Damaged files of every kind that users give: a result or one line of ours, in bounded time and memory.

300 files a kind here; ``tests/faults/test_long_fuzz.py`` reads 10,000 of each (``make test-faults``).
"""

import json
import subprocess
import sys
from pathlib import Path

import damage
import pytest

REFUSED_WHOLE = {  # files that are wrong by design; all others must be read as they stand
    "seg": set(damage.SEGGER_CHANGES) - {"plain", "chain"},
    "map": {"complex"},
    "labels": {"complex", "float", "half", "packed"},  # which hold other than whole numbers
    "config": {"bomb0", "bomb1"},
}


def read_damaged(kind: str, seed: int, count: int, folder: Path) -> dict:
    """What a process of its own says of ``count`` damaged files (``read_damaged.py``)."""
    script = Path(__file__).with_name("read_damaged.py")
    command = [sys.executable, str(script), kind, str(seed), str(count), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=600)
    assert done.returncode == 0, f"status {done.returncode}, of {folder}: {done.stderr[-3000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def check(kind: str, seed: int, count: int, folder: Path) -> None:
    """Nothing but results and refusals, and both of them; no more than 1 GB and some seconds for any."""
    said = read_damaged(kind, seed, count, folder)
    assert not said["wrong"], "\n".join(said["wrong"])
    refused = {Path(name).stem for name, outcome in said["whole"].items() if outcome == "refused"}
    assert refused == REFUSED_WHOLE.get(kind, set()) and set(said["whole"].values()) <= {"read", "refused"}
    assert said["found"]["refused"] > count // 4 and said["found"]["read"] > count // 50  # damage that is none, or all
    assert said["grown_GB"] < 1 and said["slowest_s"] < 5


@pytest.mark.parametrize("kind", damage.KINDS)
def test_damaged_files_are_read_or_refused_in_one_line(kind, tmp_path):
    check(kind, 1, 300, tmp_path)
