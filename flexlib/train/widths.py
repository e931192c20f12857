"""The widths of the priors of poses and contrasts: where they start, what speaks for them, and when they are none."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flexlib.distributed import Ranks
from flexlib.model.views import CONTRAST, NUM_VIEW_PARAMETERS, ROTATION, SHIFT, ViewPrior
from flexlib.train.setup import Setup

FIRST_SHIFT_A = 2.0  # widths before anything is known: a tenth of the resolution at which motion is looked for first,
FIRST_CONTRAST = 0.15  # rotations that move the molecule's edge as far, and contrasts as they usually vary
LEAST_SHIFT_PX, LEAST_CONTRAST = 0.05, 0.03  # widths that matter; rotations that move the molecule's edge as far
SIGNIFICANT = 3.0  # standard errors above zero that a width squared must have
# of the images' own variance that fitted poses are short of; independent ones are short of a few hundredths, what the
# map takes over of each image's noise. Poses of a refinement against half-maps: a half
FITTED_PART = 0.2
FITTED_WIDTH = 1.0  # of an image's own error, the width that fitted poses get
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
    error: torch.Tensor  # (6,) of the estimates' own variances, weighted

    @classmethod
    def nothing(cls, device: torch.device) -> WidthEvidence:
        """Of no image."""
        return cls(*torch.zeros((4, NUM_VIEW_PARAMETERS), dtype=torch.float64, device=device))

    def add(
        self, units: torch.Tensor, gradient: torch.Tensor, information: torch.Tensor, probability: torch.Tensor
    ) -> None:
        """Count b images, each as far as it shows a particle.

        Parameters
        ----------
        units
            (b, 6) view parameters.
        gradient, information
            (b, 6) and (b, 6, 6) of the likelihood there.
        probability
            (b,) that they are particles.
        """
        known = information.double()
        eye = torch.eye(NUM_VIEW_PARAMETERS, dtype=torch.float64, device=known.device)
        covariance = torch.linalg.inv_ex(known + 1e-3 * eye).inverse
        at_zero = (known @ units.double()[..., None])[..., 0] - gradient.double()
        variance = covariance.diagonal(dim1=1, dim2=2)
        longest = OUTLIER * (variance + 1).sqrt()
        estimate = (covariance @ at_zero[..., None])[..., 0].clamp(-longest, longest)
        weight = (variance + 1).reciprocal().square() * probability[:, None]
        self.excess += (weight * (estimate.square() - variance)).sum(0)
        self.weight += weight.sum(0)
        self.total += (weight * estimate).sum(0)
        self.error += (weight * variance).sum(0)

    def add_up(self, ranks: Ranks) -> None:
        """Count what the other ranks have counted, too."""
        ranks.add(self.excess, self.weight, self.total, self.error)

    def of_kind(self, kind: slice) -> tuple[float, float]:
        """Variance over the prior's, and its standard error."""
        weight = self.weight[kind].sum()
        common = (self.total[kind].sum() / weight).square() if kind == CONTRAST else 0.0
        return float(self.excess[kind].sum() / weight - common), float((2.0 / weight).sqrt())

    def of_images(self, kind: slice) -> float:
        """Variance over the prior's that an image leaves a parameter."""
        return float(self.error[kind].sum() / self.weight[kind].sum())

    def where_fitted(self, kind: slice) -> float:
        """Variance over the prior's that a parameter fitted to the images gets: what these leave open."""
        return FITTED_WIDTH**2 * self.of_images(kind)

    @property
    def poses_are_fitted(self) -> bool:
        """Whether poses agree with the images better than the images' noise permits: they were fitted to them."""
        poses = slice(ROTATION.start, SHIFT.stop)
        return self.of_kind(poses)[0] < -FITTED_PART * self.of_images(poses)


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
