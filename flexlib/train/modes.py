"""The modes of single particles' posteriors: the search for local minima of the objective other than the nearest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from flexlib.images.batch import ImageBatch
from flexlib.model.moving_map import MovingMap
from flexlib.train.latents import UNIT_PRIOR, LatentPrior, Posterior, infer_latents, latent_precision

_MOST_CENTRES = 12  # with more dims, more would only cost: they reach no further
_APART, _APART_NATS = 0.5, 1.0  # latents this far apart are other local minima: latent units, and a parabola's nats
# a centre is worth descending if it is worse than where a particle is by no more than this (it has not been descended
# yet), and by less than this part of what it would be if there were only the one local minimum
_WORTH_TRYING_NATS, _WORTH_TRYING_PART = 30.0, 0.5
_UNDECIDED_NATS = 3.0  # local minima this close in the coarse map are decided in the full one


@torch.no_grad()
def search_latents(
    model: MovingMap,
    batch: ImageBatch,
    weight: torch.Tensor,
    current: torch.Tensor,
    centres: torch.Tensor,
    information: torch.Tensor,
    prior: LatentPrior = UNIT_PRIOR,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Other local minima of the objective, for the particles that have one, in the coarse map if the model has one.

    Each centre is tried for every particle. Where the best one away from ``current`` is not as bad as the local
    minimum of ``current`` would be there, it is descended, and where it leads elsewhere and down, ``current`` too.

    Parameters
    ----------
    model, batch, weight
        As in ``infer_latents``.
    current : (b, P)
    centres : (m, K)
        Latents; the views stay as they are at first, and follow in the descent.
    information : (b, P, P)
        At ``current``; for both descents.
    prior
        Of the parameters.

    Returns
    -------
    found
        (b, P) where those descents end, elsewhere ``current``.
    lower
        (b,) how much lower they lie, in nats (of the coarse map); minus infinity where there is no other local minimum.
    """
    if model.coarse_map is not None:
        information = information / model.information_ratios[0]
        batch, weight, model = model.coarse_map.batch(batch), model.coarse_map.weight(weight), model.coarse
    here = model.loss(batch, weight, current) + prior.energy(current)
    dims = centres.shape[1]
    hessian = latent_precision(information + prior.curvature(current), dims)

    def away(there: torch.Tensor, here: torch.Tensor, of: torch.Tensor | slice) -> torch.Tensor:
        return _apart(hessian[of], there[:, :dims] - here[:, :dims])

    start, best = _best_centre(model, batch, weight, current, centres, prior, hessian)
    lift = _parabola(hessian, start[:, :dims] - current[:, :dims])
    worth_trying = (_WORTH_TRYING_PART * lift).clamp(max=_WORTH_TRYING_NATS)
    rows = torch.nonzero(best < here + worth_trying)[:, 0]
    found, lower = current.clone(), torch.full_like(here, -torch.inf)
    if not len(rows):
        return found, lower
    there = infer_latents(model, batch.take(rows), weight, start[rows], 4, prior, information[rows])
    other = away(there.latents, current[rows], rows)
    kept = torch.nonzero(other & (there.objective < here[rows] + _UNDECIDED_NATS))[:, 0]
    rows, there_latents, there_objective = rows[kept], there.latents[kept], there.objective[kept]
    if len(rows):  # only now is it worth descending from where they are
        ends = infer_latents(model, batch.take(rows), weight, current[rows], 4, prior, information[rows])
        other = away(there_latents, ends.latents, rows)
        found[rows] = torch.where(other[:, None], there_latents, current[rows])
        lower[rows] = torch.where(other, ends.objective - there_objective, -torch.inf)
    return found, lower


@torch.no_grad()
def best_centre(
    model: MovingMap,
    batch: ImageBatch,
    weight: torch.Tensor,
    current: torch.Tensor,
    centres: torch.Tensor,
    prior: LatentPrior = UNIT_PRIOR,
) -> torch.Tensor:
    """(b, P) parameters at whichever of ``current`` and the centres is best: where to start a particle not yet seen.

    Parameters as in ``search_latents``.
    """
    if model.coarse_map is not None:
        batch, weight, model = model.coarse_map.batch(batch), model.coarse_map.weight(weight), model.coarse
    here = model.loss(batch, weight, current) + prior.energy(current)
    start, best = _best_centre(model, batch, weight, current, centres, prior)
    return torch.where((best < here)[:, None], start, current)


