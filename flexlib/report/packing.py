"""Particles' columns packed into the page, one or two bytes a value; page.js unpacks them."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from flexlib.report.results import Results

_LATENT_BITS, _COLOUR_BITS = 16, 8  # an axis can be zoomed into; a colour scale has 256 steps
_MOST_COLOURS = 24
DENSITY = "Density (relative)"


@dataclass(frozen=True)
class PackedParticles:
    """What page.js needs of the particles that are drawn."""

    content: dict[str, Any]  # JSON: count, total, rows, columns {name: packed}
    latents: tuple[str, ...]  # z1..zK
    colours: tuple[str, ...]  # further columns, the first is shown first

    @property
    def drawn(self) -> int:
        """Rows drawn."""
        return int(self.content["count"])

    @property
    def json(self) -> str:
        """``content`` without spaces."""
        return json.dumps(self.content, separators=(",", ":"))


def pack_particles(results: Results, room_bytes: float) -> PackedParticles:
    """Latents, colours and input rows of all particles, or of a random part that fits into ``room_bytes``."""
    latents = results.latents
    assert latents is not None
    axes = tuple(f"z{i + 1}" for i in range(results.latent_dims))
    density = density_2d(latents["z1"].to_numpy(), latents["z2" if "z2" in latents else "z1"].to_numpy())
    known = latents.assign(**{DENSITY: density})
    colours = [*results.truth_names, DENSITY]
    colours += [name for name in latents if name not in (*axes, *colours, "row", "copy")]
    shown = known
    most = int(0.75 * room_bytes / particle_bytes(len(axes), len(colours[:_MOST_COLOURS])))  # base64: 4 bytes for 3
    if len(known) > most:
        shown = known.sample(max(most, 1), random_state=0).sort_index()
    columns = {name: pack_column(shown[name].to_numpy(float), _LATENT_BITS) for name in axes}
    columns |= {name: pack_column(shown[name].to_numpy(float), _COLOUR_BITS) for name in colours[:_MOST_COLOURS]}
    content = {
        "count": len(shown),
        "total": len(known),
        "latents": list(axes),
        "rows": pack_rows(shown["row"].to_numpy()),
        "columns": columns,
    }
    return PackedParticles(content, axes, tuple(colours[:_MOST_COLOURS]))


def particle_bytes(num_latents: int, num_colours: int) -> float:
    """Bytes of one particle before base64, with a margin for rows far apart."""
    return 1.2 + num_latents * _LATENT_BITS / 8 + num_colours * _COLOUR_BITS / 8


def pack_column(values: np.ndarray, bits: int) -> dict[str, Any]:
    """(n,) numbers as little-endian integers of 8 or 16 bits between ``low`` and ``high``; the highest code is nan."""
    finite = np.isfinite(values)
    low, high = (float(values[finite].min()), float(values[finite].max())) if finite.any() else (0.0, 0.0)
    steps = 2**bits - 2
    code = np.full(len(values), steps + 1)
    code[finite] = np.rint((values[finite] - low) * (steps / (high - low) if high > low else 0.0))
    data = base64.b64encode(code.astype("<u2" if bits == 16 else "u1").tobytes()).decode()
    return {"low": low, "high": high, "bits": bits, "data": data}


def pack_rows(rows: np.ndarray) -> str:
    """(n,) row numbers as bytes: how far each is from the one before (-1 at first); 255 adds 255 and goes on."""
    gaps = np.diff(rows, prepend=-1).astype(np.int64)
    if (gaps < 0).any():
        raise ValueError("rows must increase")
    extra = gaps // 255
    ends = np.cumsum(extra + 1)
    codes = np.full(int(ends[-1]) if len(ends) else 0, 255, np.uint8)
    codes[ends - 1] = gaps % 255
    return base64.b64encode(codes.tobytes()).decode()


def density_2d(x: np.ndarray, y: np.ndarray, bins: int = 64) -> np.ndarray:
    """(n,) smoothed local density of particles over two columns, relative to its maximum."""
    from scipy import ndimage

    edges = [np.histogram_bin_edges(values, bins, tuple(np.quantile(values, [0.001, 0.999]))) for values in (x, y)]
    bin_ = [np.clip(np.digitize(values, edge) - 1, 0, bins - 1) for values, edge in zip((x, y), edges, strict=True)]
    count = np.bincount(bin_[0] * bins + bin_[1], minlength=bins * bins).reshape(bins, bins).astype(float)
    smooth = ndimage.gaussian_filter(count, 1.5)
    return smooth[bin_[0], bin_[1]] / smooth.max()


def column_label(name: str) -> str:
    """What a reader calls a column of ``Results.latents``."""
    if name[0] == "z" and name[1:].isdigit():
        return f"latent {name[1:]}"
    for prefix, words, unit in (
        ("flexLatentStdErr", "standard error of latent", ""),
        ("flexMotion", "motion", " (Å)"),
        ("flexOccupancy", "occupancy of part", ""),
        ("flexParticleProbability", "probability of a particle", ""),
    ):
        if name.startswith(prefix):
            return f"{words} {name.removeprefix(prefix).removesuffix('Angst')}".strip() + unit
    return name
