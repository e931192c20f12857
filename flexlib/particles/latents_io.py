"""Latent coordinates in and out: latents.star, CryoSPARC's component files, plain tables.

Rows are matched by what identifies a particle (uid, or image name), never by their place, except in plain tables.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from flexlib.errors import InputError
from flexlib.files import read_json
from flexlib.layout import ParticlesFolder
from flexlib.particles.cs_file import CsFile, read_cs_file, write_group
from flexlib.particles.star import relion_tables, star_values, write_star
from flexlib.particles.star_text import StarText, read_star_text
from flexlib.particles.table import Particles

log = logging.getLogger(__name__)

_ANGLES = ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")
_COMPONENT = re.compile(r"components_mode_(\d+)/value")


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
        frame = _star_columns(read_star_text(self.path), ("flexUid",))
        return frame["flexUid"].to_numpy(np.uint64)[self.rows] if "flexUid" in frame else None

    @cached_property
    def all_names(self) -> list[str]:
        """Image names of the whole STAR file, in one spelling; empty for a .cs."""
        return _image_names(_star_columns(read_star_text(self.path), ())) if self.path.suffix == ".star" else []


def input_rows(particles: Particles | str | Path) -> InputRows:
    """Of ``Particles`` as read, or of a folder that prepare wrote. Raises InputError where the input file is gone."""
    if isinstance(particles, Particles):
        count = int(particles.source_row.max()) + 1
        zeros = np.zeros(len(particles), np.int64)
        return InputRows(particles.source_path, particles.source_row, zeros, count, particles.uid)
    return _prepared_rows(*_read_prepared(Path(particles)))


def _prepared_rows(summary: Mapping[str, Any], table: pd.DataFrame) -> InputRows:
    path = Path(summary["particles"])
    if not path.is_file():
        raise InputError(f"{path}: the particle file that prepare read is gone")
    return InputRows(
        path, table["flexInputRow"].to_numpy(np.int64), _copies(table, len(table)), int(summary["num_input"])
    )


def _read_prepared(folder: Path) -> tuple[dict[str, Any], pd.DataFrame]:
    """prepared.json, and of particles.star what says where rows came from."""
    prepared = ParticlesFolder(folder)
    for path in (prepared.record, prepared.particles):
        if not path.is_file():
            raise InputError(f"{path}: not found: is this a folder that prepare has written?")
    text = read_star_text(prepared.particles)
    angles = _ANGLES if "flexSymmetryCopy" in text.particles.labels else ()
    columns = ("flexInputRow", "flexSymmetryCopy", "rlnRandomSubset", *angles)
    return read_json(prepared.record), text.frame(text.particles, columns)


def _copies(table: pd.DataFrame, count: int) -> np.ndarray:
    return table["flexSymmetryCopy"].to_numpy(np.int64) if "flexSymmetryCopy" in table else np.zeros(count, np.int64)


# out ----------------------------------------------------------------------------------------------------------------


def write_latents_star(
    particles_dir: str | Path,
    latents: np.ndarray,
    path: str | Path,
    extra: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write every particle of prepare's input file with its latent coordinates.

    Rows and columns are those of the input, in its order, byte for byte as they were written there, with all other
    blocks and comments (a .cs is converted to RELION's columns, with ``flexUid``). Added are ``flexLatent1..K``, the
    columns of ``extra``, and where prepare drew the half-sets also these: as ``rlnRandomSubset``, or as
    ``flexRandomSubset`` where the input has that column. With symmetry a particle has a row for each copy, with the
    copy's angles, and ``flexInputRow`` and ``flexSymmetryCopy`` tell them apart. Columns of these names in the input
    (it may be an earlier latents.star) are written anew.

    Parameters
    ----------
    particles_dir
        Folder that prepare wrote.
    latents
        (n, K) in the order of the prepared particles.
    path
        The STAR file to write.
    extra
        Further columns by name, each (n,). Input rows that prepare dropped get ``nan`` here and in the latents, and a
        half-set in turn, because RELION takes no other value.

    Raises
    ------
    InputError
        The input file is gone or has changed its length.
    """
    summary, prepared = _read_prepared(Path(particles_dir))
    where = _prepared_rows(summary, prepared)
    if len(latents) != len(where.rows):
        raise ValueError(f"latents of {len(latents)} particles for {len(where.rows)} prepared ones")
    values = {f"flexLatent{k + 1}": latents[:, k] for k in range(latents.shape[1])} | dict(extra or {})
    rows, prepared_row = _output_rows(where)
    columns = {name: _spread(np.asarray(column), prepared_row) for name, column in values.items()}
    halves = None
    if summary["half_sets"] == "random":
        turns = np.arange(len(rows)) % 2 + 1
        halves = np.where(prepared_row < 0, turns, prepared["rlnRandomSubset"].to_numpy(np.int64)[prepared_row])
    expanded = "flexSymmetryCopy" in prepared
    if expanded:
        copy = np.where(prepared_row < 0, 0, where.copy[prepared_row])
        columns = {"flexInputRow": rows, "flexSymmetryCopy": copy} | columns
    if where.path.suffix == ".star":
        text = read_star_text(where.path)
        table = text.particles
        _check_length(where, len(table))
        stale = {"flexInputRow": rows, "flexSymmetryCopy": np.zeros_like(rows)}  # of a run that this input came from
        columns = {name: column for name, column in stale.items() if name in table.labels} | columns
        cells = {name: star_values(column) for name, column in columns.items()}
        if halves is not None:
            cells[_half_set_column(table.labels)] = star_values(halves)
        if expanded:
            cells |= _copy_angles(text, rows, prepared_row, prepared)
        text.write(path, table, rows if expanded else None, cells)
        return
    blocks = _converted(summary, where)
    frame = blocks["particles"]
    if expanded:
        frame = frame.iloc[rows].reset_index(drop=True)
        kept = prepared_row >= 0
        for name in _ANGLES:
            frame.loc[kept, name] = prepared[name].to_numpy()[prepared_row[kept]]
    if halves is not None:
        columns[_half_set_column(tuple(frame))] = halves
    write_star(blocks | {"particles": frame.assign(**columns)}, path)


