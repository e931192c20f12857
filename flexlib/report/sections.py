"""The sections of the report, top to bottom: each a function of the results that returns HTML."""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
import yaml
from markupsafe import Markup

from flexlib import __version__
from flexlib.report import (
    facts,
    independent,
    independent_pictures,
    independent_sentences,
    judged,
    judged_pictures,
    morph,
    pictures,
    plots,
    scenes,
    sentences,
    sweep_plots,
    tables,
)
from flexlib.report.formats import shell_word
from flexlib.report.markup import render
from flexlib.report.packing import DENSITY, PackedParticles, pack_particles
from flexlib.report.results import LEAST_PROBABILITY, Results
from flexlib.runtime import package_versions

LATENT_ROOM_BYTES = 6e6  # of the page, for what is drawn of the particles
_MORPH_FACES = 120_000  # triangles of all interactive morphs together
_MOST_VALIDATED = 4  # sweep points whose validation is shown in full


def input_section(results: Results) -> Markup:
    """Particles and consensus."""
    particles, consensus = results.particles, results.consensus
    columns = set() if particles is None else set(particles)
    shown: dict[str, Any] = {"particle_sentence": None, "defocus_um": None, "view_directions": None, "consensus": None}
    if particles is not None:
        shown["particle_sentence"] = sentences.particle_sentence(results)
        shown["optics_sentence"] = sentences.optics_sentence(results)
    if particles is not None and {"DefocusU", "DefocusV"} <= columns:
        shown["defocus_um"] = facts.defocus_um(particles)
        shown["defocus_median_um"] = np.median(shown["defocus_um"])
        shown["defocus_histogram"] = pictures.defocus_histogram(shown["defocus_um"])
    if particles is not None and {"AngleRot", "AngleTilt"} <= columns:
        angles = (particles[name].to_numpy(float) for name in ("AngleRot", "AngleTilt"))
        shown["view_directions"] = pictures.view_directions(*angles)
    if consensus is not None:
        shown["consensus"] = pictures.map_slices([("consensus", consensus)], results.mask)
    shown["health"] = [] if results.prepared is None else results.prepared.health
    shown["noise"] = None if results.noise is None else pictures.noise_spectra(results.noise)
    return render("input", **shown)


def mesh_section(results: Results) -> Markup:
    """The tetrahedral mesh over the density."""
    mesh, consensus = results.mesh, results.consensus
    if mesh is None:
        return render("mesh", num_cells=None)
    segmented = len(np.unique(mesh.segment)) > 1
    return render(
        "mesh",
        num_cells=len(mesh.cells),
        num_vertices=len(mesh.vertices_A),
        view=scenes.mesh_view(mesh, consensus),
        tables=tables.mesh_tables(results.mesh_quality),
        cut=pictures.mesh_sections(mesh, consensus),
        cut_segments=pictures.mesh_sections(mesh, consensus, by_segment=True) if segmented else None,
    )


def sweep_section(results: Results) -> Markup:
    """The swept settings and why one sweep point was chosen."""
    sweep = results.sweep
    if sweep is None or "validation_gain" not in sweep:
        return render("sweep", table=None)
    known = sweep[sweep["validation_gain"].notna()]
    several = len(known) > 1
    return render(
        "sweep",
        table=tables.sweep_table(sweep),
        choice=sentences.choice_sentence(results),
        scored=len(known) > 0,
        paired=facts.paired(known),
        gains=sweep_plots.sweep_gains(known) if several else None,
        heat_map=sweep_plots.sweep_heat_map(known) if several else None,
    )


def training_section(results: Results) -> Markup:
    """Training curves and the spectrum."""
    box, pixel_A = facts.training_box(results)
    box_A = box * pixel_A if box and pixel_A else None
    spectrum, validation = results.spectrum, results.validation
    drawn = None
    if spectrum is not None and "eigenvalue" in spectrum:
        drawn = plots.spectrum_plot(spectrum, None if validation is None else validation.suggested_dims)
    return render(
        "training",
        curves=[] if results.log is None else list(plots.training_curves(results.log, box_A).values()),
        spectrum=drawn,
        spectrum_sentence=sentences.spectrum_sentence(results),
        held_out_sentence=sentences.held_out_sentence(results),
    )