def _best_centre(
    model: MovingMap,
    batch: ImageBatch,
    weight: torch.Tensor,
    current: torch.Tensor,
    centres: torch.Tensor,
    prior: LatentPrior,
    hessian: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(b, P) parameters at the best centre, views as at ``current``, and (b,) the objective there.

    With ``hessian`` (b, K, K) only centres away from ``current`` count.
    """
    assert model.flow is not None
    dims, start, best = len(centres[0]), current.clone(), torch.full_like(current[:, 0], torch.inf)
    for centre in centres:
        trial = torch.cat([centre.expand(len(current), -1), current[:, dims:]], 1)
        displacements_A = model.flow(centre[None]).expand(len(current), -1, -1)
        loss = model.loss_at(model.seen(batch, trial), displacements_A, weight)
        tried = loss + prior.energy(trial)
        if hessian is not None:
            tried = torch.where(_apart(hessian, centre - current[:, :dims]), tried, torch.inf)
        start = torch.where((tried < best)[:, None], trial, start)
        best = torch.minimum(tried, best)
    return start, best


@dataclass(frozen=True)
class Modes:
    """The modes of b particles' posteriors that have been found: the best of each, and others that may count."""

    best: Posterior
    other_rows: torch.Tensor  # (r,) which of the particles have another
    other: Posterior  # of those

    @classmethod
    def one_each(cls, best: Posterior) -> Modes:
        """No other mode is known."""
        none = torch.zeros(0, dtype=torch.long, device=best.latents.device)
        return cls(best, none, best.of(none))


@torch.no_grad()
def find_modes(
    model: MovingMap,
    batch: ImageBatch,
    weight: torch.Tensor,
    start: torch.Tensor,
    steps: int,
    centres: torch.Tensor,
    prior: LatentPrior = UNIT_PRIOR,
) -> Modes:
    """``infer_latents`` from ``start``, and from any other local minimum that may be as low.

    Parameters as in ``infer_latents`` and ``search_latents``.
    """
    information = model.information(batch, weight, start)
    found, lower = search_latents(model, batch, weight, start, centres, information, prior)
    best = infer_latents(model, batch, weight, start, steps, prior, information)
    rows = torch.nonzero(lower > -_UNDECIDED_NATS)[:, 0]
    if not len(rows):
        return Modes.one_each(best)
    there, here = infer_latents(model, batch.take(rows), weight, found[rows], steps, prior), best.of(rows)
    swap = there.objective < here.objective
    better, worse = there.where(swap, here), here.where(swap, there)
    for of_all, of_rows in zip(best.parts(), better.parts(), strict=True):
        of_all[rows] = of_rows
    dims = centres.shape[1]
    apart = _apart(latent_precision(better.precision, dims), (worse.latents - better.latents)[:, :dims])
    kept = torch.nonzero(apart & (worse.objective < better.objective + _UNDECIDED_NATS))[:, 0]
    return Modes(best, rows[kept], worse.of(kept))


def _parabola(hessian: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """(b,) nats by which an objective of this curvature (b, K, K) rises over a change (b, K) from its minimum."""
    return 0.5 * torch.einsum("bi,bij,bj->b", change, hessian, change)


def _apart(hessian: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """(b,) whether latents that differ by ``change`` (b, K) may be different local minima."""
    return (change.norm(dim=1) > _APART) & (_parabola(hessian, change) > _APART_NATS)


def latent_centres(latents: np.ndarray, seed: int) -> np.ndarray:
    """(m, K) float32 k-means centres of (n, K) latents, about one a standard deviation: for ``search_latents``."""
    from scipy.cluster.vq import kmeans2

    num, dims = latents.shape
    generator = np.random.default_rng(seed)
    sample = latents[generator.choice(num, min(num, 2000), replace=False)].astype(np.float64)
    count = min(_MOST_CENTRES, 6 * dims, len(sample))
    centres, _ = kmeans2(sample, count, minit="++", seed=generator)
    return centres[np.isfinite(centres).all(1)].astype(np.float32)
