"""What a training thinks of the images: whether each shows a particle, and which parts the particle has."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pandas as pd

from flexlib.particles.latents_table import OCCUPANCY, PROBABILITY
from flexlib.report.formats import number
from flexlib.report.results import LEAST_PROBABILITY, Results

NBSP = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class PartShare:
    """How many particles have a part."""

    number: int  # from 1
    present: np.ndarray  # (n,) posterior probability, of the rows that show a particle
    share: float
    error: float | None  # standard error
    mass_share: float | None  # of the whole map's, where the training says


def judged_images(results: Results) -> pd.DataFrame | None:
    """``row``, ``copy`` and ``probability`` of each row with latents; None where the training did not look for junk."""
    table = results.all_latents
    if table is None or PROBABILITY not in table or "z1" not in table:
        return None
    known = np.isfinite(table["z1"]) & np.isfinite(table[PROBABILITY])
    judged = table.loc[known, ["row", "copy", PROBABILITY]].rename(columns={PROBABILITY: "probability"})
    return judged.reset_index(drop=True) if len(judged) else None


def part_shares(results: Results) -> list[PartShare]:
    """Of each part, the share of the particles that have it: the training's record, else the mean of the posterior.

    The latter's error is that of the likeliest share: from the information that the posteriors have on it.
    """
    table = results.all_latents
    if table is None or "z1" not in table:
        return []
    numbers = sorted(int(match[1]) for name in table if (match := re.fullmatch(rf"{OCCUPANCY}(\d+)", name)))
    recorded = [] if results.validation is None else results.validation.occupancy
    shown = np.isfinite(table["z1"])
    if PROBABILITY in table:
        shown &= ~(table[PROBABILITY] < LEAST_PROBABILITY)
    found = []
    for part in numbers:
        present = table.loc[shown, f"{OCCUPANCY}{part}"].dropna().to_numpy(float)
        if not len(present):
            continue
        if part <= len(recorded):
            known = recorded[part - 1]
            found.append(PartShare(part, present, known["share"], known.get("share_se"), known.get("mass_share")))
        else:
            share = float(present.mean())
            found.append(PartShare(part, present, share, _share_error(present, share), None))
    return found


def _share_error(present: np.ndarray, share: float) -> float | None:
    """Standard error of the share of two kinds in a mixture: the score's variance is that of the posteriors."""
    spread = float(np.sqrt(((present - share) ** 2).sum()))
    return share * (1 - share) / spread if spread > 0 else None


def percent(share: float, error: float | None = None) -> str:
    """A share, with its standard error: ``31 ± 2 %``."""
    if error is None:
        return f"{number(100 * share, 2)}{NBSP}%"
    decimals = max(0, -int(np.floor(np.log10(max(100 * error, 0.01)))))  # one digit of the error
    return f"{100 * share:.{decimals}f} ± {100 * error:.{decimals}f}{NBSP}%"


def junk_sentence(results: Results, judged: pd.DataFrame) -> str:
    """How many images show no particle, and what becomes of them."""
    best = judged.groupby("row")["probability"].max()  # over the symmetry copies of an image
    unlikely, total = int((best < LEAST_PROBABILITY).sum()), len(best)
    what = "noise, ice, carbon, another or a broken molecule, or one whose pose is wrong"
    sentence = f"None of {total:,} images more likely shows anything but a particle of this model ({what})."
    if unlikely:
        share = f"{unlikely:,} of {total:,} images ({percent(unlikely / total)})"
        sentence = f"{share} more likely show no particle of this model: {what}."
    if results.validation is not None and results.validation.junk_share is not None:
        sentence += f" The training learnt a junk share of {percent(results.validation.junk_share)}."
    if results.resolution is None:
        return sentence
    weight = results.resolution.effective_particles
    if weight is None:
        return f"{sentence} The reconstruction was told to count them all alike (reconstruct.weigh_particles: false)."
    rows = f" of {len(judged):,} rows" if len(judged) != total else ""
    return (
        f"{sentence} In the reconstruction each image counts as the probability that it shows a particle, all{rows} "
        f"together as {weight:,.0f}."
    )


def part_sentence(part: PartShare) -> str:
    """How many particles lack a part."""
    mass = "" if part.mass_share is None else f" ({percent(part.mass_share)} of the mass)"
    return f"Part {part.number}{mass} is missing from {percent(1 - part.share, part.error)} of the particles."
