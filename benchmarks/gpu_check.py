"""What a GPU has to show, step by step: see gpu_check.sh, which starts this.

Steps, each a process of its own with a time limit, so that one that fails takes nothing from the others:

- ``data``: the set of the trainings, a few hundred simulated particles that repeat.
- ``tests``: tests/gpu.
- ``operator``: forward and adjoint at box 128 (and 256), every kernel and tile (``bench_operator.py``).
- ``training_20``, ``training_40``: start, epochs and final inference of 100,000 x 128^2 with 300,000 voxels and 20 or
  40 cells; what the device does meanwhile, and the share of it that the operator has.
- ``reconstruction_256``, ``reconstruction_384``: an image and iteration, and 50,000 images by proportion
  (``bench_reconstruct.py``).

Peak memory of the device and of the process is with each.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Sizes:
    """How much of each step is done."""

    boxes: tuple[int, ...]
    train_box: int
    particles: int
    distinct: int
    profiled: int  # mini-batches
    reconstructions: tuple[int, ...]
    part: int  # images of a half-set gone through


FULL = Sizes((128, 256), 128, 100_000, 200, 30, (256, 384), 2000)
QUICK = Sizes((32,), 32, 200, 100, 3, (32, 48), 20)
CELLS = (20, 40)
SCRATCH = Path(tempfile.gettempdir()) / "flexlib-gpu-check"
LIMITS_S = {"data": 90, "tests": 70, "operator": 80, "training_20": 130, "training_40": 110}  # all: ten minutes
LIMIT_S = 55  # of any other
OPERATOR_KERNELS = ("splat", "adjoint", "gather")  # in the names of the operator's own kernels


def run_tests(device: str, sizes: Sizes, out: Path) -> dict[str, Any]:
    """The tests for a CUDA device; on a CPU those of the same kernels, interpreted."""
    where = ["tests/gpu", "--gpu"] if device == "cuda" else ["tests/test_triton.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5", *where]
    done = subprocess.run(command, cwd=HERE.parent)
    return {"green": done.returncode == 0}


def time_operator(device: str, sizes: Sizes, out: Path) -> dict[str, Any]:
    """See ``bench_operator.py``."""
    from bench_operator import time_on_cpu, time_on_gpu, tune_on_gpu

    if device == "cuda":
        return time_on_gpu(sizes.boxes) | {"tiles": tune_on_gpu(sizes.boxes[0])}
    return time_on_cpu(sizes.boxes, [1], images=16)


def make_data(device: str, sizes: Sizes, out: Path) -> dict[str, Any]:
    """The set and the meshes of the trainings, in ``SCRATCH``."""
    from particle_sets import make_mesh, make_set, repeat_set

    clock = Clock(device)
    shutil.rmtree(SCRATCH, ignore_errors=True)
    make_set(SCRATCH, sizes.train_box, filling=0.143, distinct=sizes.distinct)
    clock.lap("simulate_and_prepare_s")
    for cells in CELLS:
        make_mesh(SCRATCH / "particles", SCRATCH / f"mesh{cells}", cells if sizes.train_box > 32 else 8)
    clock.lap("meshes_s")
    repeat_set(SCRATCH, SCRATCH / "set", sizes.particles)
    clock.lap("repeat_s")
    return clock.seconds


def time_training(cells: int) -> Callable[[str, Sizes, Path], dict[str, Any]]:
    """A step: the parts of a training run with so many cells."""

    def step(device: str, sizes: Sizes, out: Path) -> dict[str, Any]:
        out = out / f"training_{cells}.json"
        return train_in_parts(SCRATCH / "set" / "particles", SCRATCH / f"mesh{cells}", device, sizes, out)

    return step


def train_in_parts(particles: Path, mesh: Path, device: str, sizes: Sizes, out: Path) -> dict[str, Any]:
    """The parts of ``train`` (``flexlib/train/run.py``), each timed; ``out`` has what is known, whenever it ends."""
    from flexlib.layout import MeshFolder, ParticlesFolder
    from flexlib.runtime import tune_process
    from flexlib.train.epoch import run_epoch
    from flexlib.train.finish import infer_all
    from flexlib.train.setup import set_up
    from flexlib.train.start import start
    from flexlib.workflow_support.settings import TrainSettings

    tune_process()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    settings = TrainSettings(latent_dims=2, epochs=4)
    samples, clock, profile = Samples(), Clock(device), Profile(device, sizes.profiled)

    def figures() -> dict[str, Any]:
        return clock.seconds | memory(device) | {"profile": profile.result, "host_s": samples.most()}

    setup = set_up(ParticlesFolder(particles), MeshFolder(mesh), settings, device)
    clock.lap("set_up_s")
    state = start(setup)
    clock.lap("start_s")
    out.write_text(json.dumps(figures()))
    for number in ("first", "second", "third"):
        batches = MiniBatches(profile if number == "third" else None)
        run_epoch(setup, state, batches.after_batch)
        clock.seconds[f"{number}_epoch_ms_a_batch"] = batches.milliseconds
        clock.lap(f"{number}_epoch_s")
        out.write_text(json.dumps(figures()))
    infer_all(setup, state)
    clock.lap("final_inference_s")
    about = {"particles": len(setup.source), "box": setup.source.box, "voxels": len(setup.operator.voxels.index)}
    about |= {"vertices": len(setup.operator.vertices_A), "batch_size": setup.batch_size}
    return about | figures() | {"log": state.log}


class Clock:
    """Seconds of the laps of a run, the device's work included."""

    def __init__(self, device: str) -> None:
        self.seconds: dict[str, float] = {}
        self._device, self._began = device, time.perf_counter()

    def lap(self, name: str) -> None:
        """A lap ends."""
        import torch

        if self._device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[name], self._began = round(now - self._began, 2), now
        print(name, self.seconds[name], flush=True)


