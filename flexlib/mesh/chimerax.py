"""Shows a mesh and its map in ChimeraX: edges as a BILD file, coloured by segment and by rigidity, and a script."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from flexlib.files import atomic_path
from flexlib.imaging.maps import Map
from flexlib.layout import MeshFolder
from flexlib.render.chimerax import chimerax_text
from flexlib.render.colours import rgb, segment_colours
from flexlib.tetra.tetmesh import TetraMesh, boundary_faces

_RAMP = np.array([[0.99, 0.89, 0.49], [0.25, 0.65, 0.55], [0.27, 0.15, 0.40]])  # soft to rigid


def write_chimerax(out: MeshFolder, mesh: TetraMesh, consensus: Map, map_path: Path) -> None:
    """Write the mesh's edges, in colours of segments and of rigidity, and the script that opens them over the map.

    Points are in the frame of the map's header. Format: ChimeraX's BILD (.color, .vector).

    Parameters
    ----------
    out
        Folder to write.
    mesh
        The mesh.
    consensus
        The map, for its header.
    map_path
        Its file; the script names it relative to the folder.
    """
    centre_A = np.array(consensus.corner_A) + consensus.box // 2 * consensus.pixel_size_A
    points = mesh.vertices_A + centre_A
    faces, owner = boundary_faces(mesh)
    colours = segment_colours(mesh.segment)
    by_segment = np.array([rgb(colours[int(one)]) for one in mesh.segment[owner]])
    low, high = mesh.rigidity.min(), mesh.rigidity.max()
    part = np.log(mesh.rigidity[owner] / low) / np.log(high / low) if high > low else np.ones(len(owner))
    by_rigidity = np.stack([np.interp(part, (0, 0.5, 1), _RAMP[:, band]) for band in range(3)], axis=1)
    for name, colour in (("segments", by_segment), ("rigidity", by_rigidity)):
        _write_bild(out.bild(name), points, faces, colour)
    with atomic_path(out.chimerax) as temporary:
        temporary.write_text(
            "# the map and the mesh's outer edges, coloured by segment; model 3 is the same coloured by rigidity\n"
            f"open {chimerax_text(Path(os.path.relpath(map_path, out.path)).as_posix())} id 1\n"
            f"open {out.bild('segments').name} id 2\n"
            f"open {out.bild('rigidity').name} id 3\n"
            "volume #1 style surface color tan\n"
            "transparency #1 40\n"
            "hide #3 models\n"
            "view\n"
        )


def _write_bild(path: Path, points: np.ndarray, faces: np.ndarray, colour: np.ndarray) -> None:
    """One line per edge of the faces; an edge takes the colour of the first face that has it."""
    ends = np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [0, 2]]]), axis=1)
    edges, first = np.unique(ends, axis=0, return_index=True)
    shade = np.tile(np.round(colour, 2), (3, 1))[first]
    order = np.lexsort(shade.T)
    lines, previous = [], None
    for edge, one in zip(edges[order], shade[order].tolist(), strict=True):
        if one != previous:
            lines.append(".color {:g} {:g} {:g}".format(*one))
            previous = one
        lines.append(".vector " + " ".join(f"{value:.2f}" for value in points[edge].ravel()))
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n")
