"""The stage mesh: the lattice or a mesh from outside, its segments and its rigidity weights."""

from flexlib.mesh.build import build_mesh

__all__ = ["build_mesh"]
