"""Commands of ChimeraX, as text."""

from __future__ import annotations

import re


def chimerax_word(text: str) -> str:
    """``text`` as one word of a ChimeraX command, whatever it holds: quoted, if need be, as ChimeraX unquotes it.

    Within its quotes nothing ends a command or begins another. Source: ``quote_if_necessary`` of ChimeraX's
    ``core.commands.cli``, whose words are read back as Python's strings are.
    """
    if re.fullmatch(r"[\w./*~+][\w./*~+-]*", text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    safe = "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in escaped)
    return f'"{safe}"'
