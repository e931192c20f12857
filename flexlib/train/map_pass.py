"""A pass over particles in which the map alone moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from flexlib.images.batch import read_ahead, split_batches
from flexlib.model.moving_map import MovingMap
from flexlib.train.canonical import CanonicalMap
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
    parameters: Parameters | None = None,
) -> float:
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
        (n,) rows, in the order in which they are looked at.
    rate
        Newton steps in one mini-batch; ``MOST_STEP`` at most.
    parameters
        Of the rows; None for a map at rest in the input's poses.

    Returns
    -------
    loss
        In nats, summed over the rows, each before its mini-batch's step.
    """
    band = setup.schedule.full_band
    weight, total = setup.weight(band), torch.zeros((), dtype=torch.float64, device=setup.device)
    batches = split_batches(order, setup.batch_size)
    shares = [setup.ranks.share(rows) for rows in batches]
    for rows, batch in zip(batches, read_ahead(setup.source, shares, setup.device), strict=True):
        moved_A = None
        if parameters is not None:
            with torch.no_grad():
                own = parameters(batch.rows)
                moved_A, batch = model.displacements_A(own), model.seen(batch, own)
        values = canonical.values.clone().requires_grad_()
        with torch.enable_grad():
            loss = replace(model, values=values).loss_at(batch, moved_A, weight).sum()
            (gradient,) = torch.autograd.grad(loss, values)
        setup.ranks.add(gradient, loss)
        total += loss.detach()
        canonical.step(gradient, len(rows) / len(order), min(rate, MOST_STEP), band)
    return float(total)
