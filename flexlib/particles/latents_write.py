"""Writing latents: latents.star with all that the input file has, and CryoSPARC's component files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from flexlib.particles.cs_file import CsFile, write_group
from flexlib.particles.input_rows import ANGLES, check_length, input_rows, read_prepared_rows
from flexlib.particles.output_rows import OutputRows, converted_tables
from flexlib.particles.star_text import StarText, read_star_text
from flexlib.particles.star_write import star_values, write_star


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
    copy's angles, and ``flexInputRow`` and ``flexSymmetryCopy`` distinguish them. Columns of these names in the input
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
    prepared = read_prepared_rows(particles_dir)
    if len(latents) != len(prepared.table):
        raise ValueError(f"latents of {len(latents)} particles for {len(prepared.table)} prepared ones")
    values = {f"flexLatent{k + 1}": latents[:, k] for k in range(latents.shape[1])} | dict(extra or {})
    output = OutputRows.of_copies(prepared)
    if output.where.path.suffix == ".star":
        _write_into_star(output, values, path)
    else:
        _write_converted(output, values, path)


def _write_into_star(output: OutputRows, values: Mapping[str, np.ndarray], path: str | Path) -> None:
    """Write a STAR input's own text with the new columns."""
    text = read_star_text(output.where.path)
    table = text.particles
    check_length(output.where, len(table))
    stale = {"flexInputRow": output.rows, "flexSymmetryCopy": np.zeros_like(output.rows)}  # of the input's own run
    columns = {name: column for name, column in stale.items() if name in table.labels} | output.columns(values)
    cells = {name: star_values(column) for name, column in (columns | output.halves(table.labels)).items()}
    if output.expanded:
        cells |= _copy_angles(text, output)
    text.write(path, table, output.rows if output.expanded else None, cells)


def _write_converted(output: OutputRows, values: Mapping[str, np.ndarray], path: str | Path) -> None:
    """Write a .cs input as RELION's tables with the new columns."""
    blocks = converted_tables(output.read_input())
    frame = blocks["particles"]
    if output.expanded:
        frame = frame.iloc[output.rows].reset_index(drop=True)
        kept = output.prepared_row >= 0
        for name in ANGLES:
            frame.loc[kept, name] = output.prepared.table[name].to_numpy()[output.prepared_row[kept]]
    columns = output.columns(values) | output.halves(tuple(frame))
    write_star(blocks | {"particles": frame.assign(**columns)}, path)


def _copy_angles(text: StarText, output: OutputRows) -> dict[str, list[str]]:
    """The angles as text: of the symmetry copies, and as they stood for particles that prepare dropped."""
    given = text.frame(text.particles, ANGLES, text=ANGLES)
    rows = list(zip(output.rows.tolist(), output.prepared_row.tolist(), strict=True))
    result = {}
    for name in ANGLES:
        own = star_values(output.prepared.table[name].to_numpy(np.float64))
        before = given[name].tolist()
        result[name] = [before[row] if at < 0 else own[at] for row, at in rows]
    return result


def write_latents_cs(particles_dir: str | Path, latents: np.ndarray, path: str | Path) -> bool:
    """Write latents as CryoSPARC's 3D Flex training does, for a .cs input; also the ``.csg`` that imports them.

    Columns ``uid``, and ``components_mode_k/component`` (uint32, = k) and ``components_mode_k/value`` (float32) for k
    from 0; one row for each particle that prepare kept (of symmetry copies the first, which has the input's uid), so
    that CryoSPARC can join them to its own particles on uid.

    Parameters
    ----------
    particles_dir
        Folder that prepare wrote.
    latents
        (n, K) in the order of the prepared particles.
    path
        The .cs to write.

    Returns
    -------
    written
        Whether anything was: not where the input has no uid (a STAR file).
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
    return CsFile(Path(), records, {}, {})
