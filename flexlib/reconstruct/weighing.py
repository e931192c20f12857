"""What an image has to say where it may be junk, and where its particle may lack a part.

Both are hidden, with posterior probabilities from the training, and the map minimises the expected squared residual. An
image that shows a particle with probability p counts p times. A part s that is there with probability q_s (parts
independently) makes of the residual of an image X with transfer function T, P_s being the part's projection::

    E |X - T (P_0 + sum_s g_s P_s)|^2 = |X - T (P_0 + sum_s q_s P_s)|^2 + sum_s q_s (1 - q_s) |T P_s|^2

so that particles without a part say nothing of it, and it comes out at the contrast of those that have it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch

from flexlib.images.batch import ImageBatch, ImageSource
from flexlib.model.forward import Operator

LEAST_MEAN = 0.05  # presence that a part is assumed to have on average, in the scale of the unknowns


class WeighedImages:
    """Images that count as often as the probability that they show a particle, (n,).

    Image and transfer function are multiplied by its square root, and so are all sums over images by itself.
    """

    def __init__(self, source: ImageSource, probability: np.ndarray) -> None:
        self._source = source
        self._root = np.sqrt(probability.astype(np.float32))
        self.box, self.pixel_size_A = source.box, source.pixel_size_A
        self.half_set, self.particles = source.half_set, source.particles

    def __len__(self) -> int:
        return len(self._source)

    def batch(self, rows: np.ndarray, device: torch.device | str = "cpu") -> ImageBatch:
        """See ``batch.ImageSource``."""
        batch = self._source.batch(rows, device)
        root = self._root_of(batch)
        return replace(batch, images=batch.images * root, transfer=batch.transfer * root)

    def geometry(self, rows: np.ndarray, device: torch.device | str = "cpu") -> ImageBatch:
        """As ``batch``, without the images."""
        batch = getattr(self._source, "geometry", self._source.batch)(rows, device)
        return replace(batch, transfer=batch.transfer * self._root_of(batch))

    def _root_of(self, batch: ImageBatch) -> torch.Tensor:
        return torch.as_tensor(self._root[batch.rows], device=batch.transfer.device)[:, None, None]


@dataclass(frozen=True, kw_only=True)
class OccupancyOperator(Operator):
    """Voxels in groups: what is always there, and parts that each particle has with a known probability."""

    groups: tuple[Operator, ...]  # each of its own voxels; one without voxels is left out
    members: tuple[torch.Tensor, ...]  # (nvox_g,) int64 of each: which of all voxels they are
    present: np.ndarray  # (n, G) float32: the probability that the particle of a row has the group

    @classmethod
    def of_labels(cls, operator: Operator, labels: np.ndarray, occupancy: np.ndarray) -> Self:
        """From (nvox,) labels of the operator's voxels, 0 or 1 to S, and (n, S) probabilities of the parts."""
        present = np.concatenate([np.ones((len(occupancy), 1)), occupancy], 1).astype(np.float32)
        found = [label for label in range(present.shape[1]) if (labels == label).any()]
        members = [torch.as_tensor(np.flatnonzero(labels == label)) for label in found]
        members = [rows.to(operator.voxels.index.device) for rows in members]
        return cls(
            vertices_A=operator.vertices_A,
            voxels=operator.voxels,
            pixel_size_A=operator.pixel_size_A,
            accuracy=operator.accuracy,
            groups=tuple(_part_of(operator, rows) for rows in members),
            members=tuple(members),
            present=present[:, found],
        )

    def of_rows(self, rows: np.ndarray) -> torch.Tensor:
        """(b, G, 1, 1) probabilities of ``rows``."""
        return torch.as_tensor(self.present[rows][:, :, None, None]).to(self.vertices_A)

    def unknowns_scale(self, rows: np.ndarray) -> torch.Tensor:
        """(nvox,) by which unknowns are scaled, so that all of them are seen equally well in a half-set's ``rows``.

        Without it the prior would shrink a part that is rarely there more than the rest.
        """
        mean = self.present[rows].mean(0, dtype=np.float64).clip(min=LEAST_MEAN)
        scale = torch.empty(len(self.voxels.index)).to(self.vertices_A)
        for members, value in zip(self.members, mean, strict=True):
            scale[members] = float(value**-0.5)
        return scale

    def expected_normal(
        self, values: torch.Tensor, weight: torch.Tensor, vertices_px: torch.Tensor, present: torch.Tensor
    ) -> torch.Tensor:
        """(nvox,) half the gradient of the expected squared residual's quadratic part by ``values`` (nvox,).

        Parameters
        ----------
        weight
            (b, N, N//2+1) |T|^2.
        vertices_px
            (b, nv, 2).
        present
            (b, G, 1, 1).
        """
        projected = [
            group.project(values[members], vertices_px)
            for group, members in zip(self.groups, self.members, strict=True)
        ]
        mean = sum(present[:, g] * one for g, one in enumerate(projected))
        parts = [present[:, g] * weight * (mean + (1 - present[:, g]) * one) for g, one in enumerate(projected)]
        return self._adjoint(parts, vertices_px)

    def expected_adjoint(self, spectra: torch.Tensor, vertices_px: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """(nvox,) adjoint of what particles are expected to show, from (b, N, N//2+1) spectra."""
        return self._adjoint([present[:, g] * spectra for g in range(len(self.groups))], vertices_px)

    def _adjoint(self, spectra: list[torch.Tensor], vertices_px: torch.Tensor) -> torch.Tensor:
        result = vertices_px.new_empty(len(self.voxels.index))
        for group, members, one in zip(self.groups, self.members, spectra, strict=True):
            result[members] = group.project_adjoint(one, vertices_px)
        return result


def _part_of(operator: Operator, members: torch.Tensor) -> Operator:
    """The operator of some of its voxels; they stay in order, as cells have to."""
    voxels = operator.voxels
    chosen = replace(
        voxels, cell=voxels.cell[members], bary=voxels.bary[members].contiguous(), index=voxels.index[members]
    )
    return replace(operator, voxels=chosen)
