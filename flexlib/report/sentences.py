"""What the results say, in sentences; plain text."""

from __future__ import annotations

import numpy as np
import pandas as pd

from flexlib.report import facts
from flexlib.report.facts import SWEPT
from flexlib.report.formats import angstrom, number, plus_minus
from flexlib.report.independent_sentences import chosen_verdict
from flexlib.report.results import Results
from flexlib.workflow_support.scores import confirms_motion

_SIMPLER = "fewer latent dimensions first, then a coarser mesh, then stiffer"


def verdict(results: Results) -> str:
    """The run in a few sentences."""
    parts = [part for part in (_motion_verdict(results), _map_verdict(results), chosen_verdict(results)) if part]
    return " ".join(parts) or "This run is not complete: see the sections below for what is there."


def _motion_verdict(results: Results) -> str:
    """Whether the particles move; empty where no held-out gain is known."""
    value, error = facts.gain(results)
    validation = results.validation
    if validation is not None and validation.rejected_gain is not None:
        rejected = plus_minus(validation.rejected_gain, validation.rejected_gain_se)
        return (
            "No motion was found: what the flexible model gains on unseen images "
            f"({rejected} nats per particle) confirms none, so it was set to rest."
        )
    if value is None or error is None or error <= 0:
        return ""
    held_out = f"{plus_minus(value, error)} nats per particle"
    if confirms_motion(value, error):
        moves = "" if validation is None else f" Density moves by {number(validation.rms_displacement_A)} Å rms."
        return (
            "The particles move: the flexible model predicts images it has not seen better than a rigid one, by "
            f"{held_out}.{moves}"
        )
    if value > 0:
        return (
            f"Motion is doubtful: the held-out gain is {held_out}, and it takes three standard errors and half a nat "
            "to confirm motion."
        )
    return f"No motion was found: the flexible model predicts unseen images no better than a rigid one ({held_out})."


def _map_verdict(results: Results) -> str:
    """What the motion does for the map; empty where nothing was reconstructed."""
    flex, rigid = facts.resolutions(results)
    if not flex:
        return ""
    if not rigid:
        return f"The flexible map reaches {angstrom(flex)} Å."
    if flex < 0.985 * rigid:
        return f"Taking the motion into account improves the map from {angstrom(rigid)} to {angstrom(flex)} Å."
    if flex > 1.015 * rigid:
        return (
            f"The flexible map is worse than the rigid one ({angstrom(flex)} against {angstrom(rigid)} Å): "
            "use the rigid one."
        )
    if facts.at_limit(results, flex) and facts.at_limit(results, rigid):
        return f"At FSC 0.143 both maps reach the limit of the images ({angstrom(flex)} Å){_at_half(results)}."
    return f"The resolution at FSC 0.143 stays at {angstrom(flex)} Å (rigid {angstrom(rigid)} Å){_at_half(results)}."


def _at_half(results: Results) -> str:
    """The resolutions at FSC 0.5, where they differ."""
    fsc = results.fsc
    columns = [None if fsc is None else facts.fsc_column(fsc, model) for model in ("flex", "rigid")]
    if fsc is None or columns[0] is None or columns[1] is None:
        return ""
    flex, rigid = (facts.resolution_A(fsc, column, 0.5) for column in columns if column)
    if not flex or not rigid or abs(flex / rigid - 1) < 0.015:
        return ""
    change = "improves" if flex < rigid else "falls"
    return f"; at FSC 0.5 the resolution {change} from {angstrom(rigid)} to {angstrom(flex)} Å"


def particle_sentence(results: Results) -> str:
    """How many particles, in which half-sets."""
    particles = results.particles
    assert particles is not None
    used, total, poses = facts.particle_count(results)
    asides = [f"kept out of {total:,}" if total and total > used else "", poses]
    sentence = f"{used:,} particles" + "".join(f", {aside}" for aside in asides if aside) + "," * any(asides)
    if "RandomSubset" in particles:
        counts = particles["RandomSubset"].value_counts().sort_index() * used // len(particles)
        sentence += " in half-sets of " + " and ".join(f"{count:,}" for count in counts)
    box, pixel = facts.training_box(results)
    if box and pixel:
        sentence += f"; training images of {box} px at {number(pixel, 4)} Å per pixel"
        sentence += f", so that nothing beyond {number(2 * pixel, 3)} Å can drive the motion"
    return sentence + "."


