"""The end of a run: every particle's latents with the finished model, axes of motion, and the final score."""

from __future__ import annotations

import logging

import numpy as np
import torch
from scipy import sparse

from flexlib.images.batch import read_ahead, split_batches
from flexlib.imaging.image_transforms import plane_weight
from flexlib.imaging.masks import TRAINING_FLOOR, inside_mask
from flexlib.model.forward import log_likelihood_loss
from flexlib.projection.op import gather_volume, scatter_volume
from flexlib.tetra.deform import deform_volume
from flexlib.tetra.tetmesh import TetraMesh
from flexlib.train.epoch import measure_ratio, moving_map, rigid_part, score_now, standardise, valley_centres
from flexlib.train.latents import infer_everywhere
from flexlib.train.motion import slope_A
from flexlib.train.score import HeldOutScore
from flexlib.train.start import standard_scale
from flexlib.train.state import BAND_EPOCHS, Setup, State

logger = logging.getLogger(__name__)

SIGNIFICANT = 3.0  # standard errors of held-out gain below which no motion is claimed
LEAST_GAIN_NATS = 0.5  # nor below this: of 150 held-out rigid particles it has come out as 0.25 +- 0.08
SETTLING_STEPS = (4.0, 1.2, 0.4)  # Newton steps of the map in the passes after its shape has been settled
FINAL_STEPS = 4  # of Levenberg-Marquardt, with the finished flow and map


@torch.no_grad()
def infer_all(setup: Setup, state: State) -> torch.Tensor:
    """Infer every particle's latents with the final model and turn them to axes of decreasing motion.

    Returns the posterior precision (n, K, K) in the final coordinates.
    """
    dims, device = setup.settings.latent_dims, setup.device
    weight = plane_weight(setup.source.box, setup.band(BAND_EPOCHS)).to(device)
    precision = torch.zeros((len(setup.source), dims, dims), device=device)
    if not setup.settings.freeze_latents:
        state.latents[torch.as_tensor(setup.validation_rows, device=device)] = state.held_latents
    num, mine = len(setup.source), setup.group.part(len(setup.source))
    own_batches = split_batches(np.arange(num)[mine], setup.batch_size)
    centres = None if setup.settings.freeze_latents else valley_centres(setup, state)
    model = moving_map(setup, state)
    for number, batch in enumerate(read_ahead(setup.source, own_batches, device)):
        rows = torch.as_tensor(batch.rows, device=device)
        if number == 0:
            model = measure_ratio(setup, state, model, batch, weight, state.latents[rows])
        if centres is None:
            information = model.information(batch, weight, state.latents[rows])
            precision[rows] = information + setup.prior.curvature(state.latents[rows])
        else:
            posterior = infer_everywhere(model, batch, weight, state.latents[rows], FINAL_STEPS, centres, setup.prior)
            state.latents[rows], precision[rows] = posterior.latents, posterior.precision
            information = posterior.precision - setup.prior.curvature(posterior.latents)
        state.information[rows] = information
    for rows_of_all in (state.latents, precision, state.information):
        rows_of_all.copy_(setup.group.gather(rows_of_all[mine], num))
    if state.given_latents is not None:
        scale, offset = standard_scale(state.given_latents)[1]
        state.flow.rescale_latents(torch.diag(1 / scale), -offset / scale)
        state.latents = state.given_latents
        state.held_latents = state.latents[torch.as_tensor(setup.validation_rows, device=device)]
        return precision / (scale[:, None] * scale)
    if setup.settings.freeze_latents:
        return precision
    offset, scale = standardise(setup, state)
    turn = _axes_of_motion(setup, state)
    state.flow.rescale_latents(turn, torch.zeros(dims, device=device))
    state.latents, state.held_latents = state.latents @ turn, state.held_latents @ turn
    back = scale @ turn
    return back.T @ precision @ back


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
    flow, bias = state.flow, state.flow.output.bias
    before = bias.clone()
    bias.sub_(flow.coefficients(state.latents.mean(0, keepdim=True))[0])
    mean_A = torch.zeros_like(setup.operator.vertices_A)
    for latents in state.latents.split(1000):
        mean_A += flow(latents).sum(0) / len(state.latents)
    bias[-6:].sub_(rigid_part(setup, state, mean_A))
    removed_A = ((before - bias) @ flow.basis_A.flatten(1)).view(-1, 3)
    carried = torch.as_tensor(_carried_fields(setup.mesh, flow.basis_A, removed_A), device=setup.device)
    flow.output.weight.copy_(carried.T @ flow.output.weight)
    flow.linear.copy_(flow.linear @ carried)
    bias.copy_(bias @ carried)
    inside = inside_mask(setup.mask.data, TRAINING_FLOOR).astype(np.float32)
    pixel_size_A = setup.source.pixel_size_A
    moved = deform_volume(state.canonical.volume(), pixel_size_A, inside, setup.mesh, removed_A.cpu().numpy())
    state.canonical.values = gather_volume(torch.as_tensor(moved, device=setup.device), setup.operator.voxels)
    for number, newton_steps in enumerate(SETTLING_STEPS):
        _refine_map(setup, state, newton_steps, number)


