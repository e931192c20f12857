"""Images that show no particle of the model: how likely each is one, and what their share is.

Each image is a particle of the model, or it is junk: noise of the measured spectrum, as far as the model can tell. (A
particle in a wrong pose is that to the model, too.) The probability of the former follows from how much likelier it
makes the image; it weighs the image in all that is learnt. Nothing is left out.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch

from flexlib.images.batch import ImageBatch

logger = logging.getLogger(__name__)

FIRST_SHARE = 0.1  # of junk, where the iteration for its share starts
LEAST_GAIN_NATS = 10.0  # by which junk must make all images together likelier; else there is none
LEAST_SHARE, MOST_SHARE = 1e-6, 0.95  # that are learnt: a run where nothing matches goes on, and says so
SUSPICIOUS_SHARE = 0.5
LEAST_WEIGHT = 1e-3  # of an image: its own latents and pose are still looked for, it may turn out to be a particle
_ITERATIONS = 200


@dataclass
class Junk:
    """What is known of which rows are junk."""

    advantage: torch.Tensor  # (n,) nats by which each image is likelier as a particle of the model than as noise
    share: float = 0.0  # of junk; 0: every image counts in full

    @classmethod
    def none(cls, num: int, device: torch.device) -> Junk:
        """Of ``num`` rows that nothing is known of."""
        return cls(torch.zeros(num, device=device))

    def copy(self) -> Junk:
        """The same values, to be changed independently."""
        return Junk(self.advantage.clone(), self.share)

    def probability(self, rows: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """(b,) that the images of ``rows`` are particles of the model."""
        return particle_probability(self.advantage[rows], self.share)

    def learn_share(self, rows: torch.Tensor) -> None:
        """Set the share to that which makes the images of ``rows`` likeliest (EM); 0 where none is hardly less likely.

        Parameters
        ----------
        rows
            That are learnt from.
        """
        advantage, share = self.advantage[rows].double(), FIRST_SHARE
        for _ in range(_ITERATIONS):
            share = float((1.0 - particle_probability(advantage, share)).mean().clamp(LEAST_SHARE, MOST_SHARE))
        of_particles = torch.full_like(advantage, math.log1p(-share))
        gain = float(torch.logaddexp(of_particles, math.log(share) - advantage).sum())
        self.share = share if gain > LEAST_GAIN_NATS else 0.0

    def log_share(self) -> None:
        """Say how much junk there is, if any."""
        if self.share > SUSPICIOUS_SHARE:
            logger.warning(
                "%.0f %% of the images show nothing of the map: are poses, pixel size and map of one reconstruction?",
                100 * self.share,
            )
        elif self.share > 0:
            logger.info("%.1f %% of the images are junk: noise, or particles in a wrong pose", 100 * self.share)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers only."""
        return {"advantage": self.advantage, "share": self.share}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""
        self.advantage, self.share = saved["advantage"], saved["share"]


def particle_probability(advantage: torch.Tensor, share: float) -> torch.Tensor:
    """Of being a particle, for images that are likelier as one by ``advantage`` nats, where ``share`` are junk."""
    if share == 0.0:
        return torch.ones_like(advantage)
    return torch.sigmoid(advantage + math.log1p(-share) - math.log(share))


def noise_loss(batch: ImageBatch, weight: torch.Tensor) -> torch.Tensor:
    """(b,) nats of the images as noise, on the scale of ``log_likelihood_loss``: half of their weighted power.

    ``weight`` (box, box//2+1), ``plane_weight`` of the band in use.
    """
    return 0.5 * (torch.view_as_real(batch.images).square().sum(-1) * weight).sum((1, 2))
