"""Training: flow, latents and canonical map together, on the prepared particles.

What is minimised, in nats per particle: half the squared whitened residual, plus ``rigidity x RIGIDITY_NATS`` times
the rigidity energy (volume-weighted mean squared strain), plus a unit normal prior on latents that are kept at zero
mean and unit covariance, so that its strength needs no tuning. Per mini-batch

* the flow takes an Adam step, its rigidity sampled on a few of the batch's latents;
* the map takes a preconditioned Newton step (``canonical.py``);
* each latent takes a damped Gauss-Newton step with its own Fisher information, refreshed every few epochs by K
  forward derivatives at half the box;
* the flow's mean rigid-body motion is taken out, so that the canonical map stays in the consensus' frame.

Once the full band is in use, and again at the end, every particle is searched for in other valleys of its objective.

Every random number is drawn from (seed, epoch, batch), so a run that is killed and restarted from its checkpoint
continues as if nothing had happened.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from flexlib.canonical import CanonicalMap
from flexlib.errors import InputError
from flexlib.files import atomic_path, write_json
from flexlib.latents import (
    CoarseView,
    LatentPrior,
    Operator,
    Search,
    fisher_information,
    infer_everywhere,
    infer_latents,
    latent_centres,
    log_likelihood_loss,
    search_latents,
)
from flexlib.maps import Map, read_map, write_map
from flexlib.mesh.elastic import elastic_modes
from flexlib.mesh.io import read_mesh
from flexlib.mesh.rigidity import RigidityTensors, mesh_rigidity
from flexlib.mesh.tetmesh import TetraMesh, single_cell_mesh
from flexlib.mesh.voxels import voxelise
from flexlib.model import MODEL_FILE, FlexModel, FlowGenerator, displacement_basis_A
from flexlib.particles.images import plane_weight, read_ahead, shell_radius, split_batches
from flexlib.particles.latents_io import read_latents, write_latents_cs, write_latents_star
from flexlib.particles.prepared import TrainingImages, open_training_images
from flexlib.projection.op import VoxelTensors, gather_volume, scatter_volume
from flexlib.runtime import tune_process
from flexlib.settings import TrainSettings
from flexlib.spectral import FieldForces, SpectralStart, fields_of_latents, measure_forces, spectral_start
from flexlib.validation import HeldOutScore, choose_held_out, score_held_out

logger = logging.getLogger(__name__)

RIGIDITY_NATS = 50.0  # nats per unit of rigidity x mean squared strain: 2 is about the best on sets with hinges
NUM_MODES = 800  # a hinge is sharp: with 150 the IgG set's second angle is told to .983, with 800 to .985
SPECTRAL_MODES = 150  # the softest, in which motion is looked for at the start
BASIS_UNIT_A = 5.0  # rms displacement of the softest field per unit network output
FLOW_RATE, FLOW_RATE_END = 5e-3, 5e-4  # 3DFlex's
MAP_STEPS_PER_EPOCH = 4.0  # Newton steps that the map takes in an epoch, whatever the batch and the set's size
MOST_MAP_STEP = 0.2  # of a Newton step in one batch
GAUGE_RATE = 0.05  # share of a batch's mean rigid-body motion that is taken out of the flow
CHECKPOINT_EVERY_S = 600.0  # between the checkpoints at the ends of epochs
COARSE_BOX = 64  # training boxes from here on have a coarse view
LATENT_RATE = 0.7
INFORMATION_AT_START = 30.0  # of each latent, until the first batch measures it
CLEARLY_LOWER_NATS = 1.0  # another valley of a particle's objective: it moves there
SIGNIFICANT = 3.0  # standard errors of held-out gain below which no motion is claimed
LEAST_GAIN_NATS = 0.5  # nor below this: of 150 held-out rigid particles it has come out as 0.25 +- 0.08
RIGIDITY_SAMPLES = 12
FIRST_RESOLUTION_A = 20.0  # where coarse to fine starts
LAST_BAND = 0.8  # of Nyquist (3DFlex's)
BAND_EPOCHS = 5  # epochs from the first to the last band
RIGID_STEPS = (12.0, 4.0, 1.2, 0.4)  # Newton steps of the rigid map in its passes; at last as calm as the canonical
MAX_EPOCHS = 16  # before the final annealing, with epochs: auto
ANNEAL_EPOCHS = 4
PATIENCE = 3  # epochs without a better held-out score before annealing, with epochs: auto
BATCH_SIZE = 100
FINAL_STEPS = 4  # of Levenberg-Marquardt, with the finished flow and map
CHECKPOINT = "checkpoint.pt"
EXIT_INTERRUPTED = 75  # temporary failure: run again and it continues


class Interrupted(Exception):
    """SIGTERM arrived; the checkpoint is written."""


@dataclass(frozen=True)
class Setup:
    """What stays fixed during a run."""

    particles_dir: Path
    source: TrainingImages
    mesh: TetraMesh
    operator: Operator
    rigid: Operator
    coarse: CoarseView | None
    rigidity: RigidityTensors
    density_share: torch.Tensor  # (nv,) of the consensus' density, by the vertex that it rides on
    mask: Map
    consensus: Map
    training_rows: np.ndarray
    validation_rows: np.ndarray
    settings: TrainSettings
    device: torch.device
    batch_size: int

    @property
    def prior(self) -> LatentPrior:
        """Of the latents: a unit normal, or 3DFlex's penalty on the fourth power.

        3DFlex's unit is not known; its default of 20 is given the strength of the unit normal at |z| = 1.5, where it
        says that latents pile up when centering is too weak.
        """
        centering = self.settings.centering
        return LatentPrior() if centering == "auto" else LatentPrior(4.0 * float(centering) / 81.0, 4.0)

    @property
    def map_rate(self) -> float:
        """Newton steps of the map in one batch while learning."""
        return min(MAP_STEPS_PER_EPOCH * self.batch_size / len(self.training_rows), MOST_MAP_STEP)

    def band(self, epoch: int) -> float:
        """Highest shell in use: coarse to fine, up to ``LAST_BAND`` of Nyquist."""
        half = self.source.box / 2
        first = np.clip(self.source.box * self.source.pixel_size_A / FIRST_RESOLUTION_A, 0.25 * half, 0.6 * half)
        return float(first + (LAST_BAND * half - first) * min(1.0, epoch / BAND_EPOCHS))


@dataclass
class State:
    """What a run changes, and a checkpoint holds."""

    flow: FlowGenerator
    optimiser: torch.optim.Optimizer
    canonical: CanonicalMap
    latents: torch.Tensor  # (n, K)
    information: torch.Tensor  # (n, K, K) Fisher information of each latent, without the prior
    held_latents: torch.Tensor  # (validation, K) from half the Fourier pixels
    rigid_values: torch.Tensor  # (nvox of the rigid operator,)
    spectrum: SpectralStart
    given_latents: torch.Tensor | None  # (n, K) in the user's own scale, where they are frozen
    log: list[dict[str, float]]
    information_ratio: float = 1.0  # of the full box to the coarse view
    epoch: int = 0  # epochs done
    step: int = 0  # batches of the next epoch done
    anneal_from: int | None = None  # epoch at which annealing started
    totals: dict[str, float] | None = None  # sums over the batches of a part epoch
    wall_s: float = 0.0

    def checkpoint(self) -> dict[str, Any]:
        return {
            "flow": self.flow.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "canonical": self.canonical.values,
            "latents": self.latents,
            "information": self.information,
            "held_latents": self.held_latents,
            "rigid_values": self.rigid_values,
            "spectrum": {
                k: torch.as_tensor(v.copy() if isinstance(v, np.ndarray) else v)
                for k, v in asdict(self.spectrum).items()
            },
            "given_latents": self.given_latents,
            "information_ratio": self.information_ratio,
            "log": self.log,
            "epoch": self.epoch,
            "step": self.step,
            "anneal_from": self.anneal_from,
            "totals": self.totals,
            "wall_s": self.wall_s,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        self.flow.load_state_dict(saved["flow"])
        self.optimiser.load_state_dict(saved["optimiser"])
        self.canonical.values = saved["canonical"]
        restored = "latents information held_latents given_latents information_ratio log epoch step anneal_from totals"
        for name in restored.split():
            setattr(self, name, saved[name])
        self.wall_s = saved["wall_s"]


def train(
    particles_dir: str | Path,
    mesh_dir: str | Path,
    out_dir: str | Path,
    settings: TrainSettings,
    device: str = "auto",
    *,
    discard_other_checkpoint: bool = False,
) -> None:
    """Train one point of the sweep and write its results (see docs/architecture.md).

    Resumes from ``out_dir/checkpoints`` when a checkpoint of the same settings, particles and mesh is there. One of
    another run is refused, or with ``discard_other_checkpoint`` (for callers that know when a result is out of date)
    passed over with a warning. On SIGTERM writes a checkpoint and leaves with exit status 75. Raises InputError for
    settings or files that don't fit.
    """
    tune_process()
    began = time.perf_counter()
    out_dir = Path(out_dir)
    setup = _set_up(Path(particles_dir), Path(mesh_dir), settings, device)
    identity = _identity(Path(particles_dir), Path(mesh_dir), settings)
    checkpoint = out_dir / "checkpoints" / CHECKPOINT
    state = _start_or_resume(setup, checkpoint, identity, discard_other_checkpoint)
    resumed_s = state.wall_s
    stop = _StopFlag()

    written = time.perf_counter()

    def save() -> None:
        nonlocal written
        written = time.perf_counter()
        state.wall_s = resumed_s + time.perf_counter() - began
        with atomic_path(checkpoint) as temporary:
            torch.save({"identity": identity, **state.checkpoint()}, temporary)

    def after_batch() -> None:
        if stop.raised:
            raise Interrupted
        if time.perf_counter() - written > CHECKPOINT_EVERY_S:
            save()

    with stop:
        while not _finished(setup, state):
            try:
                _run_epoch(setup, state, after_batch)
            except Interrupted:
                save()
                logger.warning("SIGTERM: checkpoint written in epoch %d; run again to continue", state.epoch + 1)
                sys.exit(EXIT_INTERRUPTED)
            save()
            _write_log(out_dir / "log.csv", state.log)
            _write_model(out_dir / "checkpoints" / MODEL_FILE, setup, state)
    precision = _finish(setup, state)
    score, rejected = _final_score(setup, state)
    state.wall_s = resumed_s + time.perf_counter() - began
    _write_results(Path(particles_dir), out_dir, setup, state, precision, score, rejected)


def _set_up(particles_dir: Path, mesh_dir: Path, settings: TrainSettings, device: str) -> Setup:
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    source = open_training_images(particles_dir)
    consensus, mask = read_map(particles_dir / "consensus.mrc"), read_map(particles_dir / "mask.mrc")
    mesh = read_mesh(mesh_dir / "mesh.vtu")
    rigid_mesh = single_cell_mesh(source.box * source.pixel_size_A)

    def operator(of: TetraMesh, inside: np.ndarray, pixel_size_A: float) -> Operator:
        voxels = voxelise(of, inside, pixel_size_A)
        at_rest = torch.as_tensor(of.vertices_A, dtype=torch.float32, device=chosen)
        return Operator(at_rest, VoxelTensors.from_mesh_voxels(voxels, chosen), pixel_size_A)

    inside = mask.data > 0.01
    flexible = operator(mesh, inside, source.pixel_size_A)
    coarse = None
    if source.box >= COARSE_BOX and source.box % 4 == 0:
        coarse = CoarseView(operator(mesh, inside[::2, ::2, ::2], 2 * source.pixel_size_A), flexible.voxels)
    density = torch.as_tensor(consensus.data * mask.data, dtype=torch.float32, device=chosen)
    images = source.particles.image_index
    training_rows, validation_rows = choose_held_out(images, settings.validation_fraction, settings.seed)
    return Setup(
        particles_dir,
        source,
        mesh,
        flexible,
        operator(rigid_mesh, inside, source.pixel_size_A),
        coarse,
        RigidityTensors.from_mesh(mesh, chosen),
        density_at_vertices(flexible.voxels, gather_volume(density, flexible.voxels)),
        mask,
        consensus,
        training_rows,
        validation_rows,
        settings,
        torch.device(chosen),
        int(np.clip(len(training_rows) // 20, 10, BATCH_SIZE)),
    )


def _identity(particles_dir: Path, mesh_dir: Path, settings: TrainSettings) -> dict[str, str]:
    """What a checkpoint must share with this run: settings and content of the input files."""
    files = [particles_dir / "particles.star", particles_dir / "prepared.json", mesh_dir / "mesh.vtu"]
    return {
        "settings": json.dumps(asdict(settings), sort_keys=True, default=str),
        **{path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.exists()},
    }


def _start_or_resume(setup: Setup, checkpoint: Path, identity: dict[str, str], discard_other: bool) -> State:
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
        for batch in read_ahead(setup.source, split_batches(order, setup.batch_size), device):
            values = rigid.values.clone().requires_grad_()
            loss = log_likelihood_loss(setup.rigid, values, batch, None, weight).sum()
            (gradient,) = torch.autograd.grad(loss, values)
            total += loss.item()
            rigid.step(gradient, len(batch.rows) / len(order), rate, setup.band(BAND_EPOCHS))
        logger.info("rigid map, pass %d: %.2f nats per particle", number + 1, total / len(order))
    basis = _basis(setup)
    soft = _spectral_fields(basis)
    canonical = _canonical_map(setup, setup.operator, transfer2)
    canonical.values = gather_volume(torch.as_tensor(rigid.volume(), device=device), setup.operator.voxels)
    everything = split_batches(np.arange(len(setup.source)), setup.batch_size)
    forces = measure_forces(
        setup.operator,
        canonical.values,
        read_ahead(setup.source, everything, device),
        len(setup.source),
        basis[soft],
        setup.band(0),
    )
    spectrum = spectral_start(forces, settings.latent_dims, _rigidity_precision(setup, basis[soft]))
    logger.info(
        "spectral start: leading eigenvalues %s (noise edge %.2f), suggested dims %d",
        " ".join(f"{v:.2f}" for v in spectrum.eigenvalues[:8]),
        spectrum.noise_edge,
        spectrum.suggested_dims,
    )
    state = _new_state(setup, canonical, rigid.values, spectrum, basis, forces)
    if settings.init_from is not None and settings.init_from.is_dir():
        _continue_from(setup, state, settings.init_from)
    return state


def _basis(setup: Setup) -> torch.Tensor:
    stiffness, modes = elastic_modes(setup.mesh, NUM_MODES)
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
    shell = shell_radius(box).round().long().flatten()
    power = torch.zeros(box * (box // 2 + 1), dtype=torch.float64)
    for rows in split_batches(sample, 100):
        power += setup.source.transfer(rows).abs().square().sum(0).flatten().double()
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
    torch.manual_seed(_seed(settings.seed, 4))
    flow = FlowGenerator(basis.cpu(), dims, settings.layers, settings.hidden_units).to(device)
    num = len(setup.source)
    latents, given, directions = torch.randn((num, dims)), None, None
    if forces is not None:
        file = _latents_file(settings)
        if file is not None:
            own = _read_own_latents(setup, file)
            latents, _ = _standard_scale(own)
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
        torch.optim.Adam(flow.parameters(), lr=FLOW_RATE),
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


def _standard_scale(own: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
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
    scale, offset = _standard_scale(own)[1]
    state.flow.rescale_latents(torch.diag(scale).to(setup.device), offset.to(setup.device))
    state.canonical.values = gather_volume(torch.as_tensor(model.canonical, device=setup.device), setup.operator.voxels)
    logger.info("flow and map start from %s, epoch %d", train_dir, model.epoch)


def _finished(setup: Setup, state: State) -> bool:
    return state.epoch >= _planned_epochs(setup, state)


def _planned_epochs(setup: Setup, state: State) -> int:
    if setup.settings.epochs != "auto":
        return int(setup.settings.epochs)
    return (MAX_EPOCHS if state.anneal_from is None else state.anneal_from) + ANNEAL_EPOCHS


def _anneal(setup: Setup, state: State) -> float:
    """1 while learning, falling geometrically to a tenth in the last epochs."""
    last = _planned_epochs(setup, state)
    if setup.settings.epochs == "auto":
        length, start = ANNEAL_EPOCHS, state.anneal_from if state.anneal_from is not None else MAX_EPOCHS
    else:
        length = max(1, last // 4)
        start = last - length
    done = state.epoch - start + 1
    return float((FLOW_RATE_END / FLOW_RATE) ** (max(0, done) / length))


def _run_epoch(setup: Setup, state: State, after_batch: Callable[[], None]) -> None:
    settings, device, epoch = setup.settings, setup.device, state.epoch
    began = time.perf_counter()
    band, anneal = setup.band(epoch), _anneal(setup, state)
    weight = plane_weight(setup.source.box, band).to(device)
    refresh = epoch < 2 or epoch % 4 == 0
    order = np.random.default_rng((settings.seed, 5, epoch)).permutation(setup.training_rows)
    batches = split_batches(order, setup.batch_size)
    totals = state.totals or {"loss": 0.0, "rigidity": 0.0}
    for batch in _with_progress(
        read_ahead(setup.source, batches[state.step :], device), len(batches), state.step, f"epoch {epoch + 1}"
    ):
        torch.manual_seed(_seed(settings.seed, 6, epoch, state.step))
        warm_up = min(1.0, (epoch * len(batches) + state.step + 1) / len(batches))
        for group in state.optimiser.param_groups:
            group["lr"] = FLOW_RATE * anneal * warm_up
        loss, strain = _step(setup, state, batch, weight, band, setup.map_rate * anneal, refresh)
        totals["loss"] += loss
        totals["rigidity"] += strain * len(batch.rows)
        state.step += 1
        state.totals = totals
        after_batch()
    if not math.isfinite(totals["loss"]):  # the CPU's operator says so itself; a GPU's would have to be waited for
        raise FloatingPointError(f"training diverged in epoch {epoch + 1}: the loss is {totals['loss']}")
    if epoch == BAND_EPOCHS:
        _leave_wrong_valleys(setup, state)
    _standardise(setup, state)
    score = _validate(setup, state, steps=6 if epoch == 0 else 2, search=epoch in (0, BAND_EPOCHS))
    state.held_latents, gain, error = score.latents, score.gain, score.standard_error
    num = len(setup.training_rows)
    state.epoch, state.step, state.totals = epoch + 1, 0, None
    entry = {
        "epoch": epoch + 1,
        "band_shell": round(band, 2),
        "rate": anneal,
        "loss": totals["loss"] / num,
        "rigidity": totals["rigidity"] / num,
        "rms_displacement_A": _rms_displacement_A(setup, state),
        "validation_gain": gain,
        "validation_gain_se": error,
        "seconds": time.perf_counter() - began,
    }
    state.log.append(entry)
    logger.info(
        "epoch %d: band %.1f, loss %.2f nats, strain %.2e, motion %.2f A rms, held-out gain %.2f +- %.2f nats, %.1f s",
        *(entry[k] for k in ("epoch", "band_shell", "loss", "rigidity", "rms_displacement_A")),
        gain,
        error,
        entry["seconds"],
    )
    if settings.epochs == "auto" and state.anneal_from is None and epoch + 1 > BAND_EPOCHS + PATIENCE:
        recent = [e["validation_gain"] for e in state.log[-PATIENCE:]]
        before = max(e["validation_gain"] for e in state.log[BAND_EPOCHS:-PATIENCE])
        if max(recent) < before + 0.2 * error:
            state.anneal_from = epoch + 1


def _step(setup, state, batch, weight, band, map_rate, refresh) -> tuple[float, float]:
    """One mini-batch: flow, map and latents. Returns the summed loss and the mean rigidity energy."""
    settings, num = setup.settings, len(batch.rows)
    rows = torch.as_tensor(batch.rows, device=setup.device)
    latents = state.latents[rows]
    spread = _posterior_noise(setup, latents, state.information[rows])
    noisy = (latents + spread).requires_grad_()
    values = state.canonical.values.clone().requires_grad_()
    displacements = state.flow(noisy)
    loss = log_likelihood_loss(setup.operator, values, batch, displacements, weight).sum()
    sample = torch.randperm(num)[:RIGIDITY_SAMPLES]
    moved = setup.operator.vertices_A + state.flow(latents[sample.to(setup.device)])
    strain = mesh_rigidity(setup.rigidity, moved).mean()
    (loss / num + settings.rigidity * RIGIDITY_NATS * strain).backward()

    if not settings.freeze_latents:
        with torch.no_grad():
            if refresh:
                state.information[rows] = _information(setup, state, batch, weight, latents, values.detach())
            state.latents[rows] = _newton_latents(
                setup.prior, latents, noisy.detach(), noisy.grad * num, state.information[rows]
            )
    state.optimiser.step()
    state.optimiser.zero_grad()
    _hold_gauge(setup, state, displacements.detach().mean(0), GAUGE_RATE)
    state.canonical.step(values.grad * num, num / len(setup.training_rows), map_rate, band)
    return loss.item(), strain.item()


def _posterior_noise(setup: Setup, latents: torch.Tensor, information: torch.Tensor) -> torch.Tensor:
    """(b, K) noise for the flow and map to be trained with: a draw from each latent's posterior, and the set noise.

    The flow thus learns from latents as uncertain as they are, and where images tell nothing it learns no motion.
    """
    eye = torch.eye(information.shape[1], device=information.device)
    covariance = torch.linalg.inv(information + setup.prior.curvature(latents))
    covariance = covariance + setup.settings.noise_injection**2 * eye
    white = torch.randn((*information.shape[:2], 1)).to(information.device)
    return (torch.linalg.cholesky(covariance) @ white)[..., 0]


def _information(setup, state, batch, weight, latents, values) -> torch.Tensor:
    """(b, K, K) Fisher information of latents, from the coarse view where there is one.

    What finer shells add is nearly a factor common to all particles; it is measured on an epoch's first batch.
    """
    if setup.coarse is None:
        return fisher_information(setup.operator, state.flow, values, batch, weight, latents)
    small, small_weight = setup.coarse.batch(batch), setup.coarse.weight(weight)
    small_values = setup.coarse.values(values)
    coarse = fisher_information(setup.coarse.operator, state.flow, small_values, small, small_weight, latents)
    if state.step == 0:
        full = fisher_information(setup.operator, state.flow, values, batch, weight, latents)
        seen = coarse.diagonal(dim1=1, dim2=2).sum()
        state.information_ratio = float(full.diagonal(dim1=1, dim2=2).sum() / seen) if seen > 0 else 1.0
    return state.information_ratio * coarse


def _newton_latents(prior, latents, at, gradient, information) -> torch.Tensor:
    """Move latents towards the maximum a posteriori that a Gauss-Newton step from ``at`` predicts."""
    slope = (gradient + prior.gradient(at))[..., None]
    full_step = torch.linalg.solve(information + prior.curvature(at), slope)[..., 0]
    change = LATENT_RATE * (at - full_step - latents)
    return latents + change * (0.5 / change.norm(dim=1, keepdim=True).clamp(min=0.5))


@torch.no_grad()
def _hold_gauge(setup: Setup, state: State, mean_A: torch.Tensor, rate: float) -> None:
    """Take ``rate`` of a mean displacement's (nv, 3) rigid-body part, as the density feels it, out of the flow.

    Moving the molecule in every particle and the map the other way changes no image; without this the two drift.
    """
    state.flow.output.bias[-6:] -= rate * _rigid_part(setup, state, mean_A)


def _rigid_part(setup: Setup, state: State, displacement_A: torch.Tensor) -> torch.Tensor:
    """(6,) coefficients of the basis' rigid-body motions in a displacement field (nv, 3), by density."""
    motions = state.flow.basis_A[-6:]
    weighted = motions * setup.density_share[:, None]
    overlap = weighted.flatten(1) @ motions.flatten(1).T
    return torch.linalg.solve(overlap, weighted.flatten(1) @ displacement_A.flatten())


