"""Straight series: along a latent axis, and from one end to another."""

from __future__ import annotations

import numpy as np

PERCENTILES = (2.0, 98.0)  # of the particles: where a series along an axis or the principal curve begins and ends


def axis_latents(latents: np.ndarray, axis: int, frames: int) -> np.ndarray:
    """(frames, K) latents along one axis, the middle one at the origin, the others' coordinates zero.

    The ends are at ``PERCENTILES`` of the particles; frames are evenly spaced on
    either side of the origin. Where an axis's percentiles do not enclose zero, its median stands for it.

    Parameters
    ----------
    latents
        (n, K) of the particles.
    axis
        From 0.
    frames
        An odd number.
    """
    low, high = np.percentile(latents, PERCENTILES, axis=0)
    centre = np.where((low < 0) & (high > 0), 0.0, np.median(latents, axis=0))
    points = np.tile(centre, (frames, 1))
    half = frames // 2
    points[: half + 1, axis] = np.linspace(low[axis], centre[axis], half + 1)
    points[half:, axis] = np.linspace(centre[axis], high[axis], half + 1)
    return points


def line_latents(first: np.ndarray, last: np.ndarray, frames: int) -> np.ndarray:
    """(frames, K) latents on the straight line between two, (K,) each, evenly spaced."""
    return first + np.linspace(0, 1, frames)[:, None] * (last - first)
