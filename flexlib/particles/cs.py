"""CryoSPARC .cs files as ``Particles``, joined with their passthrough file on ``uid`` (layout: ``cs_file.py``).

Sources: the public ``cryosparc-tools`` (fields and types); conversions checked against pyem's and cryoDRGN's results
(docs/conventions.md). Higher-order aberrations are turned into RELION's Zernike coefficients.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from flexlib.errors import InputError
from flexlib.particles.cs_file import CsFile, read_cs_file
from flexlib.particles.table import (
    OpticsGroup,
    Particles,
    checked_box,
    checked_numbers,
    checked_rotations,
    find_image_files,
    number_micrographs,
)

log = logging.getLogger(__name__)

_LEAST_AREA = 1e-3  # of a pixel after anisotropic magnification


class _Fields:
    """The columns of a .cs file, and those that only its passthrough file has, matched on uid."""

    def __init__(self, path: Path, passthrough: Path | None) -> None:
        self.path, self.main = path, read_cs_file(path)
        self.uid = unique_uids(self.main) if "uid" in self.main.names else None
        self.other: CsFile | None = None
        if passthrough is not None:
            self.other = read_cs_file(passthrough)
            self.rows = matching_rows(self._required_uid(), unique_uids(self.other), path, passthrough)

    def _required_uid(self) -> np.ndarray:
        if self.uid is None:
            raise InputError(f"{self.path}: column uid is missing: passthrough files are joined on it")
        return self.uid

    def __len__(self) -> int:
        return len(self.main)

    def __contains__(self, name: str) -> bool:
        return name in self.main.names or (self.other is not None and name in self.other.names)

    def __getitem__(self, name: str) -> np.ndarray:
        """(n, ...) values; texts as bytes. Raises InputError where no file has the column."""
        if name in self.main.names:
            return self.main.column(name)
        if self.other is not None and name in self.other.names:
            return self.other.column(name)[self.rows]
        raise InputError(f"{self.path}: column {name} is missing (is it in a passthrough file?)")

    def numbers(self, name: str, default: float | None = None, width: int | None = None) -> np.ndarray:
        """(n,) float64, or (n, ``width``); ``default`` where no file has the column, InputError if there is none."""
        if default is not None and name not in self:
            return np.full(len(self), default)
        where = name if self.other is None or name in self.main.names else f"{name} (of {self.other.path})"
        values = self[name]
        if int(np.prod(values.shape[1:])) != (width or 1):
            raise InputError(f"{self.path}: column {where}: {values.shape[1:]} numbers a row, {width or 1} expected")
        return checked_numbers(values.reshape(len(self), -1) if width else values.reshape(-1), self.path, where)


def unique_uids(table: CsFile) -> np.ndarray:
    """(n,) uint64, each once. Raises InputError, naming the rows, where one comes twice."""
    if "uid" not in table.names:
        raise InputError(f"{table.path}: column uid is missing")
    uid = table.column("uid")
    if uid.dtype.kind not in "iu" or uid.ndim != 1:
        raise InputError(f"{table.path}: column uid: {uid.dtype} {uid.shape[1:]} is not one whole number a row")
    order = np.argsort(uid, kind="stable")
    again = np.flatnonzero(np.diff(uid[order]) == 0)
    if len(again):
        at = again[np.argmin(order[again + 1])]
        raise InputError(
            f"{table.path}: row {order[at + 1] + 1}, column uid: {uid[order[at]]} stands in row {order[at] + 1} already"
        )
    return uid.astype(np.uint64)


def matching_rows(uid: np.ndarray, others: np.ndarray, path: Path, other_path: Path) -> np.ndarray:
    """(n,) the row of ``others`` that has each of ``uid``. Raises InputError, naming the first, where one is absent."""
    order = np.argsort(others, kind="stable")
    position = np.minimum(np.searchsorted(others[order], uid), len(order) - 1)
    match = order[position]
    absent = others[match] != uid
    if absent.any():
        row = int(np.argmax(absent))
        raise InputError(
            f"{path}: row {row + 1}, column uid: {uid[row]} is not in {other_path} ({int(absent.sum())} of {len(uid)} "
            "particles are not)"
        )
    return match


def read_cs(path: Path, passthrough: Path | None = None, image_root: Path | None = None) -> Particles:
    """Particles of a CryoSPARC file; see ``read.read_particles``."""
    fields = _Fields(path, passthrough)
    count, numbers = len(fields), fields.numbers
    pose = numbers("alignments3D/pose", width=3)
    origin_A = numbers("alignments3D/shift", width=2) * _alignment_pixel_size(fields)[:, None]
    if "ctf/shift_A" in fields:
        origin_A = origin_A - numbers("ctf/shift_A", width=2)
    optics, optics_index = _optics_groups(fields, path)
    names, stack_index = _image_names(fields)
    return Particles(
        optics=optics,
        optics_index=optics_index,
        rotation=checked_rotations(Rotation.from_rotvec(pose), path, "alignments3D/pose"),
        origin_A=origin_A,
        defocus_u_A=numbers("ctf/df1_A"),
        defocus_v_A=numbers("ctf/df2_A"),
        defocus_angle_rad=numbers("ctf/df_angle_rad"),
        phase_shift_rad=numbers("ctf/phase_shift_rad", 0.0),
        ctf_bfactor_A2=numbers("ctf/bfactor", 0.0),
        ctf_scale=numbers("ctf/scale", 1.0),
        half_set=_half_sets(numbers("alignments3D/split"), path) if "alignments3D/split" in fields else _none(count),
        contrast_sign=_signs(numbers("blob/sign"), path),
        stack_paths=find_image_files(names, stack_index, path, image_root, "blob/path"),
        stack_index=stack_index,
        image_index=_slices(numbers("blob/idx"), path),
        source_path=path,
        source_row=np.arange(count),
        uid=fields.uid,
        particle_scale=numbers("alignments3D/alpha") if "alignments3D/alpha" in fields else None,
        micrograph=_micrographs(fields),
        extra={"stack_names": names, "image_column": "blob/path"},
    )


def alignments(path: Path, passthrough: Path | None = None) -> tuple[CsFile, np.ndarray]:
    """A .cs file with all columns of its 3D alignment, those that only its passthrough file has among them.

    Returns
    -------
    table
        n rows.
    pixel_size_A
        (n,) of the grid that ``alignments3D/shift`` counts in.
    """
    fields = _Fields(path, passthrough)
    others = () if fields.other is None else fields.other.names
    names = [name for name in others if name.startswith("alignments3D/") and name not in fields.main.names]
    return fields.main.with_columns({name: fields[name] for name in names}), _alignment_pixel_size(fields)


def _none(count: int) -> np.ndarray:
    return np.full(count, -1, np.int8)


def _alignment_pixel_size(fields: _Fields) -> np.ndarray:
    """(n,) A: shifts are in pixels of the grid that was aligned, which may be coarser than the images."""
    return fields.numbers("alignments3D/psize_A" if "alignments3D/psize_A" in fields else "blob/psize_A")


def _image_names(fields: _Fields) -> tuple[tuple[str, ...], np.ndarray]:
    """Distinct stack names, sorted, and (n,) int32 stack of each particle."""
    paths = fields["blob/path"]
    if paths.dtype.kind != "S" or paths.ndim != 1:
        raise InputError(f"{fields.path}: column blob/path holds no texts")
    runs, lengths = _runs(paths)
    names, index = np.unique(paths[runs], return_inverse=True)
    if (empty := names[index] == b"").any():
        row = int(runs[np.argmax(empty)])
        raise InputError(f"{fields.path}: row {row + 1}, column blob/path: no image file is named")
    decoded = tuple(name.decode("utf-8", "surrogateescape") for name in names.tolist())
    return decoded, np.repeat(index, lengths).astype(np.int32)


def _runs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First row and length of each run of equal values: neighbours mostly share a stack, and a micrograph."""
    first = np.flatnonzero(np.append(True, values[1:] != values[:-1]))
    return first, np.diff(np.append(first, len(values)))


