"""The noise and the scale of each optics group: as sources of images need them, and in noise.csv."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from flexlib.files import atomic_path, reading
from flexlib.imaging.fourier import shell_means
from flexlib.imaging.image_transforms import plane_radius


@dataclass(frozen=True)
class Calibration:
    """What was measured of each optics group's images, and the grid that it refers to."""

    image_scale: np.ndarray  # (groups,) what one voxel of the consensus is worth in the images
    sigma: np.ndarray  # (groups, full_box//2) noise standard deviation by shell of the full box's orthonormal FFT
    full_box: int
    full_pixel_size_A: float


def sigma_at(shell: np.ndarray, sigma: np.ndarray, full_box: int) -> np.ndarray:
    """The noise between shells, by interpolation of its logarithm at the mean |k| of each shell's pixels.

    Shell 0, the image's mean, tells of no other frequency: a grey level that varies from image to image is in it alone.

    Parameters
    ----------
    shell
        (...,) |k| in shells of the full box; those below a half are shell 0.
    sigma
        (groups, shells) noise of each shell.
    full_box
        Side of the images it was measured on.

    Returns
    -------
    sigma
        (groups, ...).
    """
    centre = _mean_radius(full_box)[1:]
    lines = []
    for line in np.log(sigma):
        slope = (line[2] - line[1]) / (centre[1] - centre[0])
        between = np.interp(shell, centre, line[1:]) + slope * np.minimum(shell - centre[0], 0.0)
        lines.append(np.exp(np.where(shell < 0.5, line[0], between)))
    return np.stack(lines)


@lru_cache(maxsize=8)
def _mean_radius(box: int) -> np.ndarray:
    """(shells,) mean |k| of the pixels of each shell."""
    return shell_means(plane_radius(box).numpy(), 2, rim=True)


def write_noise(path: str | Path, sigma: np.ndarray, frequency_1_per_A: np.ndarray) -> None:
    """Write sigma (groups, shells) as noise.csv; groups count from 1 as rlnOpticsGroup."""
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["group", "shell", "frequency_1_per_A", "sigma"])
        for group, line in enumerate(sigma, 1):
            for shell, value in enumerate(line):
                writer.writerow([group, shell, f"{frequency_1_per_A[shell]:.8g}", f"{value:.8g}"])


def read_noise(path: str | Path) -> np.ndarray:
    """(groups, shells) float64 sigma from noise.csv. Raises InputError where it cannot be read."""
    with reading(path, ValueError, IndexError), Path(path).open() as file:
        columns = np.loadtxt(file, delimiter=",", skiprows=1, usecols=(0, 1, 3), ndmin=2)
        groups = int(columns[:, 0].max())
        return columns[:, 2].reshape(groups, -1)
