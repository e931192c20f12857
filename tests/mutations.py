"""Damage to files, for the fuzzing: of any bytes, and of lines, columns and values of text.

Random, but the same for the same seed.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable
from random import Random

INTS = (0, 1, -1, 2, 7, 12, 255, 2**15, 2**16 - 1, 2**24, 10**6, 2**31 - 1, -(2**31), 2**32 - 1, 10**12, 2**62)
FLOATS = (math.nan, math.inf, -math.inf, -1.0, 0.0, 0.5, 12.0, 3e38, -3e38, 1e-40, 2.0**31)
NUMBERS = [*map(str, INTS), "nan", "inf", "-inf", "1e400", "-1e308", "1e-400", "0x10", "1_0", "9" * 30, "9" * 5000]
WORDS = ["", "''", '"', "'", "'two words'", "#", ",", ";", "@", "_", "-x", "é", "\U0001f4a5", "\u2028", "\ufeff", "\0"]
WORDS += ["a\0b", "\r", "\x85", "\f1", "\x1b[31m", "x" * 9000, "[" * 3000, "[NaN]", "[1,2", "{}", "{x}", "<script>"]
WORDS += ["loop_", "data_", "data_x", "_rlnImageName", "1@", "0@x", "1.5@x", "1e300@x", "1@../../../../etc/passwd"]
WORDS += ["1@/etc/passwd", "../../x", "$(touch touched)", "`touch touched`", "None", "True"]
_RAW = [b"\xff\xfe", b"\xed\xa0\x80", b"\xc3", bytes(4), b"\x1f\x8b", b"BZh9", b"PK\x03\x04", b"\x93NUMPY", b"\x80\x04"]


def anyhow(content: bytes, rng: Random, text: float) -> bytes:
    """One to four changes; of lines and columns with the probability ``text``, else of bytes."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        content = rng.choice(_TEXT if rng.random() < text else _BYTES)(content, rng)
    return content


# of bytes ------------------------------------------------------------------------------------------------------------


def _span(content: bytes, rng: Random) -> tuple[int, int]:
    """Begin and end; near the beginning, where headers are, as often as anywhere."""
    begin = rng.randrange(min(len(content), rng.choice((256, 1100, 10**9))) + 1)
    return begin, min(len(content), begin + rng.choice((1, 2, 4, 8, 64, 1024)))


def _flip(content: bytes, rng: Random) -> bytes:
    begin, _ = _span(content, rng)
    flipped = bytes(byte ^ 1 << rng.randrange(8) for byte in content[begin : begin + 1])
    return content[:begin] + flipped + content[begin + 1 :]


def _insert(content: bytes, rng: Random) -> bytes:
    begin, _ = _span(content, rng)
    return content[:begin] + rng.choice([rng.randbytes(rng.randrange(1, 9)), *_RAW]) + content[begin:]


def _delete(content: bytes, rng: Random) -> bytes:
    begin, end = _span(content, rng)
    return content[:begin] + content[end:]


def _overwrite(content: bytes, rng: Random) -> bytes:
    """A number that is extreme, of any size and order of bytes, in most cases at a multiple of 4."""
    begin, _ = _span(content, rng)
    begin -= begin % 4 if rng.random() < 0.7 else 0
    order, width = rng.choice("<<<>"), rng.choice((1, 2, 4, 4, 8))
    if rng.random() < 0.6:
        value = (rng.choice(INTS) % 2 ** (8 * width)).to_bytes(width, "little" if order == "<" else "big")
    else:
        value = struct.pack(f"{order}{rng.choice('fd')}", rng.choice(FLOATS))
    return content[:begin] + value + content[begin + len(value) :]


def _repeat(content: bytes, rng: Random) -> bytes:
    begin, end = _span(content, rng)
    return content[:end] + content[begin:end] * rng.choice((1, 2, 50)) + content[end:]


def _swap(content: bytes, rng: Random) -> bytes:
    (a, b), (c, d) = sorted((_span(content, rng), _span(content, rng)))
    return content if b > c else content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]


def _cut(content: bytes, rng: Random) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


_BYTES = [_flip, _insert, _delete, _overwrite, _overwrite, _repeat, _swap, _cut]


# of lines, columns and values ----------------------------------------------------------------------------------------


def any_value(rng: Random) -> bytes:
    return rng.choice(_RAW) if rng.random() < 0.1 else rng.choice(NUMBERS + WORDS).encode()


def _lines(content: bytes, rng: Random) -> bytes:
    lines = content.split(b"\n")
    a, b = rng.randrange(len(lines)), rng.randrange(len(lines))
    kind = rng.choice(("repeat", "copy", "delete", "swap", "blank", "many", "label"))
    if kind == "repeat":
        lines.insert(a, lines[b])
    elif kind == "copy":
        lines[a] = lines[b]
    elif kind == "delete":
        del lines[a]
    elif kind == "swap":
        lines[a], lines[b] = lines[b], lines[a]
    elif kind == "blank":
        lines.insert(a, b"")
    elif kind == "many":
        lines[a:a] = [lines[a]] * 300
    elif labels := [at for at, line in enumerate(lines) if line.startswith(b"_")]:  # of STAR: one that stands twice
        lines[rng.choice(labels)] = lines[rng.choice(labels)]
    return b"\n".join(lines)


def _token(content: bytes, rng: Random, pattern: bytes = rb"[^\s,=\"'<>:]+") -> bytes:
    found = [match.span() for match in re.finditer(pattern, content[: 1 << 16])]
    if not found:
        return content
    begin, end = rng.choice(found)
    return content[:begin] + any_value(rng) + content[end:]


def _number(content: bytes, rng: Random) -> bytes:
    return _token(content, rng, rb"-?\d+(\.\d*)?")


def _columns(content: bytes, rng: Random) -> bytes:
    """The same damage to a column of all lines that have as many values as one line."""
    lines = content.split(b"\n")
    count = len(rng.choice(lines).split())
    if count == 0:
        return content
    a, b = rng.randrange(count), rng.randrange(count)
    kind, value = rng.choice(("repeat", "delete", "swap", "set", "copy", "part")), any_value(rng)
    blank = rng.choice((b"\t", b", ", b"\xa0")) if kind == "part" else b" "
    for at, line in enumerate(lines):
        values = line.split()
        if len(values) == count:
            if kind == "repeat":
                values.insert(a, values[a])
            elif kind == "delete":
                del values[a]
            elif kind == "swap":
                values[a], values[b] = values[b], values[a]
            elif kind == "copy":
                values[a] = values[b]
            elif kind == "set":
                values[a] = value
            lines[at] = blank.join(values)
    return b"\n".join(lines)


def _ends(content: bytes, rng: Random) -> bytes:
    return content.replace(b"\n", rng.choice((b"\r\n", b"\r", b"\n\n", b" \n", b"\x0b", b"\0\n")))


_TEXT: list[Callable[[bytes, Random], bytes]] = [_lines, _lines, _token, _token, _token, _number, _columns, _columns]
_TEXT.append(_ends)
