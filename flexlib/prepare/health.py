"""The health check at the end of prepare: what was found of the particle set, in words, and its outlying images."""

from __future__ import annotations

import csv
import logging
from pathlib import Path

import numpy as np

from flexlib.files import atomic_path
from flexlib.images.noise import Calibration
from flexlib.images.normalisation import Normalisation
from flexlib.particles.plausible import implausible_values
from flexlib.particles.table import Particles
from flexlib.prepare.inputs import Calibrated, CheckedInputs
from flexlib.prepare.match import Match
from flexlib.prepare.screening import image_names, some_rows
from flexlib.records import Finding

log = logging.getLogger(__name__)

_LEAST_OWN_POSE = 0.7  # share of images that match best in their own orientation; a half do where nothing matches
_MOST_SCALES = 2.0  # ratio of optics groups' scales beyond which they should be looked at
_MOST_COLOUR = 5.0  # ratio of the noise's standard deviations over the shells, likewise
_OUTLYING_LEVEL = 1.5  # factor from the median of its optics group


def findings(inputs: CheckedInputs, found: Calibrated) -> list[Finding]:
    """What a user should know of the particle set, the most important first.

    Parameters
    ----------
    inputs
        What the user's files hold.
    found
        What was made of it.
    """
    result = [_match(found.match), _scale(found.kept, found.calibration), _noise(found.calibration)]
    turned = found.kept.contrast_sign != _given_sign(inputs.kept, found.kept)
    if turned.any():
        rows = some_rows(found.kept.source_row[turned] + 1)
        result.append(Finding("contrast", f"{_images(turned)} had inverted contrast and were turned ({rows}).", True))
    for reason, count in found.left_out.counts().items():
        result.append(Finding("left out", f"{count:,} images are left out: {reason}.", True))
    replaced = np.isfinite(found.normalisation.reach)
    if replaced.any():
        rows = some_rows(found.kept.source_row[replaced] + 1)
        result.append(Finding("extreme pixels", f"{_images(replaced)} had extreme pixels replaced ({rows}).", True))
    if found.normalisation.terms.any():
        sentence = f"A slow background is subtracted in {(found.normalisation.terms > 0).sum()} optics groups."
        result.append(Finding("background", sentence, False))
    far = _outlying_levels(found.normalisation)
    if far.any():
        rows = some_rows(found.kept.source_row[far] + 1)
        sentence = f"The noise of {_images(far)} is {_OUTLYING_LEVEL:g} times stronger or weaker than others' ({rows})."
        result.append(Finding("noise level", sentence, True))
    result += [Finding("metadata", f"{sentence}.", True) for sentence in implausible_values(inputs.kept)]
    return result


def log_findings(health: list[Finding], path: Path) -> None:
    """Log, of the particles at ``path``, what has not been where it was found."""
    for finding in health:
        if finding.topic in ("match", "scale", "noise", "metadata"):
            log.log(logging.WARNING if finding.warning else logging.INFO, "%s: %s", path, finding.sentence)


def _images(rows: np.ndarray) -> str:
    """``12 images``: how many of (n,) bool."""
    return f"{rows.sum():,} image{'s' if rows.sum() > 1 else ''}"


def _given_sign(given: Particles, kept: Particles) -> np.ndarray:
    """(n,) contrast of the kept particles as the input has it."""
    return given.contrast_sign[np.searchsorted(given.source_row, kept.source_row)]


def _match(match: Match) -> Finding:
    sentence = (
        f"Of {match.num_images} images, {match.own_pose:.0%} match the consensus better in their own orientation than "
        f"in another's, and {match.hand:.0%} better than its mirror image"
    )
    if match.own_pose >= _LEAST_OWN_POSE:
        return Finding("match", f"{sentence}.", False)
    return Finding(
        "match", f"{sentence}: the signal is very weak, or many of the images are junk or in wrong poses.", True
    )


def _scale(particles: Particles, calibration: Calibration) -> Finding:
    scale = calibration.image_scale
    if len(scale) == 1:
        return Finding("scale", f"The images' scale against the consensus is {scale[0]:.3g}.", False)
    sentence = f"The optics groups' scales against the consensus are {scale.min():.3g} to {scale.max():.3g}"
    if scale.max() < _MOST_SCALES * scale.min():
        return Finding("scale", f"{sentence}.", False)
    weak, strong = (particles.optics[number].name for number in (scale.argmin(), scale.argmax()))
    return Finding("scale", f"{sentence}, in {weak} and {strong}: were they normalised in the same way?", True)


def _noise(calibration: Calibration) -> Finding:
    sigma = calibration.sigma[:, 1:]
    ratio = float((sigma.max(1) / sigma.min(1)).max())
    sentence = f"The noise's standard deviation varies by a factor of {ratio:.2g} from shell to shell"
    if ratio < _MOST_COLOUR:
        return Finding("noise", f"{sentence}.", False)
    return Finding(
        "noise", f"{sentence}: far from white, which whitening takes care of, but look where it comes from.", True
    )


def _outlying_levels(normalisation: Normalisation) -> np.ndarray:
    """(n,) bool."""
    return np.abs(np.log(normalisation.level)) > np.log(_OUTLYING_LEVEL)


def write_outlying(path: Path, particles: Particles, normalisation: Normalisation) -> None:
    """Write the images that are used but unlike the others as CSV: input_row, image, what, value."""
    replaced, far = np.isfinite(normalisation.reach), _outlying_levels(normalisation)
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["input_row", "image", "what", "value"])
        for what, rows, values in (
            ("extreme pixels beyond", replaced, normalisation.reach),
            ("noise level over the median", far, normalisation.level),
        ):
            for row, name, value in zip(
                particles.source_row[rows] + 1, image_names(particles, rows), values[rows], strict=True
            ):
                writer.writerow([row, name, what, f"{value:.4g}"])
