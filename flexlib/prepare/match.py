"""Whether the images show the consensus in the poses given, and if not, what would have to be changed for them to.

Images of a sample are compared with projections of the consensus in their own poses, in the poses of other images, and
with projections of its mirror images. Where their own poses explain them no better than others', common mistakes are
tried in turn: a map of the other hand or another voxel size, poses or shifts in another convention or unit, images of
other rows, a CTF that is not the images'.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from flexlib.errors import InputError
from flexlib.images.noise import Calibration
from flexlib.images.normalisation import Normalisation
from flexlib.images.sources import FullImages
from flexlib.images.stack import Stacks
from flexlib.imaging.fourier import fourier_crop_map, fourier_pad_map
from flexlib.imaging.maps import Map, crop_or_pad_real
from flexlib.imaging.masks import resample_mask
from flexlib.particles.table import Particles
from flexlib.prepare.noise import compare_with_consensus, scale_band

log = logging.getLogger(__name__)

_SEED = 1
_IMAGES = 200  # of the sample that are compared
_BOX = 64  # px at which they are
_LEAST_NATS = 10.0  # by which images together must be likelier, and
_FAR_BETTER = 1.3  # times the nats, from which another reading of the files is not a doubt but the right one
_LEAST_ERRORS = 3.0  # standard errors of the mean over images, for one thing to explain them better than another
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


Mistake = tuple[str, Views]  # the end of "they match if ...", and the views with it put right


@dataclass(frozen=True)
class Match:
    """How well the images of a sample match the consensus."""

    num_images: int
    own_pose: float  # share of them that match it better in their own pose than in another image's
    hand: float  # and better than they match its mirror image, the likeliest of those


def check_match(given: Views, consensus: Map, sample: np.ndarray, calibration: Calibration) -> Match:
    """Compare images with the consensus, in their own poses and in others, and with its mirror images.

    What would explain them better, but not by far, is told in a warning.

    Parameters
    ----------
    given
        What the user's files say.
    consensus
        As its file has it.
    sample
        (m,) rows that noise and scale were measured on.
    calibration
        The noise, and the scale of each optics group, negative where contrast is inverted.

    Raises
    ------
    InputError
        The images do not show the consensus in these poses, or show its mirror image, or would match far better if
        shifts or CTFs were taken otherwise; the message has the likeliest mistake.
    """
    name, mistaken_maps = given.particles.source_path, [*_other_maps(given, consensus)]
    given = given.coarse()
    rows = np.sort(np.random.default_rng(_SEED).permutation(sample)[:_IMAGES])
    own, others = (views.evidence(rows, calibration) for views in (given, _shuffled(given, rows)))
    if not _better(own, others) and len(rows) < len(sample):
        rows = sample
        own, others = (views.evidence(rows, calibration) for views in (given, _shuffled(given, rows)))
    if not _better(own, others):
        raise InputError(
            f"{name}: the images do not match projections of the consensus: in their own orientations no better than "
            f"in others' ({len(rows)} compared){_likeliest(given, mistaken_maps, rows, calibration)}"
        )
    mirrored = max((views.evidence(rows, calibration) for _, views in _mirrored(given)), key=lambda nats: nats.sum())
    if _better(mirrored, own):
        raise InputError(
            f"{name}: the images do not match projections of the consensus: {(mirrored > own).mean():.0%} of "
            f"{len(rows)} match its mirror image better: it has the other hand than the poses"
        )
    mistakes = (_without_shifts(given), *mistaken_maps, *_mistakes(given))
    tried = [(reason, views.evidence(rows, calibration)) for reason, views in mistakes]
    reason, found = max(tried, key=lambda one: one[1].sum())
    if _better(found, own):
        share = f"{(found > own).mean():.0%} of {len(rows)}"
        # where shifts are all error, whatever makes them smaller fits better
        if found.sum() > _FAR_BETTER * own.sum() and _better(found, tried[0][1]):
            raise InputError(
                f"{name}: the images do not match projections of the consensus as the files have it: {share} do so "
                f"better if {reason}"
            )
        log.warning("%s: %s images match projections of the consensus better if %s", name, share, reason)
    return Match(len(rows), float((own > others).mean()), float((own > mirrored).mean()))


def _better(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether images are clearly likelier by ``one`` than by ``other``, (m,) nats each."""
    gain = one - other
    return bool(gain.sum() > max(_LEAST_NATS, _LEAST_ERRORS * gain.std() * len(gain) ** 0.5))


def _shuffled(views: Views, rows: np.ndarray) -> Views:
    """Each image in the orientation of another one."""
    rotation = views.particles.rotation.copy()
    order = np.random.default_rng(_SEED).permutation(rows)
    rotation[order] = views.particles.rotation[np.roll(order, 1)]
    return _with(views, rotation=rotation)


