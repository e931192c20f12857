"""Interactive figures of the sweep (Plotly)."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from flexlib.report.facts import SWEPT, gain_errors, swept_columns
from flexlib.report.pictures import ACCENT, FLEX, RIGID
from flexlib.report.plots import styled

_MOST_PANELS = 6
_MOST_POINTS = 20  # of the sweep, drawn beside each other
_TERSE = {"cells": "mesh", "latent_dims": "K", "rigidity": "λ", "seed": "seed"}


def sweep_gains(sweep: pd.DataFrame) -> go.Figure:
    """Held-out gain of each sweep point, best at the top, with standard errors (``gain_errors``).

    The lines are the best and one standard error of it less; the colours show the chosen sweep point, those between
    the lines, and the rest.
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
    # far from zero, the differences between sweep points are what matters
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
    panels = [] if third is None else sorted(sweep[third].unique())
    rows = [up] if third is None else [third, up]
    table = sweep.pivot_table(index=rows, columns=across, values="validation_gain", aggfunc="mean")
    low, high = float(table.min().min()), float(table.max().max())
    spare = max(2 * float(gain_errors(sweep).median()) - (high - low), 0.0) / 2
    parts = [table] if third is None else [table.loc[value] for value in panels]
    titles = None if third is None else [f"{SWEPT[third]} {_short(value)}" for value in panels]
    figure = make_subplots(cols=len(parts), subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.04)
    for number, part in enumerate(parts, 1):
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
        where = {"x": [_short(row[across])], "y": [_short(row[up])], "mode": "markers"}
        figure.add_scatter(**where, marker=marker, hoverinfo="skip", row=1, col=column)
    figure.update_yaxes(title=SWEPT[up], row=1, col=1)
    bar = {"title": {"text": "nats per particle", "side": "right"}, "thickness": 14}
    colours = {"colorscale": "YlGnBu", "cmin": low - spare, "cmax": high + spare, "colorbar": bar}
    margin = {"l": 70, "r": 20, "t": 52, "b": 56}
    return styled(figure, 400, showlegend=False, coloraxis=colours, margin=margin)


def _short(value: float) -> str:
    """A setting's value without needless zeros."""
    return f"{value:g}"
