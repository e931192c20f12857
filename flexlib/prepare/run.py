"""prepare: from the user's particles and consensus map to whitened training images.

Optics groups may differ in pixel size and box: images are cropped in real space to the widest extent that all groups
have, and resampled in Fourier space to the pixel size of the finest. Even sides in pixels make those extents differ by
up to a pixel; each group keeps its exact pixel size (``images.sources.resampled_optics``), so poses and CTFs stay
exact.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from flexlib.images.noise import write_noise
from flexlib.images.sources import FullImages, resampled_optics
from flexlib.images.stack import open_stacks
from flexlib.imaging.fsc import frequencies_1_per_A
from flexlib.imaging.maps import Map, read_map
from flexlib.imaging.symmetry import symmetry_rotations
from flexlib.layout import ParticlesFolder
from flexlib.particles.read import read_particles
from flexlib.prepare.grid import choose_boxes, common_grid, log_groups, match_grid
from flexlib.prepare.mask import consensus_mask, read_mask
from flexlib.prepare.noise import invert_dark_contrast, measure_noise
from flexlib.prepare.selection import select_particles
from flexlib.prepare.symmetry import check_symmetry
from flexlib.prepare.writing import write_maps, write_particles, write_training_stack
from flexlib.records import OpticsRecord, PreparedRecord
from flexlib.workflow_support.settings import MaskSettings, PrepareSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Inputs:
    """The user's files."""

    particles: Path
    consensus: Path
    mask: Path | None
    passthrough: Path | None
    image_root: Path | None

    def absolute(self) -> dict[str, Any]:
        """Absolute paths by name, as prepared.json records them."""
        return {name: None if path is None else str(path.absolute()) for name, path in vars(self).items()}


def prepare_particles(
    particles: str | Path,
    consensus: str | Path,
    out_dir: str | Path,
    *,
    mask: str | Path | None = None,
    passthrough: str | Path | None = None,
    image_root: str | Path | None = None,
    settings: PrepareSettings | None = None,
    mask_settings: MaskSettings | None = None,
) -> None:
    """Read, check, select, measure noise and scale, whiten, crop; write ``results/<name>/particles``.

    Parameters
    ----------
    particles
        .star or .cs file; ``passthrough`` and ``image_root`` as in ``read_particles``.
    consensus
        Map that the particles' poses belong to, any box and pixel size.
    out_dir
        Folder to write; its files are listed in docs/architecture.md.
    mask
        Soft solvent mask, any box and pixel size; None makes one from the consensus with ``mask_settings``.
    passthrough, image_root
        See ``read_particles``.
    settings
        Boxes, selection and symmetry.
    mask_settings
        How the mask is made.

    Raises
    ------
    InputError
        Before any long work, where anything in the input is missing or contradicts the rest.
    """
    paths = (None if path is None else Path(path) for path in (mask, passthrough, image_root))
    inputs = _Inputs(Path(particles), Path(consensus), *paths)
    _prepare(inputs, ParticlesFolder(Path(out_dir)), settings or PrepareSettings(), mask_settings or MaskSettings())


def _prepare(inputs: _Inputs, folder: ParticlesFolder, settings: PrepareSettings, mask_settings: MaskSettings) -> None:
    """See ``prepare_particles``."""
    rotations = symmetry_rotations(settings.symmetry)
    stacks, everything = open_stacks(read_particles(inputs.particles, inputs.passthrough, inputs.image_root))
    full_box, pixel_size_A = common_grid(everything)
    crop_box, train_box = choose_boxes(settings, full_box)
    volume = read_map(inputs.consensus)
    density = match_grid(volume, full_box, pixel_size_A, str(inputs.consensus))
    check_symmetry(density, rotations, settings.symmetry, str(inputs.consensus))
    soft_mask = (
        consensus_mask(density, pixel_size_A, mask_settings)
        if inputs.mask is None
        else read_mask(inputs.mask, full_box, pixel_size_A)
    )
    kept, half_sets = select_particles(everything, settings)
    log.info("%d of %d particles, images of %d px, %.4g A/px", len(kept), len(everything), full_box, pixel_size_A)
    log_groups(kept, full_box, pixel_size_A)

    measured = measure_noise(kept, stacks, full_box, pixel_size_A, density * soft_mask, soft_mask > 0)
    kept, image_scale = invert_dark_contrast(kept, measured.image_scale)
    measured = replace(measured, image_scale=image_scale)
    full = FullImages(stacks, kept, box=crop_box, pixel_size_A=pixel_size_A, calibration=measured)
    write_training_stack(full, folder.images, train_box)
    write_noise(folder.noise, measured.sigma, frequencies_1_per_A(full_box, pixel_size_A))
    mask_share = write_maps(folder, Map(density, pixel_size_A), soft_mask, volume, crop_box, train_box)
    write_particles(folder, kept, resampled_optics(kept.optics, full.sides_px, train_box), rotations)
    copies = len(rotations)
    if copies > 1:
        log.info("symmetry %s: %d rows, %d of each particle", settings.symmetry, len(kept) * copies, copies)
    record = PreparedRecord(
        **inputs.absolute(),
        num_input=len(everything),
        num_particles=len(kept),
        symmetry=settings.symmetry.upper(),
        symmetry_copies=copies,
        num_rows=len(kept) * copies,
        half_sets=half_sets,
        full_box=full_box,
        full_pixel_size_A=pixel_size_A,
        crop_box=crop_box,
        train_box=train_box,
        train_pixel_size_A=pixel_size_A * crop_box / train_box,
        mask_share=mask_share,
        optics_groups=_optics_records(full, image_scale),
        settings=asdict(settings),
        mask_settings={item.name: getattr(mask_settings, item.name) for item in fields(MaskSettings)},
    )
    record.write(folder.record)


def _optics_records(full: FullImages, image_scale: np.ndarray) -> list[OpticsRecord]:
    """What prepared.json says of each optics group; ``full`` has them as the user's images do."""
    return [
        OpticsRecord(
            name=group.name,
            input_box=group.box,
            input_pixel_size_A=group.pixel_size_A,
            ctf_applied=group.ctf_applied,
            side_px=int(side),
            image_scale=float(scale),
        )
        for group, side, scale in zip(full.stored[1].optics, full.sides_px, image_scale, strict=True)
    ]
