"""The sections of the report, top to bottom: each a function of the results that returns HTML."""

from __future__ import annotations

import numpy as np

from flexlib.report import facts, morph, pictures, plots, scenes
from flexlib.report.markup import grid, image, json_block, missing, number, plot, text
from flexlib.report.packing import DENSITY, PackedParticles, column_label, pack_particles
from flexlib.report.results import Results

LATENT_ROOM_BYTES = 6e6  # of the page, for what is drawn of the particles
_MORPH_FACES = 120_000  # triangles of all interactive morphs together

# 1 --------------------------------------------------------------------------------------------------------------


def input_section(results: Results) -> str:
    """Particles and consensus."""
    parts = []
    particles = results.particles
    if particles is None:
        parts.append(missing("The prepared particles (particles/particles.star) are not there."))
    else:
        parts.append(f'<p class="lead">{facts.particle_sentence(results)} {facts.optics_sentence(results)}</p>')
        drawn = []
        if {"DefocusU", "DefocusV"} <= set(particles):
            defocus_um = facts.defocus_um(particles)
            drawn.append(
                image(
                    pictures.defocus_histogram(defocus_um),
                    "Histogram of defocus",
                    f"<b>Defocus</b> from {defocus_um.min():.2f} to {defocus_um.max():.2f} µm, median "
                    f"{np.median(defocus_um):.2f} µm. A wide range is good: every frequency is seen by some particles.",
                )
            )
        if {"AngleRot", "AngleTilt"} <= set(particles):
            drawn.append(
                image(
                    pictures.view_directions(
                        particles["AngleRot"].to_numpy(float), particles["AngleTilt"].to_numpy(float)
                    ),
                    "Map of view directions",
                    "<b>View directions</b> (rot around, tilt from the north pole), equal-area projection. 1 is a "
                    "uniform distribution; empty regions mean that motion along those directions is seen less well.",
                )
            )
        parts.append(grid(*drawn, kind="pair"))
    if results.consensus is None:
        parts.append(missing("The consensus map (particles/consensus.mrc) is not there."))
    else:
        parts.append(
            image(
                pictures.map_slices([("consensus", results.consensus)], results.mask),
                "Central slices of the consensus map",
                "<b>Consensus map</b>, central slices at the training box; the orange line is the solvent mask at 0.5. "
                "All density that should move must lie inside the line: what is outside is not modelled.",
                "webp",
            )
        )
    return "".join(parts)


# 2 --------------------------------------------------------------------------------------------------------------


def mesh_section(results: Results) -> str:
    """The tetrahedral mesh over the density."""
    if results.mesh is None:
        return missing("There is no mesh for the chosen point (mesh.vtu).")
    mesh = results.mesh
    quality = results.mesh_quality
    lead = (
        f"<p class='lead'>{len(mesh.cells):,} tetrahedral cells with {len(mesh.vertices_A):,} vertices carry the "
        "motion: each vertex moves, and density inside a cell moves linearly with its four corners.</p>"
    )
    drawn = grid(
        plot(
            scenes.mesh_view(mesh, results.consensus),
            "mesh-view",
            "<b>The mesh's surface</b>, one colour per segment, around the consensus density (sand). Drag to turn, "
            "scroll to zoom.",
        ),
        "<div>" + facts.mesh_table(quality) + "</div>" if quality else missing("mesh_quality.json is not there."),
        kind="pair",
    )
    sections = image(
        pictures.mesh_sections(mesh, results.consensus),
        "The mesh cut by the central planes",
        "<b>The mesh cut by the three central planes</b>, over the density (dark). Colour is the relative rigidity "
        "weight: a cell with weight 1 resists stretching most, emptier cells give way so that domains can part. Cells "
        "should be smaller than the parts that move, and larger than the detail that should stay rigid.",
    )
    if len(np.unique(mesh.segment)) > 1:
        sections += image(
            pictures.mesh_sections(mesh, results.consensus, by_segment=True),
            "The segments cut by the central planes",
            "<b>The same by segment.</b> Where two colours meet, cells overlap: each segment has cells of its own "
            "there. Joined segments share the vertices, others slide past each other and separate freely; nothing "
            "keeps them from running into each other.",
        )
    return lead + drawn + sections


