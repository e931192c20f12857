"""When what happens in a run: epochs, rates, and the band of Fourier shells in use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

FLOW_RATE = 5e-3  # 3DFlex's
FLOW_RATE_END = 5e-4  # 3DFlex's
MAP_STEPS_PER_EPOCH = 4.0  # Newton steps that the map takes in an epoch, whatever the batch and the set's size
MOST_MAP_STEP = 0.2  # of a Newton step in one batch
FIRST_RESOLUTION_A = 20.0  # where coarse to fine starts
LAST_BAND = 0.8  # of Nyquist (3DFlex's)
BAND_EPOCHS = 5  # epochs from the first to the last band
MAX_EPOCHS = 16  # before the final annealing, with epochs: auto
ANNEAL_EPOCHS = 4
PATIENCE = 3  # epochs without a better held-out score before annealing, with epochs: auto


@dataclass(frozen=True)
class Schedule:
    """The course of a run, from what its settings and its data fix."""

    epochs: int | Literal["auto"]
    box: int
    pixel_size_A: float
    batch_size: int
    num_training_rows: int

    @property
    def num_batches(self) -> int:
        """Mini-batches in an epoch."""
        return -(-self.num_training_rows // self.batch_size)

    def planned_epochs(self, anneal_from: int | None) -> int:
        """Epochs in all, as far as known; ``anneal_from`` is the epoch at which annealing has started, if it has."""
        if self.epochs != "auto":
            return int(self.epochs)
        return (MAX_EPOCHS if anneal_from is None else anneal_from) + ANNEAL_EPOCHS

    def anneal(self, epoch: int, anneal_from: int | None) -> float:
        """Factor on all rates: 1 while learning, falling geometrically to a tenth in the last epochs."""
        last = self.planned_epochs(anneal_from)
        if self.epochs == "auto":
            length, start = ANNEAL_EPOCHS, anneal_from if anneal_from is not None else MAX_EPOCHS
        else:
            length = max(1, last // 4)
            start = last - length
        return float((FLOW_RATE_END / FLOW_RATE) ** (max(0, epoch - start + 1) / length))

    def flow_rate(self, epoch: int, step: int, anneal: float) -> float:
        """Learning rate of the flow in one mini-batch; it rises linearly over the first epoch."""
        return FLOW_RATE * anneal * min(1.0, (epoch * self.num_batches + step + 1) / self.num_batches)

    @property
    def map_rate(self) -> float:
        """Newton steps of the map in one mini-batch while learning."""
        return min(MAP_STEPS_PER_EPOCH * self.batch_size / self.num_training_rows, MOST_MAP_STEP)

    def band(self, epoch: int) -> float:
        """Highest shell in use: coarse to fine, up to ``LAST_BAND`` of Nyquist."""
        half = self.box / 2
        first = np.clip(self.box * self.pixel_size_A / FIRST_RESOLUTION_A, 0.25 * half, 0.6 * half)
        return float(first + (LAST_BAND * half - first) * min(1.0, epoch / BAND_EPOCHS))

    @property
    def full_band(self) -> float:
        """The band from epoch ``BAND_EPOCHS`` on."""
        return self.band(BAND_EPOCHS)

    def measures_information(self, epoch: int) -> bool:
        """Whether the latents' Fisher information is measured anew in this epoch."""
        return epoch < 2 or epoch % 4 == 0

    def looks_for_parts(self, epoch: int, anneal_from: int | None) -> bool:
        """Whether parts that particles may lack are looked for after this epoch.

        That is some epochs after the full band has come into use, and once more as annealing starts; not in runs that
        are too short for the full band: a swinging arm that is hardly known yet looks like a part that some lack.
        """
        last = self.planned_epochs(anneal_from)
        if last <= BAND_EPOCHS:
            return False
        anneals = [number for number in range(last) if self.anneal(number, anneal_from) < 1]
        first = min(anneals, default=last)
        return epoch in (min(BAND_EPOCHS + 2, max(first - 1, 0)), first)

    def has_learnt(self, gains: Sequence[float], error: float) -> bool:
        """Whether the last epochs have brought no better held-out score: then annealing starts, with epochs: auto.

        Parameters
        ----------
        gains
            Held-out gain after each epoch, in nats.
        error
            Standard error of the last one.
        """
        if self.epochs != "auto" or len(gains) <= BAND_EPOCHS + PATIENCE:
            return False
        return max(gains[-PATIENCE:]) < max(gains[BAND_EPOCHS:-PATIENCE]) + 0.2 * error
