"""A pass over particles in which the map alone moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from flexlib.images.batch import read_ahead, split_batches
from flexlib.model.moving_map import MovingMap
from flexlib.train.canonical import CanonicalMap
from flexlib.train.junk import noise_loss
from flexlib.train.setup import Setup

MOST_STEP = 0.3  # of a Newton step in one mini-batch

Parameters = Callable[[np.ndarray], torch.Tensor]
"""rows (b,) -> (b, P) parameters of a ``MovingMap``."""


def map_pass(
    setup: Setup,
    canonical: CanonicalMap,
    model: MovingMap,
    order: np.ndarray,
    rate: float,
    probability: torch.Tensor,
    parameters: Parameters | None = None,
) -> tuple[float, torch.Tensor]:
    """Improve a map by one pass over the rows ``order`` (n,), in mini-batches.

    Parameters
    ----------
    setup
        The run.
    canonical
        The map, changed in place.
    model
        That predicts images from it: its flow, views and parts; its own values are not looked at.
    order
        (m,) rows, in the order in which they are looked at.
    rate
        Newton steps in one mini-batch; ``MOST_STEP`` at most.
    probability
        (n,) of all rows, that they are particles: each counts as much.
    parameters
        Of the rows; None for a map at rest in the input's poses.

    Returns
    -------
    loss
        In nats, summed over the rows, each before its mini-batch's step.
    advantage
        (m,) nats by which each row's loss is lower than that of noise alone.
    """
    band = setup.schedule.full_band
    weight, total = setup.weight(band), torch.zeros((), dtype=torch.float64, device=setup.device)
    batches = split_batches(order, setup.batch_size)
    shares = [setup.ranks.share(rows) for rows in batches]
    advantages = []
    for rows, batch in zip(batches, read_ahead(setup.source, shares, setup.device), strict=True):
        moved_A, seen = None, batch
        if parameters is not None:
            with torch.no_grad():
                own = parameters(batch.rows)
                moved_A, seen = model.displacements_A(own), model.seen(batch, own)
        values = canonical.values.clone().requires_grad_()
        with torch.enable_grad():
            loss = replace(model, values=values).loss_at(seen, moved_A, weight)
            weighted = loss * probability[setup.rows_on_device(batch.rows)]
            (gradient,) = torch.autograd.grad(weighted.sum(), values)
        loss = loss.detach()
        advantage, summed = setup.ranks.embed(noise_loss(batch, weight) - loss, len(rows)), loss.sum()
        setup.ranks.add(gradient, summed, advantage)
        total += summed
        advantages.append(advantage)
        canonical.step(gradient, len(rows) / len(order), min(rate, MOST_STEP), band)
    return float(total), torch.cat(advantages)
