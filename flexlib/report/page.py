"""The report page: sections from top to bottom, each a function of the results that returns HTML."""

from __future__ import annotations

import platform
from datetime import datetime
from importlib import metadata, resources
from pathlib import Path

import yaml

from flexlib.files import atomic_path
from flexlib.report import facts, sections
from flexlib.report.markup import NONE, angstrom, duration, grid, missing, number, table, text, tile
from flexlib.report.morph import Gallery
from flexlib.report.results import Results

_PACKAGES = ("torch", "numpy", "scipy", "numba", "pandas", "mrcfile", "starfile", "plotly", "scikit-image")
_LARGEST_PAGE_BYTES = 14.5e6  # of 15 MB; the rest is the page's frame
_SECTIONS = {
    "input": "What went in",
    "mesh": "Mesh",
    "sweep": "Sweep",
    "training": "Training",
    "latents": "Latent space",
    "motion": "Motion",
    "resolution": "Resolution",
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
        "motion": sections.motion_section(results, gallery),
        "resolution": sections.resolution_section(results, gallery),
        "settings": settings_section(results),
    }
    # the particles come last: they are many, and a part of them will do where the rest leaves little room
    room_bytes = _LARGEST_PAGE_BYTES - len(plotly_js.encode()) - sum(len(part.encode()) for part in built.values())
    built["latents"] = sections.latent_section(results, min(room_bytes, sections.LATENT_ROOM_BYTES))
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title in _SECTIONS.items())
    body = "".join(
        f'<section id="{key}"><h2><span class="number">{index}</span>{title}</h2>{built[key]}</section>'
        for index, (key, title) in enumerate(_SECTIONS.items(), start=1)
    )
    folder = resources.files("flexlib.report")
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(results.name)}: flexible refinement</title><link rel="icon" href="data:,">
<style>{folder.joinpath("page.css").read_text()}</style>
<script>{plotly_js}</script></head>
<body>
<header class="top"><div><p class="kicker">3D flexible refinement</p><h1>{text(results.name)}</h1>
<p class="verdict">{facts.verdict(results)}</p></div></header>
<nav><div>{links}</div></nav>
<main>{summary_tiles(results)}{body}
<footer>Written by flexlib {text(metadata.version("flexlib"))} on {datetime.now():%Y-%m-%d %H:%M}.</footer></main>
<script>{folder.joinpath("page.js").read_text()}</script>
</body></html>
"""
    with atomic_path(out_html) as temporary:
        temporary.write_text(page, encoding="utf-8")


def summary_tiles(results: Results) -> str:
    """The run in eight numbers."""
    count, total, poses = facts.particle_count(results)
    notes = [f"of {total:,} in the input" if total else "", poses]
    box, pixel = facts.training_box(results)
    full_box, full_pixel = facts.full_box(results)
    flex, rigid = facts.resolutions(results)
    gain, error = facts.gain(results)
    point = results.chosen
    rms = results.validation.get("rms_displacement_A")
    tiles = [
        tile("Particles", number(count or None, 7), "; ".join(filter(None, notes))),
        tile(
            "Training images",
            f"{box} px" if box else NONE,
            f"{number(pixel, 4)} Å/px"
            + (f"; reconstruction {full_box} px at {number(full_pixel, 4)} Å/px" if full_box else ""),
        ),
        tile("Chosen point", facts.point_label(point) if point else NONE, facts.point_note(results)),
        tile(
            "Resolution, rigid → flexible",
            f"{angstrom(rigid)} → {angstrom(flex)} Å" if flex or rigid else NONE,
            facts.resolution_note(results),
            key=True,
        ),
        tile(
            "Held-out gain",
            f"{number(gain)} ± {number(error, 2)}" if error is not None else number(gain),
            "nats per particle over the rigid model",
            key=True,
        ),
        tile(
            "Mesh",
            f"{number(results.mesh_quality.get('num_cells'), 7)} cells",
            f"{number(results.mesh_quality.get('num_vertices'), 7)} vertices",
        ),
        tile("Motion", number(rms, 3, "Å rms"), "over voxels and particles", key=True),
        tile("Time", duration(facts.total_seconds(results)), facts.time_note(results)),
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>'


# settings -----------------------------------------------------------------------------------------------------------


def settings_section(results: Results) -> str:
    """Configuration, versions and times."""
    config = yaml.safe_dump(_plain(results.config), sort_keys=False, allow_unicode=True) if results.config else ""
    versions = [("Python", platform.python_version())]
    for package in ("flexlib", *_PACKAGES):
        try:
            versions.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            continue
    return "".join(
        [
            grid(
                "<div><h3>Time and memory</h3>" + facts.time_table(results.benchmarks) + "</div>",
                "<div><h3>Versions</h3>" + table(("package", "version"), versions) + "</div>",
            ),
            "<h3>Configuration</h3>",
            f'<pre class="config">{text(config)}</pre>' if config else missing("No configuration was given."),
        ]
    )


def _plain(value):
    """Dicts, lists and numbers that YAML writes without Python tags."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
