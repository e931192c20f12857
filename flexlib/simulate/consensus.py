"""What a consensus refinement makes of the images: sums for the half-maps, and poses aligned to them.

Half-sets never mix: each is aligned to maps of its own, filtered by what its own two halves agree on.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy import fft

from flexlib.images.stack import StackHeader, read_stack_header
from flexlib.imaging.fourier import shell_number
from flexlib.imaging.fsc import fsc
from flexlib.simulate.alignment import Poses, Reference, align
from flexlib.simulate.backprojection import Backprojector, padded_box, soft_sphere
from flexlib.simulate.particle_set import ParticleSet, batches
from flexlib.simulate.signal import noise_amplitude

_FOLDS = 4  # parts of a half-set
_ROUNDS = 3  # of half-maps at the present poses and alignment to them
_LEAST_FSC = 0.143  # of half-maps: shells beyond are not aligned to
_LEAST_SHELLS = 3  # with fewer, poses stay as they are


def half_sums(stack: Path, particles: ParticleSet) -> tuple[Backprojector, Backprojector]:
    """Back-projections of the two half-sets of a stack's images at the poses of ``particles``."""
    first, second = _sums(read_stack_header(stack), particles, _poses(particles), particles.metadata.half_set, 2)
    return first, second


def refine_poses(stack: Path, particles: ParticleSet) -> ParticleSet:
    """``particles`` with the poses that a consensus refinement leaves, near those that they have.

    In each of three rounds each half-set's map is made at the present poses, filtered to its signal, and the half-set's
    images are aligned to it by maximum likelihood: one rigid map for all, whatever moves in the particles. An image is
    aligned to a map of those three quarters of its half-set that it is not in: in a small set its own noise, in the
    map, would hold it where it is.

    Parameters
    ----------
    stack
        The noisy images.
    particles
        At the poses to start from.
    """
    images, poses = read_stack_header(stack), _poses(particles)
    for half in range(2):
        rows = np.flatnonzero(particles.metadata.half_set == half)
        fold = np.full(len(particles), -1)
        fold[rows] = np.arange(len(rows)) % _FOLDS
        for _ in range(_ROUNDS):
            _align_half(images, particles, poses, fold)
    metadata = particles.metadata.with_poses(poses.rotation, poses.origin_px * particles.settings.pixel_size_A)
    return particles.with_metadata(metadata)


def _poses(particles: ParticleSet) -> Poses:
    """Those of ``particles``, in arrays of their own."""
    return Poses(particles.metadata.rotation.copy(), particles.metadata.origin_A / particles.settings.pixel_size_A)


def _align_half(images: StackHeader, particles: ParticleSet, poses: Poses, fold: np.ndarray) -> None:
    """One round: change ``poses`` of the half-set of which ``fold`` (n,) says each particle's quarter, -1 outside."""
    sums = _sums(images, particles, poses, fold, _FOLDS)
    share = _signal_share(sums)
    for number in range(_FOLDS):
        reference = _reference(particles, sums, share, number)
        _align_rows(images, particles, reference, poses, np.flatnonzero(fold == number))


def _sums(
    images: StackHeader, particles: ParticleSet, poses: Poses, label: np.ndarray, count: int
) -> list[Backprojector]:
    """Back-projections at ``poses`` of the images with labels 0 ... ``count - 1``, of (n,) labels."""
    box = particles.settings.box
    sums = [Backprojector(box) for _ in range(count)]
    for rows in batches(len(particles)):
        for number, target in enumerate(sums):
            chosen = rows.start + np.flatnonzero(label[rows] == number)
            at = poses.at(chosen)
            target.add(images.read(chosen), particles.ctf(chosen, padded_box(box)), at.rotation, at.origin_px)
    return sums


def _signal_share(sums: list[Backprojector]) -> np.ndarray:
    """(N//2,) share of signal in the power of each shell of the map of all four quarters.

    With q the FSC of two quarters' map with that of the other two it is ``2q / (1 + q)``: what the FSC would be with a
    map as good.
    """
    first, second = sums[0].map(sums[1:2]), sums[2].map(sums[3:])
    curve = np.maximum(fsc(first, second, soft_sphere(len(first)), mates=False), 0)
    return 2 * curve / (1 + curve)


def _reference(particles: ParticleSet, sums: list[Backprojector], share: np.ndarray, left_out: int) -> Reference | None:
    """The map of all quarters but one as that one's images are to be aligned to it; None if it shows nothing.

    Each shell is weighted by the share of its power that is signal, of three quarters' number of particles.
    """
    others = [part for number, part in enumerate(sums) if number != left_out]
    box = others[0].box
    signal = len(others) / len(sums) * share
    weight = np.append(signal / (signal + 1 - share), 0.0)  # 0 in the corners
    limit = min(int((weight < _LEAST_FSC).argmax()), box // 2 - 1)
    if limit < _LEAST_SHELLS:
        return None
    filtered = fft.rfftn(others[0].map(others[1:])) * weight[np.minimum(shell_number(box), box // 2)]
    volume = fft.irfftn(filtered, s=(box,) * 3) * soft_sphere(box)
    return Reference(volume, limit, noise_amplitude(box, particles.settings.noise_power_law))


def _align_rows(
    images: StackHeader, particles: ParticleSet, reference: Reference | None, poses: Poses, rows: np.ndarray
) -> None:
    """Change ``poses`` of the particles at ``rows`` to the likeliest near them; without a reference they stay."""
    if reference is None:
        return
    for batch in batches(len(rows)):
        chosen = rows[batch]
        ctf = particles.ctf(chosen, particles.settings.box)
        aligned = align(reference, images.read(chosen), ctf, poses.at(chosen))
        poses.rotation[chosen], poses.origin_px[chosen] = aligned.rotation, aligned.origin_px
