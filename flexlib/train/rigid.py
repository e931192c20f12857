"""The rigid start: the map of the training particles without motion, and their poses and contrasts under it."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import torch

from flexlib.images.batch import ImageBatch, read_ahead, split_batches
from flexlib.model.moving_map import MovingMap
from flexlib.model.occupancy import Parts
from flexlib.model.views import NUM_VIEW_PARAMETERS, ROTATION, SHIFT, ViewPrior
from flexlib.train.canonical import CanonicalMap
from flexlib.train.latents import LatentPrior, infer_latents, newton_latents
from flexlib.train.map_pass import MOST_STEP, map_pass
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


def rigid_start(setup: Setup, transfer2: torch.Tensor) -> tuple[CanonicalMap, Views]:
    """The map of the training particles without motion, with the views of all rows under it.

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
    steps = list(RIGID_STEPS)
    for number, newton_steps in enumerate(steps):
        order = np.random.default_rng((setup.settings.seed, 2, number)).permutation(setup.training_rows)
        rate = newton_steps * setup.batch_size / len(order)
        if views.prior is None:
            total = map_pass(setup, rigid, rigid_model(setup, rigid.values, None), order, rate)
        else:
            total, evidence = _refining_pass(setup, rigid, views, information, order, rate)
            views = _with_new_widths(setup, views, information, evidence, last=number == len(RIGID_STEPS) - 2)
            if number == len(RIGID_STEPS) - 2 and views.fitted:
                steps += [RIGID_STEPS[-1]] * FITTED_PASSES  # the iteration goes on to them
        logger.info("rigid map, pass %d: %.2f nats per particle", number + 1, total / len(order))
    if views.prior is not None:
        _refine_held_out(setup, rigid, views)
    return rigid, views


def rigid_model(setup: Setup, values: torch.Tensor, prior: ViewPrior | None, parts: Parts | None = None) -> MovingMap:
    """What predicts images from their views alone."""
    return MovingMap(setup.rigid, None, values, setup.rigid_coarse, views=prior, parts=parts)


@torch.no_grad()
def refine_rigid_map(setup: Setup, rigid: CanonicalMap, views: Views, parts: Parts | None) -> None:
    """Refine the rigid map in the views that it has, when there are other ``parts`` that particles may lack."""
    model = rigid_model(setup, rigid.values, views.prior, parts)
    for number, steps in enumerate(PARTS_STEPS):
        order = np.random.default_rng((setup.settings.seed, 12, number)).permutation(setup.training_rows)
        rate = steps / setup.schedule.num_batches
        map_pass(setup, rigid, model, order, rate, lambda rows: views.units[setup.rows_on_device(rows)])


def _refining_pass(
    setup: Setup, rigid: CanonicalMap, views: Views, information: torch.Tensor, order: np.ndarray, rate: float
) -> tuple[float, WidthEvidence]:
    """One pass over the rows ``order`` in which map and views take a step with each mini-batch.

    ``views.units`` and ``information`` (n, 6, 6) are changed in place. Returns the loss in nats, summed, and what the
    rows say of the widths.
    """
    weight, band = setup.weight(setup.schedule.full_band), setup.schedule.full_band
    prior, evidence = LatentPrior(num_views=views.num), WidthEvidence.nothing(setup.device)
    total = torch.zeros((), dtype=torch.float64, device=setup.device)
    batches = split_batches(order, setup.batch_size)
    shares = [setup.ranks.share(rows) for rows in batches]
    for rows, batch in zip(batches, read_ahead(setup.source, shares, setup.device), strict=True):
        of_all, mine = setup.rows_on_device(rows), setup.rows_on_device(batch.rows)
        model = rigid_model(setup, rigid.values.clone().requires_grad_(), views.prior)
        units = views.units[mine].requires_grad_()
        with torch.enable_grad():
            loss = model.loss(batch, weight, units).sum()
            by_map, by_units = torch.autograd.grad(loss, (model.values, units))
        with torch.no_grad():
            units, model = units.detach(), rigid_model(setup, rigid.values, views.prior)
            known = model.information(batch, weight, units)
            evidence.add(units, by_units, known)
            moved = newton_latents(prior, units, units, by_units, known)
            moved, known = setup.ranks.embed(moved, len(rows)), setup.ranks.embed(known, len(rows))
            setup.ranks.add(by_map, loss, moved, known)
            views.units[of_all], information[of_all] = moved, known
        total += loss.detach()
        rigid.step(by_map, len(rows) / len(order), min(rate, MOST_STEP), band)
    evidence.add_up(setup.ranks)
    rigid.values = rigid.values * views.centre_contrast(setup.rows_on_device(order))
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
def _refine_held_out(setup: Setup, rigid: CanonicalMap, views: Views) -> None:
    """Refine the views of the rows that took no part in the map, in place."""
    model, weight = rigid_model(setup, rigid.values, views.prior), setup.weight(setup.schedule.full_band)
    own_rows = setup.ranks.share(setup.validation_rows)

    def refined(batch: ImageBatch) -> torch.Tensor:
        start = views.units[setup.rows_on_device(batch.rows)]
        return infer_latents(model, batch, weight, start, HELD_OUT_STEPS, LatentPrior(num_views=views.num)).latents

    batches = read_ahead(setup.source, split_batches(own_rows, setup.batch_size), setup.device)
    found = torch.cat([views.held[:0], *(refined(batch) for batch in batches)])
    rows = setup.rows_on_device(setup.validation_rows)
    views.units[rows] = setup.ranks.gather(found, len(rows))
    views.held = views.units[rows].clone()
