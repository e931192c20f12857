"""One ChimeraX script that opens everything of the chosen sweep point: map, motion, hinges, atoms and series."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from flexlib.files import atomic_path
from flexlib.imaging.maps import Map
from flexlib.render.chimerax import chimerax_text
from flexlib.render.surface import display_level
from flexlib.report.results import Results, map_at

_RAMP = ("#3b4cc0", "#dddddd", "#b40426")  # from little motion to much
_FIRST_SERIES = 11  # number of the first series among the models


def write_scene(results: Results, path: Path) -> None:
    """Write the script, of what there is; it opens files by their place beside it."""
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(_lines(results, path.parent)) + "\n")


def _lines(results: Results, folder: Path) -> Iterator[str]:
    yield f"# {chimerax_text(results.name)}: open this file in ChimeraX; show and hide the models in its model panel"
    shown = _map(results)
    if shown is not None:
        path, data = shown
        yield _open(path, folder, 1, "map")
        yield f"volume #1 style surface step 1 level {display_level(data.data):.6g} color #c8c8c8"
        yield from _motion(results, folder, data)
    interpreted = results.run.interpret(_point(results))
    if interpreted.arrows.is_file():
        yield _open(interpreted.arrows, folder, 3, "hinges")
        yield "transparency #1 40"
    if interpreted.labels.is_file():
        yield _open(interpreted.labels, folder, 4, "bodies")
        yield "volume #4 style surface step 1 level 0.5"
        yield "hide #4 models"
    yield from _series(results, folder)
    yield "view"


def _point(results: Results) -> str:
    return "" if results.chosen is None else results.chosen.path


def _map(results: Results) -> tuple[Path, Map] | None:
    """The best map there is, and its file."""
    reconstructed = results.reconstruct_folder
    for path in (reconstructed.sharpened, reconstructed.map("flex"), results.train_folder.canonical):
        if (found := map_at(path)) is not None:
            return path, found
    return None


def _motion(results: Results, folder: Path, shown: Map) -> Iterator[str]:
    """Colour the map by how far it moves, where a validation says so."""
    path = results.run.validate(_point(results)).motion_size
    size = map_at(path)
    if size is None or not size.data.any():
        return
    largest_A = float(np.quantile(size.data[size.data > 0], 0.98))
    yield _open(path, folder, 2, "motion, rms in Angstrom")
    yield "hide #2 models"
    stops = zip((0.0, largest_A / 2, largest_A), _RAMP, strict=True)
    palette = ":".join(f"{value:.3g},{colour}" for value, colour in stops)
    yield f"color sample #1 map #2 palette {palette} key true"


def _series(results: Results, folder: Path) -> Iterator[str]:
    """Each series' maps and, where there is a model, its atoms; the first is shown, beside the map."""
    generated, number = results.generate_folder, _FIRST_SERIES
    for series in results.series:
        frames = generated.series(series.name) / "frame_*.mrc"
        yield f"{_open(frames, folder, number, series.name)} vseries true"
        yield f"vseries slider #{number}"
        yield f"hide #{number} models"
        number += 1
        if (atoms := generated.ensemble(series.name)).is_file():
            yield f"{_open(atoms, folder, number, f'{series.name}, atoms')} coordsets true"
            yield f"coordset slider #{number}"
            yield f"hide #{number} models"
            number += 1


def _open(path: Path, folder: Path, number: int, name: str) -> str:
    return f"open {chimerax_text(os.path.relpath(path, folder))} id {number} name {chimerax_text(name)}"
