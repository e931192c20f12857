"""One picture of a run: latents, what moves, the ends of each motion, the FSC."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import FigureBase

from flexlib.files import atomic_path
from flexlib.report import morph, pictures
from flexlib.report.facts import fsc_column
from flexlib.report.packing import density_2d
from flexlib.report.results import Results


def summary_figure(results: Results, gallery: morph.Gallery, out_png: Path) -> bool:
    """Draw what there is, 1400 px wide; see ``write_summary_figure``."""
    painted = gallery.painted
    panels: list[tuple[float, Callable[[FigureBase], None]]] = []
    if results.latents is not None:
        panels.append((1.08, lambda figure: _draw_latents(figure, results)))
    if painted is not None:
        panels.append((0.95, lambda figure: _draw_painted(figure, painted)))
    if gallery.morphs:
        ends = [(f"ends of {one.name.replace('_', ' ')}", one.overlay) for one in gallery.morphs[:2]]
        panels.append((0.62, lambda figure: _draw_stack(figure, ends)))
    if gallery.compared:
        maps = [(f"{one.label} map", one.front) for one in gallery.compared]
        panels.append((0.62, lambda figure: _draw_stack(figure, maps)))
    if results.fsc is not None:
        panels.append((1.0, lambda figure: _draw_fsc(figure, results)))
    if not panels:
        return False
    figure = pictures.new_figure(14, 3.9)
    parts = figure.subfigures(1, len(panels), width_ratios=[width for width, _ in panels], squeeze=False)[0]
    for part, (_, draw) in zip(parts, panels, strict=True):
        draw(part)
    with atomic_path(out_png) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    return True


def _draw_latents(figure: FigureBase, results: Results) -> None:
    """Scatter of the first two latents (a histogram for one), coloured by the first true angle if there is one."""
    axes = figure.add_subplot()
    latents = results.latents
    assert latents is not None
    axes.set_title("particles in latent space")
    axes.set_xlabel("latent 1")
    truth = results.truth_names
    x = latents["z1"].to_numpy()
    if results.latent_dims > 1:
        y = latents["z2"].to_numpy()
        colour = latents[truth[0]] if truth else density_2d(x, y)
        points = axes.scatter(x, y, c=colour, s=5, cmap="viridis", linewidths=0)
        axes.set_ylabel("latent 2")
        for values, limit in ((x, axes.set_xlim), (y, axes.set_ylim)):  # a few strays must not shrink the rest
            low, high = np.quantile(values, [0.002, 0.998])
            limit(low - 0.08 * (high - low), high + 0.08 * (high - low))
        figure.colorbar(points, ax=axes, label=truth[0].lower() if truth else "density (relative)", shrink=0.85)
    elif truth:
        axes.scatter(x, latents[truth[0]], s=5, color=pictures.FLEX, linewidths=0)
        axes.set_ylabel(truth[0].lower())
    else:
        axes.hist(x, bins=60, color=pictures.FLEX)
        axes.set_ylabel("particles")


def _draw_painted(figure: FigureBase, painted: morph.PaintedMap) -> None:
    axes = figure.add_subplot()
    axes.imshow(painted.front)
    axes.axis("off")
    axes.set_title("how far density moves")
    bar = figure.colorbar(
        morph.paint_scale(painted), ax=axes, location="bottom", shrink=0.7, aspect=30, label="rms displacement (Å)"
    )
    bar.outline.set_visible(False)


def _draw_stack(figure: FigureBase, panels: Sequence[tuple[str, np.ndarray]]) -> None:
    """Pictures above each other, each with its title."""
    for axes, (title, picture) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        axes.imshow(picture)
        axes.axis("off")
        axes.set_title(title)


def _draw_fsc(figure: FigureBase, results: Results) -> None:
    axes = figure.add_subplot()
    fsc = results.fsc
    assert fsc is not None
    for kind, colour, label in (("rigid", pictures.RIGID, "rigid"), ("flex", pictures.FLEX, "flexible")):
        column = fsc_column(fsc, kind)
        if column:
            axes.plot(fsc["frequency_1_per_A"], fsc[column], color=colour, label=label, linewidth=2)
    axes.axhline(0.143, color=pictures.MUTED, linewidth=0.8, linestyle=":")
    axes.set_ylim(-0.05, 1.03)
    axes.set_xlim(0, None)
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel("frequency (1/Å)")
    axes.set_ylabel("half-map FSC")
    axes.set_title("resolution")
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.0, 0.2))
