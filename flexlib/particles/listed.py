"""Particles that a user's list names (.csv, or a subset of the input as .star or .cs), and columns of the input."""

from __future__ import annotations

import csv
import difflib
from pathlib import Path

import numpy as np

from flexlib.errors import InputError
from flexlib.particles.cs import matching_rows, unique_uids
from flexlib.particles.cs_file import read_cs_file
from flexlib.particles.input_rows import InputRows, image_names, star_columns
from flexlib.particles.star_text import read_star_text

ROW_COLUMNS = ("flexInputRow", "flexUid", "rlnImageName")  # by what a list of particles may name them


def read_list(path: str | Path, option: str) -> tuple[str, str, list[str]]:
    """What a CSV names particles by, the column's own name, and the values, from line 2 on.

    ``option`` is what asks for it, for messages. Raises InputError where there is no such column.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{option}: {path} not found")
    with path.open(newline="", errors="replace") as file:
        try:
            lines = list(csv.DictReader(file))
        except csv.Error as error:
            raise InputError(f"{option}: {path}: not a readable .csv file ({error})") from error
    named = {"flexUid" if name == "uid" else name: name for name in (lines[0] if lines else {}) if name}
    key = next((name for name in ROW_COLUMNS if name in named), None)
    if key is None:
        raise InputError(f"{option}: {path}: the first line must name a column {', '.join(ROW_COLUMNS[:-1])} or uid")
    return key, named[key], [(line[named[key]] or "").strip() for line in lines]


def listed_particles(path: str | Path, where: InputRows, option: str) -> np.ndarray:
    """(n,) bool: which of the particles a list names: .csv, or a .star or .cs with some of the input's particles.

    Raises InputError, naming file and row, where a particle is not of the input.
    """
    path = Path(path)
    if path.suffix == ".csv":
        key, column, values = read_list(path, option)
        wanted = _of_keys(path, where, (key, f"column {column}"), values, first=2)
    elif path.suffix == ".star":
        wanted = _of_star(path, where)
    elif path.suffix == ".cs":
        table = read_cs_file(path)
        if where.uid is None:
            raise InputError(f"{option}: {path}: particles of {where.path} have no uid to find these by")
        wanted = np.isin(where.uid, unique_uids(table))
        known = np.isin(table.column("uid"), _uids(where))
        if not known.all():
            row = int(np.argmin(known))
            raise InputError(f"{path}: row {row + 1}, column uid: not a particle of {where.path}")
    else:
        raise InputError(f"{option}: {path}: lists of particles are .csv, .star or .cs files")
    if not wanted.any():
        raise InputError(f"{option}: {path}: none of its particles was kept by prepare")
    return wanted


def _of_star(path: Path, where: InputRows) -> np.ndarray:
    table = star_columns(read_star_text(path), ("flexUid",))
    if where.path.suffix == ".star":
        return _of_keys(path, where, ("rlnImageName", "column rlnImageName"), image_names(table), first=1)
    if "flexUid" not in table:
        raise InputError(f"{path}: column flexUid is missing: particles of {where.path} are known by uid")
    uid = [str(value) for value in table["flexUid"].to_numpy(np.uint64).tolist()]
    return _of_keys(path, where, ("flexUid", "column flexUid"), uid, first=1)


def _of_keys(path: Path, where: InputRows, names: tuple[str, str], values: list[str], first: int) -> np.ndarray:
    """(n,) which particles have one of the ``values`` of the key ``names[0]``; the first value is of line ``first``."""
    key, column = names
    if key == "flexInputRow":
        own, every = [str(row) for row in where.rows.tolist()], {str(row) for row in range(where.num_input)}
    elif key == "flexUid":
        if where.uid is None:
            raise InputError(f"{path}: {column}: particles of {where.path} have no uid")
        own, every = [str(value) for value in where.uid.tolist()], {str(value) for value in _uids(where).tolist()}
    else:
        if not where.all_names:
            raise InputError(f"{path}: {column}: particles of {where.path} are known by uid")
        own, every = [where.all_names[row] for row in where.rows.tolist()], set(where.all_names)
        values = [name.lstrip("0") if "@" in name else f"1@{name}" for name in values]
    for number, value in enumerate(values, first):
        if value not in every:
            place = "line" if first == 2 else "row"
            raise InputError(f"{path}: {place} {number}, {column}: {value!r} is no particle of {where.path}")
    wanted = set(values)
    return np.array([one in wanted for one in own], bool)


def _uids(where: InputRows) -> np.ndarray:
    """Uids of the whole input, also of particles that prepare dropped."""
    if where.path.suffix == ".cs":
        return unique_uids(read_cs_file(where.path))
    return star_columns(read_star_text(where.path), ("flexUid",))["flexUid"].to_numpy(np.uint64)


def input_column(name: str, where: InputRows, passthrough: str | None, option: str) -> np.ndarray:
    """(n,) text of a column of the user's file (or a .cs's passthrough file), for each particle.

    Raises InputError, with the nearest names, where there is no such column.
    """
    if where.path.suffix == ".star":
        text = read_star_text(where.path)
        labels = list(text.particles.labels)
        if name in labels:
            values = text.frame(text.particles, [name], (name,))[name]
            return values.astype(str).to_numpy()[where.rows]
    else:
        table = read_cs_file(where.path)
        tables = [table] if passthrough is None else [table, read_cs_file(Path(passthrough))]
        labels = list(dict.fromkeys(label for one in tables for label in one.names))
        found = next((one for one in tables if name in one.names), None)
        if found is not None:
            values = found.column(name)
            if values.ndim != 1:
                raise InputError(f"{option}: {found.path}: column {name}: {values.shape[1:]} values a row, not one")
            if found is not table:
                values = values[matching_rows(unique_uids(table), unique_uids(found), where.path, found.path)]
            plain = values.astype("U") if values.dtype.kind != "S" else np.char.decode(values, "utf-8", "replace")
            return plain[where.rows]
    near = difflib.get_close_matches(name, labels, n=3, cutoff=0.4) or labels[:3]
    raise InputError(f"{option}: {where.path}: no column {name!r}; the nearest are {', '.join(near)}")
