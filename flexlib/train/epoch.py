"""An epoch: its mini-batches, and what keeps latents, gauge and score in order between them."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from tqdm import tqdm

from flexlib.images.batch import ImageBatch, read_ahead, split_batches
from flexlib.train.follow_parts import follow_parts
from flexlib.train.latents import LatentScale, posterior_scale
from flexlib.train.learn_views import learn_views, measure_widths
from flexlib.train.local_minima import leave_wrong_minima, search_centres
from flexlib.train.motion import rms_displacement_A
from flexlib.train.rigid import rigid_model
from flexlib.train.schedule import BAND_EPOCHS
from flexlib.train.score import HeldOutScore, score_held_out
from flexlib.train.setup import Setup, derived_seed
from flexlib.train.state import State
from flexlib.train.step import MiniBatch, take_step

logger = logging.getLogger(__name__)

LOGGED_ROWS = 500  # training rows that the logged motion is of


def run_epoch(setup: Setup, state: State, after_batch: Callable[[], None]) -> None:
    """One pass over the training rows, from where ``state`` stands in it, and the work between epochs.

    Parameters
    ----------
    setup, state
        The run.
    after_batch
        Called after each mini-batch; may end the run by an exception.

    Raises
    ------
    FloatingPointError
        The loss is not finite, or density moves by more than half the box: training has diverged.
    """
    epoch, began = state.epoch, time.perf_counter()
    anneal = setup.schedule.anneal(epoch, state.anneal_from)
    _learn(setup, state, anneal, after_batch)
    assert state.totals is not None
    loss, strain = (state.totals / len(setup.training_rows)).tolist()
    if not math.isfinite(loss):  # the CPU's operator says so itself; a GPU's would have to be waited for
        raise FloatingPointError(f"the loss is {loss}")
    if epoch == BAND_EPOCHS:
        leave_wrong_minima(setup, state)
    if setup.settings.find_junk:
        learn_junk(setup, state)
    learn_views(setup, state, annealing=anneal < 1)
    if anneal < 1 and (epoch == 0 or setup.schedule.anneal(epoch - 1, state.anneal_from) == 1):
        measure_widths(setup, state)
    standardise(setup, state)
    state.follow_first(setup.ranks)
    rms_A, box_A = rms_displacement_A(setup, state, LOGGED_ROWS), setup.source.box * setup.source.pixel_size_A
    if not rms_A < 0.5 * box_A:
        raise FloatingPointError(f"density moves by {rms_A:.3g} A rms in a box of {box_A:.3g} A")
    follow_parts(setup, state)
    score = score_now(setup, state, steps=6 if epoch == 0 else 2, search=epoch in (0, BAND_EPOCHS))
    state.hold(score.parameters, score.rigid_views)
    state.epoch, state.step, state.totals = epoch + 1, 0, None
    entry = {
        "epoch": epoch + 1,
        "band_shell": round(setup.schedule.band(epoch), 2),
        "rate": anneal,
        "loss": loss,
        "rigidity": strain,
        "rms_displacement_A": rms_A,
        "junk_share": state.junk.share,
        "validation_gain": score.gain,
        "validation_gain_se": score.standard_error,
        "seconds": time.perf_counter() - began,
    }
    state.log.append(entry)
    logger.info(
        "epoch %d: band %.1f, loss %.2f nats, strain %.2e, motion %.2f A rms, held-out gain %.2f +- %.2f nats, %.1f s",
        *(entry[k] for k in entry if k not in ("rate", "junk_share")),
    )
    gains = [e["validation_gain"] for e in state.log]
    if state.anneal_from is None and setup.schedule.has_learnt(gains, score.standard_error):
        state.anneal_from = epoch + 1


def _learn(setup: Setup, state: State, anneal: float, after_batch: Callable[[], None]) -> None:
    """The mini-batches of an epoch that are still to be done."""
    schedule, settings, epoch = setup.schedule, setup.settings, state.epoch
    band = schedule.band(epoch)
    weight = setup.weight(band)
    order = np.random.default_rng((settings.seed, 5, epoch)).permutation(setup.training_rows)
    batches = split_batches(order, setup.batch_size)
    measures = schedule.measures_information(epoch)
    if state.totals is None:
        state.totals = torch.zeros(2, dtype=torch.float64, device=setup.device)
    ahead = read_ahead(setup.source, map(setup.ranks.share, batches[state.step :]), setup.device)
    for images in _with_progress(setup, ahead, len(batches), state.step, f"epoch {epoch + 1}"):
        torch.manual_seed(derived_seed(settings.seed, 6, epoch, state.step))
        for parameters in state.optimiser.param_groups:
            parameters["lr"] = state.slowed * schedule.flow_rate(epoch, state.step, anneal)
        batch = MiniBatch(
            rows=batches[state.step],
            images=images,
            weight=weight,
            band=band,
            map_rate=state.slowed * schedule.map_rate * anneal,
            measures_information=measures,
            measures_ratio=measures and state.step == 0,
        )
        state.totals += take_step(setup, state, batch)
        state.step += 1
        after_batch()


def standardise(setup: Setup, state: State) -> LatentScale | None:
    """Bring the training latents' posteriors to zero mean and unit covariance; the flow learns the new coordinates.

    Returns the change; None where latents keep their scale: they are frozen, or their prior has a scale of its own.
    """
    if setup.settings.freeze_latents or setup.settings.centering != "auto":
        return None
    rows = setup.rows_on_device(setup.training_rows)
    scale = posterior_scale(state.latents[rows], state.information[rows], state.junk.probability(rows))
    state.change_latents(scale)
    return scale


def learn_junk(setup: Setup, state: State) -> None:
    """Learn from what the training rows' images have shown how many are junk."""
    rows, dims = setup.rows_on_device(setup.training_rows), setup.settings.latent_dims
    poses = state.information[rows][:, dims:, dims:]
    state.junk.learn(rows, state.views.prior, poses, setup.source.particles)


@torch.no_grad()
def score_now(setup: Setup, state: State, steps: int, search: bool, final: bool = False) -> HeldOutScore:
    """The held-out score as things stand (``score.py``).

    Parameters
    ----------
    setup, state
        The run.
    steps
        Of the inference of latents and views; frozen latents stay as they are.
    search
        Whether other local minima are looked for.
    final
        Whether the run has come to its end; between epochs a cheaper score is enough.
    """
    frozen = setup.settings.freeze_latents
    return score_held_out(
        setup.held_out(state.views.num, state.junk.log_odds),
        state.moving_map(setup.operator, setup.coarse),
        rigid_model(
            setup, state.rigid_values, state.rigid_views.prior, state.occupancy.on(setup.rigid, setup.rigid_coarse)
        ),
        state.held_parameters(),
        state.rigid_views.held,
        steps=steps,
        centres=search_centres(setup, state) if search and not frozen else None,
        final=final,
    )


def _with_progress(
    setup: Setup, batches: Iterator[ImageBatch], total: int, done: int, label: str
) -> Iterator[ImageBatch]:
    """A progress bar on a terminal, nothing elsewhere: there an epoch's log line is enough."""
    quiet = not (setup.ranks.leads and sys.stderr.isatty())
    return tqdm(batches, total=total, initial=done, desc=label, leave=False, disable=quiet)
