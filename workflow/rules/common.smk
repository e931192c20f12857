"""The checked config, the sweep, and the functions that rules ask for their settings. No rules here."""

import os
import shlex
import sys
from dataclasses import asdict, fields
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from flexlib.errors import InputError
from flexlib.layout import HALF_PATTERN, MESH_PATTERN, POINT_PATTERN, RunFolder, SimulationFolder
from flexlib.records import ChoiceRecord
from flexlib.workflow_support import estimates
from flexlib.workflow_support.checks import (
    check_choice,
    check_conditions,
    check_config,
    check_maps,
    check_paths,
    input_paths,
    settle_validation,
)
from flexlib.workflow_support.connections import check_mesh_keys
from flexlib.workflow_support.gpus import gpu_complaint, gpus_of, tasks_complaint, tasks_of, uses_gpu
from flexlib.workflow_support.locks import remove_dead_locks
from flexlib.workflow_support.points import sweep_points, wanted_points
from flexlib.workflow_support.series import check_series, count_maps
from flexlib.workflow_support.settings import MaskSettings, MeshSettings, make_settings


def checked(config):
    """The config, valid and complete, and its sweep; ends the run with one line where something is wrong."""
    try:
        complete = check_config(config)
        check_paths(complete)
        check_conditions(complete)
        check_maps(complete)
        check_mesh_keys(make_settings(MeshSettings, {**complete["mesh"], "cells": 1}))
        points = sweep_points(complete)
        check_choice(complete, len(points))
        check_series(complete["generate"]["series"], sorted({point.latent_dims for point in points}))
        candidates = wanted_points(points, complete, "reconstruct")
        wanted_points(points, complete, "validate")
        wanted_points(points, complete, "interpret")
        left_out = settle_validation(config, complete, len(candidates))
        if left_out and workflow.is_main_process:
            print(f"Nothing is validated: {left_out}", file=sys.stderr)
        return complete, {point.path: point for point in points}
    except InputError as error:
        sys.exit(f"ERROR {error}")


_complete, POINTS = checked(config)
config.update(_complete)

RUN = RunFolder(Path("results", config["name"]))  # with wildcards where there is one folder a sweep point
LOGS = f"logs/{config['name']}"
BENCHMARKS = RUN.benchmarks

