"""Time the projection operator on the CPU: nanoseconds per voxel, image and core, forward and adjoint.

    python benchmarks/bench_operator.py [--boxes 64 128] [--out results.json]

The volume is a ball of diameter 0.6 boxes on a body-centred mesh of about ``--cells`` cells across; vertices move by a
random smooth field, so that positions are as irregular as in training.
"""

from __future__ import annotations

import argparse
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


def best_time(function: Callable[[], object], repeats: int = 3) -> float:
    """Seconds of the fastest of ``repeats`` calls, after one call to compile."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def time_operator(box: int, cells: int, kernel: str, threads: int, images: int) -> dict[str, float | int | str]:
    """One row of the table: forward, adjoint to values alone, adjoint to values and vertices."""
    torch.set_num_threads(threads)
    generator = np.random.default_rng(0)
    vertices, mesh = ball_on_mesh(box, cells)
    moved = vertices + 2.0 * np.sin(vertices[:, ::-1] * 4.0 / box)
    rotation = torch.as_tensor(Rotation.random(images, rng=generator).as_matrix())
    origin = torch.as_tensor(generator.uniform(-2, 2, (images, 2)))
    vertices_px = view_vertices(torch.as_tensor(moved), rotation, origin, 1.0).float()
    values = torch.as_tensor(generator.normal(size=len(mesh["cell"])), dtype=torch.float32)
    residual = torch.as_tensor(generator.normal(size=(images, box, box)), dtype=torch.float32)
    arguments = (mesh["cells"], mesh["cell"], mesh["bary"])

    def adjoint(need_vertices: bool) -> object:
        return torch.ops.flexlib.splat_voxels_adjoint(
            residual, values, vertices_px, *arguments, KERNELS[kernel], True, need_vertices
        )

    seconds = {
        "forward": best_time(lambda: splat_voxels(values, vertices_px, *arguments, box, KERNELS[kernel])),
        "adjoint_values": best_time(lambda: adjoint(False)),
        "adjoint_both": best_time(lambda: adjoint(True)),
    }
    work = len(values) * images / threads
    row: dict[str, float | int | str] = {"box": box, "kernel": kernel, "threads": threads, "voxels": len(values)}
    for name, value in seconds.items():
        row[f"{name}_ns"] = round(value / work * 1e9, 2)
        row[f"{name}_ms_per_image"] = round(value / images * 1e3, 3)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the projection operator on the CPU.")
    parser.add_argument("--boxes", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--cells", type=int, default=20, help="mesh cells across the box")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--out", type=Path, default=None, help="also write the table as JSON")
    options = parser.parse_args()
    rows = []
    columns = (
        "forward_ns",
        "adjoint_values_ns",
        "adjoint_both_ns",
        "forward_ms_per_image",
        "adjoint_both_ms_per_image",
    )
    print(f"{'box':>4} {'kernel':>7} {'threads':>7} {'voxels':>8}  " + "  ".join(columns))
    for box in options.boxes:
        for kernel in KERNELS:
            for threads in options.threads:
                row = time_operator(box, options.cells, kernel, threads, options.images)
                rows.append(row)
                figures = "  ".join(f"{row[c]:>{len(c)}}" for c in columns)
                print(f"{box:>4} {kernel:>7} {threads:>7} {row['voxels']:>8}  {figures}", flush=True)
    if options.out:
        result = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__, "rows": rows}
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
