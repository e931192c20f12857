"""What a consensus refinement makes of the images: sums for the half-maps, and poses aligned to them.

Half-sets never mix: each is aligned to its own map, filtered by what its own two quarters agree on.
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

_ROUNDS = 3  # of half-maps at the present poses and alignment to them
_LEAST_FSC = 0.143  # of half-maps: shells beyond are not aligned to
_LEAST_SHELLS = 3  # with fewer, poses stay as they are


def half_sums(stack: Path, particles: ParticleSet) -> tuple[Backprojector, Backprojector]:
    """Back-projections of the two half-sets of a stack's images at the poses of ``particles``."""
    poses, half_set = _poses(particles), particles.metadata.half_set
    return _sums(read_stack_header(stack), particles, poses, half_set)


def refine_poses(stack: Path, particles: ParticleSet) -> ParticleSet:
    """``particles`` with the poses that a consensus refinement leaves, near those that they have.

    In each of three rounds each half-set's map is made at the present poses, filtered to its signal, and the half-set's
    images are aligned to it by maximum likelihood: one rigid map for all, whatever moves in the particles.

    Parameters
    ----------
    stack
        The noisy images.
    particles
        At the poses to start from.
    """
    images, poses, half_set = read_stack_header(stack), _poses(particles), particles.metadata.half_set
    for half in range(2):
        rows = np.flatnonzero(half_set == half)
        quarter = np.full(len(particles), -1)
        quarter[rows] = np.arange(len(rows)) % 2
        for _ in range(_ROUNDS):
            reference = _reference(particles, *_sums(images, particles, poses, quarter))
            if reference is None:
                break
            for batch in batches(len(rows)):
                chosen = rows[batch]
                ctf = particles.ctf(chosen, particles.settings.box)
                aligned = align(reference, images.read(chosen), ctf, poses.at(chosen))
                poses.rotation[chosen], poses.origin_px[chosen] = aligned.rotation, aligned.origin_px
    metadata = particles.metadata.with_poses(poses.rotation, poses.origin_px * particles.settings.pixel_size_A)
    return particles.with_metadata(metadata)


def _poses(particles: ParticleSet) -> Poses:
    """Those of ``particles``, in arrays of their own."""
    return Poses(particles.metadata.rotation.copy(), particles.metadata.origin_A / particles.settings.pixel_size_A)


def _sums(
    images: StackHeader, particles: ParticleSet, poses: Poses, label: np.ndarray
) -> tuple[Backprojector, Backprojector]:
    """Back-projections at ``poses`` of the images labelled 0 and of those labelled 1, of (n,) labels."""
    box = particles.settings.box
    sums = Backprojector(box), Backprojector(box)
    for rows in batches(len(particles)):
        for number, target in enumerate(sums):
            chosen = rows.start + np.flatnonzero(label[rows] == number)
            at = poses.at(chosen)
            target.add(images.read(chosen), particles.ctf(chosen, padded_box(box)), at.rotation, at.origin_px)
    return sums


def _reference(particles: ParticleSet, first: Backprojector, second: Backprojector) -> Reference | None:
    """The map of both quarters as the images of their half-set are to be aligned to it; None if it shows nothing.

    The quarters' FSC q says what the half-set's map would have with another as good, ``2q / (1 + q)``: this is the
    share of its power that is signal, by which each shell is weighted.
    """
    box = first.box
    sphere = soft_sphere(box)
    quarters = np.maximum(fsc(first.map(), second.map(), sphere, mates=False), 0)
    share = 2 * quarters / (1 + quarters)
    limit = min(int(np.append(share < _LEAST_FSC, True).argmax()), box // 2 - 1)
    if limit < _LEAST_SHELLS:
        return None
    weight = np.append(share, 0.0)[np.minimum(shell_number(box), box // 2)]
    volume = fft.irfftn(fft.rfftn(first.map([second])) * weight, s=(box,) * 3) * sphere
    return Reference(volume, limit, noise_amplitude(box, particles.settings.noise_power_law))
