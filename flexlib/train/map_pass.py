"""A pass over particles in which the map alone moves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from flexlib.images.batch import ImageBatch, read_ahead, split_batches
from flexlib.train.canonical import CanonicalMap
from flexlib.train.junk import noise_loss
from flexlib.train.setup import Setup

MOST_STEP = 0.3  # of a Newton step in one mini-batch

Losses = Callable[[torch.Tensor, ImageBatch, torch.Tensor], torch.Tensor]
"""The map's values (nvox,), a batch and the weight of its Fourier pixels -> (b,) nats."""


def map_pass(
    setup: Setup, canonical: CanonicalMap, order: np.ndarray, rate: float, losses: Losses, probability: torch.Tensor
) -> tuple[float, torch.Tensor]:
    """Improve a map by one pass over the rows ``order`` (n,), in mini-batches.

    Parameters
    ----------
    setup
        The run.
    canonical
        The map, changed in place.
    order
        (m,) rows, in the order in which they are looked at.
    rate
        Newton steps in one mini-batch; ``MOST_STEP`` at most.
    losses
        What is to be lowered.
    probability
        (n,) of all rows, that they are particles: each counts as much.

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
        values = canonical.values.clone().requires_grad_()
        with torch.enable_grad():
            loss = losses(values, batch, weight)
            weighted = loss * probability[setup.rows_on_device(batch.rows)]
            (gradient,) = torch.autograd.grad(weighted.sum(), values)
        loss = loss.detach()
        advantage, summed = setup.ranks.embed(noise_loss(batch, weight) - loss, len(rows)), loss.sum()
        setup.ranks.add(gradient, summed, advantage)
        total += summed
        advantages.append(advantage)
        canonical.step(gradient, len(rows) / len(order), min(rate, MOST_STEP), band)
    return float(total), torch.cat(advantages)
