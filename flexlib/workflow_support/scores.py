"""The held-out and the cross score: when a gain confirms motion, and which sweep point is best."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev

from flexlib.errors import InputError
from flexlib.files import reading
from flexlib.layout import TrainFolder, ValidateFolder
from flexlib.records import AgreementRecord, ValidationRecord
from flexlib.workflow_support.points import SweepPoint

SIGNIFICANT_ERRORS = 3.0  # standard errors of held-out gain below which no motion is claimed
SIGNIFICANT_NATS = 0.5  # nor below this: of 150 held-out rigid particles it has come out as 0.25 +- 0.08


def confirms_motion(gain: float, standard_error: float) -> bool:
    """Whether a held-out gain, in nats per particle, is more than chance and rigid particles give.

    False where nothing was held out (nan).
    """
    return gain >= max(SIGNIFICANT_ERRORS * standard_error, SIGNIFICANT_NATS)


@dataclass(frozen=True)
class Score:
    """The held-out or cross score of one sweep point, in nats per particle, flexible minus rigid."""

    point: SweepPoint
    gain: float
    standard_error: float
    particles: Mapping[int, float] = field(default_factory=dict)  # row of particles.star -> its gain

    def difference(self, other: Score) -> tuple[float, float]:
        """Gain minus that of ``other``, and its standard error.

        Particles differ far more than settings do. All sweep points hold out the same ones, so the error is that of
        the mean of their differences, particle by particle. Where that is not known, or an older version has held out
        others for another seed, both errors add in square.
        """
        if self.particles.keys() == other.particles.keys() and len(self.particles) > 1:
            differences = [gain - other.particles[row] for row, gain in self.particles.items()]
            return fmean(differences), stdev(differences) / math.sqrt(len(differences))
        errors = [error for error in (self.standard_error, other.standard_error) if math.isfinite(error)]
        return self.gain - other.gain, math.hypot(*errors)


def choose_point(scores: Sequence[Score]) -> Score:
    """The simplest sweep point within one standard error of the best score (the one-standard-error rule).

    The standard error is the best sweep point's own, over the scored particles. (That of the paired difference is far
    smaller, and one such error is what chance alone gives the luckiest of a dozen points that are equally good.)
    Simplest is, in this order: fewer latent dimensions, coarser mesh, higher rigidity. Points that differ in the seed
    alone are equally simple: the one with the higher score is taken.

    Raises
    ------
    InputError
        No sweep point has a score.
    """
    best = best_score(scores)
    if best is None:
        raise InputError(
            "no point has a held-out score, so none is best: set train.validation_fraction above 0 "
            "or name the points in reconstruct.points"
        )
    error = best.standard_error if math.isfinite(best.standard_error) else 0.0
    near = [score for score in scores if score.gain >= best.gain - error]
    return min(near, key=_simplicity)


def best_score(scores: Iterable[Score]) -> Score | None:
    """The highest score; None where no sweep point has one."""
    return max((score for score in scores if math.isfinite(score.gain)), key=lambda score: score.gain, default=None)


def _simplicity(score: Score) -> tuple[float, ...]:
    point = score.point
    return (point.latent_dims, point.cells, -point.rigidity, -score.gain, point.seed)


def read_score(point: SweepPoint, validation_json: str | Path) -> Score:
    """The score in a sweep point's ``validation.json`` and ``held_out.csv`` beside it; nan where none was held out."""
    record = ValidationRecord.read(validation_json)
    particles = TrainFolder(Path(validation_json).parent).held_out
    return Score(point, record.gain, record.gain_se, read_gains(particles, record.validation_particles))


def read_cross_score(point: SweepPoint, validation_json: str | Path) -> Score:
    """The score that validate has written for a sweep point: each half-set's particles by the other's model."""
    record = AgreementRecord.read(validation_json)
    particles = ValidateFolder(Path(validation_json).parent).cross
    return Score(point, record.gain, record.gain_se, read_gains(particles, record.cross_particles))


READERS = {"held_out": read_score, "cross": read_cross_score}  # by ``sweep.choose_by``


def read_gains(path: Path, count: int | None = None) -> dict[int, float]:
    """Row and gain of each scored particle; InputError where they are not as many as the record says."""
    with reading(path, ValueError, KeyError, TypeError), path.open(newline="") as file:
        particles = {int(row["row"]): float(row["gain"]) for row in csv.DictReader(file)}
    if count is not None and len(particles) != count:
        raise InputError(f"{path}: {len(particles)} particles, {count} were scored")
    return particles
