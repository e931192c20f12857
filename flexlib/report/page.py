"""The report page: what went in, what was found, and the sections from top to bottom."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from markupsafe import Markup

from flexlib import __version__
from flexlib.files import atomic_path
from flexlib.report import bodies, facts, landscape, sections, sentences
from flexlib.report.explorer import explorer_section
from flexlib.report.formats import NONE, angstrom, duration, number, plus_minus
from flexlib.report.markup import own_file, render
from flexlib.report.morph import Gallery
from flexlib.report.results import Results

_LARGEST_PAGE_BYTES = 14.5e6  # of 15 MB; the rest is the page's frame
_SCRIPTS = ("page.js", "explorer_flow.js", "explorer_view.js", "explorer.js")
_SECTIONS = {
    "input": "What went in",
    "mesh": "Mesh",
    "sweep": "Sweep",
    "training": "Training",
    "junk": "Are they all particles?",
    "occupancy": "Is every part there?",
    "latents": "Latent space",
    "landscape": "Landscape",
    "explore": "Explore",
    "motion": "Motion",
    "bodies": "Bodies and hinges",
    "resolution": "Resolution",
    "independent": "Independent halves",
    "settings": "Settings and provenance",
}


def build_page(results: Results, gallery: Gallery, out_html: Path) -> None:
    """Write the report from what was read and rendered."""
    from plotly.offline import get_plotlyjs

    plotly_js = get_plotlyjs()
    built = {
        "input": sections.input_section(results),
        "mesh": sections.mesh_section(results),
        "sweep": sections.sweep_section(results),
        "training": sections.training_section(results),
        "junk": sections.junk_section(results),
        "occupancy": sections.occupancy_section(results),
        "landscape": landscape.landscape_section(results),
        "explore": explorer_section(results, gallery),
        "motion": sections.motion_section(results, gallery),
        "bodies": bodies.bodies_section(results, gallery),
        "resolution": sections.resolution_section(results, gallery),
        "independent": sections.independent_section(results, gallery),
        "settings": sections.settings_section(results),
    }
    # the particles come last: they are many, and a part of them will do where the rest leaves little room
    room_bytes = _LARGEST_PAGE_BYTES - len(plotly_js.encode()) - sum(len(part.encode()) for part in built.values())
    built["latents"] = sections.latent_section(results, min(room_bytes, sections.LATENT_ROOM_BYTES))
    page = render(
        "page",
        name=results.name,
        verdict=sentences.verdict(results),
        tiles=summary_tiles(results),
        sections=[
            {"key": key, "title": title, "content": built[key]} for key, title in _SECTIONS.items() if built[key]
        ],
        style=own_file("page.css"),
        scripts=[own_file(name) for name in _SCRIPTS],
        plotly=Markup(plotly_js),
        version=__version__,
        written=f"{datetime.now():%Y-%m-%d %H:%M}",
    )
    with atomic_path(out_html) as temporary:
        temporary.write_text(page, encoding="utf-8")


@dataclass(frozen=True)
class Tile:
    """One number of the summary."""

    label: str
    value: str
    note: str = ""
    key: bool = False  # one of those to read first


def summary_tiles(results: Results) -> list[Tile]:
    """The run in eight numbers."""
    count, total, poses = facts.particle_count(results)
    count_notes = [f"of {total:,} in the input" if total else "", poses]
    flex, rigid = facts.resolutions(results)
    gain, error = facts.gain(results)
    point, validation, quality = results.chosen, results.validation, results.mesh_quality
    return [
        Tile("Particles", number(count or None, 7), "; ".join(filter(None, count_notes))),
        _images_tile(results),
        Tile("Chosen sweep point", facts.point_label(point) if point else NONE, facts.point_note(results)),
        Tile(
            "Resolution, rigid → flexible",
            f"{angstrom(rigid)} → {angstrom(flex)} Å" if flex or rigid else NONE,
            facts.resolution_note(results),
            key=True,
        ),
        Tile(
            "Held-out gain",
            number(gain) if error is None else plus_minus(gain, error),
            "nats per particle over the rigid model",
            key=True,
        ),
        Tile(
            "Mesh", f"{number(quality.get('num_cells'), 7)} cells", f"{number(quality.get('num_vertices'), 7)} vertices"
        ),
        Tile(
            "Motion",
            number(None if validation is None else validation.rms_displacement_A, 3, "Å rms"),
            "over density and particles",
            key=True,
        ),
        Tile("Time", duration(facts.total_seconds(results)), facts.time_note(results)),
    ]


def _images_tile(results: Results) -> Tile:
    """The boxes of training and reconstruction."""
    box, pixel_A = facts.training_box(results)
    full_box, full_pixel_A = facts.full_box(results)
    full = f"; reconstruction {full_box} px at {number(full_pixel_A, 4)} Å/px" if full_box else ""
    return Tile("Training images", f"{box} px" if box else NONE, f"{number(pixel_A, 4)} Å/px{full}")