def junk_section(results: Results) -> Markup:
    """Which images show no particle; empty where the training did not look."""
    found = judged.judged_images(results)
    if found is None:
        return Markup("")
    return render(
        "junk",
        sentence=judged.junk_sentence(results, found),
        histogram=judged_pictures.probability_histogram(
            found["probability"].to_numpy(), "probability that the image shows a particle", "images"
        ),
        images=judged_pictures.image_rows(results, found),
        folder=shell_word(results.train_folder.path.as_posix()),
        least=f"{LEAST_PROBABILITY:g}",
        suffix=_input_suffix(results),
    )


def occupancy_section(results: Results) -> Markup:
    """Parts that some particles lack; empty where there are none."""
    shares = judged.part_shares(results)
    if not shares:
        return Markup("")
    views = judged_pictures.part_pictures(results)
    parts = [
        {
            "number": part.number,
            "sentence": judged.part_sentence(part),
            "picture": views.get(part.number),
            "histogram": judged_pictures.probability_histogram(
                part.present, f"probability that part {part.number} is there", "particles"
            ),
        }
        for part in shares
    ]
    folder, suffix = shell_word(results.train_folder.path.as_posix()), _input_suffix(results)
    return render("occupancy", parts=parts, folder=folder, suffix=suffix)


def _input_suffix(results: Results) -> str:
    """Of the user's particle file."""
    prepared = results.prepared
    return ".cs" if prepared is not None and prepared.particles.endswith(".cs") else ".star"


def latent_section(results: Results, room_bytes: float = LATENT_ROOM_BYTES) -> Markup:
    """Particles in latent space; no more of them than fit into ``room_bytes`` of the page."""
    latents = results.latents
    if latents is None:
        return render("latents", packed=None)
    several = results.latent_dims > 1
    packed = pack_particles(results, room_bytes)
    scatter = plots.latent_scatter(packed.drawn)
    path = results.series_latents
    has_paths = path is not None and {"series", "frame", "latent_1", "beyond_data"} <= set(path) and several
    if path is not None and has_paths:
        plots.add_series_paths(scatter, path)
    return render(
        "latents",
        packed=packed,
        total=len(latents),
        rows="particles" if latents["row"].is_unique else "rows",
        count_sentence=sentences.latent_sentence(results),
        truth_sentence=sentences.truth_sentence(results),
        pose_sentence=sentences.pose_sentence(results),
        entanglement_sentence=sentences.entanglement_sentence(results),
        entanglement_warnings=sentences.entanglement_warnings(results),
        entanglement=tables.entanglement_table([] if results.validation is None else results.validation.entanglement),
        vertical=_vertical_axis(packed),
        scatter=scatter,
        has_paths=has_paths,
        density=plots.latent_density() if several else plots.latent_histogram(),
        folder=shell_word(results.train_folder.path.as_posix()),
        name=results.name,
        suffix=_input_suffix(results),
        least=f"{LEAST_PROBABILITY:g}",
        num_junk=results.num_junk,
    )


def _vertical_axis(packed: PackedParticles) -> str:
    """What the page shows upwards at first; with a single latent, something else has to be the second axis."""
    spread = (name for name in packed.colours if name.startswith("True angle") or name == "Defocus (µm)")
    return packed.latents[1] if len(packed.latents) > 1 else next(spread, DENSITY)


