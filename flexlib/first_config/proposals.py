"""What a first config should say: the training box, the coarseness of the mesh. Why: docs/first-steps.md."""

from __future__ import annotations

import math
from dataclasses import dataclass

FINEST_NYQUIST_A = 6.0  # of training: 0.8 of it, 7.5 A, shows helices, and cells are no smaller
COARSEST_NYQUIST_A = 10.0  # however poor the half-maps are: motion blurs the consensus, and training undoes that
LARGEST_TRAIN_BOX = 256  # beyond it training becomes slow
_SMALLEST_TRAIN_BOX = 32
_NOT_WORTH_A_CROP = 0.9  # of the box: images nearly as large are used as they are
TRAINING_BAND = 0.8  # of Nyquist, that training uses

CELLS_ACROSS_MOLECULE = 12
FINEST_CELL_A, COARSEST_CELL_A = 10.0, 20.0  # one to two helices
_MAX_CELLS = 40
_PIXELS_A_CELL = 2.0

RIGIDITIES = (0.5, 2.0, 8.0)
LATENT_DIMS = 2


@dataclass(frozen=True)
class TrainBox:
    """A training box."""

    box: int
    pixel_size_A: float
    why: str

    @property
    def nyquist_A(self) -> float:
        """Two pixels."""
        return 2 * self.pixel_size_A


def propose_train_box(full_box: int, pixel_size_A: float, resolution_A: float | None) -> TrainBox:
    """The training box: Nyquist at 6 A, or at the half-maps' resolution where that is worse (10 A at most).

    Training uses 0.8 of Nyquist, so the shells between that and the half-maps' resolution stay independent. The box is
    the next even one of prime factors 2, 3 and 5, never larger than the images' or than 256.

    Parameters
    ----------
    full_box, pixel_size_A
        Of the images that are Fourier-cropped.
    resolution_A
        To which the half-maps agree, if known.
    """
    nyquist_A = min(max(FINEST_NYQUIST_A, resolution_A or 0.0), COARSEST_NYQUIST_A)
    wanted = 2 * full_box * pixel_size_A / nyquist_A
    if wanted > LARGEST_TRAIN_BOX:
        wanted, why = LARGEST_TRAIN_BOX, "a finer one would be slow"
    elif nyquist_A == FINEST_NYQUIST_A:
        why = "finer shows no more of motion"
    else:
        why = "no finer than the half-maps agree"
    box = smooth_even(max(wanted, _SMALLEST_TRAIN_BOX))
    if box >= _NOT_WORTH_A_CROP * full_box and full_box <= LARGEST_TRAIN_BOX:
        box, why = full_box, "the images' own box"
    return TrainBox(box, full_box * pixel_size_A / box, why)


def smooth_even(at_least: float) -> int:
    """The smallest even number, no less than ``at_least``, without prime factors above 5: quick Fourier transforms."""
    number = 2 * math.ceil(at_least / 2 - 1e-9)
    while not _is_smooth(number):
        number += 2
    return number


def _is_smooth(number: int) -> bool:
    for factor in (2, 3, 5):
        while number % factor == 0:
            number //= factor
    return number == 1


@dataclass(frozen=True)
class Cells:
    """Cells across the box."""

    count: int
    cell_A: float
    why: str


def propose_cells(extent_A: float, longest_A: float, train_pixel_size_A: float) -> Cells:
    """Cells across the box such that about twelve span the molecule's longest width and each has 10 to 20 A.

    Parameters
    ----------
    extent_A
        Of the box.
    longest_A
        Of the molecule.
    train_pixel_size_A
        A cell has two of these pixels at least.
    """
    finest_A = max(FINEST_CELL_A, _PIXELS_A_CELL * train_pixel_size_A, extent_A / _MAX_CELLS)
    coarsest_A = max(COARSEST_CELL_A, finest_A)
    wanted_A = longest_A / CELLS_ACROSS_MOLECULE
    if wanted_A > coarsest_A:
        count, why = math.ceil(extent_A / coarsest_A - 1e-9), "no larger: a cell should span one or two helices"
    elif wanted_A < finest_A:
        count, why = math.floor(extent_A / finest_A + 1e-9), "no smaller: a cell should span a helix or more"
    else:
        count, why = round(extent_A / wanted_A), f"about {CELLS_ACROSS_MOLECULE} along the molecule"
    count = max(1, count)
    return Cells(count, extent_A / count, why)
