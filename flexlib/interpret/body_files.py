"""Finding the bodies of a model, and all files that tell of them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from flexlib.files import atomic_path
from flexlib.imaging.maps import Map, read_map, write_label_map, write_map
from flexlib.imaging.masks import FULL_FLOOR, inside_mask, soft_edge
from flexlib.interpret.bodies import MOST_BODIES, Bodies, find_bodies, one_body
from flexlib.interpret.body_poses import write_body_poses
from flexlib.interpret.hinges import BodyMotions, Hinge, body_motions, find_hinges
from flexlib.interpret.strain import Deformation, deformation
from flexlib.layout import InterpretFolder, ParticlesFolder
from flexlib.model.flex_model import FlexModel
from flexlib.model.frame import MotionFrame
from flexlib.model.rigid_bodies import States
from flexlib.records import AgreementRecord, PreparedRecord
from flexlib.render.colours import SEGMENT_COLOURS, rgb
from flexlib.tetra.io import write_cell_data
from flexlib.tetra.voxels import voxelise
from flexlib.workflow_support.settings import Align, InterpretSettings

logger = logging.getLogger(__name__)

_DEFORMED_STATES = 150  # whose cells are looked at
_DILATE_PX, _EDGE_PX = 1.0, 6.0  # of the bodies' masks
_CONFIRMING_ERRORS = 2.0  # standard errors of the cross gain that confirm motion


def interpret_bodies(
    model: FlexModel,
    particles: ParticlesFolder,
    out: InterpretFolder,
    settings: InterpretSettings,
    align: Align,
    agreement: AgreementRecord | None,
) -> dict[str, Any]:
    """Find the bodies and hinges of a model, and write their tables, maps, arrows and poses.

    Parameters
    ----------
    model
        Of a finished training.
    particles, out
        What prepare has written; where to write.
    settings, align
        ``interpret:``, and the frame in which ``generate:`` shows the motion, for the cells' rotations.
    agreement
        What validate found, where it has.

    Returns
    -------
    fields
        Of ``records.InterpretationRecord``.
    """
    states, reason = States.of_model(model), untold(agreement)
    bodies = one_body(states, reason) if reason else find_bodies(states, model.mesh.cells, settings.bodies)
    frame = MotionFrame.of(model, align)
    known = model.latents[np.isfinite(model.latents).all(1)]
    moved = (frame.displacements_A(z[None]).cpu()[0] for z in known[:: max(1, -(-len(known) // _DEFORMED_STATES))])
    cells = deformation(model.mesh, moved)
    motions = body_motions(model, bodies, np.nan_to_num(model.latents))
    hinges = find_hinges(model, bodies, motions)
    mask = read_map(particles.full_mask)
    _write_tables(out, bodies, hinges, motions)
    labels = _write_maps(out, model, bodies, cells, (particles, mask))
    _write_arrows(out, bodies, hinges, mask)
    posed = _write_poses(out, model, motions, particles, (labels, mask))
    bend = bodies.bend(model.mesh.cells, cells.strain)
    explained = bodies.explained[-1]
    logger.info(
        "%d bodies explain %.0f %% of the motion of %.2f A rms%s",
        bodies.num,
        100 * explained,
        bodies.motion_A,
        f": {bodies.reason}" if bodies.reason else "",
    )
    return {
        "num_bodies": bodies.num,
        "bodies_reason": bodies.reason,
        "bodies_explained": round(explained, 4),
        "bodies_motion_A": round(bodies.motion_A, 4),
        "bodies_bend": round(bend, 4),
        "hinge_range_deg": [round(hinge.range_deg, 3) for hinge in hinges if hinge.touching and hinge.kind == "hinge"],
        "body_poses": posed,
    }


def untold(agreement: AgreementRecord | None) -> str:
    """Why no bodies are looked for, by what the models of the half-sets agree on; empty where they may be."""
    if agreement is None:
        return ""
    if any(agreement.at_rest):
        return "the motion is not confirmed: a model of half the particles stands still"
    gain, error = agreement.cross_gain, agreement.cross_gain_se
    if gain is not None and error is not None and not gain > _CONFIRMING_ERRORS * error:
        return "the motion is not confirmed: models of the half-sets do not predict each other's particles"
    if agreement.motion_error_A >= agreement.motion_size_A > 0:
        return "the motion is not told: its error is as large as it is"
    return ""


def _write_csv(path: Path, rows: list[dict[str, Any]], columns: list[str]) -> None:
    with atomic_path(path) as temporary:
        pd.DataFrame(rows, columns=columns).to_csv(temporary, index=False, float_format="%.6g")


_BODY_COLUMNS = ["body", "mass_share", "residual_A", "explained", "rotation_deg", "shift_A"]
_HINGE_COLUMNS = [
    *("first", "second", "touching", "kind", "axis_x", "axis_y", "axis_z", "point_x_A", "point_y_A", "point_z_A"),
    *("axis_share", "low_deg", "high_deg", "range_deg", "sd_deg", "along_A", "across_A", "noise_factor"),
]


def _write_tables(out: InterpretFolder, bodies: Bodies, hinges: list[Hinge], motions: BodyMotions) -> None:
    vertices_A, rows = bodies.states.vertices_A, []
    figures = zip(bodies.mass, bodies.residual_A, bodies.body_explained, strict=True)
    for body, (mass, residual_A, explained) in enumerate(figures):
        rotation, shift_A = motions.relative(body, 0)
        own = bodies.members[body] * bodies.states.share
        centre = (own @ vertices_A / own.sum()).numpy()
        travel_A = np.einsum("nij,j->ni", rotation, centre) + shift_A
        cosine = (np.einsum("nii->n", rotation) - 1) / 2
        turn_deg = np.degrees(np.arccos(cosine.clip(-1, 1)))
        size = {
            "rotation_deg": float(np.sqrt((turn_deg**2).mean())),
            "shift_A": float(np.sqrt(travel_A.var(0).sum())),
        }
        told = {"mass_share": mass, "residual_A": residual_A, "explained": explained}
        rows.append({"body": body + 1, **told, **size})
    _write_csv(out.bodies, rows, _BODY_COLUMNS)
    rows = []
    for hinge in hinges:
        axis = dict(zip(("axis_x", "axis_y", "axis_z"), hinge.axis.tolist(), strict=True))
        point = dict(zip(("point_x_A", "point_y_A", "point_z_A"), hinge.point_A.tolist(), strict=True))
        rows.append(
            {
                "first": hinge.first + 1,
                "second": hinge.second + 1,
                "touching": int(hinge.touching),
                "kind": hinge.kind,
                **axis,
                **point,
                "axis_share": hinge.share,
                **{name: getattr(hinge, name) for name in ("low_deg", "high_deg", "range_deg", "sd_deg")},
                **{name: getattr(hinge, name) for name in ("along_A", "across_A", "noise_factor")},
            }
        )
    _write_csv(out.hinges, rows, _HINGE_COLUMNS)


def _write_maps(
    out: InterpretFolder,
    model: FlexModel,
    bodies: Bodies,
    cells: Deformation,
    seen: tuple[ParticlesFolder, Map],
) -> np.ndarray:
    """Write what each cell and voxel does; (N, N, N) the body of each voxel, from 1, at the full box."""
    particles, mask = seen
    pixel_size_A = PreparedRecord.read(particles.record).full_pixel_size_A
    voxels = voxelise(model.mesh, inside_mask(mask.data, FULL_FLOOR), pixel_size_A)
    labels = np.zeros(mask.data.size, np.int32)
    labels[voxels.index] = bodies.label_voxels(voxels) + 1
    write_label_map(out.labels, labels.reshape(mask.data.shape), mask.pixel_size_A, like=mask)
    for path, values in ((out.rotation, cells.rotation_deg), (out.strain, cells.strain)):
        write_map(path, cells.at_voxels(values, voxels), mask.pixel_size_A, like=mask)
    densest = bodies.states.share.numpy()[model.mesh.cells].argmax(1)
    of_cells = bodies.label[np.take_along_axis(model.mesh.cells, densest[:, None], 1)[:, 0]] + 1
    write_cell_data(
        out.deformation,
        model.mesh,
        {"rotation_deg": cells.rotation_deg, "strain": cells.strain, "body": of_cells.astype(np.int32)},
    )
    return labels.reshape(mask.data.shape)


def _write_arrows(out: InterpretFolder, bodies: Bodies, hinges: list[Hinge], like: Map) -> None:
    """Write the axes of hinges and shifts of bodies that touch, in the frame of the map's header."""
    corner_A = np.array(like.corner_A) + like.box // 2 * like.pixel_size_A
    vertices_A = bodies.states.vertices_A.numpy()
    lines = [".comment axes of the hinges: angles are right-handed about the arrow"]
    for hinge in hinges:
        if not hinge.touching or hinge.kind == "joint":
            continue
        second = vertices_A[bodies.label == hinge.second]
        reach_A = 0.6 * float(np.ptp((second - hinge.point_A) @ hinge.axis)) + 10.0
        ends = [corner_A + hinge.point_A + sign * reach_A * hinge.axis for sign in (-1, 1)]
        colour = SEGMENT_COLOURS[hinge.second % len(SEGMENT_COLOURS)]
        lines += [
            f".comment bodies {hinge.first + 1} and {hinge.second + 1}: {hinge.kind}, {hinge.range_deg:.1f} degrees",
            ".color " + " ".join(f"{part:.3f}" for part in rgb(colour)),
            ".arrow " + " ".join(f"{value:.2f}" for value in np.concatenate(ends)) + " 1 2.5 0.85",
        ]
    with atomic_path(out.arrows) as temporary:
        temporary.write_text("\n".join(lines) + "\n")


def _write_poses(
    out: InterpretFolder,
    model: FlexModel,
    motions: BodyMotions,
    particles: ParticlesFolder,
    seen: tuple[np.ndarray, Map],
) -> bool:
    """Write poses and masks of two bodies and more; whether it did."""
    labels, mask = seen
    num = motions.rotation.shape[1]
    for number in range(1, MOST_BODIES + 1):  # of an earlier run too
        for path in (out.body_poses(number), out.body_mask(number)):
            path.unlink(missing_ok=True)
    if num == 1:
        return False
    for number in range(1, num + 1):
        soft = soft_edge(
            labels == number, mask.pixel_size_A, _DILATE_PX * mask.pixel_size_A, _EDGE_PX * mask.pixel_size_A
        )
        write_map(out.body_mask(number), soft, mask.pixel_size_A, like=mask)
    if PreparedRecord.read(particles.record).symmetry_copies > 1:
        logger.warning("no poses of bodies are written: with symmetry each copy of a particle has its own")
        return False
    write_body_poses(particles.path, model, motions, [out.body_poses(number) for number in range(1, num + 1)])
    return True
