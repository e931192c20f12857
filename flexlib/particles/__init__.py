"""Particle metadata and images: RELION STAR, CryoSPARC .cs, MRC stacks."""

from flexlib.particles.read import read_particles

__all__ = ["read_particles"]
