"""RELION STAR files: 3.1, 4 and 5 (optics table), and 3.0 and older (one table).

Sources: RELION's ``metadata_label.h`` (names, units), ``obs_model.cpp`` (optics groups; a column missing from one table
is looked for in the other), ``ctf.cpp`` (defaults of absent CTF columns).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.spatial.transform import Rotation

from flexlib.errors import InputError
from flexlib.particles.star_text import read_star_text
from flexlib.particles.table import (
    OpticsGroup,
    Particles,
    checked_box,
    checked_numbers,
    checked_rotations,
    find_image_files,
    number,
    number_micrographs,
)

log = logging.getLogger(__name__)


_PIXEL_SIZE = ("rlnImagePixelSize", "rlnMicrographPixelSize", "rlnMicrographOriginalPixelSize", "rlnPixelSize")
MAGNIFICATION_MATRIX = ("rlnMagMat00", "rlnMagMat01", "rlnMagMat10", "rlnMagMat11")
_OPTICS = (
    "rlnOpticsGroupName",
    "rlnVoltage",
    "rlnSphericalAberration",
    "rlnAmplitudeContrast",
    *_PIXEL_SIZE,
    "rlnDetectorPixelSize",
    "rlnMagnification",
    "rlnImageSize",
    "rlnBeamTiltX",
    "rlnBeamTiltY",
    "rlnOddZernike",
    "rlnEvenZernike",
    *MAGNIFICATION_MATRIX,
    "rlnCtfDataAreCtfPremultiplied",
    "rlnCtfDataArePhaseFlipped",
)


# The particle table's columns that mean something here; of a large table only these are turned into numbers
_PARTICLE = (
    *_OPTICS,
    "rlnImageName",
    "rlnMicrographName",
    "rlnOpticsGroup",
    "rlnAngleRot",
    "rlnAngleTilt",
    "rlnAnglePsi",
    "rlnOriginX",
    "rlnOriginY",
    "rlnOriginXAngst",
    "rlnOriginYAngst",
    "rlnDefocusU",
    "rlnDefocusV",
    "rlnDefocusAngle",
    "rlnPhaseShift",
    "rlnCtfBfactor",
    "rlnCtfScalefactor",
    "rlnRandomSubset",
    "flexContrastSign",
    "flexScale",
    "flexMicrograph",
)
_LAST_SLICE = 2**31
_TEXT = (
    "rlnImageName",
    "rlnMicrographName",
    "rlnOpticsGroupName",
    "rlnOddZernike",
    "rlnEvenZernike",
    "flexImageName",
    "flexImageDigest",
)


@dataclass(frozen=True)
class StarTables:
    """The two tables of a particle STAR file; ``optics`` is None in RELION 3.0's layout."""

    path: Path
    particles: pd.DataFrame
    optics: pd.DataFrame | None


def read_tables(path: Path, columns: Sequence[str] | None = None) -> StarTables:
    """Read the particles, of which only ``columns`` (default: all), and the optics table of a STAR file.

    Raises InputError where the file isn't STAR or has no table with ``rlnImageName``.
    """
    text = read_star_text(path)
    optics = text.table("optics")
    return StarTables(
        text.path,
        text.frame(text.particles, columns, _TEXT),
        None if optics is None else text.frame(optics, text=_TEXT),
    )


def read_star(path: Path, image_root: Path | None = None) -> Particles:
    """Particles of a RELION STAR file; see ``read.read_particles``."""
    return particles_from_tables(read_tables(path, _PARTICLE), image_root)


def particles_from_tables(tables: StarTables, image_root: Path | None = None) -> Particles:
    """Turn the tables of a STAR file into ``Particles``. Raises InputError naming row and column."""
    path, table = tables.path, tables.particles
    columns = _Columns(tables)
    optics, optics_index = _optics_groups(columns)
    pixel_size_A = np.array([group.pixel_size_A for group in optics])[optics_index]
    euler_deg = np.stack([columns.numbers(f"rlnAngle{name}") for name in ("Rot", "Tilt", "Psi")], 1)
    rotation = Rotation.from_euler("ZYZ", euler_deg, degrees=True)
    defocus_u = columns.numbers("rlnDefocusU")
    defocus_v = columns.numbers("rlnDefocusV", defocus_u)
    names, stack_index, image_index = _image_names(tables)
    return Particles(
        optics=optics,
        optics_index=optics_index,
        rotation=checked_rotations(rotation, path, "rlnAngleRot"),
        origin_A=np.stack([_origin(columns, axis, pixel_size_A) for axis in "XY"], 1),
        defocus_u_A=defocus_u,
        defocus_v_A=defocus_v,
        defocus_angle_rad=np.deg2rad(columns.numbers("rlnDefocusAngle", 0.0)),
        phase_shift_rad=np.deg2rad(columns.numbers("rlnPhaseShift", 0.0)),
        ctf_bfactor_A2=columns.numbers("rlnCtfBfactor", 0.0),
        ctf_scale=columns.numbers("rlnCtfScalefactor", 1.0),
        half_set=_half_sets(columns),
        contrast_sign=columns.numbers("flexContrastSign", 1.0),
        stack_paths=find_image_files(names, stack_index, path, image_root, "rlnImageName"),
        stack_index=stack_index,
        image_index=image_index,
        source_path=path,
        source_row=np.arange(len(table)),
        particle_scale=columns.numbers("flexScale") if "flexScale" in table else None,
        micrograph=_micrographs(table),
        extra={"stack_names": tuple(names), "image_column": "rlnImageName"},
    )