# 3 --------------------------------------------------------------------------------------------------------------


def sweep_section(results: Results) -> str:
    """The swept settings and why one point was chosen."""
    sweep = results.sweep
    if sweep is None or "validation_gain" not in sweep:
        return missing("There is no sweep table (sweep.csv) with held-out gains.")
    parts = [f'<p class="lead">{facts.choice_sentence(results)}</p>']
    known = sweep[sweep["validation_gain"].notna()]
    if len(known) > 1:
        caption = (
            "<b>Held-out gain</b> of each point. For particles that training of map and motion never saw, half of each "
            "image places the particle and the other half is predicted; the gain over the rigid model cannot be raised "
            "by over-fitting. Above zero: the motion is real. "
        )
        caption += (
            "Bars are the standard error of the difference to the best (dashed), taken particle by particle. "
            if plots.paired(known)
            else "Bars are the standard error over particles; the dashed line is the best. "
        )
        caption += (
            "Of the points right of the dotted line, one standard error of the best below it, the simplest is taken."
        )
        drawn = [plot(plots.sweep_gains(known), "sweep-gains", caption)]
        heat_map = plots.sweep_heat_map(known)
        if heat_map is not None:
            drawn.append(
                plot(
                    heat_map,
                    "sweep-heat-map",
                    "<b>The same as a map over the settings</b>, averaged over what is not shown; the chosen point is "
                    "framed.",
                )
            )
        parts.append(grid(*drawn))
    elif len(known) == 0:
        parts.append(missing("No point has a held-out score: train.validation_fraction was 0."))
    parts.append(facts.sweep_table(sweep))
    return "".join(parts)


# 4 --------------------------------------------------------------------------------------------------------------


def training_section(results: Results) -> str:
    """Training curves and the spectrum."""
    parts = []
    box, pixel_A = facts.training_box(results)
    curves = (
        {} if results.log is None else plots.training_curves(results.log, box * pixel_A if box and pixel_A else None)
    )
    if not curves:
        parts.append(missing("There is no training log (log.csv) for the chosen point."))
    else:
        drawn = "".join(plot(figure, f"training-{number}", "") for number, figure in enumerate(curves.values()))
        parts.append(
            f'<div class="grid small">{drawn}</div>'
            "<figcaption><b>Training, epoch by epoch.</b> Curves should have levelled out at the end; steps occur "
            "where finer resolution comes in. A data term that still falls asks for more epochs.</figcaption>"
        )
    if results.spectrum is None or "eigenvalue" not in results.spectrum:
        parts.append(missing("There is no eigenvalue spectrum (spectrum.csv): training did not start spectrally."))
    else:
        parts.append(
            plot(
                plots.spectrum_plot(results.spectrum, results.validation.get("suggested_dims")),
                "spectrum",
                "<b>How many motions the images show</b> before any training: variance of the forces on the mesh's "
                "elastic modes, in units of what pure noise gives. " + facts.spectrum_sentence(results),
            )
        )
    return "".join(parts)


# 5 --------------------------------------------------------------------------------------------------------------


def latent_section(results: Results, room_bytes: float = LATENT_ROOM_BYTES) -> str:
    """Particles in latent space; no more of them than fit into ``room_bytes`` of the page."""
    latents = results.latents
    if latents is None:
        return missing("There are no latent coordinates (latents.star) for the chosen point.")
    dims = results.latent_dims
    lead = (
        f'<p class="lead">{len(latents):,} particles, each with {dims} latent '
        f"coordinate{'s' if dims > 1 else ''}. {facts.truth_sentence(results)}</p>"
    )
    packed = pack_particles(results, room_bytes)
    note = ""
    if packed.drawn < len(latents):
        note = (
            f" {packed.drawn:,} of {len(latents):,} particles are drawn, picked at random, to keep this page small: a "
            "lasso's list has only these, the <code>flex-select</code> command shown with it takes all."
        )
    scatter = plots.latent_scatter(packed.drawn)
    path = results.series_latents
    if path is not None and {"series", "frame", "latent_1", "beyond_data"} <= set(path) and dims > 1:
        plots.add_series_paths(scatter, path)
        note += " The orange lines are the generated series, with a red cross where there are hardly any particles."
    if dims > 1:
        gathered = plot(
            plots.latent_density(),
            "latent-density",
            "<b>Where particles gather.</b> Separate clouds are states; an even band is a continuous motion.",
        )
    else:
        gathered = plot(
            plots.latent_histogram(),
            "latent-density",
            "<b>Where particles gather.</b> Separate heaps are states; a single broad one is a continuous motion.",
        )
    points = plot(scatter, "latent-scatter", _latent_caption(note))
    drawn = grid(f"<div>{points}{_lasso_panel(results)}</div>", gathered)
    content = json_block("latent-columns", packed.content)
    return lead + _latent_controls(packed) + drawn + content


