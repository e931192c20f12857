"""What a run changes. Every field of the state, and nothing else, is in a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from flexlib.distributed import Ranks
from flexlib.model.flow import AssembledFlow, FlowGenerator
from flexlib.model.forward import CoarseMap, Operator
from flexlib.model.moving_map import MovingMap, Ratios
from flexlib.model.views import PoseFrame, ViewPrior
from flexlib.train.canonical import CanonicalMap
from flexlib.train.junk import Junk
from flexlib.train.latents import LatentScale
from flexlib.train.parts import Occupancy
from flexlib.train.spectral import SpectralStart
from flexlib.train.views import Views


@dataclass
class State:
    """What a run changes."""

    flow: FlowGenerator
    optimiser: torch.optim.Optimizer
    canonical: CanonicalMap
    latents: torch.Tensor  # (n, K)
    views: Views  # poses and contrasts under the flexible model
    information: torch.Tensor  # (n, K + V, K + V) Fisher information on latents and views, without the prior
    held_rows: torch.Tensor  # (v,) the validation rows
    held_latents: torch.Tensor  # (v, K) from half the Fourier pixels
    rigid_values: torch.Tensor  # (nvox of the rigid operator,)
    rigid_views: Views  # under the rigid map
    junk: Junk  # which rows show no particle
    spectrum: SpectralStart
    occupancy: Occupancy  # parts that particles may lack
    given_latents: torch.Tensor | None  # (n, K) in the user's own scale, where they are frozen
    log: list[dict[str, float]]
    information_ratios: Ratios = (1.0, 1.0, 1.0, 1.0)  # of the full box to the coarse map
    epoch: int = 0  # epochs done
    step: int = 0  # mini-batches of the next epoch done
    anneal_from: int | None = None  # epoch at which annealing started
    totals: torch.Tensor | None = None  # (2,) loss and rigidity energy, summed over the particles of a part epoch
    wall_s: float = 0.0
    slowed: float = 1.0  # factor on all rates: below 1 after a divergence

    def checkpoint(self) -> dict[str, Any]:
        """All fields, as ``torch.save`` writes and ``weights_only`` reads them."""
        return {item.name: _packed(getattr(self, item.name)) for item in fields(self)}

    def restore(self, saved: dict[str, Any]) -> None:
        """Take over the fields of a checkpoint."""
        saved = {"slowed": 1.0} | saved  # older ones lack it
        for item in fields(self):
            current = getattr(self, item.name)
            if hasattr(current, "load_state_dict"):
                current.load_state_dict(saved[item.name])
            else:
                setattr(self, item.name, saved[item.name])
        self.spectrum = SpectralStart.from_state_dict(saved["spectrum"])
        prior = self.views.prior
        if prior is not None and prior.frame is not None:
            self.views.prior = replace(prior, frame=replace(prior.frame, bend=self.flow.frame_motion))

    def follow_first(self, ranks: Ranks) -> None:
        """Take the first rank's flow, map and latents: what ranks compute alike may differ in the last bit."""
        of_rows = self.latents, self.views.units, self.junk.advantage
        ranks.follow_first(*self.flow.state_dict().values(), self.canonical.values, *of_rows)

    def particles_of(self, rows: torch.Tensor) -> torch.Tensor:
        """Those of ``rows`` that are likelier particles than junk; all, where hardly any is."""
        likely = rows[self.junk.probability(rows) >= 0.5]
        return likely if len(likely) > self.latents.shape[1] + 1 else rows

    def all_particles(self) -> torch.Tensor:
        """Of all rows."""
        return self.particles_of(torch.arange(len(self.latents), device=self.latents.device))

    def moving_map(self, operator: Operator, coarse: CoarseMap | None, flow: AssembledFlow | None = None) -> MovingMap:
        """Flow and map as they stand (``flow`` if it is assembled already), with the parts that particles may lack."""
        flow = self.flow.assembled() if flow is None else flow
        own = self.occupancy.on(operator, coarse)
        return MovingMap(operator, flow, self.canonical.values, coarse, self.information_ratios, self.views.prior, own)

    def parameters(self, rows: torch.Tensor) -> torch.Tensor:
        """(b, K + V) latents and views of ``rows``."""
        return torch.cat([self.latents[rows], self.views.units[rows]], 1)

    def set_parameters(self, rows: torch.Tensor, parameters: torch.Tensor) -> None:
        """Change latents and views of ``rows`` to ``parameters`` (b, K + V)."""
        dims = self.latents.shape[1]
        self.latents[rows], self.views.units[rows] = parameters[:, :dims], parameters[:, dims:]

    def held_parameters(self) -> torch.Tensor:
        """(validation rows, K + V) from half the Fourier pixels."""
        return torch.cat([self.held_latents, self.views.held], 1)

    def hold(self, parameters: torch.Tensor, rigid_views: torch.Tensor) -> None:
        """Remember what half the Fourier pixels say of the held-out rows: (v, K + V) and (v, V)."""
        dims = self.latents.shape[1]
        self.held_latents, self.views.held = parameters[:, :dims], parameters[:, dims:]
        self.rigid_views.held = rigid_views

    @torch.no_grad()
    def change_latents(self, scale: LatentScale) -> None:
        """Bring all latents to the coordinates that ``scale`` leads to; no displacement changes."""
        self.rescale_latents(scale.matrix, scale.offset)
        self.latents, self.held_latents = scale.to_new(self.latents), scale.to_new(self.held_latents)
        matrix = torch.block_diag(scale.matrix, torch.eye(self.views.num, device=scale.matrix.device))
        self.information = matrix.T @ self.information @ matrix

    def rescale_latents(self, matrix: torch.Tensor, offset: torch.Tensor) -> None:
        """Make flow and frame those of other latents: ``z_old = matrix @ z_new + offset``, (K, K) and (K,)."""
        self.flow.rescale_latents(matrix, offset)
        self.views.rescale_latents(matrix, offset)

    @torch.no_grad()
    def take_frame(self, frame: PoseFrame, rotation: torch.Tensor) -> None:
        """Take another mean of the poses, of rows with ``rotation`` (n, 3, 3); no pose changes."""
        prior, held = self.views.prior, self.held_rows
        assert prior is not None
        self.views.units = prior.in_frame(frame, self.views.units, self.latents, rotation)
        self.views.held = prior.in_frame(frame, self.views.held, self.held_latents, rotation[held])
        self.views.prior = replace(prior, frame=frame)

    @torch.no_grad()
    def change_widths(self, prior: ViewPrior) -> None:
        """Take other widths of the view parameters; no pose or contrast changes."""
        root = self.views.rescale(prior)
        root = torch.cat([torch.ones(self.latents.shape[1], device=root.device), root])
        self.information = self.information * (root[:, None] * root)


def _packed(value: Any) -> Any:
    return value.state_dict() if hasattr(value, "state_dict") else value
