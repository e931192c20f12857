"""The folder in which stages are disturbed, and what must be found there afterwards."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from small_run import Ended, Runner, content, files_of, jobs, remove_outputs

IN_NAMESPACE = ["unshare", "--mount", "--propagation", "private"]


def can_mount() -> bool:
    """Whether this process may mount a file system where nobody else sees it."""
    command = [*IN_NAMESPACE, "mount", "-t", "tmpfs", "none", "/mnt"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@dataclass
class Bench:
    """The folder in which a stage runs again and again, always under the same path, and what it should write there."""

    runner: Runner
    folder: Path  # of the disturbed stage
    reference: Path  # a copy of the folder after an undisturbed run
    opened: dict[str, list[str]]  # of each stage: "r path", "w path" or "n path" (its final name), in order

    @property
    def seen(self) -> Path:
        """The folder as the runner sees it, who may have another disk there."""
        return Path(f"/proc/{self.runner.process.pid}/root{self.folder}")

    def renamed(self, stage: str) -> int:
        """How many files take their final name in an undisturbed run of a stage."""
        return sum(line.startswith("n ") for line in self.opened[stage])

    def clear(self, stage: str) -> None:
        """Everything as it was before the stage ran."""
        for path in self.seen.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(self.reference, self.seen, dirs_exist_ok=True, symlinks=True)
        remove_outputs(self.seen, stage)

    def check_whole(self, stage: str, complete: bool = False) -> None:
        """Every file under its final name is, to the bit, what an undisturbed run writes; some may be missing."""
        wanted, found = files_of(self.reference, stage), files_of(self.seen, stage)
        if complete:
            assert found.keys() == wanted.keys()
            assert not list(self.seen.rglob("*.part*"))
        for name, path in found.items():
            if path.name == "log.csv" and not complete:  # of a training, a line more after each epoch
                assert content(wanted[name]).startswith(content(path)), name
            else:
                assert content(path) == content(wanted[name]), name

    def finish(self, stage: str) -> None:
        """The same command again: it ends well, with what an undisturbed run writes."""
        again = self.runner.run(jobs()[stage])
        assert again.status == 0, again.said[-3000:]
        self.check_whole(stage, complete=True)


def assert_one_line(ended: Ended, *words: str) -> None:
    """A job that failed has said so in one line of level ERROR that holds these words, and shown no traceback."""
    assert ended.status not in (0, -9), ended.said[-3000:]
    assert "Traceback" not in ended.said and "Exception ignored" not in ended.said, ended.said[-3000:]
    assert len(ended.errors) == 1, ended.said[-3000:]
    for word in words:
        assert word in ended.errors[0]
