"""What training and reconstruction see of the images: whitened Fourier transforms and transfer functions.

The data model, for particle i and Fourier pixel k of an N x N image (full plane, |k| < N/2)::

    images[i, k] = transfer[i, k] * sum_j V_j exp(-2 pi i k . p_ij / N) + noise,   E|noise|^2 = 1

``p_ij`` is voxel j's position in the view in pixels from the box centre, *including* ``-origin``; ``transfer`` holds
the CTF, the per-group image scale, the whitening filter 1/sigma(|k|), the per-particle scale and the 1/N of the
orthonormal FFT, and is zero for |k| >= N/2. So the log-likelihood in nats is -1/2 sum over the full plane of the
squared residual; in the half plane of rfft2 (what is stored) columns 0 < kx < N/2 count twice: ``plane_weight`` of
``imaging/image_transforms.py``.

One map predicts images at every box. A map that is Fourier-cropped keeps its voxel values (densities), so the sum over
voxels of a map at pixel size a is (p/a)^3 times that of the same map at the images' pixel size p. ``transfer`` takes
that factor in::

    transfer = image_scale * particle_scale * CTF / sigma(|k|) * (a/p)^3 / C

where C is the side, in original pixels, of the real-space crop (C p = N a). An orthonormal FFT's coefficients are
carried over unchanged when an image is Fourier-cropped from C to N pixels, so noise stays at unit variance and both
boxes give the same numbers at the same frequency. ``image_scale`` is what one consensus voxel summed along the
projection is worth in units of the original images.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from flexlib.particles.table import Particles


@dataclass(frozen=True)
class ImageBatch:
    """b particle images at one box (N) with what is needed to predict them."""

    rows: np.ndarray  # (b,) int64, rows of the image source
    images: torch.Tensor  # (b, N, N//2+1) complex64, whitened, orthonormal rfft2, phase origin at pixel N//2
    transfer: torch.Tensor  # (b, N, N//2+1) float32 (complex64 with odd aberrations)
    # (b, 3, 3) float32, view = rotation @ volume; times the image's magnification: RELION's matrix transposed, and the
    # ratio of the source's pixel size to the image's own where optics groups differ
    rotation: torch.Tensor
    origin_px: torch.Tensor  # (b, 2) float32, subtract from view positions
    contrast: torch.Tensor | None = None  # (b,) factor of the transfer functions; None for 1

    def take(self, rows: torch.Tensor) -> ImageBatch:
        """The part of the batch at ``rows`` ((m,) int)."""
        return ImageBatch(
            self.rows[rows.cpu().numpy()],
            self.images[rows],
            self.transfer[rows],
            self.rotation[rows],
            self.origin_px[rows],
            None if self.contrast is None else self.contrast[rows],
        )


class ImageSource(Protocol):
    """Images at one box, streamed: the training images, or the full-size ones for reconstruction."""

    box: int
    pixel_size_A: float
    half_set: np.ndarray  # (n,) int8, 0 or 1
    particles: Particles  # box of this source; pixel size too, or (groups resampled from others) very nearly so

    def __len__(self) -> int: ...

    def batch(self, rows: np.ndarray, device: torch.device | str = "cpu") -> ImageBatch:
        """Read, whiten and transform the images at ``rows`` ((b,) int64), never the whole stack."""
        ...


def to_device(array: np.ndarray | torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """An array of the host's as a tensor on ``device``; a GPU is not waited for: the copy is from pinned memory."""
    tensor = torch.as_tensor(array)
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


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
    """Cut ``rows`` into consecutive batches of at most ``batch_size``, none dropped, of equal size but for one row."""
    return np.array_split(rows, -(-len(rows) // batch_size)) if len(rows) else []
