"""The motion as pictures: rendered morphs, projection morphs, the map of how far density moves, the summary figure."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from flexlib.files import atomic_path
from flexlib.maps import Map, fourier_crop_map, read_map
from flexlib.report import pictures, surface
from flexlib.report.results import Results, Series

_MOVIE_FRAMES = 11
_SIZE_PX = 400  # of one rendered view
_LARGEST_BOX = 160  # frames of larger boxes are cropped in Fourier space for pictures


@dataclass(frozen=True)
class Morph:
    """Evenly spaced frames of one series, one contour level and one view for all of them."""

    name: str
    volumes: tuple[np.ndarray, ...]  # each (N, N, N) float32
    pixel_size_A: float
    level: float

    @cached_property
    def rotation(self) -> np.ndarray:
        """(3, 3) view in which the ends of the series differ most."""
        return surface.best_view(self.volumes[0], self.volumes[-1])

    @cached_property
    def extent(self) -> float:
        """Half the picture's width in voxels."""
        return surface.half_extent(list(self.volumes), self.level)

    @cached_property
    def fronts(self) -> tuple[np.ndarray, ...]:
        """Each frame rendered in ``rotation``: (size, size, 4) uint8."""
        return tuple(surface.render_surface(v, self.level, self.rotation, self.extent, _SIZE_PX) for v in self.volumes)

    @cached_property
    def sides(self) -> tuple[np.ndarray, ...]:
        """The same after a turn by 90 degrees about the vertical."""
        view = surface.quarter_turn(self.rotation)
        return tuple(surface.render_surface(v, self.level, view, self.extent, _SIZE_PX) for v in self.volumes)

    @cached_property
    def stills(self) -> tuple[np.ndarray, ...]:
        """Front views on white, cropped to what any of them shows: (h, w, 3) uint8."""
        box = shown_box(self.fronts)
        return tuple(surface.over_white(picture[box]) for picture in self.fronts)

    @cached_property
    def surfaces(self) -> tuple[np.ndarray, ...]:
        """Front and side views beside each other on white, cropped: (h, w, 3) uint8."""
        rows = shown_box(self.fronts + self.sides)[0]
        front, side = (slice(None), shown_box(self.fronts)[1]), (slice(None), shown_box(self.sides)[1])
        pairs = zip(self.fronts, self.sides, strict=True)
        return tuple(surface.over_white(np.hstack([a[rows][front], b[rows][side]])) for a, b in pairs)

    @cached_property
    def overlay(self) -> np.ndarray:
        """The two ends in two colours over each other, from the front, cropped as ``stills``."""
        box = shown_box(self.fronts)
        ends = [
            surface.render_surface(self.volumes[i], self.level, self.rotation, self.extent, _SIZE_PX, colour)[box]
            for i, colour in ((0, surface.SAND), (-1, surface.BLUE))
        ]
        first, last = (surface.over_white(picture).astype(float) for picture in ends)
        both = (ends[0][..., 3] > 0) & (ends[1][..., 3] > 0)
        blend = np.minimum(first, last)
        blend[both] = 0.5 * (first + last)[both]
        return blend.round().astype(np.uint8)


