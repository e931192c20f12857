"""Tetrahedral meshes: the lattice, its rigidity weights, its elastic modes, voxels inside cells."""

from flexlib.mesh.build import build_mesh

__all__ = ["build_mesh"]
