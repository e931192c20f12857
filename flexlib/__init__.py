"""flexlib: continuous motion in cryo-EM, from particles to movies and half-maps.

Importing the package is cheap: torch, numba and pandas are only imported by the modules that need them.
"""

import os

__version__ = "0.1.0"

# torch and numba bring a thread pool each. By default a pool's idle threads spin, and take the cores from the other
# pool's working ones (three times the wall time on two cores). Read when the pools start, so it is set before any import.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
