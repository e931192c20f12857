"""The mesh stage: prepared consensus and mask in, mesh and quality figures out."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from flexlib.errors import InputError
from flexlib.files import write_json
from flexlib.imaging.fourier import lowpass_map
from flexlib.imaging.maps import Map, read_map, write_label_map
from flexlib.layout import MeshFolder, ParticlesFolder
from flexlib.mesh.chimerax import write_chimerax
from flexlib.mesh.custom import read_custom_mesh
from flexlib.mesh.lattice import bcc_mesh
from flexlib.mesh.segments import load_segmentation
from flexlib.mesh.surface import surface_mesh
from flexlib.mesh.weights import rigidity_weights
from flexlib.tetra.gradients import barycentric_gradients
from flexlib.tetra.io import write_mesh
from flexlib.tetra.tetmesh import MeshVoxels, TetraMesh
from flexlib.tetra.voxels import tetra_index_map, voxelise
from flexlib.workflow_support.connections import check_mesh_keys
from flexlib.workflow_support.settings import MeshSettings

logger = logging.getLogger(__name__)

_INSIDE = 1e-5  # barycentric weight by which a voxel may miss its cell for rounding


def build_mesh(particles_dir: str | os.PathLike[str], out_dir: str | os.PathLike[str], settings: MeshSettings) -> None:
    """Build the mesh of a prepared data set.

    Writes every file of ``MeshFolder``; the tetra index is the cell of each voxel at the training box, -1 outside the
    mask.

    Parameters
    ----------
    particles_dir
        Folder that prepare has written: consensus and mask are read.
    out_dir
        Folder to write.
    settings
        ``mesh:`` at one coarseness; the files that it names are read.

    Raises
    ------
    InputError
        Settings or files do not fit.
    """
    check_mesh_keys(settings)
    particles, out = ParticlesFolder(Path(particles_dir)), MeshFolder(Path(out_dir))
    consensus = read_map(particles.consensus)
    soft_mask = read_map(particles.mask)
    if soft_mask.box != consensus.box:
        raise InputError(f"{particles.mask}: box {soft_mask.box} is not that of {particles.consensus.name}")
    mesh, voxels = make_mesh(consensus, soft_mask.data > 0, settings)

    write_mesh(out.mesh, mesh, like=consensus)
    write_label_map(out.tetra_index, tetra_index_map(voxels), consensus.pixel_size_A, like=consensus)
    write_chimerax(out, mesh, consensus, particles.consensus)
    quality = mesh_quality(mesh, voxels)
    write_json(out.quality, quality)
    for line in quality_lines(quality):
        logger.info("%s", line)


def make_mesh(consensus: Map, mask: np.ndarray, settings: MeshSettings) -> tuple[TetraMesh, MeshVoxels]:
    """The mesh over a mask as the settings ask for it, and the mask's voxels in it.

    Parameters
    ----------
    consensus
        The map that the mask belongs to.
    mask : (N, N, N) bool
        The voxels to cover.
    settings
        ``mesh:`` at one coarseness; the files that it names are read.

    Raises
    ------
    InputError
        Settings or files do not fit.
    """
    pixel_size_A = consensus.pixel_size_A
    cell_size_A = consensus.box * pixel_size_A / settings.cells
    own_weights = False
    if isinstance(settings.custom, Path):
        bare, own_weights = read_custom_mesh(settings.custom, consensus, mask, cell_size_A)
    else:
        segmentation = None
        if settings.segmentation is not None:
            segmentation = load_segmentation(
                settings.segmentation, consensus, mask, settings.connections, settings.segments
            )
        build = surface_mesh if settings.custom == "surface" else bcc_mesh
        bare = build(mask, pixel_size_A, cell_size_A, segmentation)
    voxels = voxelise(bare, mask, pixel_size_A)
    if own_weights and settings.rigidity_weights is None and not settings.rigid_segments:
        return bare, voxels
    density = lowpass_map(consensus.data, pixel_size_A, settings.lowpass_A)
    start = bare.rigidity if own_weights else None
    return replace(bare, rigidity=rigidity_weights(bare, voxels, density, consensus, settings, start)), voxels


def mesh_quality(mesh: TetraMesh, voxels: MeshVoxels) -> dict[str, Any]:
    """What to look at before trusting a mesh: sizes, shapes, voxels per cell; volumes in A^3, angles in degrees.

    ``segments`` lists the same for each segment where there are several.
    """
    ids = np.unique(mesh.segment)
    quality = _quality(mesh, voxels, np.ones(len(mesh.cells), bool))
    quality["num_vertices"] = len(mesh.vertices_A)
    quality["num_bodies"] = count_bodies(mesh)
    quality["num_segments"] = len(ids)
    if len(ids) > 1:
        quality["segments"] = [{"segment": int(one), **_quality(mesh, voxels, mesh.segment == one)} for one in ids]
    return quality


def _quality(mesh: TetraMesh, voxels: MeshVoxels, chosen: np.ndarray) -> dict[str, Any]:
    """The figures of the ``chosen`` (nc,) cells."""
    volumes, angles = mesh.cell_volumes_A3()[chosen], dihedral_angles_deg(mesh)[chosen]
    count = np.bincount(voxels.cell, minlength=len(mesh.cells))[chosen]
    outside = (voxels.bary.min(1) < -_INSIDE) & chosen[voxels.cell]
    rigidity = mesh.rigidity[chosen]
    return {
        "num_cells": int(chosen.sum()),
        "num_voxels": int(count.sum()),
        "uncovered_voxels": int(outside.sum()),
        "volume_total_A3": float(volumes.sum()),
        "cell_volume_min_A3": float(volumes.min()),
        "cell_volume_median_A3": float(np.median(volumes)),
        "cell_volume_max_A3": float(volumes.max()),
        "dihedral_min_deg": float(angles.min()),
        "dihedral_median_of_min_deg": float(np.median(angles.min(1))),
        "dihedral_max_deg": float(angles.max()),
        "voxels_per_cell_min": int(count.min()),
        "voxels_per_cell_median": float(np.median(count)),
        "voxels_per_cell_max": int(count.max()),
        "rigidity_min": float(rigidity.min()),
        "rigidity_median": float(np.median(rigidity)),
        "rigidity_max": float(rigidity.max()),
    }


def quality_lines(quality: dict[str, Any]) -> list[str]:
    """``mesh_quality`` in words, one line for the mesh and one per segment."""
    lines = [
        f"mesh: {quality['num_vertices']} vertices, {quality['num_bodies']} bodies that share no vertex; "
        + _in_words(quality)
    ]
    lines += [f"segment {one['segment']}: {_in_words(one)}" for one in quality.get("segments", [])]
    return lines


def _in_words(q: dict[str, Any]) -> str:
    return (
        f"{q['num_cells']} cells of {q['cell_volume_min_A3']:.0f} to {q['cell_volume_max_A3']:.0f} A^3, "
        f"dihedral angles {q['dihedral_min_deg']:.0f} to {q['dihedral_max_deg']:.0f} degrees, {q['num_voxels']} voxels "
        f"({q['voxels_per_cell_median']:g} per cell, {q['uncovered_voxels']} outside their cells: extrapolated), "
        f"rigidity {q['rigidity_min']:g} to {q['rigidity_max']:g}"
    )


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
