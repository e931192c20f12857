"""The report's section on two models that never met: what they agree on of map, motion and latents."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from markupsafe import Markup

from flexlib.imaging.maps import Map
from flexlib.records import AgreementRecord
from flexlib.report import facts, pictures
from flexlib.report.formats import angstrom, number, plus_minus
from flexlib.report.markup import render
from flexlib.report.pictures import ACCENT, FLEX
from flexlib.report.plots import styled
from flexlib.report.reading import map_at, read_record, read_table
from flexlib.report.results import Results
from flexlib.report.tables import Table
from flexlib.workflow_support.scores import confirms_motion

INDEPENDENT = "#1d7a46"
SHARED_FSC, SHARED_RESOLUTION = 0.02, 1.03  # mean of FSC, and ratio of resolutions, from which on a warning is due
_SIGNAL = 0.9  # FSC below which shells are compared: above, nothing is left to be shared
_TOO_SMALL = 1.1  # factor on standard errors that is worth a sentence


@dataclass(frozen=True)
class SharedFsc:
    """How much better one model's half-maps agree than independent ones, over the whole map or its moving part."""

    region: str  # "whole map" or "moving part"
    mean: float  # of the difference of FSC, over the shells where the independent one is below 0.9
    largest: float
    largest_at_A: float
    resolution_A: tuple[float | None, float | None]  # at 0.143: of one model's, of independent half-maps
    half_A: tuple[float | None, float | None]  # at 0.5

    @property
    def is_much(self) -> bool:
        """Whether the half-maps of one model promise more than independent ones hold."""
        ratios = [own / other for other, own in (self.resolution_A, self.half_A) if own and other]
        return self.mean > SHARED_FSC or any(ratio > SHARED_RESOLUTION for ratio in ratios)

    @property
    def sentence(self) -> str:
        """All of it."""
        (shared, own), (shared_half, own_half) = self.resolution_A, self.half_A
        begin = (
            f"{self.region.capitalize()}: {_reach(own, own_half)} from independent models, "
            f"{_reach(shared, shared_half)} from one model of all particles."
        )
        if self.is_much:
            return (
                f"{begin} Half-maps of one model share its errors: their FSC is {self.mean:.3f} too high on average, "
                f"most at {angstrom(self.largest_at_A)} Å ({self.largest:.3f}). "
                "Trust the independent one."
            )
        return (
            f"{begin} Hardly anything of that was shared: the FSC of one model's half-maps is "
            f"{abs(self.mean):.3f} {'higher' if self.mean >= 0 else 'lower'} on average."
        )


def _reach(resolution_A: float | None, half_A: float | None) -> str:
    at = [f"{angstrom(value)} Å at {name}" for value, name in ((resolution_A, "0.143"), (half_A, "0.5")) if value]
    return " and ".join(at) or "all shells above 0.5"


def shared_fsc(independent: pd.DataFrame, shared: pd.DataFrame) -> list[SharedFsc]:
    """Compare the FSC of independent half-maps with that of one model's, in the regions that both have."""
    found = []
    for region, kind in (("whole map", "corrected"), ("moving part", "moving")):
        own, other = f"fsc_independent_{kind}", f"fsc_flex_{kind}"
        if own not in independent or other not in shared or len(independent) != len(shared):
            continue
        curve = independent[own].to_numpy(float)
        difference = shared[other].to_numpy(float) - curve
        weak = np.flatnonzero(curve < _SIGNAL)
        shells = np.arange(weak[0] if len(weak) else len(curve) - 1, len(curve))
        largest = int(shells[np.argmax(difference[shells])])
        limits = [
            (facts.resolution_A(shared, other, at), facts.resolution_A(independent, own, at)) for at in (0.143, 0.5)
        ]
        at_A = 1.0 / float(independent["frequency_1_per_A"].iloc[largest])
        mean = float(difference[shells].mean())
        found.append(SharedFsc(region, mean, float(difference[largest]), at_A, limits[0], limits[1]))
    return found


