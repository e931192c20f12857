"""The prepared particles, as prepare wrote them: sources of images for training and reconstruction.

Files and columns: docs/architecture.md; the data model: ``flexlib/images/batch.py``.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd
import torch

from flexlib.errors import InputError
from flexlib.images.batch import ImageBatch, to_device
from flexlib.images.ctf import ctf_images, undo_applied_ctf, without_odd_aberrations
from flexlib.images.digest import check_digests
from flexlib.images.noise import Calibration, read_noise, sigma_at
from flexlib.images.normalisation import Normalisation
from flexlib.images.stack import StackHeader, Stacks, open_stacks, read_stack_header
from flexlib.imaging.image_transforms import centred_rfft2, fourier_resample, plane_radius
from flexlib.layout import ParticlesFolder
from flexlib.particles.pose_change import PoseChange
from flexlib.particles.star import particles_from_tables, read_tables
from flexlib.particles.table import OpticsGroup, Particles
from flexlib.records import PreparedRecord


class PreparedImages:
    """Common to both sources: transfer functions and poses. A subclass gives the whitened transforms.

    Holds no state that a batch changes, so several threads may call ``batch`` at once.
    """

    def __init__(
        self,
        particles: Particles,
        box: int,
        pixel_size_A: float,
        sides_px: np.ndarray,
        calibration: Calibration,
    ) -> None:
        """Images of ``box`` pixels of nominally ``pixel_size_A``.

        Parameters
        ----------
        particles
            Their optics groups' pixel sizes and boxes are those of the images given out.
        box, pixel_size_A
            Of the images.
        sides_px
            (groups,) side of the real-space crop in the group's original pixels (see ``crop_sides``).
        calibration
            Noise and scale of the optics groups.
        """
        self.box = box
        self.pixel_size_A = pixel_size_A
        self.half_set = particles.half_set
        self._calibration = calibration
        self._sides_px = sides_px
        self._band_px = np.minimum(sides_px, box)  # images hold nothing beyond the Nyquist of a box so large
        self._take_poses(particles)
        self._filters = lru_cache(maxsize=4)(self._make_filters)

    def _take_poses(self, particles: Particles) -> None:
        """Poses and amplitudes of the images are those of ``particles`` from now on."""
        self.particles = particles
        calibration, pixel_size_A = self._calibration, self.pixel_size_A
        amplitude = (calibration.image_scale / self._sides_px)[particles.optics_index]
        amplitude = amplitude * (pixel_size_A / calibration.full_pixel_size_A) ** 3
        if particles.particle_scale is not None:
            amplitude = amplitude * particles.particle_scale
        self._amplitude = amplitude.astype(np.float32)
        # a group's own pixel size may differ from the nominal one: its images are then seen at another magnification
        magnification = np.array([pixel_size_A / group.pixel_size_A for group in particles.optics])
        enlarged = magnification[particles.optics_index]
        self._rotation = (view_rotations(particles) * enlarged[:, None, None]).astype(np.float32)
        self._origin_px = (particles.origin_A * enlarged[:, None] / pixel_size_A).astype(np.float32)

    def posed(self, change: PoseChange) -> Self:
        """The same images with their views changed: ``exp([rotation_rad])`` is to the left of ``geometry``'s rotation.

        To first order where optics groups are distorted (``PoseChange.as_of_poses``), so that the images are seen as
        ``particles`` say, and as the file of refined poses does.
        """
        changed = copy(self)
        changed._take_poses(change.as_of_poses(self.particles, self.pixel_size_A).of(self.particles))
        return changed

    def subset(self, rows: np.ndarray) -> Self:
        """The images at ``rows`` (m,) alone, in that order."""
        chosen = copy(self)
        chosen._take_poses(self.particles.subset(rows))
        chosen.half_set = chosen.particles.half_set
        return chosen

    @property
    def rotation(self) -> np.ndarray:
        """(n, 3, 3) float32 rotations of the views, as batches have them."""
        return self._rotation

    def __len__(self) -> int:
        return len(self.particles)

    def _make_filters(self, device: str) -> torch.Tensor:
        """(groups, box, box//2+1) float32: 1 / sigma, 0 beyond Nyquist."""
        full_extent_A = self._calibration.full_box * self._calibration.full_pixel_size_A
        radius = plane_radius(self.box).numpy()
        shell = radius * full_extent_A / (self.box * self.pixel_size_A)
        sigma = sigma_at(shell, self._calibration.sigma, self._calibration.full_box)
        inside = radius < self._band_px[:, None, None] / 2
        return torch.as_tensor(inside / sigma, dtype=torch.float32, device=device)

    def _filter_of(self, rows: np.ndarray, device: torch.device | str) -> torch.Tensor:
        """1 / sigma for each row, 0 beyond Nyquist: (b or 1, box, box//2+1)."""
        filters = self._filters(str(device))
        if len(filters) == 1:
            return filters
        return filters[to_device(self.particles.optics_index[rows].astype(np.int64), device)]

    def whitened(self, rows: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
        """(b, box, box//2+1) complex64: the images at ``rows``, whitened and transformed."""
        raise NotImplementedError

    def transfer(self, rows: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
        """(b, box, box//2+1): what a projection of the map is multiplied with; see ``batch.py``."""
        transfer = ctf_images(self.particles, rows, self.box, None, device)
        transfer *= to_device(self._amplitude[rows], device)[:, None, None]
        transfer *= self._filter_of(rows, device)
        return transfer

    def batch(self, rows: np.ndarray, device: torch.device | str = "cpu") -> ImageBatch:
        """See ``batch.ImageSource``."""
        return replace(self.geometry(rows, device), images=self.whitened(np.asarray(rows), device))

    def geometry(self, rows: np.ndarray, device: torch.device | str = "cpu") -> ImageBatch:
        """As ``batch``, but no image is read: ``images`` has no rows."""
        rows = np.asarray(rows)
        return ImageBatch(
            rows=rows,
            images=torch.empty((0, self.box, self.box // 2 + 1), dtype=torch.complex64, device=device),
            transfer=self.transfer(rows, device),
            rotation=to_device(self._rotation[rows], device),
            origin_px=to_device(self._origin_px[rows], device),
        )


class TrainingImages(PreparedImages):
    """Images that prepare has already whitened and Fourier-cropped, read from its stack."""

    def __init__(
        self,
        header: StackHeader,
        particles: Particles,
        pixel_size_A: float,
        sides_px: np.ndarray,
        calibration: Calibration,
    ) -> None:
        """``header`` of the stack that all ``particles`` are in; the rest as in ``PreparedImages``."""
        super().__init__(particles, header.box, pixel_size_A, sides_px, calibration)
        self._stack = Stacks((header,))

    def whitened(self, rows: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
        """See ``PreparedImages``."""
        images = torch.from_numpy(self._stack.read(self.particles, rows))
        return centred_rfft2(to_device(images, device)) * (self._filter_of(rows, device) > 0)


class FullImages(PreparedImages):
    """The original images, read, cropped in real space, resampled where pixel sizes differ, and whitened on the fly."""

    def __init__(
        self,
        stacks: Stacks,
        particles: Particles,
        box: int,
        pixel_size_A: float,
        calibration: Calibration,
        normalisation: Normalisation | None = None,
    ) -> None:
        """``particles`` with their original optics groups, ``box`` and ``pixel_size_A`` as wanted.

        ``normalisation`` of the images as they are stored; None where nothing is to be done to them.
        """
        self._stacks = stacks
        self._normalisation = normalisation or Normalisation.none(len(particles.optics), len(particles))
        self._original = without_odd_aberrations(particles)
        self.sides_px = crop_sides(particles.optics, box, pixel_size_A)
        resampled = replace(particles, optics=resampled_optics(particles.optics, self.sides_px, box))
        super().__init__(resampled, box, pixel_size_A, self.sides_px, calibration)

    @property
    def stored(self) -> tuple[Stacks, Particles]:
        """The stacks that images are read from, and which image of which is whose."""
        return self._stacks, self._original

    def reading_from(self, stacks: Stacks, image_index: np.ndarray) -> FullImages:
        """The same images from copies of their stacks; ``image_index`` (n,) is where in them each one lies."""
        copied = copy(self)
        copied._stacks, copied._original = stacks, replace(self._original, image_index=image_index)
        return copied

    def whitened(self, rows: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
        """See ``PreparedImages``."""
        rows = np.asarray(rows)
        group_of_row = self.particles.optics_index[rows]
        spectra = torch.empty((len(rows), self.box, self.box // 2 + 1), dtype=torch.complex64, device=device)
        for side in np.unique(self.sides_px[group_of_row]):
            members = np.flatnonzero(self.sides_px[group_of_row] == side)
            images = self._read(rows[members], int(side), device)
            spectra[to_device(members, device)] = fourier_resample(centred_rfft2(images), self.box)
        return spectra * self._filter_of(rows, device)

    def _read(self, rows: np.ndarray, side: int, device: torch.device | str) -> torch.Tensor:
        """(b, side, side) images in white contrast, as recorded."""
        images = np.empty((len(rows), side, side), np.float32)
        group_of_row = self._original.optics_index[rows]
        for group in np.unique(group_of_row):
            members = np.flatnonzero(group_of_row == group)
            images[members] = self._read_group(rows[members], int(group), side)
        if not np.isfinite(images).all():
            bad = int(rows[np.argmax(~np.isfinite(images).all((1, 2)))])
            column = self.particles.extra.get("image_column", "rlnImageName")
            path = self.particles.stack_paths[self.particles.stack_index[bad]]
            raise InputError(
                f"{self.particles.describe_row(bad, column)}: image {self.particles.image_index[bad] + 1} of {path} "
                "holds values that are not finite"
            )
        sign = to_device(self.particles.contrast_sign[rows].astype(np.float32), device)
        return to_device(images, device) * sign[:, None, None]

    def _read_group(self, rows: np.ndarray, group: int, side: int) -> np.ndarray:
        """(b, side, side) normalised images of one optics group, freed of a CTF that was applied to the whole box."""
        optics, normalisation = self._original.optics[group], self._normalisation
        whole = bool(optics.ctf_applied) or normalisation.needs_whole_images(group)
        images = self._stacks.read(self._original, rows, None if whole else side)
        images = normalisation.apply(images, rows, group, optics.pixel_size_A)
        if optics.ctf_applied:
            undo = undo_applied_ctf(ctf_images(self._original, rows, optics.box), optics.ctf_applied)
            spectra = torch.fft.rfft2(torch.from_numpy(images)) * undo
            images = torch.fft.irfft2(spectra, s=(optics.box, optics.box)).numpy()
        start = images.shape[-1] // 2 - side // 2
        return images[:, start : start + side, start : start + side]


def crop_sides(optics: tuple[OpticsGroup, ...], box: int, pixel_size_A: float) -> np.ndarray:
    """(groups,) even side, in each group's own pixels, of a real-space crop as wide as ``box * pixel_size_A``.

    Rounding and the images' edge keep it from being exactly so wide; whatever it is, frequencies are counted from it
    (``resampled_optics``), so nothing is approximated.
    """
    sides = [2 * round(box * pixel_size_A / group.pixel_size_A / 2) for group in optics]
    return np.array([min(side, group.box // 2 * 2) for side, group in zip(sides, optics, strict=True)])


def resampled_optics(optics: tuple[OpticsGroup, ...], sides_px: np.ndarray, box: int) -> tuple[OpticsGroup, ...]:
    """Optics groups after a crop to ``sides_px`` and Fourier resampling to ``box``: exact pixel sizes, CTF undone."""
    return tuple(
        replace(group, box=box, pixel_size_A=group.pixel_size_A * int(side) / box, ctf_applied="")
        for group, side in zip(optics, sides_px, strict=True)
    )


def view_rotations(particles: Particles) -> np.ndarray:
    """(n, 3, 3) volume to view as images see it: the rotation, with the magnification matrix in the image plane.

    RELION takes the slice at M k, which is the transform of positions that M transposed has moved.
    """
    matrices = np.broadcast_to(np.eye(3), (len(particles.optics), 3, 3)).copy()
    for matrix, group in zip(matrices, particles.optics, strict=True):
        matrix[:2, :2] = np.asarray(group.magnification_matrix).T
    return matrices[particles.optics_index] @ particles.rotation


def open_training_images(particles_dir: str | Path) -> TrainingImages:
    """The training images of a prepared particle set.

    Raises
    ------
    InputError
        Files are missing or do not agree.
    """
    folder = ParticlesFolder(Path(particles_dir))
    record, particles, _ = _read_prepared(folder)
    header = read_stack_header(folder.images)
    expected = (record.num_particles, record.train_box)
    if (header.num_images, header.box) != expected or len(particles) != record.num_rows:
        raise InputError(
            f"{folder.images}: {header.num_images} images of {header.box} px for {len(particles)} rows of "
            f"{folder.particles.name}, but {folder.record.name} has {expected[0]} of {expected[1]} px for "
            f"{record.num_rows}: run prepare again"
        )
    return TrainingImages(
        header,
        particles,
        pixel_size_A=record.train_pixel_size_A,
        sides_px=np.array([group.side_px for group in record.optics_groups]),
        calibration=_calibration(folder, record),
    )


def open_full_images(particles_dir: str | Path) -> FullImages:
    """The original images at the reconstruction box (``crop_box``, else the whole).

    Raises
    ------
    InputError
        Files are missing or do not agree, or the stacks hold other images than when prepare read them.
    """
    folder = ParticlesFolder(Path(particles_dir))
    record, particles, table = _read_prepared(folder)
    names = table["flexImageName"].str.partition("@")
    stacks_named, stack_index = np.unique(names[2].to_numpy(str), return_inverse=True)
    particles = replace(
        particles,
        stack_paths=tuple(Path(name) for name in stacks_named),
        stack_index=stack_index.astype(np.int32),
        image_index=names[0].to_numpy().astype(np.int64) - 1,
        contrast_sign=table["flexInputSign"].to_numpy(np.float64),
        optics=tuple(
            replace(
                group,
                pixel_size_A=original.input_pixel_size_A,
                box=original.input_box,
                ctf_applied=original.ctf_applied,
            )
            for group, original in zip(particles.optics, record.optics_groups, strict=True)
        ),
        extra={"image_column": "flexImageName"},
    )
    stacks, particles = open_stacks(particles)
    if "flexImageDigest" in table:  # not in what older versions have prepared
        check_digests(particles, stacks, table["flexImageDigest"].tolist())
    terms = np.array([group.background_terms for group in record.optics_groups])
    return FullImages(
        stacks,
        particles,
        box=record.crop_box,
        pixel_size_A=record.full_pixel_size_A,
        calibration=_calibration(folder, record),
        normalisation=Normalisation.from_columns(table, terms, record.background_radius_A),
    )


def _calibration(folder: ParticlesFolder, record: PreparedRecord) -> Calibration:
    """What prepare measured."""
    image_scale = np.array([group.image_scale for group in record.optics_groups])
    return Calibration(image_scale, read_noise(folder.noise), record.full_box, record.full_pixel_size_A)


def _read_prepared(folder: ParticlesFolder) -> tuple[PreparedRecord, Particles, pd.DataFrame]:
    """prepared.json, the particles as written, and their table."""
    record = PreparedRecord.read(folder.record)
    for path in (folder.particles, folder.noise, folder.images):
        if not path.is_file():
            raise InputError(f"{path}: not found: is this a folder that prepare has written?")
    tables = read_tables(folder.particles)
    return record, particles_from_tables(tables, folder.path), tables.particles
