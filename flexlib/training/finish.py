"""The end of a run: every particle's latents with the finished model, axes of motion, and the final score."""

from __future__ import annotations

import logging

import numpy as np
import torch

from flexlib.latents import infer_everywhere, infer_latents
from flexlib.particles.images import plane_weight, read_ahead, split_batches
from flexlib.projection.op import gather_volume, scatter_volume
from flexlib.training.epoch import hold_gauge, score_now, standardise, valley_search
from flexlib.training.motion import slope_A
from flexlib.training.start import standard_scale
from flexlib.training.state import BAND_EPOCHS, Setup, State
from flexlib.validation import HeldOutScore

logger = logging.getLogger(__name__)

SIGNIFICANT = 3.0  # standard errors of held-out gain below which no motion is claimed
LEAST_GAIN_NATS = 0.5  # nor below this: of 150 held-out rigid particles it has come out as 0.25 +- 0.08
FINAL_STEPS = 4  # of Levenberg-Marquardt, with the finished flow and map


@torch.no_grad()
def infer_all(setup: Setup, state: State) -> torch.Tensor:
    """Infer every particle's latents with the final model and turn them to axes of decreasing motion.

    Returns the posterior precision (n, K, K) in the final coordinates.
    """
    dims, device = setup.settings.latent_dims, setup.device
    weight = plane_weight(setup.source.box, setup.band(BAND_EPOCHS)).to(device)
    precision = torch.zeros((len(setup.source), dims, dims), device=device)
    if not setup.settings.freeze_latents:
        state.latents[torch.as_tensor(setup.validation_rows, device=device)] = state.held_latents
    num, mine = len(setup.source), setup.group.part(len(setup.source))
    own_batches = split_batches(np.arange(num)[mine], setup.batch_size)
    search = None if setup.settings.freeze_latents else valley_search(setup, state)
    flow, mean_A = state.flow.assembled(), torch.zeros_like(setup.operator.vertices_A)
    for batch in read_ahead(setup.source, own_batches, device):
        rows = torch.as_tensor(batch.rows, device=device)
        model = (setup.operator, flow, state.canonical.values, batch, weight, state.latents[rows])
        if search is None:
            posterior = infer_latents(*model, 0, setup.prior)
        else:
            posterior = infer_everywhere(*model, FINAL_STEPS, search, setup.prior)
        state.latents[rows], precision[rows] = posterior.latents, posterior.precision
        state.information[rows] = posterior.precision - setup.prior.curvature(posterior.latents)
        mean_A += flow(posterior.latents).sum(0) / len(setup.source)
    setup.group.add(mean_A)
    for rows_of_all in (state.latents, precision, state.information):
        rows_of_all.copy_(setup.group.gather(rows_of_all[mine], num))
    hold_gauge(setup, state, mean_A, 1.0)
    if state.given_latents is not None:
        scale, offset = standard_scale(state.given_latents)[1]
        state.flow.rescale_latents(torch.diag(1 / scale), -offset / scale)
        state.latents = state.given_latents
        state.held_latents = state.latents[torch.as_tensor(setup.validation_rows, device=device)]
        return precision / (scale[:, None] * scale)
    if setup.settings.freeze_latents:
        return precision
    offset, scale = standardise(setup, state)
    turn = _axes_of_motion(setup, state)
    state.flow.rescale_latents(turn, torch.zeros(dims, device=device))
    state.latents, state.held_latents = state.latents @ turn, state.held_latents @ turn
    back = scale @ turn
    return back.T @ precision @ back


def final_score(setup: Setup, state: State) -> tuple[HeldOutScore, HeldOutScore | None]:
    """The held-out score of the finished model. Where it confirms no motion the model is set to rest.

    Its gain over the rigid model is then zero, for it is the rigid model; the score that did not convince comes second.
    """
    score = score_now(setup, state, steps=3, search=True)
    if not score.gain < max(SIGNIFICANT * score.standard_error, LEAST_GAIN_NATS):
        return score, None
    logger.warning(
        "held-out gain %.2f +- %.2f nats: the particles kept out of training confirm no motion, so the flow is set "
        "to zero; latents are noise",
        score.gain,
        score.standard_error,
    )
    state.flow.stand_still()
    rigid_map = scatter_volume(state.rigid_values, setup.rigid.voxels)
    state.canonical.values = gather_volume(rigid_map, setup.operator.voxels)
    return HeldOutScore(np.zeros_like(score.gains), score.latents), score


@torch.no_grad()
def _axes_of_motion(setup: Setup, state: State, probe: float = 0.1) -> torch.Tensor:
    """(K, K) rotation of latent space to axes of decreasing rms displacement; ``old = turn @ new``."""
    dims = setup.settings.latent_dims
    used = state.latents[torch.as_tensor(setup.training_rows[:300], device=setup.device)]
    slope = torch.stack([slope_A(setup, state, used, axis, probe).flatten() for axis in range(dims)])
    _, axes = torch.linalg.eigh((slope @ slope.T).double())
    axes = axes.flip(1)
    largest = axes.abs().argmax(0)
    return (axes * torch.sign(axes[largest, torch.arange(dims)])).float()
