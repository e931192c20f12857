"""One mini-batch: what it says of flow, map and latents, and the step that follows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from flexlib.distributed import Ranks
from flexlib.images.batch import ImageBatch, to_device
from flexlib.model.moving_map import Flow, MovingMap, Ratios, fisher_information
from flexlib.model.views import CONTRAST, ROTATION, SHIFT
from flexlib.tetra.rigidity import mesh_rigidity
from flexlib.train.gauge import GAUGE_RATE, hold_gauge
from flexlib.train.junk import LEAST_WEIGHT, noise_loss
from flexlib.train.latents import LatentPrior, Posterior, newton_latents
from flexlib.train.posterior import laplace_log_evidence
from flexlib.train.setup import Setup
from flexlib.train.state import State

# of a posterior's standard deviations, with which flow and map see its latents. With all of it a map that is too
# blurred keeps posteriors wide that keep it blurred
POSTERIOR_PART = 0.5
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

    Sums over ranks are still to be taken: all tensors add up.
    """

    loss: torch.Tensor  # () nats, summed
    strain: torch.Tensor  # () mean squared strain, this rank's part of the mean
    map_gradient: torch.Tensor  # (nvox,) of the mean objective
    mean_A: torch.Tensor  # (nv, 3) this rank's part of the mean displacement
    parameters: torch.Tensor  # (b, P) where this rank's rows move to, zero elsewhere
    information: torch.Tensor  # (b, P, P) Fisher information, likewise
    advantage: torch.Tensor  # (b,) nats by which images are likelier as particles than as noise, likewise
    information_ratios: Ratios


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
    probability = state.junk.probability(rows)
    found = find_step(setup, model, batch, state.parameters(rows), state.information[rows], probability)
    gradients = [parameter.grad for parameter in state.flow.parameters() if parameter.grad is not None]
    of_rows = found.parameters, found.information, found.advantage
    setup.ranks.add(*gradients, found.map_gradient, found.loss, found.strain, found.mean_A, *of_rows)
    state.information_ratios = found.information_ratios
    state.set_parameters(rows, found.parameters)
    state.information[rows], state.junk.advantage[rows] = found.information, found.advantage
    state.optimiser.step()
    state.optimiser.zero_grad()
    if not state.views.refines_poses:
        hold_gauge(state.flow, setup.density_share, found.mean_A, GAUGE_RATE)
    state.canonical.step(found.map_gradient * num, num / len(setup.training_rows), batch.map_rate, batch.band)
    return torch.stack([found.loss, found.strain * num]).double()


def find_step(
    setup: Setup,
    model: MovingMap,
    batch: MiniBatch,
    parameters: torch.Tensor,
    information: torch.Tensor,
    probability: torch.Tensor,
) -> StepResult:
    """What a mini-batch says.

    Parameters
    ----------
    setup
        The run.
    model
        Of a flow that is assembled with its gradient.
    batch
        The images.
    parameters, information
        (b, P) at which, and the (b, P, P) Fisher information there.
    probability
        (b,) that the images show particles: flow and map learn from each as much.
    """
    assert model.flow is not None
    ranks, num, dims = setup.ranks, len(batch.rows), model.latent_dims(parameters)
    prior = setup.prior(parameters.shape[1] - dims)
    fixed = dims if setup.settings.freeze_latents else 0
    noise = posterior_noise(prior, parameters, information, setup.settings.noise_injection, fixed)
    noisy = ranks.share(parameters + noise).requires_grad_()
    values = model.values.clone().requires_grad_()
    displacements = model.flow(noisy[:, :dims])
    seen = model.seen(batch.images, noisy)
    loss = replace(model, values=values).loss_at(seen, displacements, batch.weight)
    strain = _mean_strain(setup, model.flow, parameters[:, :dims], probability)
    counted = ranks.share(probability).clamp(min=LEAST_WEIGHT)
    ((counted * loss).sum() / num + setup.rigidity_nats * strain).backward()
    assert values.grad is not None and noisy.grad is not None
    by_parameters, loss = noisy.grad * num / counted[:, None], loss.detach()

    own, own_information = ranks.share(parameters), ranks.share(information)
    if fixed < parameters.shape[1]:
        with torch.no_grad():
            if batch.measures_information:
                if batch.measures_ratio:
                    model = with_measured_ratio(model, batch.images, batch.weight, own, ranks)
                own_information = model.information(batch.images, batch.weight, own, fixed)
            own = newton_latents(prior, own, noisy.detach(), by_parameters, own_information, fixed)
    evidence = _log_evidence(prior, noisy.detach(), loss, ranks.share(information), fixed)
    share = ranks.share(probability) / probability.sum()
    return StepResult(
        loss=loss.sum(),
        strain=strain.detach(),
        map_gradient=values.grad,
        mean_A=torch.einsum("b,bvd->vd", share, displacements.detach()),
        parameters=ranks.embed(own, num),
        information=ranks.embed(own_information, num),
        advantage=ranks.embed(noise_loss(batch.images, batch.weight) + evidence, num),
        information_ratios=model.information_ratios,
    )