class _Columns:
    """Per-particle values of a column, from whichever of the two tables has it."""

    def __init__(self, tables: StarTables) -> None:
        self.path, self.table = tables.path, tables.particles
        self.has_optics = tables.optics is not None
        self.optics = pd.DataFrame(index=[0]) if tables.optics is None else tables.optics
        self.group_row = self._rows_in_optics() if self.has_optics else np.zeros(len(self.table), np.int64)

    def _rows_in_optics(self) -> np.ndarray:
        """(n,) int64 row of each particle's group in data_optics."""
        if "rlnOpticsGroup" not in self.optics:
            raise InputError(f"{self.path}: data_optics has no column rlnOpticsGroup")
        if "rlnOpticsGroup" not in self.table:
            if len(self.optics) == 1:
                return np.zeros(len(self.table), np.int64)
            raise InputError(f"{self.path}: the particle table has no column rlnOpticsGroup")
        known = pd.Index(checked_numbers(self.optics["rlnOpticsGroup"], self.path, "rlnOpticsGroup (data_optics)"))
        if not known.is_unique:
            raise InputError(f"{self.path}: data_optics has a value of rlnOpticsGroup twice")
        group = checked_numbers(self.table["rlnOpticsGroup"], self.path, "rlnOpticsGroup")
        row = known.get_indexer(group)
        if (row < 0).any():
            bad = int(np.argmax(row < 0))
            raise InputError(
                f"{self.path}: row {bad + 1}, column rlnOpticsGroup: group {group[bad]:g} is not in data_optics"
            )
        return row

    def has(self, name: str) -> bool:
        return self.in_optics(name) or name in self.table

    def in_optics(self, name: str) -> bool:
        """Optics columns are taken from the optics table first, all others from the particle table first."""
        if name not in _PARTICLE:
            raise KeyError(f"{name} is not among the columns that are read: see _PARTICLE")
        return name in self.optics and (name in _OPTICS or name not in self.table)

    def value(self, name: str, row: int) -> Any:
        """The raw value for the particle at ``row``, or None where neither table has the column."""
        if self.in_optics(name):
            return self.optics[name].iloc[self.group_row[row]]
        return self.table[name].iloc[row] if name in self.table else None

    def get(self, name: str) -> np.ndarray | None:
        """(n,) raw values, or None where neither table has the column."""
        if self.in_optics(name):
            return self.optics[name].to_numpy()[self.group_row]
        return self.table[name].to_numpy() if name in self.table else None

    def numbers(self, name: str, default: Any = None) -> np.ndarray:
        """(n,) float64; ``default`` where the column is absent, InputError if there is none."""
        values = self.get(name)
        if values is None:
            if default is None:
                hint = ": particles need the poses of a refinement" if name.startswith("rlnAngle") else ""
                raise InputError(f"{self.path}: column {name} is missing{hint}")
            return np.broadcast_to(np.asarray(default, np.float64), len(self.table)).copy()
        return checked_numbers(values, self.path, name)


def _optics_groups(columns: _Columns) -> tuple[tuple[OpticsGroup, ...], np.ndarray]:
    """The optics groups in use and each particle's (n,) int32 index; equal values make a group in RELION 3.0."""
    table = columns.table
    frame = pd.DataFrame({"group": columns.group_row}, index=table.index)
    for name in _OPTICS:
        if name in table and not columns.in_optics(name):
            values = table[name]
            if not pd.api.types.is_numeric_dtype(values):  # in the order of their texts, which may not be UTF-8
                values = pd.Series(np.unique(values.astype(object).map(ascii), return_inverse=True)[1], table.index)
            frame[name] = values
    number = frame.groupby(list(frame.columns), sort=True, dropna=False).ngroup().to_numpy()
    _, first_row, index = np.unique(number, return_index=True, return_inverse=True)
    groups = tuple(_optics_group(columns, int(row), count) for count, row in enumerate(first_row, 1))
    if not columns.has("rlnAmplitudeContrast"):
        log.warning("%s: column rlnAmplitudeContrast is missing: 0 is used, as RELION does", columns.path)
    return groups, index.astype(np.int32)


