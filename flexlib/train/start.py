"""How a run begins: from its checkpoint, or with a rigid map and latents from the spectrum, a file or a model."""

from __future__ import annotations

import logging
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flexlib.errors import InputError
from flexlib.files import reading
from flexlib.images.batch import read_ahead, split_batches
from flexlib.imaging.fourier import stored_means
from flexlib.layout import TrainFolder
from flexlib.model.flex_model import FlexModel
from flexlib.model.flow import FlowGenerator
from flexlib.model.moving_map import MovingMap, completed
from flexlib.model.views import CONTRAST, ROTATION, SHIFT, PoseFrame
from flexlib.projection.op import gather_volume
from flexlib.train.canonical import CanonicalMap
from flexlib.train.fields import displacement_basis, rigid_fields, rigidity_precision, spectral_fields
from flexlib.train.initial_latents import InitialLatents, initial_latents, read_own_latents, standard_scale
from flexlib.train.junk import Junk
from flexlib.train.part_search import find_parts, segment_masks
from flexlib.train.parts import Occupancy
from flexlib.train.rigid import refine_rigid_map, rigid_start
from flexlib.train.schedule import FLOW_RATE
from flexlib.train.setup import Setup, canonical_map, derived_seed
from flexlib.train.spectral import FieldForces, SpectralStart, measure_forces, spectral_start
from flexlib.train.state import State
from flexlib.train.views import Views
from flexlib.train.widths import least_widths

logger = logging.getLogger(__name__)

INFORMATION_AT_START = 30.0  # of each latent, until the first mini-batch measures it


def start_or_resume(setup: Setup, checkpoint: Path, identity: dict[str, str], discard_other: bool) -> State:
    """The state that a run goes on from.

    Parameters
    ----------
    setup
        The run.
    checkpoint
        A file; where there is none the run starts anew.
    identity
        What a checkpoint must share with this run.
    discard_other
        Whether a checkpoint of another run is passed over with a warning.

    Raises
    ------
    InputError
        The checkpoint is of another run.
    """
    if not checkpoint.exists():
        return start(setup)
    with reading(checkpoint, RuntimeError, pickle.UnpicklingError, EOFError):
        saved = torch.load(checkpoint, map_location=setup.device, weights_only=True)
    if saved["identity"] == identity:
        return resume(setup, saved)
    differing = ", ".join(k for k in identity if saved["identity"].get(k) != identity[k])
    if not discard_other:
        raise InputError(
            f"{checkpoint}: a checkpoint of another run (different {differing}); delete its folder to train anew"
        )
    logger.warning("%s: of another run (different %s), training anew", checkpoint, differing)
    return start(setup)


def resume(setup: Setup, saved: dict[str, Any]) -> State:
    """The state that a checkpoint holds."""
    num, dims = len(setup.source), setup.settings.latent_dims
    flow, _ = new_flow(setup, saved["flow"]["basis_A"], (num, dims), frame="frame.weight" in saved["flow"])
    canonical = canonical_map(setup, setup.operator, mean_transfer2(setup), inside_only=True)
    spectrum = SpectralStart.from_state_dict(saved["spectrum"])
    empty = InitialLatents(torch.zeros((num, dims)), spectrum.directions)
    views, junk = Views.none(num, len(setup.validation_rows), setup.device), Junk.none(num, setup.device)
    state = new_state(setup, flow, canonical, (saved["rigid_values"], views, junk), spectrum, empty)
    state.restore(saved)
    logger.info("resumed after epoch %d, batch %d", state.epoch, state.step)
    return state


