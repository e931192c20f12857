"""The command ``flex-init``: checks the user's files and writes a config that the next command runs."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import flexlib
from flexlib.errors import InputError
from flexlib.first_config.config_text import config_text, facts_lines, rounded, shown_path
from flexlib.first_config.picture import draw_mask
from flexlib.first_config.survey import Request, Survey, survey
from flexlib.prepare.inputs import InputFiles

_DESCRIPTION = (
    "Check particles and a map, and write a first config for them to standard output. Everything that the workflow's "
    "first stage would refuse is refused here, in one line and before anything is written; what merely looks odd is "
    "listed on standard error and at the top of the config."
)
_EXAMPLE = """examples:
  flex-init Refine3D/job042/run_data.star Refine3D/job042/run_class001.mrc > my.yaml
  flex-init J50/J50_005_particles.cs J50/J50_005_volume_map.mrc J50/J50_005_volume_mask_refine.mrc \\
      --passthrough J50/J50_passthrough_particles.cs > my.yaml

then
  snakemake --configfile my.yaml --cores 16

Run both in the folder that results/ should be in. docs/first-steps.md says what each value follows from."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command ``flex-init``; returns the exit status (1 after a mistake, named in one line)."""
    options = _parser().parse_args(arguments)
    files = InputFiles(options.particles, options.consensus, options.mask, options.passthrough, options.image_root)
    halves = tuple(options.half_maps) if options.half_maps else None
    try:
        found = survey(Request(files, halves, options.name, not options.quick))
        picture = options.picture or Path(f"{found.name}_mask.png")
        command = _next_command()
        text = config_text(found, picture, command)
        title = _title(found)
        draw_mask(picture, found.inputs.density, found.molecule.mask, found.inputs.pixel_size_A, title)
    except InputError as error:
        print(f"ERROR {error}", file=sys.stderr)
        return 1
    sys.stdout.write(text)
    sys.stdout.flush()
    for line in facts_lines(found):
        print(line, file=sys.stderr)
    for warning in found.warnings:
        print(f"WARNING {warning}", file=sys.stderr)
    print(f"The mask is shown in {shown_path(picture)}: look at it first.", file=sys.stderr)
    print(f"Then run\n  {command}", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flex-init",
        description=textwrap.fill(_DESCRIPTION, 80),
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("particles", type=Path, help="particles with poses and CTF: .star (RELION) or .cs (CryoSPARC)")
    parser.add_argument(
        "consensus", type=Path, metavar="map", help="the map of the rigid refinement, .mrc, unsharpened"
    )
    parser.add_argument("mask", type=Path, nargs="?", help="solvent mask, .mrc; made from the map if not given")
    parser.add_argument("--passthrough", type=Path, metavar="CS", help="CryoSPARC's passthrough .cs of the particles")
    parser.add_argument("--image-root", type=Path, metavar="DIR", help="folder that image paths start in, if not found")
    parser.add_argument(
        "--half-maps", type=Path, nargs=2, metavar=("A", "B"),
        help="the refinement's half-maps; looked for beside the map if not given",
    )  # fmt: skip
    parser.add_argument("--name", help="name of the run; from the particle file's name if not given")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="picture of the mask (NAME_mask.png)")
    parser.add_argument(
        "--quick", action="store_true", help="do not compare a sample of the images with the map; prepare will"
    )
    return parser


def _title(found: Survey) -> str:
    molecule = found.molecule
    if molecule.threshold is None:
        source = (
            f"{found.files.mask.name if found.files.mask else 'mask'} (auto level would be {molecule.auto_level:.4g})"
        )
    elif molecule.threshold == "auto":
        source = f"mask made from {found.files.consensus.name}, level {molecule.level:.4g} (auto)"
    else:
        source = f"mask made from {found.files.consensus.name}, level {molecule.level:.4g}"
    volume = f"{rounded(molecule.volume_A3)} Å³, {100 * molecule.box_share:.1f} % of the box"
    return f"{found.name}: {source}\n{volume}, {molecule.widths_A[0]:.0f} Å at its widest (outline: mask = 0.5)"


def _next_command() -> str:
    """The command that runs the config: its file is where standard output goes, if that is a file."""
    snakefile = Path(flexlib.__file__).parents[1] / "Snakefile"
    beside = Path(sys.executable).with_name("snakemake")  # of an environment that is not activated
    words = [shown_path(beside) if shutil.which("snakemake") is None and beside.is_file() else "snakemake"]
    if snakefile.is_file() and not Path("Snakefile").exists():
        words += ["--snakefile", str(snakefile)]
    return shlex.join([*words, "--configfile", _output_file(), "--cores", str(os.cpu_count() or 1)])


def _output_file() -> str:
    """The file that standard output is redirected to, where the system says so."""
    try:
        path = Path(f"/proc/self/fd/{sys.stdout.fileno()}").resolve()
    except (OSError, ValueError):  # no such system, or no file behind standard output
        return "my.yaml"
    return shown_path(path) if path.is_file() and path.suffix in (".yaml", ".yml") else "my.yaml"
