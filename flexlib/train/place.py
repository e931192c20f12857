"""The other half-set's particles, seen by the model of one: their latents and views, and how well it predicts them."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import torch

from flexlib.images.batch import read_ahead, split_batches
from flexlib.train.epoch import score_now
from flexlib.train.finish import UNSEEN_STEPS, Inferred, infer_rows, view_std_errs
from flexlib.train.junk import Junk
from flexlib.train.latents import friedel_halves, latent_precision
from flexlib.train.local_minima import search_centres
from flexlib.train.modes import best_centre
from flexlib.train.rows import HalfSet
from flexlib.train.score import HeldOutScore, choose_held_out
from flexlib.train.setup import Setup
from flexlib.train.state import State
from flexlib.train.views import Views

logger = logging.getLogger(__name__)

MOST_CROSS = 500  # particles that are scored


@torch.no_grad()
def place_all(setup: Setup, state: State, found: Inferred) -> tuple[Setup, State, Inferred, HeldOutScore]:
    """Place the particles that a half-set's training has not seen, in the model that it ended with.

    Parameters
    ----------
    setup, state, found
        Of the half-set, at the end of its training.

    Returns
    -------
    setup, state, found
        Of all particles; flow, map, widths and frame are those of the half-set.
    cross
        The score of some of the other particles: all that is looked for is looked for in half their Fourier pixels.
    """
    half = setup.half
    assert half is not None
    whole = replace(
        setup,
        source=half.all_images,
        training_rows=half.rows[setup.training_rows],
        validation_rows=half.rows[setup.validation_rows],
    )
    state = _with_room_for_all(whole, half, state)
    cross = _cross_score(whole, half, state)
    logger.info(
        "%d particles of the other half-set: held-out gain %.2f +- %.2f nats",
        len(cross.gains), cross.gain, cross.standard_error,
    )  # fmt: skip
    precision, num_modes = infer_rows(whole, state, half.other_rows, unseen=True)
    other = Inferred(
        latent_precision(precision, setup.settings.latent_dims), view_std_errs(state, precision), num_modes
    )
    logger.info("%d rows of the other half-set placed", len(half.other_rows))
    joined = [
        _joined(half, own, others)
        for own, others in (
            (found.latent_precision, other.latent_precision),
            (found.view_std_err, other.view_std_err),
            (found.num_modes, other.num_modes),
        )
    ]
    return whole, state, Inferred(*joined), cross


def _joined(half: HalfSet, own: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """(n, ...) of all rows from those of both half-sets."""
    whole = own.new_zeros((len(half.all_images), *own.shape[1:]))
    whole[torch.as_tensor(half.rows, device=own.device)] = own
    whole[torch.as_tensor(half.other_rows, device=own.device)] = others
    return whole


def _with_room_for_all(whole: Setup, half: HalfSet, state: State) -> State:
    """The state with rows for all particles: the new ones at zero latents, and in the input's views."""

    def spread(own: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        return _joined(half, own, own.new_full((len(half.other_rows), *own.shape[1:]), fill))

    def all_views(views: Views) -> Views:
        return Views(spread(views.units), views.held, views.prior)

    junk = replace(state.junk, advantage=spread(state.junk.advantage, float(Junk.none(1, whole.device).advantage)))
    return replace(
        state,
        latents=spread(state.latents),
        views=all_views(state.views),
        information=spread(state.information),
        held_rows=whole.rows_on_device(whole.validation_rows),
        rigid_views=all_views(state.rigid_views),
        junk=junk,
        given_latents=None,
    )


def _cross_score(whole: Setup, half: HalfSet, state: State) -> HeldOutScore:
    """The score of at most ``MOST_CROSS`` of the other particles, the same ones for all models of a half-set."""
    images = whole.source.particles.image_index[half.other_rows]
    fraction = min(1.0, MOST_CROSS / len(np.unique(images)))
    rows = half.other_rows[choose_held_out(images, fraction).held_out]
    scored, at_rows, dims = replace(whole, validation_rows=rows), whole.rows_on_device(rows), state.latents.shape[1]
    if state.flow.stands_still:  # then it is the rigid model
        _, first = np.unique(whole.source.particles.image_index[rows], return_index=True)
        nothing = np.zeros(len(first))
        return HeldOutScore(nothing, rows[first], state.parameters(at_rows), state.rigid_views.units[at_rows])
    start = _start_of(scored, state)
    looked_at = replace(
        state,
        held_rows=at_rows,
        held_latents=start[:, :dims],
        views=replace(state.views, held=start[:, dims:]),
        rigid_views=replace(state.rigid_views, held=state.rigid_views.units[at_rows]),
    )
    return score_now(scored, looked_at, steps=UNSEEN_STEPS, search=True, final=True)


def _start_of(scored: Setup, state: State) -> torch.Tensor:
    """(v, P) where the inference of the scored rows starts, by the half of their Fourier pixels that it looks at."""
    rows, ranks, prior = scored.validation_rows, scored.ranks, scored.prior(state.views.num)
    seen = scored.weight(scored.schedule.full_band)
    seen = seen * friedel_halves(scored.source.box, scored.held_out().seed)[0].to(seen)
    model, centres = state.moving_map(scored.operator, scored.coarse), search_centres(scored, state)
    found = [state.parameters(scored.rows_on_device(rows[:0]))]
    for batch in read_ahead(scored.source, split_batches(ranks.share(rows), scored.pass_size), scored.device):
        current = state.parameters(scored.rows_on_device(batch.rows))
        found.append(best_centre(model, batch, seen, current, centres, prior))
    return ranks.gather(torch.cat(found), len(rows))
