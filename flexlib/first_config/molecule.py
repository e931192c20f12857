"""What the maps say: the mask and its level, the molecule's size, the resolution of the half-maps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from flexlib.errors import InputError
from flexlib.imaging.fsc import corrected_fsc, resolution_at
from flexlib.imaging.maps import read_map
from flexlib.imaging.masks import auto_threshold, make_mask, mask_level
from flexlib.prepare.grid import match_grid
from flexlib.workflow_support.settings import MaskSettings

FSC_THRESHOLD = 0.143
_INSIDE = 0.5  # of a soft mask, taken as the molecule's outline
_MAX_SHARE = 0.5  # of the ball in the box that a mask may fill
_MAX_OUTSIDE = 0.05  # of the molecule's density that may lie outside a mask
_SAME_MAP = 0.999  # FSC of two half-maps, lowest in any shell, that are one map
_WIDTH_SAMPLE = 200_000  # voxels that widths are measured on


@dataclass(frozen=True)
class Molecule:
    """The molecule as its mask shows it; the grid is the images' common one."""

    mask: np.ndarray  # (N, N, N) float32 in [0, 1]
    threshold: float | Literal["auto"] | None  # mesh.threshold to write; None where the mask is the user's
    level: float  # density level of that threshold, or of "auto" where the mask is the user's
    auto_level: float
    volume_A3: float  # where the mask is at least a half
    box_share: float  # of the box, that volume
    widths_A: tuple[float, float, float]  # along the mask's own axes, longest first
    at_edge: bool  # whether the mask reaches the rim of the box, where not every view shows it
    outside_share: float  # of the density above the automatic level, what lies outside the mask
    dark: bool  # whether the map's strongest density is negative


def look_at_mask(
    density: np.ndarray,
    pixel_size_A: float,
    mask: np.ndarray | None,
    settings: MaskSettings,
    automatic: np.ndarray | None = None,
) -> Molecule:
    """The mask that a preparation uses or should use, and the molecule in it.

    Without a mask of the user's the level is ``auto``, unless the mask then fills half of the ball in the box or
    reaches its rim and a higher level makes a better one.

    Parameters
    ----------
    density
        (N, N, N) consensus on the images' common grid.
    pixel_size_A
        Of that grid.
    mask
        (N, N, N) the user's mask on the same grid, or None.
    settings
        How a mask is made; its ``threshold`` is not used.
    automatic
        (N, N, N) the mask of level ``auto``, where it is there already.

    Raises
    ------
    InputError
        Nothing lies above the automatic level.
    """
    filtered, auto_level = mask_level(density, pixel_size_A, settings.lowpass_A)
    threshold: float | Literal["auto"] | None = None
    if mask is None:
        threshold, mask = _propose_threshold(density, pixel_size_A, settings, automatic)
    level = float(threshold) if isinstance(threshold, float) else auto_level
    inside = mask >= _INSIDE
    above = np.maximum(filtered - auto_level, 0.0) * _ball(len(mask))
    middle = float(np.median(filtered))
    return Molecule(
        mask=mask,
        threshold=threshold,
        level=level,
        auto_level=auto_level,
        volume_A3=float(inside.sum()) * pixel_size_A**3,
        box_share=float(inside.mean()),
        widths_A=_widths_A(inside, pixel_size_A),
        at_edge=_reaches_rim(inside),
        outside_share=float(above[~inside].sum() / max(float(above.sum()), 1e-30)),
        dark=bool(middle - filtered.min() > 1.5 * (filtered.max() - middle)),
    )


def _propose_threshold(
    density: np.ndarray, pixel_size_A: float, settings: MaskSettings, automatic: np.ndarray | None
) -> tuple[float | Literal["auto"], np.ndarray]:
    """The level to write and the (N, N, N) mask that it makes."""

    def made(threshold: float | Literal["auto"]) -> np.ndarray:
        return make_mask(density, pixel_size_A, settings.lowpass_A, threshold, settings.dilate_A, settings.pad_A)

    if automatic is None:
        automatic = made("auto")
    if _is_good(automatic):
        return "auto", automatic
    filtered, _ = mask_level(density, pixel_size_A, settings.lowpass_A, 0.0)
    for level in (auto_threshold(filtered), _between_classes(filtered)):
        try:
            mask = made(level)
        except InputError:  # nothing is left
            continue
        if _is_good(mask):
            return float(f"{level:.4g}"), made(float(f"{level:.4g}"))
    return "auto", automatic


def _is_good(mask: np.ndarray) -> bool:
    inside = mask >= _INSIDE
    return not _reaches_rim(inside) and inside.sum() <= _MAX_SHARE * _ball(len(mask)).sum()


