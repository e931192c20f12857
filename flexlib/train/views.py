"""The views of a run's particles: poses and contrasts as they are refined, under one model."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from flexlib.model.views import NUM_VIEW_PARAMETERS, PoseFrame, ViewPrior


@dataclass
class Views:
    """View parameters of all rows, in units of the widths of their prior; V is 6, or 0 where nothing is refined."""

    units: torch.Tensor  # (n, V)
    held: torch.Tensor  # (validation rows, V) from half the Fourier pixels
    prior: ViewPrior | None  # None: nothing is refined

    @classmethod
    def none(cls, num: int, num_held: int, device: torch.device) -> Views:
        """Poses and contrasts as the input has them."""
        return cls(torch.zeros((num, 0), device=device), torch.zeros((num_held, 0), device=device), None)

    @classmethod
    def at_input(cls, num: int, num_held: int, prior: ViewPrior, device: torch.device) -> Views:
        """The same, to be refined with the widths of ``prior``."""
        shape = (num, NUM_VIEW_PARAMETERS), (num_held, NUM_VIEW_PARAMETERS)
        return cls(torch.zeros(shape[0], device=device), torch.zeros(shape[1], device=device), prior)

    @property
    def num(self) -> int:
        """V."""
        return self.units.shape[1]

    @property
    def refines_poses(self) -> bool:
        """Whether rotations or shifts are refined."""
        return self.prior is not None and self.prior.refines_poses

    @property
    def fitted(self) -> bool:
        """Whether the input's poses were fitted to the images."""
        return self.prior is not None and self.prior.fitted

    def copy(self) -> Views:
        """The same values, to be changed independently."""
        return Views(self.units.clone(), self.held.clone(), self.prior)

    def rescale(self, prior: ViewPrior) -> torch.Tensor:
        """Take other widths; no pose or contrast changes, but for those whose width is zero now.

        Returns
        -------
        root
            (V,) what goes with the square of a parameter, as its information does, is to be multiplied with its square.
        """
        assert self.prior is not None
        factor = prior.in_units_of(self.prior).to(self.units)
        self.units, self.held, self.prior = self.units * factor, self.held * factor, prior
        return torch.where(factor > 0, 1 / factor.clamp(min=1e-30), 0.0)

    @torch.no_grad()
    def own(self, latents: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        """(n, 6) rotation vectors, shifts and log contrasts of all rows, in radians and Angstrom.

        Parameters
        ----------
        latents, rotation
            (n, K) and (n, 3, 3) of the rows.
        """
        assert self.prior is not None
        return self.prior.own(self.units, latents, rotation)

    def rescale_latents(self, matrix: torch.Tensor, offset: torch.Tensor) -> None:
        """Keep all poses while latents change: ``z_old = matrix @ z_new + offset``, (K, K) and (K,)."""
        if self.prior is not None and self.prior.frame is not None:
            self.prior = replace(self.prior, frame=self.prior.frame.rescaled(matrix, offset))

    def centre_contrast(self, rows: torch.Tensor, weight: torch.Tensor) -> float:
        """Take the mean log contrast of ``rows`` out of all rows; the factor that the map is to have instead.

        ``weight`` (b,) is that of each in the mean.
        """
        if self.prior is None or self.prior.log_contrast == 0:
            return 1.0
        mean = (weight @ self.units[rows, 5]) / weight.sum()
        self.units[:, 5] -= mean
        self.held[:, 5] -= mean
        return math.exp(float(mean) * self.prior.log_contrast)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers only."""
        widths, frame = None, None
        if self.prior is not None:
            widths, of_prior = self.prior.widths, self.prior.frame
            frame = None if of_prior is None else [of_prior.coefficients, of_prior.matrix, of_prior.offset]
        return {"units": self.units, "held": self.held, "widths": widths, "fitted": self.fitted, "frame": frame}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""
        self.units, self.held = saved["units"], saved["held"]
        frame = None if saved["frame"] is None else PoseFrame(*saved["frame"])
        self.prior = None
        if saved["widths"] is not None:
            self.prior = ViewPrior(fitted=saved["fitted"], frame=frame).with_widths(saved["widths"])
