"""What a run learns of poses and contrasts between epochs: the frame of the poses, and the widths of the prior."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import torch

from flexlib.model.views import KINDS, NUM_VIEW_PARAMETERS, PoseFrame, ViewPrior
from flexlib.train.latents import latent_precision
from flexlib.train.setup import Setup, derived_seed
from flexlib.train.state import State
from flexlib.train.widths import LEAST_SHRINKAGE, WidthEvidence, least_widths

logger = logging.getLogger(__name__)

RELAXATION = 1.5  # of the EM step of the frame
LEAST_PART = 0.3  # of an image's own error that a width squared keeps while the frame is learnt: EM stands still at 0


@torch.no_grad()
def learn_views(setup: Setup, state: State, annealing: bool) -> None:
    """Learn what the training rows say of contrasts' mean, poses' frame and all widths; no pose or contrast changes.

    Parameters
    ----------
    setup, state
        The run; latents have the unit normal as prior.
    annealing
        Whether the run comes to its end: then widths may become zero.
    """
    if state.views.prior is None:
        return
    rows = setup.rows_on_device(setup.training_rows)
    state.canonical.values = state.canonical.values * state.views.centre_contrast(rows)
    evidence = WidthEvidence.nothing(setup.device)
    if state.views.prior.frame is not None:
        state.take_frame(_em_step(setup, state, rows, state.views.prior.frame), setup.rotation)
    known = torch.zeros(NUM_VIEW_PARAMETERS, device=setup.device)
    for some in rows.split(65536):
        information = _of_views(state.information[some], state.latents.shape[1])
        units = state.views.units[some]
        evidence.add(units, -units, information)  # at the maximum a posteriori the prior balances the likelihood
        known += information.diagonal(dim1=1, dim2=2).sum(0)
    state.change_widths(_new_prior(setup, state.views.prior, evidence, known / len(rows), annealing))


def _of_views(information: torch.Tensor, dims: int) -> torch.Tensor:
    """(b, 6, 6) information on the views, whatever the latents are, from that on all parameters, (b, P, P)."""
    latents = torch.eye(dims, device=information.device)
    turned = torch.roll(information, (-dims, -dims), (1, 2))
    turned[:, NUM_VIEW_PARAMETERS:, NUM_VIEW_PARAMETERS:] += latents
    return latent_precision(turned, NUM_VIEW_PARAMETERS)


def _new_prior(
    setup: Setup, prior: ViewPrior, evidence: WidthEvidence, known: torch.Tensor, annealing: bool
) -> ViewPrior:
    """The prior with the widths that ``evidence`` speaks for; ``known`` (6,) is the mean information on each unit."""
    widths, least = prior.widths, least_widths(setup).widths
    always = {
        "rotation": setup.settings.refine_poses is True,
        "shift": setup.settings.refine_poses is True,
        "contrast": setup.settings.refine_contrast is True,
    }
    for name, kind in KINDS.items():
        if not (widths[kind] > 0).all():
            continue
        variance = max(evidence.of_kind(kind)[0], LEAST_SHRINKAGE)
        if not annealing:
            variance = max(variance, LEAST_PART / max(float(known[kind].mean()), 1e-6))
        found = widths[kind] * math.sqrt(min(variance, 1 / LEAST_SHRINKAGE))
        if annealing and not always[name]:
            found = torch.where(found < least[kind], 0.0, found)
        widths[kind] = torch.maximum(found, least[kind]) if always[name] or not annealing else found
    learnt = ViewPrior.of_widths(widths, prior.frame)
    learnt.log_to(logger)
    return learnt


def _em_step(setup: Setup, state: State, rows: torch.Tensor, frame: PoseFrame) -> PoseFrame:
    """The frame that fits the poses of ``rows`` best, each with its latents a draw from its posterior.

    Draws carry the correlation of a pose's error with the latents'; a fit to the estimates would take it for motion.
    """
    assert state.views.prior is not None
    generator = torch.Generator().manual_seed(derived_seed(setup.settings.seed, 10, state.epoch))
    poses, features = [], []
    for some in rows.split(65536):
        information = state.information[some].double()
        eye = torch.eye(information.shape[1], dtype=torch.float64, device=information.device)
        white = torch.randn(information.shape[:2], generator=generator, dtype=torch.float64).to(information.device)
        # with L L^T the precision, L^-T turns white numbers into a draw
        root = torch.linalg.cholesky(information + eye).transpose(1, 2)
        away = torch.linalg.solve_triangular(root, white[..., None], upper=True)[..., 0]
        drawn = state.parameters(some) + away.float()
        latents, units = drawn.tensor_split([state.latents.shape[1]], 1)
        poses.append(state.views.prior.own(units, latents, setup.rotation[some])[:, :5])
        features.append(frame.features(latents))
    own, monomials, rotation = torch.cat(poses).double(), torch.cat(features).double(), setup.rotation[rows].double()
    turns = (rotation.transpose(1, 2) @ own[:, :3, None])[..., 0]
    of_turns = torch.linalg.lstsq(monomials, turns).solution
    inplane = rotation[:, :2]  # a translation (3) is seen as a shift (2)
    design = (monomials[:, None, :, None] * inplane[:, :, None, :]).flatten(2).flatten(0, 1)
    of_shifts = torch.linalg.solve(design.T @ design, design.T @ own[:, 3:5].reshape(-1, 1)).view(-1, 3)
    fitted = torch.cat([of_turns, of_shifts], 1).to(frame.coefficients)
    coefficients = frame.coefficients + RELAXATION * (fitted - frame.coefficients)
    coefficients[0] = frame.coefficients[0]  # what all poses have in common is the map's
    return replace(frame, coefficients=coefficients)
