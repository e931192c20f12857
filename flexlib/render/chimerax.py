"""Texts within ChimeraX's commands, where a space, a semicolon or the end of the line would end them."""

from __future__ import annotations

import re

_PLAIN = re.compile(r"[A-Za-z0-9_./*-]+").fullmatch  # needs no quotes


def chimerax_text(text: str) -> str:
    """``text`` as one word of a ChimeraX command, in quotes where it needs them; escapes are those of Python."""
    if _PLAIN(text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + re.sub(r"[\x00-\x1f\x7f\x85\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", escaped) + '"'