def _latent_controls(packed: PackedParticles) -> str:
    """Choices of colour and axes, and the button that starts a selection."""
    # with a single latent, something else has to be the second axis
    spread = (name for name in packed.colours if name.startswith("True angle") or name == "Defocus (µm)")
    second = packed.latents[1] if len(packed.latents) > 1 else next(spread, DENSITY)
    return (
        '<div class="controls">'
        + _picker("Colour", "latent-colour", (*packed.colours, *packed.latents), packed.colours[0])
        + _picker("Horizontal", "latent-x", (*packed.latents, *packed.colours), packed.latents[0])
        + _picker("Vertical", "latent-y", (*packed.latents, *packed.colours), second)
        + '<button type="button" id="latent-lasso" aria-pressed="false">Select with a lasso</button></div>'
    )


def _picker(label: str, name: str, columns: tuple[str, ...], chosen: str) -> str:
    options = "".join(
        f'<option value="{text(column)}"{" selected" if column == chosen else ""}>{text(column_label(column))}</option>'
        for column in columns
    )
    return f'<label>{label} <select id="{name}">{options}</select></label>'


def _lasso_panel(results: Results) -> str:
    """What to do with the particles inside the lasso; page.js shows it once there are any."""
    folder = results.stage_dir("train").as_posix()
    suffix = ".cs" if str(results.prepared.get("particles")).endswith(".cs") else ".star"
    return (
        f'<div class="picked" id="latent-picked" data-folder="{text(folder)}" data-name="{text(results.name)}" '
        f'data-suffix="{suffix}" hidden>'
        '<p><b id="latent-count"></b> <button type="button" id="latent-save">Download their list (CSV)</button> '
        '<button type="button" id="latent-clear">Clear</button></p>'
        "<p>A subset of your own particle file, with every column as it was:</p>"
        '<pre id="latent-command"></pre></div>'
    )


def _latent_caption(note: str) -> str:
    return (
        "<b>Each point is a particle</b>; neighbours have similar shapes. Colouring by half-set, defocus or view "
        "should show no pattern: a pattern means that the latents follow the imaging and not the molecule." + note
    )


# 6 --------------------------------------------------------------------------------------------------------------


def _beyond_data(results: Results, name: str) -> str:
    """How many frames of a series have hardly any particles near, in words; empty where none."""
    table = results.series_latents
    count = 0 if table is None else int(table.loc[table["series"] == name, "beyond_data"].sum())
    return f"; {count} lie beyond the data" if count else ""


