"""Time the projection operator, forward and adjoint.

    python benchmarks/bench_operator.py [--boxes 64 128] [--out results.json]
    python benchmarks/bench_operator.py --device cuda [--tune]

On the CPU: nanoseconds per voxel, image and core. On a GPU: 10^9 voxel-projections per second, timed by the device's
own events, next to what the device copies and adds at random pixels; ``--tune`` tries other tiles of the kernels.

The volume is a ball that fills ``--filling`` of the box, on the default mesh of ``--cells`` cells across; vertices move
by a random smooth field, so that positions are as irregular as in training. Beside the times stand shares of what the
machine does in plain code (``machine.py``): of the rate at which rows of the kernel's width are added to, or read from,
random pixels of an image as large as the box; and of the bandwidth of copying, for the 24 bytes that a block of eight
images reads of every voxel.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from machine import best_time, cpu_limits, describe_machine, gpu_limits
from particle_sets import ball
from scipy.spatial.transform import Rotation

from flexlib.mesh.lattice import bcc_mesh
from flexlib.projection.op import KERNELS, VoxelTensors, splat_voxels, view_vertices
from flexlib.tetra.voxels import voxelise

VOXEL_BYTES = 24 / 8  # cell, barycentric weights and value of a voxel, read once for a block of eight images


def ball_on_mesh(box: int, cells: int, filling: float, device: str) -> tuple[np.ndarray, VoxelTensors]:
    """Vertices (nv, 3) in pixels, and the voxels of a ball that fills this share of the box, on the default mesh."""
    inside = ball(box, filling)
    mesh = bcc_mesh(inside, 1.0, box / cells)
    return mesh.vertices_A, VoxelTensors.from_mesh_voxels(voxelise(mesh, inside, 1.0), device)


class Problem:
    """Inputs of the operator for one box, on one device."""

    def __init__(self, box: int, cells: int, filling: float, images: int, oversampling: int, device: str):
        generator = np.random.default_rng(0)
        vertices, voxels = ball_on_mesh(box, cells, filling, device)
        moved = vertices + 2.0 * np.sin(vertices[:, ::-1] * 4.0 / box)
        rotation = torch.as_tensor(Rotation.random(images, rng=generator).as_matrix())
        origin = torch.as_tensor(generator.uniform(-2, 2, (images, 2)))
        vertices_px = oversampling * view_vertices(torch.as_tensor(moved), rotation, origin, 1.0)
        self.device, self.images, self.grid = device, images, box * oversampling
        self.vertices_px = vertices_px.to(device, torch.float32)
        self.mesh = (voxels.cells, voxels.cell, voxels.bary)
        self.voxels = len(voxels.cell)
        self.values = torch.as_tensor(generator.normal(size=self.voxels), dtype=torch.float32, device=device)
        residual = generator.standard_normal((images, self.grid, self.grid), dtype=np.float32)
        self.residual = torch.as_tensor(residual, device=device)

    def seconds(self, kernel: str) -> dict[str, float]:
        """Of all images: forward, adjoint to values alone, adjoint to values and vertices."""
        return {name: best_time(call, self.device) for name, call in self.calls(kernel).items()}

    def calls(self, kernel: str) -> dict[str, Callable[[], object]]:
        """What ``seconds`` times."""
        taps = KERNELS[kernel]

        def adjoint(need_vertices: bool) -> object:
            return torch.ops.flexlib.splat_voxels_adjoint(
                self.residual, self.values, self.vertices_px, *self.mesh, taps, [True, need_vertices]
            )

        return {
            "forward": lambda: splat_voxels(self.values, self.vertices_px, *self.mesh, self.grid, taps),
            "adjoint_values": lambda: adjoint(False),
            "adjoint_both": lambda: adjoint(True),
        }


def time_on_cpu(
    boxes: Sequence[int],
    thread_counts: Sequence[int],
    cells: int = 20,
    filling: float = 0.2,
    images: int = 32,
    oversampling: int = 1,
) -> dict[str, list[dict]]:
    """``limits``, a row for each number of threads, and ``rows``, one for each box, kernel and number of threads.

    Times are in nanoseconds per voxel, image and core.
    """
    limits = {threads: cpu_limits(tuple(boxes), threads) for threads in thread_counts}
    rows = []
    columns = ("forward_ns", "adjoint_values_ns", "adjoint_both_ns", "forward_and_adjoint_ns", "scaling")
    shares = ("forward_share_of_adds", "adjoint_share_of_reads", "forward_share_of_copy")
    print(f"{'box':>4} {'kernel':>7} {'threads':>7} {'voxels':>8}  " + "  ".join(columns + shares))
    for box in boxes:
        problem = Problem(box, cells, filling, images, oversampling, "cpu")
        for kernel, threads in itertools.product(KERNELS, thread_counts):
            torch.set_num_threads(threads)
            row = {"box": box, "kernel": kernel, "threads": threads, "voxels": problem.voxels, "images": images}
            row |= {"cells": cells, "oversampling": oversampling}
            projections = problem.voxels * problem.images
            seconds = problem.seconds(kernel)
            seconds["forward_and_adjoint"] = seconds["forward"] + seconds["adjoint_both"]
            row |= {f"{name}_ns": round(value * threads / projections * 1e9, 3) for name, value in seconds.items()}
            single = next((r for r in rows if (r["box"], r["kernel"], r["threads"]) == (box, kernel, 1)), row)
            row["scaling"] = round(threads * single["forward_and_adjoint_ns"] / row["forward_and_adjoint_ns"], 2)
            taps, limit = KERNELS[kernel], limits[threads]
            rate = {name: projections / value * 1e-9 for name, value in seconds.items()}  # 10^9 a second
            row["forward_share_of_adds"] = round(taps * rate["forward"] / limit[f"add_{taps}_in_{box}_G_per_s"], 3)
            row["adjoint_share_of_reads"] = round(
                taps * rate["adjoint_both"] / limit[f"read_{taps}_in_{box}_G_per_s"], 3
            )
            row["forward_share_of_copy"] = round(VOXEL_BYTES * rate["forward"] / limit["copy_GB_per_s"], 3)
            rows.append(row)
            figures = "  ".join(f"{row[c]:>{len(c)}}" for c in columns + shares)
            print(f"{box:>4} {kernel:>7} {threads:>7} {problem.voxels:>8}  {figures}", flush=True)
    return {"limits": [{"threads": threads} | limit for threads, limit in limits.items()], "rows": rows}


def time_on_gpu(
    boxes: Sequence[int], cells: int = 20, filling: float = 0.2, images: int = 128, oversampling: int = 1
) -> dict[str, list[dict]]:
    """``limits``, and ``rows`` of each box and kernel: 10^9 voxel-projections a second."""
    limits = gpu_limits()
    print(*(f"{name} {value}" for name, value in limits.items()))
    rows = []
    columns = ("forward", "adjoint_values", "adjoint_both", "forward_and_adjoint")
    print("10^9 voxel-projections per second; adjoint_both: by values and vertices; forward_and_adjoint: with both")
    print(f"{'box':>4} {'kernel':>7} {'voxels':>8}  " + "  ".join(columns))
    for box in boxes:
        problem = Problem(box, cells, filling, images, oversampling, "cuda")
        for kernel in KERNELS:
            seconds = problem.seconds(kernel)
            seconds["forward_and_adjoint"] = seconds["forward"] + seconds["adjoint_both"]
            row = {"box": box, "kernel": kernel, "voxels": problem.voxels, "images": problem.images}
            row |= {"cells": cells, "oversampling": oversampling}
            for name, value in seconds.items():
                row[f"{name}_G_per_s"] = round(problem.voxels * problem.images / value * 1e-9, 3)
                row[f"{name}_ms"] = round(value * 1e3, 4)
            rows.append(row)
            figures = "  ".join(f"{row[f'{c}_G_per_s']:>{len(c)}.2f}" for c in columns)
            print(f"{box:>4} {kernel:>7} {problem.voxels:>8}  {figures}", flush=True)
    return {"limits": [limits], "rows": rows}


TILES = {  # of the kernels to try: voxels and images of a program, and its warps
    "SPLAT_TILE": [(128, 16, 4), (128, 64, 4), (64, 16, 2)],
    "ADJOINT_TILE": [(128, 16, 4), (64, 16, 2), (32, 16, 1)],
    "FORCES_TILE": [(128, 16, 4), (64, 16, 2), (32, 16, 1), (32, 64, 1)],
}
TIMED = {"SPLAT_TILE": "forward", "ADJOINT_TILE": "adjoint_values", "FORCES_TILE": "adjoint_both"}


def tune_on_gpu(box: int, cells: int = 20, filling: float = 0.2, images: int = 128) -> list[dict]:
    """A row for each tile, kernel and oversampling: 10^9 voxel-projections a second of what it is the tile of.

    Kernels are compiled beforehand, by as many processes as there are cores.
    """
    tiles = [(name, tile) for name, some in TILES.items() for tile in some]
    with multiprocessing.get_context("spawn").Pool(min(len(tiles), len(os.sched_getaffinity(0)))) as pool:
        pool.starmap(_compile, tiles, chunksize=1)
    rows = []
    for oversampling in (1, 2):
        problem = Problem(box, cells, filling, images, oversampling, "cuda")
        for (name, tile), kernel in itertools.product(tiles, KERNELS):
            with _tile(name, tile):
                seconds = best_time(problem.calls(kernel)[TIMED[name]], "cuda")
            row = {"box": box, "kernel": kernel, "oversampling": oversampling, "what": TIMED[name], "tile": tile}
            row["G_per_s"] = round(problem.voxels * problem.images / seconds * 1e-9, 2)
            rows.append(row)
            print(*row.values(), flush=True)
    return rows


def _compile(name: str, tile: tuple[int, ...]) -> None:
    """Compile the kernels of a tile, into Triton's cache on disk."""
    problem = Problem(32, 8, 0.2, 4, 1, "cuda")
    with _tile(name, tile):
        for kernel in KERNELS:
            problem.calls(kernel)[TIMED[name]]()


