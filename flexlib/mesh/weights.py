"""Relative rigidity weight of each cell: from the density, per segment, or the user's own."""

from __future__ import annotations

import csv
import logging
from pathlib import Path

import numpy as np
from scipy import ndimage

from flexlib.errors import InputError
from flexlib.imaging.maps import Map, read_map
from flexlib.tetra.tetmesh import MeshVoxels, TetraMesh
from flexlib.untrusted import as_float64, parsing, read_npy
from flexlib.workflow_support.settings import MeshSettings

logger = logging.getLogger(__name__)

RIGID_SEGMENT_WEIGHT = 20.0  # 3DFlex's weight for rigid segments
_STIFF_PERIPHERY_WEIGHT = 3.0  # 3DFlex's weight for low-density periphery
_PERIPHERY_RANGE = (0.1, 0.5)  # relative density of cells that count as non-empty periphery
_ROBUST_MAXIMUM_PERCENTILE = 95.0


def rigidity_weights(
    mesh: TetraMesh,
    voxels: MeshVoxels,
    density: np.ndarray,
    consensus: Map,
    settings: MeshSettings,
    start: np.ndarray | None = None,
) -> np.ndarray:
    """(nc,) float64 weights as the settings ask for them.

    From the density (``density_rigidity``), or ``start`` (nc,) where the mesh brings its own; then, where
    ``settings.rigidity_weights`` names a file, from it: a ``.csv`` of segment and weight replaces the weights of those
    segments, a ``.npy`` (one number per cell) or ``.mrc`` (sampled at the cells' centres) replaces all. Rigid segments
    have 20 in any case.

    Parameters
    ----------
    mesh, voxels
        The mesh, and the mask's voxels in it.
    density : (N, N, N)
        Low-passed ``consensus`` on the voxels' grid.
    consensus
        The map, for the frame of a weight map.
    settings
        ``mesh:`` at one coarseness.
    start : (nc,) or None
        Weights of the mesh's own.

    Raises
    ------
    InputError
        Files or segments do not fit the mesh.
    """
    if start is None:
        weight = density_rigidity(voxels, density, settings.min_rigidity_weight, settings.stiffen_low_density)
    else:
        weight = start.copy()
    ids = np.unique(mesh.segment)
    if settings.rigidity_weights is not None:
        path = Path(settings.rigidity_weights)
        if path.suffix.lower() == ".csv":
            for segment, value in read_segment_weights(path).items():
                weight[_cells_of(segment, mesh.segment, ids, str(path))] = value
        elif path.suffix.lower() == ".npy":
            weight = read_cell_weights(path, len(mesh.cells))
        elif path.suffix.lower() in (".mrc", ".map"):
            weight = _sampled_weights(path, mesh, consensus, settings.min_rigidity_weight)
        else:
            raise InputError(
                f"mesh.rigidity_weights: {path}: a .csv (segment, weight), .npy (one per cell) or .mrc file is needed"
            )
    for segment in settings.rigid_segments:
        weight[_cells_of(segment, mesh.segment, ids, "mesh.rigid_segments")] = RIGID_SEGMENT_WEIGHT
    return weight


def _cells_of(segment: int, of_cell: np.ndarray, ids: np.ndarray, name: str) -> np.ndarray:
    if segment not in ids:
        raise InputError(f"{name}: unknown segment {segment}; the mesh has {', '.join(str(one) for one in ids)}")
    return of_cell == segment


def read_segment_weights(path: Path) -> dict[int, float]:
    """Segment -> weight from a .csv with the header ``segment,weight``. Raises ``InputError`` naming the line."""
    with parsing(path, "text file"), path.open(newline="") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        names, rows = reader.fieldnames, [(reader.line_num, row) for row in reader]
    if names is None or not {"segment", "weight"} <= set(names):
        raise InputError(f"{path}: its first line must be: segment,weight")
    weights = {}
    for line, row in rows:
        try:
            segment, value = int(row["segment"]), float(row["weight"])
        except (TypeError, ValueError):
            raise InputError(f"{path}: line {line}: a segment and a number are needed") from None
        if not 0 < value < np.inf:
            raise InputError(f"{path}: line {line}: the weight must be positive, not {value:g}")
        weights[segment] = value
    return weights


