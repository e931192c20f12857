"""Which parts of a run's map particles may lack: where they are, and the shares of particles that have them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from flexlib.model.forward import CoarseMap, Operator
from flexlib.model.occupancy import Parts


@dataclass
class Occupancy:
    """The parts of a run's map that particles may lack; none at first."""

    labels: torch.Tensor  # (box, box, box) uint8: 0 what all particles have, 1 to S the parts
    share: torch.Tensor  # (S,) float32 of the particles that have each part
    segments: list[int] = field(default_factory=list)  # of the mesh that the parts are, where the settings name them
    _parts: dict[tuple[int, bool], Parts] = field(default_factory=dict, repr=False)  # by operator, and with coarse ones

    @classmethod
    def none(cls, box: int, device: torch.device) -> Occupancy:
        """All particles have all of the map."""
        return cls(torch.zeros((box,) * 3, dtype=torch.uint8, device=device), torch.zeros(0, device=device))

    def __len__(self) -> int:
        return len(self.share)

    def on(self, operator: Operator, coarse: CoarseMap | None) -> Parts | None:
        """The parts of a map that ``operator`` projects; None where there are none."""
        if not len(self):
            return None
        key = (id(operator), coarse is not None)
        if key not in self._parts:
            self._parts[key] = Parts.of_labels(self.labels, self.share, operator, coarse)
        return self._parts[key]

    def take(self, labels: torch.Tensor, share: torch.Tensor) -> None:
        """Other parts, or the same ones elsewhere."""
        self.labels, self.share = labels, share
        self._parts.clear()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers only."""
        return {"labels": self.labels, "share": self.share, "segments": self.segments}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""
        self.segments = saved["segments"]
        self.take(saved["labels"], saved["share"])
