"""Reads damaged files, each within limits of time and memory: a process of its own, for ``test_fuzz.py``.

    python read_damaged.py KIND SEED COUNT FOLDER

A reader returns, or raises our InputError in one line that names the file (of a config, the key). All else is a
failure. The last line written is a summary in JSON; the file that was being read last is kept in the folder.
"""

from __future__ import annotations

import io
import json
import logging
import os
import random
import resource
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import damage
import yaml

from flexlib.errors import InputError
from flexlib.images.stack import read_stack_header
from flexlib.imaging.maps import read_map
from flexlib.mesh.cryosparc import read_flex_mesh
from flexlib.mesh.segments import read_segments
from flexlib.particles import read_particles
from flexlib.tetra.io import read_grid, read_mesh
from flexlib.workflow_support.checks import check_config, check_maps, check_paths, settle_validation
from flexlib.workflow_support.connections import check_mesh_keys
from flexlib.workflow_support.points import sweep_points, wanted_points
from flexlib.workflow_support.series import check_series
from flexlib.workflow_support.settings import MeshSettings, make_settings

TIME_LIMIT_S = 10.0  # of CPU, for a file
MEMORY_LIMIT = 2**30  # bytes beyond what the imports have taken


class TooLong(BaseException):
    """A file took too long: no parser's ``except Exception`` may swallow it."""


def read_stack_file(path: Path) -> None:
    """The header, and the first and last image."""
    header = read_stack_header(path)
    header.read([0, header.num_images - 1])


def read_mesh_file(path: Path) -> None:
    """A mesh of tetrahedra, a surface, or CryoSPARC's pickle."""
    if path.suffix == ".pkl":
        read_flex_mesh(path)
    elif path.stem.startswith("surface"):
        read_grid(path)
    else:
        read_mesh(path)


def read_config_file(path: Path) -> None:
    """As Snakemake and ``workflow/rules/common.smk`` do."""
    try:
        config = yaml.load(path.read_bytes(), yaml.CSafeLoader)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError):  # Snakemake's own affair
        raise InputError(f"{path}: not YAML") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: no keys at top level")
    complete = check_config(config)
    check_mesh_keys(make_settings(MeshSettings, {**complete["mesh"], "cells": 1}))
    points = sweep_points(complete)
    check_series(complete["generate"]["series"], sorted({point.latent_dims for point in points}))
    candidates = wanted_points(points, complete, "reconstruct")
    wanted_points(points, complete, "validate")
    settle_validation(config, complete, len(candidates))
    check_paths(complete)
    check_maps(complete)


READERS = {
    "star": read_particles,
    "cs": read_particles,
    "map": read_map,
    "labels": read_segments,
    "stack": read_stack_file,
    "seg": read_segments,
    "mesh": read_mesh_file,
    "config": read_config_file,
}
_OF_KEYS = ("config: ", "mesh.", "generate.", "train.", "reconstruct.")  # how a message on a config begins


def outcome(kind: str, path: Path) -> str:
    """``read``, ``refused``, or what went wrong."""
    signal.setitimer(signal.ITIMER_PROF, TIME_LIMIT_S)
    printed = io.StringIO()
    try:
        with redirect_stdout(printed), redirect_stderr(printed):
            READERS[kind](path)
        return f"printed {printed.getvalue()[:200]!r}" if printed.getvalue() else "read"
    except InputError as error:
        text = str(error)
        named = str(path) in text or (kind == "config" and text.startswith(_OF_KEYS))
        return "refused" if named and len(text.splitlines()) == 1 else f"not one line that names the file: {text!r}"
    except TooLong:
        return f"longer than {TIME_LIMIT_S:g} s"
    except Exception as error:
        places = traceback.extract_tb(error.__traceback__)
        own = [f"{Path(place.filename).name}:{place.lineno}" for place in places if "flexlib" in place.filename]
        return f"{type(error).__name__}: {str(error)[:160]!r} at {' > '.join(own[-2:])}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def limit_memory() -> None:
    """Let the process grow by ``MEMORY_LIMIT``, no more."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY_LIMIT
    resource.setrlimit(resource.RLIMIT_AS, (size, resource.getrlimit(resource.RLIMIT_AS)[1]))


def main(kind: str, seed: int, count: int, folder: Path) -> dict[str, object]:
    """Read ``count`` damaged files of a kind, and each whole one first."""
    make, spoil = damage.KINDS[kind]
    make(folder)
    whole = sorted(path for path in folder.iterdir() if path.is_file())
    os.chdir(folder)  # where the paths of a config start
    outcomes = {path.name: outcome(kind, path) for path in whole}
    found = Counter(outcomes.values())
    contents = [(path, path.read_bytes()) for path in whole if not path.name.startswith("bomb")]
    limit_memory()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, slowest_s, examples = time.process_time(), 0.0, {}
    for number in range(count):
        rng = random.Random(f"{kind} {seed} {number}")
        path, content = contents[number % len(contents)]
        path.write_bytes(spoil(content, rng))
        one = time.process_time()
        result = outcome(kind, path)
        slowest_s = max(slowest_s, time.process_time() - one)
        found[result if result in ("read", "refused") else "wrong"] += 1
        if result not in ("read", "refused") and len(examples) < 20:
            where = result.rpartition(" at ")[2]
            if where not in examples:
                path.with_name(f"wrong{number}{path.suffix}").write_bytes(path.read_bytes())
            examples.setdefault(where, f"{kind} {seed} {number} ({path.name}): {result}")
        path.write_bytes(content)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    seconds = time.process_time() - start
    return {
        "whole": outcomes,
        "found": found,
        "wrong": list(examples.values()),
        "grown_GB": grown,
        "slowest_s": slowest_s,
        "cpu_s": seconds,
    }


if __name__ == "__main__":

    def _stop(*_: object) -> None:
        raise TooLong

    signal.signal(signal.SIGPROF, _stop)
    logging.disable()
    warnings.simplefilter("ignore")
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))))
