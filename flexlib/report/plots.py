"""Interactive figures of the report (Plotly)."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from flexlib.fsc import resolution_at
from flexlib.report.pictures import ACCENT, FLEX, GRID, INK, MUTED, RIGID

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
SWEPT = {"cells": "mesh cells", "latent_dims": "latent dims", "rigidity": "rigidity λ", "seed": "seed"}
_MAX_EIGENVALUES = 40
_SERIES = (FLEX, ACCENT, "#2a9d6f", "#8a4fbf", "#c2384f", "#6b7a2b", "#3d4a59", "#b08900")


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


def sweep_gains(sweep: pd.DataFrame) -> go.Figure:
    """Held-out gain of each point with standard errors; the band is one standard error below the best."""
    varied = [name for name in swept_columns(sweep) if name != "seed"]
    along = max(varied, key=lambda name: sweep[name].nunique()) if varied else "seed"
    groups = [name for name in (*varied, "seed") if name != along and name in sweep and sweep[name].nunique() > 1]
    figure = go.Figure()
    errors = sweep["validation_gain_se"] if "validation_gain_se" in sweep else pd.Series(np.nan, sweep.index)
    values = sorted(sweep[along].unique())
    chosen: list[tuple[float, float]] = []
    parts = list(sweep.groupby(groups)) if groups else [((), sweep)]
    for number, (key, part) in enumerate(parts):
        part = part.sort_values(along)
        shift = 0.08 * (number - (len(parts) - 1) / 2) * min(1.0, 6 / len(parts))
        key = key if isinstance(key, tuple) else (key,)
        label = ", ".join(f"{SWEPT[name]} {_short(value)}" for name, value in zip(groups, key, strict=True))
        figure.add_scatter(
            x=[values.index(value) + shift for value in part[along]],
            y=part["validation_gain"],
            error_y={"type": "data", "array": errors[part.index].fillna(0), "thickness": 1.4, "width": 4},
            mode="lines+markers",
            name=label or "points",
            line={"width": 1, "dash": "dot", "color": _SERIES[number % len(_SERIES)]},
            marker={"size": 9, "color": _SERIES[number % len(_SERIES)]},
            hovertemplate="%{y:.2f} nats per particle<extra>" + label + "</extra>",
        )
        for row in part.index[part["chosen"]] if "chosen" in part else []:
            chosen.append((values.index(sweep.loc[row, along]) + shift, sweep.loc[row, "validation_gain"]))
    for x, y in chosen:
        figure.add_scatter(
            x=[x],
            y=[y],
            mode="markers",
            name="chosen",
            marker={"symbol": "circle-open", "size": 20, "color": INK, "line": {"width": 2.5}},
            hoverinfo="skip",
        )
    best = sweep["validation_gain"].idxmax()
    if np.isfinite(errors[best]) and len(sweep) > 1:
        top = sweep.loc[best, "validation_gain"]
        figure.add_hrect(
            y0=top - errors[best],
            y1=top,
            fillcolor=ACCENT,
            opacity=0.16,
            line_width=0,
        )
    figure.update_xaxes(title=SWEPT[along], tickvals=list(range(len(values))), ticktext=[_short(v) for v in values])
    figure.update_yaxes(title="held-out gain (nats per particle)", rangemode="tozero")
    figure.update_xaxes(range=[-0.5, len(values) - 0.5])
    legend = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
    margin = {"l": 70, "r": 20, "t": 60, "b": 56}  # the legend lies below the tool bar
    return styled(figure, 400, showlegend=len(figure.data) > 1, legend=legend, margin=margin)


def sweep_heat_map(sweep: pd.DataFrame) -> go.Figure | None:
    """Best held-out gain over the two settings with most values; None where fewer than two settings vary."""
    varied = sorted((n for n in swept_columns(sweep) if n != "seed"), key=lambda n: -sweep[n].nunique())[:2]
    if len(varied) < 2:
        return None
    table = sweep.pivot_table(index=varied[1], columns=varied[0], values="validation_gain", aggfunc="max")
    figure = go.Figure(
        go.Heatmap(
            z=table.to_numpy().tolist(),
            x=[_short(v) for v in table.columns],
            y=[_short(v) for v in table.index],
            colorscale="YlGnBu",
            texttemplate="%{z:.1f}",
            hovertemplate="%{z:.2f} nats per particle<extra></extra>",
            colorbar={"title": {"text": "nats", "side": "right"}, "thickness": 14},
        )
    )
    if "chosen" in sweep and sweep["chosen"].any():
        row = sweep[sweep["chosen"]].iloc[0]
        figure.add_scatter(
            x=[_short(row[varied[0]])],
            y=[_short(row[varied[1]])],
            mode="markers",
            marker={"symbol": "square-open", "size": 44, "color": ACCENT, "line": {"width": 3}},
            hoverinfo="skip",
        )
    figure.update_xaxes(title=SWEPT[varied[0]], type="category")
    figure.update_yaxes(title=SWEPT[varied[1]], type="category")
    return styled(figure, 400, showlegend=False)


def _short(value) -> str:
    return f"{value:g}"


# training -------------------------------------------------------------------------------------------------------


def training_curves(log: pd.DataFrame) -> dict[str, go.Figure]:
    """A small figure for each numeric column of the log against the epoch, by column name."""
    epoch = log["epoch"] if "epoch" in log else pd.Series(np.arange(1, len(log) + 1), log.index)
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
        title = {"text": column.replace("_", " "), "font": {"size": 13}, "x": 0.5, "y": 0.95}
        styled(figure, 230, showlegend=False, title=title)
        figures[column] = figure.update_layout(margin={"l": 52, "r": 10, "t": 34, "b": 44})
    return figures


def spectrum_plot(spectrum: pd.DataFrame) -> go.Figure:
    """The first eigenvalues of the spectral start beside the edge of pure noise."""
    spectrum = spectrum.head(_MAX_EIGENVALUES)
    index = spectrum["index"] if "index" in spectrum else pd.Series(np.arange(1, len(spectrum) + 1))
    index = index + (1 - index.min())
    edge = spectrum.get("noise_edge")
    above = spectrum["eigenvalue"] > edge if edge is not None else np.ones(len(spectrum), bool)
    figure = go.Figure(
        go.Bar(
            x=index,
            y=spectrum["eigenvalue"],
            marker={"color": [FLEX if flag else RIGID for flag in above]},
            hovertemplate="eigenvalue %{x}: %{y:.3f}<extra></extra>",
        )
    )
    if edge is not None:
        figure.add_scatter(
            x=index, y=edge, mode="lines", line={"color": ACCENT, "dash": "dash", "width": 1.6}, hoverinfo="skip"
        )
        figure.add_annotation(
            x=index.iloc[-1],
            y=edge.iloc[-1],
            text="edge of pure noise",
            showarrow=False,
            xanchor="right",
            yshift=12,
            font={"color": ACCENT, "size": 12},
        )
    figure.update_xaxes(title="eigenvalue number", dtick=1 if len(spectrum) <= 20 else None)
    figure.update_yaxes(title="variance (noise = 1)", type="log" if spectrum["eigenvalue"].max() > 30 else "linear")
    return styled(figure, 320, showlegend=False)


# latents --------------------------------------------------------------------------------------------------------


def latent_scatter(latents: pd.DataFrame, colour_name: str, colour: np.ndarray) -> go.Figure:
    """Particles over latents 1 and 2; the page's script exchanges axes and colours."""
    size = float(np.clip(160 / np.sqrt(len(latents)), 2.5, 7))
    figure = go.Figure(
        go.Scattergl(
            x=plain_numbers(latents["z1"]),
            y=plain_numbers(latents["z2"]),
            mode="markers",
            marker={
                "size": size,
                "color": plain_numbers(colour),
                "colorscale": "Viridis",
                "showscale": True,
                "opacity": 0.8,
                "colorbar": {"title": {"text": colour_name, "side": "right"}, "thickness": 14},
            },
            text=[f"row {row + 1}" for row in latents["row"]],
            hovertemplate="particle %{text} of the input<br>(%{x:.3f}, %{y:.3f})<extra></extra>",
        )
    )
    figure.update_xaxes(title="latent 1")
    figure.update_yaxes(title="latent 2")
    return styled(figure, 470, showlegend=False)


