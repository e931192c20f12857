"""Particles of a latent region, written as a subset of the user's own file: ``python -m flexlib.select``.

A subset keeps the input's format and loses nothing: rows of a STAR file with every column, block and comment as they
stood; records of a .cs file bit by bit, with those of its passthrough file, and a .csg that CryoSPARC imports.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from flexlib.errors import InputError
from flexlib.particles.clusters import cluster_latents
from flexlib.particles.cs import matching_rows, unique_uids
from flexlib.particles.cs_file import read_cs_file, write_group
from flexlib.particles.latents_table import OCCUPANCY, PROBABILITY, LatentTable, read_latent_table
from flexlib.particles.latents_write import components
from flexlib.particles.listed import ROW_COLUMNS, read_list
from flexlib.particles.star_text import read_star_text

log = logging.getLogger(__name__)

_REGIONS = ("--box", "--polygon", "--nearest", "--cluster", "--rows")


# regions: each gives the (m,) bool of rows inside; rows without latents are never inside -----------------------------


def in_box(latents: LatentTable, limits: Sequence[str]) -> np.ndarray:
    """Rows within every ``DIM=MIN:MAX`` (ends included, either may be left out). Raises InputError on bad limits."""
    inside = np.isfinite(latents.latents).all(1)
    for limit in limits:
        match = re.fullmatch(r"([^=]+)=([^:]*):([^:]*)", limit)
        if match is None:
            raise InputError(f"--box: {limit!r} is not DIM=MIN:MAX, such as 1=-0.5:0.5")
        values = latents.dimension(match[1])
        low = _number(match[2], "--box") if match[2] else -np.inf
        high = _number(match[3], "--box") if match[3] else np.inf
        inside &= (values >= low) & (values <= high)
    return inside


def in_polygon(latents: LatentTable, outline: str) -> np.ndarray:
    """Rows inside the outline ``DIM,DIM: x,y x,y x,y ...`` (even-odd rule; on the line itself, either way).

    Raises InputError on a bad outline.
    """
    from matplotlib.path import Path as Outline

    match = re.fullmatch(r"\s*([^,:]+),([^,:]+):(.*)", outline)
    texts = [part.split(",") for part in match[3].split()] if match else []
    if match is None or len(texts) < 3 or any(len(corner) != 2 for corner in texts):
        raise InputError(f"--polygon: {outline!r} is not 'DIM,DIM: x,y x,y x,y' with three corners or more")
    corners = np.array([[_number(value, "--polygon") for value in corner] for corner in texts])
    x, y = latents.dimension(match[1].strip()), latents.dimension(match[2].strip())
    known = np.isfinite(latents.latents).all(1) & np.isfinite(x) & np.isfinite(y)
    inside = np.zeros(len(x), bool)
    inside[known] = Outline(corners).contains_points(np.stack([x[known], y[known]], 1))
    return inside


def nearest(latents: LatentTable, wanted: str) -> np.ndarray:
    """The k rows nearest to a point, ``K:z1,z2,...`` (Euclidean, all dimensions). Raises InputError on a bad one."""
    count, _, coordinates = wanted.partition(":")
    point = [_number(value, "--nearest") for value in coordinates.split(",")] if coordinates else []
    dims = latents.latents.shape[1]
    if not count.isdigit() or int(count) < 1 or len(point) != dims:
        raise InputError(f"--nearest: {wanted!r} is not K:z1,z2,... with {dims} coordinates")
    distance = np.linalg.norm(latents.latents - point, axis=1)
    known = int(np.isfinite(distance).sum())
    if int(count) > known:
        raise InputError(f"--nearest: {count} particles wanted, but only {known} have latents")
    inside = np.zeros(len(distance), bool)
    inside[np.argsort(distance, kind="stable")[: int(count)]] = True  # nan sorts last
    return inside


def in_cluster(latents: LatentTable, wanted: str) -> np.ndarray:
    """The rows of k-means cluster ``I/N``, counted from 1: frame I of the series ``kmeans N`` shows one of them."""
    match = re.fullmatch(r"(\d+)/(\d+)", wanted)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise InputError(f"--cluster: {wanted!r} is not I/N, such as 2/5 for the second of five")
    chosen, count = int(match[1]), int(match[2])
    known = np.flatnonzero(np.isfinite(latents.latents).all(1))
    if count > len(known):
        raise InputError(f"--cluster: {count} clusters of {len(known)} particles")
    clusters = cluster_latents(latents.latents[known], count, "--cluster")
    for number, centre in enumerate(clusters.centres):
        where = ", ".join(f"{value:.3g}" for value in centre)
        log.info("cluster %d/%d at (%s): %d particles", number + 1, count, where, clusters.size(number))
    inside = np.zeros(len(latents.latents), bool)
    inside[known[clusters.label == chosen - 1]] = True
    return inside


def in_list(latents: LatentTable, path: str | Path) -> np.ndarray:
    """Rows that a CSV names, by ``flexInputRow`` (from 0), ``flexUid`` (or ``uid``) or ``rlnImageName``.

    The first line names the columns, as in the report's download. Raises InputError where a particle is not known.
    """
    key, column, values = read_list(path, "--rows")
    if key not in latents.columns and key not in latents.table.labels:
        raise InputError(f"--rows: {path}: column {key}, which {latents.text.path} does not have")
    own = [str(value) for value in latents.named(key).tolist()]
    inside, known = np.zeros(len(own), bool), set(own)
    for number, value in enumerate(values, 2):
        if value not in known:
            raise InputError(f"--rows: {path}: line {number}, column {column}: no particle {value!r}")
    wanted = set(values)
    inside[[row for row, value in enumerate(own) if value in wanted]] = True
    return inside


def with_states(latents: LatentTable, options: argparse.Namespace) -> np.ndarray:
    """Rows that show a particle, and have or lack a part, as the options ask; the log counts those of each state.

    Raises InputError where the training did not look, or options do not fit.
    """
    inside = np.isfinite(latents.latents).all(1)
    least, part = options.min_probability, options.part
    if least is not None:
        if not 0 <= least <= 1:
            raise InputError(f"--min-probability: {least:g} is not in [0, 1]")
        shown = inside & (_judged(latents, PROBABILITY, "--min-probability") >= least)
        log.info("probability at least %g: %d rows, below: %d", least, shown.sum(), (inside & ~shown).sum())
        inside = shown
    if (part is None) != (options.state is None):
        raise InputError("--part: takes --present or --absent with it, and these take --part")
    if part is not None:
        present = _judged(latents, f"{OCCUPANCY}{part}", "--part") >= 0.5
        counts = [int((inside & one).sum()) for one in (present, ~present)]
        log.info("part %d: present in %d rows, absent in %d", part, *counts)
        inside &= present if options.state == "present" else ~present
    return inside


def _judged(latents: LatentTable, column: str, option: str) -> np.ndarray:
    """(m,) of a column that only some trainings write."""
    if column not in latents.table.labels:
        found = [name for name in latents.table.labels if re.fullmatch(rf"{PROBABILITY}|{OCCUPANCY}\d+", name)]
        raise InputError(f"{option}: {latents.text.path} has no column {column} ({', '.join(found) or 'nor any such'})")
    return latents.dimension(column)


def _number(text: str, option: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        raise InputError(f"{option}: {text!r} is not a number")
    return value


# writing -------------------------------------------------------------------------------------------------------------


def write_subset(latents: LatentTable, inside: np.ndarray, path: str | Path, with_latents: bool = False) -> int:
    """Write the chosen particles, in input order; returns how many.

    Parameters
    ----------
    inside
        (m,) bool over the rows of latents.star.
    path
        Ends in .star or .cs. A .cs input gives its own records in a .cs (with ``<name>_passthrough.cs`` where there is
        a passthrough file, and ``<name>.csg``), or in a .star the rows of latents.star in RELION's columns. A STAR
        input gives its own rows.
    with_latents
        Keep the columns that flexlib added (rows of latents.star, with symmetry a row for each copy); for a .cs, write
        ``<name>_latents.cs`` too.

    Raises
    ------
    InputError
        Nothing chosen, a format that the input cannot give, or an input file that is gone.
    """
    path = Path(path)
    if not inside.any():
        raise InputError("no particle lies in that region")
    sources = [file for file in (latents.text.path, latents.input_path, latents.passthrough) if file is not None]
    if any(path.absolute() == file.absolute() for file in sources):
        raise InputError(f"{path}: is the file that particles are chosen from: give another name")
    rows = np.unique(latents.input_row[inside])
    if path.suffix == ".cs":
        return _write_cs(latents, inside, path, with_latents)
    if path.suffix != ".star":
        raise InputError(f"{path}: a subset is written as .star or .cs")
    if with_latents or latents.input_path is None or latents.input_path.suffix != ".star":
        chosen = np.flatnonzero(inside)
        latents.text.write(path, latents.table, chosen)
        return len(chosen)
    if not latents.input_path.is_file():
        raise InputError(f"{latents.input_path}: the particle file that prepare read is gone: give it as --input")
    text = read_star_text(latents.input_path)
    if len(text.particles) <= rows[-1]:
        raise InputError(f"{latents.input_path}: {len(text.particles)} rows, but row {rows[-1] + 1} is wanted")
    text.write(path, text.particles, rows)
    return len(rows)


def _write_cs(latents: LatentTable, inside: np.ndarray, path: Path, with_latents: bool) -> int:
    if latents.input_path is None or latents.input_path.suffix != ".cs":
        raise InputError(f"{path}: the input is not a .cs file: name a .star, or give the .cs as --input")
    table = read_cs_file(latents.input_path)
    uid = unique_uids(table)
    if "flexUid" in latents.columns:
        own = latents.columns["flexUid"].to_numpy(np.uint64)
    elif len(table) > latents.input_row.max():
        own = uid[latents.input_row]
    else:
        raise InputError(f"{latents.input_path}: {len(table)} rows, fewer than {latents.text.path} has particles")
    rows = np.unique(matching_rows(own, uid, latents.text.path, latents.input_path)[inside])
    chosen = [(path, table.take(rows))]
    if latents.passthrough is not None:
        other = read_cs_file(latents.passthrough)
        match = matching_rows(uid[rows], unique_uids(other), latents.input_path, latents.passthrough)
        chosen.append((path.with_name(f"{path.stem}_passthrough.cs"), other.take(match)))
    if with_latents:
        first = inside & ~pd.Series(latents.input_row).where(inside).duplicated().to_numpy()
        part = path.with_name(f"{path.stem}_latents.cs")
        chosen.append((part, components(own[first], latents.latents[first])))
    for part, file in chosen:
        file.write(part)
    write_group(path.with_suffix(".csg"), chosen, f"Particles chosen by flexlib: {len(rows)} of {len(table)}")
    return len(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command ``flex-select``; returns the exit status (1 after a mistake, named in one line)."""
    parser = argparse.ArgumentParser(
        prog="flex-select", description="Write the particles of a region of latent space as a subset of their own file."
    )
    parser.add_argument("source", type=Path, help="a training folder (train/cells~C/...) or a latents.star")
    parser.add_argument("--out", type=Path, required=True, help="file to write: .star, or .cs where the input is a .cs")
    region = parser.add_mutually_exclusive_group()
    region.add_argument("--box", nargs="+", metavar="DIM=MIN:MAX", help="limits, such as 1=-0.5:0.5 2=0:")
    region.add_argument("--polygon", metavar="'DIM,DIM: x,y ...'", help="an outline in two dimensions")
    region.add_argument("--nearest", metavar="K:z1,z2,...", help="the K particles nearest to a point")
    region.add_argument("--cluster", metavar="I/N", help="k-means cluster I of N")
    region.add_argument("--rows", type=Path, metavar="CSV", help=f"particles listed by {', '.join(ROW_COLUMNS)} or uid")
    parser.add_argument("--min-probability", type=float, metavar="P", help="only images that so likely show a particle")
    parser.add_argument("--part", type=int, metavar="N", help="with --present or --absent: by whether part N is there")
    state = parser.add_mutually_exclusive_group()
    for name, meaning in (("present", "has part N"), ("absent", "lacks it")):
        state.add_argument(f"--{name}", dest="state", action="store_const", const=name, help=f"what rather {meaning}")
    parser.add_argument("--invert", action="store_true", help="write the particles outside the region instead")
    parser.add_argument("--latents", action="store_true", help="write the latent coordinates too")
    parser.add_argument("--input", type=Path, help="the particle file that was trained on, where it has moved")
    parser.add_argument("--passthrough", type=Path, help="its passthrough .cs")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        latents = read_latent_table(options.source, options.input, options.passthrough)
        inside = _inside(latents, options)
        inside = with_states(latents, options) & (~inside if options.invert else inside)
        count = write_subset(latents, inside, options.out, options.latents)
    except InputError as error:
        print(f"flex-select: {error}", file=sys.stderr)
        return 1
    log.info("%s: %d of %d particles", options.out, count, len(np.unique(latents.input_row)))
    return 0


def _inside(latents: LatentTable, options: argparse.Namespace) -> np.ndarray:
    if options.box:
        return in_box(latents, options.box)
    if options.polygon:
        return in_polygon(latents, options.polygon)
    if options.nearest:
        return nearest(latents, options.nearest)
    if options.cluster:
        return in_cluster(latents, options.cluster)
    if options.rows:
        return in_list(latents, options.rows)
    if options.invert or (options.min_probability is None and options.part is None):
        raise InputError(f"which particles? One of {', '.join(_REGIONS)}, or --min-probability or --part")
    return np.ones(len(latents.latents), bool)


if __name__ == "__main__":
    sys.exit(main())
