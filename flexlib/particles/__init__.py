"""Particle metadata and images: RELION STAR, CryoSPARC .cs, MRC stacks."""
