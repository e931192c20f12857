"""One mini-batch: what it says of flow, map and latents, and the step that follows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from flexlib.distributed import Ranks
from flexlib.images.batch import ImageBatch, to_device
from flexlib.model.forward import MovingMap, fisher_information, log_likelihood_loss
from flexlib.tetra.rigidity import mesh_rigidity
from flexlib.train.gauge import GAUGE_RATE, hold_gauge
from flexlib.train.latents import LatentPrior, newton_latents
from flexlib.train.setup import Setup
from flexlib.train.state import State

RIGIDITY_SAMPLES = 12  # latents of a mini-batch at which the rigidity is taken


@dataclass(frozen=True)
class MiniBatch:
    """The particles of a step, and how they are looked at."""

    rows: np.ndarray  # (b,) of all ranks
    images: ImageBatch  # of this rank's share of them
    weight: torch.Tensor  # (box, box//2+1) of each stored Fourier pixel
    band: float  # highest shell of it
    map_rate: float  # Newton steps of the map
    measures_information: bool  # of the latents
    measures_ratio: bool  # of the information in full to that in the coarse map


@dataclass(frozen=True)
class StepResult:
    """What this rank's share of a mini-batch says; the flow's gradient lies in its parameters.

    Sums over ranks are still to be taken: all tensors but ``information_ratio`` add up.
    """

    loss: torch.Tensor  # () nats, summed
    strain: torch.Tensor  # () mean squared strain, this rank's part of the mean
    map_gradient: torch.Tensor  # (nvox,) of the mean objective
    mean_A: torch.Tensor  # (nv, 3) this rank's part of the mean displacement
    latents: torch.Tensor  # (b, K) where this rank's rows move to, zero elsewhere
    information: torch.Tensor  # (b, K, K) Fisher information, likewise
    information_ratio: float


def take_step(setup: Setup, state: State, batch: MiniBatch) -> torch.Tensor:
    """Let flow, map and latents take the step of one mini-batch.

    Random numbers are drawn for the rows of all ranks, and what the ranks find is put together in one message, so that
    every rank takes the same step. Nothing here waits for a GPU (but the first mini-batch that measures the
    information's ratio).

    Returns
    -------
    totals
        (2,) float64: loss in nats and rigidity energy, summed over the mini-batch.
    """
    num, rows = len(batch.rows), to_device(batch.rows, setup.device)
    model = state.moving_map(setup.operator, setup.coarse)
    found = find_step(setup, model, batch, state.latents[rows], state.information[rows])
    gradients = [parameter.grad for parameter in state.flow.parameters() if parameter.grad is not None]
    parts = (found.map_gradient, found.loss, found.strain, found.mean_A, found.latents, found.information)
    setup.ranks.add(*gradients, *parts)
    state.information_ratio = found.information_ratio
    state.latents[rows], state.information[rows] = found.latents, found.information
    state.optimiser.step()
    state.optimiser.zero_grad()
    hold_gauge(state.flow, setup.density_share, found.mean_A, GAUGE_RATE)
    state.canonical.step(found.map_gradient * num, num / len(setup.training_rows), batch.map_rate, batch.band)
    return torch.stack([found.loss, found.strain * num]).double()


def find_step(
    setup: Setup, model: MovingMap, batch: MiniBatch, latents: torch.Tensor, information: torch.Tensor
) -> StepResult:
    """What a mini-batch says at its ``latents`` (b, K), of Fisher ``information`` (b, K, K).

    ``model`` has a flow that is assembled with its gradient.
    """
    ranks, num = setup.ranks, len(batch.rows)
    noise = posterior_noise(setup.prior, latents, information, setup.settings.noise_injection)
    noisy = ranks.share(latents + noise).requires_grad_()
    values = model.values.clone().requires_grad_()
    displacements = model.flow(noisy)
    loss = log_likelihood_loss(setup.operator, values, batch.images, displacements, batch.weight).sum()
    sample = torch.randperm(num)[: max(RIGIDITY_SAMPLES, ranks.size)]
    moved = setup.operator.vertices_A + model.flow(latents[to_device(ranks.share(sample), setup.device)])
    strain = mesh_rigidity(setup.rigidity, moved).sum() / len(sample)
    (loss / num + setup.rigidity_nats * strain).backward()
    assert values.grad is not None and noisy.grad is not None

    own_latents, own_information = ranks.share(latents), ranks.share(information)
    if not setup.settings.freeze_latents:
        with torch.no_grad():
            if batch.measures_information:
                if batch.measures_ratio:
                    model = with_measured_ratio(model, batch.images, batch.weight, own_latents, ranks)
                own_information = model.information(batch.images, batch.weight, own_latents)
            slope = noisy.grad * num
            own_latents = newton_latents(setup.prior, own_latents, noisy.detach(), slope, own_information)
    return StepResult(
        loss=loss.detach(),
        strain=strain.detach(),
        map_gradient=values.grad,
        mean_A=displacements.detach().sum(0) / num,
        latents=ranks.embed(own_latents, num),
        information=ranks.embed(own_information, num),
        information_ratio=model.information_ratio,
    )


def posterior_noise(
    prior: LatentPrior, latents: torch.Tensor, information: torch.Tensor, injected: float
) -> torch.Tensor:
    """(b, K) noise for the flow and map to be trained with: a draw from each latent's posterior, and the injected one.

    The flow thus learns from latents as uncertain as they are, and where images say nothing it learns no motion.

    Parameters
    ----------
    prior
        Of the latents.
    latents, information
        (b, K) and their (b, K, K) Fisher information.
    injected
        Standard deviation of the noise that is added to the posterior's.
    """
    eye = torch.eye(information.shape[1], device=information.device)
    covariance = torch.linalg.inv_ex(information + prior.curvature(latents)).inverse
    covariance = covariance + injected**2 * eye
    white = to_device(torch.randn((*information.shape[:2], 1)), information.device)
    return (torch.linalg.cholesky_ex(covariance).L @ white)[..., 0]


def with_measured_ratio(
    model: MovingMap, batch: ImageBatch, weight: torch.Tensor, latents: torch.Tensor, ranks: Ranks
) -> MovingMap:
    """``model`` with the ratio of Fisher information in full to that in the coarse map, measured on a batch."""
    if model.coarse_map is None:
        return model
    full, quick = fisher_information(model, batch, weight, latents), model.information(batch, weight, latents)
    both = torch.stack([part.diagonal(dim1=1, dim2=2).sum() for part in (full, quick)])
    ranks.add(both)
    if not (both > 0).all():  # a ratio of zero could never be measured again
        return model
    return replace(model, information_ratio=model.information_ratio * float(both[0] / both[1]))
