"""The user's files, read and checked against each other before any long work."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from flexlib.images.noise import Calibration
from flexlib.images.normalisation import Normalisation
from flexlib.images.stack import Stacks, open_stacks
from flexlib.imaging.maps import Map, read_map
from flexlib.imaging.symmetry import symmetry_rotations
from flexlib.particles.read import read_particles
from flexlib.particles.table import Particles
from flexlib.prepare.contrast import invert_dark_contrast, white_density
from flexlib.prepare.grid import choose_boxes, common_grid, match_grid
from flexlib.prepare.mask import check_crop, consensus_mask, mask_reach_A, read_mask
from flexlib.prepare.match import Match, check_match
from flexlib.prepare.mistakes import Views
from flexlib.prepare.noise import draw_samples, measure_noise
from flexlib.prepare.screening import LeftOut, screen_images
from flexlib.prepare.selection import check_enough, select_particles, warn_of_few
from flexlib.prepare.symmetry import check_symmetry
from flexlib.workflow_support.settings import MaskSettings, PrepareSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InputFiles:
    """The user's files."""

    particles: Path
    consensus: Path
    mask: Path | None = None
    passthrough: Path | None = None
    image_root: Path | None = None

    def absolute(self) -> dict[str, Any]:
        """Absolute paths by name, as prepared.json records them."""
        return {name: None if path is None else str(path.absolute()) for name, path in vars(self).items()}


@dataclass(frozen=True)
class CheckedInputs:
    """What the user's files hold, found to belong together."""

    everything: Particles  # all of the input, boxes filled in
    kept: Particles  # those selected, all with a half-set
    half_sets: str  # where half-sets came from: "input" or "random"
    stacks: Stacks
    volume: Map  # the consensus as its file has it
    density: np.ndarray  # (full_box,) * 3, the consensus on the images' common grid
    soft_mask: np.ndarray  # (full_box,) * 3 in [0, 1]
    rotations: np.ndarray  # (m, 3, 3) of the symmetry group, the identity first
    full_box: int
    pixel_size_A: float
    crop_box: int
    train_box: int


def check_inputs(files: InputFiles, settings: PrepareSettings, mask_settings: MaskSettings) -> CheckedInputs:
    """Read the metadata, the headers of all image stacks and the maps; no image is read.

    Parameters
    ----------
    files
        The user's.
    settings, mask_settings
        Boxes, selection and symmetry; how a mask is made where none is given.

    Raises
    ------
    InputError
        Anything in the input is missing or contradicts the rest.
    """
    rotations = symmetry_rotations(settings.symmetry)
    stacks, everything = open_stacks(read_particles(files.particles, files.passthrough, files.image_root))
    full_box, pixel_size_A = common_grid(everything)
    crop_box, train_box = choose_boxes(settings, full_box)
    volume = read_map(files.consensus)
    density = match_grid(volume, full_box, pixel_size_A, str(files.consensus))
    density = white_density(density, pixel_size_A, str(files.consensus))
    check_symmetry(density, rotations, settings.symmetry, str(files.consensus))
    soft_mask = (
        consensus_mask(density, pixel_size_A, mask_settings)
        if files.mask is None
        else read_mask(files.mask, full_box, pixel_size_A)
    )
    check_crop(soft_mask, crop_box)
    kept, half_sets = select_particles(everything, settings)
    check_enough(kept)
    warn_of_few(kept)
    log.info("%d of %d particles, images of %d px, %.4g A/px", len(kept), len(everything), full_box, pixel_size_A)
    return CheckedInputs(
        everything=everything,
        kept=kept,
        half_sets=half_sets,
        stacks=stacks,
        volume=volume,
        density=density,
        soft_mask=soft_mask,
        rotations=rotations,
        full_box=full_box,
        pixel_size_A=pixel_size_A,
        crop_box=crop_box,
        train_box=train_box,
    )


@dataclass(frozen=True)
class Calibrated:
    """The particles that are used, and how their images are read."""

    kept: Particles  # the contrast of dark optics groups turned
    calibration: Calibration  # its ``image_scale`` all positive
    normalisation: Normalisation
    left_out: LeftOut
    num_repaired: int  # images of which a few extreme pixels are replaced
    match: Match
    digest: np.ndarray  # (n,) uint64 checksums of the images kept


def calibrate(inputs: CheckedInputs) -> Calibrated:
    """Look at all images, leave out those that cannot be used, and compare a sample with the consensus.

    Raises
    ------
    InputError
        The images do not match the consensus, or match its mirror image better; or nearly all are bad.
    """
    soft_mask, pixel_size_A = inputs.soft_mask, inputs.pixel_size_A
    screened = screen_images(inputs.kept, inputs.stacks, mask_reach_A(soft_mask, pixel_size_A), inputs.rotations)
    measured = measure_noise(
        screened.kept, inputs.stacks, (inputs.full_box, pixel_size_A),
        inputs.density * soft_mask, soft_mask > 0, screened.normalisation,
    )  # fmt: skip
    views = Views(
        measured.particles,
        inputs.stacks,
        measured.normalisation,
        inputs.density * soft_mask,
        soft_mask > 0,
        pixel_size_A,
    )
    match = check_match(views, inputs.volume, measured.sample, measured.calibration)
    measured.check_scale()
    kept, image_scale = invert_dark_contrast(measured.particles, measured.calibration.image_scale)
    calibration = replace(measured.calibration, image_scale=image_scale)
    return Calibrated(
        kept, calibration, measured.normalisation, screened.left_out, screened.num_repaired, match, screened.digest
    )


def sample_of(inputs: CheckedInputs) -> CheckedInputs:
    """The same with those particles only that noise and scale are measured on."""
    return replace(inputs, kept=inputs.kept.subset(np.sort(np.concatenate(draw_samples(inputs.kept)))))
