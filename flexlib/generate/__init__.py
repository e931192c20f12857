"""The stage generate."""

from flexlib.generate.run import generate_series

__all__ = ["generate_series"]
