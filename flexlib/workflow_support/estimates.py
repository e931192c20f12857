"""What a stage will need of memory, time and disk, from the size of the data and of the mesh.

For schedulers and for refusing early, so on the generous side: of memory at least a quarter more than was measured by
``benchmarks/measure_needs.py`` (the figures are in docs/workflow.md and tests/test_estimates.py).
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
from flexlib.records import MeshRecord, PreparedRecord

BASE_MB = 1500  # Python, torch and numba's compiler, and the two processes of Snakemake around a SLURM job
HASHED_BYTES_S = 50e6  # by a thread of checksum, of a slow disk
ROW_BYTES = {".star": 200, ".cs": 60}  # of one particle's metadata, at least
SPARE = 0.02  # share of a disk that is left free

# the mesh
MASK_SHARE = 0.2  # of the box, by the mask, until it is known; compact particles fill less
SURFACE_VERTICES = 12  # of the lattice, for each cell of the mask's surface; a ball has 8 to 10

# memory, kB a vertex of the mesh
FIELDS_KB = 9.7  # a flow: 806 fields of float32 numbers (``train/fields.py``)
MODES_KB = (
    125.0  # train: the elastic modes, in double precision, with spare vectors and factors, then the flow's fields
)
RESTING_MAPS, RESTING_MB = 8, 2048.0  # reconstruct: the grid of ``reconstruct/at_rest.py``, at most; in maps, in MiB
RESTING_GRIDS = 2.5  # with its transform
BATCH_ROW_KB = 0.16  # train: a particle's displacements in a mini-batch, and what follows from them
MESH_KB = 10.0  # cells, faces and neighbours of the mesh while it is built

# disk, kB a vertex
MESH_FILES_KB = 0.4
FRAME_KB = 0.08  # a frame's displacements beside its map

# time
LONGEST_MIN = 1440  # of most clusters' queues; the training resumes where its limit cut it off
LEAST_MIN = 30  # a full node, a slow disk, a compiler that starts anew
AUTO_EPOCHS = 20  # with epochs: auto, at most (``train/schedule.py``)
PASSES = 14  # of train besides its epochs: rigid map and its poses, spectral start, other local minima, final latents
CROSS_PASSES = 10  # over particles that a model has not seen: their poses and latents, and their score; not measured
ITERATIONS_BESIDES = 3  # of reconstruct for each kind of map: the data, and gradients computed anew
SIMULATE_US = 10.0, 100.0  # of one core for a pixel of a particle's image, and for a voxel of the phantom's maps
PREPARE_US = 1.5  # of one core for a pixel of a particle's image
MODES_S = 300.0  # of one core for the elastic modes of 20,000 vertices; they grow by the power 1.5 of their number
INTERPRET_US = 4000.0  # of one core for a particle: densities and their errors, tests of conditions
FIELDS_US = 50.0  # of one core for a vertex in a mini-batch: the flow's fields are put together anew
VOXEL_US, VERTEX_US = 2.0, 300.0  # of one core for a voxel and a vertex in mesh, report and a frame of generate


@dataclass(frozen=True)
class ImageCost:
    """Nanoseconds of one core for a voxel of the mask, a pixel and a vertex of a particle that is looked at once."""

    voxel: float
    pixel: float
    vertex: float

    def seconds(self, box: int, mask_share: float, vertices: int) -> float:
        """Of one core for one particle."""
        return (self.voxel * mask_share * box**3 + self.pixel * box**2 + self.vertex * vertices) * 1e-9


TRAIN = ImageCost(15.0, 200.0, 30.0)
RECONSTRUCT = ImageCost(30.0, 400.0, 800.0)  # cubic kernels, oversampled images, the flow of each particle


@dataclass(frozen=True)
class DataSize:
    """How large a data set is: rows (particles times symmetry copies), boxes in pixels, the mask's share of the box."""

    num_rows: int
    full_box: int
    train_box: int
    mask_share: float = MASK_SHARE


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
        share = MASK_SHARE if record.mask_share is None else record.mask_share
        return DataSize(record.num_rows, record.crop_box, record.train_box, share)
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


