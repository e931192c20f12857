"""The canonical map's step where what images tell of neighbouring shells differs by orders of magnitude."""

import numpy as np
import pytest
import torch

from flexlib.imaging.fourier import shell_number
from flexlib.projection.op import VoxelTensors
from flexlib.tetra.tetmesh import single_cell_mesh
from flexlib.tetra.voxels import voxelise
from flexlib.train.canonical import CanonicalMap
from flexlib.train.map_pass import MOST_STEP

BOX = 24


def ball_map(transfer2, num_rows=1000):
    """A canonical map in a soft ball of a third of the box across, of images of ``transfer2`` (shells,)."""
    axis = np.arange(BOX) - BOX // 2
    radius = np.sqrt((axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[None, None, :] ** 2).astype(float))
    mask = np.clip((7.0 - radius) / 3.0, 0, 1)
    voxels = VoxelTensors.from_mesh_voxels(voxelise(single_cell_mesh(float(BOX)), mask > 0, 1.0))
    soft_mask = torch.as_tensor(mask, dtype=torch.float32)
    noise = torch.randn((BOX,) * 3, generator=torch.Generator().manual_seed(0))
    return CanonicalMap(noise, soft_mask, voxels, torch.as_tensor(transfer2), num_rows, inside_only=False)


def hits_of(transfer2, num_rows=1000):
    """(box, box, box//2+1) how often images hit each coefficient: the Hessian of the data without a mask."""
    shell = np.arange(BOX // 2)
    hits = np.append(num_rows * transfer2 / (2 * np.maximum(shell, 0.5)), 0.0)
    return torch.as_tensor(hits[np.minimum(shell_number(BOX), BOX // 2)], dtype=torch.float32)


SHELL = np.arange(BOX // 2, dtype=float)
SPECTRA = {
    "flat": np.ones(BOX // 2),
    "gradients": np.where(SHELL < 3, 1e-6, 1.0),  # left in the images: the first shells are nearly worthless
    "steep": (1 + SHELL**4) * 1e-4,  # noise whose power falls with the fourth power of the frequency
}


@pytest.mark.parametrize("kind", SPECTRA)
def test_steps_settle_whatever_the_spectrum(kind):
    """No data and no prior to speak of: each step must shrink the map's error, as one Newton step of a quadratic."""
    transfer2 = SPECTRA[kind]
    canonical, hits = ball_map(transfer2), hits_of(transfer2)
    canonical.prior = torch.zeros_like(canonical.prior)

    def gradient():
        volume = torch.zeros(BOX**3)
        volume[canonical.voxels.index] = canonical.values
        field = torch.fft.irfftn(torch.fft.rfftn(volume.view((BOX,) * 3)) * hits, s=(BOX,) * 3)
        return BOX**3 * field.reshape(-1)[canonical.voxels.index]

    losses = []
    for _ in range(60):
        slope = gradient()
        losses.append(float(slope @ canonical.values))
        canonical.step(slope, 1.0, MOST_STEP, BOX / 2)
    assert np.isfinite(losses).all() and losses[-1] < 0.2 * losses[0], losses[::10]
    assert (np.diff(losses) <= 1e-6 * losses[0]).all(), "a step too long for some direction"


def test_a_spectrum_without_leaps_is_stepped_by_its_own_hits():
    """Where the mask mixes in no more than four times a shell's own hits, the step is that of the shell alone."""
    transfer2 = np.ones(BOX // 2)
    canonical, hits = ball_map(transfer2), hits_of(transfer2)
    known = hits > 0
    torch.testing.assert_close(canonical.newton[known], 1 / (hits + canonical.prior)[known])