@torch.no_grad()
def _leave_wrong_valleys(setup: Setup, state: State) -> None:
    """Move the latents of particles that fit clearly better elsewhere in latent space."""
    if setup.settings.freeze_latents:
        return
    weight = plane_weight(setup.source.box, setup.band(BAND_EPOCHS)).to(setup.device)
    search, values, moved = _search(setup, state), state.canonical.values, 0
    for batch in read_ahead(setup.source, split_batches(setup.training_rows, setup.batch_size), setup.device):
        rows = torch.as_tensor(batch.rows, device=setup.device)
        found, lower = search_latents(
            setup.operator, state.flow, values, batch, weight, state.latents[rows], search, setup.prior
        )
        clearly = lower > CLEARLY_LOWER_NATS
        state.latents[rows[clearly]] = found[clearly]
        moved += int(clearly.sum())
    logger.info("%d of %d particles have left a wrong valley of their objective", moved, len(setup.training_rows))


def _search(setup: Setup, state: State) -> Search:
    """Starts all over the latents' distribution."""
    used = state.latents[torch.as_tensor(setup.training_rows, device=setup.device)].cpu().numpy()
    centres = latent_centres(used, _seed(setup.settings.seed, 8, state.epoch))
    return Search(torch.as_tensor(centres, device=setup.device), setup.coarse)


