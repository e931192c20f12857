"""Faults inside the process that they befall, each at a point of its course that is the same in every run."""

import builtins
import errno
import io
import os
import signal
import sys
import time
from pathlib import Path

OUTPUT_MODES = os.O_WRONLY | os.O_RDWR


def install(kind, **arguments):
    """Let one fault happen in this process."""
    globals()[kind](**arguments)


def at_replace(at, number, when="before", witness=None):
    """Send this process the signal ``number`` (0: none) at its ``at``-th file (from 1) that takes its final name.

    Just before it does, when all bytes are written, or just after. ``witness``, a file, says it was so; where
    ``number`` is 0 the process waits there until the witness is removed.
    """
    replace, done = Path.replace, [0]

    def counted(self, target):
        done[0] += 1
        if done[0] == at and when == "before":
            strike(number, witness)
        result = replace(self, target)
        if done[0] == at and when == "after":
            strike(number, witness)
        return result

    Path.replace = counted


def strike(number, witness):
    """See ``at_replace``."""
    if witness:
        Path(witness).touch()
    if number:
        os.kill(os.getpid(), number)
        for _ in range(2):  # Python handles a signal between two instructions
            time.sleep(0)
    while not number and Path(witness).exists():
        time.sleep(0.01)


class _FailingRaw(io.FileIO):
    """A file on a disk with a bad sector: reading beyond ``good`` bytes fails with EIO."""

    good = 0

    def readinto(self, buffer):
        if self.tell() + len(buffer) > self.good:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().readinto(buffer)

    def readall(self):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def read(self, size=-1):
        if size < 0 or self.tell() + size > self.good:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().read(size)


def read_error(path, good):
    """Let reads of the file at ``path`` fail beyond its first ``good`` bytes."""
    original, wanted = io.open, Path(path).resolve()

    def opened(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None):
        is_path = isinstance(file, (str, bytes, os.PathLike))
        if not is_path or set(mode) & set("wax+") or Path(os.fsdecode(file)).resolve() != wanted:
            return original(file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw = _FailingRaw(os.fsdecode(file), "r")
        raw.good = good
        if buffering == 0:
            return raw
        buffered = io.BufferedReader(raw, 512)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    builtins.open = io.open = opened


def after_open(path, at, action):
    """Do something to the file at ``path`` when it is about to be opened the ``at``-th time (from 1).

    ``action`` is "shrink" (to half its length) or "unmount" (its folder is gone).
    """
    wanted, seen = Path(path).resolve(), [0]

    def hook(event, details):
        if event != "open" or not isinstance(details[0], str) or seen[0] >= at:
            return
        if os.path.abspath(details[0]) == str(wanted):  # noqa: PTH100 (resolve() would open files in some Pythons)
            seen[0] += 1
            if seen[0] == at and action == "shrink":
                os.truncate(wanted, wanted.stat().st_size // 2)
            elif seen[0] == at:
                wanted.parent.rename(wanted.parent.with_suffix(".unmounted"))

    sys.addaudithook(hook)


def record(folder, listing):
    """List in the file ``listing`` every path below ``folder`` that Python opens, after "w" or "r", or renames to."""
    descriptor = os.open(listing, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    below = str(Path(folder).resolve()) + os.sep

    def hook(event, details):
        if event not in ("open", "os.rename") or not isinstance(details[0], (str, os.PathLike)):
            return
        path = os.path.abspath(details[1 if event == "os.rename" else 0])  # noqa: PTH100
        if path.startswith(below):
            how = "n" if event == "os.rename" else "w" if details[2] & OUTPUT_MODES else "r"
            os.write(descriptor, f"{how} {path.removeprefix(below)}\n".encode())

    sys.addaudithook(hook)


def file_size_limit(most):
    """Let no file become larger than ``most`` bytes: what is written beyond fails, as where there is no room."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
