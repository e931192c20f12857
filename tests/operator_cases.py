"""Small inputs on which a GPU backend must agree with the reference: the operator's edges, and rigidity's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from flexlib.projection import reference
from flexlib.tetra.rigidity import RigidityTensors, deformation_gradients, rigidity_energy
from flexlib.tetra.tetmesh import TetraMesh


@dataclass(frozen=True)
class Case:
    """Arguments of the operator, float32; ``grad_images`` is what its adjoint is given."""

    values: torch.Tensor
    vertices: torch.Tensor
    cells: torch.Tensor
    cell: torch.Tensor
    bary: torch.Tensor
    grad_images: torch.Tensor

    @property
    def grid(self) -> int:
        return self.grad_images.shape[-1]

    def mesh(self) -> tuple[torch.Tensor, ...]:
        return self.cells, self.cell, self.bary

    def to(self, device: str, dtype: torch.dtype = torch.float32) -> Case:
        kept = (self.cells.to(device), self.cell.to(device))
        changed = (t.to(device, dtype) for t in (self.values, self.vertices, self.bary, self.grad_images))
        values, vertices, bary, grad_images = changed
        return Case(values, vertices, *kept, bary, grad_images)


def random_case(
    num_voxels: int = 50, batch: int = 3, grid: int = 14, num_cells: int = 9, spread: float = 4.0, shift: float = 0.0
) -> Case:
    """Voxels in random cells of ``num_cells``, sorted by cell, their vertices ``spread`` px around ``shift``."""
    generator = np.random.default_rng([num_voxels, batch, grid])
    num_vertices = num_cells + 3
    cells = np.stack([generator.choice(num_vertices, 4, replace=False) for _ in range(num_cells)])
    cell = np.sort(generator.integers(0, num_cells, num_voxels))
    return Case(
        torch.as_tensor(generator.normal(size=num_voxels), dtype=torch.float32),
        torch.as_tensor(shift + spread * generator.normal(size=(batch, num_vertices, 2)), dtype=torch.float32),
        torch.as_tensor(cells, dtype=torch.int32),
        torch.as_tensor(cell, dtype=torch.int32),
        torch.as_tensor(generator.dirichlet(np.ones(4), num_voxels), dtype=torch.float32),
        torch.as_tensor(generator.normal(size=(batch, grid, grid)), dtype=torch.float32),
    )


def seam_case() -> Case:
    """Voxels on, and a rounding error to either side of, whole pixels and the image's edge."""
    grid = 48
    whole = np.array([-96, -48, -1, 0, 1, 47, 48, 96, 4800], np.float32)
    near = np.concatenate([whole, np.nextafter(whole, -np.inf, dtype=np.float32), np.nextafter(whole, np.float32(1e9))])
    near = np.concatenate([near, np.float32([-1e-9, 1e-9, -1e-30, -0.0])])
    num = len(near)
    generator = np.random.default_rng(1)
    # a cell for each position, all its weight on one vertex: the mix of the others adds nothing
    vertices = np.stack([near, near[::-1]], 1)[None]
    cells = (np.arange(num)[:, None] + np.arange(4)) % num
    bary = np.tile(np.float32([1, 0, 0, 0]), (num, 1))
    return Case(
        torch.as_tensor(generator.uniform(1, 2, num), dtype=torch.float32),
        torch.as_tensor(np.ascontiguousarray(vertices)),
        torch.as_tensor(cells, dtype=torch.int32),
        torch.arange(num, dtype=torch.int32),
        torch.as_tensor(bary),
        # smooth, as the derivative of a linear kernel jumps at whole pixels
        torch.ones((1, grid, grid)),
    )


def unsorted_case() -> Case:
    """Voxels that are not in the order of their cells: slower, but as right."""
    case = random_case(num_voxels=30)
    order = torch.as_tensor(np.random.default_rng(2).permutation(30))
    return Case(case.values, case.vertices, case.cells, case.cell[order], case.bary, case.grad_images)


CASES = {
    "centred": random_case(),
    "boxes away": random_case(shift=-61.7),
    "wider than the image": random_case(spread=40.0),
    "one voxel, one image": random_case(num_voxels=1, batch=1),
    "many images": random_case(num_voxels=10, batch=9),
    "one cell": random_case(num_voxels=40, batch=1, num_cells=1),
    "no image": random_case(batch=0),
    "no order": unsorted_case(),
    "seam": seam_case(),
}


def reference_results(case: Case, taps: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, and the gradients by values and vertices, in double precision."""
    case = case.to(str(case.values.device), torch.float64)
    images = reference.splat(case.values, case.vertices, *case.mesh(), case.grid, taps)
    both = reference.splat_adjoint(case.grad_images, case.values, case.vertices, *case.mesh(), taps, (True, True))
    return images, *both


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """L2 norm of the difference over that of ``expected``."""
    assert found.shape == expected.shape
    size = expected.norm()
    return float((found.to(expected) - expected).norm() / (size if size > 0 else 1.0))


def twisted_bodies() -> tuple[TetraMesh, torch.Tensor]:
    """A mesh of loose tetrahedra that share some vertices, and moved vertices (5, nv, 3), some cells inverted."""
    generator = np.random.default_rng(4)
    vertices = generator.uniform(0, 20, (40, 3))
    cells = np.stack([generator.choice(40, 4, replace=False) for _ in range(150)]).astype(np.int32)
    edges = vertices[cells[:, 1:]] - vertices[cells[:, :1]]
    volume = np.linalg.det(edges)
    cells, volume = cells[np.abs(volume) > 300], volume[np.abs(volume) > 300]  # no slivers: they have no gradients
    cells[volume < 0] = cells[volume < 0][:, [1, 0, 2, 3]]
    mesh = TetraMesh(vertices, cells, generator.uniform(0.5, 1, len(cells)), np.zeros(len(cells), np.int32))
    moved = vertices + np.array([0.1, 1.0, 3.0, 8.0, 2.0])[:, None, None] * generator.normal(size=(5, *vertices.shape))
    moved[4] *= np.array([1.0, 1.0, -1.0])
    return mesh, torch.as_tensor(moved, dtype=torch.float32)


def rigidity_results(mesh: TetraMesh, moved: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Energy (b,) and its gradient by the vertices (b, nv, 3), by plain torch in double precision."""
    tensors = RigidityTensors.from_mesh(mesh, moved.device, torch.float64)
    vertices = moved.double().requires_grad_()
    energy = rigidity_energy(deformation_gradients(tensors, vertices), tensors.weight)
    (gradient,) = torch.autograd.grad(energy.sum(), vertices)
    return energy.detach(), gradient


def assert_matches_reference(name: str, case: Case, taps: int, found: Sequence[torch.Tensor]) -> None:
    """Images and both gradients ``found`` for the case of that name, against the float64 reference."""
    # positions are rounded to float32, and a box away from the origin coarser than near it
    bound = 2e-7 * max(10.0, float(case.vertices.abs().max()) if case.vertices.numel() else 0.0)
    images, grad_values, grad_vertices = reference_results(case, taps)
    assert relative_error(found[0], images) < bound
    assert relative_error(found[1], grad_values) < bound
    if name != "seam":  # there the linear kernel's derivative jumps
        assert relative_error(found[2], grad_vertices) < bound
