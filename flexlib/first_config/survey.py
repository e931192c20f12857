"""Everything that a first config is written from: the user's files checked as prepare does, looked at, and judged."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from flexlib.errors import InputError
from flexlib.files import is_there
from flexlib.first_config.facts import ParticleFacts, particle_facts, particle_warnings
from flexlib.first_config.find import find_half_maps, find_image_root, find_symmetry
from flexlib.first_config.molecule import HalfMaps, Molecule, compare_half_maps, look_at_mask, molecule_warnings
from flexlib.first_config.proposals import Cells, TrainBox, propose_cells, propose_train_box
from flexlib.imaging.symmetry import symmetry_rotations
from flexlib.layout import RunFolder
from flexlib.particles.read import read_particles
from flexlib.prepare.inputs import CheckedInputs, InputFiles, calibrate, check_inputs, sample_of
from flexlib.prepare.symmetry import check_symmetry
from flexlib.workflow_support.checks import check_maps
from flexlib.workflow_support.settings import MaskSettings, PrepareSettings

_COMMON_STEMS = ("run_data", "particles", "consensus_data", "run")  # that say nothing about the particles


@dataclass(frozen=True)
class Request:
    """What the user asks for."""

    files: InputFiles
    half_maps: tuple[Path, Path] | None = None
    name: str | None = None
    compare_images: bool = True  # a sample of them with the map, as prepare does; takes most of the time


@dataclass(frozen=True)
class Survey:
    """The user's files, what was seen in them, and what to propose."""

    name: str
    files: InputFiles  # ``image_root`` filled in where it had to be found
    root_was_found: bool
    inputs: CheckedInputs  # its ``soft_mask`` is the proposed one
    facts: ParticleFacts
    molecule: Molecule
    half_maps: HalfMaps | None
    half_maps_were_found: bool
    symmetry: str
    symmetry_source: Path | None
    train_box: TrainBox
    cells: Cells
    warnings: tuple[str, ...]

    @property
    def resolution_A(self) -> float | None:
        """To which the half-maps agree; None where that is not known."""
        return None if self.half_maps is None or self.half_maps.same else self.half_maps.resolution_A


def survey(request: Request) -> Survey:
    """Check the user's files as ``prepare`` does, look at them, and choose what to propose.

    Raises
    ------
    InputError
        Whatever ``prepare`` or the workflow would refuse, in their words; half-maps that were given and cannot be read.
    """
    with _logged_warnings() as logged:
        files = _with_image_root(request.files)
        inputs = check_inputs(files, PrepareSettings(), MaskSettings())
        check_maps({"consensus": files.consensus, "mask": files.mask})
        users, made = (None, inputs.soft_mask) if files.mask is None else (inputs.soft_mask, None)
        molecule = look_at_mask(inputs.density, inputs.pixel_size_A, users, MaskSettings(), made)
        inputs = replace(inputs, soft_mask=molecule.mask)
        if request.compare_images:
            calibrate(sample_of(inputs))
        half_maps, problem = _half_maps(request, inputs)
    facts = particle_facts(inputs.everything)
    symmetry, source, doubt = _symmetry(files, inputs, facts)
    resolution_A = None if half_maps is None or half_maps.same else half_maps.resolution_A
    train_box = propose_train_box(inputs.crop_box, inputs.pixel_size_A, resolution_A)
    extent_A = inputs.crop_box * inputs.pixel_size_A
    name = request.name or default_name(files.particles)
    warnings = [*logged, *problem, *particle_warnings(facts)]
    warnings += [*molecule_warnings(molecule, half_maps, inputs.pixel_size_A), *doubt]
    results = RunFolder(Path("results", name)).path
    if results.exists():
        warnings.append(f"{results}/ is there already: give another --name to keep what is in it")
    return Survey(
        name=name,
        files=files,
        root_was_found=files.image_root != request.files.image_root,
        inputs=inputs,
        facts=facts,
        molecule=molecule,
        half_maps=half_maps,
        half_maps_were_found=half_maps is not None and request.half_maps is None,
        symmetry=symmetry,
        symmetry_source=source,
        train_box=train_box,
        cells=propose_cells(extent_A, molecule.widths_A[0], train_box.pixel_size_A),
        warnings=tuple(" ".join(warning.split()) for warning in warnings),
    )


def default_name(particles: Path) -> str:
    """A run's name from the particle file's; of names that every job uses, with the folder's in front."""
    stem, folder = particles.stem, particles.absolute().parent.name
    text = f"{folder}_{stem}" if stem in _COMMON_STEMS and folder else stem
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).lstrip("._-") or "my_complex"


@contextmanager
def _logged_warnings() -> Iterator[list[str]]:
    """Warnings that the package logs meanwhile, each once, instead of on the terminal."""
    found: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage() not in found:
                found.append(record.getMessage())

    collector = Collect(logging.WARNING)
    logger = logging.getLogger("flexlib")
    logger.addHandler(collector)
    try:
        yield found
    finally:
        logger.removeHandler(collector)


def _with_image_root(files: InputFiles) -> InputFiles:
    """The same, ``image_root`` filled in where the stacks are not found without it but are in some folder near by."""
    if files.image_root is not None:
        return files
    particles = read_particles(files.particles, files.passthrough)
    if all(is_there(particles.stack_paths[stack], as_file=True) for stack in np.unique(particles.stack_index)):
        return files
    near = (Path.cwd(), files.particles.absolute().parent, files.consensus.absolute().parent)
    return replace(files, image_root=find_image_root(particles, near))


def _half_maps(request: Request, inputs: CheckedInputs) -> tuple[HalfMaps | None, list[str]]:
    """The half-maps given or found, and what is wrong with those found."""
    paths = request.half_maps or find_half_maps(request.files.consensus)
    if paths is None:
        return None, []
    try:
        return compare_half_maps(paths, inputs.soft_mask, inputs.pixel_size_A), []
    except InputError as error:
        if request.half_maps is not None:
            raise
        return None, [f"half-maps beside the map are not used: {error}"]


def _symmetry(files: InputFiles, inputs: CheckedInputs, facts: ParticleFacts) -> tuple[str, Path | None, list[str]]:
    """The point group to write, the file that states it, and what makes it doubtful."""
    stated = find_symmetry([files.particles.parent, files.consensus.parent])
    if stated is None:
        return "C1", None, []
    group, source = stated
    if group == "C1":
        return group, source, []
    if facts.num_images < facts.num_particles:
        return "C1", source, [f"{source} states {group}, but images come more than once: C1 is written"]
    try:
        rotations = symmetry_rotations(group)
        check_symmetry(inputs.density, rotations, group, str(files.consensus))
    except InputError as error:
        return "C1", source, [f"{source} states {group}, but C1 is written: {error}"]
    message = (
        f"symmetry {group}: each particle is used in {len(rotations)} poses, which takes {len(rotations)} times as "
        "long; motion need not be symmetric"
    )
    return group, source, [message]
