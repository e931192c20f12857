"""The spellings of ``generate.series``. Reading them needs no file and no model: the workflow asks before any job."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from flexlib.errors import InputError

FILE_SUFFIXES = (".csv", ".txt", ".npy", ".star", ".cs")
SPELLINGS = "axes, curve, kmeans 8, between 12 340, between -1,0 1,0.5, or a .csv, .txt, .npy, .star or .cs file"
_COUNT = re.compile(r"\d{1,15}")


@dataclass(frozen=True)
class SeriesRequest:
    """One spelling of ``generate.series``, understood."""

    kind: str  # "axes", "curve", "kmeans", "between" or "file"
    count: int = 0  # of clusters
    ends: tuple[int | tuple[float, ...], ...] = ()  # a particle's row in the input file, from 1, or coordinates
    path: Path = Path()

    @property
    def name(self) -> str:
        """Of the folder and files of the series (axes have theirs, axis_1 and so on)."""
        if self.kind == "kmeans":
            return f"kmeans_{self.count}"
        if self.kind == "between" and all(isinstance(end, int) for end in self.ends):
            return "between_{}_{}".format(*self.ends)
        if self.kind == "file":
            # never the folder above
            return re.sub(r"[^\w.-]+", "_", self.path.stem).lstrip(".-") or "points"
        return self.kind


def parse_series(value: str | Sequence[str]) -> list[SeriesRequest]:
    """Understand ``generate.series``, one spelling or a list of them.

    ``axes``; ``curve``; ``kmeans N``; ``between A B``, where A and B are each a particle (its row in the input file,
    from 1) or coordinates such as ``-1,0.5``; or the path of a file of points. A number with a point or sign is a
    coordinate: ``between -1 1.0`` is for one latent dimension.

    Raises
    ------
    InputError
        Says which spelling is not understood and which are.
    """
    spellings = [value] if isinstance(value, str) else list(value)
    if not spellings:
        raise InputError(f"generate.series: the list is empty; known are {SPELLINGS}")
    return [_parse(spelling) for spelling in spellings]


def _parse(spelling: str) -> SeriesRequest:
    words = spelling.split() if isinstance(spelling, str) else []
    if words in (["axes"], ["curve"]):
        return SeriesRequest(words[0])
    if len(words) == 2 and words[0] == "kmeans" and _COUNT.fullmatch(words[1]) and int(words[1]) > 0:
        return SeriesRequest("kmeans", count=int(words[1]))
    if words[:1] == ["between"]:
        if len(words) != 3:
            raise InputError(f"generate.series: {spelling!r}: two particles or points are needed, as in between 12 340")
        return SeriesRequest("between", ends=tuple(_parse_end(word, spelling) for word in words[1:]))
    if isinstance(spelling, str) and Path(spelling).suffix.lower() in FILE_SUFFIXES:
        return SeriesRequest("file", path=Path(spelling))
    raise InputError(f"generate.series: {spelling!r} is not understood; known are {SPELLINGS}")


def _parse_end(word: str, spelling: str) -> int | tuple[float, ...]:
    if word.isdecimal():
        if not _COUNT.fullmatch(word) or int(word) < 1:
            raise InputError(f"generate.series: {spelling!r}: particles are counted from 1, in up to 15 digits")
        return int(word)
    return parse_latents(word, f"generate.series: {spelling!r}")


def parse_latents(text: str, where: str) -> tuple[float, ...]:
    """Coordinates from text such as ``0.5,-1``. Raises InputError, which begins with ``where``."""
    try:
        point = tuple(float(part) for part in text.split(","))
    except ValueError:
        point = (math.nan,)
    if not all(map(math.isfinite, point)):
        raise InputError(f"{where}: {text!r} is not a point such as 0.5,-1 (a number for each latent dimension)")
    return point


def check_series(value: str | Sequence[str], latent_dims: Iterable[int]) -> None:
    """Refuse a spelling that is not understood, or coordinates that do not fit the models to be trained.

    Raises
    ------
    InputError
        In one line; no file is read.
    """
    for request in parse_series(value):
        for end in request.ends:
            wrong = [dims for dims in latent_dims if isinstance(end, tuple) and len(end) != dims]
            if isinstance(end, tuple) and wrong:
                text = ",".join(f"{number:g}" for number in end)
                raise InputError(f"generate.series: between: the point {text} has {len(end)} of {wrong[0]} coordinates")


def count_maps(value: str | Sequence[str], frames: int, latent_dims: int) -> int:
    """How many maps ``generate.series`` makes of a point; a file of points is counted as ``frames``."""
    odd = frames + 1 - frames % 2
    counts = {"axes": odd * latent_dims, "curve": frames, "between": frames, "file": frames}
    return sum(counts.get(request.kind, request.count) for request in parse_series(value))


def series_files(value: str | Sequence[str]) -> Iterator[Path]:
    """The files that ``generate.series`` names. Raises InputError as ``parse_series``."""
    return (request.path for request in parse_series(value) if request.kind == "file")
