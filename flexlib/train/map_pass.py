"""A pass over particles in which the map alone moves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from flexlib.images.batch import ImageBatch, read_ahead, split_batches
from flexlib.model.forward import Operator, log_likelihood_loss
from flexlib.train.canonical import CanonicalMap
from flexlib.train.setup import Setup

MOST_STEP = 0.3  # of a Newton step in one mini-batch

Displacements = Callable[[np.ndarray], torch.Tensor]
"""rows (b,) -> (b, nv, 3) displacements in Angstrom."""


def map_pass(
    setup: Setup,
    canonical: CanonicalMap,
    operator: Operator,
    order: np.ndarray,
    rate: float,
    displacements_A: Displacements | None = None,
    seen: Callable[[ImageBatch], ImageBatch] | None = None,
) -> float:
    """Improve a map by one pass over the rows ``order`` (n,), in mini-batches.

    Parameters
    ----------
    setup
        The run.
    canonical
        The map, changed in place.
    operator
        That projects it.
    order
        (n,) rows, in the order in which they are looked at.
    rate
        Newton steps in one mini-batch; ``MOST_STEP`` at most.
    displacements_A
        How each row's mesh is moved; None for at rest.
    seen
        Gives a batch its poses and contrasts; None leaves the input's.

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
        with torch.no_grad():
            moved_A = None if displacements_A is None else displacements_A(batch.rows)
            if seen is not None:
                batch = seen(batch)
        values = canonical.values.clone().requires_grad_()
        with torch.enable_grad():
            loss = log_likelihood_loss(operator, values, batch, moved_A, weight).sum()
            (gradient,) = torch.autograd.grad(loss, values)
        setup.ranks.add(gradient, loss)
        total += loss.detach()
        canonical.step(gradient, len(rows) / len(order), min(rate, MOST_STEP), band)
    return float(total)
