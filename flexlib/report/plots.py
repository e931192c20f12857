"""Interactive figures of the report (Plotly)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import plotly.graph_objects as go

from flexlib.report.facts import FSC_KINDS, FSC_LABELS, fsc_column
from flexlib.report.pictures import ACCENT, FLEX, GRID, INK, MUTED, RIGID
from flexlib.validate.mode_agreement import AGREED

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_MAX_EIGENVALUES = 24
_LOG_ABOVE = 60  # eigenvalues this large need a logarithmic axis
_PALE = "#a9c8e6"


def styled(figure: go.Figure, height: int = 380, **layout: Any) -> go.Figure:
    """The report's fonts, colours and margins."""
    base = {
        "template": "none",
        "height": height,
        "font": {"family": _FONT, "size": 13, "color": INK},
        "margin": {"l": 70, "r": 20, "t": 36, "b": 56},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "legend": {"bgcolor": "rgba(255,255,255,0.8)"},
        "hoverlabel": {"font": {"family": _FONT}},
    }
    figure.update_layout({**base, **layout})
    axis = {"gridcolor": GRID, "zeroline": False, "linecolor": MUTED, "ticks": "outside", "tickcolor": GRID}
    axis["title"] = {"standoff": 10}
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    return figure


# training -------------------------------------------------------------------------------------------------------


_CURVES = {
    "loss": "misfit (nats per particle)",
    "rate": "step size (relative)",
    "rigidity": "strain energy",
    "rms_displacement_A": "motion (Å rms)",
    "validation_gain": "held-out gain (nats per particle)",
    "resolution_A": "resolution in use (Å)",
}


def training_curves(log: pd.DataFrame, box_A: float | None = None) -> dict[str, go.Figure]:
    """A small figure for each numeric column of the log against the epoch, by column name.

    With the box's side ``box_A`` the band of frequencies in use is shown in Angstrom.
    """
    epoch = log["epoch"] if "epoch" in log else pd.Series(np.arange(1, len(log) + 1), log.index)
    if box_A is not None and "band_shell" in log:
        log = log.assign(resolution_A=box_A / log["band_shell"]).drop(columns="band_shell")
    figures = {}
    for column in log.select_dtypes("number"):
        known = log[column].notna()
        if column in ("epoch", "seconds") or column.endswith("_se") or not known.any():
            continue
        error = log.get(f"{column}_se")
        figure = go.Figure(
            go.Scatter(
                x=epoch[known],
                y=log.loc[known, column],
                error_y=None if error is None else {"type": "data", "array": error[known], "thickness": 1, "width": 2},
                mode="lines+markers" if known.sum() < 40 else "lines",
                line={"color": FLEX, "width": 1.8},
                marker={"size": 4},
                hovertemplate="epoch %{x}: %{y:.4g}<extra></extra>",
            )
        )
        figure.update_xaxes(title="epoch")
        label = _CURVES.get(column, column.replace("_", " "))
        title = {"text": label, "font": {"size": 13}, "x": 0.5, "y": 0.95}
        styled(figure, 230, showlegend=False, title=title)
        figures[column] = figure.update_layout(margin={"l": 52, "r": 10, "t": 34, "b": 44})
    return figures


def spectrum_plot(spectrum: pd.DataFrame, suggested_dims: int | None = None) -> go.Figure:
    """The first eigenvalues of the spectral start beside the edge of pure noise; the suggested ones are dark."""
    spectrum = spectrum.head(_MAX_EIGENVALUES)
    index = spectrum["index"] if "index" in spectrum else pd.Series(np.arange(1, len(spectrum) + 1))
    index = index + (1 - index.min())
    edge = spectrum.get("noise_edge")
    above = spectrum["eigenvalue"] > edge if edge is not None else np.ones(len(spectrum), bool)
    dims = len(spectrum) if suggested_dims is None else suggested_dims
    colours = [(FLEX if i <= dims else _PALE) if flag else RIGID for i, flag in zip(index, above, strict=True)]
    figure = go.Figure(
        go.Bar(
            x=index,
            y=spectrum["eigenvalue"],
            marker={"color": colours},
            hovertemplate="eigenvalue %{x}: %{y:.3f}<extra></extra>",
        )
    )
    label = {"showarrow": False, "font": {"color": ACCENT, "size": 12}, "bgcolor": "rgba(255,255,255,0.85)"}
    if edge is not None:
        figure.add_scatter(
            x=index, y=edge, mode="lines", line={"color": ACCENT, "dash": "dash", "width": 1.6}, hoverinfo="skip"
        )
        height = float(np.log10(edge.iloc[-1])) if spectrum["eigenvalue"].max() > _LOG_ABOVE else edge.iloc[-1]
        figure.add_annotation(
            x=index.iloc[-1], y=height, text="edge of pure noise", xanchor="right", yshift=-12, **label
        )
    if suggested_dims is not None and 0 < suggested_dims < len(spectrum):
        figure.add_vline(x=suggested_dims + 0.5, line={"color": INK, "dash": "dot", "width": 1.2})
        words = f"{suggested_dims} latent dimension{'s' if suggested_dims > 1 else ''} suggested"
        label = {**label, "font": {"color": INK, "size": 12}}
        figure.add_annotation(x=suggested_dims + 0.5, y=1, yref="paper", text=words, xanchor="left", xshift=6, **label)
    figure.update_xaxes(title="eigenvalue number", dtick=1 if len(spectrum) <= 20 else None)
    log = spectrum["eigenvalue"].max() > _LOG_ABOVE
    figure.update_yaxes(title="variance (noise = 1)", type="log" if log else "linear")
    return styled(figure, 320, showlegend=False)