def start(setup: Setup) -> State:
    """The state at epoch 0: rigid map, elastic modes, spectral start."""
    settings = setup.settings
    if not isinstance(settings.occupancy, str):
        segment_masks(setup, settings.occupancy)  # refused before anything is computed
    transfer2 = mean_transfer2(setup)
    rigid, views, junk = rigid_start(setup, transfer2)
    basis = displacement_basis(
        setup.mesh, setup.ranks, setup.device, setup.density_share if views.refines_poses else None
    )
    soft = spectral_fields(len(basis), rigid=not views.refines_poses)
    canonical = canonical_map(setup, setup.operator, transfer2, inside_only=True)
    canonical.values = gather_volume(torch.as_tensor(rigid.volume(), device=setup.device), setup.operator.voxels)
    occupancy = _named_parts(setup, canonical, (rigid.values, views, junk), basis)
    if len(occupancy):
        refine_rigid_map(setup, rigid, (views, junk), occupancy.on(setup.rigid, None))
    forces = _forces(setup, canonical, views, basis[soft], occupancy).weighed(junk.probability().cpu().numpy())
    prior = rigidity_precision(setup.rigidity, setup.operator.vertices_A, basis[soft], setup.rigidity_nats)
    spectrum = setup.ranks.from_first(lambda: spectral_start(forces, settings.latent_dims, prior))
    logger.info(
        "spectral start: leading eigenvalues %s (noise edge %.2f), suggested dims %d",
        " ".join(f"{v:.2f}" for v in spectrum.eigenvalues[:8]),
        spectrum.noise_edge,
        spectrum.suggested_dims,
    )
    flow, drawn = new_flow(setup, basis, (len(setup.source), settings.latent_dims), frame=views.refines_poses)
    initial = initial_latents(settings, setup.particles, drawn, forces, spectrum, prior)
    with torch.no_grad():
        flow.linear[:, soft] = torch.as_tensor(initial.directions, device=setup.device)
    state = new_state(setup, flow, canonical, (rigid.values, views, junk), spectrum, initial)
    state.occupancy = occupancy
    if settings.init_from is not None and settings.init_from.is_dir():
        _continue_from(setup, state, settings.init_from)
    state.follow_first(setup.ranks)
    return state


@torch.no_grad()
def _named_parts(
    setup: Setup, canonical: CanonicalMap, rigid: tuple[torch.Tensor, Views, Junk], basis_A: torch.Tensor
) -> Occupancy:
    """Parts that the settings name, which the map at rest takes over."""
    occupancy = Occupancy.none(setup.source.box, setup.device)
    if isinstance(setup.settings.occupancy, str):
        return occupancy
    num, dims, views = len(setup.source), setup.settings.latent_dims, rigid[1]
    flow, drawn = new_flow(setup, basis_A, (num, dims), frame=views.refines_poses)
    nothing = np.zeros((dims, 0), np.float32)
    spectrum = SpectralStart(np.zeros(0), 0.0, 0, np.zeros((num, 0), np.float32), nothing)
    still = InitialLatents(torch.zeros_like(drawn), nothing)
    state = new_state(setup, flow, canonical, rigid, spectrum, still)
    state.views = views.copy()
    find_parts(setup, state)
    return state.occupancy


def _forces(
    setup: Setup, canonical: CanonicalMap, views: Views, fields_A: torch.Tensor, occupancy: Occupancy
) -> FieldForces:
    """Of all particles on the fields (m, nv, 3), at the first band; parts that they lack are added to their images.

    What a change of poses or contrasts explains as well is no motion: where these are refined, it is taken out.
    """
    mine = split_batches(setup.ranks.share(np.arange(len(setup.source))), setup.pass_size)
    batches = read_ahead(setup.source, mine, setup.device)
    nuisance = rigid_fields(setup.operator.vertices_A) if views.refines_poses else fields_A[:0]
    prior = views.prior
    if prior is not None:
        batches = (
            prior.posed(batch, *_without_latents(views, setup.rows_on_device(batch.rows)), setup.source.pixel_size_A)
            for batch in batches
        )
    parts = occupancy.on(setup.operator, None)
    if parts is not None:
        whole = MovingMap(setup.operator, None, canonical.values, parts=parts)
        batches = (completed(whole, batch, setup.weight(setup.schedule.full_band)) for batch in batches)
    forces = measure_forces(
        setup.operator,
        canonical.values,
        batches,
        len(setup.source),
        torch.cat([fields_A, nuisance]),
        setup.schedule.band(0),
        setup.ranks,
        contrast=prior is not None and prior.log_contrast > 0,
    )
    return forces.freed_of(len(fields_A))


