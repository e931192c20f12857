"""The end of a run: every particle's latents with the finished model, axes of motion, and the final score."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from flexlib.images.batch import read_ahead, split_batches
from flexlib.projection.op import gather_volume, scatter_volume
from flexlib.train.epoch import learn_junk, score_now, standardise
from flexlib.train.initial_latents import standard_scale
from flexlib.train.junk import noise_loss
from flexlib.train.latents import infer_latents, latent_precision
from flexlib.train.learn_views import measure_widths
from flexlib.train.local_minima import search_centres
from flexlib.train.modes import best_centre, find_modes
from flexlib.train.motion import slope_A
from flexlib.train.posterior import draw_posterior, laplace_log_evidence
from flexlib.train.score import HeldOutScore
from flexlib.train.setup import Setup
from flexlib.train.state import State
from flexlib.train.step import with_measured_ratio
from flexlib.workflow_support.scores import confirms_motion

logger = logging.getLogger(__name__)

FINAL_STEPS = 4  # of Levenberg-Marquardt, with the finished flow and map
UNSEEN_STEPS = 12  # at most, for rows that nothing is known of


@dataclass(frozen=True)
class Inferred:
    """How well each particle's latents and view are known."""

    latent_precision: torch.Tensor  # (n, K, K) of the posteriors in the final coordinates, whatever the views are
    view_std_err: torch.Tensor  # (n, 6 or 0) in radians, Angstrom and of the log contrast, whatever the latents are
    num_modes: torch.Tensor  # (n,) 1, or 2 where two local minima of the objective are about as likely


@torch.no_grad()
def infer_all(setup: Setup, state: State) -> Inferred:
    """Infer every particle's latents and view with the final model and turn latents to axes of decreasing motion."""
    frozen, device = setup.settings.freeze_latents, setup.device
    measure_widths(setup, state)
    if not frozen:
        state.set_parameters(setup.rows_on_device(setup.validation_rows), state.held_parameters())
    whole, num_modes = infer_rows(setup, state, np.arange(len(setup.source)))
    if setup.settings.find_junk:
        learn_junk(setup, state)
        state.junk.log_share()
    precision, view_std_err = latent_precision(whole, setup.settings.latent_dims), view_std_errs(state, whole)
    if state.given_latents is not None:
        scale, offset = standard_scale(state.given_latents)[1]
        state.rescale_latents(torch.diag(1 / scale), -offset / scale)
        state.latents = state.given_latents
        state.held_latents = state.latents[setup.rows_on_device(setup.validation_rows)]
        return Inferred(precision / (scale[:, None] * scale), view_std_err, num_modes)
    if frozen:
        return Inferred(precision, view_std_err, num_modes)
    scaled = standardise(setup, state)
    turn = axes_of_motion(setup, state)
    state.rescale_latents(turn, torch.zeros(len(turn), device=device))
    state.latents, state.held_latents = state.latents @ turn, state.held_latents @ turn
    back = turn if scaled is None else scaled.matrix @ turn
    return Inferred(back.T @ precision @ back, view_std_err, num_modes)


def view_std_errs(state: State, precision: torch.Tensor) -> torch.Tensor:
    """(m, 6 or 0) standard errors of some rows' view parameters, from the precision (m, P, P) of all of theirs."""
    prior, num = state.views.prior, state.views.num
    if prior is None:
        return torch.zeros((len(precision), 0), device=precision.device)
    inverse = torch.cat([torch.linalg.inv(some) for some in precision.split(65536)])
    return inverse.diagonal(dim1=1, dim2=2)[:, -num:].clamp(min=0).sqrt() * prior.widths.to(inverse)


def infer_rows(
    setup: Setup, state: State, wanted: np.ndarray, *, unseen: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Infer the parameters of some rows with flow and map as they are; ``unseen`` ones start wherever it is best.

    Returns (m, P, P) precision and (m,) modes of the rows ``wanted`` (m,). ``state`` takes over parameters, information
    and what the images say for particles.
    """
    device, prior = setup.device, setup.prior(state.views.num)
    fixed = setup.settings.latent_dims if setup.settings.freeze_latents else 0
    weight = setup.weight(setup.schedule.full_band)
    precision, num_modes = torch.zeros_like(state.information), torch.ones_like(state.junk.advantage, dtype=torch.long)
    own_rows, steps = setup.ranks.share(wanted), UNSEEN_STEPS if unseen else FINAL_STEPS
    centres = None if setup.settings.freeze_latents else search_centres(setup, state)
    model, advantage = state.moving_map(setup.operator, setup.coarse), state.junk.advantage
    for number, batch in enumerate(read_ahead(setup.source, split_batches(own_rows, setup.pass_size), device)):
        rows = setup.rows_on_device(batch.rows)
        start = state.parameters(rows)
        if unseen and centres is not None:
            start = best_centre(model, batch, weight, start, centres, prior)
        if number == 0:
            model = with_measured_ratio(model, batch, weight, start, setup.ranks)
        if centres is not None:
            modes = find_modes(model, batch, weight, start, steps, centres, prior)
            draws = draw_posterior(model, batch, weight, modes, prior)
            found, precision[rows] = draws.summary(modes.best)
            num_modes[rows], evidence = draws.num_modes, draws.log_evidence
            state.information[rows] = modes.best.precision - prior.curvature(modes.best.latents)
        else:
            mode = infer_latents(model, batch, weight, start, steps if state.views.num else 0, prior, fixed=fixed)
            found, evidence = mode.latents, laplace_log_evidence(mode, prior, fixed)
            state.information[rows] = model.information(batch, weight, found)
            precision[rows] = state.information[rows] + prior.curvature(found)
        state.set_parameters(rows, found)
        advantage[rows] = noise_loss(batch, weight) + evidence
    state.information_ratios = model.information_ratios
    mine, every = setup.rows_on_device(own_rows), setup.rows_on_device(wanted)
    for of_rows in (state.latents, state.views.units, precision, state.information, num_modes, advantage):
        of_rows[every] = setup.ranks.gather(of_rows[mine], len(wanted))
    return precision[every], num_modes[every]


@torch.no_grad()
def axes_of_motion(setup: Setup, state: State, probe: float = 0.1) -> torch.Tensor:
    """(K, K) rotation of latent space to axes of decreasing rms displacement; ``old = turn @ new``."""
    dims = setup.settings.latent_dims
    used = state.latents[state.particles_of(setup.rows_on_device(setup.training_rows[:300]))]
    slope = torch.stack([slope_A(setup, state, used, axis, probe).flatten() for axis in range(dims)])
    _, axes = torch.linalg.eigh((slope @ slope.T).double())
    axes = axes.flip(1)
    largest = axes.abs().argmax(0)
    return (axes * torch.sign(axes[largest, torch.arange(dims)])).float()


def final_score(setup: Setup, state: State) -> tuple[HeldOutScore, HeldOutScore | None]:
    """The held-out score of the finished model. Where it confirms no motion the model is set to rest.

    Its gain over the rigid model is then zero, for it is the rigid model; the score that did not convince comes second.
    Where nothing was held out the model stays as it is.
    """
    score = score_now(setup, state, steps=3, search=True, final=True)
    if math.isnan(score.gain) or math.isnan(score.standard_error) or confirms_motion(score.gain, score.standard_error):
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
    state.views = state.rigid_views.copy()
    return replace(score, gains=np.zeros_like(score.gains)), score
