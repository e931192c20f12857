"""What the independent halves say, in sentences; plain text."""

from __future__ import annotations

from flexlib.imaging.maps import Map
from flexlib.report import facts
from flexlib.report.formats import angstrom, number, plus_minus
from flexlib.report.independent import INDEPENDENT, TOO_SMALL, FscComparison, ValidatedPoint, validated_points
from flexlib.report.judged import percent
from flexlib.report.results import Results

_WHOLE_BODY_A = 1e4  # wavelengths above are of motions that bend nothing
_NEVER_MET = "Two models that never met, one of each half-set,"


def chosen_verdict(results: Results) -> str:
    """What validation makes of the chosen sweep point, in a sentence or two; empty where it was not validated."""
    point = next((one for one in validated_points(results) if one.point == results.chosen), None)
    return "" if point is None else verdict(point)


def verdict(point: ValidatedPoint) -> str:
    """The warnings, or how far the two models agree."""
    return " ".join(warnings(point)) or _agreement(point)


def warnings(point: ValidatedPoint) -> list[str]:
    """What is to be trusted less than the shared model alone would let one think."""
    record, found = point.record, []
    if point.claims_motion and point.resting:
        found.append(f"The motion is not confirmed: {_resting(point)}.")
    elif point.claims_motion and point.cross_confirms is False:
        found.append(
            "The motion is not confirmed: each half-set's model gains only "
            f"{plus_minus(record.cross_gain, record.cross_gain_se)} nats per particle on the other half-set, less than "
            "two standard errors."
        )
    elif record.moving_size_A is not None and record.moving_error_A is not None and _untold(point):
        found.append(f"How the moving part moves is not told: {_size(record.moving_size_A, record.moving_error_A)} Å.")
    flattered = [one for one in point.comparisons if one.flattered]
    if flattered:
        figures = " and ".join(
            f"{_reached(one, INDEPENDENT, 0.143)}, not {_reached(one, 'shared', 0.143)}, over the {one.part}"
            for one in flattered
        )
        found.append(
            f"The half-maps of one model share its errors: trust the independent half-maps (FSC 0.143: {figures})."
        )
    return found


def _agreement(point: ValidatedPoint) -> str:
    record, comparisons = point.record, point.comparisons
    reached = f" Their half-maps reach {_reached(comparisons[0], INDEPENDENT, 0.143)}." if comparisons else ""
    if not point.claims_motion:
        also = "find no motion either" if len(point.resting) == 2 else "have no motion to confirm"
        return f"{_NEVER_MET} {also}.{reached}"
    if record.moving_size_A is None or record.moving_error_A is None:
        return f"{_NEVER_MET} agree: density moves {_size(record.motion_size_A, record.motion_error_A)} Å.{reached}"
    moves = _size(record.moving_size_A, record.moving_error_A)
    return f"{_NEVER_MET} agree: the part that moves moves {moves} Å.{reached}"


def rest_sentence(point: ValidatedPoint) -> str:
    """Which halves' models stand still; empty where both move."""
    if not point.resting:
        return ""
    why = "held-out particles confirm no motion"
    left_out = "its error, its resolution and the latents' errors are left out here"
    if len(point.resting) == 2:
        return (
            f"The models of both half-sets were set to rest: {why}. Motion that neither half "
            f"confirms is not confirmed: {left_out}."
        )
    return (
        f"The model of half-set {point.resting[0]} was set to rest: {why}. Motion that only one half confirms is not "
        f"confirmed: {left_out}."
    )


def _resting(point: ValidatedPoint) -> str:
    if len(point.resting) == 2:
        return "the models of both half-sets alone stand still"
    return f"the model of half-set {point.resting[0]} alone stands still"


def fsc_sentence(one: FscComparison) -> str:
    """Resolutions of both pairs of half-maps, and by how much the shell of the largest difference differs."""
    name = f"{one.part[0].upper()}{one.part[1:]}"
    own = [_reached(one, INDEPENDENT, threshold) for threshold in (0.143, 0.5)]
    if not one.has_shared:
        return (
            f"{name}: the independent half-maps reach {own[0]} at FSC 0.143 and {own[1]} at 0.5. Those of one shared "
            "model were not made, so there is nothing to compare with."
        )
    shared = [_reached(one, "shared", threshold) + _difference(one, threshold) for threshold in (0.143, 0.5)]
    largest, at_A = one.largest_difference
    higher = (
        f"at most {largest:.3f} higher (at {angstrom(at_A)} Å), on average {_above(one.mean_difference)}"
        if largest > 0
        else f"nowhere higher, on average {_above(one.mean_difference)}"
    )
    return (
        f"{name}: the independent half-maps reach {own[0]} at FSC 0.143 and {own[1]} at 0.5, those of one shared model "
        f"{shared[0]} and {shared[1]}. Shell by shell the shared curve lies {higher}."
    )


def shared_sentence(one: FscComparison) -> str:
    """How much of the FSC came of sharing a model; of curves that can be compared."""
    if one.flattered:
        return (
            f"The FSC of the shared model looks better than it is ({one.part}). The half-maps of one model share its "
            "errors: trust the independent curve. Each independent model has learnt from half the particles; that may "
            "account for some of the difference, but the curves cannot say for how much."
        )
    return "Nothing of the FSC was shared: half-maps that share no model agree as well."


