"""Fuzzing of the readers: damaged files in, and out comes a result or one line of our own, in bounded time and memory.

The inputs are read in a process of their own, which has a limit of memory and of time for each; this module is that
process too: ``python tests/fuzzing.py FOLDER SEED COUNT READER ...``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random

import numpy as np
import yaml
from fuzz_limits import MEMORY_BYTES, complaint, limit_memory, peak_bytes, watch
from fuzz_seeds import REFUSED, config_paths, write_seeds
from mutated_formats import damaged

from flexlib.atoms.geometry import Geometry
from flexlib.atoms.model import read_atomic_model, write_ensemble
from flexlib.errors import InputError
from flexlib.images.stack import read_stack_header
from flexlib.imaging.maps import read_map
from flexlib.mesh.cryosparc import read_flex_mesh
from flexlib.mesh.segments import read_segments
from flexlib.mesh.weights import read_cell_weights, read_segment_weights
from flexlib.particles import read_particles
from flexlib.particles.cs_file import read_cs_file
from flexlib.particles.latents_read import read_frame_latents
from flexlib.particles.star_text import read_star_text
from flexlib.tetra.io import read_grid, read_mesh, surface_of
from flexlib.workflow_support.checks import check_config, check_maps, check_paths, settle_validation
from flexlib.workflow_support.connections import check_mesh_keys
from flexlib.workflow_support.points import sweep_points, wanted_points
from flexlib.workflow_support.series import check_series, count_maps
from flexlib.workflow_support.settings import MeshSettings, make_settings


@dataclass
class Outcome:
    """What came of one reader's inputs."""

    reader: str
    read: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)
    whole_refused: list[str] = field(default_factory=list)  # the undamaged files that were refused
    grown_bytes: int = 0  # by how much the largest resident size rose
    seconds: float = 0.0  # of the processor


# the readers ---------------------------------------------------------------------------------------------------------


def _star(path: Path) -> None:
    """The particles; and the first row again, with a column more."""
    read_particles(path)
    text = read_star_text(path)
    text.write(path.with_name("copy.star"), text.particles, [0], {"flexLatent1": ["1.5"]})


def _cs(path: Path) -> None:
    read_particles(path)
    read_cs_file(path).write(path.with_name("copy.cs"))


def _stack(path: Path) -> None:
    """The header, and the first and last image."""
    header = read_stack_header(path)
    header.read(np.unique([0, header.num_images - 1]))


def _mesh(path: Path) -> None:
    """A mesh of tetrahedra, or a surface."""
    if path.suffix not in (".stl", ".ply", ".obj"):
        mesh = read_mesh(path)
        assert len(mesh.cells) == len(mesh.rigidity) == len(mesh.segment) and (mesh.rigidity > 0).all()
        return
    grid = read_grid(path)
    if any(block.type == "triangle" for block in grid.cells):
        surface_of(grid, path)


def _atoms(path: Path) -> None:
    """The model, its bonds and clashes, and an ensemble of it that can be read again."""
    model = read_atomic_model(path)
    Geometry(model)
    copy = path.with_name("copy.cif")
    write_ensemble(copy, model, [model.positions_A] * 2, np.zeros(len(model.residues)))
    assert len(read_atomic_model(copy)) == len(model)


def _weights(path: Path) -> None:
    read_segment_weights(path) if path.suffix == ".csv" else read_cell_weights(path, 40)


def _config(path: Path) -> None:
    """As Snakemake and ``workflow/rules/common.smk`` do, before any job."""
    content = path.read_bytes()
    try:
        config = json.loads(content) if path.suffix == ".json" else yaml.load(content, yaml.CSafeLoader)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(f"{path}: Snakemake refuses it") from error
    try:
        complete = check_config(config)
        points = sweep_points(complete)
        check_mesh_keys(make_settings(MeshSettings, {**complete["mesh"], "cells": 1}))
        check_series(complete["generate"]["series"], sorted({point.latent_dims for point in points}))
        count_maps(complete["generate"]["series"], complete["generate"]["frames"], 2)
        candidates = wanted_points(points, complete, "reconstruct")
        wanted_points(points, complete, "validate")
        wanted_points(points, complete, "interpret")
        settle_validation(config, complete, len(candidates))
        check_paths(complete)
        check_maps(complete)
    except InputError as error:
        named = str(error).startswith(
            ("config: ", "mesh.", "generate.", "reconstruct.", "train.", "validate", "interpret", "sweep.")
        )
        raise InputError(f"{path}: {error}" if named else f"names no key: {error}") from error


