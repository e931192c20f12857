"""Where in latent space there are particles."""

from __future__ import annotations

import numpy as np

from flexlib.runtime import kd_tree

_SEED = 0

NEAR_STANDARD_DEVIATIONS = 0.5  # per latent dimension: particles closer to a frame than this are counted beside it
_BEYOND_SHARE = 0.05  # latents with fewer particles near than this part of the usual is beyond the data
_COUNTED = 500  # particles whose neighbours are counted, to know the usual


class Neighbourhood:
    """How many particles lie near given latents, and whether there are hardly any."""

    def __init__(self, latents: np.ndarray) -> None:
        """``latents`` (n, K), finite."""
        self.spread = np.maximum(latents.std(0), 1e-12)
        self._tree = kd_tree(latents / self.spread)
        rows = np.random.default_rng(_SEED).permutation(len(latents))[:_COUNTED]
        usual = float(np.median(self.num_near(latents[rows])))
        self.fewest = max(1.0, _BEYOND_SHARE * usual)  # near what is not beyond the data

    def num_near(self, points: np.ndarray) -> np.ndarray:
        """(m,) particles within half a standard deviation (rms over the dimensions) of each of (m, K) points."""
        radius = NEAR_STANDARD_DEVIATIONS * np.sqrt(points.shape[1])
        return self._tree.query_ball_point(points / self.spread, radius, return_length=True).astype(int)

    def beyond_data(self, points: np.ndarray) -> np.ndarray:
        """(m,) bool: nobody near, or fewer than a twentieth of those near the median particle."""
        return self.num_near(points) < self.fewest
