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

import numpy as np
import torch

from flexlib.images.batch import ImageBatch
from flexlib.model.views import ROTATION, SHIFT, ViewPrior
from flexlib.particles.table import Particles

logger = logging.getLogger(__name__)

UNSEEN_NATS = 100.0  # for a particle
FIRST_SHARE = 0.1  # of junk, before anything is known
LEAST_GAIN_NATS = 10.0  # by which junk must make all images together likelier; else there is none
LEAST_SHARE, MOST_SHARE = 1e-6, 0.95  # that are learnt: a run where nothing matches goes on, and says so
SUSPICIOUS_SHARE = 0.5
LEAST_WEIGHT = 1e-3  # of an image: its own latents and pose are still looked for, it may turn out to be a particle
NUM_POSE_PARAMETERS = SHIFT.stop - ROTATION.start
MOST_LOG_ODDS = 1e4  # that are written: they are infinite where there is no junk
_ITERATIONS = 200
_LEAST_CORRELATION = 0.1  # of an image with its prediction, in units of a typical particle's


@dataclass
class Junk:
    """What is known of which rows are junk."""

    advantage: torch.Tensor  # (n,) nats by which each image is likelier as a particle of the model than as noise
    share: float = 0.0  # of junk; 0: every image counts in full
    search_nats: float = 0.0  # that noise wins, too, where its pose was searched for (``nats_of_search``)
    particles_win: float = 0.0  # nats: the mean advantage of particles

    @classmethod
    def none(cls, num: int, device: torch.device) -> Junk:
        """Of ``num`` rows that nothing is known of: they are particles until their images have been seen."""
        return cls(torch.full((num,), UNSEEN_NATS, device=device))

    @property
    def log_odds(self) -> float:
        """Of a particle against junk, before its image has been seen, less what the search for its pose wins."""
        return math.inf if self.share == 0.0 else math.log1p(-self.share) - math.log(self.share) - self.search_nats

    def probability(self, rows: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """(b,) that the images of ``rows`` are particles of the model."""
        return torch.sigmoid(self.particle_log_odds(rows))

    def particle_log_odds(self, rows: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """(b,) nats, likewise: infinite where there is no junk."""
        return self.advantage[rows] + self._wider(self.advantage[rows]) + self.log_odds

    def _wider(self, advantage: torch.Tensor) -> torch.Tensor:
        """(b,) nats that images have to pay less for a search than a typical particle: a weaker peak is a wider one.

        The curvature of the log-likelihood by the pose goes with the correlation of image and prediction: the
        advantage, and half of the prediction's power, which is also what particles win on average.
        """
        if self.search_nats == 0.0 or self.particles_win <= 0.0:
            return torch.zeros_like(advantage)
        correlation = (advantage + self.particles_win) / (2.0 * self.particles_win)
        return -0.5 * NUM_POSE_PARAMETERS * correlation.clamp(_LEAST_CORRELATION, 1.0).log()

    def learn(
        self, rows: torch.Tensor, prior: ViewPrior | None, information: torch.Tensor, particles: Particles
    ) -> None:
        """Learn the share from the images of ``rows``; the others as for ``nats_of_search``."""
        self.search_nats = nats_of_search(prior, information, particles)
        self.learn_share(rows)

    def learn_share(self, rows: torch.Tensor) -> None:
        """Set the share to that which makes the images of ``rows`` likeliest (EM); 0 where none are hardly less so."""
        advantage, self.share = self.advantage[rows].double(), FIRST_SHARE
        for _ in range(_ITERATIONS):
            probability = torch.sigmoid(advantage + self._wider(advantage) + self.log_odds)
            self.particles_win = float((probability @ advantage) / probability.sum().clamp(min=1e-30))
            self.share = float((1.0 - probability).mean().clamp(LEAST_SHARE, MOST_SHARE))
        of_particles = torch.full_like(advantage, math.log1p(-self.share))
        of_junk = math.log(self.share) - (advantage + self._wider(advantage) - self.search_nats)
        if float(torch.logaddexp(of_particles, of_junk).sum()) < LEAST_GAIN_NATS:
            self.share = 0.0

    def log_share(self) -> None:
        """Say how much junk there is, if any."""
        if self.share > SUSPICIOUS_SHARE:
            logger.warning(
                "%.0f %% of the images show nothing of the map: are poses, pixel size and map of one reconstruction?",
                100 * self.share,
            )
        elif self.share > 0:
            logger.info(
                "%.1f %% of the images are junk: noise, or particles in a wrong pose (particles win %.1f nats, "
                "and are charged %.1f for the search of their poses)",
                100 * self.share,
                self.particles_win,
                self.search_nats,
            )

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers only."""
        own = {"advantage": self.advantage, "share": self.share, "search_nats": self.search_nats}
        return own | {"particles_win": self.particles_win}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""
        self.advantage, self.share = saved["advantage"], saved["share"]
        self.search_nats, self.particles_win = saved["search_nats"], saved["particles_win"]


def noise_loss(batch: ImageBatch, weight: torch.Tensor) -> torch.Tensor:
    """(b,) nats of the images as noise, on the scale of ``log_likelihood_loss``: half of their weighted power.

    ``weight`` (box, box//2+1), ``plane_weight`` of the band in use.
    """
    return 0.5 * (torch.view_as_real(batch.images).square().sum(-1) * weight).sum((1, 2))


def nats_of_search(prior: ViewPrior | None, information: torch.Tensor, particles: Particles) -> float:
    """Nats that an image has won for any model because its pose was searched for among all poses.

    Where poses were fitted to these very images, noise has been given the pose in which it looks most like a particle.
    What an image says for a particle is its likelihood averaged over all poses. A prior about the pose that was found
    makes it more, by the volume of all rotations and of the shifts that occur over that which the image leaves its
    pose, less half a nat a parameter: as much it costs, on average, that the best pose is not the one that was found.

    Parameters
    ----------
    prior
        Of poses and contrasts.
    information
        (n, 6, 6) of the view parameters, in units of the prior's widths.
    particles
        Whose shifts, and rows of one image, tell the volume.
    """
    if prior is None or not prior.fitted or not prior.refines_poses:
        return 0.0
    copies = len(particles.image_index) / len(np.unique(particles.image_index))
    rotations = 8 * math.pi**2 / copies
    shifts = 2 * math.pi * float(np.mean((particles.origin_A - particles.origin_A.mean(0)) ** 2))
    units = (prior.rotation_rad**3, prior.shift_A**2)
    poses = information[:, ROTATION.start : SHIFT.stop, ROTATION.start : SHIFT.stop].double()
    poses = poses + 1e-6 * torch.eye(poses.shape[1], dtype=poses.dtype, device=poses.device)
    held = poses + torch.eye(poses.shape[1], dtype=poses.dtype, device=poses.device)
    narrower = 0.5 * float((torch.logdet(poses) - torch.logdet(held)).median())
    volumes = rotations / (2 * math.pi) ** 1.5 / units[0], shifts / (2 * math.pi) / units[1]
    return max(math.log(volumes[0] * volumes[1]) + narrower - 0.5 * NUM_POSE_PARAMETERS, 0.0)