def _micrographs(fields: _Fields) -> np.ndarray | None:
    """(n,) int32, see ``number_micrographs``; None where neither column is there and names them."""
    for name in ("location/micrograph_uid", "location/micrograph_path"):
        if name not in fields:
            continue
        values = fields[name]
        if values.ndim == 1 and values.dtype.kind in "iuS":
            runs, lengths = _runs(values)
            number = number_micrographs(values[runs])
            if number is not None:
                return np.repeat(number, lengths)
    return None


def _half_sets(split: np.ndarray, path: Path) -> np.ndarray:
    wrong = ~np.isin(split, (0, 1))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise InputError(f"{path}: row {row + 1}, column alignments3D/split: {split[row]:g} is neither 0 nor 1")
    if (split == split[0]).all():  # never split: CryoSPARC leaves a constant
        return _none(len(split))
    return split.astype(np.int8)


def _slices(index: np.ndarray, path: Path) -> np.ndarray:
    wrong = (index < 0) | (index > 2**31) | (index % 1 != 0)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise InputError(f"{path}: row {row + 1}, column blob/idx: {index[row]:g} is no image's number")
    return index.astype(np.int64)


def _signs(sign: np.ndarray, path: Path) -> np.ndarray:
    wrong = ~np.isin(sign, (-1, 1))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise InputError(f"{path}: row {row + 1}, column blob/sign: {sign[row]:g} is neither 1 nor -1")
    return sign


