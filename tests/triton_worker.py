"""Run in a process of its own by test_triton.py: interpret the Triton kernels on the CPU, or compile them for a GPU.

python triton_worker.py interpret|compile OUT        (``interpret`` needs TRITON_INTERPRET=1)
"""

from __future__ import annotations

import sys

import torch
import triton
from operator_cases import CASES, random_case, twisted_bodies
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flexlib.mesh import rigidity, rigidity_cuda
from flexlib.projection import cuda

H200 = GPUTarget("cuda", 90, 32)
INTEGERS = {"cells", "cell"}


def interpret() -> dict[str, object]:
    """Results of every case, in tiles so small that each has more than one program along both axes."""
    results: dict[str, object] = {}
    whole = cuda.SPLAT_TILE, cuda.ADJOINT_TILE
    for taps in (2, 4):
        cuda.SPLAT_TILE = cuda.ADJOINT_TILE = cuda.Tile(voxels=16, images=2, warps=1)
        for name, case in CASES.items():
            results[f"{name} {taps}"] = _both_ways(case, taps, True, True)
        cuda.SPLAT_TILE, cuda.ADJOINT_TILE = whole
        results[f"whole tile {taps}"] = _both_ways(CASES["centred"], taps, True, True)
    for flags in ((True, False), (False, True), (False, False)):
        results[f"needs {flags}"] = _both_ways(CASES["one voxel, one image"], 4, *flags)[1:]

    broken = random_case(num_voxels=20, batch=4)
    for image, bad in enumerate((torch.nan, torch.inf, 1e30)):
        broken.vertices[image] = bad
    results["broken"] = _both_ways(broken, 4, True, True)

    mesh, moved = twisted_bodies()
    tensors = rigidity.RigidityTensors.from_mesh(mesh)
    results["rigidity"] = rigidity_cuda.energy_and_gradient(
        moved, tensors.cells, tensors.gradients_1_per_A, tensors.weight, rigidity._NEWTON_STEPS, rigidity._DEGENERATE
    )
    return results


def _both_ways(case, taps, need_values, need_vertices):
    images = cuda.splat(case.values, case.vertices, *case.mesh(), case.grid, taps)
    both = cuda.splat_adjoint(
        case.grad_images, case.values, case.vertices, *case.mesh(), taps, need_values, need_vertices
    )
    return images, *both


def compile_kernels() -> dict[str, str]:
    """PTX of each kernel, as the device of a cluster would get it."""
    texts = {}
    for taps in (2, 4):
        tile = cuda.SPLAT_TILE
        texts[f"splat {taps}"] = _ptx(cuda._splat, {"TAPS": taps, "VOXELS": tile.voxels, "IMAGES": tile.images}, tile)
        tile = cuda.ADJOINT_TILE
        constants = {"NEED_VALUES": True, "NEED_VERTICES": True, "VOXELS": tile.voxels, "IMAGES": tile.images}
        texts[f"adjoint {taps}"] = _ptx(cuda._adjoint, {"TAPS": taps, **constants}, tile)
    cells, images, warps = rigidity_cuda._CELLS, rigidity_cuda._IMAGES, rigidity_cuda._WARPS
    constants = {"NEWTON_STEPS": rigidity._NEWTON_STEPS, "CELLS": cells, "IMAGES": images}
    texts["rigidity"] = _ptx(rigidity_cuda._energy_and_gradient, constants, cuda.Tile(cells, images, warps))
    return texts


def _ptx(kernel, constants, tile) -> str:
    numbers = {"batch", "num_voxels", "num_vertices", "num_cells", "grid"}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in numbers:
            signature[name] = "i32"
        elif name in {"degenerate", "tiny"}:
            signature[name] = "fp32"
        elif name in INTEGERS:
            signature[name] = "*i64" if kernel is rigidity_cuda._energy_and_gradient else "*i32"
        else:
            signature[name] = "*fp32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=H200, options={"num_warps": tile.warps}).asm["ptx"]


if __name__ == "__main__":
    torch.save({"interpret": interpret, "compile": compile_kernels}[sys.argv[1]](), sys.argv[2])
