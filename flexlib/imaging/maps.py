"""Density maps: MRC files, Fourier and real-space boxes, filters and the solvent mask.

Volumes are (z, y, x), cubic, even side N, with the box centre at voxel ``N//2``; see ``docs/conventions.md``.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import mrcfile
import numpy as np
from scipy import fft, ndimage

from flexlib.errors import InputError
from flexlib.files import atomic_path

_DUST_FRACTION = 0.05  # bodies with less than this part of the largest body's density are dropped
_NOISE_SIGMAS = 3.0  # automatic threshold: this many solvent standard deviations above the solvent level
_MIN_PEAK_FRACTION = 0.015  # and at least this fraction of the dense core, for maps without solvent noise
_AUTO_BLUR = 2.0  # automatic masks are made from the map low-passed this much further: moving domains are blurred


@dataclass(frozen=True)
class Map:
    """A cubic volume and where its file places it in space."""

    data: np.ndarray  # (N, N, N) float32, axes (z, y, x)
    pixel_size_A: float
    origin_A: tuple[float, float, float] = (0.0, 0.0, 0.0)  # header's ORIGIN, (x, y, z)
    nstart: tuple[int, int, int] = (0, 0, 0)  # header's NXSTART, NYSTART, NZSTART

    @property
    def box(self) -> int:
        """Voxels along each axis."""
        return self.data.shape[0]

    @property
    def corner_A(self) -> tuple[float, float, float]:
        """(x, y, z) of the first voxel in the header's frame."""
        return map_corner_A(self.origin_A, self.nstart, (self.pixel_size_A,) * 3)


def read_map(path: str | os.PathLike[str]) -> Map:
    """Read an MRC/CCP4 map; stored axis orders other than (z, y, x) are transposed.

    A map of odd side gets a layer of zeros before the first of each axis: its side is then even, and its centre, voxel
    ``N//2``, where it was. Raises ``InputError`` unless the file holds one finite, cubic volume with equal, positive
    voxel sizes.
    """
    stored = _read_mrc(Path(path))
    shape, voxel_A = stored.data.shape, stored.voxel_A
    if len(shape) != 3 or len(set(shape)) != 1:
        raise InputError(f"{path}: a cubic map is needed, its shape (z, y, x) is {shape}")
    if min(voxel_A) <= 0 or max(voxel_A) - min(voxel_A) > 1e-3 * max(voxel_A):
        raise InputError(f"{path}: equal, positive voxel sizes are needed, the header has {list(voxel_A)} A")
    data = stored.data.astype(np.float32, copy=False)
    if not np.isfinite(data).all():
        raise InputError(f"{path}: holds values that are not finite")
    volume = Map(data, float(np.mean(voxel_A)), stored.origin_A, stored.nstart)
    if volume.box % 2 == 0:
        return volume
    even = volume.box + 1
    origin_A, nstart = _placement(volume, even, volume.pixel_size_A)
    return Map(crop_or_pad_real(data, even), volume.pixel_size_A, (origin_A[0], origin_A[1], origin_A[2]), nstart)


@dataclass(frozen=True)
class LabelGrid:
    """Whole numbers on a grid of any shape, and where it lies in space."""

    labels: np.ndarray  # (nz, ny, nx) int32
    voxel_A: tuple[float, float, float]  # voxel size along x, y, z
    corner_A: tuple[float, float, float]  # (x, y, z) of the first voxel, as the file's header places it


def read_label_map(path: str | os.PathLike[str]) -> LabelGrid:
    """Read an MRC file that holds a whole number per voxel, in any of MRC's number types, at any box.

    Raises ``InputError`` where it is no volume, has values that are not whole numbers, or no voxel size.
    """
    stored = _read_mrc(Path(path))
    if stored.data.ndim != 3:
        raise InputError(f"{path}: a volume of labels is needed, its shape is {stored.data.shape}")
    if min(stored.voxel_A) <= 0:
        raise InputError(f"{path}: the header has no voxel size: set it, labels are placed by it")
    if not np.isfinite(stored.data).all() or (np.abs(stored.data - np.rint(stored.data)) > 1e-3).any():
        raise InputError(f"{path}: labels are whole numbers, this map has others: it may be a density map")
    labels = np.rint(stored.data).astype(np.int32)
    return LabelGrid(labels, stored.voxel_A, map_corner_A(stored.origin_A, stored.nstart, stored.voxel_A))


