"""The motion as pictures: rendered morphs, projection morphs, the map of how far density moves, the summary figure."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from PIL import Image

from flexlib.imaging.fourier import fourier_crop_map
from flexlib.imaging.maps import Map, read_map
from flexlib.model.flex_model import FlexModel
from flexlib.model.frame import MotionFrame
from flexlib.model.motion import rms_displacement_A
from flexlib.render import surface
from flexlib.report import pictures
from flexlib.report.results import Results, Series
from flexlib.tetra.voxels import voxelise

MOST_SERIES = 8  # with pictures; a browser gives 3D views no more than some 16 WebGL contexts
_MOVIE_FRAMES = 11
_SIZE_PX = 400  # of one rendered view
LARGEST_BOX = 160  # frames of larger boxes are cropped in Fourier space for pictures


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
    def _shown(self) -> tuple[surface.Surface, ...]:
        return tuple(surface.Surface(volume, self.level) for volume in self.volumes)

    @cached_property
    def fronts(self) -> tuple[np.ndarray, ...]:
        """Each frame rendered in ``rotation``: (size, size, 4) uint8."""
        return tuple(shown.picture(self.rotation, self.extent, _SIZE_PX) for shown in self._shown)

    @cached_property
    def sides(self) -> tuple[np.ndarray, ...]:
        """The same after a turn by 90 degrees about the vertical."""
        view = surface.quarter_turn(self.rotation)
        return tuple(shown.picture(view, self.extent, _SIZE_PX) for shown in self._shown)

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
            self._shown[i].picture(self.rotation, self.extent, _SIZE_PX, colour)[box]
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
    box = min(maps[0].box, LARGEST_BOX)
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
        grey.append(np.asarray(picture.resize(size, Image.Resampling.BICUBIC).convert("RGB")))
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
    return pictures.webp(figure, 130)


# how far density moves ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DisplacementMap:
    """How far each voxel moves about its mean over the particles, in the frame of the generated maps."""

    values_A: np.ndarray  # (N, N, N) float32, rms; 0 outside the mask
    canonical: Map
    core_share: float | None  # of the density, that is held at rest; None of ``align: density``


def trained_motion(results: Results) -> MotionFrame | None:
    """The trained model in the frame of the generated maps; None without one."""
    if not results.train_folder.model.exists():
        return None
    return MotionFrame.of(FlexModel.load(results.train_folder.model), results.align)


def displacement_map(results: Results, motion: MotionFrame | None = None) -> DisplacementMap | None:
    """From the trained model, ``motion`` where it is loaded already; None without one."""
    motion = motion or trained_motion(results)
    if motion is None or results.mask is None:
        return None
    model = motion.model
    voxels = voxelise(model.mesh, results.mask.data > 0.5, model.pixel_size_A)
    values_A = np.zeros(model.box**3, np.float32)
    values_A[voxels.index] = rms_displacement_A(model, voxels, motion.displacements_A)
    canonical = Map(model.canonical, model.pixel_size_A)
    share = None if motion.core is None else motion.core.share
    return DisplacementMap(values_A.reshape((model.box,) * 3), canonical, share)


@dataclass(frozen=True)
class PaintedSurface:
    """A map's surface coloured by values of its voxels: (h, w, 3) uint8 from the front and the side."""

    front: np.ndarray
    side: np.ndarray
    limits: tuple[float, float]  # of the values that colours are for


def paint_surface(
    density: np.ndarray, level: float, values: np.ndarray, limits: tuple[float, float], rotation: np.ndarray | None
) -> PaintedSurface:
    """Render the surface of ``density`` (N, N, N) at a level, coloured by ``values`` (N, N, N), in a view."""
    extent = surface.half_extent([density], level)
    shown = surface.Surface(density, level)
    drawn = [
        shown.picture(turned, extent, 480, paint=values, paint_limits=limits)
        for turned in _both_sides(np.eye(3) if rotation is None else rotation)
    ]
    rows = shown_box(drawn)[0]
    front, side = (surface.over_white(one[rows, shown_box([one])[1]]) for one in drawn)
    return PaintedSurface(front, side, limits)


def painted_picture(painted: PaintedSurface, label: str, width: float = 7.4) -> bytes:
    """Both views with a colour bar that ``label`` names, ``width`` inches across."""
    picture = np.hstack([painted.front, np.full((len(painted.front), 30, 3), 255, np.uint8), painted.side])
    rows, columns = picture.shape[:2]
    figure = pictures.new_figure(width, width * rows / columns * 0.86 + 0.1)
    axes = figure.add_subplot()
    axes.imshow(picture)
    axes.axis("off")
    figure.colorbar(paint_scale(painted), ax=axes, shrink=0.7, label=label, aspect=22)
    return pictures.webp(figure, 140)


