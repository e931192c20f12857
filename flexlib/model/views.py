"""What an image's pose and contrast may differ by from the input's: the view parameters, and their prior.

A particle has six besides its latents: a rotation (3) and a shift (2) in the frame of its view, and the logarithm of a
contrast. Their prior is normal; its standard deviations, the widths, are learnt. Everywhere in training the six stand
behind the latents, (b, K + 6), in units of their widths and as deviations from their mean, so that the prior of each
is the unit normal; a width of zero switches a deviation off.

The mean of a pose depends on the latents where it must. Input poses refer to some part of the molecule, often the
largest, while the flow moves density about a frame of its own, in which all of it is at rest on average. When a hinge
bends, the two frames turn against each other: that is no error of the pose, and what it says of the hinge would be
lost if it counted as one (``PoseFrame``).
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import torch

from flexlib.images.batch import ImageBatch
from flexlib.imaging.fourier import wavenumbers
from flexlib.particles.pose_change import PoseChange

NUM_VIEW_PARAMETERS = 6
ROTATION, SHIFT, CONTRAST = slice(0, 3), slice(3, 5), slice(5, 6)
KINDS = {"rotation": ROTATION, "shift": SHIFT, "contrast": CONTRAST}


@dataclass(frozen=True)
class PoseFrame:
    """The frame of the input's poses, as the flow's sees it: a rotation and a translation that follow from latents.

    A polynomial in the volume's frame, cubic of up to two latents and quadratic of more, and a network's addition.
    """

    coefficients: torch.Tensor  # (F, 6) rotation vector in radians and translation in Angstrom, of each monomial
    matrix: torch.Tensor  # (K, K), with ``offset`` (K,): from present latents to those that the polynomial is of
    offset: torch.Tensor
    bend: Callable[[torch.Tensor], torch.Tensor] | None = None  # present latents (b, K) to (b, 6), added

    @classmethod
    def at_rest(cls, dims: int, device: torch.device | str = "cpu") -> PoseFrame:
        """Of ``dims`` latents that it does not depend on."""
        eye = torch.eye(dims, device=device)
        features = cls.monomials(torch.zeros((1, dims), device=device)).shape[1]
        return cls(torch.zeros((features, 6), device=device), eye, torch.zeros(dims, device=device))

    @staticmethod
    def monomials(latents: torch.Tensor) -> torch.Tensor:
        """(b, F) of latents (b, K), the constant first."""
        dims = latents.shape[1]
        powers = [
            chosen
            for degree in range(1, 4 if dims <= 2 else 3)
            for chosen in itertools.combinations_with_replacement(range(dims), degree)
        ]
        axes = latents.unbind(1)
        products = [math.prod((axes[axis] for axis in chosen[1:]), start=axes[chosen[0]]) for chosen in powers]
        return torch.stack([latents.new_ones(len(latents)), *products], 1)

    def features(self, latents: torch.Tensor) -> torch.Tensor:
        """(b, F) monomials of present latents (b, K)."""
        return self.monomials(latents @ self.matrix.T + self.offset)

    def poses(self, latents: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        """(b, 5) rotation vectors and shifts in views of ``rotation`` (b, 3, 3), radians and Angstrom."""
        motion = self.features(latents) @ self.coefficients
        if self.bend is not None:
            motion = motion + self.bend(latents)
        turn, push = motion.split(3, 1)
        of_view = rotation.to(turn.dtype)
        return torch.cat([(of_view @ turn[..., None])[..., 0], (of_view[:, :2] @ push[..., None])[..., 0]], 1)

    def rescaled(self, matrix: torch.Tensor, offset: torch.Tensor) -> PoseFrame:
        """The same for other latents: ``z_old = matrix @ z_new + offset``, (K, K) and (K,)."""
        return replace(self, matrix=self.matrix @ matrix, offset=self.offset + self.matrix @ offset)

    def moved(self, common: torch.Tensor) -> PoseFrame:
        """With ``common`` (6,) more in all poses."""
        coefficients = self.coefficients.clone()
        coefficients[0] += common
        return replace(self, coefficients=coefficients)


@dataclass(frozen=True)
class ViewPrior:
    """The view parameters' normal prior: widths, and the mean of the poses."""

    rotation_rad: float = 0.0  # of each of three components
    shift_A: float = 0.0  # of each of two
    log_contrast: float = 0.0
    # whether the input poses were fitted to these very images, as a consensus refinement does: the widths of poses are
    # then wider than any image's own error and are not learnt, for the same data cannot speak twice
    fitted: bool = False
    frame: PoseFrame | None = field(default=None, compare=False)  # None: the mean is zero

    @property
    def widths(self) -> torch.Tensor:
        """(6,) float32, in radians, Angstrom and of the logarithm."""
        return self.widths_on("cpu").clone()

    def widths_on(self, device: torch.device | str) -> torch.Tensor:
        """``widths`` on a device, where they are kept: not to be changed."""
        return _widths(self.rotation_rad, self.shift_A, self.log_contrast, str(device))

    def with_widths(self, widths: torch.Tensor) -> ViewPrior:
        """The same with other ``widths`` (6,); components of a kind are averaged as variances."""
        square = widths.double().square().cpu()
        rotation, shift, contrast = (float(square[kind].mean().sqrt()) for kind in KINDS.values())
        return replace(self, rotation_rad=rotation, shift_A=shift, log_contrast=contrast)

    @property
    def learnt(self) -> dict[str, slice]:
        """The kinds of parameters whose widths are learnt, and where they stand."""
        kinds = {name: kind for name, kind in KINDS.items() if (self.widths[kind] > 0).all()}
        return {name: kind for name, kind in kinds.items() if name == "contrast" or not self.fitted}

    @property
    def refines_poses(self) -> bool:
        """Whether rotation or shift may differ from the input's."""
        return self.rotation_rad > 0 or self.shift_A > 0 or self.frame is not None

    @property
    def has_width(self) -> bool:
        """Whether any parameter may differ from its mean."""
        return self.rotation_rad > 0 or self.shift_A > 0 or self.log_contrast > 0

    def log_to(self, logger: logging.Logger) -> None:
        """Say the widths."""
        own = math.degrees(self.rotation_rad), self.shift_A, self.log_contrast
        logger.info("widths: rotation %.2f degrees an axis, shift %.2f A, contrast %.3f", *own)

    def in_units_of(self, other: ViewPrior) -> torch.Tensor:
        """(6,) factors from parameters in units of ``other`` to units of this; zero where either width is."""
        own = self.widths
        return torch.where(own > 0, other.widths / own.clamp(min=1e-30), 0.0)

    def own(self, units: torch.Tensor, latents: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        """(b, 6) rotation vectors, shifts and log contrasts in radians and Angstrom: deviations and mean.

        Parameters
        ----------
        units, latents
            (b, 6) in units of the widths, and (b, K).
        rotation
            (b, 3, 3) of the views.
        """
        own = units * self.widths_on(units.device).to(units.dtype)
        if self.frame is None:
            return own
        return own + torch.nn.functional.pad(self.frame.poses(latents, rotation), (0, 1))

    def seen(self, batch: ImageBatch, units: torch.Tensor, latents: torch.Tensor, pixel_size_A: float) -> ImageBatch:
        """``batch`` with the poses and contrasts that ``units`` (b, 6) and ``latents`` (b, K) say; differentiable.

        Parameters
        ----------
        batch
            b images.
        units
            (b, 6) view parameters in units of the widths.
        latents
            (b, K), on which the mean of the poses depends.
        pixel_size_A
            Of the images.
        """
        own = self.own(units, latents, batch.rotation)
        seen = batch
        if self.refines_poses:
            turned = rotation_matrices(own[:, ROTATION]) @ batch.rotation.to(own.dtype)
            origin_px = batch.origin_px.to(own.dtype) - own[:, SHIFT] / pixel_size_A
            seen = replace(seen, rotation=turned, origin_px=origin_px)
        if self.log_contrast > 0:
            seen = replace(seen, contrast=own[:, 5].exp())
        return seen

    def in_frame(
        self, frame: PoseFrame, units: torch.Tensor, latents: torch.Tensor, rotation: torch.Tensor
    ) -> torch.Tensor:
        """``units`` (b, 6) for the mean ``frame``, such that no pose changes, but where widths are zero."""
        widths = self.widths_on(units.device).to(units.dtype)
        mean = replace(self, frame=frame).own(torch.zeros_like(units), latents, rotation)
        return torch.where(widths > 0, (self.own(units, latents, rotation) - mean) / widths.clamp(min=1e-30), 0.0)

    def posed(self, batch: ImageBatch, units: torch.Tensor, latents: torch.Tensor, pixel_size_A: float) -> ImageBatch:
        """As ``seen``, with the contrast in the transfer functions: for what knows nothing of contrasts."""
        seen = self.seen(batch, units, latents, pixel_size_A)
        if seen.contrast is None:
            return seen
        return replace(seen, transfer=seen.transfer * seen.contrast[:, None, None], contrast=None)


def pose_change(own: torch.Tensor) -> PoseChange:
    """View parameters (n, 6) in radians and Angstrom, as rotations, shifts and contrasts."""
    values = own.cpu().numpy()
    return PoseChange(values[:, ROTATION].copy(), values[:, SHIFT].copy(), np.exp(values[:, 5]))


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
    return slices[:, None] * _shift_slopes(slices.shape[-2], pixel_size_A, str(slices.device), slices.dtype)


@lru_cache(maxsize=32)
def _shift_slopes(box: int, pixel_size_A: float, device: str, dtype: torch.dtype) -> torch.Tensor:
    """(2, N, N//2+1) complex: what ``shift_slopes`` multiplies with."""
    kx = torch.arange(box // 2 + 1, dtype=torch.float64).expand(box, -1)
    ky = torch.from_numpy(wavenumbers(box)).double()[:, None].expand(-1, box // 2 + 1)
    return (-2j * torch.pi / (box * pixel_size_A) * torch.stack([kx, ky])).to(device=device, dtype=dtype)


@lru_cache(maxsize=64)
def _widths(rotation_rad: float, shift_A: float, log_contrast: float, device: str) -> torch.Tensor:
    """(6,) float32 on a device: copied there once, since a copy waits for a GPU."""
    return torch.tensor([rotation_rad] * 3 + [shift_A] * 2 + [log_contrast], dtype=torch.float32, device=device)


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
