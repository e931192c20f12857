"""Train on an image stack several times larger than the memory that the process may have.

    python benchmarks/bench_larger_than_memory.py [--limit-GB 1] [--times 4] [--box 128] [--filling 0.01] [--out FILE]

The training runs in a process of its own whose private memory Linux limits (``RLIMIT_DATA``: heap, thread stacks and
all other writable memory that is not shared, used or not; an allocation beyond it fails). Its whole resident set, with
libraries and any mapped file, is reported beside it (``VmHWM``). What the kernel keeps of files that were read belongs
to no process and is given up when memory is wanted. So that address space which is only reserved does not count as
used, the C library is set to keep one heap and Arrow (which pandas uses where it is installed) not to keep its own.

With ``--beyond-warm-up`` the limit is on what comes on top of the peak of a first training, of 2,200 particles, in the
same process: a small limit then shows what a stack takes, whatever Python, torch, numba and a mini-batch take.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np

WARM_UP_PARTICLES = 2200  # enough for mini-batches of full size
ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "ARROW_DEFAULT_MEMORY_POOL": "system", "OPENBLAS_NUM_THREADS": "1"}
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}  # at once, so that a small limit can be kept


def status_bytes(name: str) -> int:
    """A size in this process's /proc/self/status, such as VmData or VmHWM."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])


class _Peak:
    """Watches the largest private memory of this process while in use."""

    def __enter__(self) -> _Peak:
        self.data_bytes = 0
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.data_bytes = max(self.data_bytes, status_bytes("VmData"))

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watcher.join()


def train_within(folder: Path, limit_bytes: int, warm_up: bool) -> dict[str, float]:
    """Train one epoch in this process with its private memory limited; sizes in bytes and seconds."""
    import resource
    import time

    from flexlib.train import run, train
    from flexlib.workflow_support.settings import TrainSettings

    def one_epoch(name: str) -> None:
        settings = TrainSettings(latent_dims=1, epochs=1)
        if warm_up:  # the latents' inference reads the images no other way, and takes most of the time
            settings = replace(settings, latent_init=folder / name / "latents.npy", freeze_latents=True)
        train(folder / name / "particles", folder / "mesh", folder / f"{name}_train", settings, "cpu")

    taken = status_bytes("VmData")
    if warm_up:
        run.tune_process = lambda: None  # it makes the C library keep what is freed, too much for a small limit
        with _Peak() as peak:
            one_epoch("warm")
        taken = peak.data_bytes
    before = {"data_before_bytes": taken, "resident_before_bytes": status_bytes("VmHWM")}
    hard_limit = limit_bytes + (taken if warm_up else 0)
    resource.setrlimit(resource.RLIMIT_DATA, (hard_limit, hard_limit))
    began = time.perf_counter()
    one_epoch("set")
    return before | {
        "limit_bytes": limit_bytes,
        "peak_resident_bytes": status_bytes("VmHWM"),
        "seconds": round(time.perf_counter() - began, 1),
    }


def make_large_set(
    folder: Path, stack_bytes: int, box: int, filling: float, cells: int, distinct: int, warm_up: bool
) -> int:
    """``folder`` with set/particles, mesh/ and latents: particles that fill such a stack. Returns their number."""
    from particle_sets import make_mesh, make_set, repeat_set

    make_set(folder / "simulated", box, filling=filling, distinct=distinct)
    make_mesh(folder / "simulated" / "particles", folder / "mesh", cells)
    count = -(-stack_bytes // (4 * box**2))
    for name, particles in ({"set": count} | ({"warm": WARM_UP_PARTICLES} if warm_up else {})).items():
        repeat_set(folder / "simulated", folder / name, particles)
        latents = np.random.default_rng(0).standard_normal((particles, 1), np.float32)
        np.save(folder / name / "latents.npy", latents)
    return count


def train_larger(
    limit_bytes: int,
    times: float = 4.0,
    box: int = 128,
    filling: float = 0.01,
    cells: int = 10,
    distinct: int = 500,
    warm_up: bool = False,
) -> dict[str, float]:
    """Make the set, train in a process with the limit, and give sizes and time. Raises CalledProcessError if it fails.

    ``times`` the limit is the size of the stack. Arguments as the command's options.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = make_large_set(folder, round(times * limit_bytes), box, filling, cells, distinct, warm_up)
        environment = os.environ | ENVIRONMENT | (RETURN_FREED_MEMORY if warm_up else {})
        command = [sys.executable, __file__, "--child", name, str(limit_bytes), *["--beyond-warm-up"] * warm_up]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        stack_bytes = (folder / "set" / "particles" / "train.mrcs").stat().st_size
        return {"particles": count, "box": box, "stack_bytes": stack_bytes} | json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print a line; write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit-GB", type=float, default=1.0)
    parser.add_argument("--times", type=float, default=4.0, help="size of the stack over the limit")
    parser.add_argument("--box", type=int, default=128)
    parser.add_argument("--filling", type=float, default=0.01, help="share of the box that the mask fills")
    parser.add_argument("--cells", type=int, default=10)
    parser.add_argument("--distinct", type=int, default=500, help="particles that differ")
    parser.add_argument("--beyond-warm-up", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(train_within(Path(options.child[0]), int(options.child[1]), options.beyond_warm_up)))
        return
    result = train_larger(
        round(options.limit_GB * 1e9),
        options.times,
        options.box,
        options.filling,
        options.cells,
        options.distinct,
        options.beyond_warm_up,
    )
    print(
        f"{result['particles']} particles of {result['box']} px, a stack of {result['stack_bytes'] / 1e9:.2f} GB, "
        f"trained within {result['limit_bytes'] / 1e9:.2f} GB: {result['resident_before_bytes'] / 1e9:.2f} GB resident "
        f"before, {result['peak_resident_bytes'] / 1e9:.2f} GB at the peak, {result['seconds']:.0f} s"
    )
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
