"""The widths of the priors of poses and contrasts: where they start, what speaks for them, and when they are none."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flexlib.model.views import CONTRAST, NUM_VIEW_PARAMETERS, ViewPrior
from flexlib.train.setup import Setup

FIRST_SHIFT_A = 2.0  # widths before anything is known: a tenth of the resolution at which motion is looked for first,
FIRST_CONTRAST = 0.15  # rotations that move the molecule's edge as far, and contrasts as they usually vary
LEAST_SHIFT_PX, LEAST_CONTRAST = 0.05, 0.03  # widths that matter; rotations that move the molecule's edge as far
SIGNIFICANT = 3.0  # standard errors above zero that a width squared must have
LEAST_SHRINKAGE = 0.1  # of a width squared in one pass
OUTLIER = 4.0  # standard deviations beyond which an estimate counts as one so far out


@dataclass
class WidthEvidence:
    """What the images say of the view parameters' variances, in units of their prior's.

    A parameter's estimate u without prior has the variance v that its information leaves it, and the parameter's own on
    top: the mean of u^2 - v, weighted by 1 / (v + 1)^2, estimates the latter without bias (Fisher scoring of a
    variance component). It may be negative; zero lies within the errors where there is nothing to be refined. What all
    images have in common of their contrast is the map's, and no part of its variance.
    """

    excess: torch.Tensor  # (6,)
    weight: torch.Tensor  # (6,)
    total: torch.Tensor  # (6,) of the estimates, weighted

    @classmethod
    def nothing(cls, device: torch.device) -> WidthEvidence:
        """Of no image."""
        return cls(*torch.zeros((3, NUM_VIEW_PARAMETERS), dtype=torch.float64, device=device))

    def add(self, units: torch.Tensor, gradient: torch.Tensor, information: torch.Tensor) -> None:
        """Count b images: the likelihood's ``gradient`` (b, 6) at ``units`` (b, 6), and their information (b, 6, 6)."""
        known = information.double()
        eye = torch.eye(NUM_VIEW_PARAMETERS, dtype=torch.float64, device=known.device)
        covariance = torch.linalg.inv_ex(known + 1e-3 * eye).inverse
        at_zero = (known @ units.double()[..., None])[..., 0] - gradient.double()
        variance = covariance.diagonal(dim1=1, dim2=2)
        longest = OUTLIER * (variance + 1).sqrt()
        estimate = (covariance @ at_zero[..., None])[..., 0].clamp(-longest, longest)
        weight = (variance + 1).reciprocal().square()
        self.excess += (weight * (estimate.square() - variance)).sum(0)
        self.weight += weight.sum(0)
        self.total += (weight * estimate).sum(0)

    def of_kind(self, kind: slice) -> tuple[float, float]:
        """Variance over the prior's, and its standard error."""
        weight = self.weight[kind].sum()
        common = (self.total[kind].sum() / weight).square() if kind == CONTRAST else 0.0
        return float(self.excess[kind].sum() / weight - common), float((2.0 / weight).sqrt())


def first_widths(setup: Setup) -> ViewPrior:
    """Of what the settings ask to be refined, before anything is known."""
    settings = setup.settings
    shift_A = FIRST_SHIFT_A if settings.refine_poses else 0.0
    return widths_of_edge(setup, shift_A, FIRST_CONTRAST if settings.refine_contrast else 0.0)


def widths_of_edge(setup: Setup, shift_A: float, contrast: float) -> ViewPrior:
    """Widths with rotations that move the molecule, at its radius of gyration, as far as the shift does."""
    gyration = (setup.density_share[:, None] * setup.operator.vertices_A.square()).sum().sqrt()
    return ViewPrior(shift_A / float(gyration), shift_A, contrast)


def least_widths(setup: Setup) -> ViewPrior:
    """Widths below which there is nothing to be refined."""
    return widths_of_edge(setup, LEAST_SHIFT_PX * setup.source.pixel_size_A, LEAST_CONTRAST)