def load_morph(series: Series, mask: Map | None) -> Morph:
    """Read at most 11 evenly spaced frames of a series."""
    picks = np.unique(np.linspace(0, len(series.frames) - 1, _MOVIE_FRAMES).round().astype(int))
    maps = [read_map(series.frames[i]) for i in picks]
    box = min(maps[0].box, _LARGEST_BOX)
    volumes = tuple(fourier_crop_map(map_.data, box) if box < map_.box else map_.data for map_ in maps)
    middle = volumes[len(volumes) // 2]
    inside = mask.data if mask is not None and mask.box == box else None
    level = surface.display_level(middle, inside)
    return Morph(series.name, volumes, maps[0].pixel_size_A * maps[0].box / box, level)


def shown_box(drawn: Sequence[np.ndarray], margin: int = 10) -> tuple[slice, slice]:
    """Rows and columns that hold what any of some RGBA pictures of one size shows."""
    shown = np.max([picture[..., 3] for picture in drawn], axis=0) > 0
    if not shown.any():
        return slice(None), slice(None)
    rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
    return (
        slice(max(rows[0] - margin, 0), rows[-1] + margin + 1),
        slice(max(columns[0] - margin, 0), columns[-1] + margin + 1),
    )


def webp(frames: list[np.ndarray], milliseconds: int = 110) -> bytes:
    """(h, w, 3) uint8 pictures, played forth and back for ever, as animated WebP; the ends are held a little."""
    order = list(range(len(frames))) + list(range(len(frames) - 2, 0, -1))
    held = [3 * milliseconds if i in (0, len(frames) - 1) else milliseconds for i in order]
    images = [Image.fromarray(frames[i]) for i in order]
    buffer = io.BytesIO()
    images[0].save(
        buffer, format="webp", save_all=True, append_images=images[1:], duration=held, loop=0, quality=82, method=4
    )
    return buffer.getvalue()


def surface_movie(morph: Morph) -> bytes:
    """The rendered frames as animated WebP."""
    return webp(list(morph.surfaces))


def projection_movie(morph: Morph) -> bytes:
    """Projections of each frame along z, y and x, side by side at one grey scale, as animated WebP."""
    inside = np.max(morph.volumes, axis=0) >= 0.3 * morph.level
    reach = np.abs(np.argwhere(inside) - inside.shape[0] // 2).max() + 2 if inside.any() else inside.shape[0] // 2
    cut = slice(max(inside.shape[0] // 2 - reach, 0), inside.shape[0] // 2 + reach + 1)
    frames = [np.hstack([v.sum(axis)[cut, cut][::-1] for axis in range(3)]) for v in morph.volumes]
    low, high = np.percentile(frames, [5, 99.8])
    scale = 280 / frames[0].shape[0]
    size = (round(frames[0].shape[1] * scale), round(frames[0].shape[0] * scale))
    grey = []
    for frame in frames:
        picture = Image.fromarray((np.clip((frame - low) / max(high - low, 1e-12), 0, 1) * 255).astype(np.uint8))
        grey.append(np.asarray(picture.resize(size, Image.BICUBIC).convert("RGB")))
    return webp(grey)


def strip(morph: Morph, count: int = 5) -> bytes:
    """``count`` frames from end to end and the two ends overlaid, for paper and for readers without animation."""
    picks = np.linspace(0, len(morph.volumes) - 1, count).round().astype(int)
    height, width = morph.overlay.shape[:2]
    figure = pictures.new_figure(9.6, 9.6 / (count + 1) * height / width + 0.35)
    panels = [*(morph.stills[i] for i in picks), morph.overlay]
    titles = [*(f"{100 * i / max(len(morph.volumes) - 1, 1):.0f} %" for i in picks), "first and last"]
    for axes, picture, title in zip(figure.subplots(1, count + 1), panels, titles, strict=True):
        axes.imshow(picture)
        axes.set_title(title, fontsize=8.5)
        axes.axis("off")
    return pictures.png(figure, 130)


# how far density moves ------------------------------------------------------------------------------------------


def displacement_map(results: Results, sample: int = 256) -> tuple[np.ndarray, Map, dict[str, float]] | None:
    """How far each voxel moves about its mean over the particles, rms in Angstrom, from the trained model.

    Returns (N, N, N) float32 values, the canonical map, and quantiles over the mask; None without a trained model.
    """
    if not (results.stage_dir("train") / "model.pt").exists() or results.mask is None:
        return None
    from flexlib.mesh.voxels import voxelise
    from flexlib.model import FlexModel

    model = FlexModel.load(results.stage_dir("train"))
    rows = np.random.default_rng(0).permutation(len(model.latents))[:sample]
    moved = model.displacements_A(model.latents[rows]).numpy().astype(np.float64)  # (s, nv, 3)
    rms_A = np.sqrt(((moved - moved.mean(0)) ** 2).sum(2).mean(0))  # (nv,)
    voxels = voxelise(model.mesh, results.mask.data > 0.5, model.pixel_size_A)
    values = np.zeros(model.box**3, np.float32)
    values[voxels.index] = (voxels.bary * rms_A[model.mesh.cells[voxels.cell]]).sum(1)
    inside = values[voxels.index]
    quantiles = {name: float(np.quantile(inside, q)) for name, q in (("median", 0.5), ("p95", 0.95), ("max", 1.0))}
    return values.reshape((model.box,) * 3), Map(model.canonical, model.pixel_size_A), quantiles


def displacement_picture(values: np.ndarray, canonical: Map, mask: Map | None, rotation: np.ndarray | None) -> bytes:
    """The canonical map's surface coloured by how far it moves, from two sides, with a colour bar in Angstrom."""
    from scipy import ndimage

    level = surface.display_level(canonical.data, None if mask is None else mask.data)
    extent = surface.half_extent([canonical.data], level)
    limits = (0.0, max(float(np.quantile(values[canonical.data >= level], 0.99)), 1e-3))
    outside = values == 0
    nearest = ndimage.distance_transform_edt(outside, return_distances=False, return_indices=True)
    values = values[tuple(nearest)]
    view = np.eye(3) if rotation is None else rotation
    drawn = [
        surface.render_surface(canonical.data, level, turned, extent, _SIZE_PX, paint=values, paint_limits=limits)
        for turned in (view, surface.quarter_turn(view))
    ]
    rows = shown_box(drawn)[0]
    picture = surface.over_white(np.hstack([one[rows, shown_box([one])[1]] for one in drawn]))
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    height, width = picture.shape[:2]
    figure = pictures.new_figure(8.2, 8.2 * height / width * 0.88 + 0.2)
    axes = figure.add_subplot()
    axes.imshow(picture)
    axes.axis("off")
    figure.colorbar(
        ScalarMappable(Normalize(*limits), "viridis"), ax=axes, shrink=0.8, label="rms displacement (Å)", aspect=22
    )
    return pictures.png(figure, 130)


def compare_surfaces(maps: list[tuple[str, Map]], mask: Map | None, rotation: np.ndarray | None) -> bytes:
    """Surfaces of (label, map) pairs at one contour level, each from two sides; the last sets the level."""
    box = min(maps[0][1].box, _LARGEST_BOX)
    volumes = [fourier_crop_map(map_.data, box) for _, map_ in maps]
    inside = None
    if mask is not None and mask.box == maps[0][1].box:
        inside = fourier_crop_map(mask.data, box) > 0.5
        volumes = [np.where(inside, volume, 0) for volume in volumes]
    level = surface.display_level(volumes[-1], inside)
    view = np.eye(3) if rotation is None else rotation
    extent = surface.half_extent(volumes, level)
    colours = ((0.72, 0.75, 0.79), surface.BLUE)
    drawn = [
        surface.render_surface(volume, level, rotation, extent, _SIZE_PX, colour)
        for volume, colour in zip(volumes, colours, strict=False)
        for rotation in (view, surface.quarter_turn(view))
    ]
    box = shown_box(drawn)
    cropped = [surface.over_white(picture[box]) for picture in drawn]
    height, width = cropped[0].shape[:2]
    figure = pictures.new_figure(9.6, 9.6 / len(cropped) * height / width + 0.35)
    labels = [label for label, _ in maps for _ in range(2)]
    for axes, picture, label in zip(figure.subplots(1, len(cropped), squeeze=False)[0], cropped, labels, strict=True):
        axes.imshow(picture)
        axes.set_title(label)
        axes.axis("off")
    return pictures.png(figure, 130)


# one picture of the run -----------------------------------------------------------------------------------------


def summary_figure(results: Results, out_png: Path, morph: Morph | None = None) -> bool:
    """One picture of the run, 1400 px wide; see ``write_summary_figure``."""
    if morph is None and results.series:
        morph = load_morph(results.series[0], results.mask)
    if results.latents is None and morph is None and results.fsc is None:
        return False
    figure = pictures.new_figure(14, 4.3)
    left, middle, right = figure.subfigures(1, 3, width_ratios=[1.05, 1.3, 1.0])
    if results.latents is not None:
        _draw_latents(left.add_subplot(), left, results)
    if morph is not None:
        picks = (0, len(morph.volumes) // 2, -1)
        for axes, i, title in zip(middle.subplots(3, 1), picks, ("first", "middle", "last"), strict=True):
            axes.imshow(morph.surfaces[i])
            axes.set_axis_off()
            axes.text(0.0, 0.98, f"{title} frame", transform=axes.transAxes, fontsize=9, color=pictures.MUTED, va="top")
        middle.suptitle(f"Motion along {morph.name.replace('_', ' ')}, seen from two sides", fontsize=10.5)
    if results.fsc is not None:
        _draw_fsc(right.add_subplot(), results)
    with atomic_path(out_png) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    return True


def _draw_latents(axes, figure, results: Results) -> None:
    """Scatter of the first two latents (a histogram for one), coloured by the first true angle if there is one."""
    latents = results.latents
    assert latents is not None
    axes.set_title("Particles in latent space", fontsize=10.5)
    axes.set_xlabel("latent 1")
    truth = results.truth_names
    if results.latent_dims > 1:
        colour = latents[truth[0]] if truth else density_2d(latents["z1"].to_numpy(), latents["z2"].to_numpy())
        points = axes.scatter(latents["z1"], latents["z2"], c=colour, s=4, cmap="viridis", linewidths=0)
        axes.set_ylabel("latent 2")
        figure.colorbar(points, ax=axes, label=truth[0].lower() if truth else "density (relative)", shrink=0.85)
    elif truth:
        axes.scatter(latents["z1"], latents[truth[0]], s=4, color=pictures.FLEX, linewidths=0)
        axes.set_ylabel(truth[0].lower())
    else:
        axes.hist(latents["z1"], bins=60, color=pictures.FLEX)
        axes.set_ylabel("particles")


def _draw_fsc(axes, results: Results) -> None:
    from flexlib.report.plots import fsc_column

    fsc = results.fsc
    assert fsc is not None
    for kind, colour, label in (("rigid", pictures.RIGID, "rigid"), ("flex", pictures.FLEX, "flexible")):
        column = fsc_column(fsc, kind)
        if column:
            axes.plot(fsc["frequency_1_per_A"], fsc[column], color=colour, label=label, linewidth=2)
    axes.axhline(0.143, color=pictures.MUTED, linewidth=0.8, linestyle=":")
    axes.set_ylim(-0.05, 1.03)
    axes.set_xlim(0, None)
    axes.set_xlabel("frequency (1/Å)")
    axes.set_ylabel("half-map FSC")
    axes.set_title("Resolution: rigid and flexible maps", fontsize=10.5)
    axes.legend(frameon=False)


def density_2d(x: np.ndarray, y: np.ndarray, bins: int = 64) -> np.ndarray:
    """(n,) smoothed local density of points, relative to its maximum."""
    from scipy import ndimage

    count, x_edges, y_edges = np.histogram2d(x, y, bins=bins)
    smooth = ndimage.gaussian_filter(count, 1.5)
    column = np.clip(np.digitize(x, x_edges) - 1, 0, bins - 1)
    row = np.clip(np.digitize(y, y_edges) - 1, 0, bins - 1)
    return smooth[column, row] / smooth.max()
