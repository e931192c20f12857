"""Each particle's pose composed with the rigid motion of one body: what the body alone is seen in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from flexlib.interpret.hinges import BodyMotions
from flexlib.model.flex_model import FlexModel
from flexlib.particles.pose_change import PoseChange
from flexlib.particles.refined_write import RefinedParticles, refined_particles, write_refined_star


def posed_particles(particles_dir: Path, model: FlexModel) -> RefinedParticles:
    """The user's particles with the poses that the model has refined, or as they are where it has none.

    Raises
    ------
    InputError
        The input file is gone or has changed its length.
    """
    num = len(model.latents)
    change = PoseChange.none(num) if model.pose is None else model.pose
    unknown = np.full(num, np.nan)
    posed = refined_particles(particles_dir, change, unknown, unknown)
    return replace(posed, rotation_std_err_rad=None, shift_std_err_A=None)


def with_body(posed: RefinedParticles, motions: BodyMotions, body: int) -> RefinedParticles:
    """The particles in whose poses the body ``body``, from 0, as it is at rest, is where the flow has carried it.

    A point x of the body is carried to ``S x + t`` and seen at ``M^T (R (S x + t))_xy - o``, M the magnification
    matrix: the pose of the body is ``R S`` with the origin ``o - M^T (R t)_xy``. Dropped particles stay as they are.
    """
    given, refined = posed.given, posed.refined
    row = posed.output.prepared_row
    turn, shift_A = motions.rotation[row, body], motions.shift_A[row, body]
    matrices = np.array([group.magnification_matrix for group in given.optics])[given.optics_index]
    seen_A = np.einsum("nij,nj->ni", refined.rotation, shift_A)[:, :2]
    origin_A = refined.origin_A - np.einsum("nji,nj->ni", matrices, seen_A)
    turned = refined.rotation @ turn @ given.rotation.transpose(0, 2, 1)
    rotation_rad = Rotation.from_matrix(turned).as_rotvec()
    change = PoseChange(
        np.where(posed.kept[:, None], rotation_rad, 0.0),
        np.where(posed.kept[:, None], given.origin_A - origin_A, 0.0),
        posed.change.contrast,
    )
    return replace(posed, change=change)


def write_body_poses(particles_dir: Path, model: FlexModel, motions: BodyMotions, paths: list[Path]) -> None:
    """Write the user's particles once for each body, in the poses of ``with_body``, as ``write_refined_star`` does."""
    posed = posed_particles(particles_dir, model)
    for body, path in enumerate(paths):
        write_refined_star(with_body(posed, motions, body), path)
