"""STAR files as text: a file is read into rows of bytes, and only the columns asked for become numbers.

What is written back is the input's own text: values that nobody touched keep their formatting, columns and blocks that
flexlib does not know stay, and so do comments. A table is a ``loop_`` whose rows are one line each (as RELION, Warp,
CryoSPARC's exports and pyem write it), or the ``_label value`` pairs of a block.

By hand: the packages starfile and gemmi were considered; both lose comments, layout or quotes when they write.

Source: S. R. Hall, J. Chem. Inf. Comput. Sci. 31, 326 (1991), as far as RELION's ``metadata_table.cpp`` goes.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from flexlib.errors import InputError
from flexlib.files import atomic_path, reading
from flexlib.untrusted import parsing

_BLANK = np.zeros(256, bool)
_BLANK[list(b" \t\r\n\f\v")] = True
# a quote ends a value only where a blank follows it
_TOKEN = re.compile(rb'"([^\r\n]*?)"(?=\s|$)|\'([^\r\n]*?)\'(?=\s|$)|(#.*)|(\S+)')
_CHUNK_ROWS = 50_000
_CHUNK_BYTES = 2**24
_NAN = ["nan", "NaN", "NAN", "-nan"]
_ENCODING = ("utf-8", "surrogateescape")  # any byte survives reading and writing


@dataclass(frozen=True)
class TextTable:
    """Where one table stands in the file: a loop's n rows as byte ranges, or the values of ``_label value`` pairs."""

    block: str  # the name after ``data_``
    labels: tuple[str, ...]  # without the leading underscore
    labels_end: int  # offset just after the line of the last label
    starts: np.ndarray  # (n,) int64 offset of each row's first byte that is not blank
    ends: np.ndarray  # (n,) int64 offset after its last byte that is not blank
    pairs: tuple[bytes, ...] = ()  # values where the block is no loop

    def __len__(self) -> int:
        return 1 if self.pairs else len(self.starts)


