"""Half-map FSC curves of the models, over the whole map and the part that moves, and the resolutions they give."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd

from flexlib.imaging.fsc import corrected_fsc, frequencies_1_per_A, fsc, predicted_truth_fsc, resolution_at

logger = logging.getLogger(__name__)

THRESHOLDS = (0.143, 0.5)
RANDOMISE_BELOW = 0.8  # FSC from which on phases are randomised, to see what correlation the mask makes


def fsc_table(
    halves: dict[str, list[np.ndarray]], mask: np.ndarray, pixel_size_A: float, moving: np.ndarray | None = None
) -> tuple[pd.DataFrame, dict[str, float]]:
    """Half-map FSC of each model and its resolutions.

    Parameters
    ----------
    halves
        Model name -> two (N, N, N) maps.
    mask
        (N, N, N) soft.
    pixel_size_A
        Of the maps.
    moving
        (N, N, N) soft mask of the part that moves, if any: None or all zero for none.

    Returns
    -------
    table
        shell, frequency_1_per_A, resolution_A and for each model ``fsc_<model>_unmasked`` (the maps as solved, which is
        inside the mask), ``_masked``, ``_randomised``, ``_corrected`` (see ``fsc.corrected_fsc``), ``fsc_<model>``: the
        corrected one again, the curve that counts; ``_predicted``: what it predicts for the mean map against the truth
        (``fsc.predicted_truth_fsc``); and where something moves ``_moving_masked``, ``_moving_randomised`` and
        ``_moving`` (corrected), the same within that part.
    resolutions_A
        ``<model>_<threshold>`` and ``<model>_moving_<threshold>`` of the corrected curves.
    """
    box = len(mask)
    frequency = frequencies_1_per_A(box, pixel_size_A)
    with np.errstate(divide="ignore"):
        table = {"shell": np.arange(box // 2), "frequency_1_per_A": frequency, "resolution_A": 1.0 / frequency}
    resolutions_A: dict[str, float] = {}
    for name, (first, second) in halves.items():
        table |= _curves(name, first, second, mask)
        found = [name]
        if moving is not None and moving.any():
            table |= _moving_curves(name, first, second, moving)
            found.append(f"{name}_moving")
        for label in found:
            for threshold in THRESHOLDS:
                resolution_A = resolution_at(table[f"fsc_{label}"], threshold, box, pixel_size_A)
                logger.info("%s: %.2f A at FSC %g", label, resolution_A, threshold)
                resolutions_A[f"{label}_{threshold}"] = resolution_A
    return pd.DataFrame(table), resolutions_A


def _curves(name: str, first: np.ndarray, second: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """Columns of a model over the whole map."""
    curves = corrected_fsc(first, second, mask)
    corrected = np.asarray(curves["corrected"])
    columns = {f"fsc_{name}": corrected}
    for column in ("unmasked", "masked", "randomised", "corrected"):
        columns[f"fsc_{name}_{column}"] = np.asarray(curves[column])
    return columns | {f"fsc_{name}_predicted": predicted_truth_fsc(corrected)}


def _moving_curves(name: str, first: np.ndarray, second: np.ndarray, moving: np.ndarray) -> dict[str, np.ndarray]:
    """Columns of a model within the part that moves.

    That part loses its signal earlier than the whole, and its phases are randomised from there.
    """
    low = np.flatnonzero(fsc(first, second, moving) < RANDOMISE_BELOW)
    randomise_from = max(2, int(low[0])) if low.size else len(moving) // 2
    curves = corrected_fsc(first, second, moving, randomise_from=randomise_from)
    columns = {f"fsc_{name}_moving": np.asarray(curves["corrected"])}
    return columns | {f"fsc_{name}_moving_{column}": np.asarray(curves[column]) for column in ("masked", "randomised")}