def _optics_group(columns: _Columns, row: int, count: int) -> OpticsGroup:
    """The optics group of the particle at ``row``; ``count`` names it where the file doesn't."""

    def finite(name: str, default: float | None = None) -> float:
        raw = columns.value(name, row)
        if raw is None:
            if default is None:
                raise InputError(f"{columns.path}: column {name} is missing (neither in data_optics nor per particle)")
            return default
        value = number(raw)
        if not np.isfinite(value):
            raise InputError(f"{columns.path}: row {row + 1}, column {name}: {raw!s} is not a finite number")
        return value

    def positive(name: str) -> float:
        value = finite(name)
        if value <= 0:
            raise InputError(f"{columns.path}: row {row + 1}, column {name}: {value:g} must be positive")
        return value

    flipped = "phase_flipped" if finite("rlnCtfDataArePhaseFlipped", 0) else ""
    for name in _PIXEL_SIZE:
        if columns.has(name):
            pixel_size_A = positive(name)
            break
    else:
        if not (columns.has("rlnDetectorPixelSize") and columns.has("rlnMagnification")):
            raise InputError(f"{columns.path}: no pixel size: column rlnImagePixelSize is missing")
        pixel_size_A = positive("rlnDetectorPixelSize") * 1e4 / positive("rlnMagnification")
    m00, m01, m10, m11 = (
        finite(name, default) for name, default in zip(MAGNIFICATION_MATRIX, (1.0, 0.0, 0.0, 1.0), strict=True)
    )
    name = columns.value("rlnOpticsGroupName", row)
    return OpticsGroup(
        name=f"opticsGroup{count}" if name is None else str(name),
        voltage_kV=positive("rlnVoltage"),
        spherical_aberration_mm=finite("rlnSphericalAberration"),
        amplitude_contrast=finite("rlnAmplitudeContrast", 0.0),
        pixel_size_A=pixel_size_A,
        box=checked_box(finite("rlnImageSize", 0), columns.path, row, "rlnImageSize"),
        beam_tilt_mrad=(finite("rlnBeamTiltX", 0.0), finite("rlnBeamTiltY", 0.0)),
        odd_zernike=_zernike(columns, "rlnOddZernike", row),
        even_zernike=_zernike(columns, "rlnEvenZernike", row),
        magnification_matrix=((m00, m01), (m10, m11)),
        ctf_applied="premultiplied" if finite("rlnCtfDataAreCtfPremultiplied", 0) else flipped,
    )


def _zernike(columns: _Columns, name: str, row: int) -> tuple[float, ...]:
    text = columns.value(name, row)
    if text is None:
        return ()
    try:
        values = tuple(float(value) for value in json.loads(text))
        if not np.isfinite(values).all():
            raise ValueError("not finite")
        return values
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(f"{columns.path}: row {row + 1}, column {name}: {text!s} is not a list [a,b,...]") from error


def _origin(columns: _Columns, axis: str, pixel_size_A: np.ndarray) -> np.ndarray:
    """(n,) origins in A: rlnOrigin?Angst, else the pixels of RELION 3.0, else 0."""
    if columns.has(f"rlnOrigin{axis}Angst"):
        return columns.numbers(f"rlnOrigin{axis}Angst")
    if columns.has(f"rlnOrigin{axis}"):
        return columns.numbers(f"rlnOrigin{axis}") * pixel_size_A
    log.warning("%s: column rlnOrigin%sAngst is missing: shifts of 0 are used", columns.path, axis)
    return np.zeros(len(pixel_size_A))


def _half_sets(columns: _Columns) -> np.ndarray:
    """(n,) int8: 0 or 1, or all -1 where the file has none."""
    if not columns.has("rlnRandomSubset"):
        return np.full(len(columns.table), -1, np.int8)
    subset = columns.numbers("rlnRandomSubset")
    wrong = ~np.isin(subset, (1, 2))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise InputError(f"{columns.path}: row {row + 1}, column rlnRandomSubset: {subset[row]:g} is neither 1 nor 2")
    return (subset - 1).astype(np.int8)


def _micrographs(table: pd.DataFrame) -> np.ndarray | None:
    """(n,) int32, see ``number_micrographs``; prepare's own column goes before RELION's."""
    names = next((name for name in ("flexMicrograph", "rlnMicrographName") if name in table), None)
    return None if names is None else number_micrographs(table[names])


def _image_names(tables: StarTables) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Distinct stack names, (n,) int32 stack of each particle, (n,) int64 0-based slice, from ``000001@path``."""
    names = tables.particles["rlnImageName"].tolist()
    parts = [name.partition("@") for name in names]  # a name without @ is a single image without a slice number
    slices = np.array([number(part[0]) if part[1] else 1.0 for part in parts])
    stacks = np.array([part[2] if part[1] else part[0] for part in parts], object)
    with np.errstate(invalid="ignore"):
        bad = ~((slices >= 1) & (slices <= _LAST_SLICE)) | (slices % 1 != 0) | (stacks == "")
    if bad.any():
        row = int(np.argmax(bad))
        raise InputError(
            f"{tables.path}: row {row + 1}, column rlnImageName: {names[row] or 'an empty name'} is not slice@stack, "
            "slices from 1"
        )
    index, distinct = pd.factorize(stacks)
    return [str(name) for name in distinct], index.astype(np.int32), slices.astype(np.int64) - 1
