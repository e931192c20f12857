"""Which particles a training sees, and which of them it is scored on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flexlib.errors import InputError
from flexlib.images.sources import TrainingImages, open_training_images
from flexlib.layout import ParticlesFolder
from flexlib.train.score import choose_held_out
from flexlib.workflow_support.settings import TrainSettings


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
    training, held_out = choose_held_out(source.particles.image_index, settings.validation_fraction, settings.seed)
    if half is None:
        return ChosenRows(source, training, held_out, None)
    own = source.half_set == half - 1
    if not own.any():
        raise InputError(f"{particles.particles}: half-set {half} is empty")
    held = np.zeros(len(source), bool)
    held[held_out] = True
    rows, others = np.flatnonzero(own), np.flatnonzero(~own)
    half_set = HalfSet(half, source, rows, others)
    return ChosenRows(source.subset(rows), np.flatnonzero(~held[rows]), np.flatnonzero(held[rows]), half_set)