def optics_sentence(results: Results) -> str:
    """The microscope's constants, and the range of defocus; empty where the prepared particles do not say."""
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
        parts.append(f"defocus {_span(facts.defocus_um(particles), 2)} µm")
    groups = f" in {len(optics)} optics groups" if optics is not None and len(optics) > 1 else ""
    return f"CTF: {', '.join(parts)}{groups}." if parts else ""


def _span(values: pd.Series | np.ndarray, decimals: int | None = None) -> str:
    """Lowest to highest value, or the value where they are one."""
    low, high = (f"{v:g}" if decimals is None else f"{v:.{decimals}f}" for v in (np.min(values), np.max(values)))
    return low if low == high else f"{low} to {high}"


def choice_sentence(results: Results) -> str:
    """Why the chosen sweep point."""
    sweep, point = results.sweep, results.chosen
    assert sweep is not None
    row = facts.chosen_row(results)
    if row is None or point is None:
        return "No sweep point was marked as chosen."
    label = f"{facts.point_label(point)}, mesh {point.cells}, seed {point.seed}"
    if len(sweep) == 1:
        return f"One sweep point was trained: {label}."
    if sweep["validation_gain"].notna().sum() == 0:
        return f"{label} was taken without a score."
    best = sweep.loc[sweep["validation_gain"].idxmax()]
    if bool(best["chosen"]):
        return (
            f"{label} was chosen out of {len(sweep)} sweep points: it has the highest held-out gain, and no simpler "
            f"one ({_SIMPLER}) lies within one standard error of it."
        )
    settings = ", ".join(f"{SWEPT[name]} {best[name]:g}" for name in SWEPT if name in best)
    difference, error = row.get("difference_to_best"), row.get("difference_to_best_se")
    distance = (
        f"and the chosen sweep point ({number(row['validation_gain'])}) is the simplest within one standard error of "
        f"it ({_SIMPLER})"
    )
    if facts.paired(sweep):
        distance += f"; particle by particle, it gains {number(-difference, 2)} ± {number(error, 2)} nats less"
    return (
        f"{label} was chosen out of {len(sweep)} sweep points: the highest held-out gain "
        f"({plus_minus(best['validation_gain'], best.get('validation_gain_se'))} nats per particle) is "
        f"that of {settings}, {distance}."
    )


def held_out_sentence(results: Results) -> str:
    """Which particles the gain is of; empty where micrographs were not held out whole."""
    validation = results.validation
    if validation is None or validation.held_out_by != "micrograph":
        return ""
    return (
        f"The held-out gain is that of all {number(validation.validation_particles, 7)} particles of "
        f"{validation.held_out_micrographs} micrographs, whose ice the training has not seen."
    )


def spectrum_sentence(results: Results) -> str:
    """What the spectrum suggests for K."""
    used = results.latent_dims or (results.chosen.latent_dims if results.chosen else 0)
    if results.validation is None:
        return "Eigenvalues above the dashed line are more than noise."
    return (
        f"Eigenvalues above the dashed line are more than noise; their deepest drop comes after "
        f"{results.validation.suggested_dims}, which is "
        "the suggested number of latent dimensions (a large motion has weaker harmonics of its own). "
        f"{used} {'were' if used != 1 else 'was'} used."
    )


def latent_sentence(results: Results) -> str:
    """How many particles have latents, in how many rows where symmetry gives them several."""
    latents = results.latents
    assert latents is not None
    count, dims = int(latents["row"].nunique()), results.latent_dims
    rows = f" in {len(latents):,} rows, one for each symmetry copy" if len(latents) != count else ""
    return f"{count:,} particles{rows}, each with {dims} latent coordinate{'s' if dims > 1 else ''}."


