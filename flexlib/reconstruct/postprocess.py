"""What is derived from half-maps: the region that moves, local resolution, and the sharpened map."""

from __future__ import annotations

import numpy as np
from scipy import fft, ndimage

from flexlib.imaging.fourier import fft_workers, lowpass_map, shell_means, shell_radius, shell_sums
from flexlib.imaging.fsc import frequencies_1_per_A, predicted_truth_fsc, resolution_at
from flexlib.imaging.masks import soft_edge
from flexlib.model.flex_model import FlexModel
from flexlib.model.motion import rms_displacement_A
from flexlib.tetra.voxels import MeshVoxels

MOVING_FRACTION = 0.5  # of the largest rms displacement, from which on a voxel belongs to the moving region
MOVING_MIN_PX = 0.5  # rms displacement below which nothing counts as moving: no image would show it
MOVING_EDGE_PX = 8.0  # a steeper edge spreads strong low shells over the weak high ones
MIN_REGION_VOXELS = 1000  # an FSC within fewer says nothing

LOCAL_THRESHOLD = 0.5  # a window has few coefficients per shell: 0.143 is within its noise
LOCAL_WINDOW = 7.0  # window side in units of the map's resolution
LOCAL_STEP = 5  # windows per window side, along an axis
LOCAL_MIN_SIDE_PX = 16

GUINIER_FROM_A = 10.0  # coarser than this, amplitudes follow the molecule's shape
GUINIER_MIN_SHELLS = 6


