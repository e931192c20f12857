"""What two models that never met agree on: what validate wrote, and how it compares with the shared model's."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd

from flexlib.errors import InputError
from flexlib.imaging.maps import Map
from flexlib.layout import RunFolder, ValidateFolder
from flexlib.records import AgreementRecord, ValidationRecord
from flexlib.report.facts import fsc_column, resolution_A
from flexlib.report.results import Results, map_at, points_below, record_at, table_at
from flexlib.workflow_support.points import SweepPoint

logger = logging.getLogger(__name__)

INDEPENDENT = "independent"  # how columns of its fsc.csv are named
STILL_A = 1e-3  # rms motion below which a model stands still
CONFIRMING_ERRORS = 2.0  # standard errors of the cross gain that confirm motion
TOO_SMALL = 1.1  # factor from which on standard errors are called too small
_HIGH_FSC = 0.9  # shells are compared from where the independent curve falls below
_LITTLE_FSC, _LITTLE_RESOLUTION = 0.02, 0.03  # by which the shared model may look better: mean FSC, share of a length
_KINDS = {"whole map": ("corrected", "masked", "unmasked"), "moving part": ("moving",)}

Read = TypeVar("Read", Map, pd.DataFrame)


@dataclass(frozen=True)
class FscComparison:
    """FSC of the independent half-maps beside that of the shared model's, over one part of the map."""

    part: str  # "whole map" or "moving part"
    curves: pd.DataFrame  # frequency_1_per_A, independent and, where that was reconstructed, shared

    @property
    def has_shared(self) -> bool:
        """Whether there is something to compare with."""
        return "shared" in self.curves

    @property
    def limit_A(self) -> float:
        """Resolution of the last shell."""
        return 1 / float(self.curves["frequency_1_per_A"].max())

    def resolution_A(self, model: str, threshold: float) -> float | None:
        """Where the curve of "independent" or "shared" falls below ``threshold``; None where it never does."""
        return resolution_A(self.curves, model, threshold)

    @cached_property
    def _judged(self) -> pd.DataFrame:
        """Frequency and difference, shared minus independent, of the shells that say something."""
        below = np.flatnonzero(self.curves[INDEPENDENT].to_numpy(float)[1:] < _HIGH_FSC)
        first = 1 + int(below[0]) if below.size else 1
        difference = self.curves["shared"] - self.curves[INDEPENDENT]
        table = pd.DataFrame({"frequency_1_per_A": self.curves["frequency_1_per_A"], "difference": difference})
        return table.iloc[first:].dropna()

    @property
    def mean_difference(self) -> float:
        """By how much the shared curve lies higher, over the shells from where the independent one is below 0.9."""
        return float(self._judged["difference"].mean()) if len(self._judged) else 0.0

    @property
    def largest_difference(self) -> tuple[float, float]:
        """By how much the shared curve lies higher at most, and the resolution in Angstrom of that shell."""
        if not len(self._judged):
            return 0.0, self.limit_A
        row = self._judged.loc[self._judged["difference"].idxmax()]
        return float(row["difference"]), 1 / float(row["frequency_1_per_A"])

    @property
    def flattered(self) -> bool:
        """Whether the shared model's FSC looks better by more than a little."""
        if not self.has_shared:
            return False
        shared, independent = (self.resolution_A(model, 0.143) or self.limit_A for model in ("shared", INDEPENDENT))
        return bool(self.mean_difference > _LITTLE_FSC or shared < (1 - _LITTLE_RESOLUTION) * independent)