def truth_sentence(results: Results) -> str:
    """How well the latents predict the truth of a simulation; empty without truth."""
    if not results.truth_names or results.latents is None or len(results.latents) < 50:
        return ""
    latents = results.latents
    z = latents[[f"z{i + 1}" for i in range(results.latent_dims)]].to_numpy()
    scores = [facts.neighbour_r2(z, latents[name].to_numpy()) for name in results.truth_names]
    listed = ", ".join(f"{score:.2f}" for score in scores)
    return (
        "The data are simulated and the true angles are known: neighbours in latent space predict them with "
        f"R² = {listed} (1 is perfect, 0 is chance)."
    )


_MEANINGS = {
    "view direction": "errors of the poses or preferred orientations may pass for motion, unless the motion changes "
    "how the molecule lies in the ice",
    "in-plane angle": "no molecule knows how it lies in the image, so that errors of poses or CTFs (astigmatism, "
    "magnification, beam tilt) pass for motion",
    "defocus": "errors of the CTF may pass for motion",
    "shift": "errors of centring may pass for motion",
    "pose change": "the motion had biased the poses of the consensus, which is to be expected of a molecule that moves",
    "contrast": "thickness of the ice, damage or weak particles may pass for motion",
}


def pose_sentence(results: Results) -> str:
    """What training made of the input's poses and contrasts; empty for a training that did not say."""
    record = results.validation
    if record is None or record.pose_rotation_deg is None:
        return "Poses and contrasts are the input's: nothing was to be refined." if record is not None else ""
    assert record.pose_shift_A is not None and record.contrast_sd is not None
    parts = []
    if record.pose_rotation_deg or record.pose_shift_A:
        parts.append(
            f"poses (prior: {record.pose_rotation_deg:.1f}° rms and {record.pose_shift_A:.1f} Å along each axis about "
            "the input's, as these go with the motion)"
        )
    if record.contrast_sd:
        parts.append(f"contrasts (scatter: {100 * record.contrast_sd:.0f}\N{NO-BREAK SPACE}%)")
    if not parts:
        return "Poses follow the motion, and need nothing else refined."
    return (
        f"Refined with the latents: {' and '.join(parts)}. The models that motion is compared with had theirs refined "
        "in the same way."
    )


def entanglement_sentence(results: Results) -> str:
    """Whether any latent follows the imaging; empty where the training did not look."""
    found = [] if results.validation is None else results.validation.entanglement
    if not found:
        return ""
    names = list(dict.fromkeys(one["covariates"] for one in found))
    listed = f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]
    start = f"The table says how much of each latent's variance can be predicted from {listed}, on particles that the "
    if facts.follows(results):
        return f"{start}prediction has not seen; what is more than chance is marked."
    return f"{start}prediction has not seen: no more than chance."


def entanglement_warnings(results: Results) -> list[str]:
    """What each entanglement that is more than chance can mean."""
    return [
        f"Latent {one['latent']} goes with the {one['covariates']} ({_share(one['r2'])} of its variance, by chance no "
        f"more than {_share(one['chance_limit'])}): {_MEANINGS.get(one['covariates'], 'it may be no motion')}."
        for one in facts.follows(results)
    ]


def _share(part: float) -> str:
    """A share of a variance; cross-validated ones can be a little below nothing."""
    return f"{100 * max(part, 0.0):.1f}\N{NO-BREAK SPACE}%"


def resolution_sentence(results: Results) -> str:
    """Resolution of the two maps."""
    flex, rigid = facts.resolutions(results)
    if flex and rigid:
        return (
            f"At FSC 0.143 the flexible map reaches {angstrom(flex)} Å and the rigid map, made by the same program "
            f"without motion, {angstrom(rigid)} Å{_at_half(results)}."
        )
    if flex or rigid:
        known = "flexible" if flex else "rigid"
        return f"At FSC 0.143 the {known} map reaches {angstrom(flex or rigid)} Å."
    return "The curves do not fall below 0.143: the maps reach the limit of the images."
