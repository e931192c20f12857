"""Still pictures of the report's inputs, mesh and maps, drawn with matplotlib; as bytes of PNG or WebP."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from flexlib.imaging.maps import Map
from flexlib.render.colours import segment_colours
from flexlib.tetra.tetmesh import TetraMesh

INK, MUTED, GRID = "#1d2733", "#5b6875", "#dfe4ea"
FLEX, RIGID, ACCENT = "#1f6fb4", "#9aa3ad", "#d1731f"
_AXES = (("x", "y"), ("x", "z"), ("y", "z"))  # what runs right and up in a slice perpendicular to z, y, x


def new_figure(width: float, height: float) -> Figure:
    """A figure in the report's style, ``width`` x ``height`` inches."""
    from matplotlib import rcParams

    rcParams.update(
        {
            "font.family": "DejaVu Sans",
            "font.size": 9,
            "axes.edgecolor": MUTED,
            "axes.labelcolor": INK,
            "xtick.color": MUTED,
            "ytick.color": MUTED,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 10,
            "axes.titlecolor": INK,
        }
    )
    return Figure(figsize=(width, height), layout="constrained")


def png(figure: Figure, dpi: int = 150) -> bytes:
    """The figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def webp(figure: Figure, dpi: int = 130) -> bytes:
    """The figure as WebP, a quarter of a PNG's size where surfaces are shaded."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="webp", dpi=dpi, pil_kwargs={"quality": 90, "method": 5})
    return buffer.getvalue()


# what went in ---------------------------------------------------------------------------------------------------


def defocus_histogram(defocus_um: np.ndarray) -> bytes:
    """Histogram of the mean defocus of each particle."""
    figure = new_figure(4.6, 2.9)
    axes = figure.add_subplot()
    axes.hist(defocus_um, bins=min(60, max(10, int(np.sqrt(len(defocus_um))))), color=FLEX, alpha=0.85)
    axes.set_xlabel("defocus (µm, underfocus positive)")
    axes.set_ylabel("particles")
    return png(figure)


def noise_spectra(table: pd.DataFrame) -> bytes:
    """Standard deviation of the noise by frequency, each optics group's over its own mean; shell 0 is left out."""
    figure = new_figure(4.6, 2.9)
    axes = figure.add_subplot()
    shells = table[table["shell"] > 0]
    many = shells["group"].nunique() > 1
    for _, own in shells.groupby("group"):
        axes.plot(own["frequency_1_per_A"], own["sigma"] / own["sigma"].mean(), color=FLEX, alpha=0.4 if many else 0.9)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("frequency (1/Å)")
    axes.set_ylabel("noise over its mean")
    return png(figure)


def view_directions(rot_deg: np.ndarray, tilt_deg: np.ndarray) -> bytes:
    """Mollweide map of view directions, in multiples of a uniform distribution (equal-area projection)."""
    rows = int(np.clip(np.sqrt(len(rot_deg) / 40), 5, 30))  # some 20 particles a bin
    columns = 2 * rows
    longitude = (np.asarray(rot_deg) + 180) % 360 - 180
    latitude = 90 - np.degrees(np.arccos(np.cos(np.radians(tilt_deg))))
    longitudes = np.linspace(-180, 180, columns + 1)
    latitudes = np.degrees(np.arcsin(np.linspace(-1, 1, rows + 1)))  # bins of equal area
    count, _, _ = np.histogram2d(longitude, latitude, bins=[longitudes, latitudes])
    density = count * rows * columns / len(longitude)
    figure = new_figure(4.9, 2.9)
    axes = figure.add_subplot(projection="mollweide")
    mesh = axes.pcolormesh(
        np.radians(longitudes),
        np.radians(latitudes),
        density.T,
        cmap="YlGnBu",
        vmin=0,
        vmax=max(2.0, np.percentile(density, 99)),
    )
    axes.grid(True, color="white", linewidth=0.4)
    axes.set_xticks(np.radians([-120, -60, 0, 60, 120]), ["", "", "", "", ""])
    axes.set_yticks(np.radians([-60, -30, 0, 30, 60]))
    figure.colorbar(mesh, ax=axes, shrink=0.75, label="times uniform")
    return png(figure)


def _scale_bar(axes: Axes, extent_A: float) -> None:
    """A white bar of a round length at the lower left; axes are in Angstrom, ``extent_A`` wide."""
    length = min((5, 10, 20, 50, 100, 200, 500), key=lambda value: abs(value - 0.25 * extent_A))
    x, y = axes.get_xlim()[0] + 0.06 * extent_A, axes.get_ylim()[0] + 0.07 * extent_A
    axes.plot([x, x + length], [y, y], color="white", linewidth=2.5, solid_capstyle="butt")
    axes.text(x + length / 2, y + 0.02 * extent_A, f"{length} Å", color="white", ha="center", va="bottom", fontsize=8)


