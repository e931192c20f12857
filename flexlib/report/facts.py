"""What the results come to: the numbers of the report."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from flexlib.imaging.fsc import resolution_at
from flexlib.report.formats import angstrom
from flexlib.report.results import Results
from flexlib.runtime import kd_tree
from flexlib.workflow_support.points import SweepPoint

SWEPT = {"cells": "mesh cells", "latent_dims": "latent dims", "rigidity": "rigidity λ", "seed": "seed"}
FSC_LABELS = {
    "corrected": "corrected",
    "masked": "masked",
    "unmasked": "unmasked",
    "moving": "where it moves",
}
FSC_KINDS = tuple(FSC_LABELS)


def training_box(results: Results) -> tuple[int | None, float | None]:
    """Box in pixels and pixel size in Angstrom of the training images."""
    return (None, None) if results.consensus is None else (results.consensus.box, results.consensus.pixel_size_A)


def full_box(results: Results) -> tuple[int | None, float | None]:
    """Box in pixels and pixel size in Angstrom of the reconstruction."""
    return (None, None) if results.full_mask is None else (results.full_mask.box, results.full_mask.pixel_size_A)


def particle_count(results: Results) -> tuple[int, int | None, str]:
    """Particles used, particles in the input if known, and how symmetry multiplied them ("" where it did not)."""
    prepared = results.prepared
    if prepared is None:
        particles = results.particles
        rows = pd.Series() if particles is None else particles.get("flexInputRow", pd.Series(particles.index))
        return rows.nunique(), results.num_input, ""
    poses = ""
    if prepared.num_rows != prepared.num_particles:
        poses = f"each in {prepared.symmetry_copies} poses of symmetry {prepared.symmetry} ({prepared.num_rows:,} rows)"
    return prepared.num_particles, prepared.num_input, poses


def gain(results: Results) -> tuple[float | None, float | None]:
    """Held-out gain of the chosen sweep point and its standard error, nats per particle."""
    validation, row = results.validation, chosen_row(results)
    values = (None, None) if validation is None else (validation.validation_gain, validation.validation_gain_se)
    if values[0] is None and row is not None:
        values = (row.get("validation_gain"), row.get("validation_gain_se"))
    known = [None if value is None or not np.isfinite(float(value)) else float(value) for value in values]
    return known[0], known[1]


def chosen_row(results: Results) -> pd.Series | None:
    """The row of sweep.csv that was chosen."""
    sweep = results.sweep
    if sweep is None or "chosen" not in sweep or not sweep["chosen"].any():
        return None
    return sweep[sweep["chosen"]].iloc[0]


def resolutions(results: Results) -> tuple[float | None, float | None]:
    """FSC 0.143 resolution in Angstrom of the flexible and the rigid map: sweep.csv's, else from fsc.csv."""
    row = chosen_row(results)
    out: list[float | None] = []
    for model in ("flex", "rigid"):
        value = None if row is None else row.get(f"resolution_{model}_A")
        if value is None or not np.isfinite(value):
            column = None if results.fsc is None else fsc_column(results.fsc, model)
            value = None
            if column and results.fsc is not None:  # a curve that never falls reaches the last shell
                value = resolution_A(results.fsc, column, 0.143) or 1 / results.fsc["frequency_1_per_A"].max()
        out.append(None if value is None else float(value))
    return out[0], out[1]


def at_limit(results: Results, resolution: float) -> bool:
    """Whether a resolution is that of the last shell: the maps end before their curves fall."""
    return results.fsc is not None and resolution < 1.005 / results.fsc["frequency_1_per_A"].max()


def resolution_note(results: Results) -> str:
    """What the resolutions of the summary mean."""
    known = [value for value in resolutions(results) if value]
    if not known:
        return "this sweep point was not reconstructed"
    note = "half-map FSC at 0.143"
    if all(at_limit(results, value) for value in known):
        note += "; the limit of the images"
    moving = moving_resolutions(results)
    return f"{note}; where it moves {angstrom(moving[1])} → {angstrom(moving[0])} Å" if all(moving) else note


def moving_resolutions(results: Results) -> tuple[float | None, float | None]:
    """FSC 0.143 resolution in Angstrom of the flexible and the rigid map in the part that moves."""
    fsc = results.fsc
    columns = [None if fsc is None else fsc_column(fsc, model, "moving") for model in ("flex", "rigid")]
    flex, rigid = (resolution_A(fsc, column, 0.143) if fsc is not None and column else None for column in columns)
    return flex, rigid


