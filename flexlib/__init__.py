"""flexlib: continuous motion in cryo-EM, from particles to movies and half-maps.

Importing the package is cheap: torch, numba and pandas are only imported by the modules that need them.
"""

__version__ = "0.1.0"
