"""From one model's rest shape to another's: which displacement carries the one map into the other, by their low band.

Nothing holds a map's shape while it is learnt, so that two models' rest shapes differ by fractions of an Angstrom. Half
maps in different shapes would disagree for it. Only coarse features, on which the two maps agree anyway, are looked at:
what is found cannot make noise agree.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from flexlib.imaging.fourier import lowpass_map
from flexlib.imaging.fsc import fsc
from flexlib.imaging.masks import TRAINING_FLOOR, inside_mask
from flexlib.model.flex_model import FlexModel
from flexlib.model.flow import rigid_modes_A
from flexlib.tetra.deform import deform_volume
from flexlib.tetra.voxels import voxelise

SOFTEST_FIELDS = 40  # elastic modes that rest shapes may differ by, beside rigid-body motions
TRUSTED_FSC = 0.9  # of the two maps, in the band that is looked at
MOST_OF_NYQUIST = 0.5
LEAST_SHELLS = 4
EXPECTED_A = 1.0  # rms by which the softest field's share is expected to differ, stiffer ones less
ROUNDS = 6  # of Gauss-Newton


def common_band(first: np.ndarray, second: np.ndarray, mask: np.ndarray) -> int:
    """The last shell of the band in which two maps (N, N, N) are looked at."""
    below = np.flatnonzero(fsc(first, second, mask) < TRUSTED_FSC)
    agreeing = int(below[0]) - 1 if len(below) else len(first)
    return int(np.clip(agreeing, LEAST_SHELLS, max(LEAST_SHELLS, MOST_OF_NYQUIST * len(first) / 2)))


def rest_shape_shift_A(first: FlexModel, second: FlexModel, mask: np.ndarray) -> np.ndarray:
    """(nv, 3) displacement in Angstrom of the vertices that carries the first model's map into the second's.

    By Gauss-Newton on the maps' low band, over rigid-body motions and the softest fields of the first model's flow.

    Parameters
    ----------
    first, second
        On the same mesh.
    mask
        (box, box, box) soft, at the models' box.
    """
    mesh, pixel_size_A, box = first.mesh, first.pixel_size_A, first.box
    band = common_band(first.canonical, second.canonical, mask)
    cut_A = box * pixel_size_A / (band + 0.5)
    low, target = (lowpass_map(model.canonical, pixel_size_A, cut_A) for model in (first, second))
    support = inside_mask(mask, TRAINING_FLOOR)
    voxels = voxelise(mesh, support, pixel_size_A)
    fields = first.flow.basis_A[:SOFTEST_FIELDS].cpu().double().numpy()
    fields = np.concatenate([rigid_modes_A(mesh.vertices_A), fields])
    size = np.sqrt((fields**2).sum(2).mean(1))
    softest = size[6:].max()
    expected = np.concatenate([np.full(6, EXPECTED_A), EXPECTED_A * size[6:] / softest]) / size  # of coefficients
    at_voxels = np.einsum("nk,mnkd->mnd", voxels.bary, fields[:, voxels.cells[voxels.cell]])
    coefficients = np.zeros(len(fields))
    share = (4 / 3 * np.pi * band**3) / box**3  # of all coefficients that are in the band: voxels are not independent
    for _ in range(ROUNDS):
        shift_A = np.tensordot(coefficients, fields, 1)
        moved = deform_volume(low, pixel_size_A, support.astype(np.float32), mesh, shift_A)
        scale = float((moved * target)[support].sum() / (moved**2)[support].sum())
        residual = (target - scale * moved).reshape(-1)[voxels.index]
        slopes = [_slope(scale * moved, axis, pixel_size_A).reshape(-1)[voxels.index] for axis in (2, 1, 0)]
        design = -np.einsum("mnd,dn->nm", at_voxels, np.stack(slopes))
        weight = share / max(float((residual**2).mean()), 1e-30)
        hessian = weight * design.T @ design + np.diag(expected**-2)
        force = weight * design.T @ residual - coefficients / expected**2
        coefficients = coefficients + np.linalg.solve(hessian, force)
    return np.tensordot(coefficients, fields, 1)


def _slope(volume: np.ndarray, axis: int, pixel_size_A: float) -> np.ndarray:
    """(N, N, N) derivative by Angstrom along an axis."""
    return ndimage.correlate1d(volume, [-0.5, 0.0, 0.5], axis=axis, mode="wrap") / pixel_size_A
