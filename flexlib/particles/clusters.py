"""Clusters of particles in latent space: those that ``kmeans N`` shows are those that ``--cluster I/N`` selects."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flexlib.errors import InputError
from flexlib.runtime import kd_tree

_SEED = 0
_LOOKED_AT = 100_000  # rows that the centres are found from


@dataclass(frozen=True)
class Clusters:
    """N clusters, numbered along a path of short steps through their particles."""

    centres: np.ndarray  # (N, K) means of the rows of each
    label: np.ndarray  # (n,) int64, the cluster of each row, from 0
    nearest: np.ndarray  # (N,) int64, of each, the row nearest to its centre

    def size(self, number: int) -> int:
        """Rows in a cluster."""
        return int((self.label == number).sum())


def cluster_latents(latents: np.ndarray, count: int, option: str) -> Clusters:
    """K-means clusters of latents; seeded, so always the same.

    Centres are found from at most 100,000 rows, and the steps between neighbouring clusters are kept short by optimal
    leaf ordering (scipy) of their nearest particles.

    Parameters
    ----------
    latents
        (n, K) finite; float32 precision is all that is looked at, so that a table's digits and the model's agree.
    count
        Number of clusters.
    option
        What asks for them, for the message.

    Raises
    ------
    InputError
        The rows do not fall into so many clusters.
    """
    from scipy.cluster.vq import ClusterError, kmeans2

    latents = latents.astype(np.float32).astype(np.float64)
    rows = np.sort(np.random.default_rng(_SEED).permutation(len(latents))[:_LOOKED_AT])
    try:
        if count > len(rows):
            raise ClusterError
        centres, _ = kmeans2(latents[rows], count, 50, minit="++", missing="raise", seed=_SEED)
    except ClusterError as error:
        raise InputError(f"{option}: {len(latents)} particles do not fall into so many clusters") from error
    distance, label = kd_tree(centres).query(latents)
    # of each cluster's own rows: the row nearest to the centre of a small one may belong to a neighbour
    members = [np.flatnonzero(label == number) for number in range(count)]
    nearest = np.array([own[np.argmin(distance[own])] for own in members])
    order = _short_steps(latents[nearest])
    return Clusters(centres[order], np.argsort(order)[label], nearest[order])


def _short_steps(latents: np.ndarray) -> np.ndarray:
    """An order of (N, K) latents with short steps, from lower to higher first coordinate."""
    from scipy.cluster.hierarchy import leaves_list, linkage

    if len(latents) < 3:
        order = np.arange(len(latents))
    else:
        order = leaves_list(linkage(latents, "average", optimal_ordering=True))
    return order if latents[order[0], 0] <= latents[order[-1], 0] else order[::-1]
