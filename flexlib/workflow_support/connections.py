"""How segments hang together, as text; and which mesh keys fit together."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from flexlib.errors import InputError
from flexlib.workflow_support.settings import MeshSettings

_PAIR = re.compile(r"(\d{1,9})\s*>\s*(\d{1,9})")

_PART = re.compile(r"([^\s:,]{1,64})(?::(-?\d{1,7})(?:-(-?\d{1,7}))?)?")


@dataclass(frozen=True)
class SegmentPart:
    """A chain, or a range of its residues, both ends included."""

    chain: str
    residues: tuple[int, int] | None


def check_mesh_keys(settings: MeshSettings) -> None:
    """Refuse mesh settings that contradict each other or themselves, without reading a file. Raises ``InputError``."""
    if settings.cells < 1:
        raise InputError(f"mesh.cells: must be a positive number of cells across the box, not {settings.cells}")
    if settings.connections is not None and settings.segmentation is None:
        raise InputError("mesh.connections: there is nothing to connect without mesh.segmentation")
    if settings.segments and settings.segmentation is None:
        raise InputError("mesh.segments: name the atomic model that has these chains in mesh.segmentation")
    parse_segments(settings.segments)
    if isinstance(settings.custom, Path) and settings.segmentation is not None:
        raise InputError(
            "mesh.segmentation: a mesh from a file (mesh.custom) brings its own segments; give one of them"
        )
    if settings.connections is not None:
        parse_connections(settings.connections)


def parse_segments(texts: tuple[str, ...]) -> list[list[SegmentPart]]:
    """What makes up each segment, of texts such as ``A``, ``B,C`` or ``D:1-200,E``. Raises ``InputError``."""
    segments = []
    for text in texts:
        parts = []
        for item in text.split(","):
            match = _PART.fullmatch(item.strip())
            if not match:
                raise InputError(
                    f"mesh.segments: {text!r} is not understood; write chains and ranges of residues such as A, 'B,C' "
                    "or 'D:1-200,E'"
                )
            chain, first, last = match.groups()
            last = first if last is None else last
            if first is not None and int(first) > int(last):
                raise InputError(f"mesh.segments: {text!r}: the range {first}-{last} is empty")
            parts.append(SegmentPart(chain, None if first is None else (int(first), int(last))))
        segments.append(parts)
    return segments


def parse_connections(text: str, ids: tuple[int, ...] | None = None) -> tuple[tuple[int, int], ...]:
    """Pairs of joined segments from text such as ``0>3, 0>4, 3>2``: a tree, its root first.

    ``X>Y`` hangs segment Y on segment X; X is the root (first in the text) or hangs on something named before. A
    number alone is a further root: a segment that is joined to nothing, or that others hang on. Every segment of
    ``ids`` must be reached; with None, before the file is read, only the text itself is checked.

    Raises ``InputError`` that names what is unknown, not reached, or reached twice (a cycle).
    """
    pairs: list[tuple[int, int]] = []
    reached: set[int] = set()

    def check(one: int) -> int:
        if ids is not None and one not in ids:
            known = ", ".join(map(str, ids))
            raise InputError(f"mesh.connections: unknown segment {one}; the segmentation has {known}")
        return one

    for number, item in enumerate(text.split(",")):
        item = item.strip()
        match = _PAIR.fullmatch(item)
        if item.isdecimal() and len(item) < 10:
            root = check(int(item))
            if root in reached:
                raise InputError(f"mesh.connections: segment {root} is a root, but is reached already")
            reached.add(root)
        elif match:
            parent, child = check(int(match[1])), check(int(match[2]))
            if number == 0:
                reached.add(parent)
            if parent not in reached:
                raise InputError(
                    f"mesh.connections: {item}: segment {parent} is not reached by what stands before; begin at the "
                    "root and go outwards"
                )
            if child in reached:
                raise InputError(
                    f"mesh.connections: {item}: segment {child} is joined already, this closes a cycle; connections "
                    "are a tree"
                )
            reached.add(child)
            pairs.append((parent, child))
        else:
            raise InputError(f"mesh.connections: {item!r} is not understood; write pairs such as 0>3, 0>4, 3>2")
    if unreached := [one for one in ids or () if one not in reached]:
        one = unreached[0]
        raise InputError(
            f"mesh.connections: segment {one} is not reached from the root: join it to a neighbour, or add {one} alone "
            "to let it move freely"
        )
    return tuple(pairs)
