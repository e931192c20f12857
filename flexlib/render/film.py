"""A series as a film: animated WebP, drawn by our own surface renderer, without a display."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from flexlib.files import atomic_path
from flexlib.imaging.fourier import fourier_crop_map
from flexlib.render import surface

_LARGEST_BOX = 128  # larger maps are cropped in Fourier space for the pictures
_SIZE_PX = 280  # of a view
_FOOTER_PX = 92
_MARGIN_PX = 12
_MILLISECONDS, _HELD_MILLISECONDS = 90, 400  # of a frame, and of the two ends
_SCALE_BARS_A = (5, 10, 20, 50, 100, 200)
_INK, _FAINT, _BAR, _NOW, _WARN = (40, 45, 52), (130, 138, 148), (190, 203, 218), (31, 111, 180), (176, 38, 28)
_BEYOND_COLOUR = (0.86, 0.66, 0.62)  # of the surface of a frame beyond the data


@dataclass(frozen=True)
class FrameNote:
    """What is written below a frame."""

    latents: np.ndarray  # (K,)
    num_near: int
    beyond_data: bool


class SeriesMovie:
    """Renders one series frame by frame, from the front and the side; only pictures are kept.

    Below the maps stand the frame's number and latents, how many particles are near, and a bar for each frame of as
    many particles as it has; frames beyond the data are said to be so, in red.
    """

    def __init__(self, name: str, key_frames: list[np.ndarray], level: float, pixel_size_A: float) -> None:
        """``key_frames``: maps (N, N, N) at the series' ends and between, which fix view and extent."""
        self._name, self._level = name, level
        box = len(key_frames[0])
        self._box = min(box, _LARGEST_BOX)
        self._pixel_size_A = pixel_size_A * box / self._box
        shown = [self._reduced(volume) for volume in key_frames]
        front = surface.best_view(shown[0], shown[-1])
        self._views = (front, surface.quarter_turn(front))
        self._extent = surface.half_extent(shown, level)
        self._pictures: list[list[np.ndarray]] = []
        self._notes: list[FrameNote] = []

    def _reduced(self, volume: np.ndarray) -> np.ndarray:
        return fourier_crop_map(volume, self._box) if len(volume) > self._box else volume

    def add(self, volume: np.ndarray, note: FrameNote) -> None:
        """Render the next frame of the series, (N, N, N)."""
        colour = _BEYOND_COLOUR if note.beyond_data else surface.BLUE
        shown = surface.Surface(self._reduced(volume), self._level)
        self._pictures.append([shown.picture(view, self._extent, _SIZE_PX, colour) for view in self._views])
        self._notes.append(note)

    def frames(self) -> list[np.ndarray]:
        """The finished pictures, each (h, w, 3) uint8."""
        fronts, sides = (list(views) for views in zip(*self._pictures, strict=True))
        shown = np.max([picture[..., 3] for picture in fronts + sides], axis=0).any(1)
        rows = np.flatnonzero(shown) if shown.any() else np.array([0, _SIZE_PX - 1])
        cut = slice(max(rows[0] - _MARGIN_PX, 0), rows[-1] + _MARGIN_PX + 1)
        return [
            self._composed(np.hstack([front[cut], side[cut]]), number)
            for number, (front, side) in enumerate(zip(fronts, sides, strict=True))
        ]

    def _composed(self, views: np.ndarray, number: int) -> np.ndarray:
        """Both views on white over the frame's notes."""
        height, width = views.shape[:2]
        picture = Image.new("RGB", (width, height + _FOOTER_PX), "white")
        picture.paste(Image.fromarray(surface.over_white(views)), (0, 0))
        draw = ImageDraw.Draw(picture)
        note = self._notes[number]
        title = f"{self._name.replace('_', ' ')}   frame {number + 1} of {len(self._notes)}"
        draw.text((_MARGIN_PX, height + 2), title, _INK, _font(13, bold=True))
        draw.text((_MARGIN_PX, height + 21), "z = " + _coordinates(note.latents), _FAINT, _font(11))
        words = f"{note.num_near:,} particles near"
        if note.beyond_data:
            words = f"beyond the data: {words}"
        font = _font(12, bold=note.beyond_data)
        draw.text(
            (width - _MARGIN_PX - draw.textlength(words, font), height + 3),
            words,
            _WARN if note.beyond_data else _INK,
            font,
        )
        self._draw_scale(draw, width, height)
        self._draw_counts(draw, number, (_MARGIN_PX, height + 42, width - _MARGIN_PX, height + _FOOTER_PX - 8))
        return np.asarray(picture)

    def _draw_scale(self, draw: ImageDraw.ImageDraw, width: int, height: int) -> None:
        """A bar of a round length, at the right below the counts' words."""
        px_per_A = _SIZE_PX / (2 * self._extent * self._pixel_size_A)
        length_A = max([one for one in _SCALE_BARS_A if one * px_per_A < 90], default=_SCALE_BARS_A[0])
        right, y = width - _MARGIN_PX, height + 28
        draw.line([(right - length_A * px_per_A, y), (right, y)], _INK, 2)
        text = f"{length_A} Å"
        font = _font(11)
        draw.text((right - length_A * px_per_A - draw.textlength(text, font) - 6, y - 7), text, _INK, font)

    def _draw_counts(self, draw: ImageDraw.ImageDraw, number: int, area: tuple[int, int, int, int]) -> None:
        """Particles near each frame as bars; this frame's is dark, those beyond the data stand on red."""
        left, top, right, bottom = area
        highest = max(*(note.num_near for note in self._notes), 1)
        step = (right - left) / len(self._notes)
        for i, note in enumerate(self._notes):
            x0, x1 = left + i * step, left + (i + 1) * step - (2 if step > 4 else 1)
            tall = (bottom - 3 - top) * note.num_near / highest
            if tall >= 0.5:
                draw.rectangle([x0, bottom - 3 - tall, x1, bottom - 3], fill=_NOW if i == number else _BAR)
            base = _WARN if note.beyond_data else _NOW if i == number else _BAR
            draw.rectangle([x0, bottom - 2, x1, bottom], fill=base)
        if step > 3 and self._notes[number].num_near * 12 < highest:  # too low a bar to be seen
            middle = left + (number + 0.5) * step
            draw.polygon([(middle - 4, top), (middle + 4, top), (middle, top + 7)], fill=_NOW)

    def write(self, path: str | Path) -> None:
        """Write the film, to and fro for ever, atomically."""
        pictures = [Image.fromarray(frame) for frame in self.frames()]
        last = len(pictures) - 1
        order = [*range(last + 1), *range(last - 1, 0, -1)]
        durations = [_HELD_MILLISECONDS if i in (0, last) else _MILLISECONDS for i in order]
        buffer = io.BytesIO()
        shown = [pictures[i] for i in order]
        shown[0].save(
            buffer,
            format="webp",
            save_all=True,
            append_images=shown[1:],
            duration=durations,
            loop=0,
            quality=80,
            method=4,
            allow_mixed=True,
        )
        with atomic_path(path) as temporary:
            temporary.write_bytes(buffer.getvalue())


def _coordinates(latents: np.ndarray) -> str:
    shown = ", ".join(f"{value:.2f}" for value in latents[:6] + 0.0)
    return shown + (" ..." if len(latents) > 6 else "")


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as matplotlib brings it."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)