GPU_RULES = ["train", "reconstruct", "train_half", "validate"]
USED = GPU_RULES[:2] if config["validate"]["points"] == "none" else GPU_RULES
PROCESSES = config["train"]["processes"]
# what the profile's set-resources says of them, rule by rule; its words are called orig_arg by older Snakemakes
GIVEN = {
    name: {
        key: getattr(item, "raw", None) or getattr(item, "orig_arg", item)
        for key, item in workflow.resource_settings.overwrite_resources.get(name, {}).items()
    }
    for name in GPU_RULES
}
GPUS = {name: gpus_of(given) for name, given in GIVEN.items()}
# asked for where the config insists on them and the profile says nothing; with device: auto the profile decides
MISSING_GPUS = {name: PROCESSES if config["device"] == "cuda" and GPUS[name] is None else 0 for name in GPU_RULES}
ASKED_FOR = {name: MISSING_GPUS[name] or GPUS[name] or 0 for name in USED}
# where processes are tasks of srun, each is given the rule's threads, and each node the memory of those that it has
TASKS = {name: tasks_of(given) for name, given in GIVEN.items()}
A_NODE = {name: -(-PROCESSES // int(given.get("nodes") or 1)) for name, given in GIVEN.items()}

# the executor is not known while the workflow is read; only one that sends jobs elsewhere has a number of them
IS_LOCAL = workflow.resource_settings.nodes is None

# which of envs/ the jobs run in, with --sdm conda. The jobs' own Snakemakes, perhaps on another machine, must come to
# the same: they find the choice in the environment.
DEVICE = os.environ.setdefault(
    "FLEXLIB_ENVIRONMENT", "cuda" if uses_gpu(config["device"], IS_LOCAL, ASKED_FOR) else "cpu"
)
ENVIRONMENT = f"../../envs/{DEVICE}.yaml"
# for what pin files do not name
os.environ.setdefault("CONDA_CHANNELS", "conda-forge")
if DEVICE == "cuda":
    # on a login node too, which has no GPU, conda makes the environment for them
    os.environ.setdefault("CONDA_OVERRIDE_CUDA", "12.9")
# for provenance: a job's own command line is another
if workflow.is_main_process:
    os.environ.update(FLEXLIB_COMMAND=shlex.join(sys.argv))


envvars:
    "FLEXLIB_COMMAND",
    "FLEXLIB_ENVIRONMENT",


# how Snakemake's own report names a sweep point
POINT_LABELS = {"cells": "{cells}", "dims": "{dims}", "rigidity": "{rigidity}", "seed": "{seed}"}


wildcard_constraints:
    cells=r"\d+",
    dims=r"\d+",
    rigidity=r"[0-9.e+-]+",
    seed=r"\d+",
    half=r"[12]",


def user_files(section):
    """The files that one section of the config names."""
    return [str(path) for key, path in input_paths(config) if key.startswith(f"{section}.") and path.is_file()]


def input_files():
    """The files, or folders of files, that the config asks to be read, by their keys."""
    found = {}
    for key, path in input_paths(config):
        if key != "image_root":
            found.setdefault(key, []).append(str(path))
    return found


def given(*keys):
    """The top-level paths among ``keys`` that the config gives."""
    return [config[key] for key in keys if config[key] is not None]


def point_of(wildcards):
    """The sweep point of a job."""
    return POINTS[POINT_PATTERN.format(**wildcards)]


def mask_settings(wildcards):
    """The part of ``mesh:`` that makes the mask; the rest must not repeat the preparation."""
    return {key.name: config["mesh"][key.name] for key in fields(MaskSettings)}


def mesh_settings(wildcards):
    """``mesh:`` at one coarseness."""
    return {**config["mesh"], "cells": int(wildcards.cells)}


def train_settings(wildcards):
    """``train:`` at one sweep point, without the number of processes: another must not repeat what is done."""
    point = point_of(wildcards)
    return {
        **{key: value for key, value in config["train"].items() if key != "processes"},
        "latent_dims": point.latent_dims,
        "rigidity": point.rigidity,
        "seed": point.seed,
    }


def without_points(stage):
    """A stage's settings without the choice of points: another choice must not repeat what is done."""
    return {key: value for key, value in config[stage].items() if key != "points"}


# one of these is the best, and shown in the report
CANDIDATES = [point.path for point in wanted_points(list(POINTS.values()), config, "reconstruct")]


def points_of(stage):
    """Paths of the sweep points that reconstruct, validate or interpret is asked for."""
    wanted = config[stage]["points"]
    if wanted == "reconstructed":
        return points_of("reconstruct")
    if wanted == "none":
        return []
    if wanted == "best" and len(CANDIDATES) > 1:  # known once all are trained
        return [ChoiceRecord.read(checkpoints.choose.get().output.best).path]
    if wanted == "best":
        return CANDIDATES
    return [point.path for point in wanted_points(list(POINTS.values()), config, stage)]


def reconstructed(wildcards):
    """What later jobs read of each reconstructed sweep point."""
    folders = [RUN.reconstruct(path) for path in points_of("reconstruct")]
    return [file for folder in folders for file in (folder.resolution, folder.map("flex"), folder.fsc)]


def validated(wildcards):
    """What later jobs read of each validated sweep point."""
    folders = [RUN.validate(path) for path in points_of("validate")]
    return [file for folder in folders for file in (folder.record, folder.cross, folder.fsc)]


def interpreted(wildcards):
    """What later jobs read of each interpreted sweep point."""
    return [RUN.interpret(path).record for path in points_of("interpret")]


def latents_of(wildcards):
    """Where a sweep point's latents have their best standard errors."""
    path = POINT_PATTERN.format(**wildcards)
    return (RUN.validate(path) if path in points_of("validate") else RUN.train(path)).latents


PREPARED = RUN.particles.record


def data_size():
    """The size of the data as known by now."""
    return _data_size(PREPARED.exists())


@cache
def _data_size(is_prepared):
    return estimates.data_size(config, PREPARED)


QUALITIES = {point.cells: RUN.mesh(point.mesh_path).quality for point in POINTS.values()}


def vertices(cells):
    """Vertices of a mesh as known by now."""
    return _vertices(cells, data_size(), QUALITIES[cells].exists())


@cache
def _vertices(cells, size, is_built):
    return estimates.num_vertices(size, cells, QUALITIES[cells])


def mesh_vertices(wildcards):
    """Vertices of a job's mesh as known by now; of the finest, for a job that sees them all."""
    return vertices(int(wildcards.cells)) if "cells" in wildcards.keys() else max(map(vertices, QUALITIES))


@cache
def repeats(stage, latent_dims):
    """What a stage's time is proportional to: epochs, iterations of all maps, maps of the series."""
    if stage in ("train", "train_half"):
        return estimates.AUTO_EPOCHS if config["train"]["epochs"] == "auto" else config["train"]["epochs"]
    if stage == "reconstruct":
        return config["reconstruct"]["max_bfgs_iterations"] * (2 if config["reconstruct"]["rigid_baseline"] else 1)
    if stage == "validate":
        return config["reconstruct"]["max_bfgs_iterations"]
    settings = config["generate"]
    if stage == "interpret":
        return settings["frames"]
    return count_maps(settings["series"], settings["frames"], latent_dims) if stage == "generate" else 1


# asked for every job
memory_mb, runtime_min = cache(estimates.memory_mb), cache(estimates.runtime_min)


def memory(stage, **more):
    """The stage's memory in MiB, half as much again at each further attempt (``retries`` is the profile's)."""

    def needed(wildcards, attempt):
        first = memory_mb(stage, data_size(), mesh_vertices(wildcards), **more)
        return first * (1 + attempt) // 2

    return needed


def runtime(stage):
    """The stage's longest time in minutes, half as much again at each further attempt."""

    def needed(wildcards, attempt, threads):
        dims = int(wildcards.get("dims", 1))
        threads *= TASKS.get(stage, 1)
        first = runtime_min(stage, data_size(), mesh_vertices(wildcards), repeats(stage, dims), dims, threads)
        return min(estimates.LONGEST_MIN, first * (1 + attempt) // 2)

    return needed


def disk(stage):
    """What the stage writes at most, in MiB, as known when the workflow is read.

    A job is refused where there is less room (``workflow/scripts/_common.py``).
    """
    return max(point_disk(stage, *kind) for kind in {(point.cells, point.latent_dims) for point in POINTS.values()})


@cache
def point_disk(stage, cells, latent_dims):
    """What the stage writes for a sweep point, in MiB."""
    has_series = stage in ("generate", "interpret")
    more = {"maps": repeats(stage, latent_dims), "volume": config["generate"]["volume"]} if has_series else {}
    return estimates.disk_mb(stage, data_size(), vertices(cells), **more)


def at_most(stage, missing):
    """How many points reconstruct, validate or interpret has to do of all that are ``missing``; 1 for a list."""
    wanted = config[stage]["points"]
    wanted = config["reconstruct"]["points"] if wanted == "reconstructed" else wanted
    return {"none": 0, "all": missing}.get(str(wanted), 1)


def check_disk():
    """Refuse a run whose results have no room, as far as sizes are known; what exists already is not counted."""
    try:
        needed_mb = 0 if PREPARED.exists() else estimates.disk_mb("prepare", data_size())
        untrained = [point for path, point in POINTS.items() if not RUN.train(path).model.exists()]
        needed_mb += sum(point_disk("train", point.cells, point.latent_dims) for point in untrained)
        missing = [point for path, point in POINTS.items() if not RUN.generate(path).path.exists()]
        needed_mb += sum(point_disk("generate", point.cells, point.latent_dims) for point in missing)
        needed_mb += at_most("reconstruct", len(missing)) * estimates.disk_mb("reconstruct", data_size())
        unvalidated = len([path for path in POINTS if not RUN.validate(path).record.exists()])
        needed_mb += at_most("validate", unvalidated) * (2 * disk("train_half") + disk("validate"))
        uninterpreted = len([path for path in POINTS if not RUN.interpret(path).record.exists()])
        needed_mb += at_most("interpret", uninterpreted) * disk("interpret")
        estimates.check_free_space(RUN.path, needed_mb, f"the results of {len(POINTS)} points")
    except InputError as error:
        sys.exit(f"ERROR {error}")


def check_machine():
    """Refuse, before any job, GPUs that no job could have, and jobs in a Python that has not what they need."""
    if not workflow.deployment_settings.deployment_method and find_spec("torch") is None:
        sys.exit(
            f"ERROR {sys.executable} has no torch, and jobs would run with it: add --sdm conda, which makes them an "
            "environment of their own, or install flexlib here (pip install -e . in its folder)"
        )
    complaints = [gpu_complaint(config["device"], workflow.local_exec, ASKED_FOR, PROCESSES)]
    if not workflow.local_exec:
        complaints += [tasks_complaint(name, GIVEN[name], PROCESSES) for name in USED]
    for complaint in filter(None, complaints):
        sys.exit(f"ERROR {complaint}")


# what is asked of Snakemake beside a run; nothing is executed (or the user said that no lock is to be minded)
QUESTIONS = {
    *("--summary", "-S", "--detailed-summary", "-D", "--dag", "--rulegraph", "--filegraph", "--d3dag", "--report"),
    *("--list-rules", "-l", "--list-target-rules", "--lt", "--list-input-changes", "--list-params-changes", "--lint"),
    *("--unlock", "--nolock"),
}


def check_alone():
    """Refuse to run beside another Snakemake that writes the same files; remove the locks of one that was killed."""
    simulated = [config["particles"]] if config["simulate"] is not None else []
    lives = remove_dead_locks(config["name"], [f"{RUN.path}/", *simulated])
    asks = workflow.output_settings.dryrun or not QUESTIONS.isdisjoint(word.split("=")[0] for word in sys.argv)
    if lives and not asks:
        sys.exit(
            f"ERROR {RUN.path}: another Snakemake is at work on this run, in this folder: wait for its end, or end it"
        )


if workflow.is_main_process:
    check_alone()
    check_disk()
