"""flexlib: continuous motion in cryo-EM, from particles to movies and half-maps.

Importing the package is cheap: torch, numba and pandas are only imported by the modules that need them.
"""

import os

__version__ = "0.1.0"

# torch and numba bring a thread pool each. By default the idle threads of one spin, and take the cores from the other
# (three times the wall time on two cores). The variable is read when a pool starts, so it is set before any import.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
