"""Run in a process of its own by test_triton.py: interpret the Triton kernels on the CPU, or compile them for a GPU.

python triton_worker.py interpret|compile OUT        (``interpret`` needs TRITON_INTERPRET=1)
"""

from __future__ import annotations

import sys

import torch
import triton
from operator_cases import CASES, random_case, twisted_bodies
from triton.backends.compiler import GPUTarget

from flexlib.projection import cuda
from flexlib.tetra import rigidity, rigidity_cuda


def interpret() -> dict[str, object]:
    """Results of every case, in tiles so small that each has more than one program along both axes."""
    results: dict[str, object] = {}
    whole = cuda.SPLAT_TILE, cuda.ADJOINT_TILE, cuda.FORCES_TILE
    for taps in (2, 4):
        cuda.SPLAT_TILE = cuda.ADJOINT_TILE = cuda.FORCES_TILE = cuda.Tile(voxels=16, images=2, warps=1)
        for name, case in CASES.items():
            results[f"{name} {taps}"] = _both_ways(case, taps, True, True)
        cuda.SPLAT_TILE, cuda.ADJOINT_TILE, cuda.FORCES_TILE = whole
        results[f"whole tile {taps}"] = _both_ways(CASES["centred"], taps, True, True)
    for flags in ((True, False), (False, True), (False, False)):
        results[f"needs {flags}"] = _both_ways(CASES["one voxel, one image"], 4, *flags)[1:]

    broken = random_case(num_voxels=20, batch=4)
    for image, bad in enumerate((torch.nan, torch.inf, 1e30)):
        broken.vertices[image] = bad
    results["broken"] = _both_ways(broken, 4, True, True)

    results["rigidity"] = _rigidity()
    return results


def _rigidity():
    mesh, moved = twisted_bodies()
    tensors = rigidity.RigidityTensors.from_mesh(mesh)
    return rigidity_cuda.energy_and_gradient(
        moved, tensors.cells, tensors.gradients_1_per_A, tensors.weight, rigidity.NEWTON_STEPS, rigidity.DEGENERATE
    )


def _both_ways(case, taps, need_values, need_vertices):
    images = cuda.splat(case.values, case.vertices, *case.mesh(), case.grid, taps)
    both = cuda.splat_adjoint(
        case.grad_images, case.values, case.vertices, *case.mesh(), taps, (need_values, need_vertices)
    )
    return images, *both


class _H200:
    """The driver of a device that is not there: names to the compiler what to compile for."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class _Compiled:
    """Instead of a kernel: compiles what would be launched, and keeps the PTX in ``texts``."""

    def __init__(self, kernel, texts: dict[str, str], name: str):
        self.kernel, self.texts, self.name = kernel, texts, name

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.texts.__setitem__(
            self.name, self.kernel.warmup(*arguments, grid=grid, **options).asm["ptx"]
        )


def compile_kernels() -> dict[str, str]:
    """PTX of each kernel, as a GPU would get it from the backend's own calls."""
    triton.runtime.driver.set_active(_H200())
    texts: dict[str, str] = {}
    splat, adjoint, fold = cuda.splat_kernel, cuda.adjoint_kernel, cuda.fold_kernel
    cuda.has_vector_atomics = lambda device: True
    for taps in (2, 4):
        cuda.splat_kernel = _Compiled(splat, texts, f"splat {taps}")
        cuda.fold_kernel = _Compiled(fold, texts, f"fold {taps}")
        cuda.adjoint_kernel = _Compiled(adjoint, texts, f"adjoint {taps}")
        _both_ways(CASES["centred"], taps, True, True)
    rigidity_cuda.energy_kernel = _Compiled(rigidity_cuda.energy_kernel, texts, "rigidity")
    _rigidity()
    return texts


if __name__ == "__main__":
    torch.save({"interpret": interpret, "compile": compile_kernels}[sys.argv[1]](), sys.argv[2])