# latents --------------------------------------------------------------------------------------------------------


def latent_scatter(count: int) -> go.Figure:
    """Particles over two latents; the page's script adds the ``count`` rows and exchanges axes and colours."""
    figure = go.Figure(
        go.Scattergl(
            mode="markers",
            marker={
                "size": float(np.clip(160 / np.sqrt(count), 1.6, 7)),
                "colorscale": "Viridis",
                "showscale": True,
                "opacity": 0.8,
                "colorbar": {"title": {"side": "right"}, "thickness": 14},
            },
            unselected={"marker": {"opacity": 0.12}},
            hovertemplate="particle in row %{customdata} of the input<br>(%{x:.3f}, %{y:.3f})<extra></extra>",
        )
    )
    return styled(figure, 470, showlegend=False, dragmode="zoom", hovermode="closest")


def add_series_paths(figure: go.Figure, series: pd.DataFrame) -> None:
    """Draw where the generated frames lie, crosses where beyond the data; ``series`` is series.csv."""
    for name, frames in series.groupby("series", sort=False):
        figure.add_scattergl(
            customdata=[plain_numbers(frames[c]) for c in frames if c.startswith("latent_")],
            mode="lines+markers",
            line={"color": ACCENT, "width": 1.5},
            marker=_frame_markers(frames),
            text=[
                f"{str(name).replace('_', ' ')}, frame {row.frame + 1}: {row.num_particles} particles near"
                for row in frames.itertuples()
            ],
            hovertemplate="%{text}<extra></extra>",
        )


def _frame_markers(frames: pd.DataFrame) -> dict[str, Any]:
    beyond = frames["beyond_data"].to_numpy() > 0
    return {
        "size": np.where(beyond, 7, 4).tolist(),
        "color": np.where(beyond, "#a5161c", ACCENT).tolist(),
        "symbol": np.where(beyond, "x", "circle").tolist(),
    }


def latent_density() -> go.Figure:
    """Particles per bin over the same axes; the page's script adds the particles and the bins."""
    figure = go.Figure(
        go.Histogram2d(
            colorscale="YlGnBu",
            colorbar={"title": {"text": "particles per bin", "side": "right"}, "thickness": 14},
            hovertemplate="%{z} particles near (%{x:.2f}, %{y:.2f})<extra></extra>",
        )
    )
    return styled(figure, 470)


def latent_histogram() -> go.Figure:
    """Histogram of a single latent; the page's script adds the particles."""
    figure = go.Figure(go.Histogram(marker={"color": FLEX}, hovertemplate="%{y} particles near %{x}<extra></extra>"))
    figure.update_yaxes(title="particles")
    return styled(figure, 470, bargap=0.04)


def plain_numbers(values: npt.ArrayLike) -> list[float]:
    """Plain numbers with 4 significant digits: small in the file, sharp enough for a plot."""
    return [float(f"{value:.4g}") for value in np.asarray(values, dtype=float)]


# resolution -----------------------------------------------------------------------------------------------------


_DASHES = {"corrected": "solid", "masked": "dash", "unmasked": "dot", "moving": "dashdot"}
_GREY_LINE = "#7d8793"
_RESOLUTIONS_A = (100, 50, 30, 20, 15, 12, 10, 9, 8, 7, 6, 5, 4.5, 4, 3.5, 3, 2.5, 2, 1.5)
_WAVELENGTHS_A = (1000, 500, 300, 200, 150, 120, 100, 80, 70, 60, 50, 45, 40, 35, 30, 25, 20, 18, 16, 14, 12, 10, 8, 6)


def fsc_plot(fsc: pd.DataFrame) -> go.Figure:
    """FSC of flexible and rigid half-maps: corrected solid, masked dashed, unmasked dotted, moving part dash-dotted."""
    figure = go.Figure()
    best = {model: fsc_column(fsc, model) for model in ("flex", "rigid")}
    for model, colour, label in (("rigid", _GREY_LINE, "rigid"), ("flex", FLEX, "flexible")):
        for kind in FSC_KINDS:
            column = fsc_column(fsc, model, kind)
            if column is None:
                continue
            line = {"color": colour, "dash": _DASHES[kind], "width": 2.6 if column == best[model] else 1.6}
            trace = _add_fsc(figure, fsc["frequency_1_per_A"], fsc[column], f"{label}, {FSC_LABELS[kind]}", line)
            trace.visible = True if column == best[model] or kind == "moving" else "legendonly"
    return _with_fsc_axes(figure, float(fsc["frequency_1_per_A"].max()), 420)


