"""Which parts a run gives an occupancy: those that the settings name, or those that the search finds."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from flexlib.errors import InputError
from flexlib.model.occupancy import MOST_PARTS, Parts, Quadratic
from flexlib.projection.op import scatter_volume
from flexlib.train.fading import (
    MOST_FIELDS,
    ROWS_PER_FIELD,
    amplitude_fields,
    amplitude_forces,
    component_maps,
    cut_part,
    leading_components,
    searched_rows,
)
from flexlib.train.occupancy import EM_STEPS, LEAST_SHARE, part_quadratics
from flexlib.train.setup import Setup
from flexlib.train.state import State
from flexlib.workflow_support.scores import SIGNIFICANT_ERRORS

logger = logging.getLogger(__name__)

MOST_COMPONENTS = 6  # that are looked at: beyond, there is more amiss than a part that fades
CUTS = 3  # of a part: each from what the last one says of who has it
NEARER_ABSENT = 0.5  # of the level of the particles that have a part, below which the others' is nearer to nothing
_FIRST_SHARES = (0.9, 0.7, 0.5, 0.3, 0.1)  # where EM starts


@dataclass(frozen=True)
class TwoLevels:
    """How n particles fall into some that have a part and some that lack it, by its amplitude in the present map."""

    share: float  # that have it
    present: float  # amplitude where it is there, in units of the map's
    absent: float  # likewise where it is not; of a fit in which it is free
    gain: float  # nats per particle over the best single amplitude
    gain_se: float
    probability: torch.Tensor  # (n,) that it is there

    @property
    def is_better(self) -> bool:
        """Whether two levels fit better than one, beyond chance."""
        return self.gain > SIGNIFICANT_ERRORS * self.gain_se

    @property
    def is_presence(self) -> bool:
        """Whether they do, and the lower one is nothing rather than less."""
        return self.is_better and self.absent < NEARER_ABSENT * self.present


@dataclass(frozen=True)
class _Trial:
    """A part, and who has it."""

    mask: torch.Tensor  # (box, box, box) bool
    levels: TwoLevels


def two_levels(found: Quadratic, weights: torch.Tensor) -> TwoLevels:
    """The two levels of one part that fit best, by EM; ``weights`` (n,) of the particles."""
    cross, gram, weight = found.cross[:, 0].double(), found.gram[:, 0, 0].double(), weights.double()
    one = (weight @ cross) / (weight @ gram).clamp(min=1e-30)  # minus the change that a single amplitude wants
    single = 0.5 * one.square() * gram - one * cross
    fits = [_fit(cross, gram, weight, share, free=False) for share in _FIRST_SHARES]
    share, lacks, _, log_likelihood, has = max(fits, key=lambda fit: float(weight @ fit[3]))
    gains = log_likelihood + single
    mean = (weight @ gains) / weight.sum()
    error = ((weight @ (gains - mean).square()) / weight.sum() / len(gains)).sqrt()
    _, _, empty, _, _ = _fit(cross, gram, weight, share, free=True)
    return TwoLevels(share, 1 - lacks, 1 - empty, float(mean), float(error), has.float())


def _fit(
    cross: torch.Tensor, gram: torch.Tensor, weight: torch.Tensor, share: float, free: bool
) -> tuple[float, float, float, torch.Tensor, torch.Tensor]:
    """Share, what is lacking of the amplitude where the part is there and where not, log-likelihoods and probabilities.

    The amplitude of those who lack it is nothing, or ``free``.
    """
    lacks, empty = torch.tensor(1 - 1 / share).double(), torch.tensor(1.0).double()
    present = torch.tensor(share).double()

    def loss(level: torch.Tensor) -> torch.Tensor:
        return level * cross + 0.5 * level.square() * gram

    def best_level(of: torch.Tensor) -> torch.Tensor:
        return -(of @ cross) / (of @ gram).clamp(min=1e-30)

    for _ in range(EM_STEPS):
        joint = torch.stack([present.log() - loss(lacks), torch.log1p(-present) - loss(empty)])
        log_likelihood = torch.logsumexp(joint, 0)
        has = (joint[0] - log_likelihood).exp()
        present = ((weight @ has) / weight.sum()).clamp(LEAST_SHARE, 1 - LEAST_SHARE)
        lacks = best_level(weight * has)
        if free:
            empty = best_level(weight * (1 - has))
    return float(present), float(lacks), float(empty), log_likelihood, has


@torch.no_grad()
def find_parts(setup: Setup, state: State) -> None:
    """Give the map the parts that the settings ask for, or those that look as if some particles lacked them.

    Whether they do is for the particles to say, at the end (``confirm_parts``).
    """
    wanted = setup.settings.occupancy
    if not isinstance(wanted, str):
        masks = segment_masks(setup, wanted)
        trials = [_Trial(*both) for both in zip(masks, _try_parts(setup, state, masks), strict=True)]
        state.occupancy.segments = list(wanted)
    else:
        trials = _search(setup, state)
    if not trials:
        return
    labels = torch.zeros_like(state.occupancy.labels)
    values = state.canonical.values.clone()
    for number, trial in enumerate(trials, 1):
        own = trial.mask & (labels == 0)
        labels[own] = number
        # what some lack is weaker in the map of all: a head start
        values[own.flatten()[setup.operator.voxels.index]] *= max(trial.levels.present, 1.0)
    state.canonical.values = values
    state.occupancy.take(labels, torch.tensor([trial.levels.share for trial in trials], device=setup.device))


def _search(setup: Setup, state: State) -> list[_Trial]:
    """Parts that some particles seem to lack, the clearest first."""
    forces = amplitude_forces(setup, state, _amplitudes(setup))
    components, edge = setup.ranks.from_first(lambda: leading_components(forces))
    leading = " ".join(f"{one.eigenvalue:.2f}" for one in components[:8])
    logger.info("amplitudes of the density: eigenvalues %s above the noise edge of %.2f", leading or "none", edge)
    found: list[_Trial] = []
    taken = torch.zeros(state.occupancy.labels.shape, dtype=torch.bool, device=setup.device)
    scores = [component.score for component in components[:MOST_COMPONENTS]]
    for first in _cut_and_try(setup, state, scores, taken) if scores else []:
        trial: _Trial | None = first
        for _ in range(CUTS - 1):
            if trial is None or not trial.levels.is_better:
                break
            has = trial.levels.probability
            again = _cut_and_try(setup, state, [(has - has.mean()) / has.std().clamp(min=1e-6)], taken)
            trial = again[0] if again else None
        if trial is not None and trial.levels.is_presence and len(found) < MOST_PARTS:
            found.append(trial)
            taken |= trial.mask
    return found


def _amplitudes(setup: Setup) -> torch.Tensor:
    """(m, nvox) smooth changes of the density's amplitude."""
    num = int(np.clip(len(searched_rows(setup)) // ROWS_PER_FIELD, 10, MOST_FIELDS))
    share, voxels = setup.density_share.cpu().numpy().astype(np.float64), setup.operator.voxels
    at_vertices = setup.ranks.from_first(lambda: amplitude_fields(setup.mesh, share, num))
    fields = torch.as_tensor(at_vertices, device=setup.device)
    corners = voxels.cells.long()[voxels.cell.long()]
    factors = torch.stack([fields[corners[:, k]] * voxels.bary[:, k, None] for k in range(4)]).sum(0)
    return (factors / factors.std(0)).T.contiguous()


def _cut_and_try(setup: Setup, state: State, scores: Sequence[torch.Tensor], taken: torch.Tensor) -> list[_Trial]:
    """The parts that go with ``scores``, each (n,) of the searched rows, and who has them.

    Where a change is spread over the molecule, or its part is ``taken`` already, there is none.
    """
    density = state.canonical.volume()
    inside = scatter_volume(state.canonical.mask_values, setup.operator.voxels).cpu().numpy() > 0.5
    masks = []
    for change in component_maps(setup, state, torch.stack(list(scores))):
        cut = cut_part(change, density, inside, setup.source.pixel_size_A)
        mask = None if cut is None else torch.as_tensor(cut, device=setup.device) & ~taken
        if cut is not None and mask is not None and 2 * int(mask.sum()) > int(cut.sum()):
            masks.append(mask)
    if not masks:
        return []
    trials = [_Trial(*both) for both in zip(masks, _try_parts(setup, state, masks), strict=True)]
    for trial in trials:
        held, levels = density[trial.mask.cpu().numpy()].clip(0).sum() / density.clip(0).sum(), trial.levels
        logger.info(
            "a part of %.1f %% of the mass: there in %.0f %% of the particles, level %.2f elsewhere and %.2f there, "
            "gain %.3f +- %.3f nats",
            *(100 * held, 100 * levels.share, levels.absent, levels.present, levels.gain, levels.gain_se),
        )
    return trials


def _try_parts(setup: Setup, state: State, masks: Sequence[torch.Tensor]) -> list[TwoLevels]:
    """How the searched rows fall into some that have a part (box, box, box) bool and some that lack it, for each."""
    rows, share = searched_rows(setup), torch.full((len(masks),), 0.5, device=setup.device)
    model = replace(state.moving_map(setup.operator, None), parts=Parts.of_masks(masks, share, setup.operator))
    found, weights = part_quadratics(setup, model, state, rows), state.junk.probability(setup.rows_on_device(rows))
    return [two_levels(found.of_part(number), weights) for number in range(len(masks))]


def segment_masks(setup: Setup, wanted: tuple[int, ...]) -> list[torch.Tensor]:
    """(box, box, box) bool of each wanted segment of the mesh, within the map's voxels.

    Raises
    ------
    InputError
        There is no such segment, or it holds no voxel; or there are more than ``MOST_PARTS``.
    """
    if len(wanted) > MOST_PARTS:
        raise InputError(f"train.occupancy: {len(wanted)} segments, but no more than {MOST_PARTS} can be told apart")
    voxels, box = setup.operator.voxels, setup.source.box
    on_grid = setup.mesh.segments_on_grid(box, setup.source.pixel_size_A)
    if on_grid is None:
        of_voxels = torch.as_tensor(setup.mesh.segment, device=setup.device)[voxels.cell.long()]
    else:
        of_voxels = torch.as_tensor(on_grid.astype(np.int64), device=setup.device).flatten()[voxels.index]
    known = sorted(of_voxels.unique().tolist())
    masks = []
    for segment in wanted:
        if segment not in known:
            has = ", ".join(map(str, known))
            raise InputError(f"train.occupancy: the mesh has no segment {segment}; its segments are {has}")
        if len(known) == 1:
            raise InputError(f"train.occupancy: segment {segment} is all of the molecule; nothing would be left")
        mask = torch.zeros(box**3, dtype=torch.bool, device=setup.device)
        mask[voxels.index[of_voxels == segment]] = True
        masks.append(mask.view(box, box, box))
    return masks
