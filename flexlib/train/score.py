"""The held-out score: what motion is worth on particles that neither the flow nor the map has seen.

For each held-out particle the latents are inferred from a random half of its Fourier pixels (Friedel mates together);
the other half is scored, minus the best score of what knows nothing of this particle's motion: nats per particle.
Over-fitting cannot raise it, and since all sweep points hold out the same particles, any two can be compared particle
by particle. An image may also be junk: each model says by the seen half how likely that is, and predicts the other as
noise so far. Symmetry copies of a particle show one image: their mean is the particle's score.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from flexlib.distributed import ALONE, Ranks
from flexlib.images.batch import ImageBatch, ImageSource, read_ahead, split_batches
from flexlib.imaging.image_transforms import plane_weight
from flexlib.model.moving_map import MovingMap
from flexlib.train.junk import noise_loss
from flexlib.train.latents import LatentPrior, friedel_halves, infer_latents
from flexlib.train.modes import Modes, find_modes
from flexlib.train.posterior import draw_posterior, laplace_log_evidence

LEAST_HELD_OUT = 2  # images, without which no score has a standard error
MOST_HELD_OUT = 2000  # particles: enough for a standard error of a few hundredths of a nat
FEWEST_MICROGRAPHS = 5  # that are held out whole: the score of fewer would be that of their ice
MOST_OFF = 1.5  # whole micrographs may hold out so many times as wanted, and leave as much less to train on


@dataclass(frozen=True)
class HeldOutChoice:
    """Which rows are held out."""

    training: np.ndarray  # rows to train on, ascending
    held_out: np.ndarray  # the others
    by_micrograph: bool  # whether micrographs were held out whole; else single images


@dataclass(frozen=True)
class HeldOut:
    """The held-out rows, and how their latents are inferred."""

    source: ImageSource
    rows: np.ndarray  # (v,) of the source
    particle: np.ndarray  # (v,) which image each row shows: symmetry copies share theirs
    band: float  # highest shell that is looked at
    seed: int  # of the halves of Fourier pixels
    fixed: int  # of the parameters, the first ones, stay as they are
    prior: LatentPrior  # of latents and views
    particle_log_odds: float  # against junk, before an image is seen; infinite where there is none
    batch_size: int
    ranks: Ranks = ALONE


@dataclass(frozen=True)
class HeldOutScore:
    """Held-out gain of the flexible model over the rigid one."""

    gains: np.ndarray  # (p,) nats, one a particle
    rows: np.ndarray  # (p,) first row of each particle
    parameters: torch.Tensor  # (v, P) of all held-out rows, inferred from half of the Fourier pixels
    rigid_views: torch.Tensor  # (v, V) likewise, under the rigid map

    @property
    def gain(self) -> float:
        """Mean gain in nats per particle; nan where nothing was held out."""
        return float(self.gains.mean()) if len(self.gains) else math.nan

    @property
    def standard_error(self) -> float:
        """Of ``gain``, over particles."""
        return float(self.gains.std(ddof=1) / math.sqrt(len(self.gains))) if len(self.gains) > 1 else math.nan


def choose_held_out(image_index: np.ndarray, fraction: float, micrograph: np.ndarray | None = None) -> HeldOutChoice:
    """A random ``fraction`` of the images, 2 to 2,000, to be held out; the same ones in every training.

    Neighbours share ice and thickness, so whole micrographs are drawn until there are as many images, where they come
    to 5 micrographs or more and not far too many images; else single images are.

    Parameters
    ----------
    image_index
        (n,) image of each row: the symmetry copies of a particle go the same way.
    fraction
        Of the images; with 0, and of fewer than 4 images, none is held out.
    micrograph
        (n,) of each row's image; None where they are not known.
    """
    images, first_row, owner = np.unique(image_index, return_index=True, return_inverse=True)
    enough = fraction > 0 and len(images) >= 2 * LEAST_HELD_OUT
    wanted = min(max(round(fraction * len(images)), LEAST_HELD_OUT), MOST_HELD_OUT) if enough else 0
    held = None if micrograph is None else _draw_micrographs(micrograph[first_row], wanted)
    by_micrograph = held is not None
    if held is None:
        held = np.zeros(len(images), bool)
        held[_random_order(len(images))[:wanted]] = True
    return HeldOutChoice(np.flatnonzero(~held[owner]), np.flatnonzero(held[owner]), by_micrograph)


def _draw_micrographs(micrograph: np.ndarray, wanted: int) -> np.ndarray | None:
    """(images,) bool: those of whole micrographs, at least ``wanted``; None where they are too few or too large.

    ``micrograph`` is (images,).
    """
    _, owner, sizes = np.unique(micrograph, return_inverse=True, return_counts=True)
    order = _random_order(len(sizes))
    reached = np.cumsum(sizes[order])
    last = int(np.searchsorted(reached, wanted))
    count, num = int(reached[last]), len(micrograph)
    too_large = count > MOST_OFF * wanted or num - wanted > MOST_OFF * (num - count)
    if last + 1 < FEWEST_MICROGRAPHS or too_large:
        return None
    return np.isin(owner, order[: last + 1])


def _random_order(count: int) -> np.ndarray:
    """(count,) a permutation, always the same one."""
    return np.random.default_rng((0, 1)).permutation(count)


@dataclass(frozen=True)
class _Candidate:
    """What may predict images: the model, or a rival with latents that are not the particles' own."""

    model: MovingMap
    start: torch.Tensor  # (b, P)
    fixed: int  # of the parameters: its latents