@dataclass(frozen=True)
class StarText:
    """A whole STAR file as it stands."""

    path: Path
    content: bytes
    tables: tuple[TextTable, ...]

    def table(self, block: str) -> TextTable | None:
        """The first table of ``data_<block>``, loops before pairs."""
        found = sorted((table for table in self.tables if table.block == block), key=lambda table: bool(table.pairs))
        return found[0] if found else None

    @cached_property
    def particles(self) -> TextTable:
        """The table of particles: data_particles, else the first that names images.

        Raises InputError where there is none or it has no rows.
        """
        named = [table for table in self.tables if "rlnImageName" in table.labels]
        if not named:
            raise InputError(f"{self.path}: no particle table: no block has the column rlnImageName")
        table = next((table for table in named if table.block == "particles"), named[0])
        if len(table) == 0:
            raise InputError(f"{self.path}: the particle table data_{table.block} has no rows")
        self._refuse_twice(table, table.labels)
        return table

    def cells(self, table: TextTable, rows: np.ndarray) -> Iterator[list[bytes]]:
        """The values of each row of ``rows``, quotes removed, comments left out."""
        if table.pairs:
            yield list(table.pairs)
            return
        for row in rows:
            yield [value for value, _ in _tokens(self.content[table.starts[row] : table.ends[row]])]

    def frame(self, table: TextTable, columns: Sequence[str] | None = None, text: Sequence[str] = ()) -> pd.DataFrame:
        """The table's ``columns`` (those it has; default all): numbers where a whole column is numeric, else text.

        ``text`` names columns that stay text in any case. Raises InputError, naming the row, where a row has more or
        fewer values than the table has columns.
        """
        labels = [name for name in table.labels if columns is None or name in columns]
        self._refuse_twice(table, labels)
        if table.pairs or self._has_quotes_or_gaps(table):
            return self._frame_by_tokens(table, labels, text)
        self._check_counts(table)
        index = {table.labels.index(name): name for name in labels}
        if not index:
            return pd.DataFrame(index=range(len(table)))
        try:
            with parsing(self.path, f"table data_{table.block}"):
                return self._frame_at_once(table, index, text).rename(columns=index)[labels]
        except InputError as error:
            if isinstance(error.__cause__, UnicodeError):  # pandas holds no text that is not UTF-8
                return self._frame_by_tokens(table, labels, text)
            raise

    def _frame_at_once(self, table: TextTable, index: Mapping[int, str], text: Sequence[str]) -> pd.DataFrame:
        """The columns at ``index``, of a table in which blanks part all values and lines all rows."""
        frame = pd.read_csv(
            io.BytesIO(memoryview(self.content)[table.starts[0] : table.ends[-1]]),
            sep=r"\s+",
            header=None,
            usecols=list(index),
            dtype={at: str for at, name in index.items() if name in text},
            keep_default_na=False,
            na_values={at: _NAN for at, name in index.items() if name not in text},
            quoting=csv.QUOTE_NONE,
            encoding=_ENCODING[0],
            encoding_errors=_ENCODING[1],
            low_memory=False,
        )
        for at in frame:
            if isinstance(frame[at].iloc[0], int):  # no numpy.int64: whole numbers too large for one
                frame[at] = [float(str(one)) for one in frame[at]]
        return frame

    def _refuse_twice(self, table: TextTable, labels: Sequence[str]) -> None:
        if len(set(labels)) < len(labels):
            name = next(name for at, name in enumerate(labels) if name in labels[:at])
            raise InputError(f"{self.path}: data_{table.block}: the column {name} stands twice: which is meant?")

    def _has_quotes_or_gaps(self, table: TextTable) -> bool:
        """Whether rows hold quotes, comments or odd blanks, or lines that are no rows stand between them."""
        if len(table) == 0:
            return True
        start, end = int(table.starts[0]), int(table.ends[-1])
        if any(self.content.find(mark, start, end) >= 0 for mark in (b'"', b"'", b"#", b"\f", b"\v", b"\0")):
            return True
        if self.content.count(b"\r", start, end) != self.content.count(b"\r\n", start, end):
            return True  # blanks to us, and the ends of lines to others
        return self.content.count(b"\n", start, end) != len(table) - 1

    def _check_counts(self, table: TextTable) -> None:
        bytes_ = np.frombuffer(self.content, np.uint8)
        first = 0
        while first < len(table):
            last = int(np.searchsorted(table.starts, table.starts[first] + _CHUNK_BYTES, "right"))
            start = int(table.starts[first])
            blank = _BLANK[bytes_[start : int(table.ends[last - 1])]]
            begins = np.flatnonzero(blank[:-1] & ~blank[1:]) + 1 + start
            counts = np.diff(np.searchsorted(begins, np.append(table.starts[first:last], table.ends[last - 1] + 1)))
            counts[0] += 1  # the chunk's first byte begins a value too
            self._refuse_counts(table, counts, first)
            first = last

    def _refuse_counts(self, table: TextTable, counts: np.ndarray, first: int = 0) -> None:
        wrong = counts != len(table.labels)
        if wrong.any():
            row = int(np.argmax(wrong))
            raise InputError(
                f"{self.path}: data_{table.block}, row {first + row + 1}: {counts[row]} values for "
                f"{len(table.labels)} columns"
            )

    def _frame_by_tokens(self, table: TextTable, labels: list[str], text: Sequence[str]) -> pd.DataFrame:
        """As ``frame``, value by value: for quotes, comments and pairs."""
        index = [table.labels.index(name) for name in labels]
        chosen: list[list[bytes]] = []
        counts = np.empty(len(table), np.int64)
        for row, values in enumerate(self.cells(table, np.arange(len(table)))):
            counts[row] = len(values)
            chosen.append([values[at] for at in index] if len(values) == len(table.labels) else [])
        self._refuse_counts(table, counts)
        columns: list[pd.Series] = []
        for at, name in enumerate(labels):
            values = pd.Series([row[at].decode(*_ENCODING) for row in chosen], dtype=object)
            shown = pd.Series([row[at].decode(errors="replace") for row in chosen], dtype=object)
            absent = shown.isin(_NAN)
            numbers = pd.to_numeric(shown.mask(absent, "nan"), errors="coerce") if name not in text else None
            numeric = numbers is not None and not (numbers.isna() & ~absent).any()
            columns.append(numbers if numeric else values)
        frame = pd.DataFrame(dict(enumerate(columns)), index=range(len(table)))
        frame.columns = pd.Index(labels, dtype=object)  # names may hold what is not UTF-8
        return frame

    def write(
        self,
        path: str | Path,
        table: TextTable,
        rows: np.ndarray | None = None,
        columns: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Write the file again, atomically, with other rows or further columns of ``table``; all else as it stood.

        Parameters
        ----------
        rows
            (m,) rows to keep, in the order wanted, repeats allowed; None keeps all, with the comments between them.
        columns
            Further columns, m values each as text; one that the table has already is replaced.

        Raises
        ------
        InputError
            A row has fewer or more values than the table has columns.
        """
        if table.pairs:
            raise InputError(f"{self.path}: data_{table.block} is not a loop_: its rows cannot be chosen or extended")
        columns = columns or {}
        new = [name for name in columns if name not in table.labels]
        order = np.arange(len(table)) if rows is None else np.asarray(rows)
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            file.write(self.content[: table.labels_end])
            file.write(self._label_lines(table, new))
            first_line = self._line_start(int(table.starts[0])) if len(table) else table.labels_end
            file.write(self.content[table.labels_end : first_line])
            body_end = self._line_end(int(table.ends[-1])) if len(table) else table.labels_end
            if rows is None and not columns:
                file.write(self.content[first_line:body_end])
            else:
                for first in range(0, len(order), _CHUNK_ROWS):
                    chunk = slice(first, first + _CHUNK_ROWS)
                    lines = self._lines(table, order[chunk], keep_gaps=rows is None)
                    if columns:
                        values = {name: column[chunk] for name, column in columns.items()}
                        lines = self._extended(table, order[chunk], lines, values)
                    file.write(b"".join(lines))
            file.write(self.content[body_end:])

    @cached_property
    def _newline(self) -> bytes:
        return b"\r\n" if b"\r\n" in self.content[:4096] else b"\n"

    def _line_start(self, offset: int) -> int:
        return self.content.rfind(b"\n", 0, offset) + 1

    def _line_end(self, offset: int) -> int:
        """Offset after the line's end."""
        found = self.content.find(b"\n", offset)
        return len(self.content) if found < 0 else found + 1

    def _label_lines(self, table: TextTable, new: list[str]) -> bytes:
        if not new:
            return b""
        before = self.content[: table.labels_end]
        last = before.rstrip(b"\r\n").rsplit(b"\n", 1)[-1]
        numbered = re.search(rb"#\d+\s*$", last) is not None
        lines = [
            f"_{name} #{number} " if numbered else f"_{name}" for number, name in enumerate(new, len(table.labels) + 1)
        ]
        start = b"" if before.endswith(b"\n") else self._newline
        return start + b"".join(line.encode() + self._newline for line in lines)

    def _lines(self, table: TextTable, rows: np.ndarray, keep_gaps: bool) -> list[bytes]:
        """Whole lines, ends included; with ``keep_gaps`` and the lines up to the next row (comments, blank lines)."""
        content = self.content
        starts = [self._line_start(start) for start in table.starts[rows].tolist()]
        if keep_gaps:
            last = int(rows[-1])
            after = (
                self._line_start(int(table.starts[last + 1]))
                if last + 1 < len(table)
                else self._line_end(int(table.ends[last]))
            )
            ends = [*starts[1:], after]
        else:
            ends = [self._line_end(end) for end in table.ends[rows].tolist()]
        lines = [content[start:end] for start, end in zip(starts, ends, strict=True)]
        return [line if line.endswith(b"\n") else line + self._newline for line in lines]

    def _extended(
        self,
        table: TextTable,
        rows: np.ndarray,
        lines: list[bytes],
        columns: Mapping[str, Sequence[str]],
    ) -> list[bytes]:
        """The ``lines`` of ``rows`` with the values of ``columns`` put in: in their column, or after the last value."""
        column_of = {name: table.labels.index(name) for name in columns if name in table.labels}
        new = [columns[name] for name in columns if name not in column_of]
        added = [" " + " ".join(values) for values in zip(*new, strict=True)] if new else [""] * len(lines)
        result = []
        for at, line in enumerate(lines):
            row, newline, rest = line.partition(b"\n")
            end = len(row.rstrip())
            if column_of or b"#" in row:
                spans = [span for _, span in _tokens(row)]
                if len(spans) != len(table.labels):
                    counts = np.array([len(spans)])
                    self._refuse_counts(table, counts, int(rows[at]))
                end = spans[-1][1]
                for name in sorted(column_of, key=lambda name: -column_of[name]):
                    first, last = spans[column_of[name]]
                    value = columns[name][at].encode(*_ENCODING)
                    row, end = row[:first] + value + row[last:], end + len(value) - (last - first)
            result.append(row[:end] + added[at].encode(*_ENCODING) + row[end:] + newline + rest)
        return result


def _tokens(row: bytes) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """The values of a line, quotes removed, with their places in it; a comment ends the line."""
    for match in _TOKEN.finditer(row):
        double, single, comment, plain = match.groups()
        if comment is not None:
            return
        value = next(group for group in (double, single, plain) if group is not None)
        yield value, match.span()


def read_star_text(path: str | Path) -> StarText:
    """Read a STAR file and find its tables. Raises InputError where the file cannot be read."""
    path = Path(path)
    with reading(path):
        content = path.read_bytes()
    return StarText(path, content, tuple(_find_tables(content)))


def _find_tables(content: bytes) -> Iterator[TextTable]:
    starts, ends = _line_ranges(content)
    bytes_ = np.frombuffer(content, np.uint8)
    filled = np.flatnonzero(starts < ends)  # blank lines mean nothing
    starts, ends = starts[filled], ends[filled]
    first = bytes_[starts] if len(starts) else np.empty(0, np.uint8)
    lines = np.flatnonzero(first != ord("#"))
    starts, ends, first = starts[lines], ends[lines], first[lines]
    keywords = [
        line
        for line in np.flatnonzero((first == ord("d")) | (first == ord("l"))).tolist()
        if re.fullmatch(rb"data_\S*|loop_", content[starts[line] : ends[line]])
    ]
    block = ""
    for line, after in zip(keywords, [*keywords, len(starts)][1:], strict=True):
        word = content[starts[line] : ends[line]]
        labels, last = [], line + 1
        while last < after and first[last] == ord("_"):
            labels.append(content[starts[last] : ends[last]])
            last += 1
        if word != b"loop_":
            block = word[len("data_") :].decode(*_ENCODING)
        if not labels:
            continue
        tokens = [[value for value, _ in _tokens(label)] for label in labels]
        names = tuple(values[0][1:].decode(*_ENCODING) for values in tokens)
        labels_end = content.find(b"\n", ends[last - 1]) + 1 or len(content)
        if word == b"loop_":
            yield TextTable(block, names, labels_end, starts[last:after], ends[last:after])
        else:
            pairs = tuple(values[1] if len(values) > 1 else b"" for values in tokens)
            yield TextTable(block, names, labels_end, starts[:0], ends[:0], pairs)


def _line_ranges(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """(lines,) int64 offsets of every line without the blanks around it: first byte, and after the last."""
    bytes_ = np.frombuffer(content, np.uint8)
    breaks = [
        np.flatnonzero(bytes_[start : start + _CHUNK_BYTES] == ord("\n")) + start
        for start in range(0, len(bytes_), _CHUNK_BYTES)
    ]
    ends = np.concatenate([*breaks, [len(bytes_)]]).astype(np.int64)
    starts = np.concatenate([[0], ends[:-1] + 1])
    if content.startswith(b"\xef\xbb\xbf"):
        starts[0] = 3
    for sign, edge in ((1, starts), (-1, ends)):  # move both edges inwards over blanks
        inside = 0 if sign == 1 else -1
        active = np.flatnonzero(starts < ends)
        while len(active):
            active = active[_BLANK[bytes_[edge[active] + inside]]]
            edge[active] += sign
            active = active[starts[active] < ends[active]]
    return starts, ends