@contextmanager
def _tile(name: str, tile: tuple[int, ...]) -> Iterator[None]:
    """Another tile for one of the kernels."""
    from flexlib.projection import cuda

    before = getattr(cuda, name)
    setattr(cuda, name, cuda.Tile(*tile))
    try:
        yield
    finally:
        setattr(cuda, name, before)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the projection operator on the CPU or a GPU.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--boxes", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, len(os.sched_getaffinity(0))], help="on the CPU")
    parser.add_argument("--cells", type=int, default=20, help="mesh cells across the box")
    parser.add_argument("--filling", type=float, default=0.2, help="share of the box that the ball fills")
    parser.add_argument("--images", type=int, default=None, help="in a batch; default 32, on a GPU 128")
    parser.add_argument("--oversampling", type=int, choices=(1, 2), default=1, help="image grid over box")
    parser.add_argument("--tune", action="store_true", help="try tiles of the GPU kernels")
    parser.add_argument("--out", type=Path, default=None, help="also write the table as JSON")
    options = parser.parse_args()
    common = {"cells": options.cells, "filling": options.filling, "oversampling": options.oversampling}
    if options.device == "cpu":
        threads = sorted(set(options.threads))
        result = time_on_cpu(options.boxes, threads, images=options.images or 32, **common)
    elif not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    else:
        result = time_on_gpu(options.boxes, images=options.images or 128, **common)
        if options.tune:
            result["tiles"] = tune_on_gpu(options.boxes[0], options.cells, options.filling, options.images or 128)
    if options.out:
        options.out.write_text(json.dumps({"machine": describe_machine()} | result, indent=2) + "\n")


if __name__ == "__main__":
    main()