def motion_section(results: Results, gallery: morph.Gallery) -> str:
    """What moves, how far, and how it looks."""
    parts = []
    morphs, painted = gallery.morphs, gallery.painted
    if painted is None:
        parts.append(missing("There is no trained model (model.pt), so no map of how far density moves."))
    else:
        parts.append(
            image(
                morph.displacement_picture(painted),
                "The map coloured by displacement",
                "<b>How far each part moves</b>: the canonical map from two sides (the right one turned by 90° about "
                "the vertical), coloured by the rms displacement over particles. Half of the mask moves by less than "
                f"{number(painted.median_A, 2)} Å, the most mobile part by {number(painted.highest_A, 2)} Å rms.",
                "webp",
            )
        )
    if not morphs:
        parts.append(missing("No series of maps was generated for the chosen point (generate/), so there is no movie."))
    for one in morphs:
        title = one.name.replace("_", " ")
        frames = next(len(series.frames) for series in results.series if series.name == one.name)
        parts.append(f"<h3>Series {text(title)}</h3>")
        parts.append(
            image(
                morph.surface_movie(one),
                f"Morph along {title}",
                f"<b>The motion along {text(title)}</b>, from its first frame to its last "
                f"({len(one.volumes)} of {frames} frames{_beyond_data(results, one.name)}), in the view "
                "that shows it best and turned by 90° about the vertical. One contour level "
                f"({number(one.level)}) for all frames: what thins or breaks there is density that the motion does not "
                "carry well.",
                "webp",
            )
        )
        parts.append(
            image(
                morph.strip(one),
                f"Frames along {title}",
                "<b>The same in still frames</b>, in per cent of the way. Last panel: the first frame in sand, the "
                "last in blue.",
                "webp",
            )
        )
        parts.append(
            grid(
                plot(
                    scenes.morph_view(one, _MORPH_FACES // (9 * len(morphs))),
                    f"morph-{text(one.name)}",
                    "<b>Turn it yourself</b>: drag to rotate, move the slider through the frames (simplified surface).",
                ),
                image(
                    morph.projection_movie(one),
                    f"Projections along {title}",
                    "<b>Projections</b> along z, y and x. Density should move as bodies, without fading in and out.",
                    "webp",
                ),
                kind="centre",
            )
        )
    if len(results.series) > len(morphs) > 0:
        others = ", ".join(series.name for series in results.series[len(morphs) :])
        parts.append(f"<p>Not shown, to keep this page small: {text(others)}. Their films lie in generate/.</p>")
    return "".join(parts)


# 7 --------------------------------------------------------------------------------------------------------------


def resolution_section(results: Results, gallery: morph.Gallery) -> str:
    """FSC and maps, rigid against flexible."""
    parts = []
    fsc = results.fsc
    if fsc is None or "frequency_1_per_A" not in fsc:
        return missing(
            "The chosen point was not reconstructed (reconstruct/ has no fsc.csv), so there is no resolution."
        )
    parts.append(f'<p class="lead">{facts.resolution_sentence(results)}</p>')
    parts.append(
        plot(
            plots.fsc_plot(fsc),
            "fsc",
            "<b>Half-map Fourier shell correlation.</b> Where a curve first falls below 0.143 is the resolution. "
            "<i>Corrected</i> removes by phase randomisation what the mask itself correlates. Curves should fall to "
            "zero: one that stays up shares something between the halves. Click the legend to show other curves.",
        )
    )
    parts.append(facts.resolution_table(fsc))
    if results.unconverged:
        names = ", ".join(results.unconverged)
        parts.append(
            missing(f"Not converged: {names}. Raise reconstruct.max_bfgs_iterations; the FSC may not be true.")
        )
    if results.convergence is not None:
        caption = (
            "<b>Convergence of the reconstructions.</b> Curves should end well below 10⁻²: then the map is the "
            "images' and not the solver's. One that ends higher ran out of iterations: raise "
            "reconstruct.max_bfgs_iterations."
        )
        parts.append(plot(plots.convergence_plot(results.convergence), "convergence", caption))
    maps = results.reconstructed_maps
    if not maps:
        parts.append(missing("There are no reconstructed maps beside fsc.csv."))
    else:
        if len(maps) == 1:
            parts.append(missing(f"Only the {maps[0][0]} map was reconstructed, so there is no comparison."))
        parts.append(
            image(
                pictures.map_slices(maps, results.reconstruction_mask),
                "Slices of the rigid and flexible maps",
                "<b>Central slices of the maps</b> (mean of the half-maps, not sharpened), at one grey scale. Parts "
                "that move should be sharper and stronger in the flexible map; parts that do not move should look the "
                "same.",
                "webp",
            )
        )
    if gallery.compared:
        parts.append(
            image(
                morph.compared_picture(gallery.compared),
                "Surfaces of the rigid and flexible maps",
                "<b>The same maps as surfaces</b>, from two sides, at one contour level.",
                "webp",
            )
        )
    return "".join(parts)
