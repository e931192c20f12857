"""What the results say: numbers, sentences and tables of the report."""

from __future__ import annotations

import numpy as np
import pandas as pd

from flexlib.report.markup import NONE, angstrom, duration, missing, number, table, text
from flexlib.report.plots import FSC_KINDS, FSC_LABELS, SWEPT, fsc_column, paired, resolution_A
from flexlib.report.results import Results
from flexlib.workflow_support.points import SweepPoint

_SIMPLER = "fewer latent dimensions first, then a coarser mesh, then stiffer"
_QUALITY = {
    "num_vertices": ("vertices", ""),
    "num_cells": ("cells", ""),
    "num_segments": ("segments", ""),
    "num_bodies": ("separate bodies", ""),
    "num_voxels": ("voxels in the mask", ""),
    "uncovered_voxels": ("mask voxels outside their cells", ""),
    "volume_total_A3": ("volume of all cells", "Å³"),
    "cell_volume_min_A3": ("smallest cell", "Å³"),
    "cell_volume_max_A3": ("largest cell", "Å³"),
    "dihedral_min_deg": ("smallest dihedral angle", "°"),
    "dihedral_max_deg": ("largest dihedral angle", "°"),
    "voxels_per_cell_min": ("fewest voxels in a cell", ""),
    "voxels_per_cell_median": ("median voxels in a cell", ""),
    "voxels_per_cell_max": ("most voxels in a cell", ""),
    "rigidity_min": ("smallest rigidity weight", ""),
    "rigidity_max": ("largest rigidity weight", ""),
}


def training_box(results: Results) -> tuple[int | None, float | None]:
    """Box in pixels and pixel size in Angstrom of the training images."""
    return (None, None) if results.consensus is None else (results.consensus.box, results.consensus.pixel_size_A)


def full_box(results: Results) -> tuple[int | None, float | None]:
    """Box in pixels and pixel size in Angstrom of the reconstruction."""
    return (None, None) if results.full_mask is None else (results.full_mask.box, results.full_mask.pixel_size_A)


def particle_count(results: Results) -> tuple[int, int | None, str]:
    """Particles used, particles in the input if known, and how symmetry multiplied them ("" where it did not)."""
    copies = int(results.prepared.get("symmetry_copies", 1))
    count = 0 if results.particles is None else len(results.particles) // copies
    poses = f"each in {copies} poses of symmetry {results.prepared['symmetry']}" if copies > 1 else ""
    return count, results.prepared.get("num_input", results.all_latents_count), poses


def gain(results: Results) -> tuple[float | None, float | None]:
    """Held-out gain of the chosen point and its standard error, nats per particle."""
    values = [results.validation.get(name) for name in ("validation_gain", "validation_gain_se")]
    row = chosen_row(results)
    names = ("validation_gain", "validation_gain_se")
    if values[0] is None and row is not None:
        values = [row.get(name) for name in names]
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
        return "this point was not reconstructed"
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
    """A point in short."""
    return f"K = {point.latent_dims}, λ = {point.rigidity:g}"


def point_note(results: Results) -> str:
    """The rest of the point, and out of how many."""
    point = results.chosen
    if point is None:
        return "no point was trained"
    count = "" if results.sweep is None or len(results.sweep) < 2 else f"; 1 of {len(results.sweep)} points"
    return f"mesh {point.cells} cells across, seed {point.seed}{count}"


def total_seconds(results: Results) -> float | None:
    """Time of all steps where benchmarks were kept, else of the trainings in the sweep."""
    if len(results.benchmarks):
        return float(results.benchmarks["seconds"].sum())
    if results.sweep is not None and "wall_s" in results.sweep and results.sweep["wall_s"].notna().any():
        return float(results.sweep["wall_s"].sum())
    return results.validation.get("wall_s")


def time_note(results: Results) -> str:
    """What ``total_seconds`` counts."""
    if len(results.benchmarks):
        return "sum over all steps"
    return "training, all points" if total_seconds(results) is not None else "not recorded"


# sentences ------------------------------------------------------------------------------------------------------