def _optics_groups(fields: _Fields, path: Path) -> tuple[tuple[OpticsGroup, ...], np.ndarray]:
    """Particles that agree in exposure group, microscope and aberrations; (n,) int32 index."""
    numbers = fields.numbers
    count = len(fields)
    pixel_size_A, voltage_kV = numbers("blob/psize_A"), numbers("ctf/accel_kv")
    for name, values in (("blob/psize_A", pixel_size_A), ("ctf/accel_kv", voltage_kV)):
        if (values <= 0).any():
            raise InputError(f"{path}: row {int(np.argmax(values <= 0)) + 1}, column {name}: must be positive")
    shape = numbers("blob/shape", width=2) if "blob/shape" in fields else np.zeros((count, 2))
    if (shape[:, 0] != shape[:, 1]).any():
        row = int(np.argmax(shape[:, 0] != shape[:, 1]))
        raise InputError(f"{path}: row {row + 1}, column blob/shape: {shape[row]} is not square")

    checked_box(shape.max(), path, int(shape[:, 0].argmax()), "blob/shape")
    checked_box(shape.min(), path, int(shape[:, 0].argmin()), "blob/shape")

    def vector(name: str, length: int) -> np.ndarray:
        return numbers(name, width=length) if name in fields else np.zeros((count, length))

    parts = [
        numbers("ctf/exp_group_id", 0)[:, None],
        np.stack([voltage_kV, numbers("ctf/cs_mm"), numbers("ctf/amp_contrast"), pixel_size_A], 1),
        shape[:, :1],
        vector("ctf/tilt_A", 2),
        vector("ctf/trefoil_A", 2),
        vector("ctf/tetra_A", 4),
        vector("ctf/anisomag", 4),
    ]
    values, index = _distinct_rows(np.concatenate(parts, 1))
    if not (np.abs(np.linalg.det(np.eye(2) + values[:, 14:18].reshape(-1, 2, 2))) > _LEAST_AREA).all():
        raise InputError(f"{path}: column ctf/anisomag: a magnification that no image can be seen through")
    if (values[:, 6:] != 0).any():
        log.warning(
            "%s: higher-order aberrations are applied as others found CryoSPARC's formulae to be; prepare asks the "
            "images whether the sign of the odd ones is right",
            path,
        )
    return tuple(_optics_group(row) for row in values), index.astype(np.int32)


def _distinct_rows(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct rows of a (n, m) array, in order, and (n,) which one each row is; quick where there are few."""
    index = np.zeros(len(table), np.int64)
    for column in table.T:
        if (column == column[0]).all():
            continue
        _, codes = np.unique(column, return_inverse=True)
        _, index = np.unique(index * (int(codes.max()) + 1) + codes, return_inverse=True)
    _, first = np.unique(index, return_index=True)
    return table[first], index


def _optics_group(row: np.ndarray) -> OpticsGroup:
    """One group from (id, kV, Cs mm, amplitude contrast, A/px, box, tilt A 2, trefoil A 2, tetra A 4, anisomag 4).

    With theta = atan2(ky, kx): odd phase -2 pi lambda^2 k^3 (tilt . (cos, sin) theta) is RELION's beam tilt with
    ``tilt_A = Cs * tilt_rad``; trefoil and tetrafoil are Zernike terms Z3^+-3, Z4^+-2 (with Z2^+-2) and Z4^+-4.
    """
    from flexlib.particles.table import wavelength_A

    group_id, voltage_kV, cs_mm, amplitude, pixel_size_A, box = row[:6]
    tilt_A, trefoil_A, tetra_A, anisomag = row[6:8], row[8:10], row[10:14], row[14:18].reshape(2, 2)
    wavelength = wavelength_A(voltage_kV)
    odd: tuple[float, ...] = ()
    even: tuple[float, ...] = ()
    beam_tilt_mrad = (0.0, 0.0)
    if tilt_A.any():
        if cs_mm > 0:
            beam_tilt_mrad = (float(1e-4 * tilt_A[0] / cs_mm), float(1e-4 * tilt_A[1] / cs_mm))
        else:
            log.warning("ctf/tilt_A is ignored in exposure group %d: its spherical aberration is 0", group_id)
    if trefoil_A.any():
        cosine, sine = -2 * np.pi / 3 * wavelength**2 * trefoil_A
        odd = (0.0, 0.0, float(sine), 0.0, 0.0, float(cosine))
    if tetra_A.any():
        cos2, sin2 = 2 * np.pi * wavelength**3 * tetra_A[:2] / 4
        cos4, sin4 = np.pi / 2 * wavelength**3 * tetra_A[2:]
        even = tuple(float(v) for v in (0, 3 * sin2, 0, 3 * cos2, sin4, sin2, 0, cos2, cos4))
    m = np.linalg.inv(np.eye(2) + anisomag).T
    return OpticsGroup(
        name=f"exposureGroup{int(group_id)}",
        voltage_kV=float(voltage_kV),
        spherical_aberration_mm=float(cs_mm),
        amplitude_contrast=float(amplitude),
        pixel_size_A=float(pixel_size_A),
        box=int(box),
        beam_tilt_mrad=beam_tilt_mrad,
        odd_zernike=odd,
        even_zernike=even,
        magnification_matrix=((float(m[0, 0]), float(m[0, 1])), (float(m[1, 0]), float(m[1, 1]))),
    )
