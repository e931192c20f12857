"""The stage prepare."""

from flexlib.prepare.run import prepare_particles

__all__ = ["prepare_particles"]
