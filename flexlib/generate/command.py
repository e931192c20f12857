"""The command ``python -m flexlib.generate``: what the workflow's rule does, at any time.

Also while a training is under way, from its newest checkpoint, and for single maps at chosen latents (``--at``).
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast, get_args

import numpy as np

from flexlib.errors import InputError
from flexlib.generate.run import generate_series
from flexlib.workflow_support.series import SPELLINGS, parse_latents
from flexlib.workflow_support.settings import Align, GenerateSettings, Presence


def main(arguments: Sequence[str] | None = None) -> int:
    """The command ``python -m flexlib.generate``; returns the exit status (1 after a mistake, named in one line)."""
    parser = argparse.ArgumentParser(
        prog="python -m flexlib.generate",
        description="Maps along the latent space of a training, finished or under way, or at chosen points of it.",
    )
    parser.add_argument("train_dir", type=Path, help="a training folder (train/cells~C/...) or a model file")
    parser.add_argument("out_dir", type=Path, help="folder to write")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--series", action="append", metavar="S", help=f"{SPELLINGS} (quoted); may be repeated")
    which.add_argument("--at", action="append", metavar="z1,z2,...", help="a map at this point; may be repeated")
    defaults = GenerateSettings()
    parser.add_argument("--frames", type=int, default=defaults.frames, help="maps per series (%(default)s)")
    parser.add_argument("--volume", type=Path, help="deform this map instead of the canonical one")
    parser.add_argument("--atoms", type=Path, metavar="MODEL", help="an atomic model (.cif, .pdb) to be carried along")
    parser.add_argument("--rigid-residues", action="store_true", help="its residues move as rigid bodies")
    parser.add_argument(
        "--align",
        choices=get_args(Align),
        default=defaults.align,
        help="what is at rest: the largest rigid body, or the density as the particles' poses see it (%(default)s)",
    )
    parser.add_argument(
        "--occupancy",
        default=defaults.occupancy,
        metavar="present|absent|1,2",
        help="parts that particles may lack: all there, none, or the numbers of those that are (%(default)s)",
    )
    parser.add_argument("--lowpass", type=float, metavar="A", help="low-pass filter on the map, Angstrom")
    parser.add_argument("--bfactor", type=float, metavar="A2", help="B-factor on the map; negative sharpens")
    parser.add_argument("--particles", type=Path, help="the folder that prepare wrote, if not beside the training")
    given = parser.parse_args(_joined_values(sys.argv[1:] if arguments is None else arguments))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if given.frames < 2:
            raise InputError(f"--frames: {given.frames}: a series has two maps or more")
        if given.lowpass is not None and given.lowpass <= 0:
            raise InputError(f"--lowpass: {given.lowpass:g} is not a resolution in Angstrom")
        points = None
        if given.at:
            chosen = [parse_latents(text, "--at") for text in given.at]
            if len({len(point) for point in chosen}) > 1:
                raise InputError("--at: the points have different numbers of coordinates")
            points = np.array(chosen)
        settings = GenerateSettings(
            frames=given.frames,
            series=given.series or defaults.series,
            volume=given.volume,
            atoms=given.atoms,
            rigid_residues=given.rigid_residues,
            align=given.align,
            occupancy=_occupancy(given.occupancy),
            lowpass_A=given.lowpass,
            bfactor_A2=given.bfactor,
        )
        generate_series(given.train_dir, given.out_dir, settings, given.particles, points)
    except InputError as error:
        print(f"ERROR {error}", file=sys.stderr)
        return 1
    return 0


def _occupancy(text: str) -> Presence | list[int]:
    """``present``, ``absent``, or the numbers of the parts that are there."""
    for word in get_args(Presence):
        if text == word:
            return cast(Presence, word)
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise InputError(f"--occupancy: {text!r} is not present, absent or numbers of parts such as 1,2")
    return [int(number) for number in text.split(",")]


def _joined_values(arguments: Sequence[str]) -> list[str]:
    """``--at -1,0`` as ``--at=-1,0``: argparse would take the point for an option."""
    result: list[str] = []
    for argument in arguments:
        if result and result[-1] in ("--at", "--bfactor"):
            result[-1] += f"={argument}"
        else:
            result.append(argument)
    return result