def num_vertices(size: DataSize, cells: int, mesh_quality: str | Path) -> int:
    """Vertices of the mesh of ``cells`` cells across: exact once it is built, before that by the mask's share.

    A lattice has two vertices a cell, and more where the mask's surface cuts it. ``mesh_quality`` is the file that the
    stage writes; where it cannot be read, as of results that were touched, the number is guessed too.
    """
    try:
        return MeshRecord.read(mesh_quality).num_vertices
    except InputError:
        inside = size.mask_share * cells**3
        return math.ceil(2 * inside + SURFACE_VERTICES * inside ** (2 / 3))


def _map_mb(box: int) -> float:
    return 4 * box**3 / 2**20


def memory_mb(
    stage: str,
    size: DataSize,
    vertices: int = 0,
    *,
    all_in_ram: bool = False,
    volume: str | Path | None = None,
    processes: int = 1,
) -> int:
    """Memory that ``stage`` needs, in MiB.

    Parameters
    ----------
    stage
        A rule of the workflow.
    size
        Of the data.
    vertices
        Of the mesh; of the finest, where a stage sees all.
    all_in_ram
        ``reconstruct.all_in_ram``.
    volume
        ``generate.volume``, deformed instead of the canonical map.
    processes
        ``train.processes``, each of which holds the maps, the metadata and the flow.
    """
    rows_mb, fields_mb = size.num_rows / 2**20, FIELDS_KB * vertices / 2**10
    if stage in ("simulate", "prepare"):
        maps = 200 if stage == "simulate" else 12  # of a phantom in double precision, on finer grids
        return round(BASE_MB + maps * _map_mb(size.full_box) + 8000 * rows_mb)
    if stage == "mesh":
        return round(BASE_MB + 15 * _map_mb(size.train_box) + MESH_KB * vertices / 2**10)
    if stage in ("train", "train_half"):  # the latter looks at the other half's particles too, once
        batch_mb = 0.06 * size.train_box**2  # a batch's images, their transforms and gradients
        mesh_kb = (MODES_KB + BATCH_ROW_KB * _batch_rows(size.num_rows)) * vertices  # the first process has the modes
        others = (processes - 1) * 2 * fields_mb
        each = BASE_MB + 20 * _map_mb(size.train_box) + 6000 * rows_mb
        return round(processes * each + batch_mb + mesh_kb / 2**10 + others)
    if stage == "generate":
        deformed = _map_mb(size.train_box) if volume is None else Path(volume).stat().st_size / 2**20
        return round(BASE_MB + 14 * deformed + 2 * fields_mb)
    if stage == "reconstruct":
        # half of the rows' transfer functions, squared, and moved vertices
        held = 0.5 * rows_mb * (4.5 * size.full_box**2 + 10 * vertices) if all_in_ram else 0.0
        maps_mb = 12 * _map_mb(size.full_box) + RESTING_GRIDS * largest_grid_mb(size.full_box)
        each = BASE_MB + maps_mb + 2000 * rows_mb + 4 * fields_mb
        return round(processes * each + held)
    if stage == "validate":  # reconstructs, one half at a time, with its own model, and has both models' flows and maps
        return memory_mb("reconstruct", size, 2 * vertices, processes=processes) + round(8 * _map_mb(size.full_box))
    if stage == "checksum":  # the particles' metadata
        return round(BASE_MB + 4000 * rows_mb)
    if stage == "interpret":  # makes a series too
        series_mb = memory_mb("generate", size, vertices, volume=volume)
        return series_mb + round(16 * _map_mb(size.full_box) + 4000 * rows_mb)
    if stage == "report":
        return round(BASE_MB + 10 * _map_mb(size.full_box) + 4000 * rows_mb + 2 * fields_mb)
    return 600


def largest_grid_mb(box: int) -> float:
    """Largest grid that reconstruct may sum up the Hessian of particles at rest on, in MiB."""
    return min(RESTING_MAPS * _map_mb(box), RESTING_MB)


