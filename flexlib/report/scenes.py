"""Three-dimensional views that a reader can turn (Plotly)."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from flexlib.imaging.fourier import fourier_crop_map
from flexlib.imaging.maps import Map
from flexlib.render import surface
from flexlib.render.colours import segment_colours
from flexlib.report.morph import Morph
from flexlib.report.plots import styled
from flexlib.tetra.tetmesh import TetraMesh, boundary_faces

_NOTHING = np.zeros((1, 3))
_AXES = ("xaxis", "yaxis", "zaxis")
_BARE_AXIS = {"visible": False, "showbackground": False}


def _scene(reach_A: float, centre: np.ndarray = _NOTHING[0]) -> dict:
    """A cube without axes, ``reach_A`` from its ``centre`` (x, y, z) to each face, all in Angstrom."""
    ranges = np.stack([centre - reach_A, centre + reach_A], 1).tolist()
    return {
        **{name: {**_BARE_AXIS, "range": limits} for name, limits in zip(_AXES, ranges, strict=True)},
        "aspectmode": "cube",
        "camera": {"eye": {"x": 1.0, "y": -0.75, "z": 0.6}},  # perspective: Plotly does not light orthographic views
        "dragmode": "orbit",
    }


def _surface_trace(vertices: np.ndarray, faces: np.ndarray, colour: str = "#7fa9d6", opacity: float = 1.0) -> go.Mesh3d:
    x, y, z = vertices.T
    i, j, k = np.ascontiguousarray(faces.T)
    return go.Mesh3d(
        x=x,
        y=y,
        z=z,
        i=i,
        j=j,
        k=k,
        color=colour,
        opacity=opacity,
        hoverinfo="skip",
        lighting={"ambient": 0.32, "diffuse": 0.75, "specular": 0.2, "roughness": 0.6, "fresnel": 0.1},
        lightposition={"x": -1000, "y": 1500, "z": 2000},
    )


def mesh_view(mesh: TetraMesh, consensus: Map | None) -> go.Figure:
    """The segments' surfaces as wires around the density's isosurface, to be turned by hand."""
    figure = go.Figure()
    if consensus is not None:
        smooth = fourier_crop_map(consensus.data, min(consensus.box, 96))
        scale = consensus.box / smooth.shape[0] * consensus.pixel_size_A
        figure.add_trace(
            _surface_trace(*surface.isosurface(smooth, scale, 0.6 * surface.display_level(smooth), 16000), "#e0b878")
        )
    colours = segment_colours(mesh.segment)
    for segment, colour in colours.items():
        edges = _surface_edges(mesh, segment)
        gaps = np.full((len(edges), 1, 3), np.nan)
        points = np.concatenate([mesh.vertices_A[edges], gaps], axis=1).reshape(-1, 3).astype(np.float32)
        figure.add_scatter3d(
            x=points[:, 0],
            y=points[:, 1],
            z=points[:, 2],
            mode="lines",
            line={"color": colour, "width": 1.5},
            opacity=0.55,
            name=f"segment {segment}",
            hoverinfo="name" if len(colours) > 1 else "skip",
            connectgaps=False,
        )
    reach = float(np.abs(mesh.vertices_A).max()) * 1.02
    styled(figure, 480, scene=_scene(reach), showlegend=False)
    return figure.update_layout(margin={"l": 0, "r": 0, "t": 0, "b": 0})


def _surface_edges(mesh: TetraMesh, segment: int) -> np.ndarray:
    """(ne, 2) vertex indices of the edges of a segment's outer surface."""
    faces, owner = boundary_faces(mesh)
    faces = faces[mesh.segment[owner] == segment]
    return np.unique(np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [0, 2]]]), axis=1), axis=0)


def morph_view(morph: Morph, max_faces: int, count: int = 9) -> go.Figure:
    """Isosurfaces of the morph's frames with a slider; ``max_faces`` triangles a frame at most."""
    picks = np.unique(np.linspace(0, len(morph.volumes) - 1, count).round().astype(int))
    traces = [
        _surface_trace(*surface.isosurface(morph.volumes[i], morph.pixel_size_A, morph.level, max_faces)) for i in picks
    ]
    corners = np.concatenate(
        [np.stack([trace.x, trace.y, trace.z], 1) for trace in traces if len(trace.x)] or [_NOTHING]
    )
    seen = corners @ morph.rotation.T  # x right, y up in the view that the reader meets first
    centre = morph.rotation.T @ ((seen.min(0) + seen.max(0)) / 2)
    reach_A = float(np.linalg.norm(corners - centre, axis=1).max()) or 1.0
    start = len(traces) // 2
    figure = go.Figure(
        data=[traces[start]],
        frames=[go.Frame(data=[trace], name=str(number)) for number, trace in enumerate(traces)],
    )
    steps = [
        {
            "label": str(picks[number] + 1),
            "method": "animate",
            "args": [[str(number)], {"mode": "immediate", "frame": {"duration": 0, "redraw": True}}],
        }
        for number in range(len(traces))
    ]
    slider = {
        "active": start,
        "steps": steps,
        "currentvalue": {"prefix": "frame "},
        "x": 0.08,
        "len": 0.84,
        "y": 0.14,
        "pad": {"t": 6},
    }
    up = morph.rotation[1]  # the screen's up direction of the movie
    camera = {
        "eye": dict(zip("xyz", (1.3 * morph.rotation[2]).tolist(), strict=True)),
        "up": dict(zip("xyz", up.tolist(), strict=True)),
    }
    scene = {**_scene(reach_A, centre), "camera": camera, "domain": {"y": [0.15, 1]}}
    styled(figure, 470, scene=scene, sliders=[slider], showlegend=False)
    return figure.update_layout(margin={"l": 0, "r": 0, "t": 0, "b": 34})