def _likeliest(given: Views, mistaken_maps: list[Mistake], rows: np.ndarray, calibration: Calibration) -> str:
    """What is most likely wrong, as the end of a sentence."""
    # what optics groups' scales and contrasts were taken for means nothing where nothing matches
    given = _with(given, contrast_sign=np.ones(len(given.particles)))
    calibration = replace(calibration, image_scale=np.ones_like(calibration.image_scale))
    mistakes = [_without_shifts(given)]
    mistakes += [
        (f"the map is mirrored {axis}: it has the other hand than the poses", views) for axis, views in _mirrored(given)
    ]
    mistakes += [*mistaken_maps, *_mistakes(given)]
    tried = [(reason, views, views.evidence(rows, calibration)) for reason, views in mistakes]
    reason, views, best = max(tried, key=lambda one: one[2].sum())
    others = (other.evidence(rows, calibration) for other in (given, _shuffled(views, rows)))
    if all(_better(best, other) for other in others):
        return f"; they do match if {reason}"
    return (
        ", and so it is with another hand, voxel size, convention of angles, sign or unit of shifts and defocus: "
        "another map or other poses, images of other particles, or half of the images?"
    )


def _mistakes(given: Views) -> Iterator[Mistake]:
    """What users' particle files get wrong, but for the shifts having been applied."""
    yield from _other_orientations(given)
    yield from _other_shifts(given)
    yield from _other_transfer(given)
    particles = given.particles
    counts = np.array([0 if header is None else header.num_images for header in given.stacks.headers])
    last = counts[particles.stack_index] - 1
    for step, words in ((1, "follows"), (-1, "precedes")):
        index = np.clip(particles.image_index + step, 0, last)
        yield (
            f"each row's image is the one that {words} it in the stack: they count from 1",
            _with(given, image_index=index),
        )


def _with(views: Views, **columns: object) -> Views:
    """The same views, some ``columns`` of their particles replaced."""
    return replace(views, particles=replace(views.particles, **columns))  # type: ignore[arg-type]


def _mirrored(given: Views) -> Iterator[Mistake]:
    """The map mirrored along each axis, and through the centre."""
    ways: dict[str, tuple[int, ...]] = {
        "along z": (0,),
        "along y": (1,),
        "along x": (2,),
        "through the centre": (0, 1, 2),
    }
    for words, axes in ways.items():
        density, mask = (np.roll(np.flip(volume, axes), 1, axes) for volume in (given.density, given.mask))
        yield words, replace(given, density=density, mask=mask)


def _other_maps(given: Views, consensus: Map) -> Iterator[Mistake]:
    """The map with other voxels than its header says."""
    box, extent_A = len(given.density), len(given.density) * given.pixel_size_A
    as_wide = fourier_crop_map if consensus.box >= box else fourier_pad_map
    for voxel_A, data in (
        (given.pixel_size_A, crop_or_pad_real(consensus.data, box)),
        (extent_A / consensus.box, as_wide(consensus.data, box)),
    ):
        if abs(voxel_A / consensus.pixel_size_A - 1) > 1e-3:
            reason = f"the map's voxels are {voxel_A:.4g} A wide, not {consensus.pixel_size_A:.4g} A as its header says"
            yield reason, replace(given, density=data, mask=np.ones(data.shape, bool)).coarse()


def _other_orientations(given: Views) -> Iterator[Mistake]:
    """The orientations in other conventions."""
    particles = given.particles
    yield "each rotation is replaced by its inverse", _with(given, rotation=particles.rotation.transpose(0, 2, 1))
    turns = {
        "their rows run from top to bottom": ((1, 0, 0), (0, -1, 0), (0, 0, -1)),
        "their columns run from right to left": ((-1, 0, 0), (0, 1, 0), (0, 0, -1)),
        "they are turned by 180 degrees": ((-1, 0, 0), (0, -1, 0), (0, 0, 1)),
        "their rows and columns are exchanged": ((0, 1, 0), (1, 0, 0), (0, 0, -1)),
    }
    for words, matrix in turns.items():
        turn = np.array(matrix, float)
        origin_A = particles.origin_A @ turn[:2, :2].T
        yield words, _with(given, rotation=turn @ particles.rotation, origin_A=origin_A)


def _without_shifts(given: Views) -> Mistake:
    """The images as if they had been centred."""
    return "there are no shifts: they have been centred", _with(given, origin_A=0 * given.particles.origin_A)


def _other_shifts(given: Views) -> Iterator[Mistake]:
    """The shifts in another convention or unit."""
    particles = given.particles
    if not particles.origin_A.any():
        return
    size_A = np.array([group.pixel_size_A for group in particles.optics])[particles.optics_index, None]
    for words, factor in (
        ("of the opposite sign", -1.0),
        ("in pixels, not Angstrom", size_A),
        ("in Angstrom, not pixels", 1 / size_A),
    ):
        yield f"the shifts are {words}", _with(given, origin_A=particles.origin_A * factor)


def _other_transfer(given: Views) -> Iterator[Mistake]:
    """The CTF in another unit, or applied to the images already."""
    particles = given.particles
    for factor, words in _UNITS.items():
        u, v = particles.defocus_u_A * factor, particles.defocus_v_A * factor
        yield (
            f"the defocus is {words} what the metadata say: its unit is Angstrom",
            _with(given, defocus_u_A=u, defocus_v_A=v),
        )
    applied = {group.ctf_applied for group in particles.optics}
    if "premultiplied" in applied:
        yield "they have not been multiplied with their CTF, as the metadata say", replace(given, seen=torch.ones_like)
    else:
        yield "they are multiplied with their CTF, which the metadata do not say", replace(given, seen=torch.square)
        told = "are not phase-flipped, as" if "phase_flipped" in applied else "are phase-flipped, which"
        words = "say" if "phase_flipped" in applied else "do not say"
        yield f"they {told} the metadata {words}", replace(given, seen=torch.abs)
