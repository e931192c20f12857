"""Reading latents from elsewhere: latents.star, CryoSPARC's component files, plain tables.

Rows are matched by what identifies a particle (uid, or image name), never by their order, except in plain tables.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from flexlib.errors import InputError
from flexlib.particles.cs_file import CsFile, read_cs_file
from flexlib.particles.input_rows import (
    InputRows,
    image_names,
    input_rows,
    latent_columns,
    star_columns,
    symmetry_copies,
)
from flexlib.particles.star_text import StarText, read_star_text
from flexlib.particles.table import Particles
from flexlib.untrusted import as_float64, read_npy

log = logging.getLogger(__name__)

_COMPONENT = re.compile(r"components_mode_(\d{1,9})/value")


def read_latents(path: str | Path, particles: Particles | str | Path) -> np.ndarray:
    """Latent coordinates from elsewhere, for these particles.

    Parameters
    ----------
    path
        A latents.star (matched on ``flexUid`` or image name), a .cs with ``components_mode_k/value`` (CryoSPARC's
        3D Flex or 3D variability; matched on uid), or a .npy, .csv or .txt with a row for each particle (of
        ``particles``, or of the whole input file) and a column for each dimension.
    particles
        ``Particles`` as read, or a folder that prepare wrote.

    Returns
    -------
    (n, K) float64.

    Raises
    ------
    InputError
        No latents in the file, or not for every particle: says for how many, and the first.
    """
    path, where = Path(path), input_rows(particles)
    if not path.is_file():
        raise InputError(f"{path}: latents not found")
    if path.suffix == ".star":
        return _from_star(path, where)
    if path.suffix == ".cs":
        return _from_cs(path, where)
    if path.suffix in (".npy", ".csv", ".txt"):
        return _from_table(path, where)
    raise InputError(f"{path}: latents are read from .star, .cs, .npy, .csv and .txt files")


def read_latent_std_errs(path: str | Path, particles: Particles | str | Path) -> np.ndarray:
    """(n, K) standard errors of the latents of these particles, from a latents.star; nan where a particle has none.

    Raises InputError where the file has none, or not a row for each particle.
    """
    path, where = Path(path), input_rows(particles)
    if not path.is_file():
        raise InputError(f"{path}: latents not found")
    text = read_star_text(path)
    count = len(latent_columns(text.particles.labels))
    names = [f"flexLatentStdErr{k + 1}" for k in range(count)]
    if not count or not set(names) <= set(text.particles.labels):
        raise InputError(f"{path}: no standard errors of latents: column flexLatentStdErr{max(count, 1)} is missing")
    table = text.frame(text.particles, (*names, "flexInputRow", "flexSymmetryCopy"))
    row = table["flexInputRow"].to_numpy(np.int64) if "flexInputRow" in table else np.arange(len(table))
    match = _joined((row, symmetry_copies(table)), (where.rows, where.copy), path)
    if (match < 0).any():
        raise InputError(f"{path}: no row for {int((match < 0).sum())} of {len(match)} particles of {where.path}")
    return _numbers(table[names])[match]


def read_frame_latents(path: str | Path) -> np.ndarray:
    """Latents that need not be any particle's, (m, K) float64, in the file's order: one a frame.

    A .star with ``flexLatent1..K``, a .cs with ``components_mode_k/value`` (CryoSPARC's custom latents), or a .npy,
    .csv or .txt with a row for each (in the text files a first line may name the columns, ``#`` begins a
    comment). Raises InputError where a value is not a number.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: latents not found")
    if path.suffix == ".star":
        values = _star_latents(path, read_star_text(path))
    elif path.suffix == ".cs":
        values = _cs_latents(path, read_cs_file(path))
    else:
        values = _read_npy(path) if path.suffix == ".npy" else _read_text(path)
    bad = ~np.isfinite(values).all(1)
    if bad.any() or not len(values):
        where = f"row {int(np.argmax(bad)) + 1} is not finite" if bad.any() else "it has no rows"
        raise InputError(f"{path}: no points of latent space: {where}")
    return values


def _star_latents(path: Path, text: StarText) -> np.ndarray:
    """(m, K) latents of the first table that has some; it need not be one of particles."""
    for table in text.tables:
        if names := latent_columns(table.labels):
            return _numbers(text.frame(table, names)[names])
    raise InputError(f"{path}: no latents: column flexLatent1 is missing")


def _numbers(columns: pd.DataFrame) -> np.ndarray:
    """float64, nan where a value is no number."""
    return columns.apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)