def point_label(point: SweepPoint) -> str:
    """A sweep point in short."""
    return f"K = {point.latent_dims}, λ = {point.rigidity:g}"


def point_note(results: Results) -> str:
    """The rest of the chosen sweep point, and out of how many."""
    point = results.chosen
    if point is None:
        return "no sweep point was trained"
    count = "" if results.sweep is None or len(results.sweep) < 2 else f"; 1 of {len(results.sweep)} sweep points"
    return f"mesh {point.cells} cells across, seed {point.seed}{count}"


def total_seconds(results: Results) -> float | None:
    """Time of all steps where benchmarks were kept, else of the trainings in the sweep."""
    if len(results.benchmarks):
        return float(results.benchmarks["seconds"].sum())
    if results.sweep is not None and "wall_s" in results.sweep and results.sweep["wall_s"].notna().any():
        return float(results.sweep["wall_s"].sum())
    return None if results.validation is None else results.validation.wall_s


def time_note(results: Results) -> str:
    """What ``total_seconds`` counts."""
    if len(results.benchmarks):
        return "sum over all steps"
    return "training, all sweep points" if total_seconds(results) is not None else "not recorded"


def defocus_um(particles: pd.DataFrame) -> np.ndarray:
    """(n,) mean of the two defoci of each particle, micrometres."""
    return (particles["DefocusU"].astype(float) + particles["DefocusV"].astype(float)).to_numpy() / 2e4


def neighbour_r2(z: np.ndarray, value: np.ndarray, neighbours: int = 20) -> float:
    """R^2 of predicting ``value`` (n,) by the mean over nearest neighbours in ``z`` (n, K), each particle left out."""
    neighbours = min(neighbours, len(z) - 1)
    index = kd_tree(z / np.maximum(z.std(0), 1e-12)).query(z / np.maximum(z.std(0), 1e-12), neighbours + 1)[1][:, 1:]
    return float(1 - ((value - value[index].mean(1)) ** 2).mean() / max(value.var(), 1e-12))


def follows(results: Results) -> list[dict[str, Any]]:
    """What ``validation.json`` says of latents that covariates tell by more than chance; the closest first."""
    found = [] if results.validation is None else results.validation.entanglement
    return sorted((one for one in found if one["more_than_chance"]), key=lambda one: -one["r2"])


# the sweep table ----------------------------------------------------------------------------------------------------


def swept_columns(sweep: pd.DataFrame) -> list[str]:
    """Settings that take more than one value in the sweep, the seed last."""
    return [name for name in SWEPT if name in sweep and sweep[name].nunique() > 1]


def paired(sweep: pd.DataFrame) -> bool:
    """Whether the table has the difference of each sweep point to the best, with the standard error of that."""
    return "difference_to_best_se" in sweep and sweep["difference_to_best_se"].notna().any()


def gain_errors(sweep: pd.DataFrame) -> pd.Series:
    """Standard errors of the sweep points' differences to the best, else of their gains; nan where there are none."""
    if paired(sweep):
        return sweep["difference_to_best_se"]
    return sweep.get("validation_gain_se", pd.Series(np.nan, sweep.index)).astype(float)


# FSC curves ---------------------------------------------------------------------------------------------------------


def fsc_column(fsc: pd.DataFrame, model: str, kind: str | None = None) -> str | None:
    """The column of ``model`` ("flex", "rigid") and ``kind``; without a kind, the most trustworthy one present."""
    for name in (kind,) if kind else FSC_KINDS:
        if f"fsc_{model}_{name}" in fsc and fsc[f"fsc_{model}_{name}"].notna().any():
            return f"fsc_{model}_{name}"
    return None


def resolution_A(fsc: pd.DataFrame, column: str, threshold: float) -> float | None:
    """Resolution in Angstrom where a curve first falls below ``threshold``; None where it never does."""
    curve, frequency = fsc[column].to_numpy(float), fsc["frequency_1_per_A"].to_numpy(float)
    if len(curve) < 2 or not (curve[1:] < threshold).any():
        return None
    box = 2 * len(curve)
    return resolution_at(curve, threshold, box, pixel_size_A=1 / (frequency[1] * box))