def _reached(one: FscComparison, model: str, threshold: float) -> str:
    value = one.resolution_A(model, threshold)
    return f"{angstrom(value)} Å" if value else f"beyond {angstrom(one.limit_A)} Å"


def _difference(one: FscComparison, threshold: float) -> str:
    """By how much the shared model's resolution is better; empty where either has none."""
    shared, own = (one.resolution_A(model, threshold) for model in ("shared", INDEPENDENT))
    if not shared or not own:
        return ""
    better = own - shared
    if abs(better) < 0.005:
        return " (no difference)"
    return f" ({abs(better):.2f} Å {'better' if better > 0 else 'worse'})"


def _above(difference: float) -> str:
    if abs(difference) < 0.0005:
        return "level"
    return f"{abs(difference):.3f} {'higher' if difference > 0 else 'lower'}"


def motion_sentence(point: ValidatedPoint, mask: Map | None) -> str:
    """How far density moves, with its error, and where that is not told."""
    record = point.record
    whole = (
        f"{_size(record.motion_size_A, record.motion_error_A)} Å{_times(record.motion_size_A, record.motion_error_A)}"
    )
    if record.moving_size_A is None or record.moving_error_A is None:
        parts = [f"Over the whole map density moves {whole}; no part moves more than the rest."]
    else:
        size, error = record.moving_size_A, record.moving_error_A
        parts = [
            f"The part that moves moves {_size(size, error)} Å (rms over particles and density){_times(size, error)}; "
            f"over the whole map it is {whole}."
        ]
        if _untold(point):
            parts.append("The error is as large as the motion: how that part moves is not told.")
    share = point.untold_share(mask)
    if share is not None and share > 0:
        parts.append(
            f"In {percent(share)} of the mask's volume the error exceeds the motion: the motion is not told there."
        )
    elif share is not None:
        parts.append("Nowhere in the mask does the error exceed the motion.")
    return " ".join(parts)


def _untold(point: ValidatedPoint) -> bool:
    size, error = point.record.moving_size_A, point.record.moving_error_A
    return point.claims_motion and size is not None and error is not None and error >= size


def _times(size: float, error: float) -> str:
    return f", {number(size / error, 2)} times its error" if error > 0 else ""


def _size(value: float, error: float) -> str:
    """A motion and its error with the same decimals: ``6.0 ± 0.9``."""
    decimals = 1 if error >= 0.095 else 2
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def region_sentence(point: ValidatedPoint) -> str:
    """Whether there are regions of latent space whose particles' motion is not told; empty without the table."""
    regions = point.regions
    if regions is None:
        return ""
    untold = regions[regions["error_A"] > regions["motion_A"]]
    if not len(untold):
        return "In every region of latent space the motion, the distance from the mean shape, exceeds its error."
    count = int(untold["particles"].sum())
    return (
        f"In {len(untold)} of {len(regions)} regions of latent space ({count:,} particles) the error exceeds the "
        "motion, the distance from the mean shape: these particles cannot be told from it."
    )


def modes_sentence(point: ValidatedPoint) -> str:
    """Down to which wavelength the two models agree on the motion."""
    count, limit_A = point.record.num_modes_agreeing, point.record.mode_limit_A
    if not count or limit_A is None:
        return "The two models do not agree even on the softest modes of the mesh."
    compared = None if point.modes is None else int(point.modes["last_mode"].max())
    which = f"all {count} modes of the mesh that were compared" if count == compared else f"the softest {count} modes"
    if limit_A > _WHOLE_BODY_A:
        return f"The two models agree on {which}, motions of whole bodies against each other; on no bending."
    return f"The two models agree on {which}, down to a wavelength of {number(limit_A)} Å."


def latents_sentence(point: ValidatedPoint) -> str:
    """Whether the latents' standard errors hold; empty without the table."""
    table = point.calibration
    if table is None:
        return ""
    small = table[table["factor"] > TOO_SMALL]
    if not len(small):
        return f"The latents' standard errors hold: none is too small by more than a factor of {TOO_SMALL:g}."
    listed = ", ".join(f"latent {row.latent:.0f} by a factor of {row.factor:.2f}" for row in small.itertuples())
    return (
        f"Standard errors are too small: {listed}. They know of the noise of the images and not of what the model does "
        f"not know; {point.folder.latents.name} of this sweep point's validation has corrected ones."
    )


def cross_sentence(point: ValidatedPoint) -> str:
    """The cross score beside the held-out one."""
    record, shared = point.record, point.shared
    if record.cross_gain is None:
        return "No particle was scored by the other half-set's model."
    gain = plus_minus(record.cross_gain, record.cross_gain_se)
    sentence = (
        f"Each half-set's particles, predicted by the model of the other: {gain} "
        f"nats per particle more than by a rigid one ({record.cross_particles:,} particles)."
    )
    if shared is None or shared.validation_gain is None:
        return sentence
    return (
        f"{sentence} The model of all particles gains {plus_minus(shared.validation_gain, shared.validation_gain_se)} "
        "on those that were held out of its training."
    )


def point_title(point: ValidatedPoint) -> str:
    """A sweep point in full."""
    return f"{facts.point_label(point.point)}, mesh {point.point.cells}, seed {point.point.seed}"


def point_line(point: ValidatedPoint) -> str:
    """A sweep point in a line."""
    return f"{point_title(point)}: {verdict(point)}"
