"""A small simulated run, stage by stage, without Snakemake: what is run, disturbed and compared."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS")
POINT = "cells~6/dims~2/rigidity~2.0/seed~0"
SWEEP_POINT = {"cells": 6, "latent_dims": 2, "rigidity": 2.0, "seed": 0}
RESULTS = Path("results/tiny")
SIM, PARTICLES, MESH = Path("sim"), RESULTS / "particles", RESULTS / "mesh/cells~6"
TRAIN, GENERATE, RECONSTRUCT, INTERPRET = (
    RESULTS / stage / POINT for stage in ("train", "generate", "reconstruct", "interpret")
)
CONFIG: dict[str, Any] = {
    "name": "tiny",
    "particles": "sim/particles.star",
    "consensus": "sim/consensus.mrc",
    "simulate": {"num_particles": 200, "box": 32, "pixel_size_A": 8.0, "snr": 1.0},
    "prepare": {"train_box": 32},
    "mesh": {"cells": 6},
    "train": {"epochs": 2, "validation_fraction": 0.25, "latent_dims": 2, "rigidity": 2.0},
    "generate": {"frames": 3},
    "reconstruct": {"max_bfgs_iterations": 3},
    "validate": "none",
}


def jobs(config: dict[str, Any] = CONFIG, threads: int = 1) -> dict[str, dict[str, Any]]:
    """Each stage as its script sees it, in the order of the run."""
    from flexlib.workflow_support.checks import check_config

    whole = json.loads(json.dumps(check_config({**config, "device": "cpu", "checksums": "all"}), default=str))
    mesh_settings = {**whole["mesh"], "cells": 6}
    train_settings = {key: value for key, value in whole["train"].items() if key != "processes"}
    train_settings |= {"latent_dims": 2, "rigidity": 2.0, "seed": 0}
    reconstruct_settings, interpret_settings = (
        {key: value for key, value in whole[stage].items() if key != "points"} for stage in ("reconstruct", "interpret")
    )
    user = {"particles": str(SIM / "particles.star"), "consensus": str(SIM / "consensus.mrc")}
    inputs: dict[str, list[str]] = {key: [path] for key, path in user.items()}
    found: dict[str, dict[str, Any]] = {
        "simulate": {
            "output": {**user, "truth": str(SIM / "truth.npz")},
            "params": {"settings": whole["simulate"]},
        },
        "prepare": {
            "input": {**user, "mask": [], "passthrough": []},
            "output": {"particles": str(PARTICLES / "particles.star")},
            "params": {"settings": whole["prepare"], "mask_settings": mask_settings(whole), "image_root": None},
        },
        "mesh": {
            "input": {"consensus": str(PARTICLES / "consensus.mrc")},
            "output": {"mesh": str(MESH / "mesh.vtu")},
            "params": {"settings": mesh_settings},
        },
        "train": {
            "input": {"particles": str(PARTICLES / "particles.star"), "mesh": str(MESH / "mesh.vtu")},
            "output": {"model": str(TRAIN / "model.pt")},
            "params": {"settings": train_settings},
        },
        "generate": {
            "input": {"model": str(TRAIN / "model.pt"), "particles": str(PARTICLES / "particles.star")},
            "output": {"series": str(GENERATE)},
            "params": {"settings": whole["generate"]},
        },
        "reconstruct": {
            "input": {"particles": str(PARTICLES / "particles.star"), "model": str(TRAIN / "model.pt")},
            "output": {"fsc": str(RECONSTRUCT / "fsc.csv")},
            "params": {"settings": reconstruct_settings},
        },
        "interpret": {
            "input": {
                "particles": str(PARTICLES / "particles.star"),
                "model": str(TRAIN / "model.pt"),
                "latents": str(TRAIN / "latents.star"),
            },
            "output": {"record": str(INTERPRET / "interpretation.json")},
            "params": {"settings": interpret_settings, "generate": whole["generate"]},
        },
        "choose": {
            "input": {"records": [str(TRAIN / "validation.json")]},
            "output": {"best": str(RESULTS / "best_point.json")},
            "params": {"points": [SWEEP_POINT], "choose_by": "held_out"},
        },
        "summarise": {
            "input": {"reconstructed": [str(RECONSTRUCT / "resolution.json")], "validated": []},
            "output": {"table": str(RESULTS / "sweep.csv")},
            "params": {"points": [SWEEP_POINT], "choose_by": "held_out"},
        },
        "checksum": {
            "output": {"checksums": str(RESULTS / "checksums.json")},
            "params": {"inputs": inputs, "image_root": None, "checksums": "all"},
        },
        "report": {
            "input": {"truth": str(SIM / "truth.npz")},
            "output": {"page": str(RESULTS / "report.html")},
            "params": {"config": {key: value for key, value in whole.items() if key != "checksums"}},
        },
        "provenance": {
            "output": {"crate": str(RESULTS / "ro-crate-metadata.json")},
            "params": {"config": whole},
        },
    }
    more = {"config": whole, "threads": threads}
    return {rule: {"rule": rule, "log": f"logs/{rule}.log", **job, **more} for rule, job in found.items()}


def mask_settings(config: dict[str, Any]) -> dict[str, Any]:
    """What of ``mesh:`` makes the mask."""
    from dataclasses import fields

    from flexlib.workflow_support.settings import MaskSettings

    return {key.name: config["mesh"][key.name] for key in fields(MaskSettings)}


# what each stage writes into; a file or a whole folder
OUTPUTS = {
    "simulate": [SIM],
    "prepare": [PARTICLES],
    "mesh": [MESH],
    "train": [TRAIN],
    "generate": [GENERATE],
    "reconstruct": [RECONSTRUCT],
    "interpret": [INTERPRET],
    "choose": [RESULTS / "best_point.json"],
    "summarise": [RESULTS / "sweep.csv"],
    "checksum": [RESULTS / "checksums.json"],
    "report": [RESULTS / "report.html", RESULTS / "summary.png", RESULTS / "chimerax.cxc"],
    "provenance": [RESULTS / "ro-crate-metadata.json", RESULTS / "config.yaml"],
}


@dataclass
class Ended:
    """How a job ended."""

    status: int
    said: str  # on standard error

    @property
    def errors(self) -> list[str]:
        """Its lines of level ERROR."""
        return [line for line in self.said.splitlines() if re.match(r"\d\d:\d\d:\d\d ERROR ", line)]


@dataclass
class Runner:
    """A ``stage_runner.py`` at work: the same folder, job after job."""

    folder: Path
    prefix: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    def __enter__(self) -> Runner:
        command = [*self.prefix, sys.executable, str(Path(__file__).with_name("stage_runner.py"))]
        threads = dict.fromkeys(THREADS, "1")
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **threads, **self.environment},
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"
        descriptor, name = tempfile.mkstemp()  # of the job's console, not on its disk
        os.close(descriptor)
        self.said = Path(name)
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        with self.process:  # which closes its pipes and waits
            self.process.stdin.close()
        self.said.unlink()

    def start(self, job: dict[str, Any], **fault: Any) -> None:
        """Start a job, with a fault or without."""
        assert self.process.stdin is not None
        request = {"folder": str(self.folder), "job": job, "stdout": os.devnull, "stderr": str(self.said)}
        self.process.stdin.write(json.dumps(request | ({"fault": fault} if fault else {})) + "\n")
        self.process.stdin.flush()

    def end(self) -> Ended:
        """Wait for the job's end."""
        assert self.process.stdout is not None
        status = int(self.process.stdout.readline())
        return Ended(status, self.said.read_text(errors="replace"))

    def run(self, job: dict[str, Any], **fault: Any) -> Ended:
        """Run a job to its end."""
        self.start(job, **fault)
        return self.end()


