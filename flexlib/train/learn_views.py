"""What a run learns of poses and contrasts between epochs: the frame of the poses, and the widths of the prior."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import torch

from flexlib.images.batch import read_ahead, split_batches
from flexlib.model.views import KINDS, NUM_VIEW_PARAMETERS, PoseFrame
from flexlib.train.latents import infer_latents, latent_precision
from flexlib.train.setup import Setup, derived_seed
from flexlib.train.state import State
from flexlib.train.widths import LEAST_SHRINKAGE, SIGNIFICANT, WidthEvidence, first_widths, least_widths

logger = logging.getLogger(__name__)

RELAXATION = 1.5  # of EM steps
MEASURED_ROWS, MEASURED_STEPS = 500, 3  # whose poses are found to the end, to measure widths


@torch.no_grad()
def learn_views(setup: Setup, state: State, annealing: bool) -> None:
    """Learn what the training rows say of contrasts' mean, poses' frame and all widths; no pose or contrast changes.

    The EM steps of a normal prior, relaxed: the estimates of an epoch carry its noise, and EM does not amplify it.

    Parameters
    ----------
    setup, state
        The run.
    annealing
        Whether the run comes to its end. Until then poses keep the freedom that they start with: those of a refinement
        have settled under a rigid map, and with a narrow prior the motion would settle around them.
    """
    if state.views.prior is None:
        return
    rows = setup.rows_on_device(setup.training_rows)
    probability = state.junk.probability(rows)
    state.canonical.values = state.canonical.values * state.views.centre_contrast(rows, probability)
    if state.views.prior.frame is not None:
        state.take_frame(_em_step(setup, state, rows, state.views.prior.frame), setup.rotation)
    square = torch.zeros(NUM_VIEW_PARAMETERS, dtype=torch.float64, device=setup.device)
    eye = torch.eye(NUM_VIEW_PARAMETERS, device=setup.device)
    for some, weight in zip(rows.split(65536), probability.split(65536), strict=True):
        information = _of_views(state.information[some], state.latents.shape[1])
        variance = torch.linalg.inv_ex(information + eye).inverse.diagonal(dim1=1, dim2=2)
        square += (weight[:, None] * (state.views.units[some].square() + variance)).double().sum(0)
    square /= probability.sum()
    variances, widths, first = {}, state.views.prior.widths, first_widths(setup).widths
    for name, kind in state.views.prior.learnt.items():
        variances[name] = max((float(square[kind].mean())) ** RELAXATION, LEAST_SHRINKAGE)
        if name != "contrast" and not annealing:
            variances[name] = max(variances[name], float((first[kind] / widths[kind]).square().mean()))
    _take_variances(state, variances)


@torch.no_grad()
def measure_widths(setup: Setup, state: State) -> None:
    """Set the widths to what some training rows show with the model as it stands: they may be zero.

    Their latents and views are found to the end for it; the rows keep those that they have.
    """
    prior = state.views.prior
    if prior is None:
        return
    dims, weight = state.latents.shape[1], setup.weight(setup.schedule.full_band)
    chosen = setup.training_rows[:: -(-len(setup.training_rows) // MEASURED_ROWS)]
    evidence, of_all = WidthEvidence.nothing(setup.device), setup.prior(state.views.num)
    model, fixed = state.moving_map(setup.operator, setup.coarse), dims if setup.settings.freeze_latents else 0
    batches = split_batches(setup.ranks.share(chosen), setup.pass_size)
    for batch in read_ahead(setup.source, batches, setup.device):
        rows = setup.rows_on_device(batch.rows)
        found = infer_latents(model, batch, weight, state.parameters(rows), MEASURED_STEPS, of_all, fixed=fixed)
        units, known = found.latents[:, dims:], found.precision - of_all.curvature(found.latents)
        # at the maximum a posteriori the prior balances the likelihood
        evidence.add(units, -units, _of_views(known, dims), state.junk.probability(rows))
    evidence.add_up(setup.ranks)
    least, widths = least_widths(setup).widths, prior.widths
    variances = {}
    for name, kind in prior.learnt.items():
        variance, error = evidence.of_kind(kind)
        wanted = setup.settings.refine_contrast if name == "contrast" else setup.settings.refine_poses
        floor = float((least[kind] / widths[kind].clamp(min=1e-30)).square().mean())
        if wanted is True:
            variance = max(variance, floor)
        elif variance < SIGNIFICANT * error or variance < floor:
            variance = 0.0
        variances[name] = variance
    if prior.fitted:  # what the images leave open, for they are all that there is
        variances |= {name: evidence.where_fitted(KINDS[name]) for name in ("rotation", "shift")}
    _take_variances(state, variances)


def _take_variances(state: State, variances: dict[str, float]) -> None:
    """Multiply the squares of the widths, by kind."""
    assert state.views.prior is not None
    widths = state.views.prior.widths
    for name, variance in variances.items():
        widths[KINDS[name]] *= math.sqrt(variance)
    learnt = state.views.prior.with_widths(widths)
    learnt.log_to(logger)
    state.change_widths(learnt)


def _of_views(information: torch.Tensor, dims: int) -> torch.Tensor:
    """(b, 6, 6) information on the views, whatever the latents are, from that on all parameters, (b, P, P)."""
    latents = torch.eye(dims, device=information.device)
    turned = torch.roll(information, (-dims, -dims), (1, 2))
    turned[:, NUM_VIEW_PARAMETERS:, NUM_VIEW_PARAMETERS:] += latents
    return latent_precision(turned, NUM_VIEW_PARAMETERS)


def _em_step(setup: Setup, state: State, rows: torch.Tensor, frame: PoseFrame) -> PoseFrame:
    """The frame that fits the poses of ``rows`` best, each with its latents a draw from its posterior.

    Draws carry the correlation of a pose's error with the latents'; a fit to the estimates would take it for motion.
    """
    assert state.views.prior is not None
    generator = torch.Generator().manual_seed(derived_seed(setup.settings.seed, 10, state.epoch))
    poses, features, unbent = [], [], replace(state.views.prior, frame=replace(frame, bend=None))
    for some in rows.split(65536):
        information = state.information[some].double()
        eye = torch.eye(information.shape[1], dtype=torch.float64, device=information.device)
        white = torch.randn(information.shape[:2], generator=generator, dtype=torch.float64).to(information.device)
        # with L L^T the precision, L^-T turns white numbers into a draw
        root = torch.linalg.cholesky(information + eye).transpose(1, 2)
        away = torch.linalg.solve_triangular(root, white[..., None], upper=True)[..., 0]
        drawn = state.parameters(some) + away.float()
        latents, units = drawn.tensor_split([state.latents.shape[1]], 1)
        poses.append(unbent.own(units, latents, setup.rotation[some])[:, :5])
        features.append(frame.features(latents))
    own, monomials, rotation = torch.cat(poses).double(), torch.cat(features).double(), setup.rotation[rows].double()
    weight = state.junk.probability(rows).double()[:, None]
    turns = (rotation.transpose(1, 2) @ own[:, :3, None])[..., 0]
    of_turns = torch.linalg.lstsq(weight.sqrt() * monomials, weight.sqrt() * turns).solution
    inplane = rotation[:, :2]  # a translation (3) is seen as a shift (2)
    design = (monomials[:, None, :, None] * inplane[:, :, None, :]).flatten(2).flatten(0, 1)
    counted = design * weight.repeat_interleave(2, 0)
    of_shifts = torch.linalg.solve(counted.T @ design, counted.T @ own[:, 3:5].reshape(-1, 1)).view(-1, 3)
    fitted = torch.cat([of_turns, of_shifts], 1).to(frame.coefficients)
    coefficients = frame.coefficients + RELAXATION * (fitted - frame.coefficients)
    coefficients[0] = frame.coefficients[0]  # what all poses have in common is the map's
    return replace(frame, coefficients=coefficients)
