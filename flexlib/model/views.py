"""What an image's pose and contrast may differ by from the input's: the view parameters, and their prior.

A particle has six besides its latents: a rotation (3) and a shift (2) in the frame of its view, and the logarithm of a
contrast. Their prior is normal with zero mean; its standard deviations, the widths, are learnt. Everywhere in training
the six stand behind the latents, (b, K + 6), in units of their widths, so that the prior of each is the unit normal;
a width of zero switches its parameters off.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from flexlib.images.batch import ImageBatch
from flexlib.imaging.fourier import wavenumbers
from flexlib.particles.pose_change import PoseChange

NUM_VIEW_PARAMETERS = 6
ROTATION, SHIFT, CONTRAST = slice(0, 3), slice(3, 5), slice(5, 6)


@dataclass(frozen=True)
class ViewPrior:
    """Widths of the view parameters' normal priors."""

    rotation_rad: float = 0.0  # of each of three components
    shift_A: float = 0.0  # of each of two
    log_contrast: float = 0.0

    @property
    def widths(self) -> torch.Tensor:
        """(6,) float32, in radians, Angstrom and of the logarithm."""
        return torch.tensor([self.rotation_rad] * 3 + [self.shift_A] * 2 + [self.log_contrast])

    @classmethod
    def of_widths(cls, widths: torch.Tensor) -> ViewPrior:
        """The inverse of ``widths``; components of a kind are averaged as variances."""
        square = widths.double().square().cpu()
        return cls(*(float(square[kind].mean().sqrt()) for kind in (ROTATION, SHIFT, CONTRAST)))

    @property
    def refines_poses(self) -> bool:
        """Whether rotation or shift may differ from the input's."""
        return self.rotation_rad > 0 or self.shift_A > 0

    @property
    def refines(self) -> bool:
        """Whether anything may."""
        return self.refines_poses or self.log_contrast > 0

    def in_units_of(self, other: ViewPrior) -> torch.Tensor:
        """(6,) factors from parameters in units of ``other`` to units of this; zero where either width is."""
        own = self.widths
        return torch.where(own > 0, other.widths / own.clamp(min=1e-30), 0.0)

    def seen(self, batch: ImageBatch, units: torch.Tensor, pixel_size_A: float) -> ImageBatch:
        """``batch`` with the poses and contrasts that ``units`` (b, 6) say; differentiable by them.

        Parameters
        ----------
        batch
            b images.
        units
            (b, 6) view parameters in units of the widths.
        pixel_size_A
            Of the images.
        """
        own = units * self.widths.to(units)
        seen = batch
        if self.refines_poses:
            turned = rotation_matrices(own[:, ROTATION]) @ batch.rotation.to(own.dtype)
            origin_px = batch.origin_px.to(own.dtype) - own[:, SHIFT] / pixel_size_A
            seen = replace(seen, rotation=turned, origin_px=origin_px)
        if self.log_contrast > 0:
            seen = replace(seen, contrast=own[:, 5].exp())
        return seen

    def posed(self, batch: ImageBatch, units: torch.Tensor, pixel_size_A: float) -> ImageBatch:
        """As ``seen``, with the contrast in the transfer functions: for what knows nothing of contrasts."""
        seen = self.seen(batch, units, pixel_size_A)
        if seen.contrast is None:
            return seen
        return replace(seen, transfer=seen.transfer * seen.contrast[:, None, None], contrast=None)

    def change(self, units: torch.Tensor) -> PoseChange:
        """View parameters (n, 6) in units of the widths, as rotations, shifts and contrasts."""
        own = (units.cpu() * self.widths).numpy()
        return PoseChange(own[:, ROTATION].copy(), own[:, SHIFT].copy(), np.exp(own[:, 5]))


def rotation_matrices(vectors_rad: torch.Tensor) -> torch.Tensor:
    """(b, 3, 3) rotations about (b, 3) vectors by their lengths: exp([w]); differentiable, also at zero."""
    angle = (vectors_rad.square().sum(1) + 1e-20).sqrt()[:, None, None]
    x, y, z = vectors_rad.unbind(1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], 1).view(-1, 3, 3)
    eye = torch.eye(3, dtype=cross.dtype, device=cross.device)
    return eye + torch.sinc(angle / torch.pi) * cross + 0.5 * torch.sinc(angle / (2 * torch.pi)) ** 2 * cross @ cross


def shift_slopes(slices: torch.Tensor, pixel_size_A: float) -> torch.Tensor:
    """(b, 2, N, N//2+1) derivatives per Angstrom of images' transforms (b, N, N//2+1) by a shift along x and y."""
    box = slices.shape[-2]
    kx = torch.arange(box // 2 + 1, device=slices.device, dtype=slices.real.dtype).expand(box, -1)
    ky = torch.from_numpy(wavenumbers(box)).to(kx)[:, None].expand(-1, box // 2 + 1)
    return slices[:, None] * (-2j * torch.pi / (box * pixel_size_A) * torch.stack([kx, ky]))


def mean_rigid_motion(rotation: torch.Tensor, vectors_rad: torch.Tensor, shift_A: torch.Tensor) -> torch.Tensor:
    """What poses' changes have in common in the volume's frame, which the map could have instead.

    Parameters
    ----------
    rotation : (n, 3, 3)
        View = rotation @ volume.
    vectors_rad, shift_A : (n, 3), (n, 2)
        The changes, in the frames of the views.

    Returns
    -------
    common
        (6,) rotation vector in radians and translation in Angstrom, of least squares.
    """
    inplane = rotation[:, :2].double()
    turn = (rotation.double().transpose(1, 2) @ vectors_rad.double()[..., None]).mean(0)[:, 0]
    seen = (inplane.transpose(1, 2) @ inplane).mean(0)
    pushed = (inplane.transpose(1, 2) @ shift_A.double()[..., None]).mean(0)[:, 0]
    return torch.cat([turn, torch.linalg.solve(seen, pushed)])
