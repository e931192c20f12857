"""Tetrahedral meshes: the lattice, its rigidity weights, its elastic modes, voxels inside cells."""
