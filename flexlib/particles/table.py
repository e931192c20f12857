"""The particle set as the rest of flexlib sees it, whatever file it came from.

Conventions (docs/conventions.md): rotation maps volume to view coordinates, ``view = rotation @ (x, y, z)``;
a projection of the volume is moved by ``-origin`` to lie on the image (RELION's sign);
angles are radians, lengths Angstrom; white density is positive once ``contrast_sign`` is applied.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from flexlib.errors import InputError
from flexlib.files import is_there

if TYPE_CHECKING:
    from scipy.spatial.transform import Rotation

_MAX_BOX = 2**16  # pixels


@dataclass(frozen=True)
class OpticsGroup:
    """What a group of particles shares: microscope and sampling.

    ``odd_zernike``/``even_zernike`` follow RELION's order and units (rad A^n); ``magnification_matrix`` is RELION's
    (2, 2) MagMat; ``beam_tilt_mrad`` is (x, y); ``ctf_applied`` is what was done to the images beforehand: "" nothing,
    "phase_flipped" or "premultiplied" (with their CTF). Source: RELION ``metadata_label.h``, ``obs_model.cpp``.
    """

    name: str
    voltage_kV: float
    spherical_aberration_mm: float
    amplitude_contrast: float
    pixel_size_A: float
    box: int
    beam_tilt_mrad: tuple[float, float] = (0.0, 0.0)
    odd_zernike: tuple[float, ...] = ()
    even_zernike: tuple[float, ...] = ()
    magnification_matrix: tuple[tuple[float, float], tuple[float, float]] = ((1.0, 0.0), (0.0, 1.0))
    ctf_applied: str = ""


@dataclass(frozen=True)
class Particles:
    """n particles with poses, CTF parameters, half-sets and where their images lie.

    All arrays have n rows in the order of the input file.
    """

    optics: tuple[OpticsGroup, ...]
    optics_index: np.ndarray  # (n,) int32, into optics
    rotation: np.ndarray  # (n, 3, 3) float64, view = rotation @ volume
    origin_A: np.ndarray  # (n, 2) float64, RELION's rlnOriginX/YAngst
    defocus_u_A: np.ndarray  # (n,) float64, underfocus positive
    defocus_v_A: np.ndarray  # (n,) float64
    defocus_angle_rad: np.ndarray  # (n,) float64, x axis to U
    phase_shift_rad: np.ndarray  # (n,) float64
    ctf_bfactor_A2: np.ndarray  # (n,) float64, envelope exp(-B k^2 / 4)
    ctf_scale: np.ndarray  # (n,) float64
    half_set: np.ndarray  # (n,) int8, 0 or 1; -1 where the input has none
    contrast_sign: np.ndarray  # (n,) float64, multiply an image by it and density is white
    stack_paths: tuple[Path, ...]
    stack_index: np.ndarray  # (n,) int32, into stack_paths
    image_index: np.ndarray  # (n,) int64, 0-based slice of the stack
    source_path: Path  # the .star or .cs file
    source_row: np.ndarray  # (n,) int64, row in source_path
    uid: np.ndarray | None = None  # (n,) uint64, CryoSPARC only
    particle_scale: np.ndarray | None = None  # (n,) float64, CryoSPARC's alpha; None where the input has none
    micrograph: np.ndarray | None = None  # (n,) int32, see ``number_micrographs``
    extra: dict[str, Any] = field(default_factory=dict)  # about the whole set, never per row

    def __len__(self) -> int:
        return len(self.optics_index)

    def subset(self, rows: np.ndarray) -> Particles:
        """The particles at ``rows`` ((m,) int or (n,) bool), in that order; shared fields are kept whole."""
        per_row = {
            name: getattr(self, name)[rows]
            for name in (
                "optics_index",
                "rotation",
                "origin_A",
                "defocus_u_A",
                "defocus_v_A",
                "defocus_angle_rad",
                "phase_shift_rad",
                "ctf_bfactor_A2",
                "ctf_scale",
                "half_set",
                "contrast_sign",
                "stack_index",
                "image_index",
                "source_row",
            )
        }
        optional = {
            name: None if getattr(self, name) is None else getattr(self, name)[rows]
            for name in ("uid", "particle_scale", "micrograph")
        }
        columns: dict[str, Any] = per_row | optional
        return replace(self, **columns)

    def describe_row(self, row: int, column: str) -> str:
        """``file: row r, column c`` (r counts the input's particles from 1): how every message names a row."""
        return f"{self.source_path}: row {self.source_row[row] + 1}, column {column}"


def checked_numbers(values: Any, path: Path, column: str) -> np.ndarray:
    """``values`` as float64 of the same shape.

    Raises InputError that names the first row (from 1) that is not a finite number.
    """
    array = np.asarray(values)
    if array.dtype.kind not in "fiubOSU":
        raise InputError(f"{path}: column {column}: {array.dtype} is no type of numbers")
    if array.dtype.kind in "OSU":
        array = np.array([number(value) for value in array.ravel().tolist()]).reshape(array.shape)
    with np.errstate(over="ignore", invalid="ignore"):  # of a wider type: then infinite, and refused
        numbers = array.astype(np.float64)
    bad = ~np.isfinite(numbers).all(tuple(range(1, numbers.ndim)))
    if bad.any():
        row = int(np.argmax(bad))
        value = np.asarray(values)[row]
        raise InputError(f"{path}: row {row + 1}, column {column}: {value!s} is not a finite number")
    return numbers


def number(value: Any) -> float:
    """``value`` as a number; nan where it is none."""
    try:
        return np.nan if "_" in str(value) else float(value)  # Python would read 1_000
    except (TypeError, ValueError, OverflowError):
        return np.nan


def number_micrographs(names: Any) -> np.ndarray | None:
    """(n,) int32: which micrograph each particle is from, numbered from 0 as they first appear.

    ``names`` (n,) are texts or numbers; None where one of them is empty, 0 or nan: then micrographs are not known.
    """
    number, distinct = pd.factorize(names)
    return number.astype(np.int32) if (number >= 0).all() and all(distinct) else None


def checked_rotations(rotation: Rotation, path: Path, columns: str) -> np.ndarray:
    """(n, 3, 3) float64, volume to view, of rotations from view to volume.

    Raises InputError that names the first row (from 1) whose angles were too large to mean a rotation.
    """
    matrices = np.ascontiguousarray(rotation.as_matrix().transpose(0, 2, 1))
    bad = ~np.isfinite(matrices).all((1, 2))
    if bad.any():
        raise InputError(f"{path}: row {int(np.argmax(bad)) + 1}, column {columns}: is no rotation")
    return matrices


def checked_box(side: float, path: Path, row: int, column: str) -> int:
    """A box in pixels as the metadata state it, 0 where they do not. Raises InputError where no image can have it."""
    if not 0 <= side <= _MAX_BOX:
        raise InputError(f"{path}: row {row + 1}, column {column}: a box of {side:g} pixels is none")
    return int(side)


def find_image_files(
    names: Sequence[str], stack_index: np.ndarray, metadata_path: Path, image_root: Path | None, column: str
) -> tuple[Path, ...]:
    """Where each image stack lies (``find_image_file``).

    ``stack_index`` is (n,), each row's among ``names``. Raises InputError, naming the first row, where a path would
    leave the folders it may be in.
    """
    found = [find_image_file(name, metadata_path, image_root) for name in names]
    for stack, (name, path) in enumerate(zip(names, found, strict=True)):
        if re.search(r"[\x00-\x1f\x7f]", name):
            complaint = f"{name!r} holds control characters"
        elif path is None:
            where = "the particle file's and the working folder" if image_root is None else str(image_root)
            complaint = f"{name} leads out of {where}: image_root must be a folder that holds the images too"
        else:
            continue
        row = int(np.argmax(stack_index == stack))  # a pass over all rows, for the one that is refused
        raise InputError(f"{metadata_path}: row {row + 1}, column {column}: {complaint}")
    return tuple(path for path in found if path is not None)


def find_image_file(name: str, metadata_path: Path, image_root: Path | None) -> Path | None:
    """Where an image stack named in a metadata file lies.

    A relative name is looked up in ``image_root`` if given, else in the metadata file's folder and then in each of its
    parents. A leading ``>`` (CryoSPARC export) and RELION's ``:mrcs`` at the end are dropped, and where there is no
    such file, .mrc and .mrcs stand for each other (RELION wants stacks to end in .mrcs, CryoSPARC writes .mrc). A file
    found nowhere gets the first folder searched: whether it exists is asked later, by ``stack.open_stacks``.

    A name that climbs out of these folders by ``..`` counts from ``image_root``, or else from the metadata file's
    folder, and must end in ``image_root`` (by default in the working folder or the metadata file's); None where it
    does not. Symbolic links may lead anywhere: they are the user's own.
    """
    plain = Path(re.sub(r":mrcs?$", "", name.removeprefix(">")))
    folder = metadata_path.absolute().parent
    if not plain.is_absolute():
        plain = Path(os.path.normpath(plain))  # not through links: a/../b is b
    if plain.parts[:1] == ("..",):
        within = [folder, Path.cwd()] if image_root is None else [Path(image_root).absolute()]
        starts = dict.fromkeys([within[0], folder])
        ends = [Path(os.path.normpath(start / plain)) for start in starts]
        roots = [end for end in ends if any(end.is_relative_to(one) for one in within)]
        if not roots:
            return None
        plain, roots = Path(roots[0].name), [end.parent for end in roots]
    else:
        roots = [Path(image_root).absolute()] if image_root is not None else [folder, *folder.parents]
    other_suffix = {".mrc": ".mrcs", ".mrcs": ".mrc"}.get(plain.suffix)
    for candidate in (plain, *([plain.with_suffix(other_suffix)] if other_suffix else [])):
        for root in roots:  # of an absolute candidate the root does not matter
            if is_there(root / candidate, as_file=True):
                return root / candidate
    return roots[0] / plain


def wavelength_A(voltage_kV: float) -> float:
    """Relativistic electron wavelength in A."""
    volt = 1e3 * voltage_kV
    return 12.2643247 / sqrt(volt * (1.0 + 0.978466e-6 * volt))
