"""How a run begins: from its checkpoint, or with a rigid map and latents from the spectrum, a file or another point."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch

from flexlib.errors import InputError
from flexlib.images.batch import read_ahead, split_batches
from flexlib.imaging.image_transforms import plane_radius, plane_weight
from flexlib.model.flex_model import FlexModel, FlowGenerator, displacement_basis_A
from flexlib.model.forward import Operator, log_likelihood_loss
from flexlib.particles.latents_io import read_latents
from flexlib.projection.op import gather_volume
from flexlib.tetra.elastic import elastic_modes
from flexlib.tetra.rigidity import mesh_rigidity
from flexlib.train.canonical import CanonicalMap
from flexlib.train.spectral import FieldForces, SpectralStart, fields_of_latents, measure_forces, spectral_start
from flexlib.train.state import BAND_EPOCHS, RIGIDITY_NATS, Setup, State, derived_seed, follow_first
from flexlib.workflow_support.settings import TrainSettings

logger = logging.getLogger(__name__)

NUM_MODES = 800  # a hinge is sharp: with 150 the IgG set's second angle is told to .983, with 800 to .985
SPECTRAL_MODES = 150  # the softest, in which motion is looked for at the start
BASIS_UNIT_A = 5.0  # rms displacement of the softest field per unit network output
FLOW_RATE = 5e-3  # 3DFlex's
INFORMATION_AT_START = 30.0  # of each latent, until the first batch measures it
RIGID_STEPS = (12.0, 4.0, 1.2, 0.4)  # Newton steps of the rigid map in its passes; at last as calm as the canonical


def start_or_resume(setup: Setup, checkpoint: Path, identity: dict[str, str], discard_other: bool) -> State:
    if not checkpoint.exists():
        return _start(setup)
    saved = torch.load(checkpoint, map_location=setup.device, weights_only=True)
    if saved["identity"] != identity:
        differing = ", ".join(k for k in identity if saved["identity"].get(k) != identity[k])
        if discard_other:
            logger.warning("%s: of another run (different %s), training anew", checkpoint, differing)
            return _start(setup)
        raise InputError(
            f"{checkpoint}: a checkpoint of another run (different {differing}); delete its folder to train anew"
        )
    spectrum = SpectralStart(**{k: v.item() if v.ndim == 0 else v.cpu().numpy() for k, v in saved["spectrum"].items()})
    canonical = _canonical_map(setup, setup.operator, _mean_transfer2(setup))
    state = _new_state(setup, canonical, saved["rigid_values"], spectrum, saved["flow"]["basis_A"], None)
    state.restore(saved)
    logger.info("resumed after epoch %d, batch %d", state.epoch, state.step)
    return state


def _start(setup: Setup) -> State:
    """Rigid map, elastic modes, spectral start."""
    settings, device = setup.settings, setup.device
    transfer2 = _mean_transfer2(setup)
    rigid = _canonical_map(setup, setup.rigid, transfer2)
    weight = plane_weight(setup.source.box, setup.band(BAND_EPOCHS)).to(device)
    for number, newton_steps in enumerate(RIGID_STEPS):
        order = np.random.default_rng((settings.seed, 2, number)).permutation(setup.training_rows)
        total, rate = 0.0, min(newton_steps * setup.batch_size / len(order), 0.3)
        batches = split_batches(order, setup.batch_size)
        shares = map(setup.group.share, batches)
        for rows, batch in zip(batches, read_ahead(setup.source, shares, device), strict=True):
            values = rigid.values.clone().requires_grad_()
            loss = log_likelihood_loss(setup.rigid, values, batch, None, weight).sum()
            (gradient,) = torch.autograd.grad(loss, values)
            setup.group.add(gradient, loss)
            total += loss.item()
            rigid.step(gradient, len(rows) / len(order), rate, setup.band(BAND_EPOCHS))
        logger.info("rigid map, pass %d: %.2f nats per particle", number + 1, total / len(order))
    basis = _basis(setup)
    soft = _spectral_fields(basis)
    canonical = _canonical_map(setup, setup.operator, transfer2)
    canonical.values = gather_volume(torch.as_tensor(rigid.volume(), device=device), setup.operator.voxels)
    mine = split_batches(setup.group.share(np.arange(len(setup.source))), setup.batch_size)
    forces = measure_forces(
        setup.operator,
        canonical.values,
        read_ahead(setup.source, mine, device),
        len(setup.source),
        basis[soft],
        setup.band(0),
        setup.group,
    )
    prior = _rigidity_precision(setup, basis[soft])
    spectrum = setup.group.from_first(lambda: spectral_start(forces, settings.latent_dims, prior))
    logger.info(
        "spectral start: leading eigenvalues %s (noise edge %.2f), suggested dims %d",
        " ".join(f"{v:.2f}" for v in spectrum.eigenvalues[:8]),
        spectrum.noise_edge,
        spectrum.suggested_dims,
    )
    state = _new_state(setup, canonical, rigid.values, spectrum, basis, forces)
    if settings.init_from is not None and settings.init_from.is_dir():
        _continue_from(setup, state, settings.init_from)
    follow_first(setup, state)
    return state


def _basis(setup: Setup) -> torch.Tensor:
    stiffness, modes = setup.group.from_first(lambda: elastic_modes(setup.mesh, NUM_MODES))
    basis = displacement_basis_A(modes, stiffness, setup.mesh.vertices_A) * BASIS_UNIT_A
    return torch.as_tensor(basis, device=setup.device)


def _spectral_fields(basis_A: torch.Tensor) -> np.ndarray:
    """Which of the fields the spectral start uses: the softest modes, and the six rigid-body motions at the end."""
    modes = len(basis_A) - 6
    return np.r_[: min(SPECTRAL_MODES, modes), modes : modes + 6]


def _rigidity_precision(setup: Setup, basis_A: torch.Tensor) -> np.ndarray:
    """(m,) float64 precision that the rigidity, as a prior, gives the coefficient of each displacement field.

    Its energy is taken at a thousandth of the field's size, where it is quadratic.
    """
    energy = 1e6 * mesh_rigidity(setup.rigidity, setup.operator.vertices_A + 1e-3 * basis_A)
    return (2 * setup.settings.rigidity * RIGIDITY_NATS * energy).cpu().double().numpy()


def _mean_transfer2(setup: Setup) -> torch.Tensor:
    """(box//2,) mean |transfer|^2 a shell, over a sample of the particles."""
    box = setup.source.box
    sample = setup.training_rows[:: max(1, len(setup.training_rows) // 1000)]
    shell = plane_radius(box).round().long().flatten()
    power = torch.zeros(box * (box // 2 + 1), dtype=torch.float64)
    for rows in split_batches(setup.group.share(sample), 100):
        power += setup.source.transfer(rows).abs().square().sum(0).flatten().double()
    setup.group.add(power)
    mean = torch.bincount(shell, power) / torch.bincount(shell).clamp(min=1) / len(sample)
    return mean[: box // 2].float().to(setup.device)


def _canonical_map(setup: Setup, operator: Operator, transfer2: torch.Tensor) -> CanonicalMap:
    volume = torch.as_tensor(setup.consensus.data, device=setup.device)
    mask = torch.as_tensor(setup.mask.data, device=setup.device)
    return CanonicalMap(volume, mask, operator.voxels, transfer2, len(setup.training_rows))


def _new_state(
    setup: Setup,
    canonical: CanonicalMap,
    rigid_values: torch.Tensor,
    spectrum: SpectralStart,
    basis: torch.Tensor,
    forces: FieldForces | None,
) -> State:
    """A state at epoch 0; without ``forces`` its flow and latents wait for a checkpoint's."""
    settings, device, dims = setup.settings, setup.device, setup.settings.latent_dims
    torch.manual_seed(derived_seed(settings.seed, 4))
    flow = FlowGenerator(basis.cpu(), dims, settings.layers, settings.hidden_units).to(device)
    num = len(setup.source)
    latents, given, directions = torch.randn((num, dims)), None, None
    if forces is not None:
        file = _latents_file(settings)
        if file is not None:
            own = _read_own_latents(setup, file)
            latents, _ = standard_scale(own)
            given = own.to(device) if settings.freeze_latents else None
            logger.info("latents start from %s", file)
        if file is not None or settings.latent_init == "random":
            prior = _rigidity_precision(setup, basis[_spectral_fields(basis)])
            directions = fields_of_latents(forces, latents.numpy(), prior)
        if file is None and settings.latent_init == "spectral":
            latents, directions = torch.as_tensor(spectrum.latents), spectrum.directions
        with torch.no_grad():
            flow.linear[:, _spectral_fields(basis)] = torch.as_tensor(directions, device=device)
    latents = latents.to(device)
    return State(
        flow,
        torch.optim.Adam(flow.parameters(), lr=FLOW_RATE, fused=True),
        canonical,
        latents,
        INFORMATION_AT_START * torch.eye(dims, device=device).repeat(num, 1, 1),
        latents[torch.as_tensor(setup.validation_rows)].clone(),
        rigid_values,
        spectrum,
        given,
        [],
    )


def _latents_file(settings: TrainSettings) -> Path | None:
    """The file that latents start from: ``latent_init``, else what ``init_from`` names or holds."""
    if isinstance(settings.latent_init, Path):
        return settings.latent_init
    if settings.init_from is None:
        return None
    return settings.init_from / "latents.star" if settings.init_from.is_dir() else settings.init_from


def _read_own_latents(setup: Setup, file: Path) -> torch.Tensor:
    """(n, K) float32 latents of ``file`` in its own scale. Raises InputError where it has too few dims."""
    own, dims = read_latents(file, setup.particles_dir), setup.settings.latent_dims
    if own.shape[1] < dims:
        raise InputError(f"{file}: {own.shape[1]} latent dims, but train.latent_dims is {dims}")
    if own.shape[1] > dims:
        logger.warning("%s: has %d latent dims; the first %d are used", file, own.shape[1], dims)
    if not own[:, :dims].std(0).all():
        raise InputError(f"{file}: latent dim {int(np.argmin(own[:, :dims].std(0))) + 1} is the same for all particles")
    return torch.as_tensor(own[:, :dims], dtype=torch.float32)


def standard_scale(own: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """(n, K) latents at zero mean and unit variance, and (scale, offset) with ``own = scale * standard + offset``."""
    scale, offset = own.std(0), own.mean(0)
    return (own - offset) / scale, (scale, offset)


def _continue_from(setup: Setup, state: State, train_dir: Path) -> None:
    """Start from the flow and the map of a trained point; its latents have been read already.

    Raises InputError where its mesh, latent dims or network differ.
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
    state.flow.load_state_dict(model.flow.state_dict())
    own = _read_own_latents(setup, train_dir / "latents.star")
    scale, offset = standard_scale(own)[1]
    state.flow.rescale_latents(torch.diag(scale).to(setup.device), offset.to(setup.device))
    state.canonical.values = gather_volume(torch.as_tensor(model.canonical, device=setup.device), setup.operator.voxels)
    logger.info("flow and map start from %s, epoch %d", train_dir, model.epoch)