def verdict(results: Results) -> str:
    """The run in two or three sentences; HTML."""
    value, error = gain(results)
    flex, rigid = resolutions(results)
    rms = results.validation.get("rms_displacement_A")
    parts = []
    rejected, its_error = (results.validation.get(name) for name in ("rejected_gain", "rejected_gain_se"))
    if rejected is not None:
        parts.append(
            "No motion was found: what the flexible model gains on unseen images "
            f"({number(rejected)} ± {number(its_error, 2)} nats per particle) confirms none, so it was set to rest."
        )
    elif value is not None and error is not None and error > 0:
        if value > 3 * error:
            moves = f" Density moves by {number(rms)} Å rms." if rms is not None else ""
            parts.append(
                f"The particles move: the flexible model predicts images it has not seen better than a rigid one, by "
                f"{number(value)} ± {number(error, 2)} nats per particle.{moves}"
            )
        elif value > 0:
            parts.append(
                f"Motion is doubtful: the held-out gain is {number(value)} ± {number(error, 2)} nats per particle, "
                "less than three standard errors."
            )
        else:
            parts.append(
                f"No motion was found: the flexible model predicts unseen images no better than a rigid one "
                f"({number(value)} ± {number(error, 2)} nats per particle)."
            )
    if flex and rigid:
        if flex < 0.985 * rigid:
            parts.append(
                f"Taking the motion into account improves the map from {angstrom(rigid)} to {angstrom(flex)} Å."
            )
        elif flex > 1.015 * rigid:
            parts.append(
                f"The flexible map is worse than the rigid one ({angstrom(flex)} against {angstrom(rigid)} Å): "
                "use the rigid one."
            )
        elif at_limit(results, flex) and at_limit(results, rigid):
            parts.append(
                f"At FSC 0.143 both maps reach the limit of the images ({angstrom(flex)} Å){_at_half(results)}."
            )
        else:
            parts.append(
                f"The resolution at FSC 0.143 stays at {angstrom(flex)} Å (rigid {angstrom(rigid)} Å)"
                f"{_at_half(results)}."
            )
    elif flex:
        parts.append(f"The flexible map reaches {angstrom(flex)} Å.")
    return text(" ".join(parts)) or "This run is not complete: see the sections below for what is there."


def _at_half(results: Results) -> str:
    """The resolutions at FSC 0.5, where they differ."""
    fsc = results.fsc
    columns = [None if fsc is None else fsc_column(fsc, model) for model in ("flex", "rigid")]
    if fsc is None or columns[0] is None or columns[1] is None:
        return ""
    flex, rigid = (resolution_A(fsc, column, 0.5) for column in columns if column)
    if not flex or not rigid or abs(flex / rigid - 1) < 0.015:
        return ""
    change = "improves" if flex < rigid else "falls"
    return f"; at FSC 0.5 the resolution {change} from {angstrom(rigid)} to {angstrom(flex)} Å"


def particle_sentence(results: Results) -> str:
    """How many particles, in which half-sets."""
    particles = results.particles
    assert particles is not None
    used, total, poses = particle_count(results)
    asides = [f"kept out of {total:,}" if total and total > used else "", poses]
    sentence = f"{used:,} particles" + "".join(f", {aside}" for aside in asides if aside) + "," * any(asides)
    if "RandomSubset" in particles:
        counts = particles["RandomSubset"].value_counts().sort_index() * used // len(particles)
        sentence += " in half-sets of " + " and ".join(f"{count:,}" for count in counts)
    box, pixel = training_box(results)
    if box and pixel:
        sentence += f"; training images of {box} px at {number(pixel, 4)} Å per pixel"
        sentence += f", so that nothing beyond {number(2 * pixel, 3)} Å can drive the motion"
    return text(sentence + ".")


def optics_sentence(results: Results) -> str:
    """The microscope's constants, and the range of defocus; empty where particles.star does not tell."""
    optics, particles = results.optics, results.particles
    parts = []
    constants = {
        "Voltage": ("", " kV"),
        "SphericalAberration": ("Cs ", " mm"),
        "AmplitudeContrast": ("amplitude contrast ", ""),
    }
    for column, (before, unit) in constants.items():
        if optics is not None and column in optics:
            parts.append(before + _span(optics[column].astype(float)) + unit)
    if particles is not None and {"DefocusU", "DefocusV"} <= set(particles):
        parts.append(f"defocus {_span(defocus_um(particles), 2)} µm")
    groups = f" in {len(optics)} optics groups" if optics is not None and len(optics) > 1 else ""
    return text(f"CTF: {', '.join(parts)}{groups}.") if parts else ""


def defocus_um(particles: pd.DataFrame) -> np.ndarray:
    """(n,) mean of the two defoci of each particle, micrometres."""
    return (particles["DefocusU"].astype(float) + particles["DefocusV"].astype(float)).to_numpy() / 2e4


def _span(values: pd.Series | np.ndarray, decimals: int | None = None) -> str:
    """Lowest to highest value, or the value where they are one."""
    low, high = (f"{v:g}" if decimals is None else f"{v:.{decimals}f}" for v in (np.min(values), np.max(values)))
    return low if low == high else f"{low} to {high}"


