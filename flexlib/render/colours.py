"""Colours that pictures of one thing share."""

from __future__ import annotations

import numpy as np

SEGMENT_COLOURS = ("#1f6fb4", "#d1731f", "#3a9a5b", "#a33f8f", "#8a6d3b", "#2aa5a0", "#c23b4a", "#6a63c4")


def rgb(colour: str) -> list[float]:
    """Red, green and blue, 0 to 1, of a colour such as ``#1f6fb4``."""
    return [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]


def segment_colours(segment: np.ndarray) -> dict[int, str]:
    """Segment -> colour, in ascending order of the segments."""
    return {int(one): SEGMENT_COLOURS[i % len(SEGMENT_COLOURS)] for i, one in enumerate(np.unique(segment))}
