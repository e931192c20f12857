"""Interactive figures of the report (Plotly)."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from flexlib.imaging.fsc import resolution_at
from flexlib.report.pictures import ACCENT, FLEX, GRID, INK, MUTED, RIGID

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
SWEPT = {"cells": "mesh cells", "latent_dims": "latent dims", "rigidity": "rigidity λ", "seed": "seed"}
_MAX_EIGENVALUES = 24
_MOST_PANELS = 6
_MOST_POINTS = 20  # of the sweep, drawn beside each other
_TERSE = {"cells": "mesh", "latent_dims": "K", "rigidity": "λ", "seed": "seed"}
_LOG_ABOVE = 60  # eigenvalues this large need a logarithmic axis
_PALE = "#a9c8e6"


def styled(figure: go.Figure, height: int = 380, **layout) -> go.Figure:
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


# sweep ----------------------------------------------------------------------------------------------------------


def swept_columns(sweep: pd.DataFrame) -> list[str]:
    """Settings that take more than one value in the sweep, the seed last."""
    return [name for name in SWEPT if name in sweep and sweep[name].nunique() > 1]


def paired(sweep: pd.DataFrame) -> bool:
    """Whether the table has each point's difference to the best, with the standard error of the difference itself."""
    return "difference_to_best_se" in sweep and sweep["difference_to_best_se"].notna().any()


def gain_errors(sweep: pd.DataFrame) -> pd.Series:
    """Standard errors of the points' differences to the best, else of their gains; nan where there are none."""
    if paired(sweep):
        return sweep["difference_to_best_se"]
    return sweep.get("validation_gain_se", pd.Series(np.nan, sweep.index)).astype(float)


def sweep_gains(sweep: pd.DataFrame) -> go.Figure:
    """Held-out gain of each point, best at the top, with standard errors (``gain_errors``).

    The lines are the best and one standard error of it less; the colours tell the chosen point, those between the
    lines, and the rest.
    """
    ordered = sweep.sort_values("validation_gain", ascending=False)
    best = ordered.iloc[0]
    errors = gain_errors(ordered).fillna(0.0)
    best_error = best.get("validation_gain_se", np.nan)
    least = best["validation_gain"] - (best_error if np.isfinite(best_error) else 0.0)
    as_good = ordered["validation_gain"] >= least
    chosen = ordered["chosen"] if "chosen" in ordered else pd.Series(False, ordered.index)
    keep = (np.arange(len(ordered)) < _MOST_POINTS) | chosen.to_numpy()
    names = [name for name in SWEPT if name in sweep and (sweep[name].nunique() > 1 or len(swept_columns(sweep)) == 0)]
    labels = pd.Series(
        [", ".join(f"{_TERSE[name]} {_short(row[name])}" for name in names) for _, row in ordered.iterrows()],
        ordered.index,
    )
    figure = go.Figure()
    groups = (
        ("chosen", chosen, FLEX, 12),
        ("within one standard error of the best", as_good & ~chosen, "#7fb0dc", 9),
        ("worse", ~as_good & ~chosen, RIGID, 9),
    )
    for name, rows, colour, size in groups:
        rows = rows & keep
        if not rows.any():
            continue
        figure.add_scatter(
            x=ordered.loc[rows, "validation_gain"],
            y=labels[rows],
            error_x={"type": "data", "array": errors[rows], "thickness": 1.6, "width": 4},
            mode="markers",
            name=name,
            marker={"size": size, "color": colour},
            hovertemplate="%{y}: %{x:.2f} nats per particle<extra></extra>",
        )
    figure.add_vline(x=best["validation_gain"], line={"color": ACCENT, "width": 1.2, "dash": "dash"})
    figure.add_vline(x=least, line={"color": ACCENT, "width": 1.2, "dash": "dot"})
    # far from zero, the differences between points are what matters
    shown = ordered.loc[keep, "validation_gain"]
    near_zero = (shown - errors[keep]).min() < 0.3 * shown.max()
    figure.update_xaxes(title="held-out gain (nats per particle)", rangemode="tozero" if near_zero else "normal")
    order = labels[keep].tolist()[::-1]
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=order, automargin=True)
    legend = {"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom"}
    height = int(np.clip(130 + 24 * keep.sum(), 260, 620))
    return styled(figure, height, legend=legend, showlegend=True, margin={"l": 20, "r": 20, "t": 64, "b": 56})


