"""The rigid start: the map of the training particles without motion, and their poses and contrasts under it."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import torch

from flexlib.images.batch import read_ahead, split_batches
from flexlib.model.moving_map import MovingMap
from flexlib.model.occupancy import Parts
from flexlib.model.views import NUM_VIEW_PARAMETERS, ROTATION, SHIFT, ViewPrior
from flexlib.train.canonical import CanonicalMap
from flexlib.train.junk import FIRST_SHARE, LEAST_WEIGHT, Junk, noise_loss
from flexlib.train.latents import LatentPrior, Posterior, infer_latents, newton_latents
from flexlib.train.map_pass import MOST_STEP, map_pass
from flexlib.train.posterior import laplace_log_evidence
from flexlib.train.setup import Setup, canonical_map
from flexlib.train.views import Views
from flexlib.train.widths import (
    LEAST_SHRINKAGE,
    SIGNIFICANT,
    WidthEvidence,
    first_widths,
    least_widths,
)

logger = logging.getLogger(__name__)

RIGID_STEPS = (12.0, 4.0, 1.2, 0.4)  # Newton steps of the rigid map in its passes; at last as calm as the canonical
FITTED_PASSES = 2  # more, where poses turn out to have been fitted to the images: until then they have been held
HELD_OUT_STEPS = 4
PARTS_STEPS = (4.0, 1.2)  # when parts come or go


def rigid_start(setup: Setup, transfer2: torch.Tensor) -> tuple[CanonicalMap, Views, Junk]:
    """The map of the training particles without motion, with the views of all rows under it, and which are junk.

    Parameters
    ----------
    setup
        The run.
    transfer2
        (box//2,) mean squared transfer of each shell.
    """
    rigid = canonical_map(setup, setup.rigid, transfer2, inside_only=False)
    num, num_held = len(setup.source), len(setup.validation_rows)
    prior = first_widths(setup)
    views = Views.none(num, num_held, setup.device)
    if prior.has_width:
        views = Views.at_input(num, num_held, prior, setup.device)
    information = torch.zeros((num, NUM_VIEW_PARAMETERS, NUM_VIEW_PARAMETERS), device=setup.device)
    junk, steps = Junk.none(num, setup.device), list(RIGID_STEPS)
    if setup.settings.find_junk:
        junk.share = FIRST_SHARE
    for number, newton_steps in enumerate(steps):
        order = np.random.default_rng((setup.settings.seed, 2, number)).permutation(setup.training_rows)
        rate = newton_steps * setup.batch_size / len(order)
        if views.prior is None:
            total = _plain_pass(setup, rigid, junk, order, rate)
        else:
            total, evidence = _refining_pass(setup, rigid, views, information, junk, order, rate)
            views = _with_new_widths(setup, views, information, evidence, last=number == len(RIGID_STEPS) - 2)
            if number == len(RIGID_STEPS) - 2 and views.fitted:
                steps += [RIGID_STEPS[-1]] * FITTED_PASSES  # the iteration goes on to them
        if setup.settings.find_junk:
            rows = setup.rows_on_device(setup.training_rows)
            junk.learn(rows, views.prior, information[rows], setup.source.particles)
        logger.info("rigid map, pass %d: %.2f nats per particle", number + 1, total / len(order))
    junk.log_share()
    _look_at_held_out(setup, rigid, views, junk)
    return rigid, views, junk


def rigid_model(setup: Setup, values: torch.Tensor, prior: ViewPrior | None, parts: Parts | None = None) -> MovingMap:
    """What predicts images from their views alone."""
    return MovingMap(setup.rigid, None, values, setup.rigid_coarse, views=prior, parts=parts)


def _plain_pass(setup: Setup, rigid: CanonicalMap, junk: Junk, order: np.ndarray, rate: float) -> float:
    """One pass over the rows ``order`` in which the map alone moves; the loss in nats, summed."""
    model = rigid_model(setup, rigid.values, None)
    total, advantage = map_pass(setup, rigid, model, order, rate, junk.probability())
    junk.advantage[setup.rows_on_device(order)] = advantage
    return total


@torch.no_grad()
def refine_rigid_map(setup: Setup, rigid: CanonicalMap, known: tuple[Views, Junk], parts: Parts | None) -> None:
    """Refine the rigid map in the views that are ``known``, when there are other ``parts`` that particles may lack."""
    views, junk = known
    model = rigid_model(setup, rigid.values, views.prior, parts)

    def units(rows: np.ndarray) -> torch.Tensor:
        return views.units[setup.rows_on_device(rows)]

    for number, steps in enumerate(PARTS_STEPS):
        order = np.random.default_rng((setup.settings.seed, 12, number)).permutation(setup.training_rows)
        rate = steps / setup.schedule.num_batches
        map_pass(setup, rigid, model, order, rate, junk.probability(), units)


def _refining_pass(
    setup: Setup,
    rigid: CanonicalMap,
    views: Views,
    information: torch.Tensor,
    junk: Junk,
    order: np.ndarray,
    rate: float,
) -> tuple[float, WidthEvidence]:
    """One pass over the rows ``order`` in which map and views take a step with each mini-batch.

    ``views.units``, ``information`` (n, 6, 6) and ``junk.advantage`` are changed in place. Returns the loss in nats,
    summed, and what the rows say of the widths.
    """
    weight, band = setup.weight(setup.schedule.full_band), setup.schedule.full_band
    prior, evidence = LatentPrior(num_views=views.num), WidthEvidence.nothing(setup.device)
    total = torch.zeros((), dtype=torch.float64, device=setup.device)
    batches = split_batches(order, setup.batch_size)
    shares = [setup.ranks.share(rows) for rows in batches]
    for rows, batch in zip(batches, read_ahead(setup.source, shares, setup.device), strict=True):
        of_all, mine = setup.rows_on_device(rows), setup.rows_on_device(batch.rows)
        model = rigid_model(setup, rigid.values.clone().requires_grad_(), views.prior)
        units, probability = views.units[mine].requires_grad_(), junk.probability(mine)
        counted = probability.clamp(min=LEAST_WEIGHT)
        with torch.enable_grad():
            loss = model.loss(batch, weight, units)
            by_map, by_units = torch.autograd.grad((counted * loss).sum(), (model.values, units))
        with torch.no_grad():
            loss, by_units = loss.detach(), by_units / counted[:, None]
            units, model = units.detach(), rigid_model(setup, rigid.values, views.prior)
            known = model.information(batch, weight, units)
            here = Posterior(units, known + prior.curvature(units), loss + prior.energy(units))
            advantage = noise_loss(batch, weight) + laplace_log_evidence(here, prior)
            junk.advantage[mine] = advantage
            evidence.add(units, by_units, known, junk.probability(mine))
            moved, summed = newton_latents(prior, units, units, by_units, known), loss.sum()
            moved, known, advantage = (setup.ranks.embed(own, len(rows)) for own in (moved, known, advantage))
            setup.ranks.add(by_map, summed, moved, known, advantage)
            views.units[of_all], information[of_all], junk.advantage[of_all] = moved, known, advantage
        total += summed
        rigid.step(by_map, len(rows) / len(order), min(rate, MOST_STEP), band)
    evidence.add_up(setup.ranks)
    looked_at = setup.rows_on_device(order)
    rigid.values = rigid.values * views.centre_contrast(looked_at, junk.probability(looked_at))
    return float(total), evidence


def _with_new_widths(
    setup: Setup, views: Views, information: torch.Tensor, evidence: WidthEvidence, last: bool
) -> Views:
    """The views with the widths that ``evidence`` speaks for; ``information`` is rescaled in place.

    At the ``last`` look, what is to be refined only where it differs from zero is given up where it does not.
    """
    assert views.prior is not None
    settings, widths = setup.settings, views.prior.widths
    least = least_widths(setup).widths
    may_go = {"rotation": settings.refine_poses, "shift": settings.refine_poses, "contrast": settings.refine_contrast}
    prior = views.prior
    if last and prior.refines_poses and evidence.poses_are_fitted:
        logger.info("the poses agree with these images better than the noise permits: they were refined against them")
        prior = replace(prior, fitted=True)
        for kind in (ROTATION, SHIFT):
            widths[kind] *= evidence.where_fitted(kind) ** 0.5
    for name, kind in prior.learnt.items():
        variance, error = evidence.of_kind(kind)
        found = float(widths[kind][0]) * max(variance, 0.0) ** 0.5
        if last and may_go[name] == "auto" and (variance < SIGNIFICANT * error or found < least[kind][0]):
            logger.info("%s: %.3f +- %.3f of the width assumed: as the input has it", name, variance, error)
            widths[kind] = 0.0
        else:
            widths[kind] *= max(variance, LEAST_SHRINKAGE) ** 0.5
    prior = prior.with_widths(widths)
    root = views.rescale(prior)
    information *= root[:, None] * root
    prior.log_to(logger)
    if not prior.has_width:
        return Views.none(len(views.units), len(views.held), setup.device)
    return views


@torch.no_grad()
def _look_at_held_out(setup: Setup, rigid: CanonicalMap, views: Views, junk: Junk) -> None:
    """Refine the views of the rows that took no part in the map, and see whether they are junk, in place."""
    model, weight = rigid_model(setup, rigid.values, views.prior), setup.weight(setup.schedule.full_band)
    own_rows, prior = setup.ranks.share(setup.validation_rows), LatentPrior(num_views=views.num)
    found, advantage = [views.held[:0]], [junk.advantage[:0]]
    for batch in read_ahead(setup.source, split_batches(own_rows, setup.pass_size), setup.device):
        start = views.units[setup.rows_on_device(batch.rows)]
        if views.num:
            here = infer_latents(model, batch, weight, start, HELD_OUT_STEPS, prior)
            start, evidence = here.latents, laplace_log_evidence(here, prior)
        else:
            evidence = -model.loss(batch, weight, start)
        found.append(start)
        advantage.append(noise_loss(batch, weight) + evidence)
    rows = setup.rows_on_device(setup.validation_rows)
    views.units[rows] = setup.ranks.gather(torch.cat(found), len(rows))
    junk.advantage[rows] = setup.ranks.gather(torch.cat(advantage), len(rows))
    views.held = views.units[rows].clone()