def independent_section(results: Results) -> Markup:
    """What two models of half the particles each agree on."""
    folder = results.validate_folder
    record = read_record(AgreementRecord, folder.record)
    if record is None:
        return render("independent", record=None)
    fsc, shared = read_table(folder.fsc), results.fsc
    compared = [] if fsc is None or shared is None else shared_fsc(fsc, shared)
    moves = not any(record.at_rest)
    error, modes = map_at(folder.motion_error), read_table(folder.modes)
    mask = results.reconstruction_mask
    return render(
        "independent",
        record=record,
        rest=_rest_sentence(results, record),
        cross=_cross_sentence(results, record),
        compared=compared,
        curves=None if fsc is None else fsc_comparison(fsc, shared),
        motion=_motion_sentence(record) if moves else None,
        untold=_untold_share(error, map_at(folder.motion_size), mask) if moves else None,
        slices=pictures.map_slices([("error of the motion", _inside(error, mask))], mask) if moves and error else None,
        regions=_region_table(read_table(folder.regions)) if moves else None,
        modes=None if modes is None or not moves else mode_plot(modes),
        mode_sentence=_mode_sentence(record) if moves else None,
        latents=_latent_table(read_table(folder.calibration)) if moves else None,
        latent_warning=_latent_warning(record) if moves else None,
    )


def _rest_sentence(results: Results, record: AgreementRecord) -> str | None:
    """Where a half-set's model was set to rest."""
    validation = results.validation
    shared_moves = validation is not None and validation.rejected_gain is None
    if all(record.at_rest):
        begin = "Neither half-set on its own confirms motion: both models were set to rest."
    elif any(record.at_rest):
        begin = f"Half-set {record.at_rest.index(True) + 1} on its own confirms no motion: its model was set to rest."
    else:
        return None
    if not shared_moves:
        return begin
    return f"{begin} The model of all particles moves; what half of them cannot repeat should not be relied on."


def _cross_sentence(results: Results, record: AgreementRecord) -> str:
    """Held-out scores across the half-sets."""
    if not record.cross_particles:
        return ""
    gain = plus_minus(record.cross_gain, record.cross_gain_se)
    own, error = facts.gain(results)
    beside = "" if own is None or error is None else f" (the model of all: {plus_minus(own, error)} on held-out ones)"
    confirmed = confirms_motion(record.gain, record.gain_se)
    meaning = "" if confirmed or any(record.at_rest) else " That confirms no motion."
    return (
        f"Each half-set's model predicts the other's particles better than a rigid one, by {gain} nats per particle"
        f"{beside}.{meaning}"
        if record.gain > 0
        else f"The half-sets' models predict each other's particles no better than rigid ones ({gain} nats).{meaning}"
    )


def _motion_sentence(record: AgreementRecord) -> str:
    """The motion with its error."""
    whole = f"density moves by {number(record.motion_size_A)} ± {number(record.motion_error_A, 2)} Å rms"
    if record.moving_size_A is None or record.moving_error_A is None:
        return f"Over the whole map {whole}."
    moving = f"{number(record.moving_size_A)} ± {number(record.moving_error_A, 2)} Å"
    return f"The part that moves moves by {moving} rms; over the whole map {whole}."


def _inside(map_: Map, mask: Map | None) -> Map:
    """A map where the mask is; it goes on beyond it for the sake of surfaces."""
    if mask is None or mask.box != map_.box:
        return map_
    return Map(map_.data * (mask.data > 0.5), map_.pixel_size_A)


def _untold_share(error: Map | None, size: Map | None, mask: Map | None) -> str | None:
    """Where the error is larger than the motion."""
    if error is None or size is None or mask is None or not mask.box == error.box == size.box:
        return None
    inside = mask.data > 0.5
    share = float((error.data[inside] > size.data[inside]).mean()) if inside.any() else 0.0
    return f"In {share:.0%} of the mask the error is larger than the motion: there it is not told." if share else None