STAR, STACK, CONSENSUS = (str(SIM / name) for name in ("particles.star", "particles.mrcs", "consensus.mrc"))
# what each stage reads and cannot do without
INPUTS = {
    "prepare": [STAR, STACK, CONSENSUS],
    "mesh": [str(PARTICLES / name) for name in ("consensus.mrc", "mask.mrc")],
    "train": [
        *(str(PARTICLES / name) for name in ("particles.star", "train.mrcs", "consensus.mrc", "mask.mrc")),
        *(str(PARTICLES / name) for name in ("noise.csv", "prepared.json")),
        *(str(MESH / name) for name in ("mesh.vtu", "segments.mrc")),
        STAR,
    ],
    "generate": [str(TRAIN / "model.pt")],
    "reconstruct": [
        *(str(PARTICLES / name) for name in ("particles.star", "noise.csv", "prepared.json", "full/mask.mrc")),
        str(TRAIN / "model.pt"),
        STACK,
    ],
    "interpret": [*(str(TRAIN / name) for name in ("model.pt", "latents.star")), str(PARTICLES / "particles.star")],
    "choose": [str(TRAIN / "validation.json"), str(TRAIN / "held_out.csv")],
    "summarise": [
        *(str(TRAIN / name) for name in ("validation.json", "held_out.csv")),
        str(RECONSTRUCT / "resolution.json"),
    ],
    "checksum": [STAR, STACK, CONSENSUS],
    "report": [str(TRAIN / "validation.json"), str(RESULTS / "sweep.csv")],
    "provenance": [str(RESULTS / "checksums.json"), str(TRAIN / "validation.json")],
}


def files_of(folder: Path, stage: str) -> dict[str, Path]:
    """What a stage has written below ``folder``, by relative name; without temporary files and checkpoints."""
    found = {}
    for output in OUTPUTS[stage]:
        paths = (folder / output).rglob("*") if (folder / output).is_dir() else [folder / output]
        for path in paths:
            if path.is_file() and ".part" not in path.name and path.parent.name != "checkpoints":
                found[str(path.relative_to(folder))] = path
    return found


def remove_outputs(folder: Path, stage: str) -> None:
    """Remove what a stage has written."""
    for output in OUTPUTS[stage]:
        if (folder / output).is_dir():
            shutil.rmtree(folder / output)
        else:
            (folder / output).unlink(missing_ok=True)


def content(path: Path) -> Any:
    """What a file says, but for the time that it took and when that was."""
    if path.name in ("validation.json", "interpretation.json"):
        return {key: value for key, value in json.loads(path.read_text()).items() if key != "wall_s"}
    if path.name in ("sweep.csv", "log.csv"):  # seconds are last
        return re.sub(r"(?m)[^,\n]*$", "", path.read_text())
    if path.name == "ro-crate-metadata.json":  # which has sizes and checksums of files that hold times
        return sorted(entity["@id"] for entity in json.loads(path.read_text())["@graph"])
    if path.suffix == ".pt":
        return flat(torch.load(path, weights_only=True))
    if path.suffix in (".html", ".json"):
        return re.sub(r"\d{4}-\d\d-\d\d[T ]\d\d:[\d:.+]*\d", "", path.read_text())
    return path.read_bytes()


def flat(value: Any) -> Any:
    """Nested values with tensors as bytes, so that they can be compared."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: flat(item) for key, item in value.items() if key != "wall_s"}
    if isinstance(value, (list, tuple)):
        return [flat(item) for item in value]
    return value