@torch.no_grad()
def _standardise(setup: Setup, state: State) -> tuple[torch.Tensor, torch.Tensor]:
    """Bring the training latents' posteriors to zero mean and unit covariance; the flow learns the new coordinates.

    Returns (offset, scale) with ``old = offset + scale @ new``.

    No displacement changes, and the strength of the prior on latents needs no tuning. The covariance is that of the
    estimates plus their mean uncertainty (the EM update of a normal prior): a coordinate that the images do not tell
    keeps its small estimates, instead of being blown up to unit size.
    """
    eye = torch.eye(setup.settings.latent_dims, device=setup.device)
    if setup.settings.freeze_latents or setup.settings.centering != "auto":
        return eye[0] * 0, eye
    rows = torch.as_tensor(setup.training_rows, device=setup.device)
    used = state.latents[rows]
    offset = used.mean(0)
    uncertainty = torch.linalg.inv(state.information[rows] + eye).mean(0)
    scale = torch.linalg.cholesky(torch.cov(used.T).reshape(eye.shape) + uncertainty)
    state.flow.rescale_latents(scale, offset)
    for name in ("latents", "held_latents"):
        centred = (getattr(state, name) - offset).T
        setattr(state, name, torch.linalg.solve_triangular(scale, centred, upper=False).T.contiguous())
    state.information = scale.T @ state.information @ scale
    return offset, scale


