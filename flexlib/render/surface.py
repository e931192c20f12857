"""Shaded pictures of isosurfaces: a small ray caster, without graphics hardware.

By hand: VTK (PyVista) was considered; off screen it needs a graphics driver or OSMesa, which cluster nodes lack.

Screen axes: x right, y up, z towards the viewer (right-handed), so the picture keeps the map's hand.
"""

from __future__ import annotations

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from scipy import ndimage

from flexlib.imaging.fourier import fourier_crop_map, fourier_pad_map
from flexlib.runtime import compiled

_LIGHT = np.array([-0.45, 0.6, 0.66])  # towards the light, from above and the left
_SHARP_BOX = 128  # smaller boxes are padded in Fourier space to this one, so that voxels do not show
PAINT = ("#d3dae2", "#f0c27a", "#e2711d", "#a5161c")  # still to moving: grey, sand, orange, red
_COARSEST_BOX = 8  # for surfaces of few triangles
_STEP, _LEAP = 0.9, 4  # voxels along a ray, near the surface and where nothing is near
BLUE = (0.58, 0.73, 0.90)
GREY = (0.72, 0.75, 0.79)
SAND = (0.88, 0.74, 0.52)


def display_level(volume: np.ndarray, mask: np.ndarray | None = None) -> float:
    """A contour level for pictures: Otsu's threshold of the positive density (inside ``mask``), softened by 0.75.

    Source: N. Otsu, IEEE Trans. Syst. Man Cybern. 9 (1979) 62.
    """
    from skimage.filters import threshold_otsu

    inside = volume[mask > 0.5] if mask is not None and mask.shape == volume.shape else volume.ravel()
    positive = inside[inside > 0.05 * volume.max()]
    if len(positive) < 2 or np.ptp(positive) <= 1e-4 * positive.max():  # a phantom of one density
        return float(0.5 * volume.max())
    return float(0.75 * threshold_otsu(positive))


def best_view(first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """(3, 3) rotation, view = rotation @ (x, y, z), in which the projections of two (N, N, N) maps differ most.

    Searches view directions over a hemisphere, then turns the longest axis of the projection to the horizontal.
    """
    box = min(40, first.shape[0])
    first, last = (fourier_crop_map(volume, box) for volume in (first, last))
    changes = []
    rotations = [_facing(direction) for direction in _hemisphere(48)]
    for rotation in rotations:
        moved = _resample(last - first, rotation, box)
        changes.append(np.abs(moved.sum(0)).sum())
    rotation = rotations[int(np.argmax(changes))]
    weight = np.clip(_resample(first + last, rotation, box).sum(0), 0, None)  # (y, x)
    y, x = np.indices(weight.shape) - box // 2
    x, y = x - np.average(x, weights=weight), y - np.average(y, weights=weight)
    covariance = np.cov(np.vstack([x.ravel(), y.ravel()]), aweights=weight.ravel())
    long_axis = np.linalg.eigh(covariance)[1][:, -1]
    long_axis = long_axis * (np.sign(long_axis[0]) or 1.0)
    in_plane = np.eye(3)
    in_plane[:2, :2] = [long_axis, [-long_axis[1], long_axis[0]]]
    return in_plane @ rotation


def quarter_turn(rotation: np.ndarray) -> np.ndarray:
    """The view after turning the object by 90 degrees about the screen's vertical axis."""
    return np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]]) @ rotation