def _region_table(regions: pd.DataFrame | None) -> Table | None:
    """Errors by region of latent space."""
    if regions is None:
        return None
    centres = [name for name in regions if name.startswith("latent")]
    rows = [
        [
            number(row["particles"], 7),
            ", ".join(f"{row[name]:.2f}" for name in centres),
            f"{number(row['motion_A'])} Å",
            f"{number(row['error_A'], 2)} Å",
            f"{number(row['model_error_A'], 2)} Å",
        ]
        for _, row in regions.iterrows()
    ]
    return Table(("particles", "mean latents", "from the mean shape", "error", "of that, the flow's"), rows)


def _mode_sentence(record: AgreementRecord) -> str:
    """Up to where the models agree on the motion."""
    if not record.num_modes_agreeing or record.mode_limit_A is None:
        return "The two models agree on no mode of the mesh."
    return (
        f"The two models agree on the motion along the {record.num_modes_agreeing} softest modes of the mesh, "
        f"down to a wavelength of {number(record.mode_limit_A)} Å."
    )


def _latent_table(calibration: pd.DataFrame | None) -> Table | None:
    """Standard errors of latents beside the models' disagreement."""
    if calibration is None:
        return None
    rows = [
        [
            f"{row['latent']:.0f}",
            number(row["std_err"]),
            number(row["model_std_err"]),
            f"{row['coverage']:.0%}",
            number(row["factor"]),
        ]
        for _, row in calibration.iterrows()
    ]
    head = ("latent", "standard error by the image", "by the model", "models agree within it", "factor on it")
    return Table(head, rows)


def _latent_warning(record: AgreementRecord) -> str | None:
    """Latents whose standard errors are too small."""
    small = [f"{k} ({number(f)} times)" for k, f in enumerate(record.std_err_factor, 1) if f > _TOO_SMALL]
    if not small:
        return None
    return f"Standard errors are too small for latent {', '.join(small)}: latents.star of validate has corrected ones."


def fsc_comparison(independent: pd.DataFrame, shared: pd.DataFrame | None) -> go.Figure:
    """FSC of independent and of one model's half-maps: whole map solid, moving part dash-dotted."""
    figure = go.Figure()
    sources = [("independent", independent, "independent", INDEPENDENT)]
    if shared is not None:
        sources.append(("flex", shared, "one model", FLEX))
    for model, table, label, colour in sources:
        for kind, dash in (("corrected", "solid"), ("moving", "dashdot")):
            column = f"fsc_{model}_{kind}"
            if column in table:
                where = "" if kind == "corrected" else ", where it moves"
                figure.add_scatter(
                    x=table["frequency_1_per_A"],
                    y=table[column],
                    name=f"{label}{where}",
                    mode="lines",
                    line={"color": colour, "dash": dash, "width": 2.2},
                    hovertemplate="%{y:.3f} at %{x:.4f} 1/Å<extra>" + f"{label}{where}</extra>",
                )
    figure.add_hline(y=0.143, line={"color": ACCENT, "width": 1.2, "dash": "dash"})
    figure.update_xaxes(title="frequency (1/Å)")
    figure.update_yaxes(title="Fourier shell correlation", range=[-0.08, 1.04])
    return styled(figure, 400, legend={"x": 0.02, "y": 0.05, "yanchor": "bottom"})


def mode_plot(modes: pd.DataFrame) -> go.Figure:
    """Correlation of the two models' motions by the stiffness of the mesh's modes."""
    figure = go.Figure(
        go.Scatter(
            x=modes["last_mode"],
            y=modes["correlation"],
            customdata=modes[["length_A", "motion_A"]],
            mode="lines+markers",
            line={"color": INDEPENDENT, "width": 2},
            hovertemplate="mode %{x}, %{customdata[0]:.0f} Å: %{y:.3f}; motion %{customdata[1]:.2f} Å<extra></extra>",
        )
    )
    figure.add_hline(y=0.5, line={"color": ACCENT, "width": 1.2, "dash": "dash"})
    figure.update_xaxes(title="mode of the mesh, softest first")
    figure.update_yaxes(title="correlation of the motions", range=[min(-0.1, float(modes["correlation"].min())), 1.04])
    return styled(figure, 340)