def sweep_heat_map(sweep: pd.DataFrame) -> go.Figure | None:
    """Held-out gain over two settings, a panel for each value of a third; None where fewer than two settings vary.

    Seeds and further settings are averaged. Colours span two standard errors at least, so that smaller differences do
    not look large.
    """
    from plotly.subplots import make_subplots

    varied = sorted((n for n in swept_columns(sweep) if n != "seed"), key=lambda n: -sweep[n].nunique())
    if len(varied) < 2:
        return None
    across, up = varied[:2]
    third = varied[2] if len(varied) > 2 and sweep[varied[2]].nunique() <= _MOST_PANELS else None
    panels = [None] if third is None else sorted(sweep[third].unique())
    rows = [up] if third is None else [third, up]
    table = sweep.pivot_table(index=rows, columns=across, values="validation_gain", aggfunc="mean")
    low, high = float(table.min().min()), float(table.max().max())
    spare = max(2 * float(gain_errors(sweep).median()) - (high - low), 0.0) / 2
    titles = None if third is None else [f"{SWEPT[third]} {_short(value)}" for value in panels]
    figure = make_subplots(cols=len(panels), subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.04)
    for number, value in enumerate(panels, 1):
        part = table if third is None else table.loc[value]
        figure.add_heatmap(
            z=part.to_numpy().tolist(),
            x=[_short(v) for v in part.columns],
            y=[_short(v) for v in part.index],
            coloraxis="coloraxis",
            texttemplate="%{z:.1f}",
            hovertemplate="%{z:.2f} nats per particle<extra></extra>",
            xgap=2,
            ygap=2,
            row=1,
            col=number,
        )
        figure.update_xaxes(title=SWEPT[across], type="category", showgrid=False, row=1, col=number)
        figure.update_yaxes(type="category", showgrid=False, row=1, col=number)
    if "chosen" in sweep and sweep["chosen"].any():
        row = sweep[sweep["chosen"]].iloc[0]
        column = 1 if third is None else panels.index(row[third]) + 1
        marker = {"symbol": "square-open", "size": 40, "color": ACCENT, "line": {"width": 3}}
        place = {"x": [_short(row[across])], "y": [_short(row[up])], "mode": "markers"}
        figure.add_scatter(**place, marker=marker, hoverinfo="skip", row=1, col=column)
    figure.update_yaxes(title=SWEPT[up], row=1, col=1)
    bar = {"title": {"text": "nats per particle", "side": "right"}, "thickness": 14}
    colours = {"colorscale": "YlGnBu", "cmin": low - spare, "cmax": high + spare, "colorbar": bar}
    margin = {"l": 70, "r": 20, "t": 52, "b": 56}
    return styled(figure, 400, showlegend=False, coloraxis=colours, margin=margin)


def _short(value) -> str:
    return f"{value:g}"


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
    """Particles over two latents; the page's script adds the ``count`` points and exchanges axes and colours."""
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


def _frame_markers(frames: pd.DataFrame) -> dict:
    beyond = frames["beyond_data"].to_numpy() > 0
    return {
        "size": np.where(beyond, 7, 4).tolist(),
        "color": np.where(beyond, "#a5161c", ACCENT).tolist(),
        "symbol": np.where(beyond, "x", "circle").tolist(),
    }


def latent_density() -> go.Figure:
    """Particles per bin over the same axes; the page's script adds the points and the bins."""
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


def plain_numbers(values) -> list[float]:
    """Plain numbers with 4 significant digits: small in the file, sharp enough for a plot."""
    return [float(f"{value:.4g}") for value in np.asarray(values, dtype=float)]


# resolution -----------------------------------------------------------------------------------------------------

FSC_LABELS = {
    "corrected": "corrected",
    "masked": "masked",
    "unmasked": "unmasked",
    "moving": "where it moves",
}
FSC_KINDS = tuple(FSC_LABELS)


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


def fsc_plot(fsc: pd.DataFrame) -> go.Figure:
    """FSC of flexible and rigid half-maps: corrected solid, masked dashed, unmasked dotted, moving part dash-dotted."""
    figure = go.Figure()
    dashes = {"corrected": "solid", "masked": "dash", "unmasked": "dot", "moving": "dashdot"}
    best = {model: fsc_column(fsc, model) for model in ("flex", "rigid")}
    for model, colour, label in (("rigid", "#7d8793", "rigid"), ("flex", FLEX, "flexible")):
        for kind in FSC_KINDS:
            column = fsc_column(fsc, model, kind)
            if column is None:
                continue
            figure.add_scatter(
                x=fsc["frequency_1_per_A"],
                y=fsc[column],
                name=f"{label}, {FSC_LABELS[kind]}",
                mode="lines",
                visible=True if column == best[model] or kind == "moving" else "legendonly",
                line={"color": colour, "dash": dashes[kind], "width": 2.6 if column == best[model] else 1.6},
                customdata=[1 / f if f > 0 else None for f in fsc["frequency_1_per_A"]],
                hovertemplate="%{y:.3f} at %{customdata:.2f} Å<extra>" + f"{label}, {FSC_LABELS[kind]}</extra>",
            )
    figure.add_hline(
        y=0.143,
        line={"color": ACCENT, "width": 1.2, "dash": "dash"},
        annotation_text="0.143",
        annotation_position="top left",
        annotation_font={"size": 11, "color": ACCENT},
    )
    highest = float(fsc["frequency_1_per_A"].max())
    resolutions = [
        r for r in (100, 50, 30, 20, 15, 12, 10, 9, 8, 7, 6, 5, 4.5, 4, 3.5, 3, 2.5, 2, 1.5) if 1 / r <= highest
    ]
    spaced: list[float] = []
    for resolution in resolutions:
        if not spaced or 1 / resolution - 1 / spaced[-1] > 0.07 * highest:
            spaced.append(resolution)
    figure.update_xaxes(
        title="resolution (Å)",
        tickvals=[1 / r for r in spaced],
        ticktext=[f"{r:g}" for r in spaced],
        range=[0, highest],
    )
    figure.update_yaxes(title="Fourier shell correlation", range=[-0.08, 1.04])
    return styled(figure, 420, legend={"x": 0.02, "y": 0.3, "yanchor": "bottom"})


def convergence_plot(convergence: pd.DataFrame) -> go.Figure:
    """Relative gradient of each reconstruction against its iterations."""
    figure = go.Figure()
    colours = {"flex": FLEX, "rigid": "#7d8793"}
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
