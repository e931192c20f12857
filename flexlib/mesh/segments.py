"""Segments of the mask: read from a file, brought to the mask's grid, grown to fill it; and how they hang together.

Three kinds of file: UCSF Segger's ``.seg`` (HDF5; leaf regions are followed to their top-level ancestor, which is the
segment a user sees; numbers are Segger's region ids), MRC maps of whole numbers, and atomic models
(``segments_of_model``).
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from scipy import ndimage

from flexlib.atoms.model import is_model_file
from flexlib.errors import InputError
from flexlib.imaging.maps import LabelGrid, Map, read_label_map
from flexlib.mesh.segments_of_model import labels_of_model
from flexlib.untrusted import check_claim, parsing
from flexlib.workflow_support.connections import parse_connections

logger = logging.getLogger(__name__)

SOLVENT = -1
_SMALLEST_PART = 0.05  # parts of a segment smaller than this share of its largest part go to their neighbours
_SAME_EXTENT = 0.01  # relative difference up to which two grids count as the same box


@dataclass(frozen=True)
class Segmentation:
    """Segments that fill a box, and the pairs of them that are joined."""

    labels: np.ndarray  # (N, N, N) int32, the segment of every voxel of the box; outside the mask the nearest one's
    ids: tuple[int, ...]  # the segments that have voxels in the mask, ascending
    pairs: tuple[tuple[int, int], ...]  # joined segments


def load_segmentation(
    path: str | os.PathLike[str],
    consensus: Map,
    mask: np.ndarray,
    connections: str | None,
    segments: tuple[str, ...] = (),
) -> Segmentation:
    """Segments of ``mask`` from a file at any box, and their connections.

    Parameters
    ----------
    path
        Segger ``.seg``, a label map ``.mrc`` or an atomic model, in the consensus map's frame.
    consensus
        The map whose grid and header position the mask.
    mask : (N, N, N) bool
        The voxels to give to segments.
    connections
        As in ``parse_connections``; None joins all segments that touch.
    segments
        Of an atomic model, as in ``parse_segments``; none makes a segment of each chain.

    Raises
    ------
    InputError
        The file cannot be read, does not lie over the mask, or the connections do not fit.
    """
    path = Path(path)
    if is_model_file(path):
        labels = labels_of_model(path, consensus, mask, segments)
    elif segments:
        raise InputError(f"mesh.segments: {path} is no atomic model: its segments are numbers")
    else:
        labels = labels_on_grid(read_segments(path), consensus, path)
    share = float((labels[mask] >= 0).mean())
    if share == 0:
        raise InputError(f"{path}: none of its segments lies in the mask: check voxel size and origin in its header")
    logger.info("%s: %.0f %% of the mask is labelled, the rest is given to the nearest segment", path, 100 * share)
    filled = fill_box(labels, mask)
    ids = tuple(int(one) for one in np.unique(filled[mask]))
    outside = sorted(set(np.unique(labels[labels >= 0]).tolist()) - set(ids))
    if outside:
        logger.warning("%s: segments %s have no voxel in the mask: left out", path, ", ".join(map(str, outside)))
    touching = touching_pairs(filled, mask)
    if connections is None:
        return Segmentation(filled, ids, touching)
    pairs = parse_connections(connections, ids)
    for a, b in pairs:
        if (min(a, b), max(a, b)) not in touching:
            raise InputError(f"mesh.connections: {a}>{b}: segments {a} and {b} do not touch in the mask")
    return Segmentation(filled, ids, pairs)


def read_segments(path: str | os.PathLike[str]) -> LabelGrid:
    """Read a segmentation; solvent is ``SOLVENT``, everything else a segment.

    In a label map negative numbers are solvent and 0 is a segment (3DFlex's form); a map without negative numbers
    has its solvent at 0. In a ``.seg`` file 0 is solvent.

    Raises
    ------
    InputError
        The file is no segmentation.
    """
    path = Path(path)
    if path.suffix.lower() == ".seg":
        return _read_segger(path)
    grid = read_label_map(path)
    solvent = grid.labels < 0
    if not solvent.any():
        solvent = grid.labels == 0
    return LabelGrid(np.where(solvent, SOLVENT, grid.labels).astype(np.int32), grid.voxel_A, grid.corner_A)


def _read_segger(path: Path) -> LabelGrid:
    """Segger's HDF5 format, version 2 (segfile.py of Segger): ``mask`` holds leaf regions, ``parent_ids`` the tree."""
    with parsing(path, "HDF5 file"), h5py.File(path, "r") as file:
        kind = file.attrs.get("format", b"")
        kind = kind.decode("latin1") if isinstance(kind, bytes) else str(kind)
        missing = [name for name in ("mask", "region_ids", "parent_ids") if name not in file]
        if kind != "segger" or missing:
            what = f"has no {missing[0]}" if missing else f"its format is {kind!r}"
            raise InputError(f"{path}: not a Segger segmentation: {what}")
        names = ("mask", "region_ids", "parent_ids")
        unpacked = sum(_checked_size(path, file, name) for name in names)
        transform = file.attrs.get("ijk_to_xyz_transform")
        transform = None if transform is None else np.asarray(transform, np.float64)
    with parsing(path, "HDF5 file", unpacked), h5py.File(path, "r") as file:
        mask, region, parent = (np.array(file[name]) for name in names)
    if transform is None:
        raise InputError(f"{path}: has no ijk_to_xyz_transform, so its voxels lie nowhere: save it again from Segger")
    if transform.size != 12 or not np.isfinite(transform).all():
        raise InputError(f"{path}: its ijk_to_xyz_transform is not a matrix of 3 x 4 finite numbers")
    if mask.ndim != 3 or mask.size == 0 or region.ndim != 1 or region.shape != parent.shape or region.size == 0:
        raise InputError(f"{path}: mask must be a volume, and region_ids and parent_ids lists of one length")
    transform = transform.reshape(3, 4)
    voxel_A = np.diagonal(transform[:, :3])
    if np.abs(transform[:, :3] - np.diag(voxel_A)).max() > 1e-4 * voxel_A.max() or voxel_A.min() <= 0:
        raise InputError(f"{path}: its grid is turned or mirrored: resample it on the consensus map's grid")
    return LabelGrid(_root_labels(mask, region, parent, path), _three(voxel_A), _three(transform[:, 3]))


def _checked_size(path: Path, file: h5py.File, name: str) -> int:
    """Bytes of a dataset of whole numbers that lies in the file itself. Raises ``InputError`` where it is none."""
    found = file[name] if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
    if not isinstance(found, h5py.Dataset) or found.external or found.is_virtual or found.dtype.kind not in "iu":
        raise InputError(f"{path}: {name} is no array of whole numbers in this very file")
    size = int(found.size) * int(found.dtype.itemsize)
    check_claim(path, size, path.stat().st_size, compressed=True)
    return size


def _root_labels(mask: np.ndarray, region: np.ndarray, parent: np.ndarray, path: Path) -> np.ndarray:
    """(nz, ny, nx) int32: each voxel's top-level region, ``SOLVENT`` where the mask is 0. Raises ``InputError``."""
    root = _root_regions(region, parent, path)
    named = np.array(sorted(root))
    ends = (named[0], named[-1], *root.values())
    if min(ends) < 0 or max(ends) > np.iinfo(np.int32).max:
        raise InputError(f"{path}: its region_ids and parent_ids must be from 0 to {np.iinfo(np.int32).max}")
    at = np.minimum(np.searchsorted(named, mask), len(named) - 1)
    stray = (mask != 0) & (named[at] != mask)
    if stray.any():
        raise InputError(f"{path}: region {mask[stray][0]} of its mask is not among its region_ids")
    return np.where(mask != 0, np.array([root[one] for one in named.tolist()], np.int32)[at], SOLVENT)


def _root_regions(region: np.ndarray, parent: np.ndarray, path: Path) -> dict[int, int]:
    """Region -> top-level ancestor; a parent of 0 ends the chain. Raises ``InputError`` for a chain without end."""
    above = dict(zip(region.tolist(), parent.tolist(), strict=True))
    root: dict[int, int] = {}
    for one in above:
        chain, top = {one: None}, one
        while above.get(top, 0) != 0 and top not in root:
            top = above[top]
            if top in chain:
                raise InputError(f"{path}: the parents of region {one} go round in a circle")
            chain[top] = None
        root |= dict.fromkeys(chain, root.get(top, top))
    return {one: root[one] for one in above}


def _three(values: np.ndarray) -> tuple[float, float, float]:
    return (float(values[0]), float(values[1]), float(values[2]))


def labels_on_grid(grid: LabelGrid, consensus: Map, name: str | os.PathLike[str] = "segmentation") -> np.ndarray:
    """(N, N, N) int32 labels on the consensus map's grid by the nearest voxel; ``SOLVENT`` outside the label grid.

    Voxels are matched by their physical positions, ORIGIN or NSTART of both headers included. Where one of the two
    has no origin at all and both cover the same box, that box is the frame: programs often drop the origin.
    """
    box, pixel_size_A = consensus.box, consensus.pixel_size_A
    shape, voxel_A = grid.labels.shape[::-1], np.array(grid.voxel_A)
    shift = np.array(consensus.corner_A) - np.array(grid.corner_A)
    same_box = np.abs(np.array(shape) * voxel_A / (box * pixel_size_A) - 1).max() < _SAME_EXTENT
    if same_box and np.abs(shift).max() > 0.5 * pixel_size_A and not (any(consensus.corner_A) and any(grid.corner_A)):
        logger.info("%s: its header and the consensus map's disagree on the origin; taken as the same box", name)
        shift = np.zeros(3)
    index, inside = [], []
    for axis in range(3):
        nearest = np.rint((np.arange(box) * pixel_size_A + shift[axis]) / voxel_A[axis]).astype(int)
        inside.append((nearest >= 0) & (nearest < shape[axis]))
        index.append(np.clip(nearest, 0, shape[axis] - 1))
    labels = grid.labels[np.ix_(index[2], index[1], index[0])]
    known = inside[2][:, None, None] & inside[1][None, :, None] & inside[0][None, None, :]
    return np.where(known, labels, SOLVENT).astype(np.int32)


def fill_box(labels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Give every voxel of the box the segment that is nearest to it.

    Small loose parts of a segment are given away too: a cell or two of mesh on their own would move with nothing.

    Parameters
    ----------
    labels : (N, N, N) int
        ``SOLVENT`` where unknown.
    mask : (N, N, N) bool
        Where parts of segments are looked for.

    Returns
    -------
    (N, N, N) int32
    """
    filled = _nearest_label(labels)
    inside = np.where(mask, filled, SOLVENT)
    ids, rank = np.unique(inside, return_inverse=True)
    rank = rank.reshape(inside.shape) + (0 if ids[0] == SOLVENT else 1)  # 0 is outside the mask
    dust = np.zeros(mask.shape, bool)
    for number, extent in enumerate(ndimage.find_objects(rank), 1):
        if extent is None:
            continue
        parts, count = ndimage.label(rank[extent] == number, structure=np.ones((3, 3, 3)))
        size = np.bincount(parts.ravel(), minlength=count + 1)
        size[0] = 0
        small = size < _SMALLEST_PART * size.max()
        small[0] = False
        if small.any():
            dust[extent] |= small[parts]
    if not dust.any():
        return filled
    logger.info("%d voxels in small parts of segments are given to their neighbours", int(dust.sum()))
    return np.where(mask, _nearest_label(np.where(dust, SOLVENT, inside)), filled).astype(np.int32)


def _nearest_label(labels: np.ndarray) -> np.ndarray:
    """``labels`` with each unknown voxel given that of the nearest known one."""
    unknown = labels < 0
    if not unknown.any():
        return labels
    nearest = ndimage.distance_transform_edt(unknown, return_distances=False, return_indices=True)
    return labels[tuple(nearest)]


def touching_pairs(labels: np.ndarray, mask: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Pairs (lower, higher) of segments with voxels of the mask side by side, along x, y or z."""
    found: set[tuple[int, int]] = set()
    for axis in range(3):
        front = [slice(None)] * 3
        back = [slice(None)] * 3
        front[axis], back[axis] = slice(1, None), slice(None, -1)
        a, b = labels[tuple(front)], labels[tuple(back)]
        differ = (a != b) & mask[tuple(front)] & mask[tuple(back)]
        both = np.unique(np.sort(np.stack([a[differ], b[differ]], axis=1), axis=1), axis=0)
        found.update((int(low), int(high)) for low, high in both)
    return tuple(sorted(found))
