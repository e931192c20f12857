"""How far a flow moves the density, over particles and along latents."""

from __future__ import annotations

import numpy as np
import torch

from flexlib.model.motion import mean_rms_displacement_A
from flexlib.train.setup import Setup
from flexlib.train.state import State


@torch.no_grad()
def rms_displacement_A(setup: Setup, state: State, sample: int | None = None) -> float:
    """Rms distance in A by which density moves about its mean position; of the first ``sample`` training rows, or all.

    The number of validation.json, and the one that the report gives.
    """
    used = state.latents[state.particles_of(setup.rows_on_device(setup.training_rows[:sample]))]
    return mean_rms_displacement_A(state.flow.assembled(), used, setup.density_share)


@torch.no_grad()
def rms_per_unit_A(setup: Setup, state: State) -> list[float]:
    """Rms distance in A by which density moves per unit of each latent, over particles."""
    probe = 0.05 * float(state.latents.std().clamp(min=1e-12))  # frozen latents keep their own scale
    used = state.latents[state.particles_of(setup.rows_on_device(setup.training_rows[:500]))]
    slopes = [slope_A(setup, state, used, axis, probe) for axis in range(used.shape[1])]
    return [round(float((slope**2).sum((1, 2)).mean().sqrt()), 4) for slope in slopes]


@torch.no_grad()
def motion_coordinates_A(setup: Setup, state: State) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (n, K) in which distance is motion, and the part (K,) of all motion that each of them holds.

    The displacement fields of all particles, by density, are projected on their K leading principal axes: the distance
    of two particles is the rms distance in A by which density moves between them, as far as K axes can hold it. Turned
    so, large swings lie on arcs, and nothing depends on how latent space is stretched.
    """
    dims, root = setup.settings.latent_dims, setup.density_share.sqrt()[:, None]
    rows = state.particles_of(setup.rows_on_device(setup.training_rows))
    sample = state.flow(state.latents[rows[:: max(1, len(rows) // 500)]]) * root
    mean = sample.mean(0)
    _, size, axes = torch.linalg.svd((sample - mean).flatten(1), full_matrices=False)
    chunks = torch.split(state.latents, 1000)
    coordinates = torch.cat([((state.flow(chunk) * root) - mean).flatten(1) @ axes[:dims].T for chunk in chunks])
    share = (size**2 / (size**2).sum().clamp(min=1e-30))[:dims]
    return coordinates.cpu().numpy(), share.cpu().numpy()


def slope_A(setup: Setup, state: State, latents: torch.Tensor, axis: int, probe: float) -> torch.Tensor:
    """(b, nv, 3) displacement in A per unit of latent ``axis``, times the root of each vertex's share of density."""
    shift = torch.zeros_like(latents)
    shift[:, axis] = probe
    change = (state.flow(latents + shift) - state.flow(latents - shift)) / (2 * probe)
    return change * setup.density_share.sqrt()[:, None]
