"""Who has the parts that particles may lack: posterior probabilities, and the shares that are learnt from them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from flexlib.images.batch import read_ahead, split_batches
from flexlib.model.moving_map import MovingMap
from flexlib.model.occupancy import Quadratic, absent_states, log_prior
from flexlib.train.setup import Setup
from flexlib.train.state import State

LEARNT_ROWS = 4000  # that shares are learnt from between epochs
EM_STEPS, CONVERGED = 200, 1e-6
LEAST_SHARE = 0.01  # of the particles, that have a part or lack it: no share leaves this range


@torch.no_grad()
def part_quadratics(setup: Setup, model: MovingMap, state: State, rows: np.ndarray) -> Quadratic:
    """How the loss of each of ``rows`` (n,) depends on the parts, at the latents and views that they have.

    ``model`` has the parts; all shells in use count, and every rank gets all rows.
    """
    weight, found = setup.weight(setup.schedule.full_band), []
    own_batches = split_batches(setup.ranks.share(rows), setup.pass_size)
    for batch in read_ahead(setup.source, own_batches, setup.device):
        found.append(model.quadratic(batch, weight, state.parameters(setup.rows_on_device(batch.rows))))
    pairs = zip(*(one.parts() for one in found), strict=True)
    return Quadratic(*(setup.ranks.gather(torch.cat(own), len(rows)) for own in pairs))


def learnt_share(found: Quadratic, weights: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """(S,) shares of the particles that have each part, by EM from ``share``; ``weights`` (n,) of the particles."""
    losses, absent = found.losses().double(), absent_states(len(share), share.device).double()
    present = share.double()
    for _ in range(EM_STEPS):
        state = torch.softmax(log_prior(present) - losses, 1)
        before = present
        has = 1 - (weights.double() @ state / weights.double().sum()) @ absent
        present = has.clamp(LEAST_SHARE, 1 - LEAST_SHARE)
        if (present - before).abs().max() < CONVERGED:
            break
    return present.to(share)


@torch.no_grad()
def learn_shares(setup: Setup, state: State) -> None:
    """Learn the shares from some training rows, with the model as it stands."""
    if not len(state.occupancy):
        return
    chosen = setup.training_rows[:: -(-len(setup.training_rows) // LEARNT_ROWS)]
    model = state.moving_map(setup.operator, None)
    found = part_quadratics(setup, model, state, chosen)
    weights = state.junk.probability(setup.rows_on_device(chosen))
    state.occupancy.take(state.occupancy.labels, learnt_share(found, weights, state.occupancy.share))


@dataclass(frozen=True)
class Presence:
    """Who has which part, with the finished model."""

    probability: torch.Tensor  # (n, S) that each row has each part, at its posterior mean of latents and view
    share_se: torch.Tensor  # (S,) standard error of the shares


@torch.no_grad()
def presence(setup: Setup, state: State) -> Presence:
    """The presence of the parts in all rows; shares are learnt once more, from all training rows."""
    model = state.moving_map(setup.operator, None)
    found = part_quadratics(setup, model, state, np.arange(len(setup.source)))
    rows = setup.rows_on_device(setup.training_rows)
    weights = state.junk.probability(rows)
    share = learnt_share(found.of(rows), weights, state.occupancy.share)
    state.occupancy.take(state.occupancy.labels, share)
    parts = state.occupancy.on(setup.operator, None)
    assert parts is not None
    probability = found.present(parts.log_prior)
    # the observed information on a share: the sum of its squared scores
    score = (probability[rows] - share) / (share * (1 - share))
    return Presence(probability, (weights[:, None] * score.square()).sum(0).rsqrt())
