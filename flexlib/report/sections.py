"""The sections of the report, top to bottom: each a function of the results that returns HTML."""

from __future__ import annotations

import numpy as np

from flexlib.report import facts, morph, pictures, plots, scenes
from flexlib.report.markup import grid, image, json_block, missing, number, plot, text
from flexlib.report.results import Results

_MAX_POINTS = 20000  # particles drawn in a scatter plot
_MORPH_FACES = 160_000  # triangles of all interactive morphs together

# 1 --------------------------------------------------------------------------------------------------------------


def input_section(results: Results) -> str:
    """Particles and consensus."""
    parts = []
    particles = results.particles
    if particles is None:
        parts.append(missing("The prepared particles (particles/particles.star) are not there."))
    else:
        parts.append(f'<p class="lead">{facts.particle_sentence(results)}</p>')
        drawn = []
        if {"DefocusU", "DefocusV"} <= set(particles):
            defocus_um = (particles["DefocusU"].astype(float) + particles["DefocusV"].astype(float)).to_numpy() / 2e4
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
        parts.append(grid(*drawn))
    if results.consensus is None:
        parts.append(missing("The consensus map (particles/consensus.mrc) is not there."))
    else:
        parts.append(
            image(
                pictures.map_slices([("consensus", results.consensus)], results.mask),
                "Central slices of the consensus map",
                "<b>Consensus map</b>, central slices at the training box; the orange line is the solvent mask at 0.5. "
                "All density that should move must lie inside the line: what is outside is not modelled.",
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
            "<b>Held-out gain</b> of each point, with its standard error over particles; the band "
            "is one standard error below the best. For particles that training "
            "of map and motion never saw, half of each image places the particle and the other half is predicted; the "
            "gain over the rigid model cannot be raised by over-fitting. Above zero: the motion is real."
        )
        drawn = [plot(plots.sweep_gains(known), "sweep-gains", caption)]
        heat_map = plots.sweep_heat_map(known)
        if heat_map is not None:
            drawn.append(
                plot(
                    heat_map,
                    "sweep-heat-map",
                    "<b>The same over two settings</b>, the best of all others; the chosen point is framed.",
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
    curves = {} if results.log is None else plots.training_curves(results.log)
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
                plots.spectrum_plot(results.spectrum),
                "spectrum",
                "<b>How many motions the images show</b> before any training: variance of the forces on the mesh's "
                "elastic modes, in units of what pure noise gives. " + facts.spectrum_sentence(results),
            )
        )
    return "".join(parts)


# 5 --------------------------------------------------------------------------------------------------------------


def latent_section(results: Results) -> str:
    """Particles in latent space."""
    latents = results.latents
    if latents is None:
        return missing("There are no latent coordinates (latents.star) for the chosen point.")
    shown = latents
    note = ""
    if len(latents) > _MAX_POINTS:
        shown = latents.sample(_MAX_POINTS, random_state=0).sort_index()
        note = f" {_MAX_POINTS:,} of {len(latents):,} particles are drawn, picked at random."
    lead = (
        f'<p class="lead">{len(latents):,} particles, each with {results.latent_dims} latent '
        f"coordinate{'s' if results.latent_dims > 1 else ''}. {facts.truth_sentence(results)}</p>"
    )
    if results.latent_dims == 1:
        against = [name for name in (*results.truth_names, "Defocus (um)", "View tilt (deg)") if name in shown]
        drawn = [plot(plots.latent_histogram(shown), "latent-histogram", _latent_caption(note))]
        for index, name in enumerate(against[: len(results.truth_names) or 1]):
            drawn.append(plot(plots.latent_against(shown, name), f"latent-against-{index}", _against_caption(name)))
        return lead + grid(*drawn)
    density = morph.density_2d(shown["z1"].to_numpy(), shown["z2"].to_numpy())
    colours = {name: shown[name].to_numpy(float) for name in results.truth_names}
    colours |= {"Density (relative)": density}
    colours |= {
        name: shown[name].to_numpy(float) for name in ("Half-set", "Defocus (um)", "View tilt (deg)") if name in shown
    }
    colours |= {f"latent {i + 1}": shown[f"z{i + 1}"].to_numpy() for i in range(2, results.latent_dims)}
    first = next(iter(colours))
    columns = {name: plots.plain_numbers(values) for name, values in colours.items()}
    columns |= {f"z{i + 1}": plots.plain_numbers(shown[f"z{i + 1}"]) for i in range(results.latent_dims)}
    picker = '<label>Colour by <select id="latent-colour">' + "".join(
        f'<option value="{text(name)}">{text(name)}</option>' for name in colours
    )
    picker += "</select></label>"
    if results.latent_dims > 2:
        pairs = [(i, j) for i in range(1, results.latent_dims) for j in range(i + 1, results.latent_dims + 1)]
        options = "".join(f'<option value="{i},{j}">{i} and {j}</option>' for i, j in pairs)
        picker += f'<label>Latents <select id="latent-pair">{options}</select></label>'
    scatter = plots.latent_scatter(shown, first, colours[first])
    path = results.series_latents
    if path is not None and {"series", "frame", "latent_1", "latent_2"} <= set(path):
        plots.add_series_paths(scatter, path)
        note += " The orange lines are the generated series, with a red cross where there are hardly any particles."
    drawn_plots = grid(
        plot(scatter, "latent-scatter", _latent_caption(note)),
        plot(
            plots.latent_density(shown),
            "latent-density",
            "<b>Where particles gather.</b> Separate clouds are states; an even band is a continuous motion.",
        ),
    )
    return lead + f'<div class="controls">{picker}</div>' + drawn_plots + json_block("latent-columns", columns)


def _latent_caption(note: str) -> str:
    return (
        "<b>Each point is a particle</b>; neighbours have similar shapes. Colouring by half-set, defocus or view "
        "should show no pattern: a pattern means that the latents follow the imaging and not the molecule." + note
    )


def _against_caption(name: str) -> str:
    if name.startswith("True"):
        return f"<b>Latent 1 against {text(name.lower())}</b>: a thin monotonic band means that the motion was found."
    return f"<b>Latent 1 against {text(name.lower())}</b>: no trend should be seen."


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
            )
        )
    if gallery.compared:
        parts.append(
            image(
                morph.compared_picture(gallery.compared),
                "Surfaces of the rigid and flexible maps",
                "<b>The same maps as surfaces</b>, from two sides, at one contour level.",
            )
        )
    return "".join(parts)
