"""Files of a run as the report takes them: what is not there, or empty, is None."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TypeVar

import pandas as pd

from flexlib.errors import InputError
from flexlib.files import reading
from flexlib.imaging.maps import Map, read_map
from flexlib.records import Record

logger = logging.getLogger(__name__)

AnyRecord = TypeVar("AnyRecord", bound=Record)


def read_record(kind: type[AnyRecord], path: Path) -> AnyRecord | None:
    """The record at ``path``; None where there is none, or one of an older flexlib that cannot be read."""
    if not path.exists():
        return None
    try:
        return kind.read(path)
    except InputError as error:
        logger.warning("%s", error)
        return None


def read_table(path: Path, separator: str = ",") -> pd.DataFrame | None:
    """A table of numbers; None where there is none, or it is empty. A dash stands for what is not known."""
    with reading(path, ValueError):
        table = pd.read_csv(path, sep=separator, na_values="-") if path.exists() and path.stat().st_size else None
    return table if table is not None and len(table) else None


def map_at(path: Path) -> Map | None:
    """The map at ``path``; None where there is none."""
    return read_map(path) if path.exists() else None