@dataclass(frozen=True)
class ValidatedPoint:
    """A sweep point that validate has judged; a file that is not there, or cannot be read, is None."""

    run: RunFolder
    point: SweepPoint
    record: AgreementRecord

    @property
    def folder(self) -> ValidateFolder:
        """What validate wrote."""
        return self.run.validate(self.point.path)

    @cached_property
    def shared(self) -> ValidationRecord | None:
        """What the training on all particles came to."""
        return record_at(ValidationRecord, self.run.train(self.point.path).validation)

    @cached_property
    def comparisons(self) -> list[FscComparison]:
        """Of the whole map, and of the part that moves; what there is."""
        own = _readable(_with_columns("frequency_1_per_A"), self.folder.fsc)
        shared = _readable(_with_columns("frequency_1_per_A"), self.run.reconstruct(self.point.path).fsc)
        if own is None:
            return []
        if shared is not None and not _same_shells(own, shared):
            logger.warning("%s: has other shells than %s", self.folder.fsc, self.run.reconstruct(self.point.path).fsc)
            shared = None
        found = (_comparison(part, own, shared) for part in _KINDS)
        return [comparison for comparison in found if comparison is not None]

    @cached_property
    def modes(self) -> pd.DataFrame | None:
        """How far the models agree along the mesh's modes."""
        columns = ("first_mode", "last_mode", "length_A", "correlation", "motion_A")
        return _readable(_with_columns(*columns), self.folder.modes)

    @cached_property
    def regions(self) -> pd.DataFrame | None:
        """Motion and its error by region of the latent space."""
        return _readable(
            _with_columns("region", "particles", "motion_A", "error_A", "model_error_A"), self.folder.regions
        )

    @cached_property
    def calibration(self) -> pd.DataFrame | None:
        """The latents' standard errors beside how far the models differ."""
        columns = ("latent", "std_err", "model_std_err", "coverage", "factor")
        return _readable(_with_columns(*columns), self.folder.calibration)

    @cached_property
    def motion_error(self) -> Map | None:
        """The error of the motion in each voxel."""
        return _readable(map_at, self.folder.motion_error)

    @cached_property
    def motion_size(self) -> Map | None:
        """The motion in each voxel."""
        return _readable(map_at, self.folder.motion_size)

    @cached_property
    def map(self) -> Map | None:
        """The mean of the independent half-maps."""
        return _readable(map_at, self.folder.map)

    @property
    def resting(self) -> list[int]:
        """Half-sets whose models were set to rest."""
        return [half for half, rests in enumerate(self.record.at_rest, 1) if rests]

    @property
    def claims_motion(self) -> bool:
        """Whether the shared model moves."""
        return self.record.motion_size_A > STILL_A

    @property
    def both_move(self) -> bool:
        """Whether there is a motion that both halves' models confirm, and so an error of it."""
        return self.claims_motion and not self.resting

    @property
    def cross_confirms(self) -> bool | None:
        """Whether each half-set's model predicts the other's particles better than a rigid one; None: not known."""
        gain, error = self.record.cross_gain, self.record.cross_gain_se
        return None if gain is None or error is None else gain > CONFIRMING_ERRORS * error

    @property
    def unconverged(self) -> list[str]:
        """Half-maps whose solution was stopped by the count of iterations: "independent half 1"."""
        return [name.replace("_half", " half ") for name, is_so in self.record.converged.items() if not is_so]

    def untold_share(self, mask: Map | None) -> float | None:
        """Share of the mask's volume where the error exceeds the motion; None where the maps are not there."""
        error, size = self.motion_error, self.motion_size
        if error is None or size is None or mask is None or not error.box == size.box == mask.box:
            return None
        inside = mask.data > 0.5
        return float((error.data > size.data)[inside].mean()) if inside.any() else None


def validated_points(results: Results) -> list[ValidatedPoint]:
    """The sweep points that were validated, the chosen one first."""
    found = []
    for point in points_below(results.run.validate("").path):
        record = record_at(AgreementRecord, results.run.validate(point.path).record)
        if record is not None:
            found.append(ValidatedPoint(results.run, point, record))
    return sorted(found, key=lambda one: (one.point != results.chosen, one.point))


def unreadable_records(results: Results) -> list[Path]:
    """Records of validations that are there and cannot be read."""
    points = points_below(results.run.validate("").path)
    known = {one.point for one in validated_points(results)}
    paths = (results.run.validate(point.path).record for point in sorted(points) if point not in known)
    return [path for path in paths if path.exists()]


def _comparison(part: str, own: pd.DataFrame, shared: pd.DataFrame | None) -> FscComparison | None:
    """By the best curve that both have; without a shared one, by the independent one's best."""
    pairs = [
        (fsc_column(own, INDEPENDENT, kind), None if shared is None else fsc_column(shared, "flex", kind))
        for kind in _KINDS[part]
    ]
    pairs = [pair for pair in pairs if pair[0] is not None]
    if not pairs:
        return None
    independent, flexible = next((pair for pair in pairs if pair[1] is not None), pairs[0])
    assert independent is not None
    curves = {"frequency_1_per_A": own["frequency_1_per_A"], INDEPENDENT: own[independent]}
    if shared is not None and flexible is not None:
        curves["shared"] = shared[flexible]
    return FscComparison(part, pd.DataFrame(curves))


def _same_shells(own: pd.DataFrame, shared: pd.DataFrame) -> bool:
    frequencies = own["frequency_1_per_A"], shared["frequency_1_per_A"]
    return len(own) == len(shared) and bool(np.allclose(*frequencies, rtol=1e-3, atol=1e-6))


def _with_columns(*names: str) -> Callable[[Path], pd.DataFrame | None]:
    """A reader of tables that have these columns of numbers."""

    def read(path: Path) -> pd.DataFrame | None:
        table = table_at(path)
        if table is not None and not set(names) <= set(table.select_dtypes("number")):
            raise InputError(f"{path}: lacks columns of numbers: {', '.join(names)}")
        return table

    return read


def _readable(read: Callable[[Path], Read | None], path: Path) -> Read | None:
    """What ``read`` makes of a file; None, with a warning, where it cannot."""
    try:
        return read(path)
    except InputError as error:
        logger.warning("%s", error)
        return None
