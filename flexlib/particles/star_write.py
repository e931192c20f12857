"""Writing STAR files: particles as RELION's tables, and any table as text."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.spatial.transform import Rotation

from flexlib.files import atomic_path
from flexlib.particles.star import MAGNIFICATION_MATRIX
from flexlib.particles.table import OpticsGroup, Particles

_CHUNK_ROWS = 50_000
_PLAIN = re.compile(r"[^\s#\"'_]\S*").fullmatch  # a text that needs no quotes


def relion_tables(particles: Particles, stack_names: list[str] | None = None) -> dict[str, pd.DataFrame]:
    """``optics`` and ``particles`` tables in RELION 3.1's columns and units.

    ``stack_names`` replaces the stacks' names as read. Particles without half-sets get no rlnRandomSubset; where
    contrast is not white or particles have scales of their own, ``flexContrastSign`` and ``flexScale`` say so.
    """
    given = stack_names if stack_names is not None else particles.extra["stack_names"]
    names = [f"{name}:mrcs" if name.endswith(".mrc") else name for name in given]  # else RELION takes it for a map
    rot, tilt, psi = euler_angles(particles.rotation).T
    table = pd.DataFrame(
        {
            "rlnImageName": [
                f"{index + 1:06d}@{names[stack].removeprefix('>')}"
                for index, stack in zip(particles.image_index, particles.stack_index, strict=True)
            ],
            "rlnOpticsGroup": particles.optics_index + 1,
            "rlnAngleRot": rot,
            "rlnAngleTilt": tilt,
            "rlnAnglePsi": psi,
            "rlnOriginXAngst": particles.origin_A[:, 0],
            "rlnOriginYAngst": particles.origin_A[:, 1],
            "rlnDefocusU": particles.defocus_u_A,
            "rlnDefocusV": particles.defocus_v_A,
            "rlnDefocusAngle": np.rad2deg(particles.defocus_angle_rad),
            "rlnPhaseShift": np.rad2deg(particles.phase_shift_rad),
            "rlnCtfBfactor": particles.ctf_bfactor_A2,
            "rlnCtfScalefactor": particles.ctf_scale,
        }
    )
    if (particles.half_set >= 0).all():
        table["rlnRandomSubset"] = particles.half_set.astype(int) + 1
    if (particles.contrast_sign != 1).any():
        table["flexContrastSign"] = particles.contrast_sign.astype(int)
    if particles.particle_scale is not None:
        table["flexScale"] = particles.particle_scale
    return {"optics": _optics_table(particles.optics), "particles": table}


def euler_angles(rotation: np.ndarray) -> np.ndarray:
    """(n, 3) rot, tilt, psi in degrees of (n, 3, 3) rotations."""
    with warnings.catch_warnings():  # at tilt 0 or 180 scipy says that rot and psi are not unique: any pair will do
        warnings.simplefilter("ignore", UserWarning)
        return Rotation.from_matrix(rotation.transpose(0, 2, 1)).as_euler("ZYZ", degrees=True)


def _optics_table(optics: tuple[OpticsGroup, ...]) -> pd.DataFrame:
    rows = []
    for number, group in enumerate(optics, 1):
        row: dict[str, Any] = {
            "rlnOpticsGroup": number,
            "rlnOpticsGroupName": group.name,
            "rlnVoltage": group.voltage_kV,
            "rlnSphericalAberration": group.spherical_aberration_mm,
            "rlnAmplitudeContrast": group.amplitude_contrast,
            "rlnImagePixelSize": group.pixel_size_A,
            "rlnImageSize": group.box,
            "rlnImageDimensionality": 2,
        }
        if any(any(other.beam_tilt_mrad) for other in optics):
            row["rlnBeamTiltX"], row["rlnBeamTiltY"] = group.beam_tilt_mrad
        if any(other.odd_zernike for other in optics):
            row["rlnOddZernike"] = _bracketed(group.odd_zernike)
        if any(other.even_zernike for other in optics):
            row["rlnEvenZernike"] = _bracketed(group.even_zernike)
        if any(other.magnification_matrix != ((1.0, 0.0), (0.0, 1.0)) for other in optics):
            row |= zip(MAGNIFICATION_MATRIX, np.ravel(group.magnification_matrix), strict=True)
        rows.append(row)
    return pd.DataFrame(rows)


def _bracketed(values: tuple[float, ...]) -> str:
    return "[" + ",".join(f"{value:.12g}" for value in values or (0.0,)) + "]"


def write_star(blocks: Mapping[str, pd.DataFrame], path: str | Path) -> None:
    """Write the blocks as loops of a STAR file, atomically; numbers with 9 significant digits, missing ones ``nan``."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", errors="surrogateescape") as file:
        if "optics" in blocks:
            file.write("\n# version 30001\n")  # RELION 3.1's layout, read by all later versions
        for name, frame in blocks.items():
            file.write(f"\ndata_{name}\n\nloop_\n")
            file.writelines(f"_{label} #{number}\n" for number, label in enumerate(frame, 1))
            for first in range(0, len(frame), _CHUNK_ROWS):
                rows = frame.iloc[first : first + _CHUNK_ROWS]
                file.writelines(_row_texts([rows[label].to_numpy() for label in frame]))
            file.write("\n")


def _row_texts(columns: list[np.ndarray]) -> Iterable[str]:
    """Lines of a loop; one format for a whole row is quicker than one for each value."""
    formats, varying = [], []
    for values in columns:
        if (values == values[0]).all():
            formats.append(star_values(values[:1])[0].replace("%", "%%"))
            continue
        numeric = values.dtype.kind in "iuf"
        formats.append({"f": "%.9g"}.get(values.dtype.kind, "%d") if numeric else "%s")
        varying.append(values.tolist() if numeric else star_values(values))
    row_format = "\t".join(formats) + "\n"
    if not varying:
        return [row_format % ()] * len(columns[0])
    return map(row_format.__mod__, zip(*varying, strict=True))


def star_values(values: np.ndarray) -> list[str]:
    """(n,) numbers or texts as they stand in a STAR file: 9 significant digits, quotes where a text needs them."""
    if values.dtype.kind in "iub":
        return list(map(str, values.astype(np.uint64 if values.dtype.kind == "u" else np.int64).tolist()))
    if values.dtype.kind == "f":
        return list(map("%.9g".__mod__, values.tolist()))
    return [_quoted(str(value)) for value in values.tolist()]


def _quoted(text: str) -> str:
    if _PLAIN(text):
        return text
    return f"'{text}'" if '"' in text else f'"{text}"'
