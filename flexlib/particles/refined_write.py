"""Writing refined poses: the input's own particle file with them in place of the poses that it gave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from flexlib.layout import ParticlesFolder
from flexlib.particles.cs import alignments
from flexlib.particles.cs_file import write_group
from flexlib.particles.input_rows import ANGLES, read_prepared_rows
from flexlib.particles.output_rows import OutputRows, converted_tables
from flexlib.particles.pose_change import PoseChange, own_length
from flexlib.particles.read import read_particles
from flexlib.particles.star_text import read_star_text
from flexlib.particles.star_write import euler_angles, star_values, write_star
from flexlib.particles.table import Particles

_ORIGINS_A = ("rlnOriginXAngst", "rlnOriginYAngst")
_ORIGINS_PX = ("rlnOriginX", "rlnOriginY")
_SCALE = "flexScale"


@dataclass(frozen=True)
class RefinedParticles:
    """The m particles of the user's file, the change of their poses, and how well it is known."""

    output: OutputRows
    given: Particles  # the file as it is
    change: PoseChange  # of poses; none for particles that prepare dropped
    kept: np.ndarray  # (m,) bool, not dropped
    rotation_std_err_rad: np.ndarray | None = None  # (m,), nan where dropped, as below
    shift_std_err_A: np.ndarray | None = None  # (m,)

    @property
    def path(self) -> Path:
        """The user's file."""
        return self.output.where.path

    @cached_property
    def refined(self) -> Particles:
        """The particles with the poses that are to be written."""
        return self.change.of(self.given)

    @cached_property
    def is_turned(self) -> np.ndarray:
        """(m,) bool, whether the rotation is another than was given."""
        return np.linalg.norm(self.change.rotation_rad, axis=1) > 0

    @cached_property
    def is_moved(self) -> np.ndarray:
        """(m,) bool, whether the origin is."""
        return np.linalg.norm(self.change.shift_A, axis=1) > 0

    @cached_property
    def is_scaled(self) -> np.ndarray:
        """(m,) bool, whether the contrast is."""
        return self.change.contrast != 1

    def sizes(self) -> dict[str, np.ndarray]:
        """By the name of the column: how large each change is, (m,), and its error if known; nan where dropped."""
        turn, error = self.change.rotation_rad, self.rotation_std_err_rad
        sizes = {
            "flexRotationChangeDeg": np.rad2deg(np.linalg.norm(turn, axis=1)),
            "flexRotationStdErrDeg": None if error is None else np.rad2deg(error),
            "flexShiftChangeAngst": np.linalg.norm(self.change.shift_A, axis=1),
            "flexShiftStdErrAngst": self.shift_std_err_A,
            "flexContrast": self.change.contrast,
        }
        return {name: np.where(self.kept, one, np.nan) for name, one in sizes.items() if one is not None}

    def pose_columns(self, labels: Sequence[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """RELION's columns with the refined pose, (m,) numbers each, and (m,) bool whether they are other than given.

        ``labels`` are those of the file: origins are in the units that it has them in, else in Angstrom.
        """
        new, angles = self.refined, euler_angles(self.refined.rotation).T
        columns = {name: (angle, self.is_turned) for name, angle in zip(ANGLES, angles, strict=True)}
        pixel_size_A = np.array([group.pixel_size_A for group in new.optics])[new.optics_index]
        for name_A, name_px, origin_A in zip(_ORIGINS_A, _ORIGINS_PX, new.origin_A.T, strict=True):
            if name_px in labels:
                columns[name_px] = (origin_A / pixel_size_A, self.is_moved)
            if name_A in labels or name_px not in labels:
                columns[name_A] = (origin_A, self.is_moved)
        if new.particle_scale is not None and (_SCALE in labels or self.is_scaled.any()):
            columns[_SCALE] = (new.particle_scale, self.is_scaled)
        return columns


def refined_particles(
    particles_dir: str | Path, change: PoseChange, rotation_std_err_rad: np.ndarray, shift_std_err_A: np.ndarray
) -> RefinedParticles:
    """What a change of the prepared rows' views is in the user's file.

    Rows that prepare dropped do not change. With symmetry a particle's rows are copies of one image, and the frame of
    the view is the same for all: a particle's change is the mean over its copies, and so is its standard error, since
    all copies have the same noise.

    Parameters
    ----------
    particles_dir
        Folder that prepare wrote.
    change
        Of views, of all n prepared rows, as ``FlexModel.pose`` is.
    rotation_std_err_rad, shift_std_err_A
        (n,) each, in the units of ``change``.

    Raises
    ------
    InputError
        The input file is gone or has changed its length.
    """
    prepared = read_prepared_rows(particles_dir)
    count = len(prepared.table)
    if not len(change) == len(rotation_std_err_rad) == len(shift_std_err_A) == count:
        raise ValueError(f"changes of {len(change)} particles, with their errors, for {count} prepared ones")
    seen = read_particles(ParticlesFolder(Path(particles_dir)).particles)
    pixel_size_A = prepared.record.train_pixel_size_A
    of_poses = change.as_of_poses(seen, pixel_size_A)
    shift_error_A = shift_std_err_A * own_length(seen, pixel_size_A)
    output = OutputRows.of_particles(prepared)
    others = np.stack([of_poses.contrast, rotation_std_err_rad, shift_error_A], 1)
    mean = _mean_over_copies(np.concatenate([of_poses.rotation_rad, of_poses.shift_A, others], 1), output)
    kept = output.prepared_row >= 0
    values = np.where(kept[:, None], mean[:, :6], [0, 0, 0, 0, 0, 1])
    return RefinedParticles(
        output=output,
        given=output.read_input(),
        change=PoseChange(values[:, :3], values[:, 3:5], values[:, 5]),
        kept=kept,
        rotation_std_err_rad=mean[:, 6],
        shift_std_err_A=mean[:, 7],
    )


def _mean_over_copies(values: np.ndarray, output: OutputRows) -> np.ndarray:
    """(m, d) of the input's rows from (n, d) of the prepared ones; nan where there is none."""
    rows, num_input = output.where.rows, output.where.num_input
    copies = np.bincount(rows, minlength=num_input)
    sums = np.stack([np.bincount(rows, column, num_input) for column in values.T], 1)
    return np.where(copies[:, None] > 0, sums / np.maximum(copies, 1)[:, None], np.nan)


def write_refined_star(refined: RefinedParticles, path: str | Path) -> None:
    """Write the user's particles with their refined poses.

    Rows, columns, blocks and comments are those of the input, in its order (a .cs is converted to RELION's columns,
    with ``flexUid``). The pose is in RELION's columns, those that it replaces are kept as ``flexInputAngleRot`` and so
    on (never as a prior, which RELION would use), and ``flexScale`` has the contrast too, for a run from this file.
    Added are the columns of ``RefinedParticles.sizes``, and half-sets as in latents.star. Where nothing changed the
    pose's own text stays. Columns of these names in the input (it may be an earlier such file) are written anew.

    Raises
    ------
    InputError
        The input's particles are no table.
    """
    if refined.path.suffix == ".star":
        _write_into_star(refined, path)
        return
    blocks, before = converted_tables(refined.refined), converted_tables(refined.given)["particles"]
    frame = blocks["particles"]
    poses = [name for name in refined.pose_columns(tuple(before)) if name in before]
    columns = {_input_name(name): before[name].to_numpy() for name in poses} | refined.sizes()
    columns |= refined.output.halves(tuple(frame))
    write_star(blocks | {"particles": frame.assign(**columns)}, path)


def _write_into_star(refined: RefinedParticles, path: str | Path) -> None:
    """Write a STAR input's own text with the new columns."""
    text = read_star_text(refined.path)
    table = text.particles
    poses = refined.pose_columns(table.labels)
    before = text.frame(table, tuple(poses), text=tuple(poses))
    cells, kept = {}, {}
    for name, (values, is_new) in poses.items():
        written = star_values(values)
        if name in before:
            kept[_input_name(name)] = given = star_values(before[name].to_numpy())
            written = [new if use else old for new, old, use in zip(written, given, is_new.tolist(), strict=True)]
        cells[name] = written
    added = refined.sizes() | refined.output.halves(table.labels)
    text.write(path, table, None, cells | kept | {name: star_values(values) for name, values in added.items()})


def _input_name(name: str) -> str:
    """The column that keeps what the input had in column ``name``: flexInputAngleRot of rlnAngleRot."""
    return "flexInput" + name.removeprefix("rln").removeprefix("flex")


def write_refined_cs(refined: RefinedParticles, path: str | Path) -> bool:
    """Write a .cs input with refined poses; also the ``.csg`` that imports them, by their uid.

    Rows and columns are those of the input, and the columns of the 3D alignment are with them if only the passthrough
    file has these. ``alignments3D/pose``, ``shift`` and, where there is one or contrast was refined, ``alpha`` are
    replaced; those of the input are kept as ``flex/input_pose`` and so on, and ``flex/rotation_change_deg`` and the
    like are the columns of ``RefinedParticles.sizes``.

    Returns
    -------
    written
        Whether anything was: not where the input is a STAR file.

    Raises
    ------
    InputError
        The input file cannot be read any more.
    """
    if refined.path.suffix != ".cs":
        return False
    passthrough = refined.output.prepared.record.passthrough
    table, pixel_size_A = alignments(refined.path, None if passthrough is None else Path(passthrough))
    pose, shift_px = table.column("alignments3D/pose"), table.column("alignments3D/shift")
    new_pose = Rotation.from_matrix(refined.refined.rotation.transpose(0, 2, 1)).as_rotvec()
    columns = {
        "alignments3D/pose": np.where(refined.is_turned[:, None], new_pose, pose),
        "alignments3D/shift": shift_px - refined.change.shift_A / pixel_size_A[:, None],
        "flex/input_pose": pose,
        "flex/input_shift": shift_px,
    }
    contrast = refined.change.contrast
    if "alignments3D/alpha" in table.names:
        columns["flex/input_alpha"] = table.column("alignments3D/alpha")
        columns["alignments3D/alpha"] = columns["flex/input_alpha"] * contrast
    elif refined.is_scaled.any():
        columns["alignments3D/alpha"] = contrast.astype(np.float32)
    sizes = refined.sizes()
    ours = {
        "flex/rotation_change_deg": "flexRotationChangeDeg",
        "flex/rotation_std_err_deg": "flexRotationStdErrDeg",
        "flex/shift_change_A": "flexShiftChangeAngst",
        "flex/shift_std_err_A": "flexShiftStdErrAngst",
        "flex/contrast": "flexContrast",
    }
    columns |= {name: sizes[column].astype(np.float32) for name, column in ours.items() if column in sizes}
    table = table.with_columns(columns)
    table.write(path)
    if "uid" in table.names:
        write_group(Path(path).with_suffix(".csg"), [(Path(path), table)], "Particles with poses refined by flexlib")
    return True