def _from_star(path: Path, where: InputRows) -> np.ndarray:
    text = read_star_text(path)
    latents = latent_columns(text.particles.labels)
    if not latents:
        raise InputError(f"{path}: no latents: column flexLatent1 is missing")
    table = star_columns(text, (*latents, "flexUid", "flexSymmetryCopy"))
    values = _numbers(table[latents])
    copy = symmetry_copies(table)
    wanted_copy = where.copy if copy.any() else np.zeros_like(where.copy)
    if "flexUid" in table and where.uid is not None:
        uid = table["flexUid"].to_numpy(np.uint64)
        return _take(path, where, values, _joined((uid, copy), (where.uid, wanted_copy), path), _uid_of(where.uid))
    if not where.all_names:
        raise InputError(f"{path}: column flexUid is missing: particles of {where.path} are known by uid")
    names = image_names(table)
    own = [where.all_names[row] for row in where.rows.tolist()]

    def image_of(row: int) -> str:
        return f"image {own[row]}"

    if names == where.all_names:  # the same file, even if it names an image twice
        return _take(path, where, values, where.rows, image_of)
    return _take(path, where, values, _joined((names, copy), (own, wanted_copy), path), image_of)


def _cs_latents(path: Path, table: CsFile) -> np.ndarray:
    """(m, K) latents of a .cs file's rows."""
    modes = sorted((int(match[1]), name) for name in table.names if (match := _COMPONENT.fullmatch(name)))
    if not modes:
        raise InputError(f"{path}: no latents: column components_mode_0/value is missing")
    columns = [table.column(name) for _, name in modes]
    for (_, name), values in zip(modes, columns, strict=True):
        if values.ndim != 1 or values.dtype.kind not in "fiu":
            raise InputError(f"{path}: column {name}: {values.dtype} {values.shape[1:]} is not one number a row")
    return as_float64(np.stack(columns, 1))


def _from_cs(path: Path, where: InputRows) -> np.ndarray:
    table = read_cs_file(path)
    values = _cs_latents(path, table)
    if "uid" not in table.names:
        raise InputError(f"{path}: no latents: column uid is missing")
    if where.uid is None:
        raise InputError(f"{path}: its latents are joined on uid, which {where.path} does not have")
    zeros = np.zeros(len(table), np.int64)
    found = _joined((table.column("uid"), zeros), (where.uid, np.zeros_like(where.copy)), path)
    return _take(path, where, values, found, _uid_of(where.uid))


def _uid_of(uid: np.ndarray) -> Callable[[int], str]:
    return lambda row: f"uid {uid[row]}"


def _joined(have: tuple[Any, np.ndarray], wanted: tuple[Any, np.ndarray], path: Path) -> np.ndarray:
    """(n,) row of ``have`` (key and symmetry copy) that is each of ``wanted``; -1 where there is none."""
    index = pd.MultiIndex.from_arrays(have) if have[1].any() else pd.Index(have[0])
    if not index.is_unique:
        row = int(np.argmax(index.duplicated()))
        raise InputError(f"{path}: row {row + 1}: {have[0][row]} comes twice: which latents are meant is not clear")
    return index.get_indexer(pd.MultiIndex.from_arrays(wanted) if have[1].any() else pd.Index(wanted[0]))


def _take(
    path: Path, where: InputRows, values: np.ndarray, match: np.ndarray, name_of: Callable[[int], str]
) -> np.ndarray:
    """(n, K) values at ``match``. Raises InputError where it is -1 or latents are not numbers."""
    absent = (match < 0) | ~np.isfinite(values[match]).all(1)
    if absent.any():
        row = int(np.argmax(absent))
        raise InputError(
            f"{path}: no latents for {int(absent.sum())} of {len(match)} particles; the first is {name_of(row)} "
            f"(row {where.rows[row] + 1} of {where.path})"
        )
    return values[match]


def _from_table(path: Path, where: InputRows) -> np.ndarray:
    values = _read_npy(path) if path.suffix == ".npy" else _read_text(path)
    count = len(where.rows)
    if len(values) not in (count, where.num_input):
        raise InputError(
            f"{path}: {len(values)} rows, but there are {count} particles ({where.num_input} in {where.path})"
        )
    chosen = values if len(values) == count else values[where.rows]
    bad = ~np.isfinite(chosen).all(1)
    if bad.any():
        row = int(np.argmax(bad))
        raise InputError(f"{path}: no latents for {int(bad.sum())} of {count} particles; the first is row {row + 1}")
    return chosen


def _read_npy(path: Path) -> np.ndarray:
    values = read_npy(path, ".npy file")
    if values.dtype.kind not in "fiu" or values.ndim not in (1, 2) or values.size == 0:
        raise InputError(f"{path}: latents are a table of numbers, rows by dimensions")
    return as_float64(values.reshape(len(values), -1))


def _read_text(path: Path) -> np.ndarray:
    texts = [line.partition("#")[0].strip() for line in path.read_text(errors="replace").splitlines()]
    lines = [re.split(r"[,\s]+", text) for text in texts if text]
    if lines and not _is_number(lines[0][0]):
        lines = lines[1:]  # names of columns
    if not lines:
        raise InputError(f"{path}: no latents in this file")
    for number, line in enumerate(lines, 1):
        if len(line) != len(lines[0]) or not all(map(_is_number, line)):
            raise InputError(f"{path}: row {number}: {' '.join(line)[:80]!r} is not {len(lines[0])} numbers")
    return np.array(lines, np.float64)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
