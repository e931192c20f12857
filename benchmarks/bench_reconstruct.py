"""Measure the reconstruction's memory and time at full size, each case in a process of its own.

    python benchmarks/bench_reconstruct.py [--box 256] [--particles 20000 80000] [--part 500 1500] [--threads 1]
                                           [--device cuda] [--out FILE]

The particles are simulated poses and CTFs over a stack of few noise images that repeat (their content costs the same as
any other). Of each half-set only ``--part`` particles are gone through, once for the right-hand side (images read) and
once for an iteration; times are scaled to the half-set, and said to be. A rigid map is solved for without going through
them again: ``iteration`` is then a pass that is not made, ``convolution_cpu_s`` the product that takes its place, and
``precondition_cpu_s`` what an iteration takes besides, however many particles. On a machine that others use too, the
CPU time on one thread is the one to trust. Memory is the process's largest resident set (Linux's ``VmHWM``), reported
also as it was before, with metadata, mesh and voxels in memory and eight particles gone through. It must not depend on
``--part``, and on ``--particles`` only by the metadata.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import mrcfile
import numpy as np

DISTINCT_IMAGES = 200
PIXEL_SIZE_A = 1.3


def measure(
    folder: Path, box: int, count: int, part: int, cells: int, kind: str, threads: int, device: str
) -> dict[str, float]:
    """One case, in this process."""
    import time

    import torch

    from flexlib.images.noise import Calibration
    from flexlib.images.sources import FullImages
    from flexlib.images.stack import open_stacks
    from flexlib.imaging.masks import soft_edge
    from flexlib.mesh.lattice import bcc_mesh
    from flexlib.model.flex_model import FlexModel
    from flexlib.model.flow import FlowGenerator
    from flexlib.model.forward import Operator, solving_accuracy
    from flexlib.projection.op import gather_volume
    from flexlib.reconstruct.kinds import flow_displacements
    from flexlib.reconstruct.normal_equations import accumulate_normal_equations
    from flexlib.runtime import tune_process
    from flexlib.tetra.tetmesh import single_cell_mesh

    tune_process()
    torch.set_num_threads(threads)
    mask = soft_edge(_ball(box, 0.28), PIXEL_SIZE_A, 0.0, 8.0)
    extent_A = box * PIXEL_SIZE_A
    if kind == "flex":
        mesh = bcc_mesh(mask > 0, PIXEL_SIZE_A, extent_A / cells)
        basis = torch.randn((156, len(mesh.vertices_A), 3)) * 0.1
        flow = FlowGenerator(basis, 2, 6, 64)
        torch.nn.init.normal_(flow.linear, 0.0, 0.1)
        latents = np.random.default_rng(1).standard_normal((count, 2)).astype(np.float32)
        moved = flow_displacements(FlexModel(mesh, flow, latents, mask, box, PIXEL_SIZE_A).to(device))
    else:
        mesh = single_cell_mesh(extent_A)
        moved = None
    operator = Operator.on_mesh(mesh, mask > 1e-3, PIXEL_SIZE_A, device, solving_accuracy(device))
    voxels, mask_values = operator.voxels, gather_volume(mask, operator.voxels)
    stacks, particles = open_stacks(_particles(folder / "noise.mrcs", count, box))
    sigma = np.ones((1, box // 2))
    measured = Calibration(np.ones(1), sigma, box, PIXEL_SIZE_A)
    source = FullImages(stacks, particles, box=box, pixel_size_A=PIXEL_SIZE_A, calibration=measured)
    rows = np.flatnonzero(source.half_set == 0)[:part]
    warm = np.flatnonzero(source.half_set == 1)[:8]
    accumulate_normal_equations(source, warm, operator, moved, mask_values).hessian(
        torch.ones(len(voxels.index), dtype=torch.float64, device=device)
    )
    before = _peak_bytes()
    began, began_cpu = time.perf_counter(), time.process_time()
    equations = accumulate_normal_equations(source, rows, operator, moved, mask_values)
    read_s, read_cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
    x = equations.precondition(equations.data)
    x.sum().item()
    began, began_cpu = time.perf_counter(), time.process_time()
    replace(equations, at_rest=False).hessian(x).sum().item()  # waits for a GPU
    iteration_s, iteration_cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
    beside = {}
    for name, product in (
        ("convolution_cpu_s", replace(equations, at_rest=True).hessian),
        ("precondition_cpu_s", equations.precondition),
    ):
        began_cpu = time.process_time()
        product(x).sum().item()
        beside[name] = time.process_time() - began_cpu
    scale = count / 2 / part
    on_gpu = {"peak_gpu_GB": torch.cuda.max_memory_allocated() / 1e9} if device == "cuda" else {}
    return (
        on_gpu
        | beside
        | {
            "both_halves_20_iterations_s_scaled": 2 * scale * (read_s + 20 * iteration_s),
            "voxels": len(voxels.index),
            "peak_before_GB": before / 1e9,
            "peak_GB": _peak_bytes() / 1e9,
            "volume_GB": 4 * box**3 / 1e9,
            "ms_per_image_and_iteration": 1e3 * iteration_s / part,
            "cpu_ms_per_image_and_iteration": 1e3 * iteration_cpu_s / part,
            "read_half_cpu_s_scaled": read_cpu_s * scale,
            "iteration_half_cpu_s_scaled": iteration_cpu_s * scale,
            "read_half_s_scaled": read_s * scale,
            "iteration_half_s_scaled": iteration_s * scale,
        }
    )


def _ball(box: int, share: float) -> np.ndarray:
    axis = np.arange(box) - box // 2
    return axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[None, None, :] ** 2 < (share * box) ** 2


def _particles(stack: Path, count: int, box: int):
    from scipy.spatial.transform import Rotation

    from flexlib.particles.table import OpticsGroup, Particles

    generator = np.random.default_rng(0)
    defocus_A = generator.uniform(8000, 25000, count)
    return Particles(
        optics=(OpticsGroup("1", 300.0, 2.7, 0.1, PIXEL_SIZE_A, box),),
        optics_index=np.zeros(count, np.int32),
        rotation=Rotation.random(count, rng=generator).as_matrix(),
        origin_A=generator.normal(0, 3, (count, 2)),
        defocus_u_A=defocus_A,
        defocus_v_A=defocus_A - 200,
        defocus_angle_rad=generator.uniform(0, np.pi, count),
        phase_shift_rad=np.zeros(count),
        ctf_bfactor_A2=np.zeros(count),
        ctf_scale=np.ones(count),
        half_set=(np.arange(count) % 2).astype(np.int8),
        contrast_sign=np.ones(count),
        stack_paths=(stack,),
        stack_index=np.zeros(count, np.int32),
        image_index=np.arange(count) % DISTINCT_IMAGES,
        source_path=stack,
        source_row=np.arange(count),
    )


def _peak_bytes() -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--box", type=int, default=256)
    parser.add_argument("--particles", type=int, nargs="+", default=[20_000, 80_000])
    parser.add_argument("--part", type=int, nargs="+", default=[500, 1500])
    parser.add_argument("--cells", type=int, default=20)
    parser.add_argument("--kinds", nargs="+", default=["flex", "rigid"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        case = json.loads(options.case)
        print(json.dumps(measure(Path(case.pop("folder")), **case)))
        return
    with tempfile.TemporaryDirectory() as folder:
        noise = np.random.default_rng(0).standard_normal((DISTINCT_IMAGES, options.box, options.box), np.float32)
        with mrcfile.new(Path(folder) / "noise.mrcs") as file:
            file.set_data(noise)
            file.set_image_stack()
        del noise
        environment = os.environ | {"NUMBA_NUM_THREADS": str(options.threads), "OMP_NUM_THREADS": str(options.threads)}
        cases = [(kind, options.particles[0], part) for kind in options.kinds for part in options.part]
        cases += [(options.kinds[0], count, options.part[0]) for count in options.particles[1:]]
        rows = []
        for kind, count, part in cases:
            case = dict(folder=folder, box=options.box, count=count, part=part, cells=options.cells, kind=kind)
            case |= {"threads": options.threads, "device": options.device}
            command = [sys.executable, __file__, "--case", json.dumps(case)]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            numbers = json.loads(done.stdout.splitlines()[-1])
            print(f"box {options.box}, {kind}, {count} particles, {part} of a half gone through:")
            print("   " + ", ".join(f"{name} {value:.4g}" for name, value in numbers.items()), flush=True)
            about = {"box": options.box, "kind": kind, "particles": count, "part_of_half": part, "cells": options.cells}
            rows.append(about | numbers)
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
