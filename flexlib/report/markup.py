"""Small pieces of HTML; everything that comes from files or settings passes through ``text``."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable
from typing import Any

import plotly.graph_objects as go

NONE = "\N{EN DASH}"  # shown where there is no value


def text(value: Any) -> str:
    """``value`` as escaped text."""
    return html.escape(str(value), quote=True)


def missing(sentence: str) -> str:
    """A sentence in place of something that is not there."""
    return f'<p class="missing">{text(sentence)}</p>'


def image(data: bytes, alt: str, caption: str, kind: str = "png") -> str:
    """An embedded picture with its caption; ``caption`` is HTML."""
    source = base64.b64encode(data).decode()
    return (
        f'<figure><img alt="{text(alt)}" src="data:image/{kind};base64,{source}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def plot(figure: go.Figure, name: str, caption: str) -> str:
    """An interactive figure that page.js draws; ``name`` is its unique id, ``caption`` is HTML."""
    data = data_block(f"{name}-data", figure.to_json())
    box = f'<div class="plot" id="{name}" style="min-height:{figure.layout.height}px"></div>'
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f"<figure>{box}{data}{below}</figure>"


def data_block(name: str, content: str) -> str:
    """JSON text that a script can read; it cannot end its element early."""
    safe = content.replace("</", "<\\/").replace("<!--", "\\u003c!--")
    return f'<script type="application/json" id="{name}">{safe}</script>'


def json_block(name: str, content: Any) -> str:
    """``content`` as a JSON data block without spaces."""
    return data_block(name, json.dumps(content, separators=(",", ":")))


def table(head: Iterable[str], rows: Iterable[Iterable[Any]], chosen: Iterable[bool] = ()) -> str:
    """A table; cells are escaped, rows flagged in ``chosen`` are highlighted."""
    flags = list(chosen)
    lines = ["<tr>" + "".join(f"<th>{text(cell)}</th>" for cell in head) + "</tr>"]
    for number, row in enumerate(rows):
        mark = ' class="chosen"' if number < len(flags) and flags[number] else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def tile(label: str, value: str, note: str = "", key: bool = False) -> str:
    """One number of the summary."""
    mark = " key" if key else ""
    return (
        f'<div class="tile{mark}"><div class="label">{text(label)}</div><div class="value">{text(value)}</div>'
        f'<div class="note">{text(note)}</div></div>'
    )


def grid(*parts: str, kind: str = "") -> str:
    """Parts side by side where the window is wide enough; ``kind`` is a further class of page.css."""
    return f'<div class="{f"grid {kind}".strip()}">{"".join(parts)}</div>'


def number(value: Any, digits: int = 3, unit: str = "") -> str:
    """A number with ``digits`` significant digits and its unit; a dash where there is none."""
    try:
        value = float(value)
    except (TypeError, ValueError):
        return NONE
    if value != value:
        return NONE
    if value == int(value) and abs(value) >= 1000:
        return f"{value:,.0f} {unit}".rstrip()
    rounded = f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"
    return f"{rounded} {unit}".rstrip()


def angstrom(value: float | None) -> str:
    """A resolution with 0.01 A below 10 A, else 0.1 A, without the unit."""
    return NONE if value is None else f"{value:.{2 if value < 10 else 1}f}"


def duration(seconds: Any) -> str:
    """Seconds as s, min or h."""
    try:
        seconds = float(seconds)
    except (TypeError, ValueError):
        return NONE
    if seconds != seconds:
        return NONE
    if seconds < 90:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