def _half_set_column(labels: Sequence[str]) -> str:
    return "flexRandomSubset" if "rlnRandomSubset" in labels else "rlnRandomSubset"


def _output_rows(where: InputRows) -> tuple[np.ndarray, np.ndarray]:
    """(m,) input row of each row to write, and (m,) its prepared row, -1 where prepare dropped the particle."""
    dropped = np.setdiff1d(np.arange(where.num_input), where.rows)
    rows = np.concatenate([where.rows, dropped])
    prepared_row = np.concatenate([np.arange(len(where.rows)), np.full(len(dropped), -1)])
    order = np.argsort(rows, kind="stable")
    return rows[order], prepared_row[order]


def _spread(values: np.ndarray, prepared_row: np.ndarray) -> np.ndarray:
    """(m,) the values of the prepared rows, nan where there is none."""
    if (prepared_row >= 0).all():
        return values[prepared_row]
    return np.where(prepared_row < 0, np.nan, values[prepared_row])


def _copy_angles(
    text: StarText, rows: np.ndarray, prepared_row: np.ndarray, prepared: pd.DataFrame
) -> dict[str, list[str]]:
    """The angles as text: of the symmetry copies, and as they stood for particles that prepare dropped."""
    given = text.frame(text.particles, _ANGLES, text=_ANGLES)
    result = {}
    for name in _ANGLES:
        own = star_values(prepared[name].to_numpy(np.float64))
        before = given[name].tolist()
        result[name] = [
            before[row] if at < 0 else own[at] for row, at in zip(rows.tolist(), prepared_row.tolist(), strict=True)
        ]
    return result


def _check_length(where: InputRows, count: int) -> None:
    if count != where.num_input:
        raise InputError(f"{where.path}: {count} particles, but prepare read {where.num_input}: run it again")


def _converted(summary: Mapping[str, Any], where: InputRows) -> dict[str, pd.DataFrame]:
    """The blocks of a .cs input as RELION's tables."""
    from flexlib.particles.read import read_particles

    particles = read_particles(where.path, summary["passthrough"], summary["image_root"])
    _check_length(where, len(particles))
    blocks = relion_tables(particles)
    if particles.uid is not None:
        blocks["particles"]["flexUid"] = particles.uid
    return blocks


def write_latents_cs(particles_dir: str | Path, latents: np.ndarray, path: str | Path) -> bool:
    """Write latents as CryoSPARC's 3D Flex training does, for a .cs input; also the ``.csg`` that imports them.

    Columns ``uid``, and ``components_mode_k/component`` (uint32, = k) and ``components_mode_k/value`` (float32) for k
    from 0; one row for each particle that prepare kept (of symmetry copies the first, which has the input's uid), so
    that CryoSPARC can join them to its own particles on uid.

    Parameters: ``latents`` (n, K) in the order of the prepared particles. Returns whether anything was written: not
    where the input has no uid (a STAR file).
    """
    where = input_rows(particles_dir)
    if where.path.suffix != ".cs" or where.uid is None:
        return False
    first = where.copy == 0
    table = components(where.uid[first], latents[first])
    table.write(path)
    write_group(Path(path).with_suffix(".csg"), [(Path(path), table)], "Latent coordinates of flexlib")
    return True


