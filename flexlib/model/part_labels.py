"""Where the parts are that particles may lack, at any box."""

from __future__ import annotations

import numpy as np

from flexlib.model.flex_model import FlexModel


def labels_at(model: FlexModel, box: int, pixel_size_A: float) -> np.ndarray:
    """The model's parts at another box of the same centre: of each voxel, the label nearest to it.

    Returns
    -------
    labels
        (box, box, box) uint8, 0 what is always there (all, where the model has no parts), 1 to S the parts.
    """
    if model.parts is None:
        return np.zeros((box,) * 3, np.uint8)
    nearest = np.rint((np.arange(box) - box // 2) * (pixel_size_A / model.pixel_size_A)).astype(int) + model.box // 2
    inside = (nearest >= 0) & (nearest < model.box)
    labels = model.parts[np.ix_(*[nearest.clip(0, model.box - 1)] * 3)]
    labels[~(inside[:, None, None] & inside[None, :, None] & inside[None, None, :])] = 0
    return labels