def moving_region(model: FlexModel, voxels: MeshVoxels, mask: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
    """Soft mask of the part that moves: where the rms displacement is more than half of its largest value.

    "Largest" is the 99th percentile over the voxels, each weighted alike.

    Parameters
    ----------
    model
        Mesh, flow and latents.
    voxels
        Of the model's mesh.
    mask
        (N, N, N) soft solvent mask.

    Returns
    -------
    region
        (N, N, N) float32 in [0, 1], never above ``mask``, and all zero where nothing moves by half a voxel.
    motion_A
        The rms displacements "largest_A" and "threshold_A" (0: nothing moves).
    """
    rms_A = rms_displacement_A(model, voxels)
    largest_A = float(np.percentile(rms_A, 99))
    moving = np.zeros(mask.size, bool)
    threshold_A = MOVING_FRACTION * largest_A
    if largest_A >= MOVING_MIN_PX * voxels.pixel_size_A:
        moving[voxels.index[rms_A > threshold_A]] = True
    if moving.sum() < MIN_REGION_VOXELS:
        return np.zeros_like(mask), {"largest_A": largest_A, "threshold_A": 0.0}
    region = soft_edge(moving.reshape(mask.shape), 1.0, 0.0, MOVING_EDGE_PX) * mask
    return region.astype(np.float32), {"largest_A": largest_A, "threshold_A": threshold_A}


def local_resolution(
    half1: np.ndarray, half2: np.ndarray, mask: np.ndarray, pixel_size_A: float, resolution_A: float
) -> np.ndarray:
    """Resolution in Angstrom around each voxel: half-map FSC within a soft window that is moved over the mask.

    Windows have a side of 7 times ``resolution_A`` (at least 16 px) and a squared cosine's shape in each direction, and
    lie on a grid five to a side; between them values are interpolated, beyond the mask those of the nearest window
    continue. The threshold is 0.5, so the map is to be compared with the whole map's resolution at 0.5 (G. Cardone
    et al., J. Struct. Biol. 184, 226 (2013), for windowed FSC). Windows are not corrected for the mask.
    By hand: ResMap, blocres and RELION's were considered; they are programs, not libraries.

    Parameters
    ----------
    half1, half2
        (N, N, N).
    mask
        (N, N, N) soft; windows are centred where it exceeds 0.5.
    pixel_size_A, resolution_A
        Of the maps.

    Returns
    -------
    local_A
        (N, N, N) float32. A window that holds nothing gets its own side, the coarsest that it can show.
    """
    box = len(mask)
    side = int(np.clip(2 * round(LOCAL_WINDOW * resolution_A / pixel_size_A / 2), min(LOCAL_MIN_SIDE_PX, box), box))
    step = max(1, side // LOCAL_STEP)
    centres = np.arange(box // 2 % step, box, step)
    grid = np.meshgrid(centres, centres, centres, indexing="ij")
    inside = mask[tuple(grid)] > 0.5
    if not inside.any():
        return np.full(mask.shape, side * pixel_size_A, np.float32)
    corners = np.stack([axis[inside] for axis in grid], 1)  # of the windows, once the halves are padded
    padded = [np.pad(half, side // 2) for half in (half1, half2)]
    found = np.empty(len(corners), np.float32)
    chunk = max(1, 2**22 // side**3)
    for first in range(0, len(corners), chunk):
        curves = _window_curves(padded, corners[first : first + chunk], side)
        found[first : first + chunk] = [
            resolution_at(curve, LOCAL_THRESHOLD, side, pixel_size_A, first_shell=1) for curve in curves
        ]
    return _spread(found, inside, centres, box)


def _window_curves(halves: list[np.ndarray], corners: np.ndarray, side: int) -> np.ndarray:
    """(b, side//2) FSC of two maps within soft windows whose first voxels are ``corners`` (b, 3)."""
    axis = np.cos(np.pi * (np.arange(side) - side // 2) / side) ** 2
    window = (axis[:, None, None] * axis[None, :, None] * axis[None, None, :]).astype(np.float32)
    first, second = (
        fft.rfftn(
            np.stack([half[z : z + side, y : y + side, x : x + side] for z, y, x in corners]) * window,
            axes=(1, 2, 3),
            workers=fft_workers(),
        )
        for half in halves
    )
    cross, power1, power2 = (
        _with_neighbours(shell_sums((a * b.conj()).real))
        for a, b in ((first, second), (first, first), (second, second))
    )
    power = np.sqrt(power1 * power2)
    return np.divide(cross, power, out=np.zeros_like(cross), where=power > 0)


def _with_neighbours(sums: np.ndarray) -> np.ndarray:
    """Each shell's sum with half of its neighbours': the window mixes them anyway, and noise is less."""
    ends = np.pad(sums, ((0, 0), (1, 1)))
    return ends[:, 1:-1] + 0.5 * (ends[:, :-2] + ends[:, 2:])


def _spread(found: np.ndarray, inside: np.ndarray, centres: np.ndarray, box: int) -> np.ndarray:
    """Values at the windows ``inside`` to a (box, box, box) map: the nearest one outside, linear between windows."""
    coarse = np.zeros(inside.shape, np.float32)
    coarse[inside] = found
    nearest = ndimage.distance_transform_edt(~inside, return_distances=False, return_indices=True)
    coarse = coarse[tuple(nearest)]
    step = centres[1] - centres[0] if len(centres) > 1 else 1
    at = np.clip((np.arange(box) - centres[0]) / step, 0, len(centres) - 1)
    for axis in range(3):
        low = np.minimum(at.astype(int), max(len(centres) - 2, 0))
        high = np.minimum(low + 1, len(centres) - 1)
        shape = [1, 1, 1]
        shape[axis] = box
        share = (at - low).astype(np.float32).reshape(shape)
        coarse = coarse.take(low, axis) * (1 - share) + coarse.take(high, axis) * share
    return coarse.astype(np.float32)


def guinier_b_factor(volume: np.ndarray, fsc: np.ndarray, pixel_size_A: float, resolution_A: float) -> float | None:
    """B-factor in A^2 by which amplitudes fall with resolution d, ``exp(-B / (4 d^2))``, from a straight-line fit.

    The line goes through the logarithm of each shell's rms amplitude, weighted by what the ``fsc`` (N//2,) of the
    half-maps says is signal (``predicted_truth_fsc``), against 1/d^2 from 10 A to ``resolution_A`` (P. Rosenthal,
    R. Henderson, J. Mol. Biol. 333, 721 (2003)).

    Parameters
    ----------
    volume
        (N, N, N), masked.
    fsc
        (N//2,) of the half-maps.
    pixel_size_A, resolution_A
        Of the map.

    Returns
    -------
    b_factor_A2
        None where that range holds fewer than six shells.
    """
    spectrum = fft.rfftn(np.asarray(volume, np.float32), workers=fft_workers())
    amplitude = np.sqrt(shell_means(np.abs(spectrum) ** 2)) * predicted_truth_fsc(fsc)
    frequency = frequencies_1_per_A(len(volume), pixel_size_A)
    use = (frequency >= 1 / GUINIER_FROM_A) & (frequency <= 1 / resolution_A) & (amplitude > 0)
    if use.sum() < GUINIER_MIN_SHELLS:
        return None
    slope = np.polyfit(frequency[use] ** 2, np.log(amplitude[use]), 1)[0]
    return float(-4.0 * slope)


def sharpened_map(
    volume: np.ndarray, fsc: np.ndarray, pixel_size_A: float, resolution_A: float, b_factor_A2: float
) -> np.ndarray:
    """``volume`` with its fall-off undone, each shell weighted by its signal, low-passed at ``resolution_A``.

    Parameters
    ----------
    volume
        (N, N, N) masked mean of the half-maps.
    fsc
        (N//2,) of the half-maps.
    pixel_size_A, resolution_A
        Of the map.
    b_factor_A2
        As ``guinier_b_factor`` gives it: amplitudes are multiplied by ``exp(+B / (4 d^2))``.

    Returns
    -------
    sharpened
        (N, N, N) float32.
    """
    box = len(volume)
    radius = shell_radius(box)
    weight = np.interp(radius, np.arange(len(fsc)), predicted_truth_fsc(fsc), right=0.0)
    exponent = 0.25 * b_factor_A2 * (radius / (box * pixel_size_A)) ** 2
    ceiling = 0.25 * b_factor_A2 / resolution_A**2  # beyond the cut nothing is left to raise
    weight = weight * np.exp(np.minimum(exponent, max(ceiling, 0.0)) if b_factor_A2 > 0 else exponent)
    spectrum = fft.rfftn(np.asarray(volume, np.float32), workers=fft_workers())
    spectrum *= weight.astype(np.float32)
    sharp = fft.irfftn(spectrum, s=volume.shape, workers=fft_workers())
    return lowpass_map(sharp, pixel_size_A, resolution_A)
