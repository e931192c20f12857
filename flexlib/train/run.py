"""A run from its start or checkpoint to its results."""

from __future__ import annotations

import hashlib
import json
import logging
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch

from flexlib.distributed import EXIT_INTERRUPTED, Ranks, launch
from flexlib.errors import InputError
from flexlib.files import atomic_path, reading
from flexlib.layout import MeshFolder, ParticlesFolder, TrainFolder
from flexlib.model.forward import TRAINING, Accuracy
from flexlib.runtime import tune_process
from flexlib.train.confirm_parts import confirm_parts, parts_at_rest
from flexlib.train.describe_parts import describe_parts
from flexlib.train.epoch import run_epoch
from flexlib.train.finish import final_score, infer_all
from flexlib.train.place import place_all
from flexlib.train.results import Scores, write_log, write_model, write_results
from flexlib.train.settle import settle_shape, take_out_mean_pose
from flexlib.train.setup import Setup, set_up
from flexlib.train.start import start_or_resume
from flexlib.train.state import State
from flexlib.workflow_support.settings import TrainSettings

logger = logging.getLogger(__name__)

SLOWED = 0.3  # of all rates, after a divergence
CHECKPOINT_EVERY_S = 600.0  # between the checkpoints at the ends of epochs


class Interrupted(Exception):
    """SIGTERM arrived; the checkpoint is written."""


@dataclass(frozen=True)
class TrainJob:
    """What is trained, and where results go."""

    particles: ParticlesFolder
    mesh: MeshFolder
    out: TrainFolder
    settings: TrainSettings
    discard_other_checkpoint: bool = False  # pass over a checkpoint of another run, with a warning
    batch_size: int | None = None  # rows of a mini-batch; None chooses by their number
    accuracy: Accuracy = TRAINING  # of the projection
    half: int | None = None  # 1 or 2: the half-set that is trained alone


def train(
    particles_dir: str | Path,
    mesh_dir: str | Path,
    out_dir: str | Path,
    settings: TrainSettings,
    device: str = "auto",
    *,
    discard_other_checkpoint: bool = False,
    batch_size: int | None = None,
    half: int | None = None,
) -> None:
    """Train one sweep point and write its results (see docs/architecture.md).

    Resumes from ``out_dir/checkpoints`` when a checkpoint of the same settings, particles and mesh is there. On SIGTERM
    writes a checkpoint and leaves with exit status 75.

    Parameters
    ----------
    particles_dir, mesh_dir
        Folders that prepare and mesh have written.
    out_dir
        Folder to write.
    settings
        ``train:`` with one value of each swept key.
    device
        "auto", "cpu" or "cuda".
    discard_other_checkpoint
        For callers that know when a result is out of date: a checkpoint of another run is passed over with a warning,
        where it is refused otherwise.
    batch_size
        Rows of a mini-batch; None chooses by their number.
    half
        1 or 2: train on this half-set as if there were no other particles, from scratch, and place the others in the
        model at the end. Results are those of all particles, with ``cross.csv``: how well it predicts the others.

    Raises
    ------
    InputError
        Settings or files do not fit.
    """
    if half is not None:
        settings = from_scratch(settings)
    job = TrainJob(
        particles=ParticlesFolder(Path(particles_dir)),
        mesh=MeshFolder(Path(mesh_dir)),
        out=TrainFolder(Path(out_dir)),
        settings=settings,
        discard_other_checkpoint=discard_other_checkpoint,
        batch_size=batch_size,
        half=half,
    )
    launch(train_rank, (job,), settings.processes, device)


def train_rank(ranks: Ranks, device: str, job: TrainJob) -> None:
    """One rank's part of ``train``. All ranks read; only the first writes."""
    tune_process()
    began = time.perf_counter()
    setup = set_up(
        job.particles,
        job.mesh,
        job.settings,
        device,
        ranks,
        batch_size=job.batch_size,
        accuracy=job.accuracy,
        half=job.half,
    )
    identity = run_identity(job.particles, job.mesh, job.settings, job.half)
    state = start_or_resume(setup, job.out.checkpoint, identity, job.discard_other_checkpoint)
    clock = _Clock(began, state.wall_s)
    state = _run_epochs(setup, state, job.out, identity, clock)
    evidence = confirm_parts(setup, state)
    found = infer_all(setup, state)
    score, rejected = final_score(setup, state)
    if rejected is None:
        settle_shape(setup, state)
    else:
        evidence += parts_at_rest(setup, state)
    if state.rigid_views.refines_poses:
        take_out_mean_pose(setup, state.rigid_views, state.latents[:, :0], state.all_particles())
    cross = None
    if job.half is not None:
        setup, state, found, cross = place_all(setup, state, found)
    parts = describe_parts(setup, state, evidence)
    if ranks.leads:
        state.wall_s = clock.wall_s()
        write_results(job.out, setup, state, found, Scores(score, rejected, cross), parts)


