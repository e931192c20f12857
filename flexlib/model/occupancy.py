"""Parts of the molecule that a particle has or lacks: their share of the prediction, and the marginal likelihood.

With the slices r of the whole map and s_p of part p's voxels alone, at the same pose and displacements, a particle
is predicted as ``r - sum_p a_p s_p``, where a_p is 1 if it lacks the part and 0 if it has it. The loss is a quadratic
in a, so that all 2^S states cost no more than S projections of few voxels. Nothing is thresholded: the loss of a
particle is minus the logarithm of its likelihood summed over the states, each with its prior probability.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from flexlib.images.batch import ImageBatch
from flexlib.model.forward import CoarseMap, Operator

MOST_PARTS = 4  # 16 states of a particle
_COARSE_MARGIN = 2  # voxels by which a part is widened in the coarse map, where a cropped spectrum blurs its edge


@dataclass(frozen=True)
class Parts:
    """The parts of a map at its voxels: what is projected of each, and the shares of particles that have them."""

    operators: tuple[Operator, ...]  # of each part's voxels alone
    chosen: tuple[torch.Tensor, ...]  # (m,) int64 where these stand among the map's
    share: torch.Tensor  # (S,) prior probability that a particle has the part
    coarse: Parts | None = None  # in the coarse map

    @classmethod
    def of_labels(
        cls, labels: torch.Tensor, share: torch.Tensor, operator: Operator, coarse_map: CoarseMap | None = None
    ) -> Parts:
        """The parts 1 to S of a label volume.

        Parameters
        ----------
        labels
            (box, box, box) uint8, 0 what every particle has.
        share
            (S,).
        operator, coarse_map
            That project the map, and the map in the coarse box.
        """
        masks = [labels == number for number in range(1, len(share) + 1)]
        coarse = None
        if coarse_map is not None:
            width = 2 * _COARSE_MARGIN + 1
            wide = [torch.nn.functional.max_pool3d(m[None].float(), width, 1, _COARSE_MARGIN)[0] > 0 for m in masks]
            coarse = cls.of_masks([mask[::2, ::2, ::2] for mask in wide], share, coarse_map.operator)
        return replace(cls.of_masks(masks, share, operator), coarse=coarse)

    @classmethod
    def of_masks(cls, masks: Sequence[torch.Tensor], share: torch.Tensor, operator: Operator) -> Parts:
        """The parts at (box, box, box) bool ``masks``, without coarse ones; see ``of_labels``."""
        voxels = operator.voxels
        chosen = tuple(torch.nonzero(mask.flatten()[voxels.index])[:, 0] for mask in masks)
        operators = tuple(
            replace(
                operator,
                voxels=replace(voxels, cell=voxels.cell[own], bary=voxels.bary[own], index=voxels.index[own]),
            )
            for own in chosen
        )
        return cls(operators, chosen, share)

    @property
    def log_prior(self) -> torch.Tensor:
        """(2^S,) of the states, in the order of ``absent_states``."""
        return log_prior(self.share)

    def cut(self, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The values of each part's voxels, of a map's (nvox,)."""
        return tuple(values[own] for own in self.chosen)

    def coarse_values(self, values: torch.Tensor, coarse_map: CoarseMap) -> tuple[torch.Tensor, ...]:
        """The values of each part at the coarse voxels, of the fine map's (nvox,): its own spectrum, cropped."""
        assert self.coarse is not None
        found = []
        for own, there in zip(self.chosen, self.coarse.chosen, strict=True):
            alone = torch.zeros_like(values)
            alone[own] = values[own]
            found.append(coarse_map.values(alone)[there])
        return tuple(found)

    def slices(self, values: tuple[torch.Tensor, ...], vertices_px: torch.Tensor) -> torch.Tensor:
        """(b, S, box, box//2+1) transforms of each part's views, with the mesh at ``vertices_px`` (b, nv, 2)."""
        return torch.stack([o.project(v, vertices_px) for o, v in zip(self.operators, values, strict=True)], 1)


@lru_cache(maxsize=16)
def absent_states(num_parts: int, device: torch.device | None = None) -> torch.Tensor:
    """(2^S, S) float32: which parts each state lacks; the first has all."""
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=num_parts)), device=device)


def log_prior(share: torch.Tensor) -> torch.Tensor:
    """(2^S,) log prior probability of each state, from the shares (S,) of particles that have each part."""
    absent = absent_states(len(share), share.device).to(share)
    return absent @ torch.log1p(-share) + (1 - absent) @ share.log()