def map_corner_A(
    origin_A: tuple[float, ...], nstart: tuple[int, ...], voxel_A: tuple[float, ...]
) -> tuple[float, float, float]:
    """(x, y, z) of a map's first voxel in A: the header's ORIGIN, or where that is zero NSTART (as ChimeraX does)."""
    corner = origin_A if any(origin_A) else [start * size for start, size in zip(nstart, voxel_A, strict=True)]
    return (float(corner[0]), float(corner[1]), float(corner[2]))


@dataclass(frozen=True)
class _StoredMap:
    """An MRC file's content: data (z, y, x) in the file's number type; the rest in the order x, y, z."""

    data: np.ndarray
    voxel_A: tuple[float, float, float]
    origin_A: tuple[float, float, float]
    nstart: tuple[int, int, int]


def _read_mrc(path: Path) -> _StoredMap:
    """Read an MRC file of any shape, axes brought to (z, y, x)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with mrcfile.open(path, permissive=True) as file:
                if file.data is None:
                    raise InputError(f"{path}: not a readable MRC map")
                data, header, voxel = np.array(file.data), file.header, file.voxel_size
                stored_axes = [int(header.mapc), int(header.mapr), int(header.maps)]
                start = [int(header.nxstart), int(header.nystart), int(header.nzstart)]
                origin_A = (float(header.origin.x), float(header.origin.y), float(header.origin.z))
                voxel_A = (float(voxel.x), float(voxel.y), float(voxel.z))
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a readable MRC map ({error})") from error
    if data.ndim == 3 and sorted(stored_axes) == [1, 2, 3] and stored_axes != [1, 2, 3]:
        section_first = stored_axes[::-1]  # axis (1 x, 2 y, 3 z) of each array dimension
        data = np.ascontiguousarray(data.transpose([section_first.index(axis) for axis in (3, 2, 1)]))
        start = [start[stored_axes.index(axis)] for axis in (1, 2, 3)]
    return _StoredMap(data, voxel_A, origin_A, (start[0], start[1], start[2]))


def write_map(
    path: str | os.PathLike[str], data: np.ndarray, pixel_size_A: float, like: Map | None = None, dtype=np.float32
) -> None:
    """Write a volume as MRC, atomically, placed so that its centre lies where that of ``like`` lies.

    Parameters: ``data`` (N, N, N), written as ``dtype`` (float32; int16 or int8 for labels); ``like`` a map at any box
    and pixel size whose ORIGIN and NSTART are carried over, scaled to this box.
    """
    with atomic_path(path) as temporary, mrcfile.new(temporary, overwrite=True) as file:
        file.set_data(np.ascontiguousarray(data, dtype=dtype))
        file.set_volume()
        file.voxel_size = pixel_size_A
        if like is not None:
            origin_A, nstart = _placement(like, data.shape[0], pixel_size_A)
            for axis, value in zip("xyz", origin_A, strict=True):
                file.header.origin[axis] = value
            file.nstart = nstart


def _placement(like: Map, box: int, pixel_size_A: float) -> tuple[list[float], tuple[int, int, int]]:
    """ORIGIN in A and NSTART of a map at another box whose centre stays where that of ``like`` is.

    Readers use one of the two fields, so each is made right by itself; NSTART that was zero stays zero.
    """
    corner_A = like.box // 2 * like.pixel_size_A - box // 2 * pixel_size_A
    corner_A = 0.0 if abs(corner_A) < 1e-6 * pixel_size_A * box else corner_A
    by_nstart = any(like.nstart) and not any(like.origin_A)
    origin_A = [0.0 if by_nstart else origin + corner_A for origin in like.origin_A]
    if not any(like.nstart):
        return origin_A, (0, 0, 0)
    start = [round((s * like.pixel_size_A + corner_A) / pixel_size_A) for s in like.nstart]
    return origin_A, (start[0], start[1], start[2])


def fourier_crop_map(volume: np.ndarray, box: int) -> np.ndarray:
    """Resample (N, N, N) to a smaller ``box`` of the same extent by dropping high frequencies.

    The centre stays at voxel ``N//2`` and values stay densities. The new Nyquist planes are zero. Returns float32.
    """
    if box > volume.shape[0]:
        raise ValueError(f"cannot crop a box of {volume.shape[0]} to {box}")
    return _fourier_resample(volume, box)


def fourier_pad_map(volume: np.ndarray, box: int) -> np.ndarray:
    """Resample (N, N, N) to a larger ``box`` of the same extent; the inverse of ``fourier_crop_map``."""
    if box < volume.shape[0]:
        raise ValueError(f"cannot pad a box of {volume.shape[0]} to {box}")
    return _fourier_resample(volume, box)


def _fourier_resample(volume: np.ndarray, box: int) -> np.ndarray:
    """Zero-pad or crop the spectrum of ``volume`` to even side ``box``; planes at either Nyquist are zero."""
    old = volume.shape[0]
    if old == box:
        return np.array(volume, dtype=np.float32)
    half = min(old, box) // 2  # frequencies -half < k < half are kept
    spectrum = fft.rfftn(fft.ifftshift(np.asarray(volume, dtype=np.float32)), workers=fft_workers())
    resampled = np.zeros((box, box, box // 2 + 1), dtype=spectrum.dtype)
    low, high = slice(0, half), slice(-half + 1, None)
    for z in (low, high):
        for y in (low, high):
            resampled[z, y, :half] = spectrum[z, y, :half]
    volume = fft.fftshift(fft.irfftn(resampled, s=(box,) * 3, workers=fft_workers()))
    return (volume * (box / old) ** 3).astype(np.float32)


def crop_or_pad_real(volume: np.ndarray, box: int, fill: float = 0.0) -> np.ndarray:
    """Cut or extend (N, N, N) to side ``box`` at the same voxel size: voxel ``N//2`` becomes voxel ``box//2``."""
    old = volume.shape[0]
    result = np.full((box,) * 3, fill, dtype=volume.dtype)
    start = box // 2 - old // 2
    new_slice = slice(max(start, 0), min(start + old, box))
    old_slice = slice(max(-start, 0), max(-start, 0) + new_slice.stop - new_slice.start)
    result[new_slice, new_slice, new_slice] = volume[old_slice, old_slice, old_slice]
    return result


