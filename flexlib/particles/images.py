"""What training and reconstruction see of the images: whitened Fourier transforms and transfer functions.

The data model, for particle i and Fourier pixel k of an N x N image (full plane, |k| < N/2)::

    images[i, k] = transfer[i, k] * sum_j V_j exp(-2 pi i k . p_ij / N) + noise,   E|noise|^2 = 1

``p_ij`` is voxel j's position in the view in pixels from the box centre, *including* ``-origin``; ``transfer`` holds
the CTF, the per-group image scale, the whitening filter 1/sigma(|k|), the per-particle scale and the 1/N of the
orthonormal FFT, and is zero for |k| >= N/2. So the log-likelihood in nats is -1/2 sum over the full plane of the
squared residual; in the half plane of rfft2 (what is stored) columns 0 < kx < N/2 count twice: ``plane_weight``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch


@dataclass(frozen=True)
class ImageBatch:
    """b particle images at one box (N) with what is needed to predict them."""

    rows: np.ndarray  # (b,) int64, rows of the image source
    images: torch.Tensor  # (b, N, N//2+1) complex64, whitened, orthonormal rfft2, phase origin at pixel N//2
    transfer: torch.Tensor  # (b, N, N//2+1) float32 (complex64 with odd aberrations)
    rotation: torch.Tensor  # (b, 3, 3) float32, view = rotation @ volume
    origin_px: torch.Tensor  # (b, 2) float32, subtract from view positions


class ImageSource(Protocol):
    """Images at one box, streamed: the training images, or the full-size ones for reconstruction."""

    box: int
    pixel_size_A: float
    half_set: np.ndarray  # (n,) int8, 0 or 1

    def __len__(self) -> int: ...

    def batch(self, rows: np.ndarray, device: torch.device | str = "cpu") -> ImageBatch:
        """Read, whiten and transform the images at ``rows`` ((b,) int64), never the whole stack."""
        ...


def plane_weight(box: int, max_shell: float | None = None) -> torch.Tensor:
    """(box, box//2+1) float32 weight of each stored Fourier pixel in a sum over the full plane.

    1 at kx = 0, 2 elsewhere (Friedel mates), 0 for |k| >= box/2 and for |k| > ``max_shell`` (shells, optional).
    """
    ky = torch.fft.fftfreq(box, 1.0 / box)[:, None]
    kx = torch.arange(box // 2 + 1, dtype=torch.float32)[None, :]
    radius = torch.sqrt(ky**2 + kx**2)
    weight = torch.where(kx == 0, 1.0, 2.0).expand(radius.shape).clone()
    weight[radius >= box / 2] = 0.0
    if max_shell is not None:
        weight[radius > max_shell] = 0.0
    return weight


def read_ahead(
    source: ImageSource, batches: Iterable[np.ndarray], device: torch.device | str = "cpu"
) -> Iterator[ImageBatch]:
    """Yield the image batches of ``batches`` (arrays of rows) in order, reading one ahead in a thread."""
    with ThreadPoolExecutor(max_workers=1) as reader:
        pending = None
        for rows in batches:
            upcoming = reader.submit(source.batch, rows, device)
            if pending is not None:
                yield pending.result()
            pending = upcoming
        if pending is not None:
            yield pending.result()


def split_batches(rows: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Cut ``rows`` into consecutive batches of at most ``batch_size``, none dropped."""
    return [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]
