"""Posteriors of single particles beyond their most likely parameters: means and covariances by importance sampling.

In weak images the posterior of the latents is wide and skewed, may have several modes, and its mode is not its mean.
Draws from normal distributions about the modes, weighted by the exact objective, integrate over all of that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from flexlib.images.batch import ImageBatch
from flexlib.model.moving_map import MovingMap
from flexlib.train.latents import LatentPrior, Posterior
from flexlib.train.modes import Modes

NUM_DRAWS = 32  # of each particle's posterior, at least
_DRAWS_PER_PARAMETER = 4
_MODE_DRAWS = 2.0  # that the parabola at the mode counts as: all there is where one draw carries all the weight
_WIDER = 1.2  # proposals than the modes' own standard deviations: posteriors have heavier tails than normal ones
_SECOND_MODE = 0.1  # of the probability: a particle with as much at another mode has two


@dataclass(frozen=True)
class PosteriorDraws:
    """Weighted draws from the posteriors of b particles' parameters."""

    parameters: torch.Tensor  # (s, b, P)
    log_weight: torch.Tensor  # (s, b) the weights of each particle add up to one
    second: torch.Tensor  # (b,) probability of the second mode; 0 where there is one only
    log_evidence: torch.Tensor  # (b,) logarithm of the images' likelihood, averaged over the prior

    @property
    def effective_draws(self) -> torch.Tensor:
        """(b,) how many draws of equal weight say as much."""
        return 1.0 / (2.0 * self.log_weight).exp().sum(0)

    @property
    def mean(self) -> torch.Tensor:
        """(b, P)."""
        return torch.einsum("sb,sbp->bp", self.log_weight.exp(), self.parameters)

    @property
    def covariance(self) -> torch.Tensor:
        """(b, P, P)."""
        away = self.parameters - self.mean
        return torch.einsum("sb,sbp,sbq->bpq", self.log_weight.exp(), away, away)

    @property
    def num_modes(self) -> torch.Tensor:
        """(b,) 1 or 2."""
        return 1 + (self.second > _SECOND_MODE).long()

    def summary(self, mode: Posterior) -> tuple[torch.Tensor, torch.Tensor]:
        """(b, P) mean and (b, P, P) precision; the ``mode``'s parabola counts as much as a few draws."""
        share = self.effective_draws / (self.effective_draws + _MODE_DRAWS)
        mean = torch.lerp(mode.latents, self.mean, share[:, None])
        normal = torch.linalg.inv_ex(mode.precision).inverse
        return mean, torch.linalg.inv_ex(torch.lerp(normal, self.covariance, share[:, None, None])).inverse

    def log_mean_exp(self, values: torch.Tensor) -> torch.Tensor:
        """(b,) logarithm of the posterior mean of ``exp(values)``, of (s, b)."""
        return torch.logsumexp(self.log_weight + values, 0)