class Samples:
    """Where the main thread is, looked at a hundred times a second: seconds in each of our functions, callees too."""

    def __init__(self) -> None:
        self._main = threading.get_ident()
        self._count: Counter[str] = Counter()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            time.sleep(0.01)
            frame, seen = sys._current_frames().get(self._main), set()
            while frame is not None:
                if "flexlib" in frame.f_code.co_filename:
                    seen.add(f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}")
                frame = frame.f_back
            self._count.update(seen)

    def most(self, number: int = 60) -> dict[str, float]:
        """Seconds so far of the longest."""
        return {name: round(count / 100, 2) for name, count in self._count.most_common(number)}


class MiniBatches:
    """How long the mini-batches of an epoch take, but for the first few; a profile looks on if there is one."""

    def __init__(self, profile: Profile | None) -> None:
        self._times: list[float] = []
        self._profile = profile

    def after_batch(self) -> None:
        """To be called after each."""
        self._times.append(time.perf_counter())
        if self._profile is not None:
            self._profile.after_batch()

    @property
    def milliseconds(self) -> float:
        """Of one."""
        times = self._times[min(5, len(self._times) - 2) :]
        return round(1e3 * (times[-1] - times[0]) / max(1, len(times) - 1), 3)


class Profile:
    """What the device does in a few mini-batches, and for how much of their time."""

    def __init__(self, device: str, batches: int) -> None:
        import torch

        self.result: dict[str, Any] = {}
        self._seen, self._batches = 0, batches
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities)
        self._device = device
        self._began = 0.0

    def after_batch(self) -> None:
        """To be called after each mini-batch: the first few warm up, the next are looked at."""
        self._seen += 1
        first, last = min(10, self._batches), min(10, self._batches) + self._batches
        if self._seen == first:
            self._profiler.start()
            self._began = time.perf_counter()
        elif self._seen == last:
            self._wait()
            wall_s = time.perf_counter() - self._began
            self._profiler.stop()
            self._summarise(wall_s / self._batches)

    def _wait(self) -> None:
        import torch

        if self._device == "cuda":
            torch.cuda.synchronize()

    def _summarise(self, wall_s: float) -> None:
        """Milliseconds of a mini-batch: of the wall clock, of the device, and of its kernels by their names."""
        rows = self._profiler.key_averages()
        on_gpu = self._device == "cuda"
        times: dict[str, list[float]] = {}
        for row in rows:
            spent = row.self_device_time_total if on_gpu else row.self_cpu_time_total
            if spent > 0 and (not on_gpu or row.device_type.name == "CUDA"):
                times[row.key[:90]] = [round(spent / 1e3 / self._batches, 4), row.count / self._batches]
        top = dict(sorted(times.items(), key=lambda item: -item[1][0])[:40])
        busy = sum(spent for spent, _ in times.values())
        operator = sum(spent for name, (spent, _) in times.items() if any(k in name for k in OPERATOR_KERNELS))
        host = sorted(rows, key=lambda row: -row.self_cpu_time_total)[:25]
        self.result = {
            "wall_ms": round(wall_s * 1e3, 3),
            "device_ms": round(busy, 3),
            "operator_ms": round(operator, 3),
            "operator_share_of_device": round(operator / busy, 3) if busy else None,
            "launches": sum(count for _, count in times.values()),
            "kernels_ms_and_calls": top,
            "host_ms": {row.key[:60]: round(row.self_cpu_time_total / 1e3 / self._batches, 3) for row in host},
        }


