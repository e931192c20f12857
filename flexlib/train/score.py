"""The held-out score: what motion is worth on particles that neither the flow nor the map has seen.

For each held-out particle the latents are inferred from a random half of its Fourier pixels (Friedel mates together);
the other half is scored, minus the best score of what knows nothing of this particle's motion: nats per particle.
Over-fitting cannot raise it, and since all points of a sweep with one seed hold out the same particles, their scores
can be compared particle by particle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from flexlib.distributed import ALONE, Group
from flexlib.images.batch import ImageSource, read_ahead, split_batches
from flexlib.imaging.image_transforms import plane_weight
from flexlib.model.forward import MovingMap, Operator, log_likelihood_loss
from flexlib.train.latents import LatentPrior, friedel_halves, infer_everywhere, infer_latents

MOST_HELD_OUT = 2000  # enough for a standard error of a few hundredths of a nat


@dataclass(frozen=True)
class HeldOutScore:
    """Held-out gain of the flexible model over the rigid one."""

    gains: np.ndarray  # (v,) nats, one a particle, in the order of the held-out rows
    latents: torch.Tensor  # (v, K) inferred from half of the Fourier pixels

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

    ``image_index`` (n,) names each row's image: the symmetry copies of a particle go the same way.
    """
    images, owner = np.unique(image_index, return_inverse=True)
    order = np.random.default_rng((seed, 1)).permutation(len(images))
    held = np.zeros(len(images), bool)
    held[order[: min(round(fraction * len(images)), MOST_HELD_OUT)]] = True
    return np.flatnonzero(~held[owner]), np.flatnonzero(held[owner])


@torch.no_grad()
def score_held_out(
    source: ImageSource,
    rows: np.ndarray,
    model: MovingMap,
    rigid: Operator,
    rigid_values: torch.Tensor,
    start: torch.Tensor,
    *,
    band: float,
    seed: int,
    steps: int,
    prior: LatentPrior,
    batch_size: int,
    centres: torch.Tensor | None = None,
    group: Group = ALONE,
) -> HeldOutScore:
    """Score the particles at ``rows`` (v,), their latents inferred from ``start`` (v, K) in ``steps`` steps.

    ``rigid_values`` is the map of the rigid model. What knows nothing of a particle's motion has the
    best of four: the rigid map; the flexible model's at rest; that moved to the mean latents; and that moved to the
    latents of another particle. The last is needed because a flow that moves every particle somewhere regularises
    its map: on particles without motion it scored 0.2 nats better than the rigid map, with anybody's latents.
    With ``centres`` other valleys of their objective are looked for. With several processes each scores its part.
    """
    device = model.values.device
    weight = plane_weight(source.box, band).to(device)
    seen, unseen = (weight * half.to(device) for half in friedel_halves(source.box, seed))
    gains, held = [torch.zeros((4, 0), dtype=torch.float64)], [start[:0]]
    own_start, others = group.share(start), group.share(start.roll(1, 0))
    first = 0
    for batch in read_ahead(source, split_batches(group.share(rows), batch_size), device):
        latents, another = (z[first : first + len(batch.rows)] for z in (own_start, others))
        first += len(batch.rows)
        if centres is not None:
            latents = infer_everywhere(model, batch, seen, latents, steps, centres, prior).latents
        elif steps:
            latents = infer_latents(model, batch, seen, latents, steps, prior).latents
        held.append(latents)
        moved = model.loss(batch, unseen, latents)
        still = log_likelihood_loss(rigid, rigid_values, batch, None, unseen)
        at_rest = log_likelihood_loss(model.operator, model.values, batch, None, unseen)
        at_mean = model.loss(batch, unseen, start.mean(0).expand_as(latents))
        exchanged = model.loss(batch, unseen, another)
        gains.append((torch.stack([still, at_rest, at_mean, exchanged]) - moved).double().cpu())
    both = group.gather(torch.cat(gains, dim=1).T, len(rows)).T
    worse = int(both.mean(1).argmin()) if both.shape[1] else 0
    return HeldOutScore(both[worse].numpy(), group.gather(torch.cat(held), len(rows)))
