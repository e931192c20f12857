"""A mesh from outside instead of the regular one: where it lies, what it covers, what becomes of it."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np

from flexlib.errors import InputError
from flexlib.imaging.maps import Map
from flexlib.mesh.surface import fill_surface
from flexlib.tetra.io import read_grid, read_mesh, surface_of
from flexlib.tetra.tetmesh import TetraMesh
from flexlib.tetra.voxels import covered

logger = logging.getLogger(__name__)

_LEAST_COVER = 0.5  # share of the mask's voxels that a mesh must hold to be taken for this particle's


def read_custom_mesh(path: Path, consensus: Map, mask: np.ndarray, cell_size_A: float) -> tuple[TetraMesh, bool]:
    """Read a ready mesh, or a closed surface to fill, and put it over the mask.

    The index map of CryoSPARC's flex_mesh (``.pkl``, ``.p``) says where it lies. Points of other files are Angstrom,
    either from the box centre or in the frame of the consensus map's header (as programs that show the map write them);
    whichever covers more of the mask is taken.

    Parameters
    ----------
    path
        The file.
    consensus
        The map that the mask belongs to.
    mask : (N, N, N) bool
        The voxels to cover.
    cell_size_A
        Size in A of the cells with which a surface of triangles is filled.

    Returns
    -------
    mesh : TetraMesh
        In A from the box centre.
    own_weights : bool
        Whether it brings rigidity weights of its own.

    Raises
    ------
    InputError
        The file is no mesh, has cells without volume, or covers less than half of the mask.
    """
    own_weights = False
    if path.suffix.lower() in (".pkl", ".p", ".pickle"):
        from flexlib.mesh.cryosparc import read_flex_mesh  # a command of its own: not loaded with the package

        mesh, own_weights = read_flex_mesh(path), True
        share = float(covered(mesh, mask, consensus.pixel_size_A)[mask].mean())
    else:
        grid = read_grid(path)
        kinds = {block.type for block in grid.cells}
        if "tetra" not in kinds and "triangle" in kinds:
            mesh = fill_surface(*surface_of(grid, path), cell_size_A)
        else:
            mesh, own_weights = read_mesh(path), "rigidity" in grid.cell_data
        mesh, share = _over_the_mask(mesh, consensus, mask, path)
    if share < _LEAST_COVER:
        low, high = mesh.vertices_A.min(0), mesh.vertices_A.max(0)
        raise InputError(
            f"{path}: covers {100 * share:.0f} % of the mask; its points run from {_text(low)} to {_text(high)} A "
            "from the box centre: is it in Angstrom, and of this particle?"
        )
    logger.info("%s: %d cells cover %.1f %% of the mask", path, len(mesh.cells), 100 * share)
    return mesh, own_weights


def _over_the_mask(mesh: TetraMesh, consensus: Map, mask: np.ndarray, path: Path) -> tuple[TetraMesh, float]:
    """The mesh in A from the box centre, and the share of the mask it covers."""
    centre_A = np.array(consensus.corner_A) + consensus.box // 2 * consensus.pixel_size_A
    best, best_share, best_name = mesh, -1.0, ""
    for name, origin_A in (("from the box centre", np.zeros(3)), ("in the consensus map's frame", centre_A)):
        trial = replace(mesh, vertices_A=mesh.vertices_A - origin_A)
        share = float(covered(trial, mask, consensus.pixel_size_A)[mask].mean())
        if share > best_share + 1e-9:
            best, best_share, best_name = trial, share, name
    logger.info("%s: points taken as Angstrom %s", path, best_name)
    return best, best_share


def _text(position: np.ndarray) -> str:
    return "(" + ", ".join(f"{value:.0f}" for value in position) + ")"
