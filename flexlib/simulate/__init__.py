"""The stage simulate."""

from flexlib.simulate.run import simulate_particles

__all__ = ["simulate_particles"]
