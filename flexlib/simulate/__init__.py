"""The stage simulate."""

from flexlib.simulate.run import simulate_particles
from flexlib.simulate.settings import Simulation

__all__ = ["Simulation", "simulate_particles"]
