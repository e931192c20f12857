"""What users' files often have wrong, each put right: hypotheses for ``prepare.match`` to try."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from flexlib.images.noise import Calibration
from flexlib.images.normalisation import Normalisation
from flexlib.images.sources import FullImages
from flexlib.images.stack import Stacks
from flexlib.imaging.fourier import fourier_crop_map, fourier_pad_map
from flexlib.imaging.maps import Map, crop_or_pad_real
from flexlib.imaging.masks import resample_mask
from flexlib.particles.table import Particles
from flexlib.prepare.noise import compare_with_consensus, scale_band

_BOX = 64  # px at which images are compared
_UNITS = {0.1: "a tenth of", 10.0: "ten times", 1e4: "10,000 times"}  # nanometre as Angstrom, and the like


@dataclass(frozen=True)
class Views:
    """Images, and the map that they are taken to show."""

    particles: Particles
    stacks: Stacks
    normalisation: Normalisation
    density: np.ndarray  # (N, N, N) consensus times mask on the images' common grid, or a coarser one as wide
    mask: np.ndarray  # (N, N, N) bool
    pixel_size_A: float
    seen: Callable[[torch.Tensor], torch.Tensor] | None = None  # what the CTF is taken for

    def coarse(self) -> Views:
        """The same on a grid that is no finer than it takes to tell one pose from another."""
        box, full_box = min(_BOX, len(self.density)), len(self.density)
        density = fourier_crop_map(self.density, box)
        mask = resample_mask(self.mask, box) > 0
        return replace(self, density=density, mask=mask, pixel_size_A=self.pixel_size_A * full_box / box)

    def evidence(self, rows: np.ndarray, calibration: Calibration) -> np.ndarray:
        """(m,) nats by which the map explains the images at ``rows`` better than nothing does, at its best scale."""
        box, group = len(self.density), self.particles.optics_index[rows]
        unknown = replace(
            calibration,
            image_scale=np.ones_like(calibration.image_scale),
            sigma=np.ones_like(calibration.sigma),
        )
        source = FullImages(self.stacks, self.particles, box, self.pixel_size_A, unknown, self.normalisation)
        sums = compare_with_consensus(source, self.density, self.mask, rows, self.seen)
        band = scale_band(box, self.pixel_size_A)
        weight = np.where(band, calibration.sigma[:, : len(band)] ** -2.0, 0.0)[group]
        scale = calibration.image_scale[group]
        cross, power = (sums.cross * weight).sum(1) * scale, (sums.predicted * weight).sum(1) * scale**2
        best = cross.sum() / max(power.sum(), 1e-300)
        return best * cross - 0.5 * best**2 * power

    def with_(self, **columns: Any) -> Views:
        """The same, some ``columns`` of the particles replaced."""
        return replace(self, particles=replace(self.particles, **columns))


@dataclass(frozen=True)
class Mistake:
    """What the files may have wrong."""

    reason: str  # the end of "they match if ..."
    views: Views  # with it put right, coarse
    certain: bool = True  # nothing else makes these fit far better


def likely_mistakes(given: Views, consensus: Map) -> list[Mistake]:
    """All but the hand: see ``mirrored``.

    Parameters
    ----------
    given
        What the files say, on the images' full grid.
    consensus
        As its file has it.
    """
    coarse = given.coarse()
    kinds = (_orientations(coarse), _shifts(coarse), _transfers(coarse), _neighbours(coarse))
    return [*_voxels(given, consensus), *(mistake for kind in kinds for mistake in kind)]


def mirrored(given: Views) -> list[Mistake]:
    """The map mirrored along each axis, and through the centre."""
    ways: dict[str, tuple[int, ...]] = {
        "along z": (0,),
        "along y": (1,),
        "along x": (2,),
        "through the centre": (0, 1, 2),
    }
    found = []
    for words, axes in ways.items():
        density, mask = (np.roll(np.flip(volume, axes), 1, axes) for volume in (given.density, given.mask))
        reason = f"the map is mirrored {words}: it has the other hand than the poses"
        found.append(Mistake(reason, replace(given, density=density, mask=mask)))
    return found


def _voxels(given: Views, consensus: Map) -> Iterator[Mistake]:
    """The map with other voxels than its header says: the images', or such that it is as wide as they are."""
    box, extent_A = len(given.density), len(given.density) * given.pixel_size_A
    as_wide = fourier_crop_map if consensus.box >= box else fourier_pad_map
    for voxel_A, data in (
        (given.pixel_size_A, crop_or_pad_real(consensus.data, box)),
        (extent_A / consensus.box, as_wide(consensus.data, box)),
    ):
        if abs(voxel_A / consensus.pixel_size_A - 1) > 1e-3:
            reason = f"the map's voxels are {voxel_A:.4g} A wide, not {consensus.pixel_size_A:.4g} A as its header says"
            yield Mistake(reason, replace(given, density=data, mask=np.ones(data.shape, bool)).coarse())