def half_extent(volumes: list[np.ndarray], level: float) -> float:
    """Radius in voxels, about the box centre, of a sphere around everything above ``level``, with a small margin."""
    box = volumes[0].shape[0]
    above = np.max(volumes, axis=0) >= level
    if not above.any():
        return box / 2
    radius = np.sqrt(((np.argwhere(above) - box // 2) ** 2).sum(1).max())
    return float(min(1.06 * radius + 1.0, 0.87 * box))


class Surface:
    """The surface where a volume crosses a level, ready for pictures from any side."""

    def __init__(self, volume: np.ndarray, level: float) -> None:
        """Where ``volume`` (N, N, N) crosses the density ``level``."""
        self._box = volume.shape[0]
        fine = fourier_pad_map(volume, _SHARP_BOX) if self._box < _SHARP_BOX else volume
        self._fine, self._level = np.ascontiguousarray(fine, np.float32), level
        self._near = _near_blocks(self._fine, level)
        self._reach = _reach(self._near, len(fine))

    def picture(
        self,
        rotation: np.ndarray,
        extent: float,
        size_px: int = 400,
        colour: tuple[float, float, float] = BLUE,
        paint: np.ndarray | None = None,
        paint_limits: tuple[float, float] = (0.0, 1.0),
        label_colours: np.ndarray | None = None,
    ) -> np.ndarray:
        """Picture of the surface.

        Parameters
        ----------
        rotation
            (3, 3), view = rotation @ (x, y, z).
        extent
            Half the picture's width, in voxels.
        size_px
            The picture's side.
        colour
            Red, green and blue of the surface, 0 to 1.
        paint
            (N, N, N) values that colour the surface (``PAINT`` between ``paint_limits``) instead of ``colour``.
        paint_limits
            Values of the first and the last colour.
        label_colours
            (m, 3) red, green and blue, 0 to 1, of labels from 0: then ``paint`` holds these.

        Returns
        -------
        np.ndarray
            (size_px, size_px, 4) uint8, alpha 0 outside.
        """
        zoom = len(self._fine) / self._box
        size = 3 * size_px // 2  # drawn larger, then averaged down
        height = self._march(rotation, extent * zoom, size)
        hit = np.isfinite(height)
        rgba = np.zeros((size, size, 4), np.float32)
        if hit.any():
            points = _view_points(height, hit, extent * zoom)
            normal = _normals(self._fine, points @ rotation) @ rotation.T
            base = np.broadcast_to(np.array(colour), normal.shape)
            if paint is not None:
                low, high = paint_limits
                at = (points @ rotation / zoom + self._box // 2)[:, ::-1].T
                order = 1 if label_colours is None else 0
                values = ndimage.map_coordinates(paint, at, order=order, mode="nearest")
            if paint is not None and label_colours is not None:
                base = label_colours[values]
            elif paint is not None:
                base = paint_map()(np.clip((values - low) / max(high - low, 1e-12), 0, 1))[:, :3]
            rgba[hit, :3] = _shade(base, normal, _occlusion(height, hit, extent * zoom)[hit])
            rgba[hit, 3] = 1.0
        return _shrink(rgba, size_px)

    def _march(self, rotation: np.ndarray, extent: float, size: int) -> np.ndarray:
        """Walk each ray from the viewer to the first crossing of the level.

        Returns
        -------
        np.ndarray
            (size, size) view z in voxels of the fine volume, rows from the top, nan where a ray meets nothing.
        """
        rotation, pixel = np.ascontiguousarray(rotation, np.float64), _pixel_positions(extent, size)
        return _march_rays(self._fine, self._near, np.float32(self._level), rotation, pixel, self._reach)


def isosurface(volume: np.ndarray, pixel_size_A: float, level: float, max_faces: int) -> tuple[np.ndarray, np.ndarray]:
    """Triangles of the isosurface, coarsened until there are at most ``max_faces``.

    Parameters
    ----------
    volume
        (N, N, N) density; cropped in Fourier space to coarsen the surface.
    pixel_size_A
        Of ``volume``, in Angstrom.
    level
        The density at the surface.
    max_faces
        The most triangles.

    Returns
    -------
    vertices : np.ndarray
        (nv, 3) float32, (x, y, z) in Angstrom from the box centre.
    faces : np.ndarray
        (nf, 3) int, three vertices each.
    """
    from skimage.measure import marching_cubes

    if not volume.min() < level < volume.max():
        return np.zeros((0, 3), np.float32), np.zeros((0, 3), np.uint16)
    coarse = volume
    while True:
        corner, faces, _, _ = marching_cubes(coarse, level)
        if len(faces) <= max_faces or len(coarse) <= _COARSEST_BOX:
            break
        box = 2 * int(0.49 * len(coarse) * np.sqrt(max_faces / len(faces)))  # even, and a little below what is needed
        coarse = fourier_crop_map(volume, max(box, _COARSEST_BOX))
        if not coarse.min() < level < coarse.max():
            break
    vertices = (corner[:, ::-1] - len(coarse) // 2) * (pixel_size_A * len(volume) / len(coarse))
    index_type = np.uint16 if len(vertices) < 65536 else np.uint32
    return vertices.astype(np.float32), faces.astype(index_type)


def paint_map() -> LinearSegmentedColormap:
    """The colours of ``PAINT`` as a colour map."""
    return LinearSegmentedColormap.from_list("paint", PAINT)


def _hemisphere(count: int) -> np.ndarray:
    """(count, 3) unit vectors with z > 0, evenly spread (Fibonacci spiral)."""
    index = np.arange(count)
    z = (index + 0.5) / count
    angle = np.pi * (1 + 5**0.5) * index
    radius = np.sqrt(1 - z**2)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), z], axis=1)


def _facing(direction: np.ndarray) -> np.ndarray:
    """A rotation that turns ``direction`` towards the viewer."""
    helper = np.eye(3)[int(np.argmin(np.abs(direction)))]
    right = np.cross(helper, direction)
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(direction, right), direction])


