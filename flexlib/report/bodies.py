"""Bodies and hinges of the chosen sweep point: what interpret wrote, as a picture, tables and sentences."""

from __future__ import annotations

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch
from scipy import ndimage

from flexlib.errors import InputError
from flexlib.imaging.fourier import fourier_crop_map
from flexlib.imaging.maps import read_label_map
from flexlib.layout import InterpretFolder
from flexlib.records import InterpretationRecord
from flexlib.render import surface
from flexlib.render.colours import SEGMENT_COLOURS
from flexlib.report import morph, pictures
from flexlib.report.formats import NONE, number
from flexlib.report.markup import render
from flexlib.report.results import Results, record_at, table_at
from flexlib.report.tables import Table

_BENDS = 0.7  # strain inside the bodies over that of all, above which the molecule bends all over
_PART = 0.1  # of the motion left to no body, that is worth a warning
_BODY_COLUMNS = ("body", "mass_share", "residual_A", "explained", "rotation_deg", "shift_A")
_HINGE_COLUMNS = ("first", "second", "touching", "kind", "range_deg", "sd_deg", "axis_share", "along_A", "across_A")
_SIZE_PX = 460


def bodies_section(results: Results, gallery: morph.Gallery) -> Markup:
    """The section; empty where the chosen point was not interpreted."""
    if results.chosen is None:
        return Markup("")
    folder = results.run.interpret(results.chosen.path)
    record = record_at(InterpretationRecord, folder.record)
    if record is None or record.num_bodies is None:
        return Markup("")
    bodies, hinges = table_at(folder.bodies), table_at(folder.hinges)
    rotation = gallery.morphs[0].rotation if gallery.morphs else np.eye(3)
    return render(
        "bodies",
        verdict=verdict(record),
        warning=warning(record),
        several=record.num_bodies > 1,
        bodies=body_table(bodies) if bodies is not None and set(_BODY_COLUMNS) <= set(bodies) else None,
        hinges=hinge_table(hinges) if hinges is not None and set(_HINGE_COLUMNS) <= set(hinges) else None,
        sentences=hinge_sentences(hinges) if hinges is not None and set(_HINGE_COLUMNS) <= set(hinges) else [],
        picture=_picture(results, folder, hinges, rotation),
        poses=record.body_poses,
        files=folder,
        poses_file=folder.body_poses(1).relative_to(results.root).as_posix(),
    )


def verdict(record: InterpretationRecord) -> str:
    """How many bodies, and what they explain."""
    if record.bodies_reason:
        return f"No bodies are told: {record.bodies_reason}."
    motion = f"the motion ({number(record.bodies_motion_A, 3)} Å rms, with the whole as one body at rest)"
    share = 100 * (record.bodies_explained or 0.0)
    if record.num_bodies == 1:
        return f"No rigid bodies: dividing the density would explain little of {motion}."
    return f"{record.num_bodies} bodies that move as rigid ones explain {share:.0f} % of {motion}, squared."


def warning(record: InterpretationRecord) -> str:
    """What speaks against taking the bodies for rigid ones; empty where nothing does."""
    if record.bodies_reason or record.num_bodies is None:
        return ""
    left = 1 - (record.bodies_explained or 0.0)
    if (record.bodies_bend or 0.0) > _BENDS:
        return (
            "It bends: the strain lies inside the bodies as much as between them, so that they describe the motion "
            f"but are no parts of the molecule; {100 * left:.0f} % of the motion is no rigid body's."
        )
    if record.num_bodies > 1 and left > _PART:
        return f"It bends: {100 * left:.0f} % of the motion is no rigid body's."
    return ""


def body_table(bodies: pd.DataFrame) -> Table:
    """A row for each body."""
    head = ("body", "share of the density", "rms departure (Å)", "motion explained", "rms turn (°)", "rms shift (Å)")
    rows = [
        (
            f"{row.body:.0f}",
            f"{100 * row.mass_share:.1f} %",
            number(row.residual_A, 2),
            f"{100 * row.explained:.0f} %",
            "at rest" if row.body == 1 else number(row.rotation_deg, 3),
            "at rest" if row.body == 1 else number(row.shift_A, 3),
        )
        for row in bodies.itertuples()
    ]
    return Table(head, rows)


