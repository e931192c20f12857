"""An epoch: its mini-batches, and what keeps latents, gauge and score in order between them."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

from flexlib.images.batch import read_ahead, split_batches, to_device
from flexlib.imaging.image_transforms import plane_weight
from flexlib.model.flex_model import AssembledFlow
from flexlib.model.forward import MovingMap, fisher_information, log_likelihood_loss
from flexlib.tetra.rigidity import mesh_rigidity
from flexlib.train.latents import latent_centres, search_latents
from flexlib.train.motion import rms_displacement_A
from flexlib.train.score import HeldOutScore, score_held_out
from flexlib.train.start import FLOW_RATE
from flexlib.train.state import BAND_EPOCHS, RIGIDITY_NATS, Setup, State, derived_seed, follow_first

logger = logging.getLogger(__name__)

FLOW_RATE_END = 5e-4  # 3DFlex's
GAUGE_RATE = 0.05  # share of a batch's mean rigid-body motion that is taken out of the flow
LATENT_RATE = 0.7
RIGIDITY_SAMPLES = 12
CLEARLY_LOWER_NATS = 1.0  # another valley of a particle's objective: it moves there
MAX_EPOCHS = 16  # before the final annealing, with epochs: auto
ANNEAL_EPOCHS = 4
PATIENCE = 3  # epochs without a better held-out score before annealing, with epochs: auto


def finished(setup: Setup, state: State) -> bool:
    return state.epoch >= _planned_epochs(setup, state)


def _planned_epochs(setup: Setup, state: State) -> int:
    if setup.settings.epochs != "auto":
        return int(setup.settings.epochs)
    return (MAX_EPOCHS if state.anneal_from is None else state.anneal_from) + ANNEAL_EPOCHS


def _anneal(setup: Setup, state: State) -> float:
    """1 while learning, falling geometrically to a tenth in the last epochs."""
    last = _planned_epochs(setup, state)
    if setup.settings.epochs == "auto":
        length, start = ANNEAL_EPOCHS, state.anneal_from if state.anneal_from is not None else MAX_EPOCHS
    else:
        length = max(1, last // 4)
        start = last - length
    done = state.epoch - start + 1
    return float((FLOW_RATE_END / FLOW_RATE) ** (max(0, done) / length))


def run_epoch(setup: Setup, state: State, after_batch: Callable[[], None]) -> None:
    settings, device, epoch = setup.settings, setup.device, state.epoch
    began = time.perf_counter()
    band, anneal = setup.band(epoch), _anneal(setup, state)
    weight = plane_weight(setup.source.box, band).to(device)
    refresh = epoch < 2 or epoch % 4 == 0
    order = np.random.default_rng((settings.seed, 5, epoch)).permutation(setup.training_rows)
    batches = split_batches(order, setup.batch_size)
    if state.totals is None:
        state.totals = torch.zeros(2, dtype=torch.float64, device=device)
    ahead = read_ahead(setup.source, map(setup.group.share, batches[state.step :]), device)
    for batch in _with_progress(setup, ahead, len(batches), state.step, f"epoch {epoch + 1}"):
        rows = batches[state.step]
        torch.manual_seed(derived_seed(settings.seed, 6, epoch, state.step))
        warm_up = min(1.0, (epoch * len(batches) + state.step + 1) / len(batches))
        for group in state.optimiser.param_groups:
            group["lr"] = FLOW_RATE * anneal * warm_up
        state.totals += _step(setup, state, rows, batch, weight, band, setup.map_rate * anneal, refresh)
        state.step += 1
        after_batch()
    loss, strain = (state.totals / len(setup.training_rows)).tolist()
    if not math.isfinite(loss):  # the CPU's operator says so itself; a GPU's would have to be waited for
        raise FloatingPointError(f"training diverged in epoch {epoch + 1}: the loss is {loss}")
    if epoch == BAND_EPOCHS:
        _leave_wrong_valleys(setup, state)
    standardise(setup, state)
    follow_first(setup, state)
    score = score_now(setup, state, steps=6 if epoch == 0 else 2, search=epoch in (0, BAND_EPOCHS))
    state.held_latents, gain, error = score.latents, score.gain, score.standard_error
    state.epoch, state.step, state.totals = epoch + 1, 0, None
    entry = {
        "epoch": epoch + 1,
        "band_shell": round(band, 2),
        "rate": anneal,
        "loss": loss,
        "rigidity": strain,
        "rms_displacement_A": rms_displacement_A(setup, state),
        "validation_gain": gain,
        "validation_gain_se": error,
        "seconds": time.perf_counter() - began,
    }
    state.log.append(entry)
    logger.info(
        "epoch %d: band %.1f, loss %.2f nats, strain %.2e, motion %.2f A rms, held-out gain %.2f +- %.2f nats, %.1f s",
        *(entry[k] for k in ("epoch", "band_shell", "loss", "rigidity", "rms_displacement_A")),
        gain,
        error,
        entry["seconds"],
    )
    if settings.epochs == "auto" and state.anneal_from is None and epoch + 1 > BAND_EPOCHS + PATIENCE:
        recent = [e["validation_gain"] for e in state.log[-PATIENCE:]]
        before = max(e["validation_gain"] for e in state.log[BAND_EPOCHS:-PATIENCE])
        if max(recent) < before + 0.2 * error:
            state.anneal_from = epoch + 1


def _step(setup, state, batch_rows, batch, weight, band, map_rate, refresh) -> torch.Tensor:
    """One mini-batch: flow, map and latents. Returns (2,) the loss and the rigidity energy, summed over its particles.

    ``batch`` is this rank's part of the particles at ``batch_rows``. Random numbers are drawn for all of them, and what
    the ranks find is put together in one message, so that every rank takes the same step. Nothing here waits for a GPU
    (but the first batch that measures the information's ratio).
    """
    settings, group, num = setup.settings, setup.group, len(batch_rows)
    rows = to_device(batch_rows, setup.device)
    latents, information = state.latents[rows], state.information[rows]
    noisy = group.share(latents + _posterior_noise(setup, latents, information)).requires_grad_()
    values = state.canonical.values.clone().requires_grad_()
    flow = state.flow.assembled()
    displacements = flow(noisy)
    loss = log_likelihood_loss(setup.operator, values, batch, displacements, weight).sum()
    sample = torch.randperm(num)[: max(RIGIDITY_SAMPLES, group.size)]
    moved = setup.operator.vertices_A + flow(latents[to_device(group.share(sample), setup.device)])
    strain = mesh_rigidity(setup.rigidity, moved).sum() / len(sample)
    (loss / num + settings.rigidity * RIGIDITY_NATS * strain).backward()

    own_latents, own_information = group.share(latents), group.share(information)
    if not settings.freeze_latents:
        with torch.no_grad():
            if refresh:
                model = moving_map(setup, state, flow)
                if state.step == 0:
                    model = measure_ratio(setup, state, model, batch, weight, own_latents)
                own_information = model.information(batch, weight, own_latents)
            own_latents = _newton_latents(setup.prior, own_latents, noisy.detach(), noisy.grad * num, own_information)
    latents, information = group.place(own_latents, num), group.place(own_information, num)
    mean_A = displacements.detach().sum(0) / num
    gradients = [parameter.grad for parameter in state.flow.parameters()]
    group.add(*gradients, values.grad, loss, strain, mean_A, latents, information)
    state.latents[rows], state.information[rows] = latents, information
    state.optimiser.step()
    state.optimiser.zero_grad()
    hold_gauge(setup, state, mean_A, GAUGE_RATE)
    state.canonical.step(values.grad * num, num / len(setup.training_rows), map_rate, band)
    return torch.stack([loss.detach(), strain.detach() * num]).double()


def _posterior_noise(setup: Setup, latents: torch.Tensor, information: torch.Tensor) -> torch.Tensor:
    """(b, K) noise for the flow and map to be trained with: a draw from each latent's posterior, and the set noise.

    The flow thus learns from latents as uncertain as they are, and where images tell nothing it learns no motion.
    """
    eye = torch.eye(information.shape[1], device=information.device)
    covariance = torch.linalg.inv_ex(information + setup.prior.curvature(latents)).inverse
    covariance = covariance + setup.settings.noise_injection**2 * eye
    white = to_device(torch.randn((*information.shape[:2], 1)), information.device)
    return (torch.linalg.cholesky_ex(covariance).L @ white)[..., 0]


def moving_map(setup: Setup, state: State, flow: AssembledFlow | None = None) -> MovingMap:
    """Flow and map as they stand (``flow`` if it is assembled already)."""
    flow = state.flow.assembled() if flow is None else flow
    return MovingMap(setup.operator, flow, state.canonical.values, setup.coarse, state.information_ratio)


def measure_ratio(setup: Setup, state: State, model: MovingMap, batch, weight, latents) -> MovingMap:
    """``model`` with the ratio of Fisher information in full to that in the coarse view, measured on a batch."""
    if model.view is None:
        return model
    full, quick = fisher_information(model, batch, weight, latents), model.information(batch, weight, latents)
    both = torch.stack([part.diagonal(dim1=1, dim2=2).sum() for part in (full, quick)])
    setup.group.add(both)
    if (both > 0).all():  # a ratio of zero could never be measured again
        state.information_ratio *= float(both[0] / both[1])
    return replace(model, information_ratio=state.information_ratio)


def _newton_latents(prior, latents, at, gradient, information) -> torch.Tensor:
    """Move latents towards the maximum a posteriori that a Gauss-Newton step from ``at`` predicts."""
    slope = (gradient + prior.gradient(at))[..., None]
    full_step = torch.linalg.solve_ex(information + prior.curvature(at), slope).result[..., 0]
    change = LATENT_RATE * (at - full_step - latents)
    return latents + change * (0.5 / change.norm(dim=1, keepdim=True).clamp(min=0.5))


@torch.no_grad()
def hold_gauge(setup: Setup, state: State, mean_A: torch.Tensor, rate: float) -> None:
    """Take ``rate`` of a mean displacement's (nv, 3) rigid-body part, as the density feels it, out of the flow.

    Moving the molecule in every particle and the map the other way changes no image; without this the two drift.
    """
    state.flow.output.bias[-6:] -= rate * rigid_part(setup, state, mean_A)


def rigid_part(setup: Setup, state: State, displacement_A: torch.Tensor) -> torch.Tensor:
    """(6,) coefficients of the basis' rigid-body motions in a displacement field (nv, 3), by density."""
    motions = state.flow.basis_A[-6:]
    weighted = motions * setup.density_share[:, None]
    overlap = weighted.flatten(1) @ motions.flatten(1).T
    return torch.linalg.solve_ex(overlap, weighted.flatten(1) @ displacement_A.flatten()).result


@torch.no_grad()
def _leave_wrong_valleys(setup: Setup, state: State) -> None:
    """Move the latents of particles that fit clearly better elsewhere in latent space."""
    if setup.settings.freeze_latents:
        return
    weight = plane_weight(setup.source.box, setup.band(BAND_EPOCHS)).to(setup.device)
    centres, model, moved = valley_centres(setup, state), moving_map(setup, state), torch.zeros(1)
    own_rows = setup.group.share(setup.training_rows)
    for batch in read_ahead(setup.source, split_batches(own_rows, setup.batch_size), setup.device):
        rows = torch.as_tensor(batch.rows, device=setup.device)
        found, lower = search_latents(
            model, batch, weight, state.latents[rows], centres, state.information[rows], setup.prior
        )
        clearly = lower > CLEARLY_LOWER_NATS
        state.latents[rows[clearly]] = found[clearly]
        moved += clearly.sum().cpu()
    setup.group.add(moved)
    own_latents = state.latents[torch.as_tensor(own_rows, device=setup.device)]
    rows = torch.as_tensor(setup.training_rows, device=setup.device)
    state.latents[rows] = setup.group.gather(own_latents, len(rows))
    logger.info("%d of %d particles have left a wrong valley of their objective", int(moved), len(rows))


def valley_centres(setup: Setup, state: State) -> torch.Tensor:
    """(m, K) starts all over the latents' distribution, for the search of other valleys."""
    used = state.latents[torch.as_tensor(setup.training_rows, device=setup.device)].cpu().numpy()
    centres = latent_centres(used, derived_seed(setup.settings.seed, 8, state.epoch))
    return torch.as_tensor(centres, device=setup.device)


@torch.no_grad()
def standardise(setup: Setup, state: State) -> tuple[torch.Tensor, torch.Tensor]:
    """Bring the training latents' posteriors to zero mean and unit covariance; the flow learns the new coordinates.

    Returns (offset, scale) with ``old = offset + scale @ new``.

    No displacement changes, and the strength of the prior on latents needs no tuning. The covariance is that of the
    estimates plus their mean uncertainty (the EM update of a normal prior): a coordinate that the images do not tell
    keeps its small estimates, instead of being blown up to unit size.
    """
    eye = torch.eye(setup.settings.latent_dims, device=setup.device)
    if setup.settings.freeze_latents or setup.settings.centering != "auto":
        return eye[0] * 0, eye
    rows = torch.as_tensor(setup.training_rows, device=setup.device)
    used = state.latents[rows]
    offset = used.mean(0)
    uncertainty = torch.linalg.inv(state.information[rows] + eye).mean(0)
    scale = torch.linalg.cholesky(torch.cov(used.T).reshape(eye.shape) + uncertainty)
    state.flow.rescale_latents(scale, offset)
    for name in ("latents", "held_latents"):
        centred = (getattr(state, name) - offset).T
        setattr(state, name, torch.linalg.solve_triangular(scale, centred, upper=False).T.contiguous())
    state.information = scale.T @ state.information @ scale
    return offset, scale


@torch.no_grad()
def score_now(setup: Setup, state: State, steps: int, search: bool) -> HeldOutScore:
    """The held-out score as things stand (``validation.py``)."""
    frozen = setup.settings.freeze_latents
    return score_held_out(
        setup.source,
        setup.validation_rows,
        moving_map(setup, state),
        setup.rigid,
        state.rigid_values,
        state.held_latents,
        band=setup.band(BAND_EPOCHS),
        seed=derived_seed(setup.settings.seed, 7),
        steps=0 if frozen else steps,
        prior=setup.prior,
        batch_size=setup.batch_size,
        centres=valley_centres(setup, state) if search and not frozen else None,
        group=setup.group,
    )


def _with_progress(setup: Setup, batches: Iterator, total: int, done: int, label: str) -> Iterator:
    """A progress bar on a terminal, nothing elsewhere (an epoch's log line tells)."""
    quiet = not (setup.group.leads and sys.stderr.isatty())
    return tqdm(batches, total=total, initial=done, desc=label, leave=False, disable=quiet)
