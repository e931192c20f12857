"""Which images cannot be used, what is to be done to the others before they are, and the table of those left out."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from flexlib.errors import InputError
from flexlib.files import atomic_path
from flexlib.images.normalisation import Normalisation
from flexlib.images.stack import Stacks
from flexlib.particles.table import Particles
from flexlib.prepare.levels import background_terms, noise_levels
from flexlib.prepare.selection import check_enough, drop_empty_groups
from flexlib.prepare.survey import ImageFacts, survey_images

log = logging.getLogger(__name__)

NOT_FINITE, BLANK, EXTREME, DUPLICATE = "not finite", "blank", "extreme pixels", "duplicate"
_MEANINGS = {
    NOT_FINITE: "hold values that are not finite",
    BLANK: "are blank (all pixels equal)",
    EXTREME: "hold many extreme pixels",
    DUPLICATE: "are in the set already, in the same pose",
}
_EXTREME_PEAK = 20.0  # noise levels of a pixel that no particle shows, and so many times the peak that others show:
_EXTREME_RATIO = 4.0
_MOST_REPAIRED = 1e-3  # share of an image's pixels that are replaced where they are extreme; nine pixels at least
_TWIN_ANGLE_RAD = np.deg2rad(10.0)  # between rows of one image that are one particle; symmetry copies are further apart
_MOST_BAD = 0.9  # share of images that cannot be used beyond which something else must be wrong
_NAMED_ROWS = 5


@dataclass(frozen=True)
class LeftOut:
    """The images that are not used."""

    row: np.ndarray  # (m,) int64 of the input file, from 1
    image: list[str]
    reason: list[str]

    def counts(self) -> dict[str, int]:
        """How many were left out for each reason."""
        kinds = [reason.partition(" of row")[0] for reason in self.reason]
        return {kind: kinds.count(kind) for kind in _MEANINGS if kind in kinds}

    def write(self, path: Path) -> None:
        """As CSV: input_row, image, reason."""
        with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["input_row", "image", "reason"])
            writer.writerows(zip(self.row.tolist(), self.image, self.reason, strict=True))


@dataclass(frozen=True)
class Screened:
    """The images that can be used."""

    kept: Particles
    normalisation: Normalisation  # as the images propose it, before they are compared with the consensus
    left_out: LeftOut
    num_repaired: int  # images of which a few extreme pixels are replaced
    digest: np.ndarray  # (n,) uint64 checksums of the images kept


def screen_images(particles: Particles, stacks: Stacks, radius_A: float, rotations: np.ndarray) -> Screened:
    """Look at all images and leave out those that cannot be used.

    Parameters
    ----------
    particles, stacks
        The images.
    radius_A
        Of the circle about the box centre that holds the particle.
    rotations
        (m, 3, 3) of the symmetry group, the identity first.

    Raises
    ------
    InputError
        Nearly all images are bad, or too few are left.
    """
    facts = survey_images(particles, stacks, radius_A)
    reach, too_many = _extreme_pixels(particles, stacks, facts)
    reason = np.full(len(particles), "", object)
    for kind, bad in ((EXTREME, too_many), (BLANK, ~facts.varies), (NOT_FINITE, ~facts.finite)):
        reason[bad] = kind
    usable = reason == ""
    if usable.sum() < max(2, (1 - _MOST_BAD) * len(particles)):
        counts = ", ".join(f"{(reason == kind).sum()} {_MEANINGS[kind]}" for kind in _MEANINGS if kind in reason)
        raise InputError(f"{particles.source_path}: of {len(particles)} images {counts}: are these the right stacks?")
    first = first_twins(particles.rotation, facts.digest, usable, rotations)
    twins = np.flatnonzero(first >= 0)
    for row in twins:
        reason[row] = f"{DUPLICATE} of row {particles.source_row[first[row]] + 1}"
    kept = reason == ""
    left_out = LeftOut(particles.source_row[~kept] + 1, list(image_names(particles, ~kept)), list(reason[~kept]))
    _log(particles, left_out, kept & np.isfinite(reach))
    chosen, facts = drop_empty_groups(particles.subset(kept)), facts.subset(kept)
    check_enough(chosen)
    normalisation = Normalisation(
        terms=background_terms(chosen, facts),
        radius_A=radius_A,
        grey=facts.grey,
        reach=reach[kept],
        level=noise_levels(chosen, facts),
    )
    return Screened(chosen, normalisation, left_out, int(np.isfinite(reach[kept]).sum()), facts.digest)


def _extreme_pixels(particles: Particles, stacks: Stacks, facts: ImageFacts) -> tuple[np.ndarray, np.ndarray]:
    """Images with pixels that neither noise nor particle explains: X-ray hits, dead pixels, edges of a detector.

    Returns
    -------
    reach
        (n,) distance from the grey level beyond which pixels are to be replaced; inf for most images.
    too_many
        (n,) bool: images with more such pixels than can be replaced.
    """
    usable = facts.finite & facts.varies
    reach, too_many = np.full(len(particles), np.inf), np.zeros(len(particles), bool)
    for group, optics in enumerate(particles.optics):
        members = usable & (particles.optics_index == group)
        if not members.any():
            continue
        limit = max(_EXTREME_PEAK, _EXTREME_RATIO * float(np.median(facts.peak[members])))
        for row in np.flatnonzero(members & ~(facts.peak <= limit)):
            image = stacks.read(particles, np.array([row]))[0]
            reach[row] = 0.5 * limit * facts.level[row]
            beyond = int((np.abs(image - facts.grey[row]) > reach[row]).sum())
            too_many[row] = beyond > max(9, _MOST_REPAIRED * optics.box**2)
    return reach, too_many


def first_twins(rotation: np.ndarray, digest: np.ndarray, usable: np.ndarray, rotations: np.ndarray) -> np.ndarray:
    """Of each row that repeats an earlier one, the same pixels in nearly the same pose, the first such row; else -1.

    Rows of one image in different poses are no twins: other programs expand a symmetry so.

    Parameters
    ----------
    rotation
        (n, 3, 3) poses.
    digest
        (n,) checksums of the pixels.
    usable
        (n,) bool: rows that count.
    rotations
        (m, 3, 3) of the symmetry group: poses that it makes equal are.
    """
    first = np.full(len(digest), -1)
    rows = np.flatnonzero(usable)
    rows = rows[np.argsort(digest[rows], kind="stable")]
    for lag in range(1, len(rows)):
        earlier, later = rows[:-lag], rows[lag:]
        same = digest[earlier] == digest[later]
        if not same.any():
            break
        earlier, later = earlier[same], later[same]
        turn = rotation[later].transpose(0, 2, 1) @ rotation[earlier]
        trace = np.max([np.einsum("nij,ji->n", turn, turned) for turned in rotations], 0)
        near = trace >= 1 + 2 * np.cos(_TWIN_ANGLE_RAD)
        first[later[near]] = earlier[near]  # a larger lag is an earlier row
    return first


def image_names(particles: Particles, rows: np.ndarray) -> Iterator[str]:
    """``000001@stack`` of ``rows``, as particles.star names original images."""
    for stack, index in zip(particles.stack_index[rows], particles.image_index[rows], strict=True):
        yield f"{index + 1:06d}@{particles.stack_paths[stack].absolute()}"


def _log(particles: Particles, left_out: LeftOut, repaired: np.ndarray) -> None:
    """A line for each kind of image that is left out, and one for ``repaired`` ((n,) bool) ones."""
    kinds = pd.Series(left_out.reason, dtype=object).str.partition(" of row")[0].to_numpy() if left_out.reason else []
    for kind, count in left_out.counts().items():
        rows = left_out.row[np.asarray(kinds) == kind]
        log.warning(
            "%s: %d images %s and are left out: %s", particles.source_path, count, _MEANINGS[kind], some_rows(rows)
        )
    if repaired.any():
        log.warning(
            "%s: %d images hold a few extreme pixels (X-ray hits, dead pixels), which are set to the background: %s",
            particles.source_path, repaired.sum(), some_rows(particles.source_row[repaired] + 1),
        )  # fmt: skip


def some_rows(rows: np.ndarray) -> str:
    """``row 5``, ``rows 5, 9, 11 ...``: the first of some rows."""
    named = ", ".join(map(str, rows[:_NAMED_ROWS]))
    return f"row{'s' if len(rows) > 1 else ''} {named}{' ...' if len(rows) > _NAMED_ROWS else ''}"