def _bounds(map_: Map, mask: Map | None) -> tuple[int, int]:
    """First and one-past-last voxel of the centred cube that holds the mask with a margin."""
    if mask is None or mask.box != map_.box or not (mask.data > 0.1).any():
        return 0, map_.box
    centre = map_.box // 2
    reach = np.abs(np.argwhere(mask.data > 0.1) - centre).max() + max(2, map_.box // 32)
    return max(0, centre - reach), min(map_.box, centre + reach + 1)


def _slice(volume: np.ndarray, axis: int) -> np.ndarray:
    """Central slice perpendicular to array axis ``axis`` (0 z, 1 y, 2 x): rows run up the picture."""
    return np.take(volume, volume.shape[axis] // 2, axis=axis)


def map_slices(rows: list[tuple[str, Map]], mask: Map | None) -> bytes:
    """Central slices of one or more maps, one row a map and one column an axis, all at one grey scale; WebP."""
    low, high = _bounds(rows[0][1], mask)
    cut = slice(low, high)
    volumes = [map_.data[cut, cut, cut] for _, map_ in rows]
    outline = mask.data[cut, cut, cut] if mask is not None and mask.box == rows[0][1].box else None
    values = np.concatenate(
        [_slice_at(v, axis, rows[0][1].box // 2 - low).ravel() for v in volumes for axis in range(3)]
    )
    limits = np.percentile(values, [2, 99.7])
    figure = new_figure(9.6, 3.35 * len(rows))
    grid = figure.subplots(len(rows), 3, squeeze=False)
    for number, ((label, map_), volume, line) in enumerate(zip(rows, volumes, grid, strict=True)):
        edge = (np.array([low, high]) - 0.5 - map_.box // 2) * map_.pixel_size_A
        for axis, axes in enumerate(line):
            index = map_.box // 2 - low
            axes.imshow(
                _slice_at(volume, axis, index),
                cmap="gray",
                vmin=limits[0],
                vmax=limits[1],
                origin="lower",
                extent=(edge[0], edge[1], edge[0], edge[1]),
                interpolation="bicubic",
            )
            if outline is not None:
                centres = (np.arange(low, high) - map_.box // 2) * map_.pixel_size_A
                axes.contour(
                    centres, centres, _slice_at(outline, axis, index), levels=[0.5], colors="#ffb347", linewidths=0.9
                )
            axes.set_xlim(edge[0], edge[1])
            axes.set_ylim(edge[0], edge[1])
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_visible(False)
            if axis == 0:
                axes.set_ylabel(label, fontsize=11)
            if number == 0:
                axes.set_title(f"{'zyx'[axis]} = 0  ({_AXES[axis][0]} right, {_AXES[axis][1]} up)")
            _scale_bar(axes, edge[1] - edge[0])
    return webp(figure, 110)


def _slice_at(volume: np.ndarray, axis: int, index: int) -> np.ndarray:
    return np.take(volume, index, axis=axis)


# mesh -----------------------------------------------------------------------------------------------------------


def cell_sections(mesh: TetraMesh, axis: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Polygons where the plane (x, y, z)[axis] = 0 cuts the cells, and the cell of each.

    Polygons are (3 or 4, 2) in the two other axes in order, Angstrom.
    """
    others = [i for i in range(3) if i != axis]
    corner = mesh.vertices_A[mesh.cells]  # (nc, 4, 3)
    height = corner[:, :, axis] + 1e-7  # no vertex lies on the plane itself
    crossed = np.flatnonzero((height.min(1) < 0) & (height.max(1) > 0))
    polygons = []
    for cell in crossed:
        points = []
        for a, b in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)):
            if (height[cell, a] < 0) != (height[cell, b] < 0):
                part = height[cell, a] / (height[cell, a] - height[cell, b])
                points.append((corner[cell, a] + part * (corner[cell, b] - corner[cell, a]))[others])
        polygon = np.array(points)
        around = polygon - polygon.mean(0)
        polygons.append(polygon[np.argsort(np.arctan2(around[:, 1], around[:, 0]))])
    return polygons, crossed


def mesh_sections(mesh: TetraMesh, consensus: Map | None, by_segment: bool = False) -> bytes:
    """Cells cut by the three central planes over the density, coloured by rigidity weight or by segment."""
    figure = new_figure(9.6, 3.1)
    grid = figure.subplots(1, 3)
    limits = (min(mesh.rigidity.min(), 0.999), max(mesh.rigidity.max(), 1.0))
    # weights of 20 beside weights of 1 need a logarithmic scale to show both
    scale = LogNorm(*limits) if limits[1] > 5 * limits[0] else Normalize(*limits)
    colours = segment_colours(mesh.segment)
    reach = np.abs(mesh.vertices_A).max() * 1.03
    cells = None
    for array_axis, axes in enumerate(grid):
        if consensus is not None:
            half = consensus.box // 2 * consensus.pixel_size_A
            offset = consensus.pixel_size_A / 2
            picture = _slice(consensus.data, array_axis)
            span = (-half - offset, half - offset)
            axes.imshow(
                picture,
                cmap="gray_r",
                origin="lower",
                extent=(*span, *span),
                vmin=0.08 * picture.max(),
                vmax=0.9 * picture.max(),
            )
        polygons, index = cell_sections(mesh, 2 - array_axis)
        if polygons:
            cells = PolyCollection(polygons, cmap="viridis_r", norm=scale, alpha=0.38, edgecolors="none")
            if by_segment:
                cells.set_facecolor([colours[int(one)] for one in mesh.segment[index]])
            else:
                cells.set_array(mesh.rigidity[index])
            axes.add_collection(cells)
            axes.add_collection(LineCollection([np.vstack([p, p[:1]]) for p in polygons], colors=INK, linewidths=0.35))
        axes.set_xlim(-reach, reach)
        axes.set_ylim(-reach, reach)
        axes.set_aspect("equal")
        axes.set_title(f"{'zyx'[array_axis]} = 0")
        axes.set_xlabel(f"{_AXES[array_axis][0]} (Å)")
        axes.set_ylabel(f"{_AXES[array_axis][1]} (Å)")
    if by_segment:
        keys = [Patch(color=colour, alpha=0.6, label=str(one)) for one, colour in colours.items()]
        figure.legend(handles=keys, title="segment", loc="outside right center", frameon=False)
    elif cells is not None:
        figure.colorbar(cells, ax=grid, shrink=0.8, label="rigidity weight", aspect=30)
    return png(figure, 130)
