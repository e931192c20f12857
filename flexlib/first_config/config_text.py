"""A survey as the text of a config: every line says where its value comes from."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

import yaml

from flexlib.first_config.proposals import LATENT_DIMS, RIGIDITIES, TRAINING_BAND
from flexlib.first_config.survey import Survey
from flexlib.workflow_support.checks import check_config, check_maps, check_paths
from flexlib.workflow_support.estimates import DataSize, disk_mb

_HEADING_WIDTH = 110
_COMMENTS_WITHIN = 60  # columns; comments of longer lines follow where the line ends


def config_text(survey: Survey, picture: Path, command: str) -> str:
    """The YAML of a first config.

    Parameters
    ----------
    survey
        What it is written from.
    picture
        Of the mask.
    command
        That runs the config.

    Raises
    ------
    InputError
        The workflow would refuse it.
    """
    values = [*_top_level(survey), ("", ""), *_sections(survey)]
    lines = [*_heading(survey, picture, command), "", *_aligned(values)]
    text = "".join(f"{line}\n" for line in lines)
    config = check_config(yaml.safe_load(text))
    check_paths(config)
    check_maps(config)
    return text


def facts_lines(survey: Survey) -> list[str]:
    """What was found in the files, in a few lines of plain English."""
    facts, inputs, molecule = survey.facts, survey.inputs, survey.molecule
    groups = "" if facts.num_optics_groups == 1 else f" in {facts.num_optics_groups} optics groups"
    halves = "no half-sets"
    if facts.half_counts is not None:
        halves = f"half-sets of {facts.half_counts[0]:,} and {facts.half_counts[1]:,}"
    shift = "no phase shift"
    if any(facts.phase_shift_deg):
        shift = f"phase shift {_range(facts.phase_shift_deg)} degrees"
    defocus_um = (facts.defocus_A[0] / 1e4, facts.defocus_A[1] / 1e4)
    longest, _, shortest = molecule.widths_A
    lines = [
        f"Particles: {facts.num_particles:,}{groups}, {_range(facts.box)} px of {_range(facts.pixel_size_A)} A; "
        f"{halves}",
        f"CTF: {_range(facts.voltage_kV)} kV, Cs {_range(facts.spherical_aberration_mm)} mm, amplitude contrast "
        f"{_range(facts.amplitude_contrast)}, defocus {_range(defocus_um, 2)} um, {shift}",
        f"Map: {inputs.volume.box} voxels of {inputs.volume.pixel_size_A:.4g} A; the mask holds "
        f"{rounded(molecule.volume_A3)} A^3, {100 * molecule.box_share:.1f} % of the box, and is {longest:.0f} A by "
        f"{shortest:.0f} A at its widest and narrowest",
    ]
    if survey.half_maps is not None and not survey.half_maps.same:
        found = ", found beside the map" if survey.half_maps_were_found else ""
        first, second = (path.name for path in survey.half_maps.paths)
        lines.append(
            f"Half-maps: {first} and {second}{found}; FSC in the mask is 0.143 at {survey.half_maps.resolution_A:.2f} A"
        )
    else:
        lines.append("Half-maps: none, so the resolution is not known (--half-maps A.mrc B.mrc)")
    return lines


def _heading(survey: Survey, picture: Path, command: str) -> list[str]:
    size = DataSize(survey.facts.num_particles, survey.inputs.crop_box, survey.train_box.box)
    gigabytes = disk_mb("prepare", size) / 1024
    lines = ["Written by flex-init. Run it with", f"  {command}", "What each value follows from: docs/first-steps.md"]
    lines += ["", *facts_lines(survey)]
    lines += [f"Look at {shown_path(picture)}: is the whole molecule inside the outline, with room for its motion?"]
    lines += [f"The prepared particles take about {gigabytes:.1f} GB below results/{survey.name}/"]
    if survey.warnings:
        lines += ["", "Look at these before you run it:", *(f"- {warning}" for warning in survey.warnings)]
    return [f"# {part}".rstrip() for line in lines for part in _wrapped(line)]


def _wrapped(line: str) -> list[str]:
    """A line of the heading in several, unless it is the command, which is to be copied."""
    if line.startswith(" "):
        return [line]
    return textwrap.wrap(
        line, _HEADING_WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    ) or [""]


def _top_level(survey: Survey) -> list[tuple[str, str]]:
    files, inputs = survey.files, survey.inputs
    halves = "half-sets are the file's" if survey.facts.half_counts is not None else "half-sets are drawn at random"
    lines = [
        _line("name", survey.name, f"results go to results/{survey.name}/"),
        _line("particles", shown_path(files.particles), f"{survey.facts.num_particles:,} particles; {halves}"),
    ]
    if files.passthrough is not None:
        lines.append(_line("passthrough", shown_path(files.passthrough), "further columns of the same particles"))
    if files.image_root is not None:
        why = "image paths start here" + (": found by looking for the stacks" if survey.root_was_found else "")
        lines.append(_line("image_root", shown_path(files.image_root), why))
    agree = "" if survey.resolution_A is None else f"; its half-maps agree to {survey.resolution_A:.2f} A"
    size = f"{inputs.volume.box} voxels of {inputs.volume.pixel_size_A:.4g} A"
    lines.append(_line("consensus", shown_path(files.consensus), f"the map of the rigid refinement, {size}{agree}"))
    if files.mask is not None:
        share = f"{100 * survey.molecule.box_share:.1f} % of the box"
        lines.append(_line("mask", shown_path(files.mask), f"yours, {share}; outside it nothing moves"))
    return lines


def _sections(survey: Survey) -> list[tuple[str, str]]:
    molecule = survey.molecule
    lines = [("prepare:", "images and boxes")]
    lines += [_line("  train_box", survey.train_box.box, _train_box_comment(survey))]
    lines += [_line("  symmetry", survey.symmetry, _symmetry_comment(survey))]
    lines += [("mesh:", "what moves, and how finely")]
    lines += [_line("  cells", survey.cells.count, _cells_comment(survey))]
    if molecule.threshold == "auto":
        comment = f"level of the mask; here auto is {molecule.level:.4g} of the map at 20 A"
        lines += [_line("  threshold", "auto", comment)]
    elif molecule.threshold is not None:
        comment = f"level of the mask at 10 A; auto ({molecule.auto_level:.4g}) would fill the box or reach its rim"
        lines += [_line("  threshold", molecule.threshold, comment)]
    lines += [("train:", "how motion is learnt")]
    lines += [
        _line("  latent_dims", LATENT_DIMS, "directions of motion to start with; a list such as [1, 2, 4] is swept")
    ]
    lines += [
        _line("  rigidity", list(RIGIDITIES), "soft, the default, stiff: three trainings, the held-out score chooses")
    ]
    return lines


def _train_box_comment(survey: Survey) -> str:
    box = survey.train_box
    band_A = box.nyquist_A / TRAINING_BAND
    comment = f"pixels of {box.pixel_size_A:.3g} A, {box.why}; Nyquist {box.nyquist_A:.3g} A, trains to {band_A:.3g} A"
    resolution_A = survey.resolution_A
    if resolution_A is None:
        return comment
    side = "short of" if resolution_A < band_A else "beyond"
    return f"{comment}, {side} the half-maps' {resolution_A:.3g} A"


def _symmetry_comment(survey: Survey) -> str:
    if survey.symmetry_source is None:
        return "not stated beside the files; set your refinement's group if it had one"
    source = shown_path(survey.symmetry_source)
    return f"{source} says so" if survey.symmetry != "C1" or not _is_doubted(survey) else f"see above about {source}"


def _is_doubted(survey: Survey) -> bool:
    return any(warning.startswith(f"{survey.symmetry_source} states") for warning in survey.warnings)


def _cells_comment(survey: Survey) -> str:
    extent_A = survey.inputs.crop_box * survey.inputs.pixel_size_A
    return f"across the box of {extent_A:.0f} A: {survey.cells.cell_A:.3g} A each, {survey.cells.why}"


def _line(key: str, value: Any, comment: str) -> tuple[str, str]:
    return f"{key}: {_scalar(value)}", " ".join(comment.split())


def _aligned(lines: list[tuple[str, str]]) -> list[str]:
    """Values and their comments, the latter in one column."""
    widths = [len(value) for value, _ in lines]
    column = max((width for width in widths if width <= _COMMENTS_WITHIN), default=0)
    return [f"{value.ljust(column)}  # {comment}" if comment else value for value, comment in lines]


def _scalar(value: Any) -> str:
    """A value or a list of them as YAML on one line, quoted where it must be."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def shown_path(path: Path) -> str:
    """``path`` relative to the working folder where it lies below it, else absolute."""
    # symbolic links are kept as the user names them, unless .. makes where they lead matter
    absolute, here = path.resolve() if ".." in path.parts else path.absolute(), Path.cwd()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(absolute)


def rounded(value: float) -> str:
    """A large number to three digits, thousands parted by commas."""
    return f"{float(f'{value:.3g}'):,.0f}"


def _range(values: tuple[float, float], digits: int = 4) -> str:
    low, high = (f"{value:.{digits}g}" for value in values)
    return low if low == high else f"{low} to {high}"
