"""What a run has found of parts that some particles lack, as its files say it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flexlib.train.confirm_parts import PartEvidence
from flexlib.train.occupancy import presence
from flexlib.train.setup import Setup
from flexlib.train.state import State

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PartResults:
    """The parts of a finished run; all empty where every particle is complete."""

    labels: np.ndarray | None = None  # (box, box, box) uint8: 0 what all have, 1 to S the parts
    share: np.ndarray | None = None  # (S,) float32 of the particles that have each
    probability: np.ndarray | None = None  # (n, S) float32 that each row has each part
    records: list[dict[str, Any]] = field(default_factory=list)  # of each part, for ``records.ValidationRecord``


def describe_parts(setup: Setup, state: State, evidence: Sequence[PartEvidence]) -> PartResults:
    """Who has the parts of the finished model, and what is to be said of each; ``evidence`` is of these."""
    occupancy = state.occupancy
    if not len(occupancy):
        return PartResults()
    found = presence(setup, state)
    labels, share = occupancy.labels.cpu().numpy(), occupancy.share.cpu().numpy()
    density, box = state.canonical.volume().clip(0), setup.source.box
    axis_A = (np.arange(box) - box // 2) * setup.source.pixel_size_A
    records = []
    for part, one in enumerate(evidence):
        own = np.where(labels == part + 1, density, 0.0)
        total = max(float(own.sum()), 1e-30)
        centre = [float((own.sum(tuple({0, 1, 2} - {axis})) * axis_A).sum() / total) for axis in (2, 1, 0)]
        error = float(found.share_se[part])
        mass_share = total / float(density.sum())
        record = {
            "share": round(float(share[part]), 5),
            "share_se": round(error, 5),
            "gain": one.gain,
            "gain_se": one.gain_se,
            "centre_A": [round(value, 2) for value in centre],
            "mass_share": round(mass_share, 5),
            "segment": occupancy.segments[part] if occupancy.segments else None,
        }
        records.append(record)
        logger.info(
            "part %d (%.1f %% of the mass) is missing from %.0f +- %.0f %% of the particles",
            part + 1,
            100 * mass_share,
            100 * (1 - share[part]),
            100 * error,
        )
    return PartResults(labels, share, found.probability.float().cpu().numpy(), records)
