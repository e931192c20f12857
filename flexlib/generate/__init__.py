"""The stage generate: series of maps along the latent space."""

from flexlib.generate.run import generate_series

__all__ = ["generate_series"]