@lru_cache(maxsize=16)
def standard_points(dims: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Points (s, P) of a normal distribution ``_WIDER`` than the unit one, in pairs of opposite sign, and (s,) weights.

    The weights make the points' mean zero and their covariance the identity, exactly: means and covariances of
    posteriors that are normal come out without error.
    """
    from scipy.stats import norm, qmc

    pairs = max(NUM_DRAWS, _DRAWS_PER_PARAMETER * dims) // 2
    uniform = qmc.Sobol(dims, seed=0).random(1 << (pairs - 1).bit_length())[:pairs]
    half = norm.ppf(uniform)
    points = _WIDER * np.concatenate([half, -half])
    log_weight = -0.5 * (1.0 - _WIDER**-2) * (points**2).sum(1)
    weight = np.exp(log_weight - np.logaddexp.reduce(log_weight))
    root = np.linalg.cholesky((points * weight[:, None]).T @ points)
    standard = np.linalg.solve(root, points.T).T
    return torch.from_numpy(standard).float().to(device), torch.from_numpy(np.log(weight)).float().to(device)


@dataclass(frozen=True)
class _Proposal:
    """Draws about the modes (b, P) of b particles, as wide as their posteriors are there."""

    mode: torch.Tensor  # (b, P)
    root: torch.Tensor  # (b, F, F) lower Cholesky factor of the precision of the F free parameters
    fixed: int

    @classmethod
    def about(cls, mode: torch.Tensor, precision: torch.Tensor, fixed: int) -> _Proposal:
        return cls(mode, torch.linalg.cholesky_ex(precision[:, fixed:, fixed:]).L, fixed)

    def draws(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(s, b, P) parameters, and (s, b) the log density that they are drawn with."""
        points, log_weight = standard_points(self.root.shape[1], str(self.mode.device))
        away = torch.linalg.solve_triangular(self.root.mT, points.T.expand(len(self.mode), -1, -1), upper=True)
        drawn = self.mode.repeat(len(points), 1, 1)
        drawn[:, :, self.fixed :] += away.permute(2, 0, 1)
        log_density = -0.5 * points.square().sum(1) - log_weight - math.log(len(points))
        return drawn, log_density[:, None] + self._log_volume()

    def log_density(self, drawn: torch.Tensor) -> torch.Tensor:
        """(s, b) at parameters (s, b, P)."""
        away = torch.einsum("bfg,sbf->sbg", self.root, (drawn - self.mode)[:, :, self.fixed :]) / _WIDER
        return -0.5 * away.square().sum(2) - self.root.shape[1] * math.log(_WIDER) + self._log_volume()

    def _log_volume(self) -> torch.Tensor:
        return self.root.diagonal(dim1=1, dim2=2).log().sum(1)


@torch.no_grad()
def draw_posterior(
    model: MovingMap, batch: ImageBatch, weight: torch.Tensor, modes: Modes, prior: LatentPrior, fixed: int = 0
) -> PosteriorDraws:
    """Draws from the posteriors of b particles, weighted by the objective at each.

    Parameters
    ----------
    model, batch, weight, prior
        As for ``latents.infer_latents``.
    modes
        Of each particle's posterior, with the precision there.
    fixed
        Of the parameters, the first ones, are known.
    """

    def log_posterior(batch: ImageBatch, drawn: torch.Tensor) -> torch.Tensor:
        return -torch.stack([model.loss(batch, weight, one) + prior.energy(one) for one in drawn])

    best, other, rows = modes.best, modes.other, modes.other_rows
    own = _Proposal.about(best.latents, best.precision, fixed)
    drawn, log_density = own.draws()
    log_weight = log_posterior(batch, drawn) - log_density
    second = torch.zeros(len(best.latents), device=drawn.device)
    constant = prior.known_energy(best.latents, fixed) - math.log(len(drawn))
    if not len(rows):
        return _normalised(drawn, log_weight, second, constant)
    # particles with two modes: both proposals' draws, each weighted as one of the mixture's
    there = _Proposal.about(other.latents, other.precision, fixed)
    first = _Proposal(own.mode[rows], own.root[rows], fixed)
    more, more_density = there.draws()
    more_weight = log_posterior(batch.take(rows), more) - torch.logaddexp(more_density, first.log_density(more))
    own_density = log_density[:, rows]
    log_weight[:, rows] += own_density - torch.logaddexp(own_density, there.log_density(drawn[:, rows]))
    drawn = torch.cat([drawn, drawn])
    drawn[len(more) :, rows] = more
    log_weight = torch.cat([log_weight, torch.full_like(log_weight, -torch.inf)])
    log_weight[len(more) :, rows] = more_weight
    draws = _normalised(drawn, log_weight, second, constant)
    nearer = first.log_density(drawn[:, rows]) < there.log_density(drawn[:, rows])
    second[rows] = (draws.log_weight[:, rows].exp() * nearer).sum(0)
    return draws


def _normalised(
    drawn: torch.Tensor, log_weight: torch.Tensor, second: torch.Tensor, constant: torch.Tensor
) -> PosteriorDraws:
    total = torch.logsumexp(log_weight, 0)
    return PosteriorDraws(drawn, log_weight - total, second, total + constant)


def laplace_log_evidence(mode: Posterior, prior: LatentPrior, fixed: int = 0) -> torch.Tensor:
    """(b,) logarithm of the images' likelihood averaged over the prior, as if posteriors were normal.

    Up to the same constant as the objective. Of the parameters, the first ``fixed`` are known.
    """
    root = torch.linalg.cholesky_ex(mode.precision[:, fixed:, fixed:]).L
    volume = root.diagonal(dim1=1, dim2=2).log().sum(1)
    return prior.known_energy(mode.latents, fixed) - mode.objective - volume
