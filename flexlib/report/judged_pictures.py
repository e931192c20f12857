"""Pictures of junk and of parts: how sure the training is, what the images look like, where the parts are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import ndimage
from scipy.spatial.transform import Rotation

from flexlib.images.stack import read_stack_header
from flexlib.render import surface
from flexlib.report.morph import shown_box
from flexlib.report.pictures import FLEX, RIGID, new_figure, png, webp
from flexlib.report.results import LEAST_PROBABILITY, Results

_SHOWN = 8  # images in a row
_LEAST_DETAIL_A, _LEAST_DETAIL_PX = 30.0, 6.0  # the larger is what images are low-passed to
_VIEWS = 60  # random ones, of which the best is taken
_SIGMA_OF_DETAIL = 0.187  # of a Gaussian whose transform is a half there


def probability_histogram(values: np.ndarray, xlabel: str, ylabel: str) -> bytes:
    """Histogram of probabilities, grey below a half; counts on a logarithmic scale where a heap hides the rest."""
    figure = new_figure(4.9, 2.9)
    axes = figure.add_subplot()
    counts, edges = np.histogram(values, np.linspace(0, 1, 41))
    colours = [RIGID if edge < LEAST_PROBABILITY else FLEX for edge in edges[:-1]]
    uneven = counts.max() > 50 * max(np.median(counts), 1)
    axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=colours, log=uneven)
    axes.set_xlim(0, 1)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    return png(figure, 110)


@dataclass(frozen=True)
class ImageRows:
    """The least likely images above typical ones."""

    picture: bytes  # WebP
    detail_A: float  # what they are low-passed to


def image_rows(results: Results, judged: pd.DataFrame) -> ImageRows | None:
    """Eight images of the lowest probability and eight of the likelier half, as trained on; None without the stack."""
    particles, consensus, stack = results.particles, results.consensus, results.run.particles.images
    if particles is None or consensus is None or "flexInputRow" not in particles or not stack.is_file():
        return None
    # an image with symmetry copies is judged in each of its poses
    best = judged.groupby("row")["probability"].max().sort_values(kind="stable")
    slices = particles.drop_duplicates("flexInputRow").set_index(
        particles["flexInputRow"].drop_duplicates().astype(int)
    )
    slices = slices["ImageName"].str.partition("@")[0].astype(int) - 1
    best = best[best.index.isin(slices.index)]
    if len(best) < 2 * _SHOWN:
        return None
    typical = best[best >= best.median()].sample(_SHOWN, random_state=0)
    chosen = pd.concat([best.head(_SHOWN), typical])
    images = read_stack_header(stack).read(slices[chosen.index].to_numpy()).astype(np.float32)
    detail_px = max(_LEAST_DETAIL_A / consensus.pixel_size_A, _LEAST_DETAIL_PX)
    smooth = np.stack([ndimage.gaussian_filter(image, _SIGMA_OF_DETAIL * detail_px) for image in images])
    smooth -= np.median(smooth, axis=(1, 2), keepdims=True)
    return ImageRows(_drawn_rows(smooth, chosen), detail_px * consensus.pixel_size_A)


def _drawn_rows(images: np.ndarray, chosen: pd.Series) -> bytes:
    """(2 * 8, N, N) images at one grey scale, each with its probability and its row of the input; WebP."""
    limits = np.percentile(images, [1, 99.5])
    figure = new_figure(9.6, 3.1)
    grid = figure.subplots(2, _SHOWN)
    pairs = zip(grid.ravel(), images, chosen.index, chosen, strict=True)
    for axes, image, row, probability in pairs:
        axes.imshow(image, cmap="gray", vmin=limits[0], vmax=limits[1], origin="lower", interpolation="bicubic")
        shown = f"{probability:.2f}" if probability >= 0.005 else "< 0.005"
        axes.set_title(f"{shown}, row {row + 1}", fontsize=7.5)
        axes.set_xticks([])
        axes.set_yticks([])
    for axes, label in zip(grid[:, 0], ("least likely", "typical"), strict=True):
        axes.set_ylabel(label)
    return webp(figure, 130)


def part_pictures(results: Results) -> dict[int, bytes]:
    """Part -> the canonical map with it in red, in a view that shows it well and after a quarter turn; WebP."""
    if not results.train_folder.model.exists():
        return {}
    from flexlib.model.flex_model import FlexModel

    model = FlexModel.load(results.train_folder.model)
    if model.parts is None:
        return {}
    return {
        part: _painted_part(model.canonical, model.parts == part)
        for part in range(1, int(model.parts.max()) + 1)
        if (model.parts == part).any()
    }


def clearest_view(solid: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """(3, 3) view in which, and after a quarter turn, most is seen of the part ``inside`` a ``solid``, (N, N, N)."""
    box = len(solid)
    points = np.argwhere(solid)[:, ::-1] - box // 2
    in_part = inside[solid]
    best, best_area = np.eye(3), -1
    for view in Rotation.random(_VIEWS, rng=0).as_matrix():
        areas = [_seen_area(points @ turned.T, in_part, box) for turned in (view, surface.quarter_turn(view))]
        if min(areas) > best_area:
            best, best_area = view, min(areas)
    return best


def _seen_area(points: np.ndarray, in_part: np.ndarray, box: int) -> int:
    """Pixels, of two voxels, in which the foremost of (m, 3) points in a view belongs to the part."""
    pixel = np.rint(points[:, :2] / 2).astype(int) + box
    order = np.argsort(points[:, 2], kind="stable")  # towards the viewer
    front = np.zeros((2 * box, 2 * box), bool)
    front[pixel[order, 1], pixel[order, 0]] = in_part[order]  # the last one written is the foremost
    return int(front.sum())


def _painted_part(canonical: np.ndarray, inside: np.ndarray) -> bytes:
    level = surface.display_level(canonical)
    front = clearest_view(canonical >= level, inside)
    extent = surface.half_extent([canonical], level)
    paint = ndimage.grey_dilation(inside.astype(np.float32), 3)  # the surface lies at the outermost voxels' edge
    shown = surface.Surface(canonical, level)
    drawn = [shown.picture(view, extent, 380, paint=paint) for view in (front, surface.quarter_turn(front))]
    rows = shown_box(drawn)[0]
    pair = [surface.over_white(one[rows, shown_box([one])[1]]) for one in drawn]
    picture = np.hstack([pair[0], np.full((len(pair[0]), 30, 3), 255, np.uint8), pair[1]])
    figure = new_figure(6.0, 6.0 * picture.shape[0] / picture.shape[1])
    axes = figure.add_subplot()
    axes.imshow(picture)
    axes.axis("off")
    return webp(figure, 130)
