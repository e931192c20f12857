"""A map as the model shapes it."""

from __future__ import annotations

import numpy as np

from flexlib.imaging.maps import Map
from flexlib.model.flex_model import FlexModel
from flexlib.tetra.deform import deform_volume, moving_mask


def deform_at_latent(model: FlexModel, volume: Map, z: np.ndarray) -> np.ndarray:
    """``volume``, of any box N and pixel size, as the model shapes it at latents ``z`` (K,); (N, N, N) float32."""
    mask = moving_mask(model.canonical, model.pixel_size_A, volume.box, volume.pixel_size_A)
    displacements_A = model.displacements_A(np.asarray(z)[None])[0].cpu().numpy()
    return deform_volume(volume.data, volume.pixel_size_A, mask, model.mesh, displacements_A)