def _orientations(given: Views) -> Iterator[Mistake]:
    """The orientations in other conventions."""
    rotation, origin_A = given.particles.rotation, given.particles.origin_A
    yield Mistake("each rotation is replaced by its inverse", given.with_(rotation=rotation.transpose(0, 2, 1)))
    turns = {
        "their rows run from top to bottom": ((1, 0, 0), (0, -1, 0), (0, 0, -1)),
        "their columns run from right to left": ((-1, 0, 0), (0, 1, 0), (0, 0, -1)),
        "they are turned by 180 degrees": ((-1, 0, 0), (0, -1, 0), (0, 0, 1)),
        "their rows and columns are exchanged": ((0, 1, 0), (1, 0, 0), (0, 0, -1)),
    }
    for reason, matrix in turns.items():
        turn = np.array(matrix, float)
        yield Mistake(reason, given.with_(rotation=turn @ rotation, origin_A=origin_A @ turn[:2, :2].T))


def _shifts(given: Views) -> Iterator[Mistake]:
    """The shifts in another convention or unit; where they are errors, smaller ones fit better."""
    origin_A, optics = given.particles.origin_A, given.particles.optics
    if not origin_A.any():
        return
    size_A = np.array([group.pixel_size_A for group in optics])[given.particles.optics_index, None]
    yield Mistake("there are no shifts: they have been centred", given.with_(origin_A=0 * origin_A), certain=False)
    yield Mistake("the shifts are of the opposite sign", given.with_(origin_A=-origin_A))
    for reason, factor in (
        ("the shifts are in pixels, not Angstrom", size_A),
        ("the shifts are in Angstrom, not pixels", 1 / size_A),
    ):
        yield Mistake(reason, given.with_(origin_A=origin_A * factor), certain=bool((factor >= 1).all()))


def _transfers(given: Views) -> Iterator[Mistake]:
    """The CTF in another unit, or applied to the images already."""
    particles = given.particles
    applied = {group.ctf_applied for group in particles.optics}
    if applied == {""}:  # else the images, too, would be others with another CTF
        for factor, words in _UNITS.items():
            defocus = {name: getattr(particles, name) * factor for name in ("defocus_u_A", "defocus_v_A")}
            yield Mistake(f"the defocus is {words} what the metadata say: its unit is Angstrom", given.with_(**defocus))
        yield Mistake(
            "they are multiplied with their CTF, which the metadata do not say", replace(given, seen=torch.square)
        )
        yield Mistake("they are phase-flipped, which the metadata do not say", replace(given, seen=torch.abs))
    if applied == {"premultiplied"}:
        reason = "they are not multiplied with their CTF, as the metadata say"
        yield Mistake(reason, replace(given, seen=torch.ones_like))
    if applied == {"phase_flipped"}:
        yield Mistake("they are not phase-flipped, as the metadata say", replace(given, seen=torch.abs))


def _neighbours(given: Views) -> Iterator[Mistake]:
    """The images before and after in the stack."""
    particles = given.particles
    names = particles.stack_index * (particles.image_index.max() + 2) + particles.image_index
    for step, words in ((1, "follows"), (-1, "precedes")):
        known = np.isin(names + step, names)  # others may be blank, or not there at all
        index = particles.image_index + np.where(known, step, 0)
        reason = f"each row's image is the one that {words} it in the stack: they count from 1"
        yield Mistake(reason, given.with_(image_index=index))
