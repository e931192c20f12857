"""Whether the particles confirm that some of them lack a part: a comparison in which no particle meets its own map.

The map is refined from one half-set and scored on the other, and the other way round: in nats per particle, the model
in which the part may be absent against the same in which it is there in every particle, with whatever amplitude
suits best. The map of the part thus never holds the noise of the particles that judge it, and all of them can.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from flexlib.model.occupancy import Quadratic, log_prior
from flexlib.projection.op import gather_volume, scatter_volume
from flexlib.train.map_pass import map_pass
from flexlib.train.occupancy import learn_shares, part_quadratics
from flexlib.train.part_search import TwoLevels, find_parts, two_levels
from flexlib.train.parts import Occupancy
from flexlib.train.rigid import refine_rigid_map
from flexlib.train.score import mean_by_particle
from flexlib.train.settle import refine_map
from flexlib.train.setup import Setup, canonical_map
from flexlib.train.start import mean_transfer2
from flexlib.train.state import State
from flexlib.workflow_support.scores import SIGNIFICANT_ERRORS

logger = logging.getLogger(__name__)

# Newton steps, of all particles, of each half-set's map: six of its own, and what the other half has told is forgotten
CROSS_STEPS = (6.0, 4.0, 2.0)
AT_REST_STEPS = (4.0, 1.2, 0.4)  # of the map with parts that are found at rest
DROPPED_STEPS = (1.2, 0.4)  # of the map, when a part is there for all again
_AMPLITUDE_STEPS = 20


@dataclass(frozen=True)
class PartEvidence:
    """What speaks for the absence of one part."""

    gain: float  # nats per particle
    gain_se: float
    levels: TwoLevels

    @property
    def confirmed(self) -> bool:
        """Whether the gain is beyond chance, and those who lack the part lack all of it."""
        return self.gain >= SIGNIFICANT_ERRORS * self.gain_se and self.levels.is_presence


@torch.no_grad()
def confirm_parts(setup: Setup, state: State) -> list[PartEvidence]:
    """Keep the parts that the particles confirm; the others become everybody's again. Returns the kept ones' evidence.

    Latents and views stay as they are: those that the model with all its parts has found.
    """
    if not len(state.occupancy):
        return []
    found = _cross_validated(setup, state)
    evidence = [_evidence(setup, state, found, part) for part in range(len(state.occupancy))]
    for number, one in enumerate(evidence, 1):
        logger.info(
            "part %d, there or not: %.3f +- %.3f nats per particle by the other half-set's map, level %.2f in those "
            "who lack it and %.2f in those who have it: %s",
            number,
            one.gain,
            one.gain_se,
            one.levels.absent,
            one.levels.present,
            "confirmed" if one.confirmed else "not confirmed, it counts as there in all",
        )
    dropped = [part for part, one in enumerate(evidence) if not one.confirmed]
    if dropped:
        _drop(setup, state, dropped, [_single_amplitude(found, state, part)[0] for part in dropped])
    refine_rigid(setup, state)
    return [one for one in evidence if one.confirmed]


@torch.no_grad()
def parts_at_rest(setup: Setup, state: State) -> list[PartEvidence]:
    """Parts of a model that has been set to rest, with their evidence: looked for where none has been confirmed yet.

    A flow may have learnt a motion that does as if a part were missing: with that motion the part is not seen to be.
    Flexible and rigid map, which are the same, stay so.
    """
    if len(state.occupancy) or setup.settings.occupancy != "auto":
        return []
    before = state.canonical.values
    find_parts(setup, state)
    if not len(state.occupancy):
        return []
    for steps in AT_REST_STEPS:
        refine_map(setup, state, (steps,))
        learn_shares(setup, state)
    evidence = confirm_parts(setup, state)
    if not len(state.occupancy):
        state.canonical.values = before
    whole = scatter_volume(state.canonical.values, setup.operator.voxels)
    state.rigid_values = gather_volume(whole, setup.rigid.voxels)
    return evidence


def _cross_validated(setup: Setup, state: State) -> Quadratic:
    """(n,) how each row's loss depends on the parts, by a map refined from the other half-set's training rows."""
    halves, num = np.asarray(setup.source.half_set), len(setup.source)
    model, start = state.moving_map(setup.operator, None), state.canonical
    found: list[torch.Tensor] = []
    for half in (0, 1):
        canonical = copy.copy(start)
        rows = setup.training_rows[halves[setup.training_rows] != half]
        rate_of = setup.batch_size / max(len(rows), 1)
        for number, steps in enumerate(CROSS_STEPS):
            order = np.random.default_rng((setup.settings.seed, 11, half, number)).permutation(rows)
            map_pass(
                setup,
                canonical,
                model,
                order,
                steps * rate_of,
                state.junk.probability(),
                lambda some: state.parameters(setup.rows_on_device(some)),
            )
        judged = np.flatnonzero(halves == half)
        own = part_quadratics(setup, replace(model, values=canonical.values), state, judged)
        at = setup.rows_on_device(judged)
        if not found:
            found = [part.new_zeros((num, *part.shape[1:])) for part in own.parts()]
        for whole, part in zip(found, own.parts(), strict=True):
            whole[at] = part
    return Quadratic(*found)


def _evidence(setup: Setup, state: State, found: Quadratic, part: int) -> PartEvidence:
    """What speaks for the absence of ``part``, the others being as they are."""
    prior, probability = log_prior(state.occupancy.share), state.junk.probability()
    _, without = _single_amplitude(found, state, part)
    gains = (probability * (without + torch.logsumexp(found.log_joint(prior), 1))).double().cpu().numpy()
    particle = setup.source.particles.image_index
    gains = mean_by_particle(gains[:, None], particle, np.arange(len(gains)))[0][:, 0]
    lacks = 1 - found.present(prior)
    lacks[:, part] = 0.0
    cross = found.cross[:, part] + (found.gram[:, part] * lacks).sum(1)
    alone = Quadratic(found.square, cross[:, None], found.gram[:, part : part + 1, part : part + 1])
    levels = two_levels(alone, probability)
    return PartEvidence(float(gains.mean()), float(gains.std(ddof=1) / np.sqrt(len(gains))), levels)


def _single_amplitude(found: Quadratic, state: State, part: int) -> tuple[float, torch.Tensor]:
    """The amplitude of ``part``, the same in all particles, that suits them best, and (n,) nats with it."""
    others = [other for other in range(len(state.occupancy)) if other != part]
    prior, lacking = log_prior(state.occupancy.share[others]), torch.zeros((), device=found.square.device)
    total = found.gram[:, part, part].sum().clamp(min=1e-30)
    for _ in range(_AMPLITUDE_STEPS):
        rest = _with_part_lacking(found, part, others, lacking)
        lacks = 1 - rest.present(prior)
        slope = found.cross[:, part] + (found.gram[:, part][:, others] * lacks).sum(1)
        lacking = -slope.sum() / total
    rest = _with_part_lacking(found, part, others, lacking)
    return 1 - float(lacking), -torch.logsumexp(rest.log_joint(prior), 1)


def _with_part_lacking(found: Quadratic, part: int, others: list[int], lacking: torch.Tensor) -> Quadratic:
    """The loss as a function of the ``others``, where of ``part`` every particle lacks the same."""
    gram = found.gram
    square = found.square + lacking * found.cross[:, part] + 0.5 * lacking.square() * gram[:, part, part]
    cross = found.cross[:, others] + lacking * gram[:, part][:, others]
    return Quadratic(square, cross, gram[:, others][:, :, others])


def _drop(setup: Setup, state: State, dropped: Sequence[int], amplitudes: Sequence[float]) -> None:
    """Give the ``dropped`` parts to all particles, with those amplitudes, and refine the map without them."""
    occupancy = state.occupancy
    values, labels = state.canonical.values.clone(), torch.zeros_like(occupancy.labels)
    kept = [part for part in range(len(occupancy)) if part not in dropped]
    for part, amplitude in zip(dropped, amplitudes, strict=True):
        values[occupancy.labels.flatten()[setup.operator.voxels.index] == part + 1] *= amplitude
    for number, part in enumerate(kept, 1):
        labels[occupancy.labels == part + 1] = number
    segments = [occupancy.segments[part] for part in kept] if occupancy.segments else []
    state.canonical.values = values
    state.occupancy = Occupancy(labels, occupancy.share[kept], segments)
    refine_map(setup, state, DROPPED_STEPS)


def refine_rigid(setup: Setup, state: State) -> None:
    """Refine the rigid map in the views that it has, with the parts that the map has by now."""
    rigid = canonical_map(setup, setup.rigid, mean_transfer2(setup), inside_only=False)
    rigid.values = state.rigid_values
    refine_rigid_map(setup, rigid, (state.rigid_views, state.junk), state.occupancy.on(setup.rigid, None))
    state.rigid_values = rigid.values
