"""The rigidity energy and its gradient by the vertices in one pass over the cells: numba, CPU, float32.

A thread owns a whole set of vertices, so results do not depend on the number of threads. Formulae: ``rigidity.py``.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange

from flexlib.runtime import keeps_compiled, share_threads_with_numba


@njit(cache=keeps_compiled(), fastmath=True, parallel=True)
def _energy_and_gradient(newton_steps, degenerate, vertices, cells, gradients, weight, energy, by_vertex):
    one, two, four, eight = np.float32(1), np.float32(2), np.float32(4), np.float32(8)
    quarter, tiny = np.float32(0.25), np.float32(1e-19)
    for b in prange(vertices.shape[0]):
        total = 0.0
        f = np.empty((3, 3), np.float32)
        cof = np.empty((3, 3), np.float32)
        outer = np.empty((3, 3), np.float32)
        stress = np.empty((3, 3), np.float32)
        for c in range(len(cells)):
            v0, v1, v2, v3 = cells[c, 0], cells[c, 1], cells[c, 2], cells[c, 3]
            for i in range(3):
                e1 = vertices[b, v1, i] - vertices[b, v0, i]
                e2 = vertices[b, v2, i] - vertices[b, v0, i]
                e3 = vertices[b, v3, i] - vertices[b, v0, i]
                for j in range(3):
                    f[i, j] = e1 * gradients[c, 1, j] + e2 * gradients[c, 2, j] + e3 * gradients[c, 3, j]
            n = m = np.float32(0)
            for i in range(3):
                i1, i2 = (i + 1) % 3, (i + 2) % 3
                for j in range(3):
                    j1, j2 = (j + 1) % 3, (j + 2) % 3
                    cof[i, j] = f[i1, j1] * f[i2, j2] - f[i1, j2] * f[i2, j1]
                    n += f[i, j] * f[i, j]
                    m += cof[i, j] * cof[i, j]
            det8 = eight * (f[0, 0] * cof[0, 0] + f[0, 1] * cof[0, 1] + f[0, 2] * cof[0, 2])
            constant = n * n - four * m
            root = np.sqrt(np.float32(3) * n)
            for _ in range(newton_steps):
                square = root * root
                slope = max(four * root * (square - n) - det8, tiny)
                root -= (((square - two * n) * root - det8) * root + constant) / slope
            square = root * root
            scale = one / max(root * (square - n) - quarter * det8, degenerate * n * np.sqrt(n) + tiny)
            for i in range(3):
                for j in range(3):
                    outer[i, j] = f[i, 0] * f[j, 0] + f[i, 1] * f[j, 1] + f[i, 2] * f[j, 2]
            w = weight[c]
            for i in range(3):
                for j in range(3):
                    cubic = outer[i, 0] * f[0, j] + outer[i, 1] * f[1, j] + outer[i, 2] * f[2, j]
                    rotation = ((square + n) * f[i, j] + two * root * cof[i, j] - two * cubic) * scale
                    strain = f[i, j] - rotation
                    total += w * strain * strain
                    stress[i, j] = two * w * strain
            for i in range(3):
                t0 = np.float32(0)
                for k in range(1, 4):
                    t = (
                        stress[i, 0] * gradients[c, k, 0]
                        + stress[i, 1] * gradients[c, k, 1]
                        + stress[i, 2] * gradients[c, k, 2]
                    )
                    by_vertex[b, cells[c, k], i] += t
                    t0 += t
                by_vertex[b, v0, i] -= t0
        energy[b] = total


def energy_and_gradient(
    vertices: torch.Tensor,
    cells: torch.Tensor,
    gradients: torch.Tensor,
    weight: torch.Tensor,
    newton_steps: int,
    degenerate: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Energy (b,) and its gradient (b, nv, 3) at ``vertices`` (b, nv, 3) A; the rest as in ``RigidityTensors``."""
    share_threads_with_numba()
    energy = torch.empty(len(vertices))
    by_vertex = torch.zeros(vertices.shape)
    arrays = [t.detach().contiguous().numpy() for t in (vertices, cells, gradients, weight)]
    arrays += [energy.numpy(), by_vertex.numpy()]
    _energy_and_gradient(newton_steps, np.float32(degenerate), *arrays)
    return energy, by_vertex
