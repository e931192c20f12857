"""A run from its start or checkpoint to its results."""

from __future__ import annotations

import hashlib
import json
import logging
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from flexlib.distributed import EXIT_INTERRUPTED, Group, launch
from flexlib.files import atomic_path
from flexlib.model.flex_model import MODEL_FILE
from flexlib.runtime import tune_process
from flexlib.train.epoch import finished, run_epoch
from flexlib.train.finish import final_score, infer_all, settle_shape
from flexlib.train.results import write_log, write_model, write_results
from flexlib.train.start import start_or_resume
from flexlib.train.state import set_up
from flexlib.workflow_support.settings import TrainSettings

logger = logging.getLogger(__name__)

CHECKPOINT_EVERY_S = 600.0  # between the checkpoints at the ends of epochs
CHECKPOINT = "checkpoint.pt"


class Interrupted(Exception):
    """SIGTERM arrived; the checkpoint is written."""


def train(
    particles_dir: str | Path,
    mesh_dir: str | Path,
    out_dir: str | Path,
    settings: TrainSettings,
    device: str = "auto",
    *,
    discard_other_checkpoint: bool = False,
) -> None:
    """Train one point of the sweep and write its results (see docs/architecture.md).

    Resumes from ``out_dir/checkpoints`` when a checkpoint of the same settings, particles and mesh is there. One of
    another run is refused, or with ``discard_other_checkpoint`` (for callers that know when a result is out of date)
    passed over with a warning. On SIGTERM writes a checkpoint and leaves with exit status 75. Raises InputError for
    settings or files that don't fit.
    """
    folders = (Path(particles_dir), Path(mesh_dir), Path(out_dir))
    launch(_train, (*folders, settings, discard_other_checkpoint), settings.processes, device)


def _train(
    group: Group,
    device: str,
    particles_dir: Path,
    mesh_dir: Path,
    out_dir: Path,
    settings: TrainSettings,
    discard_other_checkpoint: bool,
) -> None:
    """One rank's part of ``train``. All ranks read; only the first writes."""
    tune_process()
    began = time.perf_counter()
    setup = set_up(particles_dir, mesh_dir, settings, device, group)
    identity = _identity(particles_dir, mesh_dir, settings)
    checkpoint = out_dir / "checkpoints" / CHECKPOINT
    state = start_or_resume(setup, checkpoint, identity, discard_other_checkpoint)
    resumed_s = state.wall_s
    stop = _StopFlag()

    written = time.perf_counter()

    def save() -> None:
        nonlocal written
        if not group.leads:
            return
        written = time.perf_counter()
        state.wall_s = resumed_s + time.perf_counter() - began
        with atomic_path(checkpoint) as temporary:
            torch.save({"identity": identity, **state.checkpoint()}, temporary)

    def after_batch() -> None:
        if group.any(stop.raised):
            raise Interrupted
        if time.perf_counter() - written > CHECKPOINT_EVERY_S:
            save()

    with stop:
        while not finished(setup, state):
            try:
                run_epoch(setup, state, after_batch)
            except Interrupted:
                save()
                logger.warning("SIGTERM: checkpoint written in epoch %d; run again to continue", state.epoch + 1)
                sys.exit(EXIT_INTERRUPTED)
            save()
            if group.leads:
                write_log(out_dir / "log.csv", state.log)
                write_model(out_dir / "checkpoints" / MODEL_FILE, setup, state)
    precision = infer_all(setup, state)
    score, rejected = final_score(setup, state)
    if rejected is None:
        settle_shape(setup, state)
    if group.leads:
        state.wall_s = resumed_s + time.perf_counter() - began
        write_results(particles_dir, out_dir, setup, state, precision, score, rejected)


def _identity(particles_dir: Path, mesh_dir: Path, settings: TrainSettings) -> dict[str, str]:
    """What a checkpoint must share with this run: settings, but for what changes no result, and the input files."""
    files = [particles_dir / "particles.star", particles_dir / "prepared.json", mesh_dir / "mesh.vtu"]
    return {
        "settings": json.dumps(
            {k: v for k, v in asdict(settings).items() if k != "processes"}, sort_keys=True, default=str
        ),
        **{path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.exists()},
    }


class _StopFlag:
    """Set by SIGTERM while in use; the handler that was there comes back after."""

    def __init__(self) -> None:
        self.raised = False
        self._previous: Any = None

    def __enter__(self) -> _StopFlag:
        def on_signal(number, frame):
            self.raised = True

        try:
            self._previous = signal.signal(signal.SIGTERM, on_signal)
        except ValueError:  # not in the main thread: nobody can interrupt us there
            self._previous = None
        return self

    def __exit__(self, *exc) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
