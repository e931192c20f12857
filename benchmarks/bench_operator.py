"""Time the projection operator, forward and adjoint.

    python benchmarks/bench_operator.py [--boxes 64 128] [--out results.json]
    python benchmarks/bench_operator.py --device cuda [--tune]

On the CPU: nanoseconds per voxel, image and core. On a GPU: 10^9 voxel-projections per second, timed by the device's
own events, next to what the device copies and adds at random places; ``--tune`` tries other tiles of the kernels.

The volume is a ball of diameter 0.6 boxes on a body-centred mesh of about ``--cells`` cells across; vertices move by a
random smooth field, so that positions are as irregular as in training.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy.spatial import Delaunay
from scipy.spatial.transform import Rotation

from flexlib.projection.op import KERNELS, splat_voxels, view_vertices

LEAST_S = 0.05  # of device work in one timing: launches and the clock's steps no longer count


def ball_on_mesh(box: int, cells: int) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
    """Vertices (nv, 3) in pixels, and the ``cells``, ``cell`` and ``bary`` that the operator takes."""
    spacing = box / cells
    axis = np.arange(-box / 2 - spacing, box / 2 + 2 * spacing, spacing)
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    vertices = np.vstack([grid, grid + spacing / 2])
    vertices = vertices[np.linalg.norm(vertices, axis=1) < 0.3 * box + 2 * spacing]
    mesh = Delaunay(vertices)
    points = np.stack(np.meshgrid(*[np.arange(box) - box // 2] * 3, indexing="ij"), -1).reshape(-1, 3)[:, ::-1]
    points = points[np.linalg.norm(points, axis=1) < 0.3 * box]
    cell = mesh.find_simplex(points)
    order = np.lexsort((np.arange(len(points)), cell))
    points, cell = points[order], cell[order]
    affine = mesh.transform[cell]
    bary = np.einsum("nij,nj->ni", affine[:, :3], points - affine[:, 3])
    bary = np.hstack([bary, 1 - bary.sum(1, keepdims=True)])
    return vertices, {
        "cells": torch.as_tensor(mesh.simplices, dtype=torch.int32),
        "cell": torch.as_tensor(cell, dtype=torch.int32),
        "bary": torch.as_tensor(bary, dtype=torch.float32),
    }


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


class Problem:
    """Inputs of the operator for one box, on one device."""

    def __init__(self, box: int, cells: int, images: int, oversampling: int, device: str):
        generator = np.random.default_rng(0)
        vertices, mesh = ball_on_mesh(box, cells)
        moved = vertices + 2.0 * np.sin(vertices[:, ::-1] * 4.0 / box)
        rotation = torch.as_tensor(Rotation.random(images, rng=generator).as_matrix())
        origin = torch.as_tensor(generator.uniform(-2, 2, (images, 2)))
        vertices_px = oversampling * view_vertices(torch.as_tensor(moved), rotation, origin, 1.0)
        self.device, self.images, self.grid = device, images, box * oversampling
        self.vertices_px = vertices_px.to(device, torch.float32)
        self.mesh = tuple(tensor.to(device) for tensor in mesh.values())
        self.voxels = len(mesh["cell"])
        self.values = torch.as_tensor(generator.normal(size=self.voxels), dtype=torch.float32, device=device)
        residual = generator.standard_normal((images, self.grid, self.grid), dtype=np.float32)
        self.residual = torch.as_tensor(residual, device=device)

    def seconds(self, kernel: str) -> dict[str, float]:
        """Of all images: forward, adjoint to values alone, adjoint to values and vertices."""
        taps = KERNELS[kernel]

        def adjoint(need_vertices: bool) -> object:
            return torch.ops.flexlib.splat_voxels_adjoint(
                self.residual, self.values, self.vertices_px, *self.mesh, taps, True, need_vertices
            )

        def forward() -> object:
            return splat_voxels(self.values, self.vertices_px, *self.mesh, self.grid, taps)

        return {
            "forward": best_time(forward, self.device),
            "adjoint_values": best_time(lambda: adjoint(False), self.device),
            "adjoint_both": best_time(lambda: adjoint(True), self.device),
        }


def time_on_cpu(options: argparse.Namespace) -> list[dict]:
    """A row for each box, kernel and number of threads: nanoseconds per voxel, image and core."""
    rows = []
    columns = (
        "forward_ns",
        "adjoint_values_ns",
        "adjoint_both_ns",
        "forward_ms_per_image",
        "adjoint_both_ms_per_image",
    )
    print(f"{'box':>4} {'kernel':>7} {'threads':>7} {'voxels':>8}  " + "  ".join(columns))
    for box in options.boxes or (64, 128):
        problem = Problem(box, options.cells, options.images or 32, options.oversampling, "cpu")
        for kernel, threads in itertools.product(KERNELS, options.threads):
            torch.set_num_threads(threads)
            row = {"box": box, "kernel": kernel, "threads": threads, "voxels": problem.voxels}
            for name, value in problem.seconds(kernel).items():
                row[f"{name}_ns"] = round(value / (problem.voxels * problem.images / threads) * 1e9, 2)
                row[f"{name}_ms_per_image"] = round(value / problem.images * 1e3, 3)
            rows.append(row)
            figures = "  ".join(f"{row[c]:>{len(c)}}" for c in columns)
            print(f"{box:>4} {kernel:>7} {threads:>7} {problem.voxels:>8}  {figures}", flush=True)
    return rows


def time_on_gpu(options: argparse.Namespace) -> list[dict]:
    """A row for each box and kernel, and with ``--tune`` each tile: 10^9 voxel-projections per second."""
    rows = []
    columns = ("forward", "adjoint_values", "adjoint_both", "forward_and_adjoint")
    print("10^9 voxel-projections per second; adjoint_both: by values and vertices; forward_and_adjoint: with both")
    print(f"{'box':>4} {'kernel':>7} {'voxels':>8} {'tile':>11}  " + "  ".join(columns))
    for box in options.boxes or (64, 128, 256):
        problem = Problem(box, options.cells, options.images or 128, options.oversampling, "cuda")
        for kernel, tile in itertools.product(KERNELS, _tiles() if options.tune else [None]):
            if tile is not None:
                _set_tile(tile)
            seconds = problem.seconds(kernel)
            seconds["forward_and_adjoint"] = seconds["forward"] + seconds["adjoint_both"]
            row = {"box": box, "kernel": kernel, "voxels": problem.voxels, "images": problem.images, "tile": tile}
            for name, value in seconds.items():
                row[f"{name}_G_per_s"] = round(problem.voxels * problem.images / value * 1e-9, 3)
                row[f"{name}_ms"] = round(value * 1e3, 4)
            rows.append(row)
            figures = "  ".join(f"{row[f'{c}_G_per_s']:>{len(c)}.2f}" for c in columns)
            shape = "x".join(map(str, tile)) if tile else "default"
            print(f"{box:>4} {kernel:>7} {problem.voxels:>8} {shape:>11}  {figures}", flush=True)
    return rows


def _tiles() -> list[tuple[int, int, int]]:
    """Tiles to try: voxels and images of a program, and its warps."""
    shapes = [(32, 1), (64, 1), (64, 2), (128, 2), (128, 4), (256, 4), (256, 8)]
    return [(voxels, images, warps) for (voxels, warps), images in itertools.product(shapes, (4, 16, 64))]


def _set_tile(tile: tuple[int, int, int]) -> None:
    from flexlib.projection import cuda

    cuda.SPLAT_TILE = cuda.ADJOINT_TILE = cuda.Tile(*tile)


def gpu_limits() -> dict[str, float]:
    """What the device can do: GB/s copied (read plus written), and 10^9 float32 per second added at random places."""
    source = torch.empty(2**28, dtype=torch.float32, device="cuda")
    copied = torch.empty_like(source)
    copy_s = best_time(lambda: copied.copy_(source), "cuda")
    limits = {"copy_GB_per_s": round(2 * source.nbytes / copy_s * 1e-9, 1)}
    for name, places in (("image", 128 * 128), ("batch", 128 * 128 * 128)):
        target = torch.zeros(places, device="cuda")
        where = torch.randint(0, places, (2**24,), device="cuda")
        added = source[: len(where)]
        seconds = best_time(lambda t=target, w=where, a=added: t.scatter_add_(0, w, a), "cuda")
        limits[f"random_adds_in_{name}_G_per_s"] = round(len(where) / seconds * 1e-9, 2)
    return limits


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the projection operator on the CPU or a GPU.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--boxes", type=int, nargs="+", default=None, help="default 64 128, on a GPU 256 too")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="on the CPU")
    parser.add_argument("--cells", type=int, default=20, help="mesh cells across the box")
    parser.add_argument("--images", type=int, default=None, help="in a batch; default 32, on a GPU 128")
    parser.add_argument("--oversampling", type=int, choices=(1, 2), default=1, help="image grid over box")
    parser.add_argument("--tune", action="store_true", help="try tiles of the GPU kernels")
    parser.add_argument("--out", type=Path, default=None, help="also write the table as JSON")
    options = parser.parse_args()
    result = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    if options.device == "cpu":
        result["rows"] = time_on_cpu(options)
    elif not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    else:
        import triton

        result |= {"machine": torch.cuda.get_device_name(), "triton": triton.__version__, "limits": gpu_limits()}
        print(result["machine"], *(f"{name} {value}" for name, value in result["limits"].items()))
        result["rows"] = time_on_gpu(options)
    result |= {"cells": options.cells, "oversampling": options.oversampling}
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