def fsc_comparison_plot(curves: pd.DataFrame, label: str) -> go.Figure:
    """FSC of the ``independent`` half-maps, and of the ``shared`` model's where it is there."""
    figure = go.Figure()
    lines = {"shared": ("one shared model", RIGID, 5.0), "independent": ("independent halves", FLEX, 2.0)}
    for column, (name, colour, width) in lines.items():
        if column in curves:
            _add_fsc(figure, curves["frequency_1_per_A"], curves[column], name, {"color": colour, "width": width})
    title = {"text": label, "font": {"size": 13}, "x": 0.5, "y": 0.97}
    return _with_fsc_axes(figure, float(curves["frequency_1_per_A"].max()), 360).update_layout(title=title)


def _add_fsc(
    figure: go.Figure, frequency_1_per_A: pd.Series, curve: pd.Series, name: str, line: dict[str, Any]
) -> go.Scatter:
    figure.add_scatter(
        x=frequency_1_per_A,
        y=curve,
        name=name,
        mode="lines",
        line=line,
        customdata=[1 / f if f > 0 else None for f in frequency_1_per_A],
        hovertemplate="%{y:.3f} at %{customdata:.2f} Å<extra>" + f"{name}</extra>",
    )
    return figure.data[-1]


def _with_fsc_axes(figure: go.Figure, highest_1_per_A: float, height: int) -> go.Figure:
    _add_threshold(figure, 0.143)
    _set_lengths(figure, _RESOLUTIONS_A, highest_1_per_A, "resolution (Å)")
    figure.update_yaxes(title="Fourier shell correlation", range=[-0.08, 1.04])
    return styled(figure, height, legend={"x": 0.02, "y": 0.3, "yanchor": "bottom"})


def _add_threshold(figure: go.Figure, value: float) -> None:
    """A dashed line across, with its value."""
    figure.add_hline(
        y=value,
        line={"color": ACCENT, "width": 1.2, "dash": "dash"},
        annotation_text=f"{value:g}",
        annotation_position="top left",
        annotation_font={"size": 11, "color": ACCENT},
    )


def _set_lengths(figure: go.Figure, lengths_A: Sequence[float], highest_1_per_A: float, title: str) -> None:
    """An axis of frequencies up to the highest, with those of ``lengths_A`` as labels that have room."""
    spaced: list[float] = []
    for length_A in lengths_A:
        if 1 / length_A <= highest_1_per_A and (not spaced or 1 / length_A - 1 / spaced[-1] > 0.07 * highest_1_per_A):
            spaced.append(length_A)
    figure.update_xaxes(
        title=title,
        tickvals=[1 / length_A for length_A in spaced],
        ticktext=[f"{length_A:g}" for length_A in spaced],
        range=[0, highest_1_per_A],
    )


def modes_plot(modes: pd.DataFrame, limit_A: float | None) -> go.Figure:
    """Correlation of two models' motions along the mesh's modes, by wavelength; ``limit_A`` is the last that agrees."""
    frequency = 1 / modes["length_A"]
    figure = go.Figure(
        go.Scatter(
            x=frequency,
            y=modes["correlation"],
            mode="lines+markers",
            line={"color": FLEX, "width": 2.2},
            marker={"size": 6},
            customdata=modes[["first_mode", "last_mode", "length_A", "motion_A"]].to_numpy().tolist(),
            hovertemplate="modes %{customdata[0]} to %{customdata[1]}, %{customdata[2]:.3g} Å: correlation %{y:.2f}, "
            "motion %{customdata[3]:.2g} Å rms<extra></extra>",
        )
    )
    _add_threshold(figure, AGREED)
    if limit_A is not None:
        figure.add_vline(x=1 / limit_A, line={"color": INK, "dash": "dot", "width": 1.2})
    _set_lengths(figure, _WAVELENGTHS_A, 1.03 * float(frequency.max()), "wavelength (Å)")
    figure.update_yaxes(title="correlation", range=[min(-0.08, modes["correlation"].min()), 1.04])
    return styled(figure, 320, showlegend=False)


def convergence_plot(convergence: pd.DataFrame) -> go.Figure:
    """Relative gradient of each reconstruction against its iterations."""
    figure = go.Figure()
    colours = {"flex": FLEX, "rigid": _GREY_LINE}
    labels = {"flex": "flexible"}
    for (model, half), part in convergence.groupby(["model", "half"], sort=False):
        figure.add_scatter(
            x=part["iteration"],
            y=part["relative_gradient"],
            name=f"{labels.get(model, model)}, half {half}",
            mode="lines",
            line={"color": colours.get(model, ACCENT), "dash": "solid" if half == 1 else "dot", "width": 2},
        )
    figure.update_xaxes(title="iteration")
    figure.update_yaxes(title="relative gradient", type="log", exponentformat="power", dtick=1)
    return styled(figure, 300, legend={"x": 1, "xanchor": "right", "y": 1})