def time_reconstruction(box: int) -> Callable[[str, Sizes, Path], dict[str, Any]]:
    """A step: ``bench_reconstruct.py`` at this box."""

    def step(device: str, sizes: Sizes, out: Path) -> dict[str, Any]:
        rows = out / f"reconstruction_{box}.rows.json"
        command = [sys.executable, HERE / "bench_reconstruct.py", "--box", box, "--particles", 50_000]
        command += ["--part", sizes.part, "--kinds", "flex", "--device", device, "--threads", 8, "--out", rows]
        subprocess.run([str(word) for word in command], check=True)
        return json.loads(rows.read_text())[0]

    return step


def memory(device: str) -> dict[str, float]:
    """Peaks so far of the process and of the device."""
    import torch
    from bench_training import peak_bytes

    peaks = {"peak_GB": round(peak_bytes() / 1e9, 3)}
    if device == "cuda":
        peaks["peak_gpu_GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
    return peaks


def run_step(name: str, out: Path) -> bool:
    """Run a step in a process of its own, its figures into gpu_check.json; whether it succeeded."""
    from machine import describe_machine

    from flexlib.files import read_json, write_json

    began, results = time.perf_counter(), out / "gpu_check.json"
    command = [sys.executable, __file__, *sys.argv[1:], "--one", name]
    with (out / f"{name}.log").open("w") as log:
        try:
            code = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, timeout=LIMITS_S.get(name, LIMIT_S)
            ).returncode
        except subprocess.TimeoutExpired:
            code = -1
            log.write("stopped: out of time\n")
    figures = out / f"{name}.json"
    found = json.loads(figures.read_text()) if figures.exists() else {}
    figures.unlink(missing_ok=True)
    seconds = round(time.perf_counter() - began, 1)
    result = (read_json(results) if results.exists() else {}) | {"machine": describe_machine()}
    write_json(results, result | {name: {"status": code, "seconds": seconds} | found})
    print(f"--- {name}: status {code}, {seconds} s", flush=True)
    print("".join((out / f"{name}.log").read_text().splitlines(keepends=True)[-12:]), flush=True)
    return code == 0 and found.get("green", True)


def steps(sizes: Sizes) -> dict[str, Callable[[str, Sizes, Path], dict[str, Any]]]:
    """All steps by their names, in their order."""
    found = {"data": make_data, "tests": run_tests, "operator": time_operator}
    found |= {f"training_{cells}": time_training(cells) for cells in CELLS}
    return found | {f"reconstruction_{box}": time_reconstruction(box) for box in sizes.reconstructions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: that everything runs")
    parser.add_argument("--steps", nargs="+", help="default: all")
    parser.add_argument("--particles", type=int, help="of the trainings, instead of 100,000")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a step in this process
    options = parser.parse_args()
    sizes = QUICK if options.quick else FULL
    if options.particles:
        sizes = replace(sizes, particles=options.particles)
    every = steps(sizes)
    unknown = [name for name in options.steps or [] if name not in every]
    if unknown:
        parser.error(f"unknown steps {unknown}: there are {list(every)}")
    if options.one:
        figures = every[options.one](options.device, sizes, options.out)
        (options.out / f"{options.one}.json").write_text(json.dumps(figures, indent=1) + "\n")
        return
    failed = [name for name in options.steps or every if not run_step(name, options.out)]
    print("failed: " + ", ".join(failed) if failed else "all steps done", flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
