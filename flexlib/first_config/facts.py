"""What the particles' metadata say, and what in them looks suspicious."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from flexlib.particles.plausible import implausible_values
from flexlib.particles.table import Particles

FEW_PARTICLES = 5000
_UNEVEN = 0.4  # share of the smaller half-set below which a line says so
_GRID_DIRECTIONS = 3072  # of the grid of 3.7 degrees that a search starts with (HEALPix order 3)
_MIN_COVERAGE, _MIN_VIEWS = 0.5, 500  # of fewer views chance alone makes an uneven sample
_COVERAGE_SAMPLE, _COVERAGE_DIRECTIONS, _COVERAGE_BAND = 5000, 400, 0.1
_DIGITS = np.array([1, 2048, 2048**2])  # that make one number of three from 0 to 2000
_ZERO_SHARE = 0.01  # share of poses of exactly zero above which a line says so


@dataclass(frozen=True)
class ParticleFacts:
    """Figures about a particle set; ranges are (lowest, highest)."""

    num_particles: int
    num_images: int  # fewer where one image has several rows
    half_counts: tuple[int, int] | None  # None where the input has no half-sets
    defocus_A: tuple[float, float]  # of the mean of U and V
    phase_shift_deg: tuple[float, float]
    voltage_kV: tuple[float, float]
    spherical_aberration_mm: tuple[float, float]
    amplitude_contrast: tuple[float, float]
    pixel_size_A: tuple[float, float]
    box: tuple[int, int]
    num_optics_groups: int
    num_directions: int  # distinct viewing directions
    num_zero_poses: int  # rotations that are exactly the identity
    no_shifts: bool
    coverage: float  # see ``view_coverage``
    implausible: tuple[str, ...]  # sentences: see ``particles.plausible``


def particle_facts(particles: Particles) -> ParticleFacts:
    """Figures about a particle set, boxes filled in (``stack.open_stacks``)."""
    used = [particles.optics[group] for group in np.unique(particles.optics_index)]
    halves = particles.half_set
    longest = int(particles.image_index.max(initial=0)) + 1
    images = particles.stack_index.astype(np.int64) * longest + particles.image_index
    directions = particles.rotation[:, 2]  # the viewing direction in the volume's frame: R^T z
    return ParticleFacts(
        num_particles=len(particles),
        num_images=len(pd.unique(images)),
        half_counts=None if (halves < 0).any() else (int((halves == 0).sum()), int((halves == 1).sum())),
        defocus_A=_range((particles.defocus_u_A + particles.defocus_v_A) / 2),
        phase_shift_deg=_range(np.rad2deg(particles.phase_shift_rad)),
        voltage_kV=_range([group.voltage_kV for group in used]),
        spherical_aberration_mm=_range([group.spherical_aberration_mm for group in used]),
        amplitude_contrast=_range([group.amplitude_contrast for group in used]),
        pixel_size_A=_range([group.pixel_size_A for group in used]),
        box=(min(group.box for group in used), max(group.box for group in used)),
        num_optics_groups=len(used),
        num_directions=len(pd.unique(((directions * 1e3).round().astype(np.int64) + 1000) @ _DIGITS)),
        num_zero_poses=int((np.abs(particles.rotation - np.eye(3)).max((1, 2)) < 1e-9).sum()),
        no_shifts=not particles.origin_A.any(),
        coverage=view_coverage(directions),
        implausible=tuple(implausible_values(particles)),
    )


def _range(values: np.ndarray | list[float]) -> tuple[float, float]:
    return float(np.min(values)), float(np.max(values))


def view_coverage(directions: np.ndarray) -> float:
    """How evenly views sample Fourier space: 1 for views from everywhere, 0.8 for side views only, 0 for one view.

    A view from d samples the plane perpendicular to it. This is the harmonic mean, over directions in Fourier space, of
    how often each is sampled relative to the average: a few directions that are never seen count as much as they spoil
    a map (the idea of the sampling compensation factor of P. Baldwin and D. Lyumkis, Prog. Biophys. Mol. Biol. 150,
    160 (2020)).

    Parameters
    ----------
    directions
        (n, 3) unit viewing directions in the volume's frame; a fixed sample of 5,000 is looked at.
    """
    rng = np.random.default_rng(0)
    if len(directions) > _COVERAGE_SAMPLE:
        directions = directions[rng.choice(len(directions), _COVERAGE_SAMPLE, replace=False)]
    number = np.arange(_COVERAGE_DIRECTIONS) + 0.5  # spread evenly: a Fibonacci spiral on the half sphere
    height, angle = number / _COVERAGE_DIRECTIONS, np.pi * (1 + 5**0.5) * number
    ring = np.sqrt(1 - height**2)
    probes = np.stack([ring * np.cos(angle), ring * np.sin(angle), height], 1)
    sampled = (np.abs(directions @ probes.T) < _COVERAGE_BAND).mean(0)
    return float(1.0 / np.mean(_COVERAGE_BAND / np.maximum(sampled, 0.01 * _COVERAGE_BAND)))


def particle_warnings(facts: ParticleFacts) -> list[str]:
    """One line for each suspicious thing. That half-sets are drawn at random is ``prepare``'s to say."""
    count = facts.num_particles
    warnings = []
    if count < FEW_PARTICLES:
        warnings.append(f"only {count:,} particles: small motions may not stand out, try few latent dimensions first")
    if facts.half_counts is not None and min(facts.half_counts) < _UNEVEN * count:
        first, second = facts.half_counts
        warnings.append(f"half-sets are uneven, {first:,} and {second:,} particles: prepare.resplit draws new ones")
    if facts.num_images < count:
        warnings.append(_repeated(count, facts.num_images))
    return warnings + _pose_warnings(facts) + list(facts.implausible)


def _repeated(count: int, images: int) -> str:
    if count % images == 0:
        return (
            f"each image stands in {count // images} rows on average: if the particles are symmetry-expanded, leave "
            "prepare.symmetry at C1 and set prepare.resplit; else remove the duplicates"
        )
    return f"{count - images:,} rows show an image that another row shows too: duplicates, which half-sets may share"


def _pose_warnings(facts: ParticleFacts) -> list[str]:
    count = facts.num_particles
    if facts.num_zero_poses > max(1, _ZERO_SHARE * count):
        return [f"{facts.num_zero_poses:,} of {count:,} poses are exactly zero: these particles were never aligned"]
    warnings = []
    if facts.num_directions <= _GRID_DIRECTIONS and facts.num_directions < count / 10:
        warnings.append(
            f"views come from {facts.num_directions:,} directions only: poses of a coarse search, not of a refinement?"
        )
    elif facts.coverage < _MIN_COVERAGE and count >= _MIN_VIEWS:
        warnings.append(
            f"views are uneven (sampling {facts.coverage:.2f} of even views'): motion that only others show is missed"
        )
    if facts.no_shifts:
        warnings.append("all shifts are exactly zero: were they lost, or the particles never refined?")
    return warnings
