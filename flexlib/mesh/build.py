"""The mesh stage: prepared consensus and mask in, mesh and quality figures out."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from flexlib.errors import InputError
from flexlib.files import write_json
from flexlib.maps import lowpass_map, read_map, write_map
from flexlib.mesh.io import write_mesh
from flexlib.mesh.lattice import bcc_mesh
from flexlib.mesh.rigidity import barycentric_gradients, density_rigidity
from flexlib.mesh.tetmesh import MeshVoxels, TetraMesh
from flexlib.mesh.voxels import covered, tetra_index_map, voxelise
from flexlib.settings import MeshSettings

logger = logging.getLogger(__name__)

_NOT_YET = ("segmentation", "connections", "rigid_segments", "rigidity_weights", "custom")


def build_mesh(particles_dir: str | os.PathLike[str], out_dir: str | os.PathLike[str], settings: MeshSettings) -> None:
    """Build the mesh of a prepared data set.

    Reads ``consensus.mrc`` and ``mask.mrc`` of ``particles_dir``; writes ``mesh.vtu``, ``tetra_index.mrc`` (cell of
    each voxel at the training box, -1 outside) and ``mesh_quality.json`` to ``out_dir``. Raises ``InputError``.
    """
    for name in _NOT_YET:
        if getattr(settings, name):
            raise InputError(f"mesh.{name}: not supported yet")
    if settings.cells < 1:
        raise InputError(f"mesh.cells: must be a positive number of cells across the box, not {settings.cells}")
    consensus = read_map(Path(particles_dir) / "consensus.mrc")
    soft_mask = read_map(Path(particles_dir) / "mask.mrc")
    if soft_mask.box != consensus.box:
        raise InputError(f"{Path(particles_dir) / 'mask.mrc'}: box {soft_mask.box} is not that of consensus.mrc")
    mask = soft_mask.data > 0
    pixel_size_A = consensus.pixel_size_A
    density = lowpass_map(consensus.data, pixel_size_A, settings.lowpass_A)
    mesh, voxels = mesh_from_density(density, mask, pixel_size_A, settings)

    out_dir = Path(out_dir)
    write_mesh(out_dir / "mesh.vtu", mesh)
    # MRC has no 32-bit integers: 16-bit where they are enough, else float32, exact up to 2^24
    index_type = np.int16 if len(mesh.cells) <= np.iinfo(np.int16).max else np.float32
    write_map(out_dir / "tetra_index.mrc", tetra_index_map(voxels), pixel_size_A, like=consensus, dtype=index_type)
    uncovered = int(mask.sum() - covered(mesh, mask, pixel_size_A).sum())
    quality = mesh_quality(mesh, voxels, uncovered)
    write_json(out_dir / "mesh_quality.json", quality)
    logger.info(
        "mesh: %d vertices, %d cells, %d voxels", quality["num_vertices"], quality["num_cells"], quality["num_voxels"]
    )


def mesh_from_density(
    density: np.ndarray, mask: np.ndarray, pixel_size_A: float, settings: MeshSettings
) -> tuple[TetraMesh, MeshVoxels]:
    """BCC mesh over ``mask`` (N, N, N) bool with rigidity weights from the low-passed ``density`` (N, N, N)."""
    cell_size_A = mask.shape[0] * pixel_size_A / settings.cells
    bare = bcc_mesh(mask, pixel_size_A, cell_size_A)
    voxels = voxelise(bare, mask, pixel_size_A)
    rigidity = density_rigidity(voxels, density, settings.min_rigidity_weight, settings.stiffen_low_density)
    return TetraMesh(bare.vertices_A, bare.cells, rigidity, bare.segment), voxels


def mesh_quality(mesh: TetraMesh, voxels: MeshVoxels, uncovered_voxels: int = 0) -> dict[str, Any]:
    """What to look at before trusting a mesh: sizes, shapes, voxels per cell; volumes in A^3, angles in degrees."""
    volumes = mesh.cell_volumes_A3()
    angles = dihedral_angles_deg(mesh)
    count = np.bincount(voxels.cell, minlength=len(mesh.cells))
    return {
        "num_vertices": len(mesh.vertices_A),
        "num_cells": len(mesh.cells),
        "num_bodies": count_bodies(mesh),
        "num_voxels": len(voxels),
        "uncovered_voxels": uncovered_voxels,
        "volume_total_A3": float(volumes.sum()),
        "cell_volume_min_A3": float(volumes.min()),
        "cell_volume_max_A3": float(volumes.max()),
        "dihedral_min_deg": float(angles.min()),
        "dihedral_max_deg": float(angles.max()),
        "voxels_per_cell_min": int(count.min()),
        "voxels_per_cell_median": float(np.median(count)),
        "voxels_per_cell_max": int(count.max()),
        "rigidity_min": float(mesh.rigidity.min()),
        "rigidity_max": float(mesh.rigidity.max()),
    }


def dihedral_angles_deg(mesh: TetraMesh) -> np.ndarray:
    """(nc, 6) angles in degrees between each pair of a cell's faces."""
    normal = barycentric_gradients(mesh)  # the gradient of weight k is normal to the face opposite vertex k
    normal = normal / np.linalg.norm(normal, axis=2, keepdims=True)
    cosine = normal @ normal.transpose(0, 2, 1)
    first, second = np.triu_indices(4, 1)
    return np.rad2deg(np.arccos(np.clip(-cosine[:, first, second], -1.0, 1.0)))


def count_bodies(mesh: TetraMesh) -> int:
    """Number of parts of the mesh that share no vertex."""
    first, second = mesh.cells[:, [0, 0, 0]].ravel(), mesh.cells[:, 1:].ravel()
    size = len(mesh.vertices_A)
    return int(connected_components(coo_array((np.ones(len(first)), (first, second)), (size, size)), False)[0])
