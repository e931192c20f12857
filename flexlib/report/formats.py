"""Numbers as readers want them: rounded, with their unit, a dash where there is none."""

from __future__ import annotations

import math
from typing import Any

NONE = "\N{EN DASH}"  # shown where there is no value


def number(value: Any, digits: int = 3, unit: str = "") -> str:
    """A number with ``digits`` significant digits and its unit; a dash where there is none."""
    known = _known(value)
    if known is None:
        return NONE
    if known == int(known) and abs(known) >= 1000:
        return f"{known:,.0f} {unit}".rstrip()
    rounded = f"{known:,.0f}" if abs(known) >= 10 ** (digits - 1) else f"{known:.{digits}g}"
    return f"{rounded} {unit}".rstrip()


def shell_word(path: str) -> str:
    """A path as one word of a shell's command, whatever is in it; no option, should it begin with a dash."""
    named = f"./{path}" if path.startswith("-") else path
    return "'" + named.replace("'", "'\\''") + "'"


def plus_minus(value: Any, error: Any) -> str:
    """A value and its standard error: ``1.23 ± 0.04``."""
    return f"{number(value)} ± {number(error, 2)}"


def angstrom(value: float | None) -> str:
    """A resolution with 0.01 A below 10 A, else 0.1 A, without the unit."""
    return NONE if value is None else f"{value:.{2 if value < 10 else 1}f}"


def duration(seconds: Any) -> str:
    """Seconds as s, min or h."""
    known = _known(seconds)
    if known is None:
        return NONE
    if known < 90:
        return f"{known:.3g} s"
    return f"{known / 60:.1f} min" if known < 5400 else f"{known / 3600:.1f} h"


def memory_size(megabytes: float) -> str:
    """Memory in MB or GB."""
    if math.isnan(megabytes):
        return NONE
    return f"{megabytes:.0f} MB" if megabytes < 1000 else f"{megabytes / 1024:.1f} GB"


def file_size(size_bytes: float) -> str:
    """Bytes, or the largest decimal unit of which there is at least one."""
    unit = "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if size_bytes < 1000:
            break
        size_bytes, unit = size_bytes / 1000, larger
    return f"{size_bytes:.4g} {unit}"


def _known(value: Any) -> float | None:
    """``value`` as a number, None for what is none and for nan."""
    try:
        known = float(value)
    except (TypeError, ValueError):
        return None
    return None if math.isnan(known) else known
