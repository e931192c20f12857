"""Simulate a flexible particle set with known truth: phantom -> exact projections -> CTF -> noise -> files.

python -m flexlib.simulate --phantom antibody --num-particles 2000 --out simulated/
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flexlib.errors import InputError
from flexlib.files import atomic_path
from flexlib.imaging.maps import write_map
from flexlib.layout import SimulationFolder
from flexlib.runtime import kd_tree
from flexlib.simulate.backprojection import consensus_map
from flexlib.simulate.consensus import half_sums, refine_poses
from flexlib.simulate.limits import information_limit_r2, posterior_limit_r2
from flexlib.simulate.nuisances import missing_part
from flexlib.simulate.particle_set import ParticleSet, batches, draw_metadata, perturbed
from flexlib.simulate.phantoms import PHANTOMS, Phantom, make_phantom
from flexlib.simulate.settings import Simulation
from flexlib.simulate.writing import write_images, write_metadata_cs, write_metadata_star

_SCALE_PARTICLES = 256  # particles whose signal variance sets the density scale
_LABEL_REACH_A = 10.0  # of an atom, in the labels of the part
_MEAN_STATES = 48  # quantiles of each hinge angle that stand for the whole set in the mean map


@dataclass(frozen=True)
class SimulationTruth:
    """What was simulated and where it was written."""

    particles_star: Path
    particles_cs: Path
    stack: Path
    consensus: Path
    truth_npz: Path
    truth_mean: Path
    truth_states: tuple[Path, ...]
    angles_rad: np.ndarray  # (n, d) hinge angles of the particles
    half_set: np.ndarray  # (n,) int8, 0 or 1
    states_rad: np.ndarray  # (s, d) hinge angles of truth_states
    density_scale: float  # maps are the phantom's density times this, so that the images' noise variance is 1


def simulate_particles(
    out_dir: str | os.PathLike[str], settings: Simulation | None = None, phantom: Phantom | None = None
) -> SimulationTruth:
    """Simulate a particle set and write it as a user would have it after a rigid refinement, with the truth beside it.

    Writes ``particles.star`` (RELION 3.1), ``particles.cs`` (CryoSPARC), ``particles.mrcs`` (float32, contrast white),
    ``consensus.mrc`` (a rigid reconstruction of the noisy images), ``truth_mean.mrc``, ``truth_state_*.mrc`` (exact,
    in the density units of a reconstruction from the images) and ``truth.npz`` (angles_rad (n, d), half (n,) 1 or 2,
    states_rad (s, d), noise_sd, density_scale, for white noise information_limit_r2 (d,), with ``exact_limit``
    posterior_limit_r2, and what the images were made with: rotation (n, 3, 3), euler_deg (n, 3), origin_A (n, 2),
    contrast (n,) and, as in ``nuisances.Kinds``, kind (n,) and absent (n,)). Truth maps have every part, and
    ``truth_part.mrc`` says where the one is that some particles lack. Poses in the metadata, and in ``consensus.mrc``,
    have the errors that the settings ask for. The same arguments give the same files, whatever the thread count up to
    rounding.

    Parameters
    ----------
    out_dir
        Folder to write.
    settings
        What to simulate; None for the defaults.
    phantom
        To be used instead of the one that the settings name.

    Raises
    ------
    InputError
        Settings out of range, or a phantom larger than the box.
    """
    settings = settings or Simulation()
    model = phantom or make_phantom(settings.phantom)
    _check(settings, model)
    folder = SimulationFolder(Path(out_dir))
    folder.path.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(settings.seed)
    particles = ParticleSet(model, draw_metadata(model, settings, generator), settings)
    density_scale = _density_scale(particles)
    uid = generator.integers(1, 2**63, len(particles))
    write_images(folder.images, particles, density_scale, generator)
    written = particles.with_metadata(perturbed(particles.metadata, settings))
    if settings.poses == "consensus":
        written = refine_poses(folder.images, written)
    write_map(folder.consensus, consensus_map(*half_sums(folder.images, written)), settings.pixel_size_A)
    write_metadata_star(folder.particles, folder.images.name, written)
    write_metadata_cs(folder.particles_cs, folder.images.name, written, uid)
    truth_states = _write_truth_maps(folder, particles, density_scale)
    _write_truth(folder, particles, density_scale)
    return SimulationTruth(
        particles_star=folder.particles,
        particles_cs=folder.particles_cs,
        stack=folder.images,
        consensus=folder.consensus,
        truth_npz=folder.truth,
        truth_mean=folder.truth_mean,
        truth_states=truth_states,
        angles_rad=particles.metadata.angles_rad,
        half_set=particles.metadata.half_set,
        states_rad=model.states_rad(),
        density_scale=density_scale,
    )


def _check(settings: Simulation, phantom: Phantom) -> None:
    """Refuse what cannot be simulated."""
    num_particles, box, snr, pixel_size_A = settings.num_particles, settings.box, settings.snr, settings.pixel_size_A
    if num_particles < 2 or box < 16 or box % 2 or snr <= 0 or pixel_size_A <= 0:
        raise InputError(
            "simulate: at least 2 particles, an even box of at least 16, a positive snr and pixel size are needed, "
            f"not num_particles={num_particles}, box={box}, snr={snr}, pixel_size_A={pixel_size_A}"
        )
    errors = (settings.pose_error_deg, settings.shift_error_A, settings.contrast_sd)
    if min(errors) < 0:
        raise InputError(
            "simulate: errors must not be negative: pose_error_deg={}, shift_error_A={}, contrast_sd={}".format(*errors)
        )
    if not 0 <= settings.junk_fraction < 1 or not 0 <= settings.missing_part_fraction <= 1:
        raise InputError(
            "simulate: junk_fraction must be in [0, 1) and missing_part_fraction in [0, 1], not "
            f"{settings.junk_fraction} and {settings.missing_part_fraction}"
        )
    if settings.missing_part_fraction > 0:
        missing_part(phantom, settings)
    if settings.exact_limit and (len(phantom.hinges) != 1 or settings.noise_power_law != 0):
        raise InputError("simulate: exact_limit needs a phantom of one hinge and white noise")
    radius_A = max(np.linalg.norm(atoms, axis=1).max() for atoms in phantom.positions_A(phantom.states_rad()))
    if radius_A > 0.5 * box * pixel_size_A:
        raise InputError(f"simulate: phantom {phantom.name} has radius {radius_A:.0f} A and does not fit the box")


def _density_scale(particles: ParticleSet) -> float:
    """What the phantom's density is multiplied with to have the wanted signal-to-noise ratio at a contrast of 1."""
    particles = particles.complete()
    rows = min(len(particles), _SCALE_PARTICLES)
    variance = sum(float(particles.images(batch).var(axis=(1, 2)).sum()) for batch in batches(rows))
    return float(np.sqrt(particles.settings.snr * rows / variance))


