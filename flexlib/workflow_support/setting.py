"""A key of the config as one line of a dataclass: its default, its meaning for the user and its limits."""

from __future__ import annotations

from dataclasses import field
from typing import Any, Literal

Auto = Literal["auto"]


def setting(default: Any, meaning: str, *, swept: bool = False, written: bool = False, **limits: Any) -> Any:
    """A key of the config.

    Parameters
    ----------
    default
        Its value where the config says nothing; ``...`` where the config must.
    meaning
        For the user.
    swept
        Whether a list of values is allowed, each of which makes sweep points of its own.
    written
        Whether it is a path that a stage makes, so that nothing need be there.
    limits
        Of its value, in JSON schema's words (``minimum``, ``multipleOf``, ``pattern``, ...).
    """
    metadata = {"meaning": meaning, "swept": swept, "written": written, "limits": limits}
    if default is ...:
        return field(metadata=metadata)
    if isinstance(default, (list, type)):
        return field(default_factory=default if isinstance(default, type) else default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)