def _carried_fields(mesh: TetraMesh, basis_A: torch.Tensor, shift_A: torch.Tensor) -> np.ndarray:
    """(m, m) float32: each basis field, carried along by the field ``shift_A`` (nv, 3), in terms of the basis.

    What was at x comes to x + shift. To first order the carried field is that at ``x - shift``, with the gradients of
    a vertex' cells averaged by volume; the basis is then fitted to it.
    """
    corners = mesh.vertices_A[mesh.cells]
    edges = (corners[:, 1:] - corners[:, :1]).transpose(0, 2, 1)
    gradients = np.linalg.inv(edges)  # of the barycentric coordinates 1 to 3
    gradients = np.concatenate([-gradients.sum(1, keepdims=True), gradients], axis=1)  # (nc, 4, 3)
    volumes = np.abs(np.linalg.det(edges))
    share = volumes[:, None] / np.bincount(mesh.cells.ravel(), np.repeat(volumes, 4))[mesh.cells]  # (nc, 4)
    along = np.einsum("ckd,cvd->cvk", gradients, shift_A.cpu().numpy()[mesh.cells]) * share[:, :, None]
    rows, columns = np.repeat(mesh.cells, 4, axis=1), np.tile(mesh.cells, (1, 4))
    num = len(mesh.vertices_A)
    directed = sparse.csr_matrix((along.ravel(), (rows.ravel(), columns.ravel())), shape=(num, num))
    fields = basis_A.cpu().double().numpy()  # (m, nv, 3)
    change = directed @ fields.transpose(1, 0, 2).reshape(num, -1)
    carried = fields - change.reshape(num, len(fields), 3).transpose(1, 0, 2)
    flat = fields.reshape(len(fields), -1)
    fitted = np.linalg.solve(flat @ flat.T, flat @ carried.reshape(len(fields), -1).T)
    return fitted.T.astype(np.float32)


def _refine_map(setup: Setup, state: State, newton_steps: float, number: int) -> None:
    """One pass over the training particles in which the map alone moves."""
    order = np.random.default_rng((setup.settings.seed, 9, number)).permutation(setup.training_rows)
    band, flow = setup.band(BAND_EPOCHS), state.flow.assembled()
    weight = plane_weight(setup.source.box, band).to(setup.device)
    batches = split_batches(order, setup.batch_size)
    own_batches = [setup.group.share(rows) for rows in batches]
    for rows, batch in zip(batches, read_ahead(setup.source, own_batches, setup.device), strict=True):
        values = state.canonical.values.clone().requires_grad_()
        with torch.enable_grad():
            displacements_A = flow(state.latents[torch.as_tensor(batch.rows, device=setup.device)])
            loss = log_likelihood_loss(setup.operator, values, batch, displacements_A, weight).sum()
            (gradient,) = torch.autograd.grad(loss, values)
        setup.group.add(gradient)
        state.canonical.step(gradient, len(rows) / len(order), min(newton_steps / len(batches), 0.3), band)


def final_score(setup: Setup, state: State) -> tuple[HeldOutScore, HeldOutScore | None]:
    """The held-out score of the finished model. Where it confirms no motion the model is set to rest.

    Its gain over the rigid model is then zero, for it is the rigid model; the score that did not convince comes second.
    """
    score = score_now(setup, state, steps=3, search=True)
    if not score.gain < max(SIGNIFICANT * score.standard_error, LEAST_GAIN_NATS):
        return score, None
    logger.warning(
        "held-out gain %.2f +- %.2f nats: the particles kept out of training confirm no motion, so the flow is set "
        "to zero; latents are noise",
        score.gain,
        score.standard_error,
    )
    state.flow.stand_still()
    rigid_map = scatter_volume(state.rigid_values, setup.rigid.voxels)
    state.canonical.values = gather_volume(rigid_map, setup.operator.voxels)
    return HeldOutScore(np.zeros_like(score.gains), score.latents), score


@torch.no_grad()
def _axes_of_motion(setup: Setup, state: State, probe: float = 0.1) -> torch.Tensor:
    """(K, K) rotation of latent space to axes of decreasing rms displacement; ``old = turn @ new``."""
    dims = setup.settings.latent_dims
    used = state.latents[torch.as_tensor(setup.training_rows[:300], device=setup.device)]
    slope = torch.stack([slope_A(setup, state, used, axis, probe).flatten() for axis in range(dims)])
    _, axes = torch.linalg.eigh((slope @ slope.T).double())
    axes = axes.flip(1)
    largest = axes.abs().argmax(0)
    return (axes * torch.sign(axes[largest, torch.arange(dims)])).float()