def runtime_min(
    stage: str, size: DataSize, vertices: int = 0, repeats: int = 1, latent_dims: int = 1, threads: int = 2
) -> int:
    """Minutes that ``stage`` takes at most on a CPU; less on a GPU. Never more than ``LONGEST_MIN``.

    Parameters
    ----------
    stage, size, vertices
        See ``memory_mb``.
    repeats
        Epochs of train; iterations of reconstruct, flexible and rigid ones, and of validate; maps of generate and
        interpret.
    latent_dims
        Of train and validate.
    threads
        Of the job, in all its processes; beyond two, which is what was measured, each counts as half a core.
    """
    cores = min(threads, 2) + 0.5 * max(threads - 2, 0)
    seconds = _core_s(stage, size, vertices, repeats, latent_dims) / cores
    if stage in ("train", "train_half"):
        seconds += MODES_S * (vertices / 20_000) ** 1.5  # on one core
    return min(LONGEST_MIN, LEAST_MIN + math.ceil(seconds / 60))


def _core_s(stage: str, size: DataSize, vertices: int, repeats: int, latent_dims: int) -> float:
    """Seconds of one core for what all cores share."""
    rows, full_box = size.num_rows, size.full_box
    if stage == "simulate":
        return (rows * SIMULATE_US[0] * full_box**2 + SIMULATE_US[1] * full_box**3) * 1e-6
    if stage == "prepare":
        return rows * PREPARE_US * 1e-6 * full_box**2
    image_s = TRAIN.seconds(size.train_box, size.mask_share, vertices)
    if stage in ("train", "train_half"):
        own = rows if stage == "train" else rows / 2
        epoch_s = own * image_s + own / _batch_rows(own) * FIELDS_US * 1e-6 * vertices
        return (repeats + PASSES + latent_dims) * epoch_s + (rows - own) * (CROSS_PASSES + latent_dims) * image_s
    full_image_s = RECONSTRUCT.seconds(full_box, size.mask_share, vertices)
    if stage == "reconstruct":
        return (repeats + 2 * ITERATIONS_BESIDES) * rows * full_image_s
    if stage == "validate":
        inference_s = rows * (CROSS_PASSES + latent_dims) * image_s
        return (repeats + ITERATIONS_BESIDES) * rows * full_image_s + inference_s
    if stage == "interpret":
        return rows * INTERPRET_US * 1e-6 + repeats * (VOXEL_US * full_box**3 + VERTEX_US * vertices) * 1e-6
    if stage in ("mesh", "generate", "report"):
        return repeats * (VOXEL_US * full_box**3 + VERTEX_US * vertices) * 1e-6
    if stage == "checksum":
        return rows * 4 * full_box**2 / HASHED_BYTES_S
    return 0.0


def _batch_rows(rows: float) -> float:
    """Of a mini-batch of training, at most (``train/setup.py``)."""
    return min(max(rows / 20, 10), 200)


def disk_mb(stage: str, size: DataSize, vertices: int = 0, *, maps: int = 0, volume: str | Path | None = None) -> int:
    """What ``stage`` writes, in MiB; ``maps`` is the number of maps in a sweep point's series (generate, interpret)."""
    images_mb, fields_mb = size.num_rows / 2**20 * 4, FIELDS_KB * vertices / 2**10
    written = {
        "simulate": images_mb * size.full_box**2 + 10 * _map_mb(size.full_box),
        "prepare": images_mb * size.train_box**2 + 4 * _map_mb(size.full_box) + 800 * size.num_rows / 2**20,
        "mesh": 2 * _map_mb(size.train_box) + MESH_FILES_KB * vertices / 2**10,
        # the model, and in the checkpoints its state and the model again
        "train": 3 * _map_mb(size.train_box) + 4000 * size.num_rows / 2**20 + 3.3 * fields_mb,
        "reconstruct": 10 * _map_mb(size.full_box),
        "validate": 8 * _map_mb(size.full_box) + 400 * size.num_rows / 2**20,
        "interpret": 12 * _map_mb(size.full_box) + 1200 * size.num_rows / 2**20,
    }
    written["train_half"] = written["train"]
    if stage in ("generate", "interpret"):
        deformed = _map_mb(size.train_box) if volume is None else Path(volume).stat().st_size / 2**20
        maps_mb = maps * (1.2 * deformed + FRAME_KB * vertices / 2**10)  # with the film
        return math.ceil(written.get(stage, 0.0) + maps_mb) + 1
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