# how a message on a config begins
_OF_KEYS = ("config: ", "mesh.", "generate.", "reconstruct.", "train.", "validate", "interpret", "sweep.")
READERS: dict[str, Callable[[Path], object]] = {
    "star": _star,
    "cs": _cs,
    "map": read_map,
    "labels": read_segments,
    "stack": _stack,
    "seg": read_segments,
    "mesh": _mesh,
    "flex_mesh": read_flex_mesh,
    "points": read_frame_latents,
    "atoms": _atoms,
    "weights": _weights,
    "config": _config,
}


# the process ---------------------------------------------------------------------------------------------------------


def _read_whole(name: str, seeds: list[Path]) -> Outcome:
    """Read the undamaged files."""
    outcome = Outcome(name)
    for seed in seeds:
        complained = complaint(READERS[name], seed)
        if complained:
            outcome.wrong.append(f"{seed.name}, undamaged: {complained}")
        elif complained is not None:
            outcome.whole_refused.append(seed.stem)
    return outcome


def _read_damaged(outcome: Outcome, seeds: list[Path], seed: int, count: int) -> None:
    """Read ``count`` damaged files; failures are kept beside the seeds, one of each kind."""
    name, before, start, kinds = outcome.reader, peak_bytes(), time.process_time(), set()
    good = [path for path in seeds if path.stem not in outcome.whole_refused]
    seeds = [*seeds, *good * (len(outcome.whole_refused) // len(good))]  # as many of these as of the others
    contents = [path.read_bytes() for path in seeds]
    with (seeds[0].parent / "number").open("wb", buffering=0) as last:
        for number in range(count):
            rng = Random(f"{name} {seed} {number}")
            whole, content = seeds[number % len(seeds)], contents[number % len(seeds)]
            path = whole.with_name(f"input{whole.suffix}")
            path.write_bytes(damaged(content, whole.suffix, rng))
            last.seek(0)
            last.write(f"{number} of {whole.name}\n".encode())
            complained = complaint(READERS[name], path)
            if complained is None:
                outcome.read += 1
            elif not complained:
                outcome.refused += 1
            elif (kind := complained.partition(" at ")[2] or complained[:60]) not in kinds:
                kinds.add(kind)
                outcome.wrong.append(f"{name} {number} of {whole.name}: {complained}")
                path.replace(path.with_stem(f"wrong_{number}"))
    outcome.grown_bytes = peak_bytes() - before
    outcome.seconds = time.process_time() - start


def _main(folder: Path, seed: int, count: int, names: list[str]) -> None:
    watch()
    os.chdir(folder / "here")
    seeds = {name: sorted((folder / name).iterdir()) for name in names}
    outcomes = [_read_whole(name, seeds[name]) for name in names]  # what is imported is no reader's memory
    limit_memory()
    for outcome in outcomes:
        _read_damaged(outcome, seeds[outcome.reader], seed, count)
        print(json.dumps(asdict(outcome)), flush=True)
    assert not Path("touched").exists(), "a command in a file was run"


def run(folder: Path, seed: int, count: int, seconds: float) -> dict[str, Outcome]:
    """Fuzz every reader in a process with limits. Raises AssertionError, naming the input, where it dies or hangs."""
    write_seeds(folder)
    config_paths(folder / "here")
    command = [sys.executable, __file__, str(folder), str(seed), str(count), *READERS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)
        problem = f"exit status {done.returncode}\n{done.stderr[-2000:]}" if done.returncode else ""
    except subprocess.TimeoutExpired:
        problem = f"no end after {seconds} s"
    last = {path.parent.name: path.read_text().splitlines()[0] for path in folder.glob("*/number")}
    assert not problem, f"{problem}\nlast inputs: {last}"
    outcomes = [Outcome(**json.loads(line)) for line in done.stdout.splitlines()]
    return {outcome.reader: outcome for outcome in outcomes}


def check(outcome: Outcome, count: int) -> None:
    """Whole files as designed; nothing but results and refusals of damaged ones, and some of both."""
    print(f"{outcome.read} read, {outcome.refused} refused, {outcome.grown_bytes >> 20} MB, {outcome.seconds:.1f} s")
    assert not outcome.wrong, "\n".join(outcome.wrong)
    assert set(outcome.whole_refused) == REFUSED.get(outcome.reader, set())
    assert outcome.read + outcome.refused == count
    assert outcome.read > 0.02 * count and outcome.refused > 0.25 * count, "the damage is not of the right strength"
    assert outcome.grown_bytes < MEMORY_BYTES


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