def add_series_paths(figure: go.Figure, series: pd.DataFrame) -> None:
    """Draw where the generated frames lie over latents 1 and 2, crosses where beyond the data; of series.csv."""
    for name, frames in series.groupby("series", sort=False):
        figure.add_scattergl(
            x=plain_numbers(frames["latent_1"]),
            y=plain_numbers(frames["latent_2"]),
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


def latent_density(latents: pd.DataFrame) -> go.Figure:
    """Particles per bin over latents 1 and 2."""
    bins = int(np.clip(np.sqrt(len(latents)) / 1.6, 12, 80))
    figure = go.Figure(
        go.Histogram2d(
            x=plain_numbers(latents["z1"]),
            y=plain_numbers(latents["z2"]),
            nbinsx=bins,
            nbinsy=bins,
            colorscale="YlGnBu",
            colorbar={"title": {"text": "particles per bin", "side": "right"}, "thickness": 14},
            hovertemplate="%{z} particles near (%{x:.2f}, %{y:.2f})<extra></extra>",
        )
    )
    figure.update_xaxes(title="latent 1")
    figure.update_yaxes(title="latent 2")
    return styled(figure, 470)


def latent_histogram(latents: pd.DataFrame) -> go.Figure:
    """Histogram of a single latent, one curve a half-set where known."""
    figure = go.Figure()
    halves = latents["Half-set"] if "Half-set" in latents else pd.Series(1, latents.index)
    for colour, (half, part) in zip((FLEX, ACCENT), latents.groupby(halves), strict=False):
        name = f"half-set {half:g}" if isinstance(half, (int, float)) else "particles"
        figure.add_histogram(x=plain_numbers(part["z1"]), nbinsx=60, name=name, marker={"color": colour}, opacity=0.6)
    figure.update_xaxes(title="latent 1")
    figure.update_yaxes(title="particles")
    return styled(figure, 380, barmode="overlay", showlegend=len(figure.data) > 1)


def latent_against(latents: pd.DataFrame, name: str) -> go.Figure:
    """The single latent against another quantity of each particle."""
    figure = go.Figure(
        go.Scattergl(
            x=plain_numbers(latents["z1"]),
            y=plain_numbers(latents[name]),
            mode="markers",
            marker={"size": 4, "color": FLEX},
        )
    )
    figure.update_xaxes(title="latent 1")
    figure.update_yaxes(title=name)
    return styled(figure, 380)


def plain_numbers(values) -> list[float]:
    """Plain numbers with 4 significant digits: small in the file, sharp enough for a plot."""
    return [float(f"{value:.4g}") for value in np.asarray(values, dtype=float)]


# resolution -----------------------------------------------------------------------------------------------------

FSC_KINDS = ("corrected", "masked", "unmasked", "moving")


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
                name=f"{label}, {kind}",
                mode="lines",
                visible=True if column == best[model] else "legendonly",
                line={"color": colour, "dash": dashes[kind], "width": 2.6 if column == best[model] else 1.6},
                customdata=[1 / f if f > 0 else None for f in fsc["frequency_1_per_A"]],
                hovertemplate="%{y:.3f} at %{customdata:.2f} Å<extra>" + f"{label}, {kind}</extra>",
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