def _write_truth_maps(folder: SimulationFolder, particles: ParticleSet, density_scale: float) -> tuple[Path, ...]:
    """Write the map of each listed state and the mean map; the paths of the former."""
    states_rad, pixel_size_A = particles.phantom.states_rad(), particles.settings.pixel_size_A
    paths = tuple(folder.truth_state(number) for number in range(len(states_rad)))
    for path, state in zip(paths, states_rad, strict=True):
        write_map(path, density_scale * particles.map_at(state), pixel_size_A)
    mean_states = _mean_states(particles.metadata.angles_rad)
    mean_map = np.zeros((particles.settings.box,) * 3)
    for state in mean_states:
        mean_map += density_scale * particles.map_at(state) / len(mean_states)
    write_map(folder.truth_mean, mean_map, pixel_size_A)
    if particles.metadata.kinds.absent.any():
        write_map(folder.truth_part, _part_labels(particles), pixel_size_A)
    return paths


def _part_labels(particles: ParticleSet) -> np.ndarray:
    """(N, N, N) float32: 2 where the nearest atom at rest belongs to the missing part, else 1; 0 far from all."""
    box, phantom, pixel_size_A = particles.settings.box, particles.phantom, particles.settings.pixel_size_A
    axis_A = (np.arange(box) - box // 2) * pixel_size_A
    z, y, x = np.meshgrid(axis_A, axis_A, axis_A, indexing="ij")
    _, nearest = kd_tree(phantom.atoms_A).query(np.stack([x, y, z], -1), distance_upper_bound=_LABEL_REACH_A)
    part = np.append(1 + missing_part(phantom, particles.settings), 0)  # beyond the reach the query gives na
    return part[nearest].astype(np.float32)


def _mean_states(angles_rad: np.ndarray) -> np.ndarray:
    """(s, d) states whose maps average to the mean over all particles.

    Density is a sum over atoms and each follows one hinge, so only the distribution of each angle matters.
    """
    ticks = (np.arange(_MEAN_STATES) + 0.5) / _MEAN_STATES
    return np.quantile(angles_rad, ticks, axis=0) if angles_rad.shape[1] else angles_rad[:1]


def _write_truth(folder: SimulationFolder, particles: ParticleSet, density_scale: float) -> None:
    """Write truth.npz."""
    flexible = bool(particles.phantom.hinges) and particles.settings.noise_power_law == 0
    metadata = particles.metadata
    known: dict[str, Any] = {
        "angles_rad": metadata.angles_rad,
        "half": metadata.half_set.astype(np.int64) + 1,
        "rotation": metadata.rotation,
        "euler_deg": metadata.euler_deg,
        "origin_A": metadata.origin_A,
        "contrast": metadata.contrast,
        "kind": metadata.kinds.kind,
        "absent": metadata.kinds.absent,
        "states_rad": particles.phantom.states_rad(),
        "noise_sd": 1.0,
        "density_scale": density_scale,
        "information_limit_r2": information_limit_r2(particles, density_scale) if flexible else np.zeros(0),
    }
    if particles.settings.exact_limit:
        known["posterior_limit_r2"] = posterior_limit_r2(particles, density_scale, folder.images)
    with atomic_path(folder.truth) as temporary:
        np.savez(temporary, **known)


def main() -> int:
    """Command line: ``python -m flexlib.simulate``."""
    default = Simulation()
    parser = argparse.ArgumentParser(description="Simulate a flexible particle set with known truth.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--phantom", choices=list(PHANTOMS), default=default.phantom)
    parser.add_argument("--num-particles", type=int, default=default.num_particles)
    parser.add_argument("--box", type=int, default=default.box, help="pixels")
    parser.add_argument("--pixel-size", type=float, default=default.pixel_size_A, help="Angstrom")
    parser.add_argument("--snr", type=float, default=default.snr, help="signal variance over noise variance")
    parser.add_argument("--noise-power-law", type=float, default=default.noise_power_law, help="0 is white noise")
    parser.add_argument("--view-preference", type=float, default=default.view_preference, help="0 is uniform views")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--poses", choices=("perturbed", "consensus"), default=default.poses, help="which are written")
    parser.add_argument("--pose-error", type=float, default=default.pose_error_deg, help="rms angle, degrees")
    parser.add_argument("--shift-error", type=float, default=default.shift_error_A, help="rms along an axis, Angstrom")
    parser.add_argument("--contrast-sd", type=float, default=default.contrast_sd, help="of its logarithm")
    parser.add_argument("--junk-fraction", type=float, default=default.junk_fraction, help="of the images")
    parser.add_argument("--missing-part-fraction", type=float, default=0.0, help="of the particles, that lack a part")
    options = parser.parse_args()
    settings = Simulation(
        phantom=options.phantom,
        num_particles=options.num_particles,
        box=options.box,
        pixel_size_A=options.pixel_size,
        snr=options.snr,
        seed=options.seed,
        view_preference=options.view_preference,
        noise_power_law=options.noise_power_law,
        poses=options.poses,
        pose_error_deg=options.pose_error,
        shift_error_A=options.shift_error,
        contrast_sd=options.contrast_sd,
        junk_fraction=options.junk_fraction,
        missing_part_fraction=options.missing_part_fraction,
    )
    try:
        truth = simulate_particles(options.out, settings)
    except InputError as error:
        raise SystemExit(str(error)) from None
    print(truth.particles_star)
    return 0