@torch.no_grad()
def score_held_out(
    held_out: HeldOut,
    model: MovingMap,
    rigid: MovingMap,
    start: torch.Tensor,
    rigid_start: torch.Tensor,
    *,
    steps: int,
    centres: torch.Tensor | None = None,
    final: bool = True,
) -> HeldOutScore:
    """Score the held-out particles, their latents and views inferred from ``start``.

    What knows nothing of a particle's motion has the best of four: the rigid map; the flexible model's at rest; that
    moved to the mean latents; and that moved to the latents of another particle. The last is needed because a flow
    that moves every particle somewhere regularises its map: on particles without motion it scored 0.2 nats better than
    the rigid map, with anybody's latents. Where poses and contrasts are refined each of the four refines them as the
    model does, against itself and from the same half of the Fourier pixels: what is left is internal motion. With
    several ranks each scores its share.

    Parameters
    ----------
    held_out
        The particles.
    model, rigid
        The flexible model, and the rigid map.
    start, rigid_start
        (v, P) parameters, and (v, V) views under the rigid map.
    steps
        Of inference; with 0, and without ``centres``, parameters stay as they are.
    centres
        (m, K) from which other local minima are looked for; None for none.
    final
        Whether predictions are averaged over posteriors, and all four are compared with. Else they are those of the
        most likely parameters; and where there are poses of its own to refine, which would cost each of the four as
        much as the flexible model, the rigid map alone is compared with.
    """
    ranks, device = held_out.ranks, model.values.device
    weight = plane_weight(held_out.source.box, held_out.band).to(device)
    seen, unseen = (weight * half.to(device) for half in friedel_halves(held_out.source.box, held_out.seed))
    scoring = _Scoring(seen, unseen, steps, held_out.prior, held_out.particle_log_odds, integrate=final)
    rigid_only = model.views is not None and not final
    gains, inferred, rigid_views = [], [start[:0]], [rigid_start[:0]]
    copies = int(np.unique(held_out.particle, return_counts=True)[1].max(initial=1))  # of a particle, one after another
    own_start, others, own_rigid = (ranks.share(z) for z in (start, start.roll(copies, 0), rigid_start))
    first, mean = 0, start.mean(0, keepdim=True)
    own_batches = split_batches(ranks.share(held_out.rows), held_out.batch_size)
    for batch in read_ahead(held_out.source, own_batches, device):
        parameters, another, still = (z[first : first + len(batch.rows)] for z in (own_start, others, own_rigid))
        first += len(batch.rows)
        parameters, own = scoring.of(_Candidate(model, parameters, held_out.fixed), batch, centres)
        inferred.append(parameters)
        rivals = [_Candidate(rigid, still, 0)]
        if not rigid_only:
            rivals += _motionless(model, parameters, mean.expand_as(another), another)
        found = [scoring.of(rival, batch) for rival in rivals]
        rigid_views.append(found[0][0])
        gains.append((torch.stack([loss for _, loss in found], 1) - own[:, None]).double().cpu())
    gains.append(torch.zeros((0, 1 if rigid_only else 4), dtype=torch.float64))
    return _of_all_ranks(held_out, *(torch.cat(parts) for parts in (gains, inferred, rigid_views)))


