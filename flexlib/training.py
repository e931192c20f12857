"""Training: flow, latents and canonical map together, on the prepared particles.

What is minimised, in nats per particle: half the squared whitened residual, plus ``rigidity x RIGIDITY_NATS`` times
the rigidity energy (volume-weighted mean squared strain), plus a unit normal prior on latents that are kept at zero
mean and unit covariance, so that its strength needs no tuning. Per mini-batch

* the flow takes an Adam step, its rigidity sampled on a few of the batch's latents;
* the map takes a preconditioned Newton step (``canonical.py``);
* each latent takes a damped Gauss-Newton step with its own Fisher information, refreshed every few epochs by K
  forward derivatives.

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
from collections.abc import Iterator
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
    Operator,
    SpectralStart,
    friedel_halves,
    infer_latents,
    log_likelihood_loss,
    spectral_start,
)
from flexlib.maps import Map, read_map, write_map
from flexlib.mesh.elastic import elastic_modes
from flexlib.mesh.io import read_mesh
from flexlib.mesh.rigidity import RigidityTensors, mesh_rigidity
from flexlib.mesh.tetmesh import TetraMesh, single_cell_mesh
from flexlib.mesh.voxels import voxelise
from flexlib.model import MODEL_FILE, FlexModel, FlowGenerator, displacement_basis_A
from flexlib.particles.images import plane_weight, read_ahead, shell_radius, split_batches
from flexlib.particles.latents_io import write_latents_cs, write_latents_star
from flexlib.particles.prepared import TrainingImages, open_training_images
from flexlib.projection.op import VoxelTensors, gather_volume, scatter_volume
from flexlib.runtime import tune_process
from flexlib.settings import TrainSettings

logger = logging.getLogger(__name__)

RIGIDITY_NATS = 100.0  # nats per unit of rigidity x mean squared strain: 2 is about the best on sets with hinges
NUM_MODES = 150
BASIS_UNIT_A = 5.0  # rms displacement of the softest field per unit network output
FLOW_RATE, FLOW_RATE_END = 5e-3, 5e-4  # 3DFlex's
MAP_RATE = 0.1  # share of a Newton step per batch
LATENT_RATE = 0.7
INFORMATION_AT_START = 30.0  # of each latent, until the first batch measures it
SIGNIFICANT = 3.0  # standard errors of held-out gain below which no motion is claimed
RIGIDITY_SAMPLES = 12
FIRST_RESOLUTION_A = 20.0  # where coarse to fine starts
LAST_BAND = 0.8  # of Nyquist (3DFlex's)
BAND_EPOCHS = 5  # epochs from the first to the last band
RIGID_EPOCHS = (0.3, 0.1, 0.03)  # map rates of the rigid model's epochs
MAX_EPOCHS = 16  # before the final annealing, with epochs: auto
ANNEAL_EPOCHS = 4
PATIENCE = 3  # epochs without a better held-out score before annealing, with epochs: auto
BATCH_SIZE = 100
CHECKPOINT = "checkpoint.pt"
EXIT_INTERRUPTED = 75  # temporary failure: run again and it continues


class Interrupted(Exception):
    """SIGTERM arrived; the checkpoint is written."""


@dataclass(frozen=True)
class Setup:
    """What stays fixed during a run."""

    source: TrainingImages
    mesh: TetraMesh
    operator: Operator
    rigid: Operator
    rigidity: RigidityTensors
    mask: Map
    consensus: Map
    training_rows: np.ndarray
    validation_rows: np.ndarray
    settings: TrainSettings
    device: torch.device
    batch_size: int

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
    log: list[dict[str, float]]
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
            "spectrum": {k: torch.as_tensor(v) for k, v in asdict(self.spectrum).items()},
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
        for name in ("latents", "information", "held_latents", "log", "epoch", "step", "anneal_from", "totals"):
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

    def save() -> None:
        state.wall_s = resumed_s + time.perf_counter() - began
        with atomic_path(checkpoint) as temporary:
            torch.save({"identity": identity, **state.checkpoint()}, temporary)

    with stop:
        while not _finished(setup, state):
            try:
                _run_epoch(setup, state, stop)
            except Interrupted:
                save()
                logger.warning("SIGTERM: checkpoint written in epoch %d; run again to continue", state.epoch + 1)
                sys.exit(EXIT_INTERRUPTED)
            save()
            _write_log(out_dir / "log.csv", state.log)
            _write_model(out_dir / "checkpoints" / MODEL_FILE, setup, state)
    precision = _finish(setup, state)
    state.wall_s = resumed_s + time.perf_counter() - began
    _write_results(Path(particles_dir), out_dir, setup, state, precision)


def _set_up(particles_dir: Path, mesh_dir: Path, settings: TrainSettings, device: str) -> Setup:
    if settings.init_from is not None or isinstance(settings.latent_init, Path):
        raise InputError("train.init_from and a file as train.latent_init are not supported yet")
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    source = open_training_images(particles_dir)
    consensus, mask = read_map(particles_dir / "consensus.mrc"), read_map(particles_dir / "mask.mrc")
    mesh = read_mesh(mesh_dir / "mesh.vtu")
    rigid_mesh = single_cell_mesh(source.box * source.pixel_size_A)

    def operator(of: TetraMesh) -> Operator:
        voxels = voxelise(of, mask.data > 0.01, source.pixel_size_A)
        at_rest = torch.as_tensor(of.vertices_A, dtype=torch.float32, device=chosen)
        return Operator(at_rest, VoxelTensors.from_mesh_voxels(voxels, chosen), source.pixel_size_A)

    rows = np.random.default_rng((settings.seed, 1)).permutation(len(source))
    num_held = min(round(settings.validation_fraction * len(source)), 2000)
    training_rows = np.sort(rows[num_held:])
    return Setup(
        source,
        mesh,
        operator(mesh),
        operator(rigid_mesh),
        RigidityTensors.from_mesh(mesh, chosen),
        mask,
        consensus,
        training_rows,
        np.sort(rows[:num_held]),
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
    state = _new_state(setup, canonical, saved["rigid_values"], spectrum, _basis(setup))
    state.restore(saved)
    logger.info("resumed after epoch %d, batch %d", state.epoch, state.step)
    return state


def _start(setup: Setup) -> State:
    """Rigid map, elastic modes, spectral start."""
    settings, device = setup.settings, setup.device
    transfer2 = _mean_transfer2(setup)
    rigid = _canonical_map(setup, setup.rigid, transfer2)
    weight = plane_weight(setup.source.box, setup.band(BAND_EPOCHS)).to(device)
    for number, rate in enumerate(RIGID_EPOCHS):
        order = np.random.default_rng((settings.seed, 2, number)).permutation(setup.training_rows)
        total = 0.0
        for batch in read_ahead(setup.source, split_batches(order, setup.batch_size), device):
            values = rigid.values.clone().requires_grad_()
            loss = log_likelihood_loss(setup.rigid, values, batch, None, weight).sum()
            (gradient,) = torch.autograd.grad(loss, values)
            total += loss.item()
            rigid.step(gradient, len(batch.rows) / len(order), rate, setup.band(BAND_EPOCHS))
        logger.info("rigid map, pass %d: %.2f nats per particle", number + 1, total / len(order))
    basis = _basis(setup)
    canonical = _canonical_map(setup, setup.operator, transfer2)
    canonical.values = gather_volume(torch.as_tensor(rigid.volume(), device=device), setup.operator.voxels)
    torch.manual_seed(_seed(settings.seed, 3))
    spectrum = spectral_start(
        setup.operator,
        canonical.values,
        read_ahead(setup.source, split_batches(np.arange(len(setup.source)), setup.batch_size), device),
        basis,
        plane_weight(setup.source.box, setup.band(0)).to(device),
        settings.latent_dims,
        2 * settings.rigidity * RIGIDITY_NATS * _field_energies(setup, basis),
    )
    logger.info(
        "spectral start: leading eigenvalues %s (noise edge %.2f), suggested dims %d",
        " ".join(f"{v:.2f}" for v in spectrum.eigenvalues[:8]),
        spectrum.noise_edge,
        spectrum.suggested_dims,
    )
    return _new_state(setup, canonical, rigid.values, spectrum, basis)


def _basis(setup: Setup) -> torch.Tensor:
    stiffness, modes = elastic_modes(setup.mesh, NUM_MODES)
    basis = displacement_basis_A(modes, stiffness, setup.mesh.vertices_A) * BASIS_UNIT_A
    return torch.as_tensor(basis, device=setup.device)


def _field_energies(setup: Setup, basis_A: torch.Tensor) -> torch.Tensor:
    """(m,) rigidity energy of each displacement field at a thousandth of its size, scaled back to unit size."""
    moved = setup.operator.vertices_A + 1e-3 * basis_A
    return 1e6 * mesh_rigidity(setup.rigidity, moved)


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


def _new_state(setup, canonical, rigid_values, spectrum, basis) -> State:
    settings, device = setup.settings, setup.device
    torch.manual_seed(_seed(settings.seed, 4))
    flow = FlowGenerator(basis.cpu(), settings.latent_dims, settings.layers, settings.hidden_units).to(device)
    num = len(setup.source)
    if settings.latent_init == "spectral":
        latents = torch.as_tensor(spectrum.latents, device=device)
        with torch.no_grad():
            flow.linear.copy_(torch.as_tensor(spectrum.directions))
    else:
        latents = torch.randn((num, settings.latent_dims)).to(device)
    optimiser = torch.optim.Adam(flow.parameters(), lr=FLOW_RATE)
    dims = settings.latent_dims
    return State(
        flow,
        optimiser,
        canonical,
        latents,
        INFORMATION_AT_START * torch.eye(dims, device=device).repeat(num, 1, 1),
        latents[torch.as_tensor(setup.validation_rows)].clone(),
        rigid_values,
        spectrum,
        [],
    )


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


def _run_epoch(setup: Setup, state: State, stop: _StopFlag) -> None:
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
        loss, strain = _step(setup, state, batch, weight, band, MAP_RATE * anneal, refresh)
        totals["loss"] += loss
        totals["rigidity"] += strain * len(batch.rows)
        state.step += 1
        if stop.raised:
            state.totals = totals
            raise Interrupted
    _standardise(setup, state)
    gain, error = _validate(setup, state, steps=6 if epoch == 0 else 2)
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
    noisy = (latents + _posterior_noise(settings, state.information[rows])).requires_grad_()
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
                state.information[rows] = _information(setup, state, batch, weight, noisy.detach(), values.detach())
            state.latents[rows] = _newton_latents(
                settings, latents, noisy.detach(), noisy.grad * num, state.information[rows]
            )
    state.optimiser.step()
    state.optimiser.zero_grad()
    state.canonical.step(values.grad * num, num / len(setup.training_rows), map_rate, band)
    return loss.item(), strain.item()


def _posterior_noise(settings: TrainSettings, information: torch.Tensor) -> torch.Tensor:
    """(b, K) noise for the flow and map to be trained with: a draw from each latent's posterior, and the set noise.

    The flow thus learns from latents as uncertain as they are, and where images tell nothing it learns no motion.
    """
    eye = torch.eye(information.shape[1], device=information.device)
    covariance = torch.linalg.inv(information + eye) + settings.noise_injection**2 * eye
    white = torch.randn((*information.shape[:2], 1)).to(information.device)
    return (torch.linalg.cholesky(covariance) @ white)[..., 0]


def _information(setup, state, batch, weight, latents, values, probe: float = 0.05) -> torch.Tensor:
    """(b, K, K) Fisher information of latents by forward differences."""
    base = setup.operator.slices(values, batch, state.flow(latents))
    tangents = []
    for axis in range(latents.shape[1]):
        moved = latents.clone()
        moved[:, axis] += probe
        slope = (setup.operator.slices(values, batch, state.flow(moved)) - base) / probe
        tangents.append(torch.view_as_real(batch.transfer * slope * weight.sqrt()).flatten(1))
    tangent = torch.stack(tangents, 1)
    return tangent @ tangent.transpose(1, 2)


def _newton_latents(settings, latents, at, gradient, information) -> torch.Tensor:
    """Move latents towards the maximum a posteriori that a Gauss-Newton step from ``at`` predicts."""
    dims = latents.shape[1]
    eye = torch.eye(dims, device=latents.device)
    if settings.centering == "auto":
        prior_gradient, prior_curvature = at, eye.expand(len(at), dims, dims)
    else:  # 3DFlex's form, a penalty on the fourth power; 20 is about as strong as the unit normal at 1.5
        strength = float(settings.centering) / 81.0
        prior_gradient = 4 * strength * at**3
        prior_curvature = torch.diag_embed(12 * strength * at**2 + 1e-3)
    full_step = torch.linalg.solve(information + prior_curvature, (gradient + prior_gradient)[..., None])[..., 0]
    change = LATENT_RATE * (at - full_step - latents)
    return latents + change * (0.5 / change.norm(dim=1, keepdim=True).clamp(min=0.5))


@torch.no_grad()
def _standardise(setup: Setup, state: State) -> None:
    """Bring the training latents' posteriors to zero mean and unit covariance; the flow learns the new coordinates.

    No displacement changes, and the strength of the prior on latents needs no tuning. The covariance is that of the
    estimates plus their mean uncertainty (the EM update of a normal prior): a coordinate that the images do not tell
    keeps its small estimates, instead of being blown up to unit size.
    """
    if setup.settings.freeze_latents:
        return
    rows = torch.as_tensor(setup.training_rows, device=setup.device)
    used, eye = state.latents[rows], torch.eye(setup.settings.latent_dims, device=setup.device)
    offset = used.mean(0)
    uncertainty = torch.linalg.inv(state.information[rows] + eye).mean(0)
    scale = torch.linalg.cholesky(torch.cov(used.T).reshape(eye.shape) + uncertainty)
    state.flow.rescale_latents(scale, offset)
    for name in ("latents", "held_latents"):
        centred = (getattr(state, name) - offset).T
        setattr(state, name, torch.linalg.solve_triangular(scale, centred, upper=False).T.contiguous())
    state.information = scale.T @ state.information @ scale


@torch.no_grad()
def _rms_displacement_A(setup: Setup, state: State, sample: int = 500) -> float:
    """Rms distance in A by which density moves, over density and particles."""
    used = state.latents[torch.as_tensor(setup.training_rows[:sample], device=setup.device)]
    share = density_at_vertices(setup.operator.voxels, state.canonical.values)
    return float(((state.flow(used) ** 2).sum(2) @ share).mean().sqrt())


def density_at_vertices(voxels: VoxelTensors, values: torch.Tensor) -> torch.Tensor:
    """(nv,) share of the (positive) density that rides on each vertex; the sum is 1."""
    corner = voxels.cells.long()[voxels.cell.long()]
    share = voxels.bary.clamp(min=0.0) * values.clamp(min=0.0)[:, None]
    total = values.new_zeros(voxels.num_vertices).index_add_(0, corner.flatten(), share.flatten())
    return total / total.sum().clamp(min=1e-30)


def _validate(setup: Setup, state: State, steps: int) -> tuple[float, float]:
    """Held-out score: nats per particle that the flexible model gains over the rigid one, and its standard error.

    For each particle kept out of the map's and the flow's training, z is inferred from a random half of its Fourier
    pixels (Friedel mates together); the other half is scored. The rigid model has the better of two maps: its own,
    and the canonical one at rest, which has seen the data as often as the flexible model's.
    """
    if not len(setup.validation_rows):
        return math.nan, math.nan
    band = setup.band(BAND_EPOCHS)
    weight = plane_weight(setup.source.box, band).to(setup.device)
    seen, unseen = (
        weight * half.to(setup.device) for half in friedel_halves(setup.source.box, _seed(setup.settings.seed, 7))
    )
    gains, held, first = [], [], 0
    for batch in read_ahead(setup.source, split_batches(setup.validation_rows, setup.batch_size), setup.device):
        start = state.held_latents[first : first + len(batch.rows)]
        first += len(batch.rows)
        latents = infer_latents(setup.operator, state.flow, state.canonical.values, batch, seen, start, steps).latents
        held.append(latents)
        with torch.no_grad():
            flexible = log_likelihood_loss(setup.operator, state.canonical.values, batch, state.flow(latents), unseen)
            rigid = log_likelihood_loss(setup.rigid, state.rigid_values, batch, None, unseen)
            at_rest = log_likelihood_loss(setup.operator, state.canonical.values, batch, None, unseen)
        gains.append(torch.stack([rigid, at_rest]) - flexible)
    state.held_latents = torch.cat(held)
    both = torch.cat(gains, dim=1).double()
    gain = both[both.mean(1).argmin()]
    return float(gain.mean()), float(gain.std() / math.sqrt(len(gain)))


@torch.no_grad()
def _finish(setup: Setup, state: State) -> torch.Tensor:
    """Infer every particle's latents with the final model and turn them to axes of decreasing motion.

    Returns the posterior precision (n, K, K) in the final coordinates.
    """
    weight = plane_weight(setup.source.box, setup.band(BAND_EPOCHS)).to(setup.device)
    dims = setup.settings.latent_dims
    precision = torch.zeros((len(setup.source), dims, dims), device=setup.device)
    state.latents[torch.as_tensor(setup.validation_rows, device=setup.device)] = state.held_latents
    everything = split_batches(np.arange(len(setup.source)), setup.batch_size)
    steps = 0 if setup.settings.freeze_latents else 3
    for batch in read_ahead(setup.source, everything, setup.device):
        rows = torch.as_tensor(batch.rows, device=setup.device)
        posterior = infer_latents(
            setup.operator, state.flow, state.canonical.values, batch, weight, state.latents[rows], steps
        )
        state.latents[rows], precision[rows] = posterior.latents, posterior.precision
        state.information[rows] = posterior.precision - torch.eye(dims, device=setup.device)
    if setup.settings.freeze_latents:
        return precision
    _standardise(setup, state)
    turn = _axes_of_motion(setup, state)
    state.flow.rescale_latents(turn, torch.zeros(dims, device=setup.device))
    state.latents, state.held_latents = state.latents @ turn, state.held_latents @ turn
    return turn.T @ precision @ turn


def _axes_of_motion(setup: Setup, state: State, probe: float = 0.1) -> torch.Tensor:
    """(K, K) rotation of latent space to axes of decreasing rms displacement; ``old = turn @ new``."""
    dims = setup.settings.latent_dims
    share = density_at_vertices(setup.operator.voxels, state.canonical.values).sqrt()
    used = state.latents[torch.as_tensor(setup.training_rows[:300], device=setup.device)]
    slopes = []
    for axis in range(dims):
        shift = torch.zeros_like(used)
        shift[:, axis] = probe
        slopes.append(((state.flow(used + shift) - state.flow(used - shift)) / (2 * probe)) * share[:, None])
    slope = torch.stack(slopes).flatten(1)
    _, axes = torch.linalg.eigh((slope @ slope.T).double())
    axes = axes.flip(1)
    largest = axes.abs().argmax(0)
    return (axes * torch.sign(axes[largest, torch.arange(dims)])).float()


def _write_results(particles_dir: Path, out_dir: Path, setup: Setup, state: State, precision: torch.Tensor) -> None:
    gain, error = _validate(setup, state, steps=0 if setup.settings.freeze_latents else 3)
    if gain < SIGNIFICANT * error:
        logger.warning(
            "held-out gain %.2f +- %.2f nats: the particles kept out of training confirm no motion, so the flow is set "
            "to zero; latents are noise",
            gain,
            error,
        )
        state.flow.stand_still()
        rigid_map = scatter_volume(state.rigid_values, setup.rigid.voxels)
        state.canonical.values = gather_volume(rigid_map, setup.operator.voxels)
    _write_log(out_dir / "log.csv", state.log)
    _write_spectrum(out_dir / "spectrum.csv", state.spectrum)
    write_map(out_dir / "canonical.mrc", state.canonical.volume(), setup.source.pixel_size_A, like=setup.consensus)
    deviation = torch.linalg.inv(precision).diagonal(dim1=1, dim2=2).clamp(min=0).sqrt().cpu().numpy()
    errors = {f"flexLatentStdErr{k + 1}": deviation[:, k] for k in range(deviation.shape[1])}
    latents = state.latents.cpu().numpy()
    write_latents_star(particles_dir, latents, out_dir / "latents.star", extra=errors)
    write_latents_cs(particles_dir, latents, out_dir / "latents.cs")
    write_json(
        out_dir / "validation.json",
        {
            "validation_gain": gain,
            "validation_gain_se": error,
            "validation_particles": len(setup.validation_rows),
            "suggested_dims": state.spectrum.suggested_dims,
            "rms_displacement_A": _rms_displacement_A(setup, state),
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
    logger.info("done: held-out gain %.2f +- %.2f nats per particle, %.0f s", gain, error, state.wall_s)


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
