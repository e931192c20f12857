"""Latents and views of single particles: their prior, their Gauss-Newton inference and their scale.

A particle's parameters are K latents and, where poses or contrasts are refined, six of its view (``model/views.py``),
P in all. They are found together, by Levenberg-Marquardt steps with the exact gradient and a Gauss-Newton matrix (the
Fisher information) from forward derivatives. Where the objective has several local minima, each is a start.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flexlib.images.batch import ImageBatch
from flexlib.model.moving_map import MovingMap

_AT_OPTIMUM_NATS = 1e-3  # a step that promises less is not taken
LATENT_RATE = 0.7  # of a Gauss-Newton step, in one mini-batch
LONGEST_STEP = (1.0, 3.0)  # of latents and of view parameters, in units of their priors
LONGEST_BATCH_STEP = (0.5, 1.5)  # in one mini-batch


def friedel_halves(box: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two complementary random masks (box, box//2+1) of {0, 1} in which Friedel mates stay together."""
    generator = torch.Generator().manual_seed(seed)
    first = (torch.rand((box, box // 2 + 1), generator=generator) < 0.5).float()
    mirrored = torch.cat([first[:1, 0], first[1:, 0].flip(0)])  # column kx = 0: row -ky of row ky
    upper = torch.arange(box) <= box // 2
    first[:, 0] = torch.where(upper, first[:, 0], mirrored)
    return first, 1.0 - first


@dataclass(frozen=True)
class Posterior:
    """Parameters of some particles with what the images say of their precision."""

    latents: torch.Tensor  # (b, P)
    precision: torch.Tensor  # (b, P, P) Fisher information of the images plus the prior's
    objective: torch.Tensor  # (b,) nats at ``latents``, prior included

    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All fields."""
        return self.latents, self.precision, self.objective

    def of(self, rows: torch.Tensor) -> Posterior:
        """A copy for some of the particles."""
        return Posterior(*(part[rows] for part in self.parts()))

    def where(self, chosen: torch.Tensor, other: Posterior) -> Posterior:
        """Of each particle, this where ``chosen`` (b,), else ``other``."""
        pairs = zip(self.parts(), other.parts(), strict=True)
        return Posterior(*(torch.where(chosen.view(-1, *[1] * (a.ndim - 1)), a, b) for a, b in pairs))


@dataclass(frozen=True)
class LatentPrior:
    """Minus the log of the prior on parameters, in nats: ``strength * sum |z|^power / power``, summed over the dims.

    The default is the unit normal that standardised latents have. 3DFlex's is ``lambda |z|^4``
    (``LatentPrior(4 * lambda, 4.0)``, up to its own unit of lambda). View parameters, the last ``num_views`` ones, have
    the unit normal always.
    """

    strength: float = 1.0
    power: float = 2.0
    num_views: int = 0

    @classmethod
    def quartic(cls, centering: float, num_views: int = 0) -> LatentPrior:
        """3DFlex's penalty, in its own unit of ``train.centering``.

        That unit is not known; its default of 20 is given the strength of the unit normal at |z| = 1.5, where it says
        that latents pile up when centering is too weak.
        """
        return cls(4.0 * centering / 81.0, 4.0, num_views)

    def _parts(self, parameters: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dims = parameters.shape[1] - self.num_views
        return parameters[:, :dims], parameters[:, dims:]

    def energy(self, parameters: torch.Tensor) -> torch.Tensor:
        """(b, P) to (b,)."""
        latents, views = self._parts(parameters)
        return self.strength / self.power * (latents.abs() ** self.power).sum(1) + 0.5 * views.square().sum(1)

    def known_energy(self, parameters: torch.Tensor, fixed: int) -> torch.Tensor:
        """(b,) what the first ``fixed`` of the latents add to ``energy``, as if they were not known."""
        return self.strength / self.power * (parameters[:, :fixed].abs() ** self.power).sum(1)

    def gradient(self, parameters: torch.Tensor) -> torch.Tensor:
        """(b, P) to (b, P)."""
        latents, views = self._parts(parameters)
        return torch.cat([self.strength * latents.abs() ** (self.power - 1.0) * torch.sign(latents), views], 1)

    def curvature(self, parameters: torch.Tensor) -> torch.Tensor:
        """(b, P) to (b, P, P), positive definite."""
        latents, views = self._parts(parameters)
        bend = self.strength * (self.power - 1.0) * latents.abs() ** (self.power - 2.0)
        return torch.diag_embed(torch.cat([bend + 1e-3 * self.strength, torch.ones_like(views)], 1))


UNIT_PRIOR = LatentPrior()


def _objective_and_gradient(
    model: MovingMap, batch: ImageBatch, weight: torch.Tensor, latents: torch.Tensor, prior: LatentPrior
) -> tuple[torch.Tensor, torch.Tensor]:
    """(b,) nats with the prior, and their gradient (b, P)."""
    with torch.enable_grad():
        moving = latents.detach().requires_grad_()
        loss = model.loss(batch, weight, moving)
        (gradient,) = torch.autograd.grad(loss.sum(), moving)
    return loss.detach() + prior.energy(latents), gradient + prior.gradient(latents)


def _no_longer(step: torch.Tensor, num_views: int, longest: tuple[float, float]) -> torch.Tensor:
    """``step`` (b, P), shortened where its latents or its view parameters would go farther than ``longest``."""
    dims = step.shape[1] - num_views
    excess = step[:, :dims].norm(dim=1) / longest[0]
    if num_views:
        excess = torch.maximum(excess, step[:, dims:].norm(dim=1) / longest[1])
    return step / excess.clamp(min=1.0)[:, None]


@torch.no_grad()
def infer_latents(
    model: MovingMap,
    batch: ImageBatch,
    weight: torch.Tensor,
    start: torch.Tensor,
    steps: int = 3,
    prior: LatentPrior = UNIT_PRIOR,
    information: torch.Tensor | None = None,
    fixed: int = 0,
) -> Posterior:
    """Maximum a posteriori parameters by Levenberg-Marquardt, with exact gradients.

    The curvature starts as Gauss-Newton's and learns from every trial: the linear kernel's objective has wiggles of a
    pixel's length. A step that raises a particle's objective is taken back and damped, so the result is never worse
    than ``start``. Particles that are at their optimum take no more steps.

    Parameters
    ----------
    model, batch, weight
        What predicts the images, the images, and (box, box//2+1) ``plane_weight`` of the band in use.
    start
        (b, P) parameters.
    steps
        At most.
    prior
        Of the parameters.
    information
        (b, P, P) at the start; measured if not given. The precision returned is this, with the prior's.
    fixed
        Of the parameters, the first ones, stay as they are.
    """
    if information is None:
        information = model.information(batch, weight, start, fixed)
    latents, rows = start.clone(), torch.arange(len(start), device=start.device)
    objective, gradient = _objective_and_gradient(model, batch, weight, latents, prior)
    gradient[:, :fixed] = 0.0
    damping = torch.full((len(latents),), 1e-2, device=latents.device)
    curvature = (information + prior.curvature(latents)).double()
    for _ in range(steps):
        hessian, slope = curvature[rows], gradient[rows].double()[..., None]
        promised = 0.5 * (slope * torch.linalg.solve(hessian, slope)).sum((1, 2))
        onward = promised > _AT_OPTIMUM_NATS
        if not onward.all():
            rows, hessian, slope = rows[onward], hessian[onward], slope[onward]
            batch = batch.take(torch.nonzero(onward)[:, 0])
        if not len(rows):
            break
        damped = hessian + damping[rows, None, None] * torch.diag_embed(hessian.diagonal(dim1=1, dim2=2))
        step = -torch.linalg.solve(damped, slope)[..., 0]
        step = _no_longer(step, prior.num_views, LONGEST_STEP)
        trial = latents[rows] + step.float()
        new_objective, new_gradient = _objective_and_gradient(model, batch, weight, trial, prior)
        new_gradient[:, :fixed] = 0.0
        curvature[rows] = learn_curvature(hessian, step, (new_gradient - gradient[rows]).double())
        better = new_objective <= objective[rows]
        latents[rows] = torch.where(better[:, None], trial, latents[rows])
        gradient[rows] = torch.where(better[:, None], new_gradient, gradient[rows])
        objective[rows] = torch.where(better, new_objective, objective[rows])
        damping[rows] = damping[rows] * torch.where(better, 0.1, 10.0)
    return Posterior(latents, information + prior.curvature(latents), objective)


def newton_latents(
    prior: LatentPrior,
    latents: torch.Tensor,
    at: torch.Tensor,
    gradient: torch.Tensor,
    information: torch.Tensor,
    fixed: int = 0,
) -> torch.Tensor:
    """Move parameters (b, P) towards the maximum a posteriori that a Gauss-Newton step from ``at`` predicts.

    Parameters
    ----------
    prior
        Of the parameters.
    latents, at
        (b, P) as they are, and where the gradient was measured.
    gradient, information
        (b, P) of the loss at ``at``, and (b, P, P).
    fixed
        Of the parameters, the first ones, stay as they are; their information is zero.

    Returns
    -------
    latents
        (b, P), no farther from where they were than ``LONGEST_BATCH_STEP``.
    """
    slope = (gradient + prior.gradient(at))[..., None]
    full_step = torch.linalg.solve_ex(information + prior.curvature(at), slope).result[..., 0]
    change = LATENT_RATE * (at - full_step - latents)
    change[:, :fixed] = 0.0
    return latents + _no_longer(change, prior.num_views, LONGEST_BATCH_STEP)


def learn_curvature(hessian: torch.Tensor, step: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """(b, K, K) positive definite: ``hessian`` made to agree with a gradient's ``change`` (b, K) over ``step`` (b, K).

    The BFGS update with Powell's damping (Nocedal and Wright, Numerical Optimization, procedure 18.2). All float64;
    where rounding leaves a matrix that is not positive definite, it is left as it was.
    """
    predicted = (hessian @ step[..., None])[..., 0]
    expected, found = (step * predicted).sum(1), (step * change).sum(1)
    share = torch.where(found < 0.2 * expected, 0.8 * expected / (expected - found), 1.0)[:, None]
    mixed = share * change + (1 - share) * predicted
    gained = (step * mixed).sum(1)

    def outer(vector: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return vector[:, :, None] * vector[:, None] / scale[:, None, None]

    learnt = hessian - outer(predicted, expected) + outer(mixed, gained)
    good = torch.linalg.cholesky_ex(learnt).info == 0
    return torch.where(good[:, None, None], learnt, hessian)


def latent_precision(precision: torch.Tensor, dims: int) -> torch.Tensor:
    """(b, K, K) precision of the first ``dims`` parameters, whatever the others are: (b, P, P)'s Schur complement."""
    if precision.shape[1] == dims:
        return precision
    cross = precision[:, :dims, dims:]
    solved = torch.linalg.solve_ex(precision[:, dims:, dims:], cross.transpose(1, 2)).result
    return precision[:, :dims, :dims] - cross @ solved


@dataclass(frozen=True)
class LatentScale:
    """A change of latent coordinates: ``old = offset + matrix @ new``."""

    offset: torch.Tensor  # (K,)
    matrix: torch.Tensor  # (K, K) lower triangular

    def to_new(self, latents: torch.Tensor) -> torch.Tensor:
        """(n, K) old coordinates to new ones."""
        centred = (latents - self.offset).T
        return torch.linalg.solve_triangular(self.matrix, centred, upper=False).T.contiguous()


@torch.no_grad()
def posterior_scale(latents: torch.Tensor, information: torch.Tensor, weight: torch.Tensor) -> LatentScale:
    """The coordinates in which posteriors have zero mean and unit covariance over the particles.

    In them the strength of the prior on latents needs no tuning. The covariance is that of the estimates plus their
    mean uncertainty (the EM update of a normal prior): a coordinate that the images do not determine keeps its small
    estimates, instead of being blown up to unit size.

    Parameters
    ----------
    latents, information
        (n, K) estimates and the (n, P, P) Fisher information of all parameters; the prior is the unit normal.
    weight
        (n,) with which each particle counts.
    """
    dims, share = latents.shape[1], weight / weight.sum()
    offset = share @ latents
    uncertainty = torch.einsum("n,npq->pq", share, _covariance(information))[:dims, :dims]
    spread = torch.cov(latents.T, aweights=weight).reshape(dims, dims)
    return LatentScale(offset, torch.linalg.cholesky(spread + uncertainty))


def _covariance(information: torch.Tensor) -> torch.Tensor:
    """(n, P, P) of posteriors with the unit normal as prior."""
    eye = torch.eye(information.shape[1], device=information.device)
    return torch.cat([torch.linalg.inv(some + eye) for some in information.split(65536)])