@dataclass(frozen=True)
class _Clock:
    began: float
    before_s: float  # that earlier processes have spent on this run

    def wall_s(self) -> float:
        return self.before_s + time.perf_counter() - self.began


def _run_epochs(setup: Setup, state: State, out: TrainFolder, identity: dict[str, str], clock: _Clock) -> State:
    """The epochs that are still to be done, with a checkpoint now and then.

    A training that diverges goes back to the last checkpoint, once, and on at lower rates.
    """
    stop, written = _StopFlag(), time.perf_counter()

    def save() -> None:
        nonlocal written
        if not setup.ranks.leads or (state.totals is not None and not bool(state.totals.isfinite().all())):
            return
        written = time.perf_counter()
        state.wall_s = clock.wall_s()
        with atomic_path(out.checkpoint) as temporary, temporary.open("wb") as file:
            torch.save({"identity": identity, **state.checkpoint()}, file)

    def after_batch() -> None:
        if setup.ranks.any(stop.raised):
            raise Interrupted
        if time.perf_counter() - written > CHECKPOINT_EVERY_S:
            save()

    with stop:
        if not out.checkpoint.exists():
            save()
        while state.epoch < setup.schedule.planned_epochs(state.anneal_from):
            try:
                run_epoch(setup, state, after_batch)
            except Interrupted:
                save()
                logger.error("SIGTERM: checkpoint written in epoch %d; run again to continue", state.epoch + 1)
                sys.exit(EXIT_INTERRUPTED)
            except FloatingPointError as error:
                state = _gone_back(setup, state, (out, identity), error)
                continue
            save()
            if setup.ranks.leads:
                write_log(out.log, state.log)
                write_model(out.checkpoint_model, setup, state)
    return state


def _gone_back(
    setup: Setup, diverged: State, run: tuple[TrainFolder, dict[str, str]], error: FloatingPointError
) -> State:
    """The last checkpoint, to go on from at lower rates. Raises InputError where that has been tried."""
    out, identity = run
    if diverged.slowed < 1 or setup.ranks.size > 1:  # other processes may not know that this one has diverged
        again = "again, at lower rates" if diverged.slowed < 1 else "in one of several processes"
        raise InputError(
            f"{out.path}: training diverged {again}, in epoch {diverged.epoch + 1} ({error}): look at what prepare "
            "says of the images, and try a coarser mesh, fewer latent_dims or a higher rigidity"
        ) from error
    logger.warning(
        "training diverged in epoch %d (%s): going back to the last checkpoint, and on at %g of the rates",
        diverged.epoch + 1, error, SLOWED,
    )  # fmt: skip
    state = start_or_resume(setup, out.checkpoint, identity, discard_other=False)
    state.slowed = SLOWED
    return state


def from_scratch(settings: TrainSettings) -> TrainSettings:
    """The settings of a half-set's training: nothing of another model, which may have seen the other half-set.

    Raises InputError where the latents are to stay as they are given.
    """
    if settings.freeze_latents:
        raise InputError("train.freeze_latents: latents that are given have seen both half-sets: validate: none")
    return replace(settings, init_from=None, latent_init="spectral")


def run_identity(
    particles: ParticlesFolder, mesh: MeshFolder, settings: TrainSettings, half: int | None = None
) -> dict[str, str]:
    """What a checkpoint must share with this run: settings, but for what changes no result, and the input files."""
    files = [particles.particles, particles.record, mesh.mesh, mesh.segments]
    return {
        **({} if half is None else {"half-set": str(half)}),
        "settings": json.dumps(
            {k: v for k, v in asdict(settings).items() if k != "processes"}, sort_keys=True, default=str
        ),
        **{path.name: _sha256(path) for path in files if path.exists()},
    }


def _sha256(path: Path) -> str:
    with reading(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()


class _StopFlag:
    """Set by SIGTERM while in use; the handler that was there comes back after."""

    def __init__(self) -> None:
        self.raised = False
        self._previous: Any = None

    def __enter__(self) -> _StopFlag:
        def on_signal(number: int, frame: FrameType | None) -> None:
            self.raised = True

        try:
            self._previous = signal.signal(signal.SIGTERM, on_signal)
        except ValueError:  # not in the main thread: nobody can interrupt us there
            self._previous = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
