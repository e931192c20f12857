"""Latents of other methods beside ours: how many neighbours stay, and what they tell of ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from flexlib.runtime import kd_tree

_MOST = 5000  # particles that are compared
_NEAR_SHARE, _LEAST_NEAR = 0.01, 5  # of the particles, those that are its neighbours
_REGRESSION = 20  # neighbours whose mean predicts a latent
_BOOTSTRAPS = 200


@dataclass(frozen=True)
class Agreement:
    """How far two embeddings of the same particles agree."""

    neighbours: int  # of each particle
    kept: float  # share of them that are neighbours in the other embedding too
    kept_se: float
    chance: float  # what it would be by chance
    explained: np.ndarray  # (K,) R2 of each of our latents, predicted from the other embedding
    explained_se: np.ndarray  # (K,)


def compare_embeddings(ours: np.ndarray, theirs: np.ndarray, seed: int = 0) -> Agreement:
    """Compare (n, K) with (n, L) latents of the same particles, at most 5,000 of them.

    R2 is of odd rows, each predicted by the mean of its 20 nearest even rows in the other embedding. Latents that are
    mostly noise are explained by nothing: it cannot exceed the share of a latent that is signal.
    """
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(ours))[:_MOST]
    ours, theirs = (_scaled(latents[rows]) for latents in (ours, theirs))
    count = len(rows)
    near = min(max(_LEAST_NEAR, round(_NEAR_SHARE * count)), count - 1)
    first, second = (kd_tree(latents).query(latents, near + 1)[1] for latents in (ours, theirs))
    kept = np.array(
        [len(np.intersect1d(a, b)) - (i in b and i in a) for i, (a, b) in enumerate(zip(first, second, strict=True))]
    )
    share = kept / near
    fitted, tested = np.arange(0, count, 2), np.arange(1, count, 2)
    nearest = kd_tree(theirs[fitted]).query(theirs[tested], min(_REGRESSION, len(fitted)))[1]
    residual = (ours[tested] - ours[fitted][nearest.reshape(len(tested), -1)].mean(1)) ** 2
    total = (ours[tested] - ours[tested].mean(0)) ** 2
    drawn = rng.poisson(1.0, (_BOOTSTRAPS, len(tested))).astype(np.float64)
    explained = 1 - residual.sum(0) / total.sum(0)
    bootstraps = 1 - (drawn @ residual) / np.maximum(drawn @ total, 1e-12)
    error = float(share.std(ddof=1) / np.sqrt(count))
    return Agreement(near, float(share.mean()), error, near / (count - 1), explained, bootstraps.std(0))


def _scaled(latents: np.ndarray) -> np.ndarray:
    return (latents - latents.mean(0)) / np.maximum(latents.std(0), 1e-12)


def embedding_table(names: list[Path], found: list[Agreement]) -> pd.DataFrame:
    """The rows of embeddings.csv."""
    rows = []
    for name, one in zip(names, found, strict=True):
        row = {"embedding": Path(name).name, "neighbours": one.neighbours, "kept": one.kept, "kept_se": one.kept_se}
        row["chance"] = one.chance
        for k, (value, error) in enumerate(zip(one.explained, one.explained_se, strict=True), 1):
            row |= {f"r2_latent_{k}": value, f"r2_latent_{k}_se": error}
        rows.append(row)
    return pd.DataFrame(rows)
