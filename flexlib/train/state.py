"""What a run changes. Every field of the state, and nothing else, is in a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from flexlib.distributed import Ranks
from flexlib.model.flow import AssembledFlow, FlowGenerator
from flexlib.model.forward import CoarseMap, MovingMap, Operator
from flexlib.train.canonical import CanonicalMap
from flexlib.train.latents import LatentScale
from flexlib.train.spectral import SpectralStart


@dataclass
class State:
    """What a run changes."""

    flow: FlowGenerator
    optimiser: torch.optim.Optimizer
    canonical: CanonicalMap
    latents: torch.Tensor  # (n, K)
    information: torch.Tensor  # (n, K, K) Fisher information of each latent, without the prior
    held_latents: torch.Tensor  # (validation rows, K) from half the Fourier pixels
    rigid_values: torch.Tensor  # (nvox of the rigid operator,)
    spectrum: SpectralStart
    given_latents: torch.Tensor | None  # (n, K) in the user's own scale, where they are frozen
    log: list[dict[str, float]]
    information_ratio: float = 1.0  # of the full box to the coarse map
    epoch: int = 0  # epochs done
    step: int = 0  # mini-batches of the next epoch done
    anneal_from: int | None = None  # epoch at which annealing started
    totals: torch.Tensor | None = None  # (2,) loss and rigidity energy, summed over the particles of a part epoch
    wall_s: float = 0.0

    def checkpoint(self) -> dict[str, Any]:
        """All fields, as ``torch.save`` writes and ``weights_only`` reads them."""
        return {item.name: _packed(getattr(self, item.name)) for item in fields(self)}

    def restore(self, saved: dict[str, Any]) -> None:
        """Take over the fields of a checkpoint."""
        for item in fields(self):
            current = getattr(self, item.name)
            if hasattr(current, "load_state_dict"):
                current.load_state_dict(saved[item.name])
            else:
                setattr(self, item.name, saved[item.name])
        self.spectrum = SpectralStart.from_state_dict(saved["spectrum"])

    def follow_first(self, ranks: Ranks) -> None:
        """Take the first rank's flow, map and latents: what ranks compute alike may differ in the last bit."""
        ranks.follow_first(*self.flow.state_dict().values(), self.canonical.values, self.latents)

    def moving_map(self, operator: Operator, coarse: CoarseMap | None, flow: AssembledFlow | None = None) -> MovingMap:
        """Flow and map as they stand (``flow`` if it is assembled already)."""
        flow = self.flow.assembled() if flow is None else flow
        return MovingMap(operator, flow, self.canonical.values, coarse, self.information_ratio)

    @torch.no_grad()
    def change_latents(self, scale: LatentScale) -> None:
        """Bring all latents to the coordinates that ``scale`` leads to; no displacement changes."""
        self.flow.rescale_latents(scale.matrix, scale.offset)
        self.latents, self.held_latents = scale.to_new(self.latents), scale.to_new(self.held_latents)
        self.information = scale.matrix.T @ self.information @ scale.matrix


def _packed(value: Any) -> Any:
    return value.state_dict() if hasattr(value, "state_dict") else value
