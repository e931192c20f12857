"""The shape of the canonical map: what all particles share of their motion belongs to the map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from flexlib.imaging.masks import TRAINING_FLOOR, inside_mask
from flexlib.model.views import ROTATION, SHIFT, PoseFrame, mean_rigid_motion, rotation_matrices
from flexlib.projection.op import gather_volume
from flexlib.tetra.deform import deform_volume
from flexlib.tetra.gradients import directional_derivative
from flexlib.tetra.tetmesh import TetraMesh
from flexlib.train.gauge import rigid_part
from flexlib.train.map_pass import map_pass
from flexlib.train.setup import Setup
from flexlib.train.state import State
from flexlib.train.views import Views

SETTLING_STEPS = (4.0, 1.2, 0.4)  # Newton steps of the map in the passes after its shape has been settled


@torch.no_grad()
def settle_shape(setup: Setup, state: State) -> None:
    """Give the map the shape that the flow has at the mean latents, and no mean motion.

    Deforming the density in every particle and in the map the other way changes no image, so that nothing holds the
    map's shape while it is learnt: it strays by some A from that of any particle, off the mask that was made for the
    molecule. A reconstruction in a shape that was 3 A rms off lost a third of its signal-to-noise ratio at 12 A.
    Afterwards the mean latents are displaced by no more than a rigid-body motion, such that the mean translation and
    rotation of the density over the particles is zero. (All mean displacement cannot be zero: the mean of a swinging
    arm is shorter than the arm.) The map is carried along, and refined where it came to lie.
    """
    removed_A = _take_out_mean_shape(setup, state)
    if state.views.refines_poses:
        removed_A = removed_A + take_out_mean_pose(setup, state.views, state.latents, state.all_particles())
    inside = inside_mask(setup.mask.data, TRAINING_FLOOR).astype(np.float32)
    pixel_size_A = setup.source.pixel_size_A
    moved = deform_volume(state.canonical.volume(), pixel_size_A, inside, setup.mesh, removed_A.cpu().numpy())
    state.canonical.values = gather_volume(torch.as_tensor(moved, device=setup.device), setup.operator.voxels)
    _carry_parts(setup, state, inside, removed_A)
    refine_map(setup, state, SETTLING_STEPS)


def _carry_parts(setup: Setup, state: State, inside: np.ndarray, moved_A: torch.Tensor) -> None:
    """Carry the parts along with the map."""
    occupancy, pixel_size_A, field_A = state.occupancy, setup.source.pixel_size_A, moved_A.cpu().numpy()
    labels = torch.zeros_like(occupancy.labels)
    for number in range(1, len(occupancy) + 1):
        own = (occupancy.labels == number).cpu().numpy() * inside
        carried = deform_volume(own, pixel_size_A, inside, setup.mesh, field_A) > 0.5
        labels[torch.as_tensor(carried, device=setup.device)] = number
    occupancy.take(labels, occupancy.share)


@torch.no_grad()
def refine_map(setup: Setup, state: State, newton_steps: Sequence[float]) -> None:
    """Refine the map with flow, latents and views as they stand, in as many passes over the training rows."""
    model, probability = state.moving_map(setup.operator, None), state.junk.probability()

    def parameters(rows: np.ndarray) -> torch.Tensor:
        return state.parameters(setup.rows_on_device(rows))

    for number, steps in enumerate(newton_steps):
        order = np.random.default_rng((setup.settings.seed, 9, number)).permutation(setup.training_rows)
        rate = steps / setup.schedule.num_batches
        map_pass(setup, state.canonical, model, order, rate, probability, parameters)


def _take_out_mean_shape(setup: Setup, state: State) -> torch.Tensor:
    """Take the displacement at the mean latents, and all mean rigid-body motion, out of the flow; it is returned.

    The flow's fields are carried along by it: (nv, 3) in Angstrom.
    """
    flow, bias, has_rigid = state.flow, state.flow.output.bias, not state.views.refines_poses
    before = bias.clone()
    moving = state.latents[state.all_particles()]
    bias.sub_(flow.coefficients(moving.mean(0, keepdim=True))[0])
    if has_rigid:
        mean_A = torch.zeros_like(setup.operator.vertices_A)
        for latents in moving.split(1000):
            mean_A += flow(latents).sum(0) / len(moving)
        bias[-6:].sub_(rigid_part(flow, setup.density_share, mean_A))
    removed_A = ((before - bias) @ flow.basis_A.flatten(1)).view(-1, 3)
    carried = torch.as_tensor(carried_fields(setup.mesh, flow.basis_A, removed_A), device=setup.device)
    flow.output.weight.copy_(carried.T @ flow.output.weight)
    flow.linear.copy_(flow.linear @ carried)
    bias.copy_(bias @ carried)
    return removed_A


def take_out_mean_pose(setup: Setup, views: Views, latents: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Take what the poses' changes of ``rows`` have in common, in the volume's frame, out of all.

    The map may as well have it, and no refinement knows which. Returns the displacement (nv, 3) in Angstrom that the
    map is to have instead.
    """
    assert views.prior is not None
    own = views.own(latents, setup.rotation)
    common = mean_rigid_motion(setup.rotation[rows], own[rows, ROTATION], own[rows, SHIFT]).float()
    frame = views.prior.frame or PoseFrame.at_rest(latents.shape[1], setup.device)
    views.prior = replace(views.prior, frame=frame.moved(-common))
    moved = setup.operator.vertices_A @ rotation_matrices(common[None, :3])[0].T + common[3:]
    return moved - setup.operator.vertices_A


def carried_fields(mesh: TetraMesh, basis_A: torch.Tensor, shift_A: torch.Tensor) -> np.ndarray:
    """(m, m) float32: each basis field, carried along by the field ``shift_A`` (nv, 3), in terms of the basis.

    What was at x comes to x + shift. To first order the carried field is that at ``x - shift``; the basis is then
    fitted to it.
    """
    directed = directional_derivative(mesh, shift_A.cpu().numpy())
    num = len(mesh.vertices_A)
    fields = basis_A.cpu().double().numpy()  # (m, nv, 3)
    change = directed @ fields.transpose(1, 0, 2).reshape(num, -1)
    carried = fields - change.reshape(num, len(fields), 3).transpose(1, 0, 2)
    flat = fields.reshape(len(fields), -1)
    fitted = np.linalg.solve(flat @ flat.T, flat @ carried.reshape(len(fields), -1).T)
    return fitted.T.astype(np.float32)
