"""Particles whose latents sit in the wrong local minimum of their objective."""

from __future__ import annotations

import logging

import torch

from flexlib.images.batch import read_ahead, split_batches
from flexlib.train.modes import latent_centres, search_latents
from flexlib.train.setup import Setup, derived_seed
from flexlib.train.state import State

logger = logging.getLogger(__name__)

CLEARLY_LOWER_NATS = 1.0  # another local minimum of a particle's objective: it moves there


@torch.no_grad()
def leave_wrong_minima(setup: Setup, state: State) -> None:
    """Move the latents of training particles that fit clearly better elsewhere in latent space."""
    if setup.settings.freeze_latents:
        return
    weight = setup.weight(setup.schedule.full_band)
    centres, moved = search_centres(setup, state), torch.zeros(1)
    model = state.moving_map(setup.operator, setup.coarse)
    own_rows, prior = setup.ranks.share(setup.training_rows), setup.prior(state.views.num)
    for batch in read_ahead(setup.source, split_batches(own_rows, setup.pass_size), setup.device):
        rows = setup.rows_on_device(batch.rows)
        found, lower = search_latents(
            model, batch, weight, state.parameters(rows), centres, state.information[rows], prior
        )
        clearly = lower > CLEARLY_LOWER_NATS
        state.set_parameters(rows[clearly], found[clearly])
        moved += clearly.sum().cpu()
    setup.ranks.add(moved)
    own = state.parameters(setup.rows_on_device(own_rows))
    rows = setup.rows_on_device(setup.training_rows)
    state.set_parameters(rows, setup.ranks.gather(own, len(rows)))
    logger.info("%d of %d particles have left a wrong local minimum of their objective", int(moved), len(rows))


def search_centres(setup: Setup, state: State) -> torch.Tensor:
    """(m, K) starts all over the latents' distribution, for the search of other local minima."""
    used = state.latents[state.particles_of(setup.rows_on_device(setup.training_rows))].cpu().numpy()
    centres = latent_centres(used, derived_seed(setup.settings.seed, 8, state.epoch))
    return torch.as_tensor(centres, device=setup.device)
