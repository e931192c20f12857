"""How well the motion is known: by voxel, by particle, and by region of latent space.

Two errors add up. What the flow does not know: two models, each of half the particles, see the same image and differ;
errors of independent models of half the particles have twice the variance each of one of all, so a quarter of the
squared difference is that model's. And what the image does not tell: the posterior of the latents, carried by the flow.
What all models share, such as what the rigidity or the mesh keeps them from following, shows in neither.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from flexlib.model.flex_model import FlexModel
from flexlib.validate.common_frame import CommonFrame, Flow, slopes_A

MOST_REGIONS, LEAST_IN_REGION = 12, 50
PROBED = 0.1  # of a latent's standard deviation, to see what it moves
SHARED_BY_HALVES = 0.25  # of the squared difference of two half-set models is the squared error of that of all


@dataclass(frozen=True)
class MotionError:
    """Squared errors and motion about the mean over the particles, in square Angstrom."""

    model_A2: np.ndarray  # (nv,) what the flow does not know
    image_A2: np.ndarray  # (nv,) what the images do not tell
    motion_A2: np.ndarray  # (nv,) how far the vertex moves
    particle_model_A2: np.ndarray  # (n,) likewise, over the density
    particle_image_A2: np.ndarray  # (n,)
    particle_motion_A2: np.ndarray  # (n,)

    @property
    def error_A2(self) -> np.ndarray:
        """(nv,) of both."""
        return self.model_A2 + self.image_A2

    @property
    def particle_error_A2(self) -> np.ndarray:
        """(n,) of both."""
        return self.particle_model_A2 + self.particle_image_A2


@torch.no_grad()
def motion_error(frame: CommonFrame, model: FlexModel, weight: np.ndarray) -> MotionError:
    """The error of ``model``'s motion.

    Parameters
    ----------
    frame
        Two models of half the particles each.
    model
        That of all particles.
    weight
        (n,) with which each particle counts in the sums by vertex.
    """
    num, share = len(model.latents), frame.density_share
    rows, weight = np.arange(num), weight / weight.sum(dtype=np.float64)
    flow = model.flow.assembled()
    first, second, own = _means(frame, (model, flow), rows, weight)
    at_vertices = [np.zeros(len(share)) for _ in range(3)]
    of_particles = [np.zeros(num) for _ in range(3)]
    for some, one, other in frame.pairs(rows):
        latents = torch.as_tensor(model.latents[some])
        differing = (one - first) - (other - second)
        moved = frame.comparable(flow(latents)) - own
        squares = (
            SHARED_BY_HALVES * differing.square().sum(2),
            _carried_variance_A2(frame, model, flow, some),
            moved.square().sum(2),
        )
        for at_vertex, of_particle, square in zip(at_vertices, of_particles, squares, strict=True):
            at_vertex += (torch.as_tensor(weight[some]).float() @ square).double().numpy()
            of_particle[some] = (square @ share).double().numpy()
    return MotionError(*at_vertices, *of_particles)


def _means(
    frame: CommonFrame, whole: tuple[FlexModel, Flow], rows: np.ndarray, weight: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(nv, 3) mean comparable fields of both models and of that of all particles."""
    model, flow = whole
    means = [torch.zeros_like(frame.shift_A, dtype=torch.float64) for _ in range(3)]
    for some, one, other in frame.pairs(rows):
        own = frame.comparable(flow(torch.as_tensor(model.latents[some])))
        for mean, fields in zip(means, (one, other, own), strict=True):
            mean += torch.einsum("b,bvd->vd", torch.as_tensor(weight[some]), fields.double())
    first, second, own = (mean.float() for mean in means)
    return first, second, own


def _carried_variance_A2(frame: CommonFrame, model: FlexModel, flow: Flow, rows: np.ndarray) -> torch.Tensor:
    """(b, nv) variance of the displacement by the latents' posteriors."""
    latents = torch.as_tensor(model.latents[rows])
    assert model.latent_covariance is not None
    slopes = slopes_A(lambda z: frame.comparable(flow(z)), latents, PROBED * spread_of(model))
    covariance = torch.as_tensor(model.latent_covariance[rows])
    return torch.einsum("bkvd,bkl,blvd->bv", slopes, covariance, slopes).clamp(min=0.0)


def spread_of(model: FlexModel) -> float:
    """Standard deviation of the latents over particles and axes; 1 where they do not vary."""
    return float(model.latents.std()) or 1.0


@dataclass(frozen=True)
class Region:
    """Particles whose latents lie near each other."""

    centre: np.ndarray  # (K,)
    rows: np.ndarray
    error_A: float
    model_error_A: float
    motion_A: float  # rms distance from the mean shape


def latent_regions(latents: np.ndarray, seed: int = 0) -> np.ndarray:
    """(n,) region of latent space of each particle, by k-means."""
    from scipy.cluster.vq import kmeans2

    count = min(MOST_REGIONS, max(1, len(latents) // LEAST_IN_REGION))
    _, label = kmeans2(latents.astype(np.float64), count, minit="++", seed=np.random.default_rng(seed))
    return label


def errors_by_region(errors: MotionError, latents: np.ndarray, label: np.ndarray) -> list[Region]:
    """The rms errors and motion of the particles in each region, the largest first."""
    regions = []
    for number in np.unique(label):
        rows = np.flatnonzero(label == number)
        of_rows = [
            float(np.sqrt(values[rows].mean()))
            for values in (errors.particle_error_A2, errors.particle_model_A2, errors.particle_motion_A2)
        ]
        regions.append(Region(latents[rows].mean(0), rows, *of_rows))
    return sorted(regions, key=lambda region: -len(region.rows))
