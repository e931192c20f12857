"""The atomic model along a series: carried by the field that moves the maps, never fitted."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from flexlib.atoms.geometry import Geometry
from flexlib.atoms.model import AtomicModel, read_atomic_model, write_ensemble
from flexlib.atoms.placement import Frame, check_placement
from flexlib.atoms.ride import Ride, ride_on
from flexlib.files import atomic_path
from flexlib.imaging.maps import Map
from flexlib.layout import GenerateFolder
from flexlib.model.frame import MotionFrame
from flexlib.workflow_support.settings import GenerateSettings

logger = logging.getLogger(__name__)

_PARTICLES = 1000  # that stand for all in the residues' displacements
_CHUNK = 64  # particles at a time
_PROBED = 0.1  # of the latents' standard deviation, to see what they move
_STRETCHED_A = 0.1  # rms of the bonds in a frame, beyond which the log warns


@dataclass(frozen=True)
class CarriedAtoms:
    """A model that rides on a mesh, and how far its residues move over the particles."""

    model: AtomicModel
    ride: Ride
    geometry: Geometry
    centre_A: np.ndarray  # (3,) of the box, in the frame of the model's file
    residues: pd.DataFrame  # what residues.csv says but for the range of a series

    @classmethod
    def of(cls, settings: GenerateSettings, motion: MotionFrame, volume: Map) -> CarriedAtoms | None:
        """The model that ``generate.atoms`` names, None without one; ``volume`` is the map that is deformed.

        Raises
        ------
        InputError
            The file is not readable, or the model does not lie in the map.
        """
        if settings.atoms is None:
            return None
        model, flex = read_atomic_model(settings.atoms), motion.model
        centre_A = Frame.of(volume).centre_A
        corner_A = centre_A - flex.box // 2 * flex.pixel_size_A
        canonical = Map(flex.canonical, flex.pixel_size_A, (corner_A[0], corner_A[1], corner_A[2]))
        centred_A = check_placement(model, canonical, "generate.atoms")
        ride = ride_on(flex.mesh, model, centred_A, settings.rigid_residues)
        geometry = Geometry(model)
        logger.info(
            "%s: %d atoms, %d bonds, %d clashes as it is",
            model.path,
            len(model),
            geometry.num_bonds,
            geometry.num_clashes,
        )
        return cls(model, ride, geometry, centre_A, _residue_table(model, ride, motion))

    def write_series(self, out: GenerateFolder, name: str, displacements_A: np.ndarray) -> None:
        """Write ensemble, residues and geometry of a series of (f, nv, 3) displacements."""
        geometry: list[dict[str, float]] = []

        def frames_A() -> Iterator[np.ndarray]:
            for frame, displaced_A in enumerate(displacements_A):
                moved_A = self.ride.moved_A(displaced_A) + self.centre_A
                geometry.append({"frame": frame, **dataclasses.asdict(self.geometry.of_frame(moved_A))})
                yield moved_A

        rms_A = self.residues["rms_displacement_A"].to_numpy()
        write_ensemble(out.ensemble(name), self.model, frames_A(), rms_A)
        weights = self.ride.residue_weights(self.model)
        residues = self.residues.assign(range_A=_range_A([weights @ one for one in displacements_A]))
        table = pd.DataFrame(geometry)
        for path, content in ((out.residues(name), residues), (out.geometry(name), table)):
            with atomic_path(path) as temporary:
                content.to_csv(temporary, index=False, float_format="%.5g")
        worst = table.loc[table["bond_rms_A"].idxmax()]
        log = logger.warning if worst["bond_rms_A"] > _STRETCHED_A else logger.info
        log(
            "%s: atoms: at most, bonds change by %.3f A rms, angles by %.1f degrees rms, and %d clashes are new",
            name, worst["bond_rms_A"], table["angle_rms_deg"].max(), table["new_clashes"].max(),
        )  # fmt: skip


def _residue_table(model: AtomicModel, ride: Ride, motion: MotionFrame) -> pd.DataFrame:
    """A row for each residue: its names, its atoms, and how far it moves over the particles, with its error."""
    count = np.bincount(model.residue, minlength=len(model.residues))
    carried = np.bincount(model.residue[ride.carried], minlength=len(model.residues))
    rms_A, std_err_A = residue_motion_A(model, ride, motion)
    return pd.DataFrame(
        {
            "chain": [one.chain for one in model.residues],
            "residue": [one.number for one in model.residues],
            "name": [one.name for one in model.residues],
            "atoms": count,
            "outside": count - carried,
            "rms_displacement_A": rms_A,
            "std_err_A": std_err_A,
        }
    )


def residue_motion_A(model: AtomicModel, ride: Ride, motion: MotionFrame) -> tuple[np.ndarray, np.ndarray]:
    """(nr,) rms displacement of each residue about its mean place over the particles, and its standard error.

    The error is that of the displacement in a single particle, rms over them, by what its image leaves open: the
    posterior of its latents, carried by the flow. NaN where the model has no posteriors.
    """
    flex, weights = motion.model, ride.residue_weights(model)
    rows = np.flatnonzero(np.isfinite(flex.latents).all(1))
    rows = rows[:: max(1, -(-len(rows) // _PARTICLES))]
    probe = _PROBED * (float(flex.latents[rows].std()) or 1.0)

    def moved_A(latents: np.ndarray) -> np.ndarray:
        at_vertices = motion.displacements_A(torch.as_tensor(latents)).cpu().numpy().astype(np.float64)
        return np.stack([weights @ one for one in at_vertices])

    total, square, variance = np.zeros((len(model.residues), 3)), np.zeros(len(model.residues)), 0.0
    for some in np.array_split(rows, max(1, -(-len(rows) // _CHUNK))):
        latents = flex.latents[some]
        moved = moved_A(latents)
        total, square = total + moved.sum(0), square + (moved**2).sum((0, 2))
        if flex.latent_covariance is not None:
            steps = probe * np.eye(latents.shape[1], dtype=latents.dtype)
            slopes = np.stack([(moved_A(latents + step) - moved_A(latents - step)) / (2 * probe) for step in steps], 1)
            variance = variance + np.einsum("bkrd,bkl,blrd->r", slopes, flex.latent_covariance[some], slopes)
    mean = total / len(rows)
    rms_A = np.sqrt(np.maximum(square / len(rows) - (mean**2).sum(1), 0.0))
    if flex.latent_covariance is None:
        return rms_A, np.full(len(rms_A), np.nan)
    return rms_A, np.sqrt(np.maximum(variance / len(rows), 0.0))


def _range_A(frames_A: list[np.ndarray]) -> np.ndarray:
    """(nr,) the largest distance between the places of each residue in any two frames, (nr, 3) each."""
    largest = np.zeros(len(frames_A[0]))
    for number, one in enumerate(frames_A):
        for other in frames_A[:number]:
            largest = np.maximum(largest, ((one - other) ** 2).sum(1))
    return np.sqrt(largest)
