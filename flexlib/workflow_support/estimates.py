"""What a stage will need of memory, time and disk, from the size of the data.

For schedulers and for refusing early, so on the generous side; measured figures are in docs/workflow.md.
"""

from __future__ import annotations

import math
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexlib.errors import InputError
from flexlib.records import PreparedRecord

BASE_MB = 1500  # Python, torch and numba's compiler, and the two processes of Snakemake around a SLURM job
LONGEST_MIN = 1440  # of most clusters' queues; the training resumes where its limit cut it off
IMAGE_MS = (
    5.0  # of one core for one pass over one image of 64 px; training takes half of it, reconstruction four fifths
)
PASSES = {"simulate": 2, "prepare": 4, "checksum": 0.1, "train": 30, "reconstruct": 60}
ROW_BYTES = {".star": 200, ".cs": 60}  # of one particle's metadata, at least
SPARE = 0.02  # share of a disk that is left free


@dataclass(frozen=True)
class DataSize:
    """How large a data set is: rows (particles times symmetry copies), boxes in pixels."""

    num_rows: int
    full_box: int
    train_box: int


@dataclass(frozen=True)
class MapSize:
    """The header of a map or stack: voxels along x, y, z and its extent in Angstrom."""

    voxels: tuple[int, int, int]
    extent_A: tuple[float, float, float]


def read_map_size(path: str | Path) -> MapSize | None:
    """Size in an MRC header, of either byte order; None where the file is too short for one.

    By hand: mrcfile's ``header_only`` was considered, but needs numpy, which a Snakemake that only plans has not.
    """
    with Path(path).open("rb") as file:
        raw = file.read(52)
    if len(raw) < 52:
        return None
    order = "<" if 0 < struct.unpack_from("<i", raw)[0] < 2**16 else ">"
    return MapSize(struct.unpack_from(f"{order}3i", raw, 0), struct.unpack_from(f"{order}3f", raw, 40))


def data_size(config: Mapping[str, Any], prepared_json: str | Path) -> DataSize:
    """The size of a run's data: exact once it is prepared, before that guessed from the files that the config names.

    ``config`` is a checked one.
    """
    if Path(prepared_json).exists():
        record = PreparedRecord.read(prepared_json)
        return DataSize(record.num_rows, record.crop_box, record.train_box)
    simulate, prepare = config.get("simulate"), config["prepare"]
    if simulate is not None:
        rows, box = simulate["num_particles"], simulate["box"]
    else:
        particles = Path(config["particles"])
        rows = particles.stat().st_size // ROW_BYTES.get(particles.suffix, 200)
        size = read_map_size(config["consensus"])
        box = max(size.voxels) if size is not None else prepare["train_box"]
    full_box = prepare["crop_box"] or box
    rows = min(rows, prepare["max_particles"] or rows)
    return DataSize(rows * _symmetry_order(prepare["symmetry"]), full_box, min(prepare["train_box"], full_box))


def _symmetry_order(name: str) -> int:
    group, fold = name[0].upper(), name[1:]
    return {"C": 1, "D": 2, "T": 12, "O": 24, "I": 60}[group] * (int(fold) if group in "CD" else 1)


def _map_mb(box: int) -> float:
    return 4 * box**3 / 2**20


def memory_mb(
    stage: str, size: DataSize, *, all_in_ram: bool = False, volume: str | Path | None = None, processes: int = 1
) -> int:
    """Memory that ``stage`` needs, in MiB.

    Parameters
    ----------
    stage
        A rule of the workflow.
    size
        Of the data.
    all_in_ram
        ``reconstruct.all_in_ram``.
    volume
        ``generate.volume``, deformed instead of the canonical map.
    processes
        ``train.processes``, each of which holds the maps and the metadata.
    """
    rows_mb = size.num_rows / 2**20
    if stage in ("simulate", "prepare"):
        return round(BASE_MB + 12 * _map_mb(size.full_box) + 8000 * rows_mb)
    if stage == "mesh":
        return round(BASE_MB + 15 * _map_mb(size.train_box))
    if stage == "train":
        batch_mb = 0.06 * size.train_box**2  # a batch's images, their transforms and gradients
        return round(processes * (BASE_MB + 20 * _map_mb(size.train_box) + 6000 * rows_mb) + batch_mb)
    if stage == "generate":
        deformed = _map_mb(size.train_box) if volume is None else Path(volume).stat().st_size / 2**20
        return round(BASE_MB + 14 * deformed)
    if stage == "reconstruct":
        held = 0.5 * rows_mb * 4.5 * size.full_box**2 if all_in_ram else 0.0
        return round(processes * (BASE_MB + 12 * _map_mb(size.full_box) + 2000 * rows_mb) + held)
    if stage == "checksum":  # the particles' metadata
        return round(BASE_MB + 4000 * rows_mb)
    if stage == "report":
        return round(BASE_MB + 10 * _map_mb(size.full_box) + 4000 * rows_mb)
    return 600


def runtime_min(stage: str, size: DataSize) -> int:
    """Minutes that ``stage`` takes at most on two cores; less on a GPU. Never more than ``LONGEST_MIN``."""
    box = size.train_box if stage == "train" else size.full_box
    core_ms = PASSES.get(stage, 0) * size.num_rows * IMAGE_MS * (box / 64) ** 2
    return min(LONGEST_MIN, 60 + math.ceil(core_ms / 2 / 60_000))


def disk_mb(stage: str, size: DataSize, *, maps: int = 0, volume: str | Path | None = None) -> int:
    """What ``stage`` writes, in MiB; ``maps`` is the number of maps in a sweep point's series (generate)."""
    images_mb = size.num_rows / 2**20 * 4
    written = {
        "simulate": images_mb * size.full_box**2 + 10 * _map_mb(size.full_box),
        "prepare": images_mb * size.train_box**2 + 4 * _map_mb(size.full_box) + 800 * size.num_rows / 2**20,
        "train": 3 * _map_mb(size.train_box) + 3000 * size.num_rows / 2**20,
        "reconstruct": 10 * _map_mb(size.full_box),
    }
    if stage == "generate":
        deformed = _map_mb(size.train_box) if volume is None else Path(volume).stat().st_size / 2**20
        return math.ceil(1.2 * maps * deformed) + 1  # with the mesh's displacements and the film
    return math.ceil(written.get(stage, 0.0)) + 1


def check_free_space(folder: str | Path, needed_mb: float, what: str) -> None:
    """Refuse work that the disk has no room for.

    Parameters
    ----------
    folder
        Where it is written; it or a parent of it exists.
    needed_mb
        MiB.
    what
        Is written, for the message.

    Raises
    ------
    InputError
        The disk under ``folder`` has less free space than that and 2 % of its size.
    """
    existing = Path(folder).absolute()
    while not existing.exists():
        existing = existing.parent
    usage = shutil.disk_usage(existing)
    free_mb = (usage.free - SPARE * usage.total) / 2**20
    if needed_mb > free_mb:
        raise InputError(
            f"{folder}: no room for {what}, about {_gigabytes(needed_mb)}: the disk has {_gigabytes(max(free_mb, 0))} "
            "to spare; free some, or run in a folder on another disk (--directory)"
        )


def _gigabytes(megabytes: float) -> str:
    return f"{megabytes / 1024:.1f} GB"
