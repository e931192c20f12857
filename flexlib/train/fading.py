"""The search for parts of the molecule that some particles lack: changes of the density's amplitude.

As the spectral start looks for motion at rest, so this looks for fading with the motion known: the forces of residual
images on smooth changes of the density's amplitude, at each particle's own latents and view, freed of what poses,
contrast and further motion explain as well. In units of noise, directions whose variance stands above the noise edge
are looked at one by one: where their scores, back-projected, change the density in one compact place, that place is a
part, and it is tried whether the particles fall into some that have it and some that lack it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import ndimage, sparse
from scipy.sparse.linalg import eigsh

from flexlib.images.batch import ImageBatch, read_ahead, split_batches
from flexlib.model.moving_map import MovingMap
from flexlib.tetra.tetmesh import TetraMesh
from flexlib.train.fields import SPECTRAL_MODES, rigid_fields
from flexlib.train.setup import Setup
from flexlib.train.spectral import FieldForces, FourierSampling, mean_information, principal_components
from flexlib.train.state import State

logger = logging.getLogger(__name__)

MOST_FIELDS = 150  # of amplitude
MOST_ROWS = 20_000  # that are searched
ROWS_PER_FIELD = 20  # fewer fields where there are fewer particles: the noise edge stays at 1.5
SMOOTH_A = 20.0  # resolution at which a part is cut out
MOST_MASS = 0.25  # of the molecule, in a part: what is larger has no rest that tells it from contrast
_TANGENT = 0.1  # step by a latent, of its displacement field
_LEAST_DENSITY = 1e-3  # of the mean a vertex, so that empty vertices are no modes of their own
_PLATEAU_STEPS = 5


@dataclass(frozen=True)
class Component:
    """A change of amplitude that some particles have more of than others."""

    eigenvalue: float  # in units of the noise
    score: torch.Tensor  # (n,) of the rows looked at, unit variance


def searched_rows(setup: Setup) -> np.ndarray:
    """The training rows that the search looks at: up to ``MOST_ROWS``, evenly spaced."""
    rows = setup.training_rows
    return rows[:: -(-len(rows) // MOST_ROWS)]


def amplitude_fields(mesh: TetraMesh, density_share: np.ndarray, num: int) -> np.ndarray:
    """(nv, m) float32 smooth functions on the mesh: the low modes of its graph, weighted by density.

    Neighbours are tied as strongly as both have density, and a mode's size is measured by density, so that modes vary
    over the molecule and not around it. The constant, which is the contrast's, is left out.

    Parameters
    ----------
    mesh, density_share
        With nv vertices, and the (nv,) share of the density that rides on each.
    num
        m, at most.
    """
    size = len(density_share)
    floor = _LEAST_DENSITY / size
    pairs = [mesh.cells[:, [a, b]] for a in range(4) for b in range(a)]
    edges = np.unique(np.sort(np.concatenate(pairs), axis=1), axis=0)
    tie = np.sqrt(density_share[edges[:, 0]] * density_share[edges[:, 1]]) + floor
    upper = sparse.coo_matrix((tie, (edges[:, 0], edges[:, 1])), shape=(size, size))
    ties = (upper + upper.T).tocsc()
    laplacian = sparse.diags(np.asarray(ties.sum(1)).ravel()) - ties
    mass = sparse.diags(density_share + floor)
    count = min(num + 1, size - 2)
    start = np.random.default_rng(0).standard_normal(size)
    values, modes = eigsh(laplacian.tocsc(), k=count, M=mass.tocsc(), sigma=-1e-3, v0=start)
    return modes[:, np.argsort(values)[1:]].astype(np.float32)


def residual_view(
    model: MovingMap, batch: ImageBatch, weight: torch.Tensor, parameters: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, ImageBatch]:
    """What b images say beyond the model at ``parameters`` (b, P).

    Returns
    -------
    back
        (b, box, box//2+1) residuals times conjugate transfer, within the band: their back-projection is minus the
        gradient of the loss by the map.
    vertices_px
        (b, nv, 2) where the mesh is seen.
    seen
        The batch as it is seen, contrasts in the transfer functions.
    """
    seen = model.seen(batch, parameters)
    if seen.contrast is not None:
        seen = replace(seen, transfer=seen.transfer * seen.contrast[:, None, None], contrast=None)
    vertices_px = model.operator.vertices_px(seen, model.displacements_A(parameters))
    residual = seen.images - seen.transfer * model.operator.project(model.values, vertices_px)
    return residual * seen.transfer.conj() * (weight > 0), vertices_px, seen


@torch.no_grad()
def amplitude_forces(setup: Setup, state: State, factors: torch.Tensor) -> FieldForces:
    """Forces of the searched rows on the amplitudes ``factors`` (m, nvox), freed of poses, contrast and motion.

    Motion is that along each latent, at the mean latents, and the softest elastic modes: what the flow has not learnt,
    or has not told of this particle.
    """
    model, weight = state.moving_map(setup.operator, None), setup.weight(setup.schedule.full_band)
    operator, basis_A = setup.operator, state.flow.basis_A
    fields_A = torch.cat([basis_A[:SPECTRAL_MODES], _tangents_A(state), rigid_fields(operator.vertices_A)])
    density, rows = (factors * model.values).T.contiguous(), searched_rows(setup)
    own_rows, found = setup.ranks.share(rows), []
    sampling = FourierSampling(setup.source.box, setup.schedule.full_band)
    every, first = max(1, len(rows) // 2000), setup.ranks.part(len(rows)).start
    for batch in read_ahead(setup.source, split_batches(own_rows, setup.batch_size), setup.device):
        parameters = state.parameters(setup.rows_on_device(batch.rows))
        back, vertices_px, seen = residual_view(model, batch, weight, parameters)
        views = zip(back.split(1), vertices_px.split(1), strict=True)
        of_voxels = torch.stack([operator.project_adjoint(*view) for view in views])
        spatial = _vertex_forces(model, back, vertices_px, weight) @ seen.rotation[:, :2] / operator.pixel_size_A
        of_motion, of_contrast = spatial.flatten(1) @ fields_A.flatten(1).T, of_voxels @ model.values
        found.append(torch.cat([of_voxels @ density, of_motion, of_contrast[:, None]], 1))
        sampling.add(seen, slice((-first) % every, None, every))
        first += len(batch.rows)
    sampling.add_up(setup.ranks)
    of_all = setup.ranks.gather(torch.cat(found), len(rows))
    force = (of_all - of_all.mean(0)).cpu().numpy()

    def information() -> np.ndarray:
        whole = mean_information(operator, model.values, fields_A, sampling, contrast=True, amplitudes=factors)
        order = np.r_[len(fields_A) : len(whole) - 1, : len(fields_A), len(whole) - 1]
        return whole[np.ix_(order, order)]

    probability = state.junk.probability(setup.rows_on_device(rows)).cpu().numpy()
    return FieldForces(force, setup.ranks.from_first(information)).weighed(probability).freed_of(len(factors))


def _vertex_forces(
    model: MovingMap, back: torch.Tensor, vertices_px: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """(b, nv, 2) forces on the vertices in their views, of residuals as ``residual_view`` gives them."""
    with torch.enable_grad():
        moving = vertices_px.detach().requires_grad_()
        slices = model.operator.project(model.values, moving)
        agreement = (weight * (slices.real * back.real + slices.imag * back.imag)).sum()
        (force,) = torch.autograd.grad(agreement, moving)
    return force


def _tangents_A(state: State) -> torch.Tensor:
    """(K, nv, 3) displacement by each latent at the mean latents."""
    middle, flow = state.latents.mean(0), state.flow.assembled()
    step = _TANGENT * torch.eye(len(middle), device=middle.device)
    return (flow(middle + step) - flow(middle - step)) / (2 * _TANGENT)


def leading_components(forces: FieldForces) -> tuple[list[Component], float]:
    """The principal components of the forces in units of their noise that stand above its edge, and the edge."""
    variance, directions, edge = principal_components(forces)
    num = int((variance > edge).sum())
    scores = forces.force.astype(np.float64) @ (directions[:, :num] / np.sqrt(variance[:num]))
    return [Component(float(variance[k]), torch.as_tensor(scores[:, k]).float()) for k in range(num)], edge


@torch.no_grad()
def component_maps(setup: Setup, state: State, scores: torch.Tensor) -> list[np.ndarray]:
    """(box, box, box) changes of the density by one unit of each of ``scores`` (c, n) of the searched rows.

    Scores have zero mean and unit size.

    The score-weighted residuals, back-projected and divided by the data's weight of each shell, as the map's own steps.
    """
    model, weight = state.moving_map(setup.operator, None), setup.weight(setup.schedule.full_band)
    canonical, rows = state.canonical, searched_rows(setup)
    total = model.values.new_zeros((len(scores), len(model.values)))
    mine = setup.ranks.part(len(rows))
    batches = split_batches(rows[mine], setup.batch_size)
    weighed = scores.to(total) * state.junk.probability(setup.rows_on_device(rows))
    parts = weighed[:, mine].split([len(batch) for batch in batches], 1)
    for batch, some in zip(read_ahead(setup.source, batches, setup.device), parts, strict=True):
        back, vertices_px, _ = residual_view(model, batch, weight, state.parameters(setup.rows_on_device(batch.rows)))
        for own, score in zip(total, some, strict=True):
            own += setup.operator.project_adjoint(back * score[:, None, None], vertices_px)
    setup.ranks.add(total)
    total *= len(setup.training_rows) / len(rows)
    return [canonical.newton_change(own, setup.schedule.full_band).cpu().numpy() for own in total]


def cut_part(change: np.ndarray, density: np.ndarray, inside: np.ndarray, pixel_size_A: float) -> np.ndarray | None:
    """The part of the molecule in which a component changes the density by much the same factor.

    The factor is a regression of ``change`` on ``density`` within ``SMOOTH_A``. The part is where it is more than half
    of its plateau, the mean over the part: a sharp edge, blurred, passes a half where it was.

    Parameters
    ----------
    change, density
        (N, N, N) of the component and of the map.
    inside
        (N, N, N) bool, where the map has density.
    pixel_size_A
        Of a voxel.

    Returns
    -------
    part
        (N, N, N) bool, in one piece; None where it would hold more than ``MOST_MASS`` of the density.
    """
    sigma = SMOOTH_A * np.sqrt(np.log(2) / 2) / np.pi / pixel_size_A  # a half at SMOOTH_A
    floor = 0.1 * np.mean(density[inside] ** 2)
    together, alone = (ndimage.gaussian_filter(density * other, sigma) for other in (change, density))
    factor = np.where(inside, together / (alone + floor), 0.0)
    factor = factor if factor.max() > -factor.min() else -factor
    peak, level = np.unravel_index(factor.argmax(), factor.shape), float(factor.max())
    mass = np.clip(density, 0.0, None)
    for _ in range(_PLATEAU_STEPS):
        pieces, _ = ndimage.label(factor > 0.5 * level)
        part = pieces == pieces[peak]
        if mass[part].sum() > MOST_MASS * mass.sum():
            return None
        level = float(np.average(factor[part], weights=mass[part] + 1e-6 * mass.max()))
    return part