def _resample(volume: np.ndarray, rotation: np.ndarray, size: int, step: float = 1.0) -> np.ndarray:
    """``volume`` in the view's frame on a (size, size, size) grid (z, y, x) of spacing ``step`` voxels, centre kept."""
    matrix = rotation.T[::-1, ::-1] * step
    offset = volume.shape[0] // 2 - matrix @ np.full(3, size // 2)
    return ndimage.affine_transform(volume, matrix, offset, output_shape=(size,) * 3, order=1)


def _pixel_positions(extent: float, size: int) -> np.ndarray:
    """(size,) screen positions in voxels, increasing."""
    return ((np.arange(size) + 0.5) / size * 2 - 1) * extent


def _near_blocks(fine: np.ndarray, level: float) -> np.ndarray:
    """Of each block of ``_LEAP``^3 voxels whether it or a block beside it reaches ``level``."""
    blocks = -(-fine.shape[0] // _LEAP)
    padded = np.pad(fine, (0, blocks * _LEAP - fine.shape[0]), mode="edge")
    highest = padded.reshape(blocks, _LEAP, blocks, _LEAP, blocks, _LEAP).max(1).max(2).max(3)
    return ndimage.maximum_filter(highest, size=3) >= level


def _reach(near: np.ndarray, box: int) -> float:
    """Radius in voxels, about the box centre, of a sphere around all blocks that are ``near``."""
    corner = np.abs(np.argwhere(near) * _LEAP + 0.5 * _LEAP - box // 2) + 0.5 * _LEAP
    return float(np.sqrt((corner**2).sum(1).max(initial=0.0)))


@compiled()
def _march_rays(fine, near, level, rotation, pixel, reach):  # pragma: no cover
    """Steps of ``_LEAP`` voxels where nothing is near, else of ``_STEP``; all that is near lies within ``reach``."""
    box, size = fine.shape[0], len(pixel)
    height = np.full((size, size), np.nan)
    for row in range(size):
        for column in range(size):
            x, y = pixel[column], pixel[size - 1 - row]
            aside = reach * reach - x * x - y * y
            if aside <= 0:
                continue
            far = np.sqrt(aside)
            z, before = far, np.float32(-np.inf)
            while z > -far:
                px = rotation[0, 0] * x + rotation[1, 0] * y + rotation[2, 0] * z + box // 2
                py = rotation[0, 1] * x + rotation[1, 1] * y + rotation[2, 1] * z + box // 2
                pz = rotation[0, 2] * x + rotation[1, 2] * y + rotation[2, 2] * z + box // 2
                i, j, k = int(np.floor(pz)), int(np.floor(py)), int(np.floor(px))
                outside = i < 0 or j < 0 or k < 0 or i > box - 2 or j > box - 2 or k > box - 2
                if outside or not near[i // _LEAP, j // _LEAP, k // _LEAP]:
                    z -= _LEAP - 1.0
                    before = np.float32(-np.inf)
                    continue
                a, b, c = np.float32(pz - i), np.float32(py - j), np.float32(px - k)
                low = (1 - b) * ((1 - c) * fine[i, j, k] + c * fine[i, j, k + 1])
                low += b * ((1 - c) * fine[i, j + 1, k] + c * fine[i, j + 1, k + 1])
                high = (1 - b) * ((1 - c) * fine[i + 1, j, k] + c * fine[i + 1, j, k + 1])
                high += b * ((1 - c) * fine[i + 1, j + 1, k] + c * fine[i + 1, j + 1, k + 1])
                value = (1 - a) * low + a * high
                if value >= level:
                    back = (value - level) / (value - before) if value > before > -np.inf else 0.0
                    height[row, column] = z + _STEP * back
                    break
                before = value
                z -= _STEP
    return height


def _sample(volume: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Linear interpolation at (m, 3) points (x, y, z) in voxels from the centre; 0 outside."""
    return ndimage.map_coordinates(volume, (points + volume.shape[0] // 2)[:, ::-1].T, order=1)


def _view_points(height: np.ndarray, hit: np.ndarray, extent: float) -> np.ndarray:
    """(m, 3) view coordinates of the hit pixels, voxels."""
    size = len(height)
    pixel = _pixel_positions(extent, size)
    rows, columns = np.nonzero(hit)
    return np.column_stack([pixel[columns], pixel[size - 1 - rows], height[rows, columns]])


def _normals(fine: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(m, 3) outward unit normals (down the density's gradient) in volume axes."""
    reach = 1.2 * np.eye(3)
    gradient = np.stack([_sample(fine, points + offset) - _sample(fine, points - offset) for offset in reach], axis=1)
    return -gradient / np.maximum(np.linalg.norm(gradient, axis=1, keepdims=True), 1e-12)


def _occlusion(height: np.ndarray, hit: np.ndarray, extent: float) -> np.ndarray:
    """(size, size) light left in [0, 1] where the surface lies in a hollow of the height field."""
    size = len(height)
    filled = np.where(hit, height, 0.0).astype(np.float32)
    light = np.ones_like(filled)
    for reach, strength in ((0.02, 1.2), (0.06, 0.8)):
        weight = _blur(hit.astype(np.float32), reach * size)
        around = _blur(filled, reach * size) / np.maximum(weight, 1e-6)
        hollow = np.clip((around - filled) / (reach * 2 * extent), 0, 1)
        light *= 1 - 0.4 * strength * hollow
    return np.clip(light, 0.5, 1.0)


def _blur(picture: np.ndarray, sigma_px: float) -> np.ndarray:
    """Nearly a Gaussian blur, in a time that does not grow with its width: two box filters."""
    width = max(1, round(2.45 * sigma_px))
    return ndimage.uniform_filter(ndimage.uniform_filter(picture, width), width)


def _shade(base: np.ndarray, normal: np.ndarray, light: np.ndarray) -> np.ndarray:
    """Diffuse, fill and highlight; (m, 3) colours."""
    direction = _LIGHT / np.linalg.norm(_LIGHT)
    diffuse = np.clip(normal @ direction, 0, 1)[:, None]
    facing = np.clip(normal[:, 2], 0, 1)[:, None]
    middle = direction + np.array([0, 0, 1.0])
    shine = np.clip(normal @ (middle / np.linalg.norm(middle)), 0, 1)[:, None] ** 40
    colour = base * (0.42 + 0.25 * facing + 0.55 * diffuse) * light[:, None] + 0.16 * shine
    return np.clip(colour * (0.78 + 0.22 * facing), 0, 1)


def _shrink(rgba: np.ndarray, size_px: int) -> np.ndarray:
    """Average a (size, size, 4) float picture down to ``size_px`` with premultiplied alpha; uint8."""
    from PIL import Image

    premultiplied = np.concatenate([rgba[..., :3] * rgba[..., 3:], rgba[..., 3:]], axis=2)
    bands = [
        np.asarray(
            Image.fromarray(premultiplied[..., band].astype(np.float32)).resize(
                (size_px, size_px), Image.Resampling.BOX
            )
        )
        for band in range(4)
    ]
    alpha = bands[3]
    colour = np.stack(bands[:3], axis=2) / np.maximum(alpha, 1e-6)[..., None]
    return (np.clip(np.dstack([colour, alpha]), 0, 1) * 255).round().astype(np.uint8)


def over_white(rgba: np.ndarray) -> np.ndarray:
    """(h, w, 3) uint8 of an RGBA picture on white."""
    alpha = rgba[..., 3:].astype(float) / 255
    return (rgba[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)
