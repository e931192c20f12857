"""A results folder as the workflow leaves it, made from a phantom in seconds: what the report is tested with."""

from __future__ import annotations

import fcntl
import functools
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from json_records import agreement_record

from flexlib.images.noise import write_noise
from flexlib.imaging.fourier import lowpass_map
from flexlib.imaging.fsc import frequencies_1_per_A
from flexlib.imaging.maps import read_map, write_label_map, write_map
from flexlib.imaging.masks import make_mask
from flexlib.layout import ReconstructFolder, RunFolder, TrainFolder, ValidateFolder
from flexlib.mesh.build import build_mesh
from flexlib.model.flex_model import FlexModel
from flexlib.model.flow import FlowGenerator, displacement_basis_A
from flexlib.particles.star import read_tables
from flexlib.particles.star_write import write_star
from flexlib.reconstruct.fsc_table import fsc_table
from flexlib.records import (
    AgreementRecord,
    ChecksumsRecord,
    Finding,
    InputFile,
    InterpretationRecord,
    OpticsRecord,
    PreparedRecord,
    ResolutionRecord,
    ValidationRecord,
)
from flexlib.report import write_report
from flexlib.simulate.phantoms import Phantom, make_phantom
from flexlib.simulate.signal import atoms_to_map
from flexlib.tetra.elastic import elastic_modes
from flexlib.tetra.io import read_mesh
from flexlib.workflow_support.points import SweepPoint
from flexlib.workflow_support.settings import MeshSettings
from flexlib.workflow_support.sweep import write_sweep_table

POINT = SweepPoint(cells=8, latent_dims=2, rigidity=2.0, seed=0)
CONFIG = {
    "name": "antibody",
    "particles": "particles.star",
    "mesh": {"cells": 8},
    "train": {"latent_dims": [1, 2, 3], "rigidity": [0.5, 2.0], "seed": 0},
}

NASTY = '<script>alert("x")</script> & co'