def shell_radius(box: int) -> np.ndarray:
    """(N, N, N//2+1) float32 radius of each coefficient of ``rfftn``, in shells (cycles per box)."""
    k = fft.fftfreq(box, 1.0 / box).astype(np.float32) ** 2
    half = np.arange(box // 2 + 1, dtype=np.float32) ** 2
    return np.sqrt(k[:, None, None] + k[None, :, None] + half[None, None, :])


def lowpass_map(volume: np.ndarray, pixel_size_A: float, resolution_A: float, edge_shells: float = 4.0) -> np.ndarray:
    """Low-pass (N, N, N) at ``resolution_A`` with a cosine edge ``edge_shells`` wide, centred on the cut.

    Returns float32; a resolution beyond Nyquist leaves the map unchanged.
    """
    box = volume.shape[0]
    cut = box * pixel_size_A / resolution_A
    if cut >= box / 2:
        return np.array(volume, dtype=np.float32)
    ramp = np.clip((shell_radius(box) - cut) / edge_shells + 0.5, 0.0, 1.0)
    gain = (0.5 + 0.5 * np.cos(np.pi * ramp)).astype(np.float32)
    spectrum = fft.rfftn(np.asarray(volume, dtype=np.float32), workers=fft_workers())
    return fft.irfftn(spectrum * gain, s=volume.shape, workers=fft_workers()).astype(np.float32)


def sharpen_map(volume: np.ndarray, pixel_size_A: float, bfactor_A2: float) -> np.ndarray:
    """Multiply the amplitudes of (N, N, N) at frequency s by ``exp(-bfactor_A2 s^2 / 4)``: negative sharpens.

    The sign is RELION's and CryoSPARC's. Returns float32.
    """
    box = volume.shape[0]
    frequency = shell_radius(box) / (box * pixel_size_A)
    gain = np.exp(-0.25 * bfactor_A2 * frequency**2).astype(np.float32)
    spectrum = fft.rfftn(np.asarray(volume, dtype=np.float32), workers=fft_workers())
    return fft.irfftn(spectrum * gain, s=volume.shape, workers=fft_workers()).astype(np.float32)


def soft_edge(mask: np.ndarray, pixel_size_A: float, dilate_A: float, width_A: float) -> np.ndarray:
    """Grow a binary mask by ``dilate_A`` and add a cosine edge of ``width_A`` outside it.

    Returns (N, N, N) float32 in [0, 1]: 1 within ``dilate_A`` of the mask, 0 beyond ``dilate_A + width_A``.
    """
    if not mask.any():
        return np.zeros(mask.shape, np.float32)
    distance_A = ndimage.distance_transform_edt(~mask).astype(np.float32) * pixel_size_A
    if width_A <= 0:
        return (distance_A <= dilate_A).astype(np.float32)
    ramp = np.clip((distance_A - dilate_A) / width_A, 0.0, 1.0)
    soft = 0.5 + 0.5 * np.cos(np.pi * ramp)
    return np.where(ramp < 1.0, soft, 0.0).astype(np.float32)


def auto_threshold(volume: np.ndarray) -> float:
    """Density level that separates particle from solvent, low enough to hold domains blurred by motion.

    The solvent's level and noise are those of the negative side of the histogram, where no particle is: the mode,
    and the spread of the values below it. The level is ``_NOISE_SIGMAS`` above the solvent, but never below
    ``_MIN_PEAK_FRACTION`` of the dense core, which takes over in maps whose solvent was flattened.
    """
    inside = volume[_sphere(volume.shape[0])]
    level = float(np.median(inside))
    below = inside[inside < level]
    for _ in range(5):  # the particle's voxels pull the median up: take the median of what is not particle
        sigma = 1.4826 * float(np.median(level - below)) if below.size else 0.0
        solvent = inside[inside < level + 3.0 * sigma]
        if solvent.size == 0:
            break
        level = float(np.median(solvent))
        below = inside[inside < level]
    peak = float(np.mean(np.sort(inside)[-max(1, inside.size // 1000) :]))
    return max(level + _NOISE_SIGMAS * sigma, level + _MIN_PEAK_FRACTION * (peak - level))


def make_mask(
    volume: np.ndarray,
    pixel_size_A: float,
    lowpass_A: float = 10.0,
    threshold: float | Literal["auto"] = "auto",
    dilate_A: float = 2.0,
    pad_A: float = 5.0,
) -> np.ndarray:
    """Solvent mask of a consensus map: low-pass, threshold, drop dust, dilate, add a cosine edge.

    Parameters: ``threshold`` an absolute density level of the low-passed map, or "auto": ``auto_threshold`` of the map
    low-passed at ``2 * lowpass_A``, where domains that move stand out of the noise as far as they reach.
    Returns (N, N, N) float32 in [0, 1]. Raises ``InputError`` if nothing lies above the threshold.
    """
    blur = _AUTO_BLUR if threshold == "auto" else 1.0
    filtered = lowpass_map(volume, pixel_size_A, blur * lowpass_A)
    level = auto_threshold(filtered) if threshold == "auto" else float(threshold)
    core = (filtered > level) & _sphere(volume.shape[0])
    if not core.any():
        raise InputError(f"mask: no voxel of the map lies above the threshold {level:g} (maximum {filtered.max():g})")
    return soft_edge(_drop_dust(core, filtered - level), pixel_size_A, dilate_A, pad_A)


def resample_mask(mask: np.ndarray, box: int, scale: float | None = None) -> np.ndarray:
    """Bring a mask (N, N, N) to another ``box``, trilinear, in [0, 1], centre on centre.

    ``scale`` is the ratio of new to old voxel size; None keeps the extent. Fourier resampling would ring: a hard mask
    would leave traces tens of Angstrom beyond its edge.
    """
    old = mask.shape[0]
    if scale is None:
        scale = old / box
    if old == box and scale == 1:
        return np.array(mask, dtype=np.float32)
    offset = old // 2 - scale * (box // 2)
    source = np.asarray(mask, dtype=np.float32)
    if scale > 1:  # average over the larger voxels, so that thin edges are not missed
        source = ndimage.uniform_filter(source, size=2 * int(scale / 2) + 1, mode="constant")
    result = ndimage.affine_transform(source, [scale] * 3, offset, (box,) * 3, order=1, mode="constant")
    return np.clip(result, 0.0, 1.0).astype(np.float32)


def _drop_dust(core: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Keep the connected bodies whose summed ``weight`` is not negligible against the largest one's."""
    labels, count = ndimage.label(core, structure=np.ones((3, 3, 3)))
    if count <= 1:
        return core
    mass = ndimage.sum_labels(weight, labels, np.arange(count + 1))
    mass[0] = 0.0
    return (mass >= _DUST_FRACTION * mass.max())[labels] & core


def _sphere(box: int) -> np.ndarray:
    """(N, N, N) bool, the ball of radius ``N/2`` about voxel ``N//2``."""
    axis = (np.arange(box) - box // 2).astype(np.float32) ** 2
    return axis[:, None, None] + axis[None, :, None] + axis[None, None, :] < (box / 2) ** 2


def fft_workers() -> int:
    """Threads for FFTs: those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
