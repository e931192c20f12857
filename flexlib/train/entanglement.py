"""How far latents follow the imaging instead of the molecule: what view, CTF, shift and pose say of each latent.

For each latent and each group of covariates a ridge regression is cross-validated, and compared with what the same
regression finds where the particles' latents are dealt out anew.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.special import eval_legendre, lpmv

from flexlib.particles.pose_change import PoseChange
from flexlib.particles.table import Particles

logger = logging.getLogger(__name__)

MOST_ROWS = 20_000  # of the particles, that are looked at
LEAST_R2 = 0.01  # of a latent's variance: less is not worth a warning, however certain
_FOLDS = 5
_PERMUTATIONS = 50
_FALSE_ALARM = 0.01  # chance of one warning or more, over all latents and groups, where nothing is entangled
_VIEW_DEGREE = 4
_CLIPPED = 4.0  # standard deviations at which shifts and pose changes end


@dataclass(frozen=True)
class Entanglement:
    """What one group of covariates says of one latent."""

    latent: int  # from 1
    covariates: str  # "view direction", "in-plane angle", "defocus", "shift", "pose change" or "contrast"
    r2: float  # share of the variance that they predict, cross-validated; 0 or a little less where they say nothing
    chance_mean: float  # of r2 over permuted latents
    chance_std: float
    chance_limit: float  # of r2: above it is more than chance
    more_than_chance: bool  # above ``chance_limit`` and ``LEAST_R2``


def entanglement(latents: np.ndarray, particles: Particles, change: PoseChange | None, seed: int) -> list[Entanglement]:
    """Measure how much of each latent each group of covariates tells; the log warns where it is more than chance.

    Parameters
    ----------
    latents
        (n, K); rows that are not finite are left out.
    particles
        Whose they are, in the same order, with the poses of the input. Rows of one image (symmetry copies) are kept
        together in folds and permutations.
    change
        What refinement made of poses and contrasts; None where they were not refined.
    seed
        Of the choice of rows, the folds and the permutations.

    Returns
    -------
    found
        One for each latent and each group that varies; empty of fewer than ten images.
    """
    generator = np.random.default_rng((seed, 23))
    rows = _chosen_rows(particles, np.isfinite(latents).all(1), generator)
    if len(rows) < 2 * _FOLDS:
        return []
    some, values = particles.subset(rows.ravel()), latents[rows.ravel()].astype(np.float64)
    groups = _covariates(some, change, rows.ravel())
    fold = np.repeat(np.arange(len(rows)) % _FOLDS, rows.shape[1])  # the images are in a random order
    order = np.stack([rows_of_images(generator.permutation(len(rows)), rows.shape[1]) for _ in range(_PERMUTATIONS)])
    found = [
        _compared(axis + 1, name, scores, design.shape[1], len(groups) * latents.shape[1])
        for axis in range(latents.shape[1])
        for name, design in groups.items()
        for scores in [_r2(design, np.c_[values[:, axis], values[order, axis].T], fold)]
    ]
    for one in found:
        if one.more_than_chance:
            logger.warning(
                "latent %d: %.1f %% of it is told by %s, where chance tells no more than %.1f %%: see the report",
                one.latent,
                100 * one.r2,
                one.covariates,
                100 * max(one.chance_limit, 0.0),
            )
    return found


def rows_of_images(images: np.ndarray, copies: int) -> np.ndarray:
    """(m copies,) rows of images (m,) in an array with ``copies`` rows for each image, one after the other."""
    return (images[:, None] * copies + np.arange(copies)).ravel()


def _chosen_rows(particles: Particles, known: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """(images, copies) rows of at most ``MOST_ROWS``, images in random order.

    Images with fewer rows than most have (a copy without latents) are left out.
    """
    rows = np.flatnonzero(known)
    if not len(rows):
        return np.zeros((0, 1), int)
    stack, index = particles.stack_index[rows], particles.image_index[rows]
    rows = rows[np.lexsort((rows, index, stack))]
    key = np.stack([particles.stack_index[rows], particles.image_index[rows]])
    starts = np.flatnonzero(np.r_[True, (key[:, 1:] != key[:, :-1]).any(0)])
    counts = np.diff(np.r_[starts, len(rows)])
    copies = int(np.bincount(counts).argmax())
    starts = generator.permutation(starts[counts == copies])[: max(MOST_ROWS // copies, 1)]
    return rows[starts[:, None] + np.arange(copies)]


# covariates ---------------------------------------------------------------------------------------------------------


def _covariates(particles: Particles, change: PoseChange | None, rows: np.ndarray) -> dict[str, np.ndarray]:
    """(n, p) functions of each group that vary over the particles, of zero mean and unit variance.

    ``change`` is that of all particles, of which ``particles`` are the ``rows``.
    """
    groups: dict[str, list[np.ndarray]] = {
        "view direction": _harmonics(particles.rotation[:, 2]),
        "in-plane angle": _waves(particles.rotation),
        "defocus": _defocus(particles),
        "shift": _polynomials(particles.origin_A),
    }
    if change is not None:
        groups["pose change"] = _pose_change(particles.rotation, change.rotation_rad[rows], change.shift_A[rows])
        groups["contrast"] = _smooth(change.contrast[rows], 3)
    designs = {name: _standardised(np.stack(columns, axis=1)) for name, columns in groups.items()}
    return {name: design for name, design in designs.items() if design.shape[1]}


def _harmonics(direction: np.ndarray) -> list[np.ndarray]:
    """Real spherical harmonics of degrees 1 to 4, but for their norm, of directions (n, 3)."""
    height, azimuth = np.clip(direction[:, 2], -1, 1), np.arctan2(direction[:, 1], direction[:, 0])
    return [
        lpmv(order, degree, height) * wave(order * azimuth)
        for degree in range(1, _VIEW_DEGREE + 1)
        for order in range(degree + 1)
        for wave in ((np.cos, np.sin) if order else (np.cos,))
    ]


def _waves(rotation: np.ndarray) -> list[np.ndarray]:
    """Sine and cosine of RELION's psi, twice and three times it: the in-plane angle of the volume's z axis."""
    psi = np.arctan2(rotation[:, 1, 2], -rotation[:, 0, 2])
    return [wave(order * psi) for order in (1, 2, 3) for wave in (np.sin, np.cos)]


def _defocus(particles: Particles) -> list[np.ndarray]:
    """Smooth functions of mean defocus and astigmatism, and the astigmatism's direction."""
    mean_A = (particles.defocus_u_A + particles.defocus_v_A) / 2
    difference_A = particles.defocus_u_A - particles.defocus_v_A
    twice = 2 * particles.defocus_angle_rad + np.where(difference_A < 0, np.pi, 0.0)
    directed = [wave(twice) * (difference_A != 0) for wave in (np.cos, np.sin)]
    return _smooth(mean_A, 4) + _smooth(np.abs(difference_A), 3) + directed


