"""Whether a model lies in a map where its file says: its density must correlate with the map's.

Where it does not, or would much better elsewhere, the message says what is likely wrong: a shift, another origin, the
other hand. Nothing is moved.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
from scipy import fft, ndimage

from flexlib.atoms.model import AtomicModel
from flexlib.errors import InputError
from flexlib.imaging.fourier import fft_workers, lowpass_map, shell_radius
from flexlib.imaging.maps import Map
from flexlib.tetra.deform import splat_cubic

logger = logging.getLogger(__name__)

_LEAST = 0.35  # correlation of a model that is in its place
_FITS = 0.6  # of one elsewhere, for that to be told
_BETTER = 0.1  # by which it is higher elsewhere, where the model is out of place
_RESOLUTION_A, _RESOLUTION_PX = 8.0, 3.0  # that the two are compared at: the coarser
_SMOOTH_A = 80.0  # coarser features than this say nothing about where a model fits
_AROUND_A = 6.0  # of an atom, where the two are compared
_NEAR_A = 4.0  # a shift that is less is none


@dataclass(frozen=True)
class Frame:
    """Where the box of a map lies in the frame of its header."""

    corner_A: np.ndarray  # (3,) of the first voxel
    half_A: float  # from there to the box centre

    @classmethod
    def of(cls, volume: Map) -> Frame:
        """That of a map."""
        return cls(np.array(volume.corner_A), volume.box // 2 * volume.pixel_size_A)

    @property
    def centre_A(self) -> np.ndarray:
        """(3,) of the box centre."""
        return self.corner_A + self.half_A

    def mistakes(self) -> dict[str, np.ndarray]:
        """Shifts (3,) of a model that other programs' ideas of the origin leave it in need of, by what to say."""
        return {
            "the map's header has an origin that the model was not placed by": self.corner_A,
            "the model's zero is the box centre": self.centre_A,
        }


def check_placement(model: AtomicModel, volume: Map, key: str) -> np.ndarray:
    """(na, 3) positions from the box centre of a model that lies in a map.

    Parameters
    ----------
    model
        Whose positions are in the frame of the map's header.
    volume
        Density, zero outside the mask.
    key
        Of the config, for the message.

    Raises
    ------
    InputError
        Its density does not correlate with the map's, or would much better elsewhere.
    """
    frame = Frame.of(volume)
    centred_A = model.positions_A - frame.centre_A
    search = _Search(model, volume)
    here = search.correlation(centred_A)
    best, shift_A, hand = here, np.zeros(3), ""
    for name, turned_A in _hands(centred_A):
        found_A = search.best_shift_A(turned_A)
        value = search.correlation(turned_A + found_A)
        if value > best + (_BETTER if name and not hand else 0.0):
            best, shift_A, hand = value, found_A, name
    moved = np.linalg.norm(shift_A) > max(_NEAR_A, volume.pixel_size_A)
    if here >= _LEAST and not (best > here + _BETTER and (moved or hand)):
        logger.info("%s: its density correlates with the map by %.2f", model.path, here)
        return centred_A
    told = f"{key}: {model.path}: does not lie in the map: its density correlates with it by {here:.2f}"
    if best < max(_FITS, here + _BETTER):
        raise InputError(f"{told}, and no shift or mirroring makes it fit: fit it into the map first")
    shifted = f"shifted by ({', '.join(f'{one:.1f}' for one in shift_A)}) A" if moved else ""
    where = " and ".join(part for part in (hand, shifted) if part)
    raise InputError(f"{told}, and by {best:.2f} {where}{_reason(frame, shift_A, hand, volume.pixel_size_A)}")


def _hands(centred_A: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """The model as it is, and mirrored along each axis: which of these fits depends on how the map was mirrored."""
    mirrored = [
        ("mirrored along " + "xyz"[axis], centred_A * np.where(np.arange(3) == axis, -1, 1)) for axis in (2, 0, 1)
    ]
    return [("", centred_A), *mirrored]


def _reason(frame: Frame, shift_A: np.ndarray, hand: str, pixel_size_A: float) -> str:
    """What the shift or the hand is likely due to, as the end of a sentence."""
    if hand:
        return ": the map, or the model, is of the other hand"
    for what, needed_A in frame.mistakes().items():
        far = np.linalg.norm(needed_A) > _NEAR_A
        if far and np.linalg.norm(shift_A - needed_A) < max(_NEAR_A, 2 * pixel_size_A):
            return f": {what}"
    return ": fit it into the map first"


class _Search:
    """Compares the density of a model with a map at one resolution."""

    def __init__(self, model: AtomicModel, volume: Map) -> None:
        self._pixel_size_A, self._box = volume.pixel_size_A, volume.box
        self._mass = np.maximum(model.atomic_number, 1).astype(np.float32)
        self._resolution_A = max(_RESOLUTION_A, _RESOLUTION_PX * volume.pixel_size_A)
        self._map = self._at_resolution(volume.data)

    def _at_resolution(self, density: np.ndarray) -> np.ndarray:
        return lowpass_map(density, self._pixel_size_A, self._resolution_A)

    def _density(self, centred_A: np.ndarray) -> np.ndarray:
        """(N, N, N) of the atoms that lie in the box."""
        place = centred_A / self._pixel_size_A + self._box // 2
        inside = ((place >= 0) & (place <= self._box - 1)).all(1)
        whole = np.floor(place[inside])
        fraction = (place[inside] - whole).astype(np.float32)
        return splat_cubic(self._mass[inside], whole.astype(np.int64) % self._box, fraction, self._box)

    def correlation(self, centred_A: np.ndarray) -> float:
        """Pearson's, around the atoms: a model may be of a part of the map only."""
        density = self._density(centred_A)
        near = ndimage.binary_dilation(density > 0, iterations=max(1, round(_AROUND_A / self._pixel_size_A)))
        if not near.any():
            return 0.0
        own, other = self._at_resolution(density)[near], self._map[near]
        own, other = own - own.mean(), other - other.mean()
        size = float(np.linalg.norm(own) * np.linalg.norm(other))
        return float(own @ other) / size if size > 0 else 0.0

    def best_shift_A(self, centred_A: np.ndarray) -> np.ndarray:
        """(3,) by which the model is to be moved to overlap best with the map, to a voxel; finer than coarse shape."""
        middle = 0.5 * (centred_A.min(0) + centred_A.max(0))
        weight = shell_radius(self._box) > self._box * self._pixel_size_A / _SMOOTH_A
        spectra = [
            fft.rfftn(density, workers=fft_workers())
            for density in (self._map, self._at_resolution(self._density(centred_A - middle)))
        ]
        overlap = fft.irfftn(spectra[0] * spectra[1].conj() * weight, s=self._map.shape, workers=fft_workers())
        found = np.array(np.unravel_index(int(overlap.argmax()), overlap.shape)[::-1])
        found = np.where(found >= self._box // 2, found - self._box, found)
        return found * self._pixel_size_A - middle
