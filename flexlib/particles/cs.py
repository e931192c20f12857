"""CryoSPARC .cs files: NumPy structured arrays, joined with their passthrough file on ``uid``.

Sources: the public ``cryosparc-tools`` (fields and types); conversions checked against pyem's and cryoDRGN's results
(docs/conventions.md). Higher-order aberrations are turned into RELION's Zernike coefficients.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from flexlib.errors import InputError
from flexlib.particles.table import OpticsGroup, Particles, checked_numbers, find_image_file

log = logging.getLogger(__name__)

_COMPRESSED = b"\x95CSDAT"


def read_fields(path: Path) -> dict[str, np.ndarray]:
    """The columns of one .cs file by name. Raises InputError where it is not a plain structured array."""
    if not path.is_file():
        raise InputError(f"{path}: CryoSPARC file not found")
    with path.open("rb") as file:
        if file.read(len(_COMPRESSED)) == _COMPRESSED:
            raise InputError(
                f"{path}: compressed CryoSPARC dataset: save it with cryosparc-tools as format NUMPY first"
            )
    try:
        table = np.load(path, allow_pickle=False, max_header_size=2**30)
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"{path}: not a readable CryoSPARC .cs file ({' '.join(str(error).split())})") from error
    if table.dtype.names is None or len(table) == 0:
        raise InputError(f"{path}: no particle rows in this .cs file")
    return {name: table[name] for name in table.dtype.names}


def _join(fields: dict[str, np.ndarray], path: Path, passthrough: Path) -> dict[str, np.ndarray]:
    """Add the columns that only ``passthrough`` has, matched on uid."""
    other = read_fields(passthrough)
    for name, file in ((fields, path), (other, passthrough)):
        if "uid" not in name:
            raise InputError(f"{file}: column uid is missing")
    order = np.argsort(other["uid"], kind="stable")
    position = np.minimum(np.searchsorted(other["uid"][order], fields["uid"]), len(order) - 1)
    match = order[position]
    absent = other["uid"][match] != fields["uid"]
    if absent.any():
        row = int(np.argmax(absent))
        raise InputError(f"{path}: row {row + 1}, column uid: {fields['uid'][row]} is not in passthrough {passthrough}")
    return fields | {name: values[match] for name, values in other.items() if name not in fields}


def read_cs(path: Path, passthrough: Path | None = None, image_root: Path | None = None) -> Particles:
    """Particles of a CryoSPARC file; see ``read.read_particles``."""
    fields = read_fields(path)
    if passthrough is not None:
        fields = _join(fields, path, passthrough)
    count = len(next(iter(fields.values())))

    def numbers(name: str, default: float | None = None) -> np.ndarray:
        if name not in fields:
            if default is None:
                raise InputError(f"{path}: column {name} is missing (is it in a passthrough file?)")
            return np.full(count, default)
        return checked_numbers(fields[name], path, name)

    pose = numbers("alignments3D/pose")
    origin_A = numbers("alignments3D/shift") * _alignment_pixel_size(fields, numbers)[:, None]
    if "ctf/shift_A" in fields:
        origin_A = origin_A - numbers("ctf/shift_A")
    optics, optics_index = _optics_groups(fields, numbers, path)
    names, stack_index = np.unique(_text(fields, "blob/path", path), return_inverse=True)
    return Particles(
        optics=optics,
        optics_index=optics_index,
        rotation=np.ascontiguousarray(Rotation.from_rotvec(pose).as_matrix().transpose(0, 2, 1)),
        origin_A=origin_A,
        defocus_u_A=numbers("ctf/df1_A"),
        defocus_v_A=numbers("ctf/df2_A"),
        defocus_angle_rad=numbers("ctf/df_angle_rad"),
        phase_shift_rad=numbers("ctf/phase_shift_rad", 0.0),
        ctf_bfactor_A2=numbers("ctf/bfactor", 0.0),
        ctf_scale=numbers("ctf/scale", 1.0),
        half_set=_half_sets(numbers("alignments3D/split"), path) if "alignments3D/split" in fields else _none(count),
        contrast_sign=_signs(numbers("blob/sign"), path),
        stack_paths=tuple(find_image_file(str(name), path, image_root) for name in names),
        stack_index=stack_index.astype(np.int32),
        image_index=numbers("blob/idx").astype(np.int64),
        source_path=path,
        source_row=np.arange(count),
        uid=fields["uid"].astype(np.uint64) if "uid" in fields else None,
        particle_scale=numbers("alignments3D/alpha") if "alignments3D/alpha" in fields else None,
        extra={"stack_names": tuple(str(name) for name in names), "image_column": "blob/path"},
    )


def _none(count: int) -> np.ndarray:
    return np.full(count, -1, np.int8)


def _alignment_pixel_size(fields, numbers) -> np.ndarray:
    """(n,) A: shifts are in pixels of the grid that was aligned, which may be coarser than the images."""
    return numbers("alignments3D/psize_A" if "alignments3D/psize_A" in fields else "blob/psize_A")


def _text(fields: dict[str, np.ndarray], name: str, path: Path) -> np.ndarray:
    if name not in fields:
        raise InputError(f"{path}: column {name} is missing (is it in a passthrough file?)")
    values = fields[name]
    return np.char.decode(values, "utf-8") if values.dtype.kind == "S" else values.astype(str)


def _half_sets(split: np.ndarray, path: Path) -> np.ndarray:
    wrong = ~np.isin(split, (0, 1))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise InputError(f"{path}: row {row + 1}, column alignments3D/split: {split[row]:g} is neither 0 nor 1")
    if (split == split[0]).all():  # never split: CryoSPARC leaves a constant
        return _none(len(split))
    return split.astype(np.int8)


def _signs(sign: np.ndarray, path: Path) -> np.ndarray:
    wrong = ~np.isin(sign, (-1, 1))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise InputError(f"{path}: row {row + 1}, column blob/sign: {sign[row]:g} is neither 1 nor -1")
    return sign


def _optics_groups(fields, numbers, path: Path) -> tuple[tuple[OpticsGroup, ...], np.ndarray]:
    """Particles that agree in exposure group, microscope and aberrations; (n,) int32 index."""
    pixel_size_A = numbers("blob/psize_A")
    if (pixel_size_A <= 0).any():
        raise InputError(f"{path}: row {int(np.argmax(pixel_size_A <= 0)) + 1}, column blob/psize_A: must be positive")
    count = len(pixel_size_A)
    shape = numbers("blob/shape") if "blob/shape" in fields else np.zeros((count, 2))
    if (shape[:, 0] != shape[:, 1]).any():
        row = int(np.argmax(shape[:, 0] != shape[:, 1]))
        raise InputError(f"{path}: row {row + 1}, column blob/shape: {shape[row]} is not square")

    def vector(name: str, length: int) -> np.ndarray:
        return numbers(name).reshape(count, length) if name in fields else np.zeros((count, length))

    parts = [
        numbers("ctf/exp_group_id", 0)[:, None],
        np.stack([numbers("ctf/accel_kv"), numbers("ctf/cs_mm"), numbers("ctf/amp_contrast"), pixel_size_A], 1),
        shape[:, :1],
        vector("ctf/tilt_A", 2),
        vector("ctf/trefoil_A", 2),
        vector("ctf/tetra_A", 4),
        vector("ctf/anisomag", 4),
    ]
    values, index = np.unique(np.concatenate(parts, 1), axis=0, return_inverse=True)
    if (values[:, 6:] != 0).any():
        log.warning(
            "%s: higher-order aberrations are applied as CryoSPARC's formulae say; their signs are unverified", path
        )
    return tuple(_optics_group(row) for row in values), index.reshape(-1).astype(np.int32)


def _optics_group(row: np.ndarray) -> OpticsGroup:
    """One group from (id, kV, Cs mm, amplitude contrast, A/px, box, tilt A 2, trefoil A 2, tetra A 4, anisomag 4).

    With theta = atan2(ky, kx): odd phase -2 pi lambda^2 k^3 (tilt . (cos, sin) theta) is RELION's beam tilt with
    ``tilt_A = Cs * tilt_rad``; trefoil and tetrafoil are Zernike terms Z3^+-3, Z4^+-2 (with Z2^+-2) and Z4^+-4.
    """
    from flexlib.ctf import wavelength_A

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