def read_cell_weights(path: Path, num_cells: int) -> np.ndarray:
    """(nc,) positive weights from a .npy file. Raises ``InputError`` naming the cell."""
    weight = read_npy(path, ".npy array")
    if weight.shape != (num_cells,) or weight.dtype.kind not in "fiu":
        raise InputError(
            f"{path}: {num_cells} numbers, one per cell of the mesh, are needed; its shape is {weight.shape}"
        )
    weight = as_float64(weight)
    if not np.isfinite(weight).all() or weight.min() <= 0:
        raise InputError(f"{path}: weights must be positive; cell {int(np.argmin(weight))} has {weight.min():g}")
    return weight


def _sampled_weights(path: Path, mesh: TetraMesh, consensus: Map, minimum: float) -> np.ndarray:
    """Weights of a map at the cells' centres, linear; ``minimum`` where the map is not positive or does not reach."""
    weights = read_map(path)
    centre_A = mesh.vertices_A[mesh.cells].mean(1) + np.array(consensus.corner_A)
    centre_A += consensus.box // 2 * consensus.pixel_size_A
    voxel = (centre_A - np.array(weights.corner_A)) / weights.pixel_size_A
    value = ndimage.map_coordinates(weights.data, voxel[:, ::-1].T, order=1, cval=0.0).astype(np.float64)
    if not (value > 0).any():
        raise InputError(
            f"{path}: no cell of the mesh lies where this map is positive: check its voxel size and origin"
        )
    if (value <= 0).any():
        logger.info("%s: %d cells lie where it is not positive, weight %g", path, int((value <= 0).sum()), minimum)
    return np.where(value > 0, value, minimum)


def density_rigidity(
    voxels: MeshVoxels, density: np.ndarray, min_rigidity_weight: float = 0.5, stiffen_low_density: bool = False
) -> np.ndarray:
    """Rigidity weight of each cell: 1 where the map is densest, ``min_rigidity_weight`` in empty space.

    The mean density of a cell, relative to the 95th percentile over cells, is mapped linearly to the weight.
    ``stiffen_low_density`` raises non-empty cells of low density (a tenth to a half of that maximum) to 3.

    Parameters
    ----------
    voxels
        The mask's voxels in the mesh.
    density : (N, N, N)
        Low-passed map at the voxels' box.
    min_rigidity_weight
        Weight of empty cells.
    stiffen_low_density
        Whether the periphery is made stiff.

    Returns
    -------
    (nc,) float64
    """
    num_cells = len(voxels.cells)
    count = np.bincount(voxels.cell, minlength=num_cells)
    total = np.bincount(voxels.cell, weights=density.ravel()[voxels.index], minlength=num_cells)
    filled = count > 0
    mean = np.zeros(num_cells)
    mean[filled] = total[filled] / count[filled]
    if not filled.all():  # cells smaller than a voxel: take the mean of the cells around their vertices
        mean[~filled] = _mean_of_neighbours(voxels, mean, filled)[~filled]
    maximum = np.percentile(mean, _ROBUST_MAXIMUM_PERCENTILE)
    relative = np.clip(mean / maximum, 0.0, 1.0) if maximum > 0 else np.ones(num_cells)
    weight = min_rigidity_weight + (1.0 - min_rigidity_weight) * relative
    if stiffen_low_density:
        weight[(relative > _PERIPHERY_RANGE[0]) & (relative < _PERIPHERY_RANGE[1])] = _STIFF_PERIPHERY_WEIGHT
    return weight


def _mean_of_neighbours(voxels: MeshVoxels, value: np.ndarray, known: np.ndarray) -> np.ndarray:
    """(nc,) mean over a cell's vertices of the mean over the known cells at that vertex."""
    flat = voxels.cells[known].ravel()
    total = np.bincount(flat, weights=np.repeat(value[known], 4), minlength=voxels.num_vertices)
    count = np.bincount(flat, minlength=voxels.num_vertices)
    at_vertex = total / np.maximum(count, 1)
    has = (count > 0)[voxels.cells]
    return (at_vertex[voxels.cells] * has).sum(1) / np.maximum(has.sum(1), 1)
