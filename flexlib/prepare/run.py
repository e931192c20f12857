"""prepare: from the user's particles and consensus map to whitened training images.

Optics groups may differ in pixel size and box: images are cropped in real space to the widest extent that all groups
have, and resampled in Fourier space to the pixel size of the finest. Even sides in pixels make those extents differ by
up to a pixel; each group keeps its exact pixel size (``images.sources.resampled_optics``), so poses and CTFs stay
exact.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np

from flexlib.images.noise import write_noise
from flexlib.images.recognise import known_stacks, write_known_stacks
from flexlib.images.sources import FullImages, resampled_optics
from flexlib.imaging.fsc import frequencies_1_per_A
from flexlib.imaging.maps import Map
from flexlib.layout import ParticlesFolder
from flexlib.particles.plausible import implausible_values
from flexlib.prepare.grid import log_groups
from flexlib.prepare.inputs import InputFiles, calibrate, check_inputs
from flexlib.prepare.writing import write_maps, write_particles, write_training_stack
from flexlib.records import OpticsRecord, PreparedRecord
from flexlib.workflow_support.settings import MaskSettings, PrepareSettings

log = logging.getLogger(__name__)


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
    files = InputFiles(Path(particles), Path(consensus), *paths)
    _prepare(files, ParticlesFolder(Path(out_dir)), settings or PrepareSettings(), mask_settings or MaskSettings())


def _prepare(
    files: InputFiles, folder: ParticlesFolder, settings: PrepareSettings, mask_settings: MaskSettings
) -> None:
    """See ``prepare_particles``."""
    inputs = check_inputs(files, settings, mask_settings)
    full_box, pixel_size_A = inputs.full_box, inputs.pixel_size_A
    crop_box, train_box = inputs.crop_box, inputs.train_box
    log_groups(inputs.kept, full_box, pixel_size_A)
    for sentence in implausible_values(inputs.kept):
        log.warning("%s: %s", files.particles, sentence)

    read = known_stacks(inputs.stacks, inputs.kept)
    found = calibrate(inputs)
    kept, measured = found.kept, found.calibration
    full = FullImages(inputs.stacks, kept, crop_box, pixel_size_A, measured, found.normalisation)
    write_training_stack(full, folder.images, train_box)
    write_noise(folder.noise, measured.sigma, frequencies_1_per_A(full_box, pixel_size_A))
    found.left_out.write(folder.left_out)
    write_known_stacks(folder.stacks, read)
    mask_share = write_maps(
        folder, Map(inputs.density, pixel_size_A), inputs.soft_mask, inputs.volume, crop_box, train_box
    )
    training_optics = resampled_optics(kept.optics, full.sides_px, train_box)
    write_particles(folder, kept, training_optics, inputs.rotations, found.normalisation)
    copies = len(inputs.rotations)
    if copies > 1:
        log.info("symmetry %s: %d rows, %d of each particle", settings.symmetry, len(kept) * copies, copies)
    record = PreparedRecord(
        **files.absolute(),
        num_input=len(inputs.everything),
        num_particles=len(kept),
        symmetry=settings.symmetry.upper(),
        symmetry_copies=copies,
        num_rows=len(kept) * copies,
        half_sets=inputs.half_sets,
        full_box=full_box,
        full_pixel_size_A=pixel_size_A,
        crop_box=crop_box,
        train_box=train_box,
        train_pixel_size_A=pixel_size_A * crop_box / train_box,
        mask_share=mask_share,
        optics_groups=_optics_records(full, measured.image_scale, found.normalisation.terms),
        background_radius_A=found.normalisation.radius_A,
        left_out=found.left_out.counts(),
        num_repaired=found.num_repaired,
        settings=asdict(settings),
        mask_settings={item.name: getattr(mask_settings, item.name) for item in fields(MaskSettings)},
    )
    record.write(folder.record)


def _optics_records(full: FullImages, image_scale: np.ndarray, terms: np.ndarray) -> list[OpticsRecord]:
    """What prepared.json says of each optics group; ``full`` has them as the user's images do."""
    return [
        OpticsRecord(
            name=group.name,
            input_box=group.box,
            input_pixel_size_A=group.pixel_size_A,
            ctf_applied=group.ctf_applied,
            side_px=int(side),
            image_scale=float(scale),
            background_terms=int(count),
        )
        for group, side, scale, count in zip(full.stored[1].optics, full.sides_px, image_scale, terms, strict=True)
    ]
