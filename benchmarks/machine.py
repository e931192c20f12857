"""What the machine is and what it can do at most: what the benchmarks' figures are held against."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numba
import numpy as np
import torch
from numba import njit, prange

LEAST_S = 0.05  # of device work in one timing: launches and the clock's steps no longer count


def describe_machine() -> dict[str, object]:
    """Processor, cores, memory, GPU and versions; never the host's name."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_GB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numba": numba.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


def machine_name(machine: dict[str, object]) -> str:
    """A file name for a machine's results, such as amd-epyc-2-cores."""
    words = f"{machine['cpu']} {machine['cores']} cores {machine['gpu'] or ''}".lower()
    return "-".join("".join(c if c.isalnum() else " " for c in words).split())


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.machine()


def best_time(function: Callable[[], object], device: str, repeats: int = 5) -> float:
    """Seconds of the fastest of ``repeats`` timings of a call, after one call to compile."""
    function()
    if device == "cpu":
        return min(_seconds(function) for _ in range(repeats))
    calls = max(1, int(LEAST_S / _device_seconds(function, 3)))
    return min(_device_seconds(function, calls) for _ in range(repeats))


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _device_seconds(function: Callable[[], object], calls: int) -> float:
    """Seconds of one of ``calls`` calls, by the events of the CUDA device."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e-3 / calls


@njit(cache=True, parallel=True)
def _add_pairs(images, pixels, amount):
    for i in prange(len(images)):
        image = images[i]
        for j in range(len(pixels)):
            pixel = np.uint64(pixels[j])  # unsigned: numba would look for negative indices
            image[pixel] += amount
            image[pixel + np.uint64(1)] += amount


@njit(cache=True, parallel=True)
def _add_fours(images, pixels, amount):
    for i in prange(len(images)):
        image = images[i]
        for j in range(len(pixels)):
            pixel = np.uint64(pixels[j])  # unsigned: numba would look for negative indices
            for k in range(4):
                image[pixel + np.uint64(k)] += amount


@njit(cache=True, parallel=True)
def _read_pairs(images, pixels, sums):
    for i in prange(len(images)):
        image = images[i]
        first, second = np.float32(0), np.float32(0)
        for j in range(len(pixels)):
            pixel = np.uint64(pixels[j])  # unsigned: numba would look for negative indices
            first += image[pixel]
            second += image[pixel + np.uint64(1)]
        sums[i] = first + second


@njit(cache=True, parallel=True)
def _read_fours(images, pixels, sums):
    for i in prange(len(images)):
        image = images[i]
        total = np.zeros(4, np.float32)
        for j in range(len(pixels)):
            pixel = np.uint64(pixels[j])  # unsigned: numba would look for negative indices
            for k in range(4):
                total[k] += image[pixel + np.uint64(k)]
        sums[i] = total.sum()


def cpu_limits(boxes: tuple[int, ...], threads: int, megabytes: int = 256) -> dict[str, float]:
    """What ``threads`` threads of this machine do, in plain code that does nothing else.

    ``copy_GB_per_s`` counts bytes read and written. ``add_2_in_128_G_per_s``: 10^9 additions a second of two
    neighbouring numbers (a row of the linear kernel; 4 of the cubic) at random pixels in an image of 128 px, one image
    a thread; ``read_...`` likewise.
    """
    torch.set_num_threads(threads)
    numba.set_num_threads(threads)
    source = torch.ones(megabytes * 2**18)
    target = torch.empty_like(source)
    limits = {"copy_GB_per_s": round(2 * source.nbytes / best_time(lambda: target.copy_(source), "cpu") * 1e-9, 2)}
    generator = np.random.default_rng(0)
    sums = np.empty(threads, np.float32)
    for box in boxes:
        images = np.zeros((threads, box * box + 4), np.float32)
        pixels = generator.integers(0, box * box, 2**23).astype(np.int32)
        for taps, add, read in ((2, _add_pairs, _read_pairs), (4, _add_fours, _read_fours)):
            add_s = best_time(lambda a=add, i=images, p=pixels: a(i, p, np.float32(1)), "cpu")
            read_s = best_time(lambda r=read, i=images, p=pixels: r(i, p, sums), "cpu")
            limits[f"add_{taps}_in_{box}_G_per_s"] = round(threads * len(pixels) / add_s * 1e-9, 4)
            limits[f"read_{taps}_in_{box}_G_per_s"] = round(threads * len(pixels) / read_s * 1e-9, 4)
    return limits


def gpu_limits() -> dict[str, float]:
    """What the device can do: GB/s copied (read plus written), and 10^9 float32 per second added at random pixels."""
    source = torch.empty(2**28, dtype=torch.float32, device="cuda")
    copied = torch.empty_like(source)
    copy_s = best_time(lambda: copied.copy_(source), "cuda")
    limits = {"copy_GB_per_s": round(2 * source.nbytes / copy_s * 1e-9, 1)}
    for name, pixels in (("image", 128 * 128), ("batch", 128 * 128 * 128)):
        target = torch.zeros(pixels, device="cuda")
        where = torch.randint(0, pixels, (2**24,), device="cuda")
        added = source[: len(where)]
        seconds = best_time(lambda t=target, w=where, a=added: t.scatter_add_(0, w, a), "cuda")
        limits[f"random_adds_in_{name}_G_per_s"] = round(len(where) / seconds * 1e-9, 2)
    return limits
