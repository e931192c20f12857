"""The noise and the scale of each optics group: as sources of images need them, and in noise.csv."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flexlib.files import atomic_path


@dataclass(frozen=True)
class Calibration:
    """What was measured of each optics group's images, and the grid that it refers to."""

    image_scale: np.ndarray  # (groups,) what one voxel of the consensus is worth in the images
    sigma: np.ndarray  # (groups, full_box//2) noise standard deviation by shell of the full box's orthonormal FFT
    full_box: int
    full_pixel_size_A: float


def write_noise(path: str | Path, sigma: np.ndarray, frequency_1_per_A: np.ndarray) -> None:
    """Write sigma (groups, shells) as noise.csv; groups count from 1 as rlnOpticsGroup."""
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["group", "shell", "frequency_1_per_A", "sigma"])
        for group, line in enumerate(sigma, 1):
            for shell, value in enumerate(line):
                writer.writerow([group, shell, f"{frequency_1_per_A[shell]:.8g}", f"{value:.8g}"])


def read_noise(path: str | Path) -> np.ndarray:
    """(groups, shells) float64 sigma from noise.csv."""
    columns = np.loadtxt(path, delimiter=",", skiprows=1, usecols=(0, 1, 3), ndmin=2)
    groups = int(columns[:, 0].max())
    return columns[:, 2].reshape(groups, -1)
