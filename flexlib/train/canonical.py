"""The canonical map during training: a preconditioned stochastic Newton step on the masked voxels.

For fixed motion the map is a linear least-squares problem whose Hessian is nearly diagonal in Fourier space:
n rows with mean squared transfer T2(k) hit each 3D Fourier coefficient of shell k about n T2(k) / (2 k) times.
Dividing by that makes a step of rate 1 nearly the exact solution, so the rate is a plain averaging weight.

The mask mixes neighbouring coefficients. Where noise or CTF make one shell's T2 a small part of its neighbours', a step
that counts its own hits alone would move what they know better, and diverge: such a shell gets a share of what the mask
mixes into it.
"""

from __future__ import annotations

import numpy as np
import torch

from flexlib.imaging.fourier import shell_number, stored_means
from flexlib.projection.op import VoxelTensors, gather_volume, scatter_volume

_MIXED_SHARE = 0.25  # of the hits that the mask mixes into a coefficient, which count at least


class CanonicalMap:
    """Masked map ``values`` (nvox,) = soft mask x density, improved by gradients of mini-batches.

    Parameters
    ----------
    volume, soft_mask
        (box, box, box) density and mask.
    voxels
        That the map has values at.
    mean_transfer2
        (box//2,) mean squared transfer of each shell.
    num_rows
        Rows that the map is learnt from.
    inside_only
        Whether the prior knows that signal and noise are inside the mask alone, and is weaker for it. (The rigid map's
        does not: poses' widths are measured on that map, and its noise would pass for what images tell of poses.)
    """

    def __init__(
        self,
        volume: torch.Tensor,
        soft_mask: torch.Tensor,
        voxels: VoxelTensors,
        mean_transfer2: torch.Tensor,
        num_rows: int,
        *,
        inside_only: bool,
    ) -> None:
        self.voxels = voxels
        self.mask_values = gather_volume(soft_mask, voxels).float()
        self.values = gather_volume(volume, voxels).float() * self.mask_values
        box = voxels.box
        self.shells = torch.as_tensor(shell_number(box), device=volume.device)
        spectrum = torch.fft.rfftn(scatter_volume(self.values, voxels))
        signal = stored_means(spectrum.real**2 + spectrum.imag**2).float()
        shell = torch.arange(box // 2, device=volume.device, dtype=torch.float32)
        hits = num_rows * mean_transfer2.to(signal) / (2.0 * shell.clamp(min=0.5))
        # prior: the consensus' own power, never stronger than the data (a consensus may have been filtered)
        occupied = self.mask_values.square().sum() / box**3 if inside_only else 1.0
        prior = torch.minimum(occupied / signal.clamp(min=1e-30), hits)
        self.prior = self._at_voxels(prior)
        hessian = self._at_voxels(hits + prior)
        least = _MIXED_SHARE * self._mixed(hessian)
        self.newton = torch.where(hessian > 0, 1 / torch.maximum(hessian, least).clamp(min=1e-30), 0)

    def _mixed(self, hessian: torch.Tensor) -> torch.Tensor:
        """The diagonal of ``hessian``, both (box, box, box//2+1), between two masks: averages by the mask's power."""
        shape = (self.voxels.box,) * 3
        mask = torch.fft.rfftn(scatter_volume(self.mask_values, self.voxels))
        overlap = torch.fft.irfftn(mask.real**2 + mask.imag**2, s=shape)
        mixed = torch.fft.rfftn(torch.fft.irfftn(hessian, s=shape) * (overlap / overlap[0, 0, 0])).real
        return mixed.to(hessian)

    def _at_voxels(self, of_shells: torch.Tensor) -> torch.Tensor:
        """(box, box, box//2+1) from a value for each shell (box//2,); zero in the corners, which no image sees."""
        corner = len(of_shells)
        return torch.cat([of_shells, of_shells.new_zeros(1)])[self.shells.clamp(max=corner)]

    def step(self, gradient: torch.Tensor, fraction: float, rate: float, band: float) -> None:
        """Move by ``-rate`` Newton steps.

        Parameters
        ----------
        gradient
            (nvox,) of the summed loss of a mini-batch, by ``values``.
        fraction
            The mini-batch's share of the rows.
        rate
            Newton steps.
        band
            Shells above it are left alone.
        """
        box = self.voxels.box
        fields = torch.stack([gradient * self.mask_values / (fraction * box**3), self.values])
        volumes = fields.new_zeros((2, box**3))
        volumes[:, self.voxels.index] = fields
        of_data, of_prior = torch.fft.rfftn(volumes.view(2, box, box, box), dim=(1, 2, 3))
        change = of_prior.mul_(self.prior).add_(of_data).mul_(self.newton * (self.shells <= band))
        change = torch.fft.irfftn(change, s=(box,) * 3)
        self.values = self.values - rate * self.mask_values * gather_volume(change, self.voxels)

    def newton_change(self, force: torch.Tensor, band: float) -> torch.Tensor:
        """(box, box, box) what a force (nvox,), minus a summed gradient of all rows, makes of an empty map.

        Shells above ``band`` are left out.
        """
        box = self.voxels.box
        spectrum = torch.fft.rfftn(scatter_volume(force * self.mask_values / box**3, self.voxels))
        change = torch.fft.irfftn(spectrum * self.newton * (self.shells <= band), s=(box,) * 3)
        return change * scatter_volume(self.mask_values, self.voxels)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What changes."""
        return {"values": self.values}

    def load_state_dict(self, saved: dict[str, torch.Tensor]) -> None:
        """Take over what ``state_dict`` gave."""
        self.values = saved["values"]

    def volume(self) -> np.ndarray:
        """(box, box, box) float32, zero outside the mask."""
        return scatter_volume(self.values, self.voxels).cpu().numpy()
