"""The prepared particles: what ``prepare`` wrote, served as image sources to training and reconstruction.

Files and columns: docs/architecture.md; the data model: ``flexlib/particles/images.py``.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import torch

from flexlib.ctf import ctf_images
from flexlib.errors import InputError
from flexlib.files import atomic_path, read_json
from flexlib.particles.images import ImageBatch, centred_rfft2, plane_weight, shell_radius
from flexlib.particles.stack import StackHeader, Stacks, open_stacks, read_stack_header
from flexlib.particles.table import Particles

PARTICLES = "particles.star"
TRAIN_STACK = "train.mrcs"
NOISE = "noise.csv"
SUMMARY = "prepared.json"


class PreparedImages:
    """Common to both sources: transfer functions and poses. A subclass gives the whitened transforms.

    Holds no state that a batch changes, so several threads may call ``batch`` at once.
    """

    def __init__(
        self,
        particles: Particles,
        box: int,
        pixel_size_A: float,
        image_scale: np.ndarray,
        sigma: np.ndarray,
        full_box: int,
        full_pixel_size_A: float,
    ) -> None:
        """``image_scale`` (groups,) and ``sigma`` (groups, full_box//2) per optics group and shell of the full box."""
        self.particles = particles
        self.box = box
        self.pixel_size_A = pixel_size_A
        self.half_set = particles.half_set
        self._sigma, self._full = sigma, (full_box, full_pixel_size_A)
        side = box * pixel_size_A / full_pixel_size_A  # the real-space crop, in original pixels
        gain = image_scale[particles.optics_index] * (pixel_size_A / full_pixel_size_A) ** 3 / side
        if particles.particle_scale is not None:
            gain = gain * particles.particle_scale
        self._gain = gain.astype(np.float32)
        self._rotation = view_rotations(particles).astype(np.float32)
        self._origin_px = (particles.origin_A / pixel_size_A).astype(np.float32)
        self._filters = lru_cache(maxsize=4)(self._make_filters)
        self._inside = lru_cache(maxsize=4)(lambda device: (plane_weight(box) > 0).to(device))

    def __len__(self) -> int:
        return len(self.particles)

    def _make_filters(self, device: str) -> torch.Tensor:
        """(groups, box, box//2+1) float32: 1 / sigma, 0 for |k| >= box/2."""
        full_box, full_pixel_size_A = self._full
        shell = shell_radius(self.box).numpy() * (full_box * full_pixel_size_A) / (self.box * self.pixel_size_A)
        sigma = np.stack([np.interp(shell, np.arange(len(line)), line) for line in self._sigma])
        return torch.as_tensor(1.0 / sigma, dtype=torch.float32, device=device) * self._inside(device)

    def _filter_of(self, rows: np.ndarray, device: torch.device | str) -> torch.Tensor:
        """1 / sigma for each row: (b or 1, box, box//2+1)."""
        filters = self._filters(str(device))
        if len(filters) == 1:
            return filters
        return filters[torch.as_tensor(self.particles.optics_index[rows], dtype=torch.int64, device=device)]

    def whitened(self, rows: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
        """(b, box, box//2+1) complex64: the images at ``rows``, whitened and transformed."""
        raise NotImplementedError

    def transfer(self, rows: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
        """(b, box, box//2+1): what a projection of the map is multiplied with; see ``images.py``."""
        transfer = ctf_images(self.particles, rows, self.box, self.pixel_size_A, device)
        transfer *= torch.as_tensor(self._gain[rows], device=device)[:, None, None]
        transfer *= self._filter_of(rows, device)
        return transfer

    def batch(self, rows: np.ndarray, device: torch.device | str = "cpu") -> ImageBatch:
        """See ``images.ImageSource``."""
        return replace(self.geometry(rows, device), images=self.whitened(np.asarray(rows), device))

    def geometry(self, rows: np.ndarray, device: torch.device | str = "cpu") -> ImageBatch:
        """As ``batch``, but no image is read: ``images`` has no rows."""
        rows = np.asarray(rows)
        return ImageBatch(
            rows=rows,
            images=torch.empty((0, self.box, self.box // 2 + 1), dtype=torch.complex64, device=device),
            transfer=self.transfer(rows, device),
            rotation=torch.as_tensor(self._rotation[rows], device=device),
            origin_px=torch.as_tensor(self._origin_px[rows], device=device),
        )


class TrainingImages(PreparedImages):
    """Images that prepare has already whitened and Fourier-cropped, read from its stack."""

    def __init__(self, header: StackHeader, *args: Any) -> None:
        super().__init__(*args)
        self._stack = header.open()

    def whitened(self, rows: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
        images = torch.from_numpy(self._stack[self.particles.image_index[rows]])
        return centred_rfft2(images.to(device)) * self._inside(str(device))


class FullImages(PreparedImages):
    """The original images, read, cropped in real space and whitened on the fly."""

    def __init__(self, stacks: Stacks, *args: Any) -> None:
        super().__init__(*args)
        self._stacks = stacks

    def whitened(self, rows: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
        images = self._stacks.read(self.particles, rows, self.box)
        if not np.isfinite(images).all():
            bad = int(rows[np.argmax(~np.isfinite(images).all((1, 2)))])
            column = self.particles.extra.get("image_column", "rlnImageName")
            path = self.particles.stack_paths[self.particles.stack_index[bad]]
            raise InputError(
                f"{self.particles.describe_row(bad, column)}: image {self.particles.image_index[bad] + 1} of {path} "
                "holds values that are not finite"
            )
        sign = torch.as_tensor(self.particles.contrast_sign[rows], dtype=torch.float32, device=device)
        spectra = centred_rfft2(torch.from_numpy(images).to(device) * sign[:, None, None])
        return spectra * self._filter_of(rows, device)


def view_rotations(particles: Particles) -> np.ndarray:
    """(n, 3, 3) volume to view as images see it: the rotation, with the magnification matrix in the image plane.

    RELION takes the slice at M k, which is the transform of positions that M transposed has moved.
    """
    matrices = np.broadcast_to(np.eye(3), (len(particles.optics), 3, 3)).copy()
    for matrix, group in zip(matrices, particles.optics, strict=True):
        matrix[:2, :2] = np.asarray(group.magnification_matrix).T
    return matrices[particles.optics_index] @ particles.rotation


def open_training_images(particles_dir: str | Path) -> TrainingImages:
    """The training images of a prepared particle set. Raises InputError where files are missing or don't agree."""
    folder = Path(particles_dir)
    summary, particles, _ = _read_prepared(folder)
    header = read_stack_header(folder / TRAIN_STACK)
    if (header.num_images, header.box) != (len(particles), summary["train_box"]):
        raise InputError(
            f"{folder / TRAIN_STACK}: {header.num_images} images of {header.box} px, but {PARTICLES} has "
            f"{len(particles)} rows of {summary['train_box']} px: run prepare again"
        )
    return TrainingImages(
        header,
        particles,
        summary["train_box"],
        summary["train_pixel_size_A"],
        np.array(summary["image_scale"]),
        read_noise(folder / NOISE),
        summary["full_box"],
        summary["full_pixel_size_A"],
    )


def open_full_images(particles_dir: str | Path) -> FullImages:
    """The original images at the reconstruction box (``crop_box``, else the whole). Raises InputError as above."""
    folder = Path(particles_dir)
    summary, particles, table = _read_prepared(folder)
    names = table["flexImageName"].str.partition("@")
    stacks_named, stack_index = np.unique(names[2].to_numpy(str), return_inverse=True)
    particles = replace(
        particles,
        stack_paths=tuple(Path(name) for name in stacks_named),
        stack_index=stack_index.astype(np.int32),
        image_index=names[0].to_numpy().astype(np.int64) - 1,
        contrast_sign=table["flexInputSign"].to_numpy(np.float64),
        optics=tuple(
            replace(group, pixel_size_A=summary["full_pixel_size_A"], box=summary["full_box"])
            for group in particles.optics
        ),
        extra={"image_column": "flexImageName"},
    )
    stacks, particles = open_stacks(particles)
    box = summary["crop_box"]
    particles = replace(particles, optics=tuple(replace(group, box=box) for group in particles.optics))
    return FullImages(
        stacks,
        particles,
        box,
        summary["full_pixel_size_A"],
        np.array(summary["image_scale"]),
        read_noise(folder / NOISE),
        summary["full_box"],
        summary["full_pixel_size_A"],
    )


def _read_prepared(folder: Path) -> tuple[dict[str, Any], Particles, Any]:
    """prepared.json, the particles as written, and their table."""
    from flexlib.particles.star import particles_from_tables, read_tables

    for name in (SUMMARY, PARTICLES, NOISE, TRAIN_STACK):
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: not found: is this a folder that prepare has written?")
    tables = read_tables(folder / PARTICLES)
    return read_json(folder / SUMMARY), particles_from_tables(tables, folder), tables.particles


def write_noise(path: str | Path, sigma: np.ndarray, frequency_1_per_A: np.ndarray) -> None:
    """Write sigma (groups, shells) as noise.csv; groups count from 1 as rlnOpticsGroup."""
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["group", "shell", "frequency_1_per_A", "sigma"])
        for group, line in enumerate(sigma, 1):
            for shell, value in enumerate(line):
                writer.writerow([group, shell, f"{frequency_1_per_A[shell]:.8g}", f"{value:.8g}"])


def read_noise(path: str | Path) -> np.ndarray:
    """(groups, shells) float64 sigma from noise.csv."""
    columns = np.loadtxt(path, delimiter=",", skiprows=1, usecols=(0, 1, 3), ndmin=2)
    groups = int(columns[:, 0].max())
    return columns[:, 2].reshape(groups, -1)


def write_latents_star(
    particles_dir: str | Path,
    latents: np.ndarray,
    path: str | Path,
    extra: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write every particle of prepare's input file with its latent coordinates.

    Rows and columns are those of the input, in its order, values as they were written there (a .cs is converted to
    RELION's columns, with ``flexUid``); ``flexLatent1..K`` are added, and the columns of ``extra``. Parameters:
    ``latents`` (n, K) and each of ``extra`` (n,), in the order of the prepared particles; input rows that prepare
    dropped get ``nan``. Raises InputError where the input file is gone or has changed its length.
    """
    folder = Path(particles_dir)
    summary, _, prepared = _read_prepared(folder)
    rows = prepared["flexInputRow"].to_numpy(np.int64)
    if latents.shape[0] != len(rows):
        raise ValueError(f"latents of {latents.shape[0]} particles for {len(rows)} prepared ones")
    blocks, block = _input_tables(summary)
    table = blocks[block]
    if len(table) != summary["num_input"]:
        raise InputError(
            f"{summary['particles']}: {len(table)} particles, but prepare read {summary['num_input']}: run it again"
        )
    columns = {f"flexLatent{k + 1}": latents[:, k] for k in range(latents.shape[1])} | dict(extra or {})
    for name, values in columns.items():
        full = np.full(len(table), np.nan)
        full[rows] = values
        table[name] = full
    from flexlib.particles.star import write_star

    write_star(blocks, path)


def _input_tables(summary: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The blocks of prepare's input as STAR tables, and which one holds the particles."""
    from flexlib.particles.read import read_particles
    from flexlib.particles.star import read_tables, relion_tables

    path = Path(summary["particles"])
    if not path.is_file():
        raise InputError(f"{path}: the particle file that prepare read is gone")
    if path.suffix == ".star":
        tables = read_tables(path, as_text=True)
        return tables.blocks, tables.particles_block
    particles = read_particles(path, summary["passthrough"], summary["image_root"])
    blocks = relion_tables(particles)
    if particles.uid is not None:
        blocks["particles"]["flexUid"] = particles.uid
    return blocks, "particles"


def new_image_stack(path: Path, num_images: int, box: int, pixel_size_A: float) -> mrcfile.mrcmemmap.MrcMemmap:
    """Create a float32 image stack on disk, to be filled through ``.data`` and closed."""
    stack = mrcfile.new_mmap(path, (num_images, box, box), mrc_mode=2, overwrite=True)
    stack.set_image_stack()
    stack.voxel_size = pixel_size_A
    return stack
