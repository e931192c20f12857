"""The held-out score: what motion is worth on particles that neither the flow nor the map has seen.

For each held-out particle the latents are inferred from a random half of its Fourier pixels (Friedel mates together);
the other half is scored, minus the best score of what knows nothing of this particle's motion: nats per particle.
Over-fitting cannot raise it, and since all sweep points with one seed hold out the same particles, their scores can be
compared particle by particle. Symmetry copies of a particle show one image: their mean is the particle's score.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from flexlib.distributed import ALONE, Ranks
from flexlib.images.batch import ImageSource, read_ahead, split_batches
from flexlib.imaging.image_transforms import plane_weight
from flexlib.model.forward import MovingMap, Operator, log_likelihood_loss
from flexlib.train.latents import LatentPrior, friedel_halves, infer_everywhere, infer_latents

MOST_HELD_OUT = 2000  # particles: enough for a standard error of a few hundredths of a nat


@dataclass(frozen=True)
class HeldOut:
    """The held-out rows, and how their latents are inferred."""

    source: ImageSource
    rows: np.ndarray  # (v,) of the source
    particle: np.ndarray  # (v,) which image each row shows: symmetry copies share theirs
    band: float  # highest shell that is looked at
    seed: int  # of the halves of Fourier pixels
    prior: LatentPrior
    batch_size: int
    ranks: Ranks = ALONE


@dataclass(frozen=True)
class RigidModel:
    """A map that does not move."""

    operator: Operator
    values: torch.Tensor  # (nvox,)


@dataclass(frozen=True)
class HeldOutScore:
    """Held-out gain of the flexible model over the rigid one."""

    gains: np.ndarray  # (p,) nats, one a particle
    rows: np.ndarray  # (p,) first row of each particle
    latents: torch.Tensor  # (v, K) of all held-out rows, inferred from half of the Fourier pixels

    @property
    def gain(self) -> float:
        """Mean gain in nats per particle; nan where nothing was held out."""
        return float(self.gains.mean()) if len(self.gains) else math.nan

    @property
    def standard_error(self) -> float:
        """Of ``gain``, over particles."""
        return float(self.gains.std(ddof=1) / math.sqrt(len(self.gains))) if len(self.gains) > 1 else math.nan


def choose_held_out(image_index: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows (ascending) to train on and rows to hold out: a random ``fraction`` of the images, 2,000 at most.

    Parameters
    ----------
    image_index
        (n,) image of each row: the symmetry copies of a particle go the same way.
    fraction
        Of the images.
    seed
        Of the choice.
    """
    images, owner = np.unique(image_index, return_inverse=True)
    order = np.random.default_rng((seed, 1)).permutation(len(images))
    held = np.zeros(len(images), bool)
    held[order[: min(round(fraction * len(images)), MOST_HELD_OUT)]] = True
    return np.flatnonzero(~held[owner]), np.flatnonzero(held[owner])


@torch.no_grad()
def score_held_out(
    held_out: HeldOut,
    model: MovingMap,
    rigid: RigidModel,
    start: torch.Tensor,
    *,
    steps: int,
    centres: torch.Tensor | None = None,
) -> HeldOutScore:
    """Score the held-out particles, their latents inferred from ``start``.

    What knows nothing of a particle's motion has the best of four: the rigid map; the flexible model's at rest; that
    moved to the mean latents; and that moved to the latents of another particle. The last is needed because a flow
    that moves every particle somewhere regularises its map: on particles without motion it scored 0.2 nats better than
    the rigid map, with anybody's latents. With several ranks each scores its share.

    Parameters
    ----------
    held_out
        The particles.
    model, rigid
        The flexible and the rigid model.
    start
        (v, K) latents.
    steps
        Of inference; with 0, and without ``centres``, latents stay as they are.
    centres
        (m, K) from which other local minima are looked for; None for none.
    """
    ranks, device = held_out.ranks, model.values.device
    weight = plane_weight(held_out.source.box, held_out.band).to(device)
    seen, unseen = (weight * half.to(device) for half in friedel_halves(held_out.source.box, held_out.seed))
    gains, inferred = [torch.zeros((4, 0), dtype=torch.float64)], [start[:0]]
    copies = int(np.unique(held_out.particle, return_counts=True)[1].max(initial=1))  # of a particle, one after another
    own_start, others = ranks.share(start), ranks.share(start.roll(copies, 0))
    first = 0
    own_batches = split_batches(ranks.share(held_out.rows), held_out.batch_size)
    for batch in read_ahead(held_out.source, own_batches, device):
        latents, another = (z[first : first + len(batch.rows)] for z in (own_start, others))
        first += len(batch.rows)
        if centres is not None:
            latents = infer_everywhere(model, batch, seen, latents, steps, centres, held_out.prior).latents
        elif steps:
            latents = infer_latents(model, batch, seen, latents, steps, held_out.prior).latents
        inferred.append(latents)
        moved = model.loss(batch, unseen, latents)
        still = log_likelihood_loss(rigid.operator, rigid.values, batch, None, unseen)
        at_rest = log_likelihood_loss(model.operator, model.values, batch, None, unseen)
        at_mean = model.loss(batch, unseen, start.mean(0).expand_as(latents))
        exchanged = model.loss(batch, unseen, another)
        gains.append((torch.stack([still, at_rest, at_mean, exchanged]) - moved).double().cpu())
    num = len(held_out.rows)
    of_rows = ranks.gather(torch.cat(gains, dim=1).T, num).numpy()
    of_particles, rows = mean_by_particle(of_rows, held_out.particle, held_out.rows)
    worst = int(of_particles.mean(0).argmin()) if len(rows) else 0
    return HeldOutScore(np.ascontiguousarray(of_particles[:, worst]), rows, ranks.gather(torch.cat(inferred), num))


def mean_by_particle(values: np.ndarray, particle: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the rows of each particle.

    Parameters
    ----------
    values : (v, c)
    particle, rows : (v,)
        Which particle each is of, and its row.

    Returns
    -------
    means : (p, c)
    first_rows : (p,)
        Of each particle, ascending where ``rows`` is.
    """
    _, first, owner, count = np.unique(particle, return_index=True, return_inverse=True, return_counts=True)
    sums = np.zeros((len(first), values.shape[1]))
    np.add.at(sums, owner, values)
    return sums / count[:, None], rows[first]