def motion_section(results: Results, gallery: morph.Gallery) -> Markup:
    """What moves, how far, and how it looks."""
    painted, morphs = gallery.painted, gallery.morphs
    return render(
        "motion",
        painted=painted,
        displacement=None if painted is None else morph.painted_picture(painted, "rms displacement (Å)"),
        series=[_shown_series(results, one, _MORPH_FACES // (9 * len(morphs))) for one in morphs],
        others=[series.name for series in results.series[len(morphs) :]],
    )


def _shown_series(results: Results, one: morph.Morph, max_faces: int) -> dict[str, Any]:
    """What the page shows of one series; ``max_faces`` triangles a frame at most."""
    table = results.series_latents
    return {
        "name": one.name,
        "title": one.name.replace("_", " "),
        "num_shown": len(one.volumes),
        "num_frames": next(len(series.frames) for series in results.series if series.name == one.name),
        "num_beyond": 0 if table is None else int(table.loc[table["series"] == one.name, "beyond_data"].sum()),
        "level": one.level,
        "movie": morph.surface_movie(one),
        "strip": morph.strip(one),
        "view": scenes.morph_view(one, max_faces),
        "projections": morph.projection_movie(one),
    }


def resolution_section(results: Results, gallery: morph.Gallery) -> Markup:
    """FSC and maps, rigid against flexible."""
    fsc = results.fsc
    if fsc is None or "frequency_1_per_A" not in fsc:
        return render("resolution", curves=None)
    maps, convergence = results.reconstructed_maps, results.convergence
    return render(
        "resolution",
        sentence=sentences.resolution_sentence(results),
        curves=plots.fsc_plot(fsc),
        table=tables.resolution_table(fsc),
        unconverged=results.unconverged,
        convergence=None if convergence is None else plots.convergence_plot(convergence),
        labels=[label for label, _ in maps],
        slices=pictures.map_slices(maps, results.reconstruction_mask) if maps else None,
        surfaces=morph.compared_picture(gallery.compared) if gallery.compared else None,
    )


def independent_section(results: Results, gallery: morph.Gallery) -> Markup:
    """What two models that never met agree on, at each sweep point that was validated."""
    points = independent.validated_points(results)
    rotation = gallery.morphs[0].rotation if gallery.morphs else None
    return render(
        "independent",
        shown=[_shown_validation(results, point, rotation) for point in points[:_MOST_VALIDATED]],
        others=[independent_sentences.point_line(point) for point in points[_MOST_VALIDATED:]],
        unreadable=[path.as_posix() for path in independent.unreadable_records(results)],
        chosen_is_there=bool(points) and points[0].point == results.chosen,
        several=len(points) > 1,
    )


def _shown_validation(
    results: Results, point: independent.ValidatedPoint, rotation: np.ndarray | None
) -> dict[str, Any]:
    """What the page shows of one sweep point; no error of the motion where a half's model is at rest."""
    mask, words = results.reconstruction_mask, independent_sentences
    shown: dict[str, Any] = {
        "title": words.point_title(point),
        "verdict": words.verdict(point),
        "warned": bool(words.warnings(point)),
        "comparisons": [
            {
                "sentence": words.fsc_sentence(one),
                "flattered": one.flattered,
                "shared": words.shared_sentence(one) if one.has_shared else "",
                "plot": plots.fsc_comparison_plot(one.curves, one.part),
            }
            for one in point.comparisons
        ],
        "unconverged": point.unconverged,
        "rest": words.rest_sentence(point),
        "cross": words.cross_sentence(point),
        "both_move": point.both_move,
    }
    if point.both_move:
        regions, modes, calibration = point.regions, point.modes, point.calibration
        shown |= {
            "motion": words.motion_sentence(point, mask),
            "pictures": independent_pictures.error_pictures(point, mask, rotation),
            "region_sentence": words.region_sentence(point),
            "regions": None if regions is None else tables.region_table(regions),
            "modes_sentence": words.modes_sentence(point),
            "modes": None if modes is None else plots.modes_plot(modes, point.record.mode_limit_A),
            "latents_sentence": words.latents_sentence(point),
            "calibration": None if calibration is None else tables.calibration_table(calibration),
        }
    return shown


def settings_section(results: Results) -> Markup:
    """Configuration, versions and times."""
    config = yaml.safe_dump(_plain(results.config), sort_keys=False, allow_unicode=True) if results.config else ""
    versions = [("Python", platform.python_version()), ("flexlib", __version__), *package_versions().items()]
    return render(
        "settings",
        times=tables.time_table(results.benchmarks),
        versions=tables.Table(("package", "version"), versions),
        config=config,
        crate=results.run.crate.name,
        checksums=None if results.checksums is None else tables.checksum_table(results.checksums),
    )


def _plain(value: Any) -> Any:
    """Dicts, lists and numbers that YAML writes without Python tags."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
