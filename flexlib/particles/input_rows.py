"""Which row of the user's particle file each prepared row is of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from flexlib.errors import InputError
from flexlib.layout import ParticlesFolder
from flexlib.particles.cs_file import read_cs_file
from flexlib.particles.star_text import StarText, read_star_text
from flexlib.particles.table import Particles
from flexlib.records import PreparedRecord

ANGLES = ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")


@dataclass(frozen=True)
class InputRows:
    """Where n particles stand in the user's particle file, and how that file names them."""

    path: Path
    rows: np.ndarray  # (n,) int64, 0-based
    copy: np.ndarray  # (n,) int64, which symmetry copy; 0 without symmetry
    num_input: int
    own_uid: np.ndarray | None = None  # (n,) where it is known already

    @cached_property
    def uid(self) -> np.ndarray | None:
        """(n,) uint64; None where the file has none (flexUid in a STAR file counts)."""
        if self.own_uid is not None:
            return self.own_uid
        if self.path.suffix == ".cs":
            table = read_cs_file(self.path)
            return table.column("uid")[self.rows] if "uid" in table.names else None
        frame = star_columns(read_star_text(self.path), ("flexUid",))
        return frame["flexUid"].to_numpy(np.uint64)[self.rows] if "flexUid" in frame else None

    @cached_property
    def all_names(self) -> list[str]:
        """Image names of the whole STAR file, in one spelling; empty for a .cs."""
        return image_names(star_columns(read_star_text(self.path), ())) if self.path.suffix == ".star" else []


def input_rows(particles: Particles | str | Path) -> InputRows:
    """Of ``Particles`` as read, or of a folder that prepare wrote. Raises InputError where the input file is gone."""
    if isinstance(particles, Particles):
        count = int(particles.source_row.max()) + 1
        zeros = np.zeros(len(particles), np.int64)
        return InputRows(particles.source_path, particles.source_row, zeros, count, particles.uid)
    return read_prepared_rows(particles).input_rows


@dataclass(frozen=True)
class PreparedRows:
    """What prepare recorded, and of its particles.star what says where rows came from."""

    record: PreparedRecord
    table: pd.DataFrame  # flexInputRow, flexSymmetryCopy and angles where there are copies, rlnRandomSubset

    @property
    def input_rows(self) -> InputRows:
        """Raises InputError where the input file is gone."""
        path = Path(self.record.particles)
        if not path.is_file():
            raise InputError(f"{path}: the particle file that prepare read is gone")
        rows = self.table["flexInputRow"].to_numpy(np.int64)
        return InputRows(path, rows, symmetry_copies(self.table), self.record.num_input)


def read_prepared_rows(particles_dir: str | Path) -> PreparedRows:
    """Read a folder that prepare wrote. Raises InputError where it is none."""
    folder = ParticlesFolder(Path(particles_dir))
    record = PreparedRecord.read(folder.record)
    if not folder.particles.is_file():
        raise InputError(f"{folder.particles}: not found: is this a folder that prepare has written?")
    text = read_star_text(folder.particles)
    angles = ANGLES if "flexSymmetryCopy" in text.particles.labels else ()
    columns = ("flexInputRow", "flexSymmetryCopy", "rlnRandomSubset", *angles)
    return PreparedRows(record, text.frame(text.particles, columns))


def symmetry_copies(table: pd.DataFrame) -> np.ndarray:
    """(n,) int64 which symmetry copy each row is; 0 where there are none."""
    known = "flexSymmetryCopy" in table
    return table["flexSymmetryCopy"].to_numpy(np.int64) if known else np.zeros(len(table), np.int64)


def check_length(where: InputRows, count: int) -> None:
    """Refuse an input file that has ``count`` particles now. Raises InputError where prepare read another number."""
    if count != where.num_input:
        raise InputError(f"{where.path}: {count} particles, but prepare read {where.num_input}: run it again")


def latent_columns(names: Sequence[str]) -> list[str]:
    """flexLatent1, flexLatent2, ... among ``names``, in order of their number."""
    found = [name for name in names if re.fullmatch(r"flexLatent\d{1,9}", name)]
    return sorted(found, key=lambda name: int(name.removeprefix("flexLatent")))


def star_columns(text: StarText, columns: Sequence[str]) -> pd.DataFrame:
    """Image names and further columns of a STAR file's particles."""
    return text.frame(text.particles, ("rlnImageName", *columns), ("rlnImageName",))


def image_names(table: pd.DataFrame) -> list[str]:
    """``slice@stack`` without leading zeros."""
    return [name.lstrip("0") if "@" in name else f"1@{name}" for name in table["rlnImageName"].tolist()]
