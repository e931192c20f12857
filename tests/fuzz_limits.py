"""What a damaged file may do to a reader: nothing but be read, or be refused in one line, in little memory and time.

Imports little, so that a process that tries this out is quick to start.
"""

from __future__ import annotations

import io
import logging
import resource
import signal
import traceback
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from flexlib.errors import InputError

MEMORY_BYTES = 2**30  # beyond what the libraries take
SECONDS = 5  # of the processor, for one input


class TooLong(BaseException):
    """An input took longer than ``SECONDS``: no parser's ``except Exception`` may swallow it."""


def _stop(*_: object) -> None:
    raise TooLong


def watch() -> None:
    """Stop what takes too long, and let no warning pass: it is printed, and so seen."""
    signal.signal(signal.SIGPROF, _stop)
    warnings.simplefilter("always")
    logging.disable()


def complaint(read: Callable[[Path], object], path: Path) -> str | None:
    """What is wrong with how a file is read; "" where it is refused as it should be, None where it is read."""
    printed, refusal = io.StringIO(), ""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with redirect_stdout(printed), redirect_stderr(printed):
            read(path)
    except InputError as error:
        refusal = str(error)
        if len(refusal.splitlines()) != 1 or str(path) not in refusal or len(refusal) > 9000:
            return f"no line that names the file: {refusal[:300]!r}"
    except (Exception, TooLong) as error:
        place = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in place if "flexlib" in frame.filename]
        where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in [*place[:-4:-1], *ours[-1:]])
        return f"{type(error).__name__}: {str(error)[:150]!r} at {where}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if printed.getvalue():
        return f"printed {printed.getvalue()[:300]!r}"
    return "" if refusal else None


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