@torch.no_grad()
def _rms_displacement_A(setup: Setup, state: State, sample: int = 500) -> float:
    """Rms distance in A by which density moves, over density and particles."""
    used = state.latents[torch.as_tensor(setup.training_rows[:sample], device=setup.device)]
    return float(((state.flow(used) ** 2).sum(2) @ setup.density_share).mean().sqrt())


def density_at_vertices(voxels: VoxelTensors, values: torch.Tensor) -> torch.Tensor:
    """(nv,) share of the (positive) density that rides on each vertex; the sum is 1."""
    corner = voxels.cells.long()[voxels.cell.long()]
    share = voxels.bary.clamp(min=0.0) * values.clamp(min=0.0)[:, None]
    total = values.new_zeros(voxels.num_vertices).index_add_(0, corner.flatten(), share.flatten())
    return total / total.sum().clamp(min=1e-30)


def _validate(setup: Setup, state: State, steps: int, search: bool) -> HeldOutScore:
    """The held-out score as things stand (``validation.py``)."""
    frozen = setup.settings.freeze_latents
    return score_held_out(
        setup.source,
        setup.validation_rows,
        setup.operator,
        state.flow,
        state.canonical.values,
        setup.rigid,
        state.rigid_values,
        state.held_latents,
        band=setup.band(BAND_EPOCHS),
        seed=_seed(setup.settings.seed, 7),
        steps=0 if frozen else steps,
        prior=setup.prior,
        batch_size=setup.batch_size,
        search=_search(setup, state) if search and not frozen else None,
    )