def _between_classes(filtered: np.ndarray) -> float:
    """The level that parts the (N, N, N) voxels of the ball into two classes most clearly (Otsu's)."""
    from skimage.filters import threshold_otsu

    return float(threshold_otsu(filtered[_ball(len(filtered))]))


def _ball(box: int) -> np.ndarray:
    """(N, N, N) bool, within half a box of the centre."""
    return _radius(box) < box / 2


def _radius(box: int) -> np.ndarray:
    """(N, N, N) float32 distance from voxel ``N//2``, in voxels."""
    square = (np.arange(box) - box // 2).astype(np.float32) ** 2
    return np.sqrt(square[:, None, None] + square[None, :, None] + square[None, None, :])


def _reaches_rim(inside: np.ndarray) -> bool:
    """Whether a mask comes within a voxel and a half of the ball that all views show."""
    return bool(inside[_radius(len(inside)) > len(inside) / 2 - 1.5].any())


def _widths_A(inside: np.ndarray, pixel_size_A: float) -> tuple[float, float, float]:
    """Extents of a mask along its own principal axes, longest first."""
    points = np.argwhere(inside).astype(np.float64)
    if len(points) > _WIDTH_SAMPLE:
        points = points[:: len(points) // _WIDTH_SAMPLE]
    points -= points.mean(0)
    _, axes = np.linalg.eigh(points.T @ points)
    longest, middle, shortest = sorted((np.ptp(points @ axes, axis=0) + 1) * pixel_size_A, reverse=True)
    return float(longest), float(middle), float(shortest)


@dataclass(frozen=True)
class HalfMaps:
    """Two half-maps and how far they agree."""

    paths: tuple[Path, Path]
    resolution_A: float  # FSC = 0.143 in the mask, corrected for it
    to_nyquist: bool  # the curve does not fall below, or does so in the last tenth of the shells
    same: bool  # the two are one map


def compare_half_maps(paths: tuple[Path, Path], mask: np.ndarray, pixel_size_A: float) -> HalfMaps:
    """The resolution to which two half-maps agree in a mask.

    Parameters
    ----------
    paths
        MRC files of any box and voxel size that ``prepare`` would take a consensus of.
    mask
        (N, N, N) on the images' common grid.
    pixel_size_A
        Of that grid.

    Raises
    ------
    InputError
        A file is no cubic map, or cannot be brought to the images' grid.
    """
    box = len(mask)
    first, second = (match_grid(read_map(path), box, pixel_size_A, str(path)) for path in paths)
    curves = corrected_fsc(first, second, mask)
    unmasked, corrected = np.asarray(curves["unmasked"]), np.asarray(curves["corrected"])
    same = bool(unmasked.min() > _SAME_MAP)
    curve = unmasked if same else corrected  # phases of equal maps are never randomised
    resolution_A = resolution_at(curve, FSC_THRESHOLD, box, pixel_size_A)
    return HalfMaps(paths, resolution_A, resolution_A < 2 * pixel_size_A / 0.9, same)


def molecule_warnings(molecule: Molecule, half_maps: HalfMaps | None, pixel_size_A: float) -> list[str]:
    """One line for each suspicious thing."""
    warnings = []
    whose = "the mask" if molecule.threshold is not None else "your mask"
    if molecule.dark:
        warnings.append("the map's strongest density is negative: is it inverted? Density must be white (positive)")
    if molecule.at_edge:
        warnings.append(f"{whose} reaches the rim of the box: the molecule is off-centre, or the level is too low")
    elif molecule.box_share > _MAX_SHARE * np.pi / 6:
        warnings.append(f"{whose} fills {100 * molecule.box_share:.0f} % of the box: look at the picture")
    if molecule.threshold is None and molecule.outside_share > _MAX_OUTSIDE:
        warnings.append(
            f"your mask leaves out {100 * molecule.outside_share:.0f} % of the density above "
            f"{molecule.auto_level:.3g}: it is tighter than the molecule, and nothing moves or is reconstructed outside"
        )
    if half_maps is not None and half_maps.same:
        warnings.append(
            f"{half_maps.paths[0]} and {half_maps.paths[1]} are the same map: no resolution follows from them"
        )
    elif half_maps is not None and half_maps.to_nyquist:
        warnings.append(
            f"the half-maps agree to {half_maps.resolution_A:.2f} A, almost to Nyquist ({2 * pixel_size_A:.2f} A): the "
            "pixel size limits the resolution, images of finer pixels would show more"
        )
    return warnings