def choice_sentence(results: Results) -> str:
    """Why the chosen point."""
    sweep, point = results.sweep, results.chosen
    assert sweep is not None
    row = chosen_row(results)
    if row is None or point is None:
        return "No point of the sweep was marked as chosen."
    label = f"{point_label(point)}, mesh {point.cells}, seed {point.seed}"
    if len(sweep) == 1:
        return text(f"One point was trained: {label}.")
    if sweep["validation_gain"].notna().sum() == 0:
        return text(f"{label} was taken without a score.")
    best = sweep.loc[sweep["validation_gain"].idxmax()]
    if bool(best["chosen"]):
        return text(
            f"{label} was chosen out of {len(sweep)} points: it has the highest held-out gain, and no simpler point "
            f"({_SIMPLER}) lies within one standard error of it."
        )
    settings = ", ".join(f"{SWEPT[name]} {best[name]:g}" for name in SWEPT if name in best)
    difference, error = row.get("difference_to_best"), row.get("difference_to_best_se")
    distance = (
        f"and the chosen point ({number(row['validation_gain'])}) is the simplest within one standard error of it "
        f"({_SIMPLER})"
    )
    if paired(sweep):
        distance += f"; particle by particle, it gains {number(-difference, 2)} ± {number(error, 2)} nats less"
    return text(
        f"{label} was chosen out of {len(sweep)} points: the highest held-out gain "
        f"({number(best['validation_gain'])} ± {number(best.get('validation_gain_se'), 2)} nats per particle) is "
        f"that of {settings}, {distance}."
    )


def spectrum_sentence(results: Results) -> str:
    """What the spectrum suggests for K."""
    suggested = results.validation.get("suggested_dims")
    used = results.latent_dims or (results.chosen.latent_dims if results.chosen else 0)
    if suggested is None:
        return "Eigenvalues above the dashed line are more than noise."
    return (
        f"Eigenvalues above the dashed line are more than noise; their deepest drop comes after {suggested}, which is "
        "the suggested number of latent dimensions (a large motion has weaker harmonics of its own). "
        f"{used} {'were' if used != 1 else 'was'} used."
    )


def truth_sentence(results: Results) -> str:
    """How well the latents tell the truth of a simulation; empty without truth."""
    if not results.truth_names or results.latents is None or len(results.latents) < 50:
        return ""
    latents = results.latents
    z = latents[[f"z{i + 1}" for i in range(results.latent_dims)]].to_numpy()
    scores = [neighbour_r2(z, latents[name].to_numpy()) for name in results.truth_names]
    listed = ", ".join(f"{score:.2f}" for score in scores)
    return (
        "The data are simulated and the true angles are known: neighbours in latent space predict them with "
        f"R² = {listed} (1 is perfect, 0 is chance)."
    )


def neighbour_r2(z: np.ndarray, value: np.ndarray, neighbours: int = 20) -> float:
    """R^2 of predicting ``value`` (n,) by the mean over nearest neighbours in ``z`` (n, K), each point left out."""
    from scipy.spatial import cKDTree

    neighbours = min(neighbours, len(z) - 1)
    index = cKDTree(z / np.maximum(z.std(0), 1e-12)).query(z / np.maximum(z.std(0), 1e-12), neighbours + 1)[1][:, 1:]
    return float(1 - ((value - value[index].mean(1)) ** 2).mean() / max(value.var(), 1e-12))


def resolution_sentence(results: Results) -> str:
    """Resolution of the two maps."""
    flex, rigid = resolutions(results)
    if flex and rigid:
        return text(
            f"At FSC 0.143 the flexible map reaches {angstrom(flex)} Å and the rigid map, made by the same program "
            f"without motion, {angstrom(rigid)} Å{_at_half(results)}."
        )
    if flex or rigid:
        known = "flexible" if flex else "rigid"
        return text(f"At FSC 0.143 the {known} map reaches {angstrom(flex or rigid)} Å.")
    return "The curves do not fall below 0.143: the maps reach the limit of the images."


# tables ---------------------------------------------------------------------------------------------------------


def mesh_table(quality: dict) -> str:
    """mesh_quality.json as a table."""
    rows = [
        (label, number(quality[key], 7 if isinstance(quality[key], int) else 3, unit).replace(" °", "°"))
        for key, (label, unit) in _QUALITY.items()
        if key in quality
    ]
    segments = [
        (
            str(one["segment"]),
            number(one["num_cells"], 7),
            number(one["num_voxels"], 7),
            number(one["uncovered_voxels"], 7),
            number(one["rigidity_median"], 3),
        )
        for one in quality.get("segments", [])
    ]
    if not segments:
        return table(("mesh", ""), rows)
    return table(("mesh", ""), rows) + table(
        ("segment", "cells", "voxels", "outside their cells", "median rigidity"), segments
    )