def _without_latents(views: Views, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(b, V) view parameters and (b, 0) latents of rows under the rigid map."""
    return views.units[rows], views.units[rows, :0]


def mean_transfer2(setup: Setup) -> torch.Tensor:
    """(box//2,) mean |transfer|^2 a shell, over a sample of the particles."""
    box = setup.source.box
    sample = setup.training_rows[:: max(1, len(setup.training_rows) // 1000)]
    power = torch.zeros((box, box // 2 + 1), dtype=torch.float64)
    for rows in split_batches(setup.ranks.share(sample), 100):
        power += setup.source.transfer(rows).abs().square().sum(0).double()
    setup.ranks.add(power)
    return (stored_means(power, 2) / len(sample)).float().to(setup.device)


def new_flow(
    setup: Setup, basis: torch.Tensor, drawn: tuple[int, int], frame: bool
) -> tuple[FlowGenerator, torch.Tensor]:
    """A flow on the fields ``basis`` that moves nothing yet, and as many standard normal numbers, (n, K); seeded.

    With ``frame`` it learns that of the poses, too.
    """
    settings = setup.settings
    torch.manual_seed(derived_seed(settings.seed, 4))
    network = settings.latent_dims, settings.layers, settings.hidden_units
    flow = FlowGenerator(basis.cpu(), *network, frame=frame).to(setup.device)
    return flow, torch.randn(drawn)


def new_state(
    setup: Setup,
    flow: FlowGenerator,
    canonical: CanonicalMap,
    rigid: tuple[torch.Tensor, Views, Junk],
    spectrum: SpectralStart,
    initial: InitialLatents,
) -> State:
    """A state at epoch 0; ``rigid`` are the rigid map's values (nvox,), and the views and the junk under it."""
    rigid_values, rigid_views, junk = rigid
    views = _held_at_input(setup, rigid_views) if rigid_views.fitted else rigid_views.copy()
    if views.prior is not None and views.refines_poses:
        frame = replace(PoseFrame.at_rest(setup.settings.latent_dims, setup.device), bend=flow.frame_motion)
        views.prior = replace(views.prior, frame=frame)
    latents = initial.latents.to(setup.device)
    num, dims = latents.shape
    return State(
        flow=flow,
        optimiser=torch.optim.Adam(flow.parameters(), lr=FLOW_RATE, fused=True),
        canonical=canonical,
        latents=latents,
        views=views,
        information=INFORMATION_AT_START * torch.eye(dims + views.num, device=setup.device).repeat(num, 1, 1),
        held_rows=setup.rows_on_device(setup.validation_rows),
        held_latents=latents[setup.rows_on_device(setup.validation_rows)].clone(),
        rigid_values=rigid_values,
        rigid_views=rigid_views,
        junk=junk,
        spectrum=spectrum,
        occupancy=Occupancy.none(setup.source.box, setup.device),
        given_latents=None if initial.given is None else initial.given.to(setup.device),
        log=[],
    )


def _held_at_input(setup: Setup, views: Views) -> Views:
    """A copy with poses as the input has them, and hardly free to change: they were fitted to the images.

    What is learnt from now on is sharper for it, and they are set free once the motion is known (``measure_widths``).
    """
    assert views.prior is not None
    held = views.copy()
    poses = slice(ROTATION.start, SHIFT.stop)
    held.units[:, poses], held.held[:, poses] = 0.0, 0.0
    held.rescale(views.prior.with_widths(torch.cat([least_widths(setup).widths[poses], views.prior.widths[CONTRAST]])))
    return held


def _continue_from(setup: Setup, state: State, train_dir: Path) -> None:
    """Start from the flow and the map of a trained sweep point; its latents have been read already.

    Raises
    ------
    InputError
        Its mesh, latent dims or network differ.
    """
    model = FlexModel.load(train_dir)
    settings = setup.settings
    same_mesh = model.mesh.vertices_A.shape == setup.mesh.vertices_A.shape and np.allclose(
        model.mesh.vertices_A, setup.mesh.vertices_A, atol=1e-3
    )
    shape = (model.latent_dims, len(model.flow.hidden) // 2, model.flow.output.in_features)
    wanted = (settings.latent_dims, settings.layers, settings.hidden_units)
    if not same_mesh or shape != wanted or model.box != setup.source.box:
        raise InputError(
            f"{train_dir}: train.init_from must have this point's mesh, train_box, latent_dims, layers and hidden_units"
        )
    if model.flow.basis_A.shape != state.flow.basis_A.shape:
        raise InputError(
            f"{train_dir}: train.init_from has refined poses and this training does not, or the other way round: "
            "set train.refine_poses to true or false, as there"
        )
    state.flow.load_state_dict(model.flow.state_dict())
    own = read_own_latents(TrainFolder(train_dir).latents, setup.particles, settings.latent_dims)
    scale, offset = standard_scale(own)[1]
    state.rescale_latents(torch.diag(scale).to(setup.device), offset.to(setup.device))
    state.canonical.values = gather_volume(torch.as_tensor(model.canonical, device=setup.device), setup.operator.voxels)
    logger.info("flow and map start from %s, epoch %d", train_dir, model.epoch)