def _mean_strain(setup: Setup, flow: Flow, latents: torch.Tensor, probability: torch.Tensor) -> torch.Tensor:
    """() this rank's part of the mean squared strain at a random few of the latents (b, K)."""
    sample = torch.randperm(len(latents))[: max(RIGIDITY_SAMPLES, setup.ranks.size)]
    mine = to_device(setup.ranks.share(sample), setup.device)
    strains = mesh_rigidity(setup.rigidity, setup.operator.vertices_A + flow(latents[mine]))
    return (strains * probability[mine]).sum() / len(sample)


def _log_evidence(
    prior: LatentPrior, noisy: torch.Tensor, loss: torch.Tensor, information: torch.Tensor, fixed: int
) -> torch.Tensor:
    """(b,) what ``laplace_log_evidence`` gives at the mode, from the loss (b,) at parameters (b, P) with their noise.

    It raises the objective above that at the mode, by half of its square for each of them in units of the posterior.
    """
    here = Posterior(noisy, information + prior.curvature(noisy), loss + prior.energy(noisy))
    return laplace_log_evidence(here, prior, fixed) + 0.5 * POSTERIOR_PART**2 * (noisy.shape[1] - fixed)


def posterior_noise(
    prior: LatentPrior, parameters: torch.Tensor, information: torch.Tensor, injected: float, fixed: int = 0
) -> torch.Tensor:
    """(b, P) noise for the flow and map to be trained with: a part of a draw from each posterior, and the injected one.

    The flow thus learns from latents that are uncertain, and where images say nothing it learns no motion.

    Parameters
    ----------
    prior
        Of the parameters.
    parameters, information
        (b, P) and their (b, P, P) Fisher information.
    injected
        Standard deviation of the noise that is added to the posterior's of the latents.
    fixed
        Of the parameters, the first ones, are known: they get the injected noise alone.
    """
    dims, total = parameters.shape[1] - prior.num_views, parameters.shape[1]
    white = to_device(torch.randn((*information.shape[:2], 1)), information.device)
    added = torch.full((total,), injected**2, device=information.device)
    added[dims:] = 0.0
    precision = (information + prior.curvature(parameters))[:, fixed:, fixed:]
    covariance = POSTERIOR_PART**2 * torch.linalg.inv_ex(precision).inverse + torch.diag(added[fixed:])
    noise = injected * white[..., 0]
    noise[:, fixed:] = (torch.linalg.cholesky_ex(covariance).L @ white[:, fixed:])[..., 0]
    return noise


def with_measured_ratio(
    model: MovingMap, batch: ImageBatch, weight: torch.Tensor, parameters: torch.Tensor, ranks: Ranks
) -> MovingMap:
    """``model`` with the ratios of Fisher information in full to that in the coarse map, measured on a batch."""
    if model.coarse_map is None:
        return model
    full, quick = fisher_information(model, batch, weight, parameters), model.information(batch, weight, parameters)
    dims = model.latent_dims(parameters)
    kinds = [slice(0, dims)]
    if model.views is not None:
        kinds += [slice(dims + kind.start, dims + kind.stop) for kind in (ROTATION, SHIFT, CONTRAST)]
    both = torch.stack([part.diagonal(dim1=1, dim2=2).sum(0) for part in (full, quick)])
    both = torch.stack([both[:, kind].sum(1) for kind in kinds], 1)
    ranks.add(both)
    ratios = list(model.information_ratios)
    for number, (whole, half) in enumerate(both.T.tolist()):
        if whole > 0 and half > 0:  # a ratio of zero could never be measured again
            ratios[number] *= whole / half
    return replace(model, information_ratios=(ratios[0], ratios[1], ratios[2], ratios[3]))