@dataclass(frozen=True)
class Quadratic:
    """The loss of b particles as a function of the parts that they lack: ``square + a . cross + a . gram a / 2``."""

    square: torch.Tensor  # (b,) half the squared residual with all parts
    cross: torch.Tensor  # (b, S)
    gram: torch.Tensor  # (b, S, S)

    @classmethod
    def of_residual(cls, residual: torch.Tensor, parts: torch.Tensor, weight: torch.Tensor) -> Quadratic:
        """Of residuals (b, box, box//2+1) with all parts, and the parts' images (b, S, box, box//2+1)."""
        lone, many = _flat(residual[:, None], weight), _flat(parts, weight)
        return cls(0.5 * lone.square().sum((1, 2)), (many @ lone.transpose(1, 2))[..., 0], many @ many.transpose(1, 2))

    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All fields."""
        return self.square, self.cross, self.gram

    def of(self, rows: torch.Tensor) -> Quadratic:
        """Of some of the particles."""
        return Quadratic(self.square[rows], self.cross[rows], self.gram[rows])

    def of_part(self, part: int) -> Quadratic:
        """With all parts but one there."""
        own = slice(part, part + 1)
        return Quadratic(self.square, self.cross[:, own], self.gram[:, own, own])

    def losses(self) -> torch.Tensor:
        """(b, 2^S) nats of each state."""
        absent = absent_states(self.cross.shape[1], self.cross.device).to(self.cross)
        bent = torch.einsum("cs,bst,ct->bc", absent, self.gram, absent)
        return self.square[:, None] + self.cross @ absent.T + 0.5 * bent

    def log_joint(self, log_prior: torch.Tensor) -> torch.Tensor:
        """(b, 2^S) log prior plus log-likelihood of each state."""
        return log_prior - self.losses()

    def present(self, log_prior: torch.Tensor) -> torch.Tensor:
        """(b, S) posterior probability that a particle has each part."""
        state = torch.softmax(self.log_joint(log_prior), 1)
        return 1 - state @ absent_states(self.cross.shape[1], state.device).to(state)


def _flat(spectra: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(b, S, 2 box (box//2+1)) real numbers whose products sum to the weighted ones of ``spectra``."""
    return torch.view_as_real(spectra * weight.sqrt()).flatten(2)


def marginal_loss(
    slices: torch.Tensor, parts: torch.Tensor, batch: ImageBatch, weight: torch.Tensor, log_prior: torch.Tensor
) -> torch.Tensor:
    """(b,) minus the log-likelihood in nats up to a constant, summed over all states of the parts.

    Its gradient is the mean of the states' gradients by their posterior probabilities, exactly.

    Parameters
    ----------
    slices, parts
        (b, box, box//2+1) of the whole map and (b, S, box, box//2+1) of each part alone.
    batch
        b images; its contrast is a factor of all slices.
    weight
        (box, box//2+1), ``plane_weight`` of the band in use.
    log_prior
        (2^S,) of the states.
    """
    marginal: Any = _Marginal
    return marginal.apply(slices, parts, batch, weight, batch.contrast, log_prior)


def quadratic(slices: torch.Tensor, parts: torch.Tensor, batch: ImageBatch, weight: torch.Tensor) -> Quadratic:
    """How the loss depends on the parts; arguments as for ``marginal_loss``."""
    transfer = _seen_transfer(batch.transfer, batch.contrast)
    return Quadratic.of_residual(batch.images - transfer * slices, transfer[:, None] * parts, weight)


def _seen_transfer(transfer: torch.Tensor, contrast: torch.Tensor | None) -> torch.Tensor:
    return transfer if contrast is None else transfer * contrast[:, None, None]


class _Marginal(torch.autograd.Function):
    """See ``marginal_loss``; with its gradient written out."""

    @staticmethod
    def forward(
        ctx: Any,
        slices: torch.Tensor,
        parts: torch.Tensor,
        batch: ImageBatch,
        weight: torch.Tensor,
        contrast: torch.Tensor | None,
        log_prior: torch.Tensor,
    ) -> torch.Tensor:
        transfer = _seen_transfer(batch.transfer, contrast)
        residual, images = batch.images - transfer * slices, transfer[:, None] * parts
        joint = Quadratic.of_residual(residual, images, weight).log_joint(log_prior)
        by_contrast = contrast is not None and ctx.needs_input_grad[4]
        kept = (slices, parts) if by_contrast else (None, None)
        ctx.save_for_backward(residual, images, weight, batch.transfer, contrast, torch.softmax(joint, 1), *kept)
        return -torch.logsumexp(joint, 1)

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        residual, images, weight, transfer, contrast, state, slices, parts = ctx.saved_tensors
        absent = absent_states(images.shape[1], state.device).to(state)
        lacks, lacks_both = state @ absent, torch.einsum("bc,cs,ct->bst", state, absent, absent)
        back = transfer.conj() * weight
        by_slices = -back * (residual + torch.einsum("bs,bsyx->byx", lacks.to(images.dtype), images))
        by_parts = back[:, None] * (
            lacks[:, :, None, None] * residual[:, None]
            + torch.einsum("bst,btyx->bsyx", lacks_both.to(images.dtype), images)
        )
        by_contrast = None
        if slices is not None:
            of_slices = (torch.view_as_real(by_slices) * torch.view_as_real(slices)).sum((1, 2, 3))
            of_parts = (torch.view_as_real(by_parts) * torch.view_as_real(parts)).sum((1, 2, 3, 4))
            by_contrast = (of_slices + of_parts) * grad_loss
        factor = (grad_loss if contrast is None else grad_loss * contrast)[:, None, None]
        return by_slices * factor, by_parts * factor[:, None], None, None, by_contrast, None