@functools.cache
def finished_report(folder: Path) -> Path:
    """A run of 1,500 particles, of which prepare kept some nine in ten, with its report; made once, not to be changed.

    Its name would do harm where it is not escaped. ``folder`` is the test run's; its workers share one above theirs.
    """
    shared = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    root = shared / "finished_report" / "antibody"
    with (shared / "finished_report.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "finished_report/made").exists():
            write_fake_results(root, box=40, pixel_size_A=6.0, frames=5, num_particles=1500)
            config = {**CONFIG, "name": NASTY, "image_root": Path("/some/where")}
            write_report(root, root / "report.html", config, root / "truth.npz")
            (shared / "finished_report/made").touch()
    return root


def write_fake_results(
    root: Path, *, box: int = 48, pixel_size_A: float = 5.0, num_particles: int = 400, dims: int = 2, frames: int = 5
) -> SweepPoint:
    """Fill ``root`` with every file the report reads but the trained model; returns the chosen point."""
    rng = np.random.default_rng(1)
    run = RunFolder(root)
    phantom = make_phantom("antibody")
    point = SweepPoint(POINT.cells, dims, POINT.rigidity, POINT.seed)
    angles = phantom.sample_angles(num_particles, rng)
    centre = np.zeros(angles.shape[1])
    consensus = lowpass_map(_map(phantom, centre, box, pixel_size_A), pixel_size_A, 14.0)
    noisy = consensus + 0.03 * consensus.std() * rng.standard_normal(consensus.shape).astype(np.float32)
    mask = make_mask(consensus, pixel_size_A)
    for path in (run.particles.consensus, run.particles.full_consensus):
        write_map(path, noisy, pixel_size_A)
    for path in (run.particles.mask, run.particles.full_mask):
        write_map(path, mask, pixel_size_A)
    _write_particles(run, point, angles, box, pixel_size_A, rng)
    np.savez(root / "truth.npz", angles_rad=angles)
    build_mesh(run.particles.path, run.mesh(point.mesh_path).path, MeshSettings(cells=point.cells))
    _write_training(run.train(point.path), rng)
    generated = run.generate(point.path)
    for axis in range(min(dims, angles.shape[1])):
        for frame, angle in enumerate(np.linspace(-0.5, 0.5, frames)):
            state = np.eye(len(centre))[axis] * angle
            moved = lowpass_map(_map(phantom, state, box, pixel_size_A), pixel_size_A, 12.0)
            write_map(generated.frame(f"axis_{axis + 1}", frame), moved, pixel_size_A)
    _write_series(generated.table, dims, frames)
    _write_reconstruction(run.reconstruct(point.path), consensus, mask, pixel_size_A, rng)
    _write_validation(run, point, consensus, mask, pixel_size_A)
    write_interpretation(run, point, mask, pixel_size_A)
    _write_sweep(run.table, point, rng)
    ChecksumsRecord(
        [
            InputFile("input.star", ["particles"], 1_234_567, 1_700_000_000_000_000_000, "ab" * 32),
            InputFile("stacks/big.mrcs", ["images"], 9_876_543_210, 1_700_000_000_000_000_000, None),
        ]
    ).write(run.checksums)
    benchmark = run.benchmarks / "train" / f"{point.path.replace('/', '.')}.tsv"
    benchmark.parent.mkdir(parents=True)
    benchmark.write_text("s\th:m:s\tmax_rss\n312.5\t0:05:12\t2210.4\n")
    return point


def write_moving_model(root: Path, point: SweepPoint, reach_A: float = 6.0) -> FlexModel:
    """A model of the chosen point that moves along its mesh's softest modes, not in proportion to the latents.

    One unit of a latent moves the mesh by ``reach_A`` rms, some of it as a whole; 0 makes a model at rest.
    """
    run = RunFolder(root)
    mesh = read_mesh(run.mesh(point.mesh_path).mesh)
    stiffness, modes = elastic_modes(mesh, 12)
    basis = torch.from_numpy(displacement_basis_A(modes, stiffness, mesh.vertices_A))
    flow = FlowGenerator(basis, point.latent_dims, 3, 16)
    random = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for number in range(point.latent_dims):
            flow.linear[number, number] = reach_A
            flow.linear[number, -1 - number] = 0.5 * reach_A
        if reach_A:
            flow.output.weight[:] = reach_A * torch.randn(flow.output.weight.shape, generator=random)
        flow.rescale_latents(1.1 * torch.eye(point.latent_dims) + 0.1, torch.full((point.latent_dims,), 0.05))
    consensus, mask = read_map(run.particles.consensus), read_map(run.particles.mask)
    canonical = np.where(mask.data > 0, consensus.data, 0).astype(np.float32)
    known = read_tables(run.train(point.path).latents).particles[latent_names(point.latent_dims)].to_numpy(np.float32)
    latents = known[np.isfinite(known).all(1)]
    model = FlexModel(mesh, flow, latents, canonical, consensus.box, consensus.pixel_size_A)
    model.save(run.train(point.path).model)
    return model


def latent_names(dims: int) -> list[str]:
    """Columns of latents.star."""
    return [f"flexLatent{number + 1}" for number in range(dims)]


def _map(phantom: Phantom, state: np.ndarray, box: int, pixel_size_A: float) -> np.ndarray:
    return atoms_to_map(phantom.positions_A(state)[0] / pixel_size_A, phantom.mass, box, sigma_px=0.7)


def _write_particles(
    run: RunFolder, point: SweepPoint, angles: np.ndarray, box: int, pixel_size_A: float, rng: np.random.Generator
) -> None:
    """Prepared particles without one in ten, and latents of all of them: noisy copies of the true angles."""
    count = len(angles)
    defocus_A = rng.uniform(8000, 25000, count)
    table = pd.DataFrame(
        {
            "rlnImageName": [f"{i + 1:06d}@train.mrcs" for i in range(count)],
            "rlnAngleRot": rng.uniform(-180, 180, count),
            "rlnAngleTilt": np.degrees(np.arccos(rng.uniform(-1, 1, count))),
            "rlnAnglePsi": rng.uniform(-180, 180, count),
            "rlnDefocusU": defocus_A,
            "rlnDefocusV": defocus_A - 200,
            "rlnRandomSubset": np.arange(count) % 2 + 1,
        }
    )
    kept = rng.random(count) < 0.9
    spare = 0.3 * rng.standard_normal((count, point.latent_dims))
    truth = np.pad(angles, ((0, 0), (0, max(0, point.latent_dims - angles.shape[1]))))[:, : point.latent_dims]
    latents = 2.5 * truth + 0.4 * spare
    latents[~kept] = np.nan
    columns = {f"flexLatent{i + 1}": latents[:, i] for i in range(point.latent_dims)}
    prepared = table.assign(flexInputRow=np.arange(count))[kept]
    write_star({"particles": prepared}, run.particles.particles)
    write_star({"particles": table.assign(**columns)}, run.train(point.path).latents)
    write_star({"particles": table}, run.path / "input.star")
    PreparedRecord(
        particles=str((run.path / "input.star").absolute()),
        passthrough=None,
        image_root=None,
        consensus="consensus.mrc",
        mask=None,
        num_input=count,
        num_particles=int(kept.sum()),
        symmetry="C1",
        symmetry_copies=1,
        num_rows=int(kept.sum()),
        half_sets="input",
        full_box=box,
        full_pixel_size_A=pixel_size_A,
        crop_box=box,
        train_box=box,
        train_pixel_size_A=pixel_size_A,
        optics_groups=[OpticsRecord("opticsGroup1", box, pixel_size_A, "", box, 1.0)],
        health=[Finding("match", "All images match.", False), Finding("left out", "9 images are left out.", True)],
    ).write(run.particles.record)
    frequencies = frequencies_1_per_A(box, pixel_size_A)
    write_noise(run.particles.noise, np.ones((2, len(frequencies))), frequencies)


def _write_training(folder: TrainFolder, rng: np.random.Generator, device: str = "") -> None:
    epoch = np.arange(1, 26)
    log = pd.DataFrame(
        {
            "epoch": epoch,
            "band_A": np.where(epoch < 8, 20.0, 12.0),
            "data_loss": 2050 - 40 * (1 - np.exp(-epoch / 5)),
            "rigidity_energy": 0.5 * (1 - np.exp(-epoch / 6)),
            "validation_gain": 30 * (1 - np.exp(-epoch / 6)) + 0.5 * rng.standard_normal(len(epoch)),
        }
    )
    folder.path.mkdir(parents=True, exist_ok=True)
    log.to_csv(folder.log, index=False)
    values = np.concatenate([[6.1, 3.4], 1.25 - 0.02 * np.arange(18)])
    spectrum = pd.DataFrame({"index": np.arange(1, 21), "eigenvalue": values, "noise_edge": 1.3})
    spectrum.to_csv(folder.spectrum, index=False)
    ValidationRecord(
        validation_gain=30.1,
        validation_gain_se=1.2,
        validation_particles=80,
        rejected_gain=None,
        rejected_gain_se=None,
        suggested_dims=2,
        rms_displacement_A=6.3,
        rms_displacement_per_unit_A=[5.0, 4.0],
        motion_share=[0.6, 0.4],
        mean_strain=0.1,
        epochs=25,
        band_shell=12.0,
        num_particles=1350,
        num_voxels=5000,
        num_vertices=200,
        num_cells=700,
        wall_s=312.5,
        num_rows=1350,
        validation_rows=80,
        device=device,
        entanglement=[
            _told(1, "view direction", 0.124),
            _told(1, "defocus", -0.003),
            _told(2, "view direction", 0.002),
            _told(2, "defocus", 0.006),
        ],
    ).write(folder.validation)


def _told(latent: int, covariates: str, r2: float) -> dict[str, object]:
    """What ``flexlib.train.entanglement`` says; chance goes up to 1.1 %."""
    chance = {"chance_mean": -0.002, "chance_std": 0.003, "chance_limit": 0.011}
    return {"latent": latent, "covariates": covariates, "r2": r2, **chance, "more_than_chance": r2 > 0.011}


def _write_series(path: Path, dims: int, frames: int) -> None:
    rows = []
    for axis in range(dims):
        for frame, value in enumerate(np.linspace(-1.2, 1.2, frames)):
            z = np.eye(dims)[axis] * value
            latents = {f"latent_{k + 1}": z[k] for k in range(dims)}
            counts = {"num_particles": 10, "beyond_data": 0}
            rows.append({"series": f"axis_{axis + 1}", "frame": frame, **latents, **counts})
    pd.DataFrame(rows).to_csv(path, index=False)


def moving_part(mask: np.ndarray) -> np.ndarray:
    """What moves, and is told: the mask in the upper half of the box."""
    upper = mask.copy()
    upper[: len(mask) // 2] = 0
    return upper


def _write_reconstruction(
    folder: ReconstructFolder, volume: np.ndarray, mask: np.ndarray, pixel_size_A: float, rng: np.random.Generator
) -> None:
    halves = {
        model: [(volume + noise * volume.std() * rng.standard_normal(volume.shape)).astype(np.float32) for _ in (1, 2)]
        for model, noise in (("flex", 0.6), ("rigid", 2.0))
    }
    for model, pair in halves.items():
        for index, half in enumerate(pair):
            write_map(folder.half(model, index + 1), half, pixel_size_A)
        write_map(folder.map(model), 0.5 * (pair[0] + pair[1]), pixel_size_A)
    table, resolutions_A = fsc_table(halves, mask, pixel_size_A, moving_part(mask))
    table.to_csv(folder.fsc, index=False)
    course = [
        {"half": half, "model": model, "iteration": i, "objective": 100.0, "relative_gradient": 10 ** (-0.2 * i)}
        for model in ("flex", "rigid")
        for half in (1, 2)
        for i in range(20)
    ]
    pd.DataFrame(course).to_csv(folder.convergence, index=False)
    ResolutionRecord(
        resolutions_A=resolutions_A,
        moving_rms_displacement={},
        flex_b_factor_A2=None,
        flex_local_A={},
        converged={name: True for name in ("flex_half1", "flex_half2", "rigid_half1", "rigid_half2")},
    ).write(folder.resolution)


def _write_validation(
    run: RunFolder, point: SweepPoint, volume: np.ndarray, mask: np.ndarray, pixel_size_A: float
) -> None:
    """Models of the half-sets, without the models themselves, that agree with the shared one.

    The part that moves moves 6 A with an error of 1 A; what lies below it 2 A with an error of 3 A.
    """
    rng = np.random.default_rng(3)
    folder, halves = run.validate(point.path), []
    for number in (1, 2):
        _write_training(folder.half(number), rng, device="a GPU")
        shared = read_map(run.reconstruct(point.path).half("flex", number)).data
        halves.append((shared + 0.02 * volume.std() * rng.standard_normal(volume.shape)).astype(np.float32))
        write_map(folder.half_map(number), halves[-1], pixel_size_A)
    write_map(folder.map, 0.5 * (halves[0] + halves[1]), pixel_size_A)
    moving = moving_part(mask)
    table, resolutions_A = fsc_table({"independent": halves}, mask, pixel_size_A, moving)
    table.to_csv(folder.fsc, index=False)
    error_A = np.full_like(volume, 3.0)
    error_A[len(volume) // 2 :] = 1.0
    size_A = np.where(error_A == 1.0, 6.0, 2.0).astype(np.float32)
    write_map(folder.motion_error, error_A, pixel_size_A)
    write_map(folder.motion_size, size_A, pixel_size_A)
    density = mask * np.maximum(volume, 0)
    gains = 20 + 5 * rng.standard_normal(200)
    pd.DataFrame({"row": np.arange(len(gains)), "gain": gains}).to_csv(folder.cross, index=False)
    record = replace(
        agreement_record(float(gains.mean()), float(gains.std(ddof=1) / np.sqrt(len(gains))), len(gains)),
        resolutions_A=resolutions_A,
        motion_error_A=_rms(error_A, density),
        motion_size_A=_rms(size_A, density),
        moving_error_A=_rms(error_A, density * moving),
        moving_size_A=_rms(size_A, density * moving),
        num_modes_agreeing=12,
        mode_limit_A=60.0,
        latent_coverage=[0.68, 0.66, 0.7][: point.latent_dims],
        std_err_factor=[1.04, 1.05, 1.02][: point.latent_dims],
    )
    _write_agreement_tables(folder, record, point.latent_dims)
    record.write(folder.record)


def write_interpretation(run: RunFolder, point: SweepPoint, mask: np.ndarray, pixel_size_A: float) -> None:
    """Two bodies, the lower and the upper half of the box, with a hinge about x between them."""
    folder = run.interpret(point.path)
    labels = (mask > 0.01) * np.where(np.arange(len(mask)) < len(mask) // 2, 1, 2)[:, None, None]
    write_label_map(folder.labels, labels.astype(np.int32), pixel_size_A)
    bodies = {"body": [1, 2], "mass_share": [0.62, 0.38], "residual_A": [0.6, 0.9], "explained": [0.97, 0.95]}
    bodies |= {"rotation_deg": [0.0, 11.9], "shift_A": [0.0, 4.2]}
    pd.DataFrame(bodies).to_csv(folder.bodies, index=False)
    hinge = {"first": 1, "second": 2, "touching": 1, "kind": "hinge", "axis_x": 1.0, "axis_y": 0.0, "axis_z": 0.0}
    hinge |= {"point_x_A": 0.0, "point_y_A": 0.0, "point_z_A": 0.0, "axis_share": 0.99, "low_deg": -19.0}
    hinge |= {"high_deg": 20.5, "range_deg": 39.5, "sd_deg": 11.8, "along_A": 0.1, "across_A": 0.2, "noise_factor": 1.0}
    pd.DataFrame([hinge]).to_csv(folder.hinges, index=False)
    InterpretationRecord(
        wall_s=4.0,
        std_err_from="train",
        num_bodies=2,
        bodies_explained=0.95,
        bodies_motion_A=6.1,
        bodies_bend=0.2,
        hinge_range_deg=[39.5],
        body_poses=True,
    ).write(folder.record)


def _rms(values: np.ndarray, weight: np.ndarray) -> float:
    return float(np.sqrt((values**2 * weight).sum() / weight.sum()))


def _write_agreement_tables(folder: ValidateFolder, record: AgreementRecord, dims: int) -> None:
    """Tables of a validation; the regions' squares, weighted by their particles, are the record's."""
    modes = {
        "first_mode": [1, 7, 13, 19],
        "last_mode": [6, 12, 18, 24],
        "length_A": [90.0, 60.0, 45.0, 36.0],
        "correlation": [0.97, 0.8, 0.31, 0.05],
        "motion_A": [4.0, 1.5, 0.4, 0.2],
    }
    pd.DataFrame(modes).to_csv(folder.modes, index=False)
    size2, error2 = record.motion_size_A**2, record.motion_error_A**2
    regions = pd.DataFrame({"region": [1, 2], "particles": [100, 100]})
    for latent in range(dims):
        regions[f"latent{latent + 1}"] = [0.1, 1.2]
    regions["error_A"] = np.sqrt([error2, error2])
    regions["model_error_A"] = 0.6 * regions["error_A"]
    regions["motion_A"] = np.sqrt([0.5 * error2, 2 * size2 - 0.5 * error2])
    regions.to_csv(folder.regions, index=False)
    factor = np.array(record.std_err_factor)
    calibration = {
        "latent": np.arange(1, len(factor) + 1),
        "std_err": 0.2,
        "model_std_err": 0.2 * np.sqrt(factor**2 - 1),
        "coverage": record.latent_coverage,
        "factor": factor,
    }
    pd.DataFrame(calibration).to_csv(folder.calibration, index=False)


def _write_sweep(path: Path, chosen: SweepPoint, rng: np.random.Generator) -> None:
    rows = []
    for dims in sorted({1, 2, 3, chosen.latent_dims}):
        for rigidity in (0.5, 2.0):
            point = SweepPoint(chosen.cells, dims, rigidity, 0)
            gain = {1: 18.0, 2: 30.1, 3: 30.6}.get(dims, 30.0) - (rigidity < 1) * 2
            rows.append(
                {
                    "cells": point.cells,
                    "latent_dims": dims,
                    "rigidity": rigidity,
                    "seed": 0,
                    "validation_gain": gain,
                    "validation_gain_se": 1.2,
                    "wall_s": 312.5 + 20 * rng.random(),
                    "chosen": point == chosen,
                    "difference_to_best": gain - 30.6,
                    "difference_to_best_se": 0.0 if gain == 30.6 else 0.7,
                }
            )
    write_sweep_table(rows, path)
