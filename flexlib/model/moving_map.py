"""A map in motion: what predicts a particle's image from its latents and its view, and how well they can be told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import torch

from flexlib.images.batch import ImageBatch
from flexlib.model.forward import CoarseMap, Operator, log_likelihood_loss
from flexlib.model.occupancy import Parts, Quadratic, marginal_loss, quadratic
from flexlib.model.views import CONTRAST, NUM_VIEW_PARAMETERS, ROTATION, SHIFT, ViewPrior, shift_slopes

Flow = Callable[[torch.Tensor], torch.Tensor]
"""latents (b, K) -> displacements (b, nv, 3) in Angstrom."""

LATENT_PROBE = 0.05  # forward difference by a latent
PROBE_BYTES = 2**27  # of images that are projected at once to probe their parameters

Ratios = tuple[float, float, float, float]
"""Of the information in the full box to that in the coarse one: on latents, rotation, shift and contrast."""


@dataclass(frozen=True)
class MovingMap:
    """What predicts a particle's image from its parameters (b, P): a map, a flow, and how they are projected.

    The parameters are K latents and, where ``views`` has a prior, six of the view (``model/views.py``).
    """

    operator: Operator
    flow: Flow | None  # None: a map at rest, without latents
    values: torch.Tensor  # (nvox,)
    coarse_map: CoarseMap | None = None  # where there is one, the search and the information use it
    information_ratios: Ratios = (1.0, 1.0, 1.0, 1.0)  # what finer shells add is nearly common to all
    views: ViewPrior | None = None
    parts: Parts | None = None  # that a particle may lack
    own_part_values: tuple[torch.Tensor, ...] | None = None  # of each part's voxels, where they are not the map's

    @cached_property
    def coarse(self) -> MovingMap:
        """The same in the coarse box."""
        assert self.coarse_map is not None
        smaller = MovingMap(self.coarse_map.operator, self.flow, self.coarse_map.values(self.values), views=self.views)
        if self.parts is None:
            return smaller
        cut = self.parts.coarse_values(self.values, self.coarse_map)
        return replace(smaller, parts=self.parts.coarse, own_part_values=cut)

    @cached_property
    def part_values(self) -> tuple[torch.Tensor, ...]:
        """Of each part's voxels."""
        assert self.parts is not None
        return self.parts.cut(self.values) if self.own_part_values is None else self.own_part_values

    def latent_dims(self, parameters: torch.Tensor) -> int:
        """K of parameters (b, P)."""
        return parameters.shape[1] - (0 if self.views is None else NUM_VIEW_PARAMETERS)

    def seen(self, batch: ImageBatch, parameters: torch.Tensor) -> ImageBatch:
        """``batch`` at the poses and contrasts of ``parameters``."""
        if self.views is None:
            return batch
        latents, units = parameters.tensor_split([self.latent_dims(parameters)], 1)
        return self.views.seen(batch, units, latents, self.operator.pixel_size_A)

    def displacements_A(self, parameters: torch.Tensor) -> torch.Tensor | None:
        """(b, nv, 3) Angstrom; None where nothing moves."""
        return None if self.flow is None else self.flow(parameters[:, : self.latent_dims(parameters)])

    def loss(self, batch: ImageBatch, weight: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
        """(b,) nats at parameters (b, P): see ``loss_at``."""
        return self.loss_at(self.seen(batch, parameters), self.displacements_A(parameters), weight)

    def loss_at(self, seen: ImageBatch, displacements_A: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
        """(b,) nats at the poses and contrasts of ``seen`` and displacements (b, nv, 3).

        ``log_likelihood_loss``; where the map has parts that particles may lack, ``marginal_loss`` over them.
        """
        if self.parts is None:
            return log_likelihood_loss(self.operator, self.values, seen, displacements_A, weight)
        return marginal_loss(*self.both_slices(seen, displacements_A), seen, weight, self.parts.log_prior)

    def prediction_loss(
        self, batch: ImageBatch, known: torch.Tensor, unknown: torch.Tensor, parameters: torch.Tensor
    ) -> torch.Tensor:
        """(b,) nats with which Fourier pixels of the weight ``unknown`` are predicted at parameters (b, P).

        What those of the weight ``known`` say of the parts is used.
        """
        if self.parts is None:
            return self.loss(batch, unknown, parameters)
        seen = self.seen(batch, parameters)
        slices = self.both_slices(seen, self.displacements_A(parameters))
        prior = quadratic(*slices, seen, known).log_joint(self.parts.log_prior)
        both = prior - quadratic(*slices, seen, unknown).losses()
        return torch.logsumexp(prior, 1) - torch.logsumexp(both, 1)

    def quadratic(self, batch: ImageBatch, weight: torch.Tensor, parameters: torch.Tensor) -> Quadratic:
        """How the loss of b particles depends on the parts that they have, at parameters (b, P)."""
        seen = self.seen(batch, parameters)
        return quadratic(*self.both_slices(seen, self.displacements_A(parameters)), seen, weight)

    def both_slices(self, seen: ImageBatch, displacements_A: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(b, box, box//2+1) of the whole map and (b, S, box, box//2+1) of its parts, without contrast."""
        assert self.parts is not None
        vertices_px = self.operator.vertices_px(seen, displacements_A)
        return self.operator.project(self.values, vertices_px), self.parts.slices(self.part_values, vertices_px)

    def information(
        self, batch: ImageBatch, weight: torch.Tensor, parameters: torch.Tensor, fixed: int = 0
    ) -> torch.Tensor:
        """(b, P, P) Fisher information at parameters (b, P), in the coarse box if there is one, at a tenth of the cost.

        On the IgG set standard deviations by it differ by 8 % rms from ``fisher_information``'s (4 % with K = 8). Of
        the first ``fixed`` parameters it is zero: they are known.
        """
        if self.coarse_map is None:
            return fisher_information(self, batch, weight, parameters, fixed)
        coarse_batch, coarse_weight = self.coarse_map.batch(batch), self.coarse_map.weight(weight)
        small = fisher_information(self.coarse, coarse_batch, coarse_weight, parameters, fixed)
        if self.views is None:
            return self.information_ratios[0] * small
        return _ratio_matrix(self.information_ratios, self.latent_dims(parameters), str(small.device)) * small


@torch.no_grad()
def fisher_information(
    model: MovingMap,
    batch: ImageBatch,
    weight: torch.Tensor,
    parameters: torch.Tensor,
    fixed: int = 0,
    probe: float = LATENT_PROBE,
) -> torch.Tensor:
    """(b, P, P) information of the images on their parameters (b, P).

    Latents (by steps of ``probe``) and rotations by forward differences, shifts and contrasts by the slices
    themselves. The first ``fixed`` parameters are left out: zeros. A part that the particle may lack counts with its
    posterior probability at ``parameters``, as if it were there in part: an approximation, exact where the images say
    whether it is there.
    """
    lacks = None
    if model.parts is not None:
        lacks = 1 - model.quadratic(batch, weight, parameters).present(model.parts.log_prior)
    dims = model.latent_dims(parameters)
    probes = {axis: probe for axis in range(fixed, dims)}
    if model.views is not None and model.views.rotation_rad > 0:  # a quarter pixel, a quarter box from the centre
        turn = 1.0 / model.operator.voxels.box / model.views.rotation_rad
        probes |= {axis: turn for axis in range(dims, dims + 3)}
    base, slopes = _slices_and_slopes(model, batch, parameters, lacks, probes)
    if model.views is not None:
        by_latents, by_rotation = slopes.tensor_split([dims - fixed], 1)
        slopes = torch.cat([by_latents, _view_slopes(model, base, by_rotation)], 1)
    tangent = torch.view_as_real(slopes * (batch.transfer * weight.sqrt())[:, None]).flatten(2)
    known = tangent @ tangent.transpose(1, 2)
    if not fixed:
        return known
    whole = known.new_zeros((len(known), parameters.shape[1], parameters.shape[1]))
    whole[:, fixed:, fixed:] = known
    return whole


def _slices(model: MovingMap, batch: ImageBatch, parameters: torch.Tensor, lacks: torch.Tensor | None) -> torch.Tensor:
    """(b, box, box//2+1) transforms of the views, contrast included, without the part (b, S) of each part."""
    seen = model.seen(batch, parameters)
    if lacks is None:
        slices = model.operator.slices(model.values, seen, model.displacements_A(parameters))
    else:
        slices, parts = model.both_slices(seen, model.displacements_A(parameters))
        slices = slices - (lacks[:, :, None, None] * parts).sum(1)
    return slices if seen.contrast is None else slices * seen.contrast[:, None, None]


def _slices_and_slopes(
    model: MovingMap,
    batch: ImageBatch,
    parameters: torch.Tensor,
    lacks: torch.Tensor | None,
    probes: dict[int, float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """(b, box, box//2+1) as ``_slices``, and their forward differences (b, m, ...) by some of the parameters.

    ``probes`` are the steps. As many at once as memory allows: a GPU waits for its host with fewer.
    """
    moved = parameters.repeat(1 + len(probes), 1, 1)
    for number, (axis, step) in enumerate(probes.items(), 1):
        moved[number, :, axis] += step
    at_once = max(1, PROBE_BYTES // (4 * len(parameters) * model.operator.voxels.box**2))
    slices = torch.cat([_slices_at(model, batch, some, lacks) for some in moved.split(at_once)])
    slopes = [(there - slices[0]) / step for there, step in zip(slices[1:], probes.values(), strict=True)]
    return slices[0], torch.stack(slopes, 1) if slopes else slices[0][:, None][:, :0]


def _slices_at(
    model: MovingMap, batch: ImageBatch, parameters: torch.Tensor, lacks: torch.Tensor | None
) -> torch.Tensor:
    """(m, b, box, box//2+1) ``_slices`` of the batch at each of m parameters (m, b, P)."""
    times = len(parameters)
    again = replace(
        batch,
        rows=np.tile(batch.rows, times),
        rotation=batch.rotation.repeat(times, 1, 1),
        origin_px=batch.origin_px.repeat(times, 1),
        contrast=None if batch.contrast is None else batch.contrast.repeat(times),
    )
    lacked = None if lacks is None else lacks.repeat(times, 1)
    return _slices(model, again, parameters.flatten(0, 1), lacked).unflatten(0, (times, -1))


def _view_slopes(model: MovingMap, base: torch.Tensor, by_rotation: torch.Tensor) -> torch.Tensor:
    """(b, 6, box, box//2+1) derivatives of the slices ``base`` by the view's parameters: zero where one has no width.

    ``by_rotation`` (b, 3, box, box//2+1); (b, 0, ...) where rotations have none.
    """
    assert model.views is not None
    views, slopes = model.views, base.new_zeros((len(base), NUM_VIEW_PARAMETERS, *base.shape[1:]))
    if views.rotation_rad > 0:
        slopes[:, ROTATION] = by_rotation
    if views.shift_A > 0:
        slopes[:, SHIFT] = views.shift_A * shift_slopes(base, model.operator.pixel_size_A)
    if views.log_contrast > 0:
        slopes[:, CONTRAST] = views.log_contrast * base[:, None]
    return slopes


@lru_cache(maxsize=64)
def _ratio_matrix(ratios: Ratios, latent_dims: int, device: str) -> torch.Tensor:
    """(P, P) factors of the information on all parameters; copied to a device once, since a copy waits for a GPU."""
    counts = torch.tensor([latent_dims, 3, 2, 1])
    root = torch.tensor(ratios).sqrt().repeat_interleave(counts)
    return (root[:, None] * root).to(device)


@torch.no_grad()
def completed(model: MovingMap, batch: ImageBatch, weight: torch.Tensor) -> ImageBatch:
    """``batch`` as a map at rest sees it, with what its particles lack, by their posterior probability, added."""
    assert model.parts is not None
    slices, parts = model.both_slices(batch, None)
    lacks = 1 - quadratic(slices, parts, batch, weight).present(model.parts.log_prior)
    return replace(batch, images=batch.images + batch.transfer * (lacks[:, :, None, None] * parts).sum(1))
