"""What real particle sets have besides noise: images that show no particle, wrong poses, particles that lack a part."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flexlib.errors import InputError
from flexlib.simulate.phantoms import Phantom
from flexlib.simulate.settings import Simulation

PARTICLE, NOISE, MISPLACED = 0, 1, 2  # what an image is

_STREAM = 23  # beside the seed: drawn apart from the images, so that it changes none of the others
_LEAST_PART = 0.05  # of the mass: a chain that is a domain, and no loop or linker


@dataclass(frozen=True)
class Kinds:
    """What each of n images shows."""

    kind: np.ndarray  # (n,) int8: PARTICLE, NOISE (no particle) or MISPLACED (its written pose is another's)
    posed_as: np.ndarray  # (n,) int64, the row whose pose is written
    absent: np.ndarray  # (n,) bool, whether the particle lacks the part


def draw_kinds(settings: Simulation) -> Kinds:
    """Which images are junk, half of it noise, and which particles lack the part: the shares asked for, to the row."""
    generator = np.random.default_rng((settings.seed, _STREAM))
    count = settings.num_particles
    order, other = generator.permutation(count), generator.integers(1, count, count)
    junk = order[: round(settings.junk_fraction * count)]
    noise, misplaced = junk[::2], junk[1::2]
    kind, posed_as, absent = np.full(count, PARTICLE, np.int8), np.arange(count), np.zeros(count, bool)
    kind[noise], kind[misplaced] = NOISE, MISPLACED
    posed_as[misplaced] = (misplaced + other[misplaced]) % count
    seen = generator.permutation(np.flatnonzero(kind != NOISE))
    absent[seen[: round(settings.missing_part_fraction * len(seen))]] = True
    return Kinds(kind, posed_as, absent)


def missing_part(phantom: Phantom, settings: Simulation) -> np.ndarray:
    """(na,) bool: the atoms of the chain that may be missing; of ``auto`` the domain whose middle lies farthest out.

    Raises
    ------
    InputError
        There is no such chain, or nothing but that chain.
    """
    share = np.bincount(phantom.chain, phantom.mass) / phantom.mass.sum()
    chain = settings.missing_part
    if chain == "auto":
        middle = [np.linalg.norm(phantom.atoms_A[phantom.chain == one].mean(0)) for one in range(len(share))]
        chain = int(np.where(share >= _LEAST_PART, middle, -1.0).argmax())
    if not 0 <= chain < len(share):
        raise InputError(f"simulate.missing_part: {chain}: the chains of {phantom.name} are 0 to {len(share) - 1}")
    if share[chain] == 1:
        raise InputError(f"simulate.missing_part: {phantom.name} is a single chain: no part of it can be missing")
    return phantom.chain == chain