@dataclass(frozen=True)
class _Scoring:
    """How a model is scored on images: what it makes of the seen half predicts the other."""

    seen: torch.Tensor  # (box, box//2+1) weights
    unseen: torch.Tensor
    steps: int
    prior: LatentPrior
    particle_log_odds: float
    integrate: bool  # over the posterior; else at the most likely parameters

    def of(
        self, candidate: _Candidate, batch: ImageBatch, centres: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(b, P) most likely parameters by the seen half, and (b,) nats with which the other is predicted."""
        model, start, fixed = candidate.model, candidate.start, candidate.fixed
        free_views = model.views is not None and model.views.has_width
        if centres is None and (self.steps == 0 or (fixed == model.latent_dims(start) and not free_views)):
            evidence = -model.loss(batch, self.seen, start)
            predicted = model.prediction_loss(batch, self.seen, self.unseen, start)
            return start, self._or_junk(batch, evidence, predicted)
        if centres is not None:
            modes = find_modes(model, batch, self.seen, start, self.steps, centres, self.prior)
        else:
            modes = Modes.one_each(infer_latents(model, batch, self.seen, start, self.steps, self.prior, fixed=fixed))
        likely = modes.best.latents
        if not self.integrate:
            evidence = laplace_log_evidence(modes.best, self.prior, fixed)
            predicted = model.prediction_loss(batch, self.seen, self.unseen, likely)
            return likely, self._or_junk(batch, evidence, predicted)
        draws = draw_posterior(model, batch, self.seen, modes, self.prior, fixed)
        losses = [model.prediction_loss(batch, self.seen, self.unseen, one) for one in draws.parameters]
        return likely, self._or_junk(batch, draws.log_evidence, -draws.log_mean_exp(-torch.stack(losses)))

    def _or_junk(self, batch: ImageBatch, log_evidence: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
        """(b,) nats of the unseen halves, ``predicted`` (b,) those of particles, where images may be junk, too.

        ``log_evidence`` (b,) is the seen halves'.
        """
        if math.isinf(self.particle_log_odds):
            return predicted
        particle, noise = self.particle_log_odds + log_evidence, -noise_loss(batch, self.seen)
        both = torch.logaddexp(particle - predicted, noise - noise_loss(batch, self.unseen))
        return torch.logaddexp(particle, noise) - both


def _of_all_ranks(
    held_out: HeldOut, gains: torch.Tensor, parameters: torch.Tensor, rigid_views: torch.Tensor
) -> HeldOutScore:
    """The score from this rank's gains (v, rivals), parameters (v, P) and rigid views (v, V), and the others'."""
    ranks, num = held_out.ranks, len(held_out.rows)
    of_particles, rows = mean_by_particle(ranks.gather(gains, num).numpy(), held_out.particle, held_out.rows)
    worst = int(of_particles.mean(0).argmin()) if len(rows) else 0
    return HeldOutScore(
        gains=np.ascontiguousarray(of_particles[:, worst]),
        rows=rows,
        parameters=ranks.gather(parameters, num),
        rigid_views=ranks.gather(rigid_views, num),
    )


def _motionless(
    model: MovingMap, parameters: torch.Tensor, mean: torch.Tensor, another: torch.Tensor
) -> list[_Candidate]:
    """The model at rest, at the mean latents and at another particle's; all (b, P), views start at the model's."""
    dims = model.latent_dims(parameters)
    at_rest = replace(model, flow=None, views=None if model.views is None else replace(model.views, frame=None))
    views = parameters[:, dims:]
    moved = [_Candidate(model, torch.cat([other[:, :dims], views], 1), dims) for other in (mean, another)]
    return [_Candidate(at_rest, views, 0), *moved]


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
