"""Which particles a training sees, and which of them it is scored on."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

from flexlib.errors import InputError
from flexlib.images.sources import TrainingImages, open_training_images
from flexlib.layout import ParticlesFolder
from flexlib.particles.table import Particles
from flexlib.train.score import HeldOutChoice, choose_held_out
from flexlib.workflow_support.settings import TrainSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HalfSet:
    """A half-set that is trained as if there were no other particles, and where it lies among all."""

    number: int  # 1 or 2
    all_images: TrainingImages
    rows: np.ndarray  # (n,) of ``all_images``: the half-set's
    other_rows: np.ndarray  # the other particles'


@dataclass(frozen=True)
class ChosenRows:
    """The images of a training."""

    source: TrainingImages
    training: np.ndarray  # rows of ``source``
    held_out: np.ndarray
    half: HalfSet | None  # that the images are of; None: of all
    by_micrograph: bool  # whether micrographs are held out whole; else single images


def choose_rows(particles: ParticlesFolder, settings: TrainSettings, half: int | None = None) -> ChosenRows:
    """The images to train on, and those to hold out.

    Parameters
    ----------
    particles
        What prepare has written.
    settings
        ``train:`` at one sweep point.
    half
        1 or 2: of this half-set alone; what is held out of it is what is held out of all. None for all.

    Raises
    ------
    InputError
        Files do not fit, or the half-set is empty.
    """
    source = open_training_images(particles.path)
    known = source.particles
    choice = choose_held_out(known.image_index, settings.validation_fraction, known.micrograph)
    _log(choice, known)
    if half is None:
        return ChosenRows(source, choice.training, choice.held_out, None, choice.by_micrograph)
    own = source.half_set == half - 1
    if not own.any():
        raise InputError(f"{particles.particles}: half-set {half} is empty")
    held = np.zeros(len(source), bool)
    held[choice.held_out] = True
    rows, others = np.flatnonzero(own), np.flatnonzero(~own)
    half_set = HalfSet(half, source, rows, others)
    training, held_out = np.flatnonzero(~held[rows]), np.flatnonzero(held[rows])
    return ChosenRows(source.subset(rows), training, held_out, half_set, choice.by_micrograph)


def _log(choice: HeldOutChoice, particles: Particles) -> None:
    """Say what is held out, and by what it was chosen."""
    if not len(choice.held_out):
        return
    count, all_micrographs = len(np.unique(particles.image_index[choice.held_out])), particles.micrograph
    if all_micrographs is None:
        how = "chosen one by one: the input does not name their micrographs"
    elif choice.by_micrograph:
        how = f"all of {len(np.unique(all_micrographs[choice.held_out]))} micrographs"
    else:
        how = f"chosen one by one: {len(np.unique(all_micrographs))} micrographs are too few to hold out whole ones"
    logger.info("%d particles are held out, %s", count, how)