def paint_scale(painted: PaintedSurface) -> ScalarMappable:
    """The colours of a painted surface, for a colour bar."""
    return ScalarMappable(Normalize(*painted.limits), surface.paint_map())


@dataclass(frozen=True)
class PaintedMap(PaintedSurface):
    """The canonical map's surface coloured by how far it moves, in Angstrom."""

    median_A: float  # over the mask
    highest_A: float
    core_share: float | None  # of the density, that is held at rest; None where nothing is


def paint_displacement(
    results: Results, rotation: np.ndarray | None, motion: MotionFrame | None = None
) -> PaintedMap | None:
    """Render ``displacement_map`` in the view ``rotation``; None without a trained model."""
    from scipy import ndimage

    moved = displacement_map(results, motion)
    if moved is None:
        return None
    values, canonical = moved.values_A, moved.canonical
    known = values[values > 0] if (values > 0).any() else np.zeros(1)
    level = surface.display_level(canonical.data, None if results.mask is None else results.mask.data)
    limits = (0.0, max(float(np.quantile(values[canonical.data >= level], 0.99)), 1e-3))
    nearest = ndimage.distance_transform_edt(values == 0, return_distances=False, return_indices=True)
    painted = paint_surface(canonical.data, level, values[tuple(nearest)], limits, rotation)
    return PaintedMap(
        painted.front, painted.side, limits, float(np.median(known)), float(known.max()), moved.core_share
    )


@dataclass(frozen=True)
class ComparedMap:
    """A reconstructed map rendered from the front and the side, (h, w, 3) uint8."""

    label: str
    front: np.ndarray
    side: np.ndarray


def compare_maps(results: Results, rotation: np.ndarray | None) -> list[ComparedMap]:
    """Surfaces of the rigid and flexible maps at one contour level, the last map's, cropped alike; what there is."""
    maps = results.reconstructed_maps
    if not maps:
        return []
    box = min(maps[0][1].box, LARGEST_BOX)
    volumes = [fourier_crop_map(map_.data, box) for _, map_ in maps]
    mask = results.reconstruction_mask
    if mask is not None and mask.box == maps[0][1].box:
        inside = fourier_crop_map(mask.data, box) > 0.5
        volumes = [np.where(inside, volume, 0) for volume in volumes]
    level = surface.display_level(volumes[-1])
    front = np.eye(3) if rotation is None else rotation
    extent = surface.half_extent(volumes, level)
    colours = {"rigid": surface.GREY, "flexible": surface.BLUE}
    shown = [surface.Surface(volume, level) for volume in volumes]
    views = [
        [one.picture(view, extent, _SIZE_PX, colours[label]) for view in _both_sides(front)]
        for (label, _), one in zip(maps, shown, strict=True)
    ]
    crop = shown_box([picture for pair in views for picture in pair])
    return [
        ComparedMap(label, *(surface.over_white(picture[crop]) for picture in pair))
        for (label, _), pair in zip(maps, views, strict=True)
    ]


def compared_picture(compared: list[ComparedMap]) -> bytes:
    """Both views of each map in one row."""
    panels = [(one.label, picture) for one in compared for picture in (one.front, one.side)]
    height, width = panels[0][1].shape[:2]
    figure = pictures.new_figure(9.6, 9.6 / len(panels) * height / width + 0.35)
    for axes, (label, picture) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.imshow(picture)
        axes.set_title(label)
        axes.axis("off")
    return pictures.webp(figure, 130)


@dataclass(frozen=True)
class Gallery:
    """What is rendered of a run, each once, for the page and the summary figure."""

    morphs: list[Morph]
    painted: PaintedMap | None
    compared: list[ComparedMap]
    motion: MotionFrame | None = None  # of the trained model


def render_gallery(results: Results) -> Gallery:
    """Load the series and render the maps, all but the morphs in the view of the first series."""
    morphs = [load_morph(series, results.mask) for series in results.series[:MOST_SERIES]]
    rotation = morphs[0].rotation if morphs else None
    motion = trained_motion(results)
    painted = paint_displacement(results, rotation, motion)
    return Gallery(morphs, painted, compare_maps(results, rotation), motion)


def _both_sides(rotation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A view and the one after a quarter turn about the vertical."""
    return rotation, surface.quarter_turn(rotation)