_SHOWN_POINTS = 16


def sweep_table(sweep: pd.DataFrame) -> str:
    """sweep.csv as a table, best first; of many points the rest is folded away."""
    ordered = sweep.sort_values("validation_gain", ascending=False)
    head = [
        "",
        *(label for name, label in SWEPT.items() if name in sweep),
        "held-out gain (nats)",
        *(["less than the best by"] if paired(sweep) else []),
        "resolution flexible",
        "rigid",
        "time",
    ]
    rows = []
    for _, row in ordered.iterrows():
        error = row.get("validation_gain_se")
        rows.append(
            [
                "chosen" if row.get("chosen") else "",
                *(f"{row[name]:g}" for name in SWEPT if name in sweep),
                number(row["validation_gain"], 4)
                + ("" if error is None or error != error else f" ± {number(error, 2)}"),
                *([_less_than_best(row)] if paired(sweep) else []),
                _resolution_cell(row.get("resolution_flex_A")),
                _resolution_cell(row.get("resolution_rigid_A")),
                duration(row.get("wall_s")),
            ]
        )
    flags = list(ordered["chosen"]) if "chosen" in ordered else []
    if len(rows) <= _SHOWN_POINTS + 4:
        return table(head, rows, flags)
    shown = [number < _SHOWN_POINTS or (number < len(flags) and flags[number]) for number in range(len(rows))]
    best = [row for row, flag in zip(rows, shown, strict=True) if flag]
    return (
        table(head, best, [flag for flag, one in zip(flags, shown, strict=False) if one])
        + f"<details><summary>All {len(rows)} points</summary>{table(head, rows, flags)}</details>"
    )


def _less_than_best(row: pd.Series) -> str:
    difference, error = row["difference_to_best"], row["difference_to_best_se"]
    return NONE if not difference else f"{number(-difference, 2)} ± {number(error, 2)}"


_STAGES = ("simulate", "prepare", "mesh", "train", "choose", "generate", "reconstruct", "summarise", "report")


def time_table(benchmarks: pd.DataFrame) -> str:
    """Time and memory of each rule, summed over its jobs, and folded away those of each job."""
    if not len(benchmarks):
        return missing("No benchmark files were kept for this run.")
    stage = benchmarks["rule"].str.split("/").str[0]
    order = [name for name in _STAGES if (stage == name).any()]
    order += sorted(set(stage) - set(order))
    rows = []
    for name in order:
        jobs = benchmarks[stage == name]
        times = (duration(jobs["seconds"].sum()), duration(jobs["seconds"].max()))
        rows.append((name, str(len(jobs)), *times, memory_size(jobs["memory_MB"].max())))
    each = table(
        ("job", "time", "peak memory"),
        [(row.rule, duration(row.seconds), memory_size(row.memory_MB)) for row in benchmarks.itertuples()],
    )
    summed = table(("rule", "jobs", "time", "longest job", "peak memory"), rows)
    return summed + (f"<details><summary>Each job</summary>{each}</details>" if len(benchmarks) > len(rows) else "")


def memory_size(megabytes: float) -> str:
    """Memory in MB or GB."""
    if megabytes != megabytes:
        return NONE
    return f"{megabytes:.0f} MB" if megabytes < 1000 else f"{megabytes / 1024:.1f} GB"


def _resolution_cell(value: float | None) -> str:
    return NONE if value is None or value != value else f"{angstrom(value)} Å"


def resolution_table(fsc: pd.DataFrame) -> str:
    """Resolution of each curve at 0.143 and 0.5."""
    last = float(fsc["frequency_1_per_A"].max())
    rows = []
    for kind in FSC_KINDS:
        cells = []
        for threshold in (0.143, 0.5):
            for model in ("rigid", "flex"):
                column = fsc_column(fsc, model, kind)
                value = resolution_A(fsc, column, threshold) if column else None
                cells.append(
                    NONE if column is None else f"{angstrom(value)} Å" if value else f"beyond {angstrom(1 / last)} Å"
                )
        if any(cell != NONE for cell in cells):
            rows.append((f"corrected, {FSC_LABELS[kind]}" if kind == "moving" else FSC_LABELS[kind], *cells))
    return table(("FSC", "rigid, 0.143", "flexible, 0.143", "rigid, 0.5", "flexible, 0.5"), rows)
