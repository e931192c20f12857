"""Measure prepare: peak memory and time at several numbers of particles, each in a process of its own.

    python benchmarks/bench_prepare.py [--counts 2000 8000] [--box 128] [--train-box 64] [--out results.json]

The images are one noisy projection set repeated, so that making them is cheap, in intensities that differ by 1e-5:
prepare leaves out images that stand twice. Memory is the largest resident anonymous memory (Linux's ``RssAnon``, read
every 5 ms): pages of memory-mapped stacks are left out, for the kernel keeps those until the memory is wanted for
something else. What it is after the imports is told too: what comes on top must not grow
with the number of particles, but for the metadata's rows.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import mrcfile
import numpy as np

from flexlib.images.stack import ImageStackWriter
from flexlib.particles.star import read_tables
from flexlib.particles.star_write import write_star
from flexlib.simulate.run import simulate_particles
from flexlib.simulate.settings import Simulation

_MEASURE = """
import sys, threading, time
from pathlib import Path
from flexlib.prepare.run import prepare_particles
from flexlib.runtime import tune_process
from flexlib.workflow_support.settings import PrepareSettings
def resident():
    status = Path("/proc/self/status").read_text().split("RssAnon:")[1]
    return 1024 * int(status.split()[0])

def watch():
    global peak
    while not done.wait(0.005):
        peak = max(peak, resident())

tune_process()
start, folder = time.perf_counter(), Path(sys.argv[1])
before = peak = resident()
done = threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
prepare_particles(
    folder / "particles.star", folder / "consensus.mrc", folder / "out",
    settings=PrepareSettings(train_box=int(sys.argv[2])),
)
done.set()
watcher.join()
print(before, peak, time.perf_counter() - start)
"""


def make_particles(folder: Path, count: int, box: int, distinct: int = 500) -> None:
    """``count`` particles in one stack, of which ``distinct`` differ."""
    simulated = simulate_particles(
        folder, Simulation(phantom="rigid", num_particles=distinct, box=box, pixel_size_A=256 / box, snr=0.5)
    )
    tables = read_tables(simulated.particles_star)
    rows = np.arange(count) % distinct
    with mrcfile.mmap(simulated.stack) as file:
        images = file.data[:].astype(np.float32)
    with ImageStackWriter(folder / "repeated.mrcs", count, box, 256 / box) as stack:
        for first in range(0, count, distinct):
            stack.append(images[rows[first : first + distinct]] * (1 + 1e-5 * first / distinct))
    particles = tables.particles.iloc[rows].reset_index(drop=True)
    particles["rlnImageName"] = [f"{number + 1:06d}@repeated.mrcs" for number in range(count)]
    write_star({"optics": tables.optics, "particles": particles}, folder / "particles.star")


def measure(folder: Path, train_box: int) -> dict[str, float]:
    """Bytes resident after imports and at the peak, and seconds, of preparing ``folder`` in a fresh process."""
    command = [sys.executable, "-c", _MEASURE, str(folder), str(train_box)]
    words = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    imported, peak, seconds = map(float, words[-3:])
    return {"imported_bytes": imported, "peak_bytes": peak, "seconds": seconds}


def main() -> None:
    """Measure and print, or write as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[2000, 8000])
    parser.add_argument("--box", type=int, default=128)
    parser.add_argument("--train-box", type=int, default=64)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results = []
    for count in options.counts:
        with tempfile.TemporaryDirectory() as folder:
            make_particles(Path(folder), count, options.box)
            result = {"count": count, "box": options.box} | measure(Path(folder), options.train_box)
        results.append(result)
        print(
            f"{count} particles of {options.box} px ({count * options.box**2 * 4 / 1e6:.0f} MB): peak "
            f"{result['peak_bytes'] / 1e6:.0f} MB, {result['imported_bytes'] / 1e6:.0f} MB of it imports, "
            f"{result['seconds']:.1f} s"
        )
    if options.out:
        options.out.write_text(json.dumps({"machine": platform.platform(), "results": results}, indent=1))


if __name__ == "__main__":
    main()