def components(uid: np.ndarray, latents: np.ndarray) -> CsFile:
    """(n,) uid and (n, K) latents as CryoSPARC stores them; to be written under any name."""
    columns: list[tuple[str, str]] = [("uid", "<u8")]
    for k in range(latents.shape[1]):
        columns += [(f"components_mode_{k}/component", "<u4"), (f"components_mode_{k}/value", "<f4")]
    records = np.zeros(len(uid), columns)
    records["uid"] = uid
    for k in range(latents.shape[1]):
        records[f"components_mode_{k}/component"] = k
        records[f"components_mode_{k}/value"] = latents[:, k]
    return CsFile(Path("latents.cs"), records, {}, {})


# in -----------------------------------------------------------------------------------------------------------------


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


def read_latent_points(path: str | Path) -> np.ndarray:
    """Points of latent space that need not be particles, (m, K) float64, in the file's order.

    A .star with ``flexLatent1..K``, a .cs with ``components_mode_k/value`` (CryoSPARC's custom latents), or a .npy,
    .csv or .txt with a row for each point (in the text files a first line may name the columns, ``#`` begins a
    comment). Raises InputError where a value is not a number.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: latents not found")
    if path.suffix == ".star":
        values = _star_points(path, read_star_text(path))
    elif path.suffix == ".cs":
        values = _cs_latents(path, read_cs_file(path))
    else:
        values = _read_npy(path) if path.suffix == ".npy" else _read_text(path)
    bad = ~np.isfinite(values).all(1)
    if bad.any() or not len(values):
        where = f"row {int(np.argmax(bad)) + 1} is not finite" if bad.any() else "it has no rows"
        raise InputError(f"{path}: no points of latent space: {where}")
    return values


def _star_points(path: Path, text: StarText) -> np.ndarray:
    """(m, K) latents of the first table that has some; it need not be one of particles."""
    for table in text.tables:
        if names := latent_columns(table.labels):
            return _numbers(text.frame(table, names)[names])
    raise InputError(f"{path}: no latents: column flexLatent1 is missing")


def _numbers(columns: pd.DataFrame) -> np.ndarray:
    """float64, nan where a value is no number."""
    return columns.apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)


def latent_columns(names: Sequence[str]) -> list[str]:
    """flexLatent1, flexLatent2, ... among ``names``, in order of their number."""
    found = [name for name in names if re.fullmatch(r"flexLatent\d+", name)]
    return sorted(found, key=lambda name: int(name.removeprefix("flexLatent")))


def _star_columns(text: StarText, columns: Sequence[str]) -> pd.DataFrame:
    return text.frame(text.particles, ("rlnImageName", *columns), ("rlnImageName",))


def _image_names(table: pd.DataFrame) -> list[str]:
    """``slice@stack`` without leading zeros."""
    return [name.lstrip("0") if "@" in name else f"1@{name}" for name in table["rlnImageName"].tolist()]


def _from_star(path: Path, where: InputRows) -> np.ndarray:
    text = read_star_text(path)
    latents = latent_columns(text.particles.labels)
    if not latents:
        raise InputError(f"{path}: no latents: column flexLatent1 is missing")
    table = _star_columns(text, (*latents, "flexUid", "flexSymmetryCopy"))
    values = _numbers(table[latents])
    copy = _copies(table, len(table))
    wanted_copy = where.copy if copy.any() else np.zeros_like(where.copy)
    if "flexUid" in table and where.uid is not None:
        uid = table["flexUid"].to_numpy(np.uint64)
        return _take(path, where, values, _joined((uid, copy), (where.uid, wanted_copy), path), _uid_of(where.uid))
    if not where.all_names:
        raise InputError(f"{path}: column flexUid is missing: particles of {where.path} are known by uid")
    names = _image_names(table)
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
    return np.stack([table.column(name).astype(np.float64) for _, name in modes], 1)


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
    try:
        values = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"{path}: not a readable .npy file ({' '.join(str(error).split())})") from error
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiu" or values.ndim not in (1, 2):
        raise InputError(f"{path}: latents are a table of numbers, rows by dimensions")
    return values.reshape(len(values), -1).astype(np.float64)


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