def hinge_table(hinges: pd.DataFrame) -> Table:
    """A row for each pair of bodies."""
    head = ("bodies", "", "range (°)", "sd (°)", "about one axis", "slides along it (Å)", "beyond it (Å)")
    rows = [
        (
            f"{row.first:.0f} and {row.second:.0f}",
            row.kind if row.touching else f"{row.kind}, do not touch",
            NONE if row.kind == "shift" else number(row.range_deg, 3),
            NONE if row.kind == "shift" else number(row.sd_deg, 3),
            NONE if row.kind == "shift" else f"{100 * row.axis_share:.0f} %",
            number(row.along_A, 2),
            number(row.across_A, 2),
        )
        for row in hinges.itertuples()
    ]
    return Table(head, rows)


def hinge_sentences(hinges: pd.DataFrame) -> list[str]:
    """What each pair that touches does, in words."""
    said = []
    for row in hinges[hinges["touching"] > 0].itertuples():
        pair = f"Body {row.second:.0f} against body {row.first:.0f}"
        if row.kind == "hinge":
            angles = f"{number(row.range_deg, 3)}° between the 2nd and the 98th percentile of the particles"
            said.append(f"{pair}: turns about one axis, by {angles}.")
        elif row.kind == "joint":
            said.append(
                f"{pair}: turns, but only {100 * row.axis_share:.0f} % of it about one axis: these are "
                "several motions, no hinge."
            )
        else:
            said.append(f"{pair}: is shifted by {number(row.along_A, 2)} Å (sd) and turns little: no axis can be told.")
    return said


def _picture(
    results: Results, folder: InterpretFolder, hinges: pd.DataFrame | None, rotation: np.ndarray
) -> bytes | None:
    """The map in the bodies' colours from two sides, with the hinges' axes; None where it cannot be drawn."""
    maps, mask = results.reconstructed_maps, results.reconstruction_mask
    density = maps[-1][1] if maps else None
    try:
        labels = read_label_map(folder.labels).labels
    except InputError:
        return None
    if density is None or labels.shape != density.data.shape or mask is None or mask.box != density.box:
        return None
    box = min(density.box, morph.LARGEST_BOX)
    step = density.box / box
    inside = fourier_crop_map(mask.data, box) > 0.5
    volume = np.where(inside, fourier_crop_map(density.data, box), 0)
    at = np.clip(np.rint((np.arange(box) - box // 2) * step).astype(int) + density.box // 2, 0, density.box - 1)
    nearest = ndimage.distance_transform_edt(labels == 0, return_distances=False, return_indices=True)
    small = labels[tuple(nearest)][np.ix_(at, at, at)] - 1
    level = surface.display_level(volume)
    shown, extent = surface.Surface(volume, level), surface.half_extent([volume], level)
    views = (rotation, surface.quarter_turn(rotation))
    colours = np.array([to_rgb(SEGMENT_COLOURS[body % len(SEGMENT_COLOURS)]) for body in range(int(small.max()) + 1)])
    figure = pictures.new_figure(8.4, 4.3)
    for axes, view in zip(figure.subplots(1, 2), views, strict=True):
        drawn = shown.picture(view, extent, _SIZE_PX, paint=small, label_colours=colours)
        reach_A = extent * density.pixel_size_A * step
        axes.imshow(surface.over_white(drawn), extent=(-reach_A, reach_A, -reach_A, reach_A))
        if hinges is not None:
            _draw_axes(axes, hinges, view, reach_A)
        axes.axis("off")
    patches = [Patch(color=tuple(colour), label=f"body {body}") for body, colour in enumerate(colours, 1)]
    figure.legend(handles=patches, loc="outside lower center", ncols=6, frameon=False)
    return pictures.webp(figure, 140)


def _draw_axes(axes: Axes, hinges: pd.DataFrame, view: np.ndarray, reach_A: float) -> None:
    """Draw the axes of hinges between bodies that touch: an arrow, and the bodies' numbers at its end."""
    for row in hinges[(hinges["touching"] > 0) & (hinges["kind"] == "hinge")].itertuples():
        axis = view @ np.array([row.axis_x, row.axis_y, row.axis_z])
        point = view @ np.array([row.point_x_A, row.point_y_A, row.point_z_A])
        tail, head = (point[:2] + sign * 0.45 * reach_A * axis[:2] for sign in (-1, 1))
        style = {"arrowstyle": "-|>", "color": pictures.INK, "lw": 1.6, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", head, tail, arrowprops=style)
        axes.text(float(head[0]), float(head[1]), f" {row.first:.0f}-{row.second:.0f}", color=pictures.INK)
