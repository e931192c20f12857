"""Whether two checkouts give the same results: latents, FSC curves, the table of the sweep and canonical maps.

    python benchmarks/compare_checkouts.py BEFORE AFTER --run       # makes the demo in each first
    python benchmarks/compare_checkouts.py BEFORE/results/demo AFTER/results/demo

Each argument is a checkout, or a folder of results. Prints the largest differences for each sweep point, and exits with
status 1 where one is beyond ``--tolerance``, or where a sweep point, file or column is on one side only:

- latents: ``max |dz| / std`` and ``1 - R^2``, by component as they are written;
- canonical map: rms of the difference over that of the map;
- FSC curves: the largest difference of any curve;
- table of the sweep: the largest difference over the column's largest number, wall time aside.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import starfile

from flexlib.imaging.maps import read_map
from flexlib.layout import RunFolder

DEMO = Path("results/demo")
TIMES = ("wall_s",)  # columns that no two runs share


def make_demo(checkout: Path, cores: int) -> None:
    """Run the whole demo in a checkout, as ``make demo`` does: its own code, this interpreter's Snakemake."""
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    command = [sys.executable, "-m", "snakemake", "--forceall", "--cores", str(cores)]
    command += ["--set-threads", "train=1", "generate=1"]
    subprocess.run(command, cwd=checkout, env=environment, check=True)


def results_of(folder: Path) -> RunFolder:
    """The demo of a checkout, or the run that the folder is itself."""
    return RunFolder(folder / DEMO if (folder / DEMO).is_dir() else folder)


def sweep_points(run: RunFolder) -> set[str]:
    """Paths of the trained sweep points below train/."""
    root = run.train("").path
    name = run.train("x").latents.name
    return {str(path.parent.relative_to(root)) for path in root.rglob(name)}


def read_latents(path: Path) -> np.ndarray:
    """(n, d) latents in the order of the particles in latents.star."""
    blocks = starfile.read(path, always_dict=True)
    particles = blocks["particles"]
    names = [name for name in particles if name.removeprefix("flexLatent").isdigit()]
    return particles[names].to_numpy(np.float64)


def compare_latents(before: Path, after: Path) -> dict[str, float]:
    """``max |dz| / std`` and ``1 - R^2``."""
    first, second = read_latents(before), read_latents(after)
    if first.shape != second.shape:
        return {"latents max |dz|/std": np.inf, "latents 1 - R^2": np.inf}
    spread = first.std(0)
    unexplained = ((second - first) ** 2).sum(0) / (len(first) * spread**2)
    return {
        "latents max |dz|/std": float((np.abs(second - first) / spread).max()),
        "latents 1 - R^2": float(unexplained.max()),
    }


def compare_maps(before: Path, after: Path) -> float:
    """Rms of the difference over that of the first map."""
    first, second = (read_map(path).data.astype(np.float64) for path in (before, after))
    return float(np.linalg.norm(second - first) / np.linalg.norm(first)) if first.shape == second.shape else np.inf


def compare_tables(before: Path, after: Path, relative: bool) -> float:
    """Largest difference of numeric columns, ``relative`` to the largest number of each; infinite where others differ.

    A cell that is empty on both sides is the same.
    """
    first, second = (pd.read_csv(path).drop(columns=list(TIMES), errors="ignore") for path in (before, after))
    if list(first) != list(second) or len(first) != len(second):
        return np.inf
    largest = 0.0
    for name in first:
        if not pd.api.types.is_numeric_dtype(first[name]) or pd.api.types.is_bool_dtype(first[name]):
            if not first[name].equals(second[name]):
                return np.inf
            continue
        one, two = (np.asarray(table[name], np.float64) for table in (first, second))
        finite = np.isfinite(one)
        if not np.array_equal(one[~finite], two[~finite], equal_nan=True) or not np.isfinite(two[finite]).all():
            return np.inf
        scale = max(np.abs(one[finite]).max(initial=0.0), 1e-12) if relative else 1.0
        largest = max(largest, np.abs(two[finite] - one[finite]).max(initial=0.0) / scale)
    return float(largest)


def compare_files(before: Path, after: Path, compare: Callable[[Path, Path], dict[str, float]]) -> dict[str, float]:
    """What ``compare`` gives of two files; nothing where neither is there, infinity where one is missing."""
    if not before.is_file() and not after.is_file():
        return {}
    if not before.is_file() or not after.is_file():
        return {f"{before.name} on one side only": np.inf}
    return compare(before, after)


def compare_runs(before: RunFolder, after: RunFolder) -> dict[str, dict[str, float]]:
    """Differences by sweep point and kind; "sweep" for the table of all."""
    differences = {}
    for point in sorted(sweep_points(before) | sweep_points(after)):
        trained, rebuilt = (
            (before.train(point), after.train(point)),
            (before.reconstruct(point), after.reconstruct(point)),
        )
        differences[point] = (
            compare_files(*(folder.latents for folder in trained), compare_latents)
            | compare_files(*(f.canonical for f in trained), lambda a, b: {"canonical map": compare_maps(a, b)})
            | compare_files(*(f.fsc for f in rebuilt), lambda a, b: {"FSC": compare_tables(a, b, relative=False)})
        )
    table = compare_files(before.table, after.table, lambda a, b: {"table": compare_tables(a, b, relative=True)})
    return differences | {"sweep": table}


def main() -> None:
    """Print the differences; exit with 1 where one is too large."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--run", action="store_true", help="make the demo in both checkouts first")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)), help="for --run")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="largest difference of any kind")
    options = parser.parse_args()
    folders = [folder.resolve() for folder in (options.before, options.after)]
    if options.run:
        for checkout in folders:
            make_demo(checkout, options.cores)
    differences = compare_runs(*map(results_of, folders))
    found = [(point, kind, size) for point, kinds in differences.items() for kind, size in kinds.items()]
    if not any(kind.startswith("latents") for _, kind, _ in found):
        parser.error("no trained sweep point in either: make the demo first (--run)")
    for point, kind, size in found:
        print(f"{point:<40} {kind:<22} {size:.2e}{'' if size <= options.tolerance else '  DIFFERS'}")
    if any(size > options.tolerance for *_, size in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