def _pose_change(rotation: np.ndarray, turn_rad: np.ndarray, shift_A: np.ndarray) -> list[np.ndarray]:
    """Polynomials of turn (n, 3) and shift (n, 2) about the volume's axes, and both as they are, in the view's frame.

    A motion that bears on the consensus' poses turns the molecule by w and shifts it by t in the volume's frame, which
    is seen as R w and the first two components of R t: over all views neither has a mean.
    """
    in_volume = [np.einsum("nij,ni->nj", rotation, seen) for seen in (turn_rad, np.pad(shift_A, ((0, 0), (0, 1))))]
    return [*_polynomials(np.concatenate(in_volume, axis=1)), *turn_rad.T, *shift_A.T]


def _smooth(values: np.ndarray, degree: int) -> list[np.ndarray]:
    """Legendre polynomials, of degree 1 to ``degree``, of the values' ranks; outliers count no more than others."""
    rank = 2 * (stats.rankdata(values) - 0.5) / len(values) - 1
    return [eval_legendre(order, rank) for order in range(1, degree + 1)]


def _polynomials(values: np.ndarray) -> list[np.ndarray]:
    """First and second powers and products of the columns of (n, d)."""
    spread = values.std(0)
    scaled = np.clip((values - values.mean(0)) / np.where(spread > 0, spread, 1.0), -_CLIPPED, _CLIPPED)
    first, second = np.triu_indices(values.shape[1])
    return [*scaled.T, *(scaled[:, first] * scaled[:, second]).T]


def _standardised(design: np.ndarray) -> np.ndarray:
    """Columns of zero mean and unit variance, without those that are constant."""
    size, spread = np.abs(design).max(0), design.std(0)
    varies = spread > 1e-6 * np.maximum(size, 1e-30)
    return (design[:, varies] - design[:, varies].mean(0)) / spread[varies]


# regression ---------------------------------------------------------------------------------------------------------


def _r2(design: np.ndarray, targets: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """(m,) cross-validated R^2 of ridge regressions of targets (n, m) on ``design`` (n, p); 0 of what is constant.

    The error of a fold under the fit to the others, over that under their mean. The penalty is p in units of a row: it
    matters only where there are few rows, or columns that hardly differ.
    """
    targets = targets - targets.mean(0)
    spread = targets.std(0)
    alive = spread > 1e-9
    targets = targets / np.where(alive, spread, 1.0)
    full = np.c_[design, np.ones(len(design))]
    parts = [(full[fold == k], targets[fold == k]) for k in range(_FOLDS)]
    grams = np.stack([x.T @ x for x, _ in parts])
    overlaps = np.stack([x.T @ y for x, y in parts])
    squares = np.stack([(y**2).sum(0) for _, y in parts])
    penalty = design.shape[1] * np.diag(np.r_[np.ones(design.shape[1]), 0.0])
    error, reference = np.zeros(len(alive)), np.zeros(len(alive))
    for k in range(_FOLDS):
        gram, overlap = grams.sum(0) - grams[k], overlaps.sum(0) - overlaps[k]
        fit = np.linalg.solve(gram + penalty, overlap)
        error += squares[k] - 2 * (fit * overlaps[k]).sum(0) + (fit * (grams[k] @ fit)).sum(0)
        mean = overlap[-1] / gram[-1, -1]
        reference += squares[k] - 2 * mean * overlaps[k, -1] + mean**2 * grams[k, -1, -1]
    return np.where(alive, 1 - error / np.where(alive, reference, 1.0), 0.0)


def _compared(latent: int, covariates: str, scores: np.ndarray, num_columns: int, num_tests: int) -> Entanglement:
    """The first of the scores against the others, which are of permuted latents.

    Few permutations do not reach far into the tail, so its form is taken from what R^2 of p columns is without any
    relation, a sum of p squares, and its place and width from them.
    """
    r2, chance = float(scores[0]), scores[1:]
    mean, std = float(chance.mean()), float(chance.std(ddof=1))
    rare = _FALSE_ALARM / num_tests
    heavy = stats.t.isf(rare, len(chance) - 1) * np.sqrt(1 + 1 / len(chance))
    skew = (stats.chi2.isf(rare, num_columns) - num_columns) / np.sqrt(2 * num_columns)
    limit = mean + float(max(heavy, skew)) * std
    return Entanglement(
        latent=latent,
        covariates=covariates,
        r2=round(r2, 5),
        chance_mean=round(mean, 5),
        chance_std=round(std, 5),
        chance_limit=round(limit, 5),
        more_than_chance=bool(r2 > max(limit, LEAST_R2)),
    )