@torch.no_grad()
def _finish(setup: Setup, state: State) -> torch.Tensor:
    """Infer every particle's latents with the final model and turn them to axes of decreasing motion.

    Returns the posterior precision (n, K, K) in the final coordinates.
    """
    dims, device = setup.settings.latent_dims, setup.device
    weight = plane_weight(setup.source.box, setup.band(BAND_EPOCHS)).to(device)
    precision = torch.zeros((len(setup.source), dims, dims), device=device)
    if not setup.settings.freeze_latents:
        state.latents[torch.as_tensor(setup.validation_rows, device=device)] = state.held_latents
    everything = split_batches(np.arange(len(setup.source)), setup.batch_size)
    search = None if setup.settings.freeze_latents else _search(setup, state)
    mean_A = torch.zeros_like(setup.operator.vertices_A)
    for batch in read_ahead(setup.source, everything, device):
        rows = torch.as_tensor(batch.rows, device=device)
        model = (setup.operator, state.flow, state.canonical.values, batch, weight, state.latents[rows])
        if search is None:
            posterior = infer_latents(*model, 0, setup.prior)
        else:
            posterior = infer_everywhere(*model, FINAL_STEPS, search, setup.prior)
        state.latents[rows], precision[rows] = posterior.latents, posterior.precision
        state.information[rows] = posterior.precision - setup.prior.curvature(posterior.latents)
        mean_A += state.flow(posterior.latents).sum(0) / len(setup.source)
    _hold_gauge(setup, state, mean_A, 1.0)
    if state.given_latents is not None:
        scale, offset = _standard_scale(state.given_latents)[1]
        state.flow.rescale_latents(torch.diag(1 / scale), -offset / scale)
        state.latents = state.given_latents
        state.held_latents = state.latents[torch.as_tensor(setup.validation_rows, device=device)]
        return precision / (scale[:, None] * scale)
    if setup.settings.freeze_latents:
        return precision
    offset, scale = _standardise(setup, state)
    turn = _axes_of_motion(setup, state)
    state.flow.rescale_latents(turn, torch.zeros(dims, device=device))
    state.latents, state.held_latents = state.latents @ turn, state.held_latents @ turn
    back = scale @ turn
    return back.T @ precision @ back


