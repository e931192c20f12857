"""Several processes that share one run's particles: one on each GPU, or on parts of a CPU's cores.

Every process (a *rank*) holds the whole model and works on its share of the particles; what is summed over particles
is added up over the ranks, so that all go on with the same numbers. ``Ranks`` is what the rest of the code sees of
this: with one process, ``ALONE``, its methods return what they are given.

``launch`` starts the ranks on this machine as Python processes of their own and watches over them. Where srun or
torchrun has started it beside others, perhaps on other machines, each of them starts one rank (``rendezvous``). Ranks
are not started by ``torch.multiprocessing.spawn``, which was considered: it runs the caller's main script again in
each, and Snakemake's scripts do their work as they are read. A rank that fails ends all, with its message; SIGTERM is
handed on to all; ranks whose launcher dies end by themselves, so that no half-dead run goes on writing.
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from flexlib.errors import InputError
from flexlib.rendezvous import Meeting, OneMachine
from flexlib.runtime import resolve_device
from flexlib.workflow_support.places import Place, place_of

logger = logging.getLogger(__name__)

Sliceable = TypeVar("Sliceable", bound=Any)
Made = TypeVar("Made")

EXIT_INTERRUPTED = 75  # temporary failure (sysexits.h): run again and it continues
TIMEOUT = timedelta(minutes=30)  # of one exchange; a rank that is dead is noticed at once, by its launcher
_GRACE_S = 5.0  # that ranks have to clean up when another has failed


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run, seen from one of them. All must call the same methods in the same order."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes files and logs."""
        return self.rank == 0

    def part(self, num: int) -> slice:
        """Which of ``num`` items are this rank's: consecutive, and as many as any other's, or one less."""
        return slice(self.rank * num // self.size, (self.rank + 1) * num // self.size)

    def share(self, items: Sliceable) -> Sliceable:
        """The rank's part of an array, tensor or list."""
        return items[self.part(len(items))]

    def add(self, *tensors: torch.Tensor) -> None:
        """Replace each tensor by its sum over the ranks; all travel in one message."""
        if self.size == 1 or not any(tensor.numel() for tensor in tensors):
            return
        if len(tensors) == 1 and tensors[0].is_contiguous():
            dist.all_reduce(tensors[0].detach())
            return
        kind = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
        message = torch.cat([t.detach().reshape(-1).to(kind) for t in tensors])
        dist.all_reduce(message)
        with torch.no_grad():
            for tensor, total in zip(tensors, message.split([t.numel() for t in tensors]), strict=True):
                tensor.copy_(total.view(tensor.shape))

    def embed(self, rows: torch.Tensor, num: int) -> torch.Tensor:
        """(num, ...) with this rank's ``rows`` where they belong and zeros elsewhere: ``add`` makes it whole."""
        if self.size == 1:
            return rows
        whole = rows.new_zeros((num, *rows.shape[1:]))
        whole[self.part(num)] = rows
        return whole

    def gather(self, rows: torch.Tensor, num: int) -> torch.Tensor:
        """(num, ...) rows of all ranks, from each rank's own part of them."""
        whole = self.embed(rows, num)
        self.add(whole)
        return whole

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any rank. Exchanged by the hosts: no GPU is waited for."""
        if self.size == 1:
            return flag
        raised = torch.tensor([int(flag)])
        dist.all_reduce(raised)
        return bool(raised.item())

    def from_first(self, make: Callable[[], Made]) -> Made:
        """What ``make`` gives on rank 0, on all ranks; the others wait meanwhile. Tensors must be on the CPU."""
        if self.size == 1:
            return make()
        box = [make() if self.leads else None]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]  # type: ignore[return-value]

    def follow_first(self, *tensors: torch.Tensor) -> None:
        """Replace each tensor by rank 0's."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)


ALONE = Ranks()


def check_processes(processes: int, device: str, place: Place | None = None) -> str:
    """The kind of device that the ranks compute on, "cuda" or "cpu".

    Parameters
    ----------
    processes : int
        Number of ranks.
    device : str
        As ``resolve_device`` takes it.
    place : Place, optional
        Where they are not all started here.

    Raises
    ------
    InputError
        There are fewer GPUs than processes, or none where one is asked for.
    """
    kind = resolve_device(device).type
    gpus = torch.cuda.device_count()
    if place is not None:
        if kind == "cuda" and place.local_rank >= gpus > 1:
            number = place.local_rank + 1
            raise InputError(f"this is process {number} of its machine and needs its GPU {number}; torch sees {gpus}")
    elif kind == "cuda" and processes > gpus:
        raise InputError(
            f"train.processes: {processes} processes need as many GPUs, and torch sees {gpus} here: ask for more "
            "(resources: gpu), lower train.processes, or set device: cpu"
        )
    return kind


def launch(work: Callable[..., None], arguments: Sequence[Any], processes: int = 1, device: str = "auto") -> None:
    """Call ``work(ranks, device, *arguments)`` in each of ``processes`` ranks.

    With one, it is called here. Else the ranks are processes of this machine; each gets its part of this process'
    threads and its own GPU, if any. What rank 0 logs is logged here. Where this process is itself one of as many that
    srun or torchrun has started (``places.place_of``), it starts its own rank, which gets all its threads.

    Parameters
    ----------
    work : callable
        A function at the top of an importable module.
    arguments : sequence
        They can be pickled.
    processes : int
        At least 1.
    device : str
        As ``resolve_device`` takes it.

    Raises
    ------
    InputError
        Raised by a rank; or there are fewer GPUs than processes, or those on several machines do not find each other.
    RuntimeError
        A rank failed otherwise; the message has its traceback.
    SystemExit
        After SIGTERM: with status 75 where the ranks left with it, as they can be continued; else with 143. With 1
        where a rank failed and the first of several processes that were not started here raises its error.
    """
    place = place_of(os.environ, processes)
    kind = check_processes(processes, device, place)
    if processes == 1:
        work(ALONE, device, *arguments)
        return
    with tempfile.TemporaryDirectory(prefix="flexlib-ranks-") as folder:
        meeting = Meeting(place, kind) if place is not None else OneMachine(processes, folder)
        threads = max(1, torch.get_num_threads() // len(meeting.ranks))
        if 0 in meeting.ranks:
            logger.info("%d processes of %d threads each, on %s%s", processes, threads, kind, meeting.describe())
        ranks: list[_Rank] = []
        try:
            for rank in meeting.ranks:
                order = (work, (Ranks(rank, processes), kind, *arguments), meeting.address, threads)
                ranks.append(_start_rank(rank, meeting, kind, order))
            _watch(ranks, meeting)
        finally:
            _end(ranks, 0.0)
            meeting.close()


@dataclass(frozen=True)
class _Failure:
    time_s: float  # of the clock that all processes of a machine share
    error: InputError | None
    traceback: str


@dataclass
class _Rank:
    name: str  # "process 2 of 4"
    process: subprocess.Popen
    connection: Connection  # it sends ("log", record), and ("failed", ...) with what a _Failure holds
    failure: _Failure | None = None


def _start_rank(rank: int, meeting: OneMachine | Meeting, device: str, order: tuple) -> _Rank:
    ours, theirs = Pipe()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    if meeting.interface:
        environment.setdefault("GLOO_SOCKET_IFNAME", meeting.interface)
    if device.startswith("cuda"):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
        environment["CUDA_VISIBLE_DEVICES"] = gpus[meeting.gpu(rank, len(gpus))]
    program = f"from flexlib.distributed import run_rank; run_rank({theirs.fileno()})"
    process = subprocess.Popen([sys.executable, "-c", program], pass_fds=[theirs.fileno()], env=environment)
    theirs.close()
    with suppress(BrokenPipeError):  # it is dead already; its exit status says how
        ours.send((*order, logging.getLogger().getEffectiveLevel()))
    return _Rank(f"process {rank + 1} of {meeting.size}", process, ours)


def _watch(ranks: list[_Rank], meeting: OneMachine | Meeting) -> None:
    """Wait for all ranks; raises what ``launch`` raises."""
    with _hand_on_sigterm(ranks) as handed_on:
        running: dict[Any, _Rank] = {rank.connection: rank for rank in ranks}
        elsewhere = None
        while running and not elsewhere and not any(_has_failed(rank) for rank in ranks):
            for ready in wait(list(running), meeting.poll_s):
                if not _receive(running[ready]):
                    running.pop(ready).process.wait()
            elsewhere = meeting.failure()
        failed = [rank for rank in ranks if _has_failed(rank)]
        if failed:
            _end(ranks, _GRACE_S)
            elsewhere = elsewhere or meeting.settle(_cause(failed))
        elsewhere = elsewhere or meeting.end()
    if failed and handed_on:  # it came where nothing waits for it, and ended the ranks: so it does here
        sys.exit(128 + signal.SIGTERM)
    if elsewhere:
        raise elsewhere
    if any(rank.process.returncode == EXIT_INTERRUPTED for rank in ranks):
        sys.exit(EXIT_INTERRUPTED)


@contextmanager
def _hand_on_sigterm(ranks: list[_Rank]) -> Iterator[list[int]]:
    """Hand SIGTERM on to all ranks while in use; gives the list of the signals that came."""
    handed_on: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        handed_on.append(number)
        for rank in ranks:
            rank.process.send_signal(number)

    if threading.current_thread() is not threading.main_thread():  # Python lets no other thread handle signals
        yield handed_on
        return
    previous = signal.signal(signal.SIGTERM, hand_on)
    try:
        yield handed_on
    finally:
        signal.signal(signal.SIGTERM, previous)


def _has_failed(rank: _Rank) -> bool:
    return rank.failure is not None or rank.process.returncode not in (None, 0, EXIT_INTERRUPTED)


def _receive(rank: _Rank) -> bool:
    """Take one message of a rank; False where it has ended."""
    try:
        kind, *content = rank.connection.recv()
    except (EOFError, ConnectionError):
        return False
    if kind == "log":
        record = content[0]
        logging.getLogger(record.name).handle(record)
    else:
        rank.failure = _Failure(*content)
    return True


def _end(ranks: list[_Rank], grace_s: float) -> None:
    """See that every rank ends. Those that have lost another do so by themselves, given the time to clean up."""
    until = time.monotonic() + grace_s
    for rank in ranks:
        if rank.connection.closed:
            continue
        while time.monotonic() < until and (not rank.connection.poll(0.1) or _receive(rank)):
            pass
        rank.process.kill()
        rank.process.wait()
        rank.connection.close()


def _cause(failed: list[_Rank]) -> Exception:
    """What ended the run: a rank that died without a word, else the first error; later ones follow from it."""
    for rank in failed:
        code = rank.process.returncode
        if rank.failure is None and code is not None:
            how = f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"
            hint = " (is memory short?)" if code == -signal.SIGKILL else ""
            return RuntimeError(f"{rank.name} {how}{hint}")
    failures = [(rank.name, rank.failure) for rank in failed if rank.failure is not None]
    name, failure = min(failures, key=lambda pair: pair[1].time_s)
    return failure.error or RuntimeError(f"{name} failed:\n{failure.traceback}")


class _ToLauncher(logging.handlers.QueueHandler):
    """Sends log records to the launcher."""

    def enqueue(self, record: logging.LogRecord) -> None:
        self.queue.send(("log", record))  # type: ignore[attr-defined]


def run_rank(descriptor: int) -> None:
    """What the process of a rank does; ``descriptor`` is its end of the pipe to the launcher."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher gets it too, and ends us
    connection = Connection(descriptor)
    work, arguments, address, threads, level = connection.recv()
    ranks, device = arguments[:2]
    threading.Thread(target=_end_with_launcher, args=(connection,), daemon=True).start()
    handler = _ToLauncher(connection)  # type: ignore[arg-type]
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(level if ranks.leads else logging.ERROR)
    logging.captureWarnings(True)
    torch.set_num_threads(threads)
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    try:
        store = address.open()
        dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.size, timeout=TIMEOUT)
        work(*arguments)
        if ranks.leads:
            store.set("done", "")
        else:  # nobody leaves while the first still writes, however long that takes
            store.wait(["done"], timedelta(days=30))
    except Exception as error:
        if isinstance(error, OSError) and (error.filename or error.strerror):
            named = f"{error.filename}: " if error.filename else ""
            error = InputError(f"{named}{error.strerror}")
        known = error if isinstance(error, InputError) else None
        with handler.lock:  # type: ignore[union-attr]
            connection.send(("failed", time.monotonic(), known, traceback.format_exc()))
        os._exit(1)  # without the peers, an orderly end could wait for ever
    dist.destroy_process_group()


def _end_with_launcher(connection: Connection) -> None:
    try:
        connection.recv()
    except (EOFError, ConnectionError):
        os._exit(1)