def _final_score(setup: Setup, state: State) -> tuple[HeldOutScore, HeldOutScore | None]:
    """The held-out score of the finished model. Where it confirms no motion the model is set to rest.

    Its gain over the rigid model is then zero, for it is the rigid model; the score that did not convince comes second.
    """
    score = _validate(setup, state, steps=3, search=True)
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
    slope = torch.stack([_slope_A(setup, state, used, axis, probe).flatten() for axis in range(dims)])
    _, axes = torch.linalg.eigh((slope @ slope.T).double())
    axes = axes.flip(1)
    largest = axes.abs().argmax(0)
    return (axes * torch.sign(axes[largest, torch.arange(dims)])).float()


def _slope_A(setup: Setup, state: State, latents: torch.Tensor, axis: int, probe: float) -> torch.Tensor:
    """(b, nv, 3) displacement in A per unit of latent ``axis``, times the root of each vertex' share of density."""
    shift = torch.zeros_like(latents)
    shift[:, axis] = probe
    change = (state.flow(latents + shift) - state.flow(latents - shift)) / (2 * probe)
    return change * setup.density_share.sqrt()[:, None]


@torch.no_grad()
def _motion_coordinates_A(setup: Setup, state: State) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (n, K) in which distance is motion, and the part (K,) of all motion that each of them holds.

    The displacement fields of all particles, by density, are projected on their K leading principal axes: the distance
    of two particles is the rms distance in A by which density moves between them, as far as K axes can hold it. Turned
    so, large swings lie on arcs, and nothing depends on how latent space is stretched.
    """
    dims, root = setup.settings.latent_dims, setup.density_share.sqrt()[:, None]
    rows = torch.as_tensor(setup.training_rows, device=setup.device)
    sample = state.flow(state.latents[rows[:: max(1, len(rows) // 500)]]) * root
    mean = sample.mean(0)
    _, size, axes = torch.linalg.svd((sample - mean).flatten(1), full_matrices=False)
    chunks = torch.split(state.latents, 1000)
    coordinates = torch.cat([((state.flow(chunk) * root) - mean).flatten(1) @ axes[:dims].T for chunk in chunks])
    share = (size**2 / (size**2).sum().clamp(min=1e-30))[:dims]
    return coordinates.cpu().numpy(), share.cpu().numpy()


@torch.no_grad()
def _rms_per_unit_A(setup: Setup, state: State) -> list[float]:
    """Rms distance in A by which density moves per unit of each latent, over particles."""
    probe = 0.05 * float(state.latents.std().clamp(min=1e-12))  # frozen latents keep their own scale
    used = state.latents[torch.as_tensor(setup.training_rows[:500], device=setup.device)]
    slopes = [_slope_A(setup, state, used, axis, probe) for axis in range(used.shape[1])]
    return [round(float((slope**2).sum((1, 2)).mean().sqrt()), 4) for slope in slopes]


def _write_results(
    particles_dir: Path,
    out_dir: Path,
    setup: Setup,
    state: State,
    precision: torch.Tensor,
    score: HeldOutScore,
    rejected: HeldOutScore | None,
) -> None:
    _write_log(out_dir / "log.csv", state.log)
    _write_spectrum(out_dir / "spectrum.csv", state.spectrum)
    _write_held_out(out_dir / "held_out.csv", setup, score)
    write_map(out_dir / "canonical.mrc", state.canonical.volume(), setup.source.pixel_size_A, like=setup.consensus)
    deviation = torch.linalg.inv(precision).diagonal(dim1=1, dim2=2).clamp(min=0).sqrt().cpu().numpy()
    motion_A, motion_share = _motion_coordinates_A(setup, state)
    dims = setup.settings.latent_dims
    extra = {f"flexLatentStdErr{k + 1}": deviation[:, k] for k in range(dims)}
    extra |= {f"flexMotion{k + 1}Angst": motion_A[:, k] for k in range(dims)}
    latents = state.latents.cpu().numpy()
    write_latents_star(particles_dir, latents, out_dir / "latents.star", extra=extra)
    write_latents_cs(particles_dir, latents, out_dir / "latents.cs")
    write_json(
        out_dir / "validation.json",
        {
            "validation_gain": score.gain,
            "validation_gain_se": score.standard_error,
            "validation_particles": len(setup.validation_rows),
            "rejected_gain": rejected.gain if rejected else None,
            "rejected_gain_se": rejected.standard_error if rejected else None,
            "suggested_dims": state.spectrum.suggested_dims,
            "rms_displacement_A": _rms_displacement_A(setup, state),
            "rms_displacement_per_unit_A": _rms_per_unit_A(setup, state),
            "motion_share": [round(float(part), 4) for part in motion_share],
            "mean_strain": state.log[-1]["rigidity"] if state.log else None,
            "epochs": state.epoch,
            "band_shell": setup.band(BAND_EPOCHS),
            "num_particles": len(setup.source),
            "num_voxels": len(setup.operator.voxels.index),
            "num_vertices": len(setup.mesh.vertices_A),
            "num_cells": len(setup.mesh.cells),
            "wall_s": round(state.wall_s, 2),
        },
    )
    _write_model(out_dir / MODEL_FILE, setup, state)
    logger.info(
        "done: held-out gain %.2f +- %.2f nats per particle, %.0f s", score.gain, score.standard_error, state.wall_s
    )


def _write_model(path: Path, setup: Setup, state: State) -> None:
    plain = json.loads(json.dumps(asdict(setup.settings), default=str))
    FlexModel(
        setup.mesh,
        state.flow,
        state.latents.cpu().numpy(),
        state.canonical.volume(),
        setup.source.box,
        setup.source.pixel_size_A,
        plain,
        state.epoch,
    ).save(path)


def _write_log(path: Path, log: list[dict[str, float]]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", newline="") as handle:
        names = list(log[0]) if log else ["epoch"]
        writer = csv.DictWriter(handle, names, lineterminator="\n")
        writer.writeheader()
        for entry in log:
            writer.writerow({k: f"{v:.6g}" for k, v in entry.items()})


def _write_held_out(path: Path, setup: Setup, score: HeldOutScore) -> None:
    """The score of each particle: points of a sweep with one seed hold out the same ones, so they can be paired."""
    with atomic_path(path) as temporary, temporary.open("w", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(["row", "gain"])
        for row, gain in zip(setup.validation_rows, score.gains, strict=True):
            writer.writerow([int(row), f"{gain:.6g}"])


def _write_spectrum(path: Path, spectrum: SpectralStart) -> None:
    with atomic_path(path) as temporary, temporary.open("w", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(["index", "eigenvalue", "noise_edge"])
        for index, value in enumerate(spectrum.eigenvalues, 1):
            writer.writerow([index, f"{value:.6g}", f"{spectrum.noise_edge:.6g}"])


def _seed(*key: int) -> int:
    """A 63-bit seed from a tuple of integers."""
    return int(np.random.SeedSequence(key).generate_state(2, np.uint32).view(np.uint64)[0] >> 1)


def _with_progress(batches: Iterator, total: int, done: int, label: str) -> Iterator:
    """A progress bar on a terminal, nothing elsewhere (an epoch's log line tells)."""
    return tqdm(batches, total=total, initial=done, desc=label, leave=False, disable=not sys.stderr.isatty())


class _StopFlag:
    """Set by SIGTERM while in use; the handler that was there comes back after."""

    def __init__(self) -> None:
        self.raised = False
        self._previous: Any = None

    def __enter__(self) -> _StopFlag:
        def on_signal(number, frame):
            self.raised = True

        try:
            self._previous = signal.signal(signal.SIGTERM, on_signal)
        except ValueError:  # not in the main thread: nobody can interrupt us there
            self._previous = None
        return self

    def __exit__(self, *exc) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
