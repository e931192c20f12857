"""Carried atoms against the truth: a real structure that bends at two hinges, from particles to ensemble.

Simulates images of a structure whose named chains swing at their contacts with the rest, prepares, trains with the
defaults, carries the atoms to the states of the truth, and prints

- the rms distance of backbone atoms from where they truly are, for each state, superposed: turning and shifting the
  whole is the pose's; and the same of those atoms that the field says it knows within 1.5 A;
- the same over particles, each at its own latents, beside the standard error that ``residues.csv`` tells;
- what the motion does to bonds and angles, and whether gemmi and biotite read the same ensemble.

The structure is a file of yours, such as an entry of the PDB. The model that is carried lies in the canonical map: it
is the structure at rest, taken back along the field to the conformation that the canonical map has.

    python benchmarks/compare_atoms.py --model 7CFN.cif --moving R --moving B,G --out /scratch/atoms   # ten minutes

What is already there is not done again. Figures: docs/atoms.md.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path

import gemmi
import numpy as np
import pandas as pd
from biotite.structure.io import pdbx
from compare_validation import true_latents
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from flexlib.atoms.model import AtomicModel, read_atomic_model, write_ensemble
from flexlib.atoms.placement import Frame
from flexlib.atoms.ride import ride_on
from flexlib.generate.atoms import residue_motion_A
from flexlib.generate.run import generate_series
from flexlib.imaging.maps import read_map
from flexlib.layout import GenerateFolder, TrainFolder
from flexlib.mesh.build import build_mesh
from flexlib.model.flex_model import FlexModel
from flexlib.model.frame import MotionFrame
from flexlib.prepare.run import prepare_particles
from flexlib.simulate.phantoms import Hinge, Phantom
from flexlib.simulate.run import simulate_particles
from flexlib.simulate.settings import Simulation
from flexlib.train import train
from flexlib.workflow_support.settings import GenerateSettings, MeshSettings, PrepareSettings, TrainSettings

CONTACT_A, RAMP_A = 6.0, 15.0  # of chains that touch; along the arm, from no angle to all of it
SAMPLED = 300  # particles whose atoms are compared
WANTED_A = 1.5


def hinge_of(model: AtomicModel, positions_A: np.ndarray, chains: list[str], range_rad: float) -> Hinge:
    """A swing of some chains about the long axis of their contact with the rest; the angle grows along the arm."""
    moves = np.isin(model.chain, chains)
    near = cKDTree(positions_A[~moves]).query(positions_A[moves])[0] < CONTACT_A
    contact = positions_A[moves][near]
    pivot = contact.mean(0)
    arm = positions_A[moves].mean(0) - pivot
    arm /= np.linalg.norm(arm)
    flat = contact - pivot - ((contact - pivot) @ arm)[:, None] * arm
    axis = np.linalg.svd(flat, full_matrices=False)[2][0]
    ramp = np.clip(((positions_A - pivot) @ arm) / RAMP_A + 0.25, 0, 1)
    return Hinge(pivot, axis, moves * ramp**2 * (3 - 2 * ramp), range_rad)


def phantom_of(model: AtomicModel, moving: list[str], range_rad: float) -> Phantom:
    """The structure, centred, with a hinge for each group of chains."""
    mass = np.maximum(model.atomic_number, 1).astype(np.float64)
    positions_A = model.positions_A - mass @ model.positions_A / mass.sum()
    hinges = [hinge_of(model, positions_A, chains.split(","), range_rad) for chains in moving]
    chain = np.unique(model.chain, return_inverse=True)[1]
    return Phantom(model.path.stem, positions_A, mass, tuple(hinges), chain)


def make(folder: Path, phantom: Phantom, options: argparse.Namespace) -> None:
    """All that is compared, as far as it is missing."""
    simulation = Simulation(
        num_particles=options.num_particles, box=64, pixel_size_A=options.pixel_size_A, snr=options.snr, seed=1
    )
    if not (folder / "sim/truth.npz").exists():
        simulate_particles(folder / "sim", simulation, phantom)
    if not (folder / "particles/prepared.json").exists():
        settings = PrepareSettings(train_box=64)
        prepare_particles(
            folder / "sim/particles.star", folder / "sim/consensus.mrc", folder / "particles", settings=settings
        )
    mesh = MeshSettings(segmentation=options.model_in_map if options.segments else None, segments=options.segments)
    if not (folder / options.name / "mesh/mesh.vtu").exists():
        build_mesh(folder / "particles", folder / options.name / "mesh", mesh)
    if not (folder / options.name / "train/model.pt").exists():
        train(folder / "particles", folder / options.name / "mesh", folder / options.name / "train", TrainSettings())


def latents_of_states(model: FlexModel, angles_rad: np.ndarray, states_rad: np.ndarray) -> np.ndarray:
    """(s, K) latents of some states: the smooth function of the angles that fits those of the particles."""
    from_both = true_latents(np.concatenate([angles_rad, states_rad]), _extended(model, angles_rad, states_rad))
    return from_both[len(angles_rad) :]


def _extended(model: FlexModel, angles_rad: np.ndarray, states_rad: np.ndarray) -> np.ndarray:
    """Latents of the particles, and for each state the mean of the ten particles nearest to it, for a start."""
    nearest = cKDTree(angles_rad).query(states_rad, k=10)[1]
    return np.concatenate([model.latents, model.latents[nearest].mean(1)]).astype(np.float64)


def at_rest_A(flex: FlexModel, atoms: AtomicModel, there_A: np.ndarray, latents: np.ndarray) -> np.ndarray:
    """(na, 3) where atoms rest that the field takes to ``there_A``, by fixed point."""
    moved_A, rest_A = flex.displacements_A(latents[None])[0].numpy(), there_A.copy()
    for _ in range(12):
        rest_A = rest_A + there_A - ride_on(flex.mesh, atoms, rest_A).moved_A(moved_A)
    return rest_A


def rms(values: np.ndarray) -> float:
    """Root mean square length of the vectors in the last axis."""
    return float(np.sqrt((values**2).sum(-1).mean()))


def superposed(moved_A: np.ndarray, true_A: np.ndarray) -> np.ndarray:
    """``moved_A`` after the rotation and shift that bring it closest to ``true_A``."""
    middle = moved_A.mean(0), true_A.mean(0)
    turn = Rotation.align_vectors(true_A - middle[1], moved_A - middle[0])[0]
    return turn.apply(moved_A - middle[0]) + middle[1]


def read_both(path: Path, num_frames: int, num_atoms: int) -> np.ndarray:
    """(f, na, 3) of an ensemble that gemmi and biotite read alike."""
    structure = gemmi.read_structure(str(path))
    names = [[(cra.chain.name, str(cra.residue.seqid), cra.atom.name) for cra in one.all()] for one in structure]
    assert len(names) == num_frames and all(one == names[0] for one in names) and len(names[0]) == num_atoms
    first = np.array([[cra.atom.pos.tolist() for cra in one.all()] for one in structure])
    second = pdbx.get_structure(pdbx.CIFFile.read(path), altloc="all")
    assert second.coord.shape == first.shape and np.abs(second.coord - first).max() < 1e-3
    assert list(second.atom_name) == [name for _, _, name in names[0]]
    return first


def compare_states(folder: Path, phantom: Phantom, atoms: AtomicModel, rest: Path, rigid: bool) -> None:
    """Carried atoms at the listed states of the truth."""
    flex, truth = FlexModel.load(folder / "train"), np.load(folder.parent / "sim/truth.npz")
    states = truth["states_rad"]
    points = latents_of_states(flex, truth["angles_rad"], states)
    settings = GenerateSettings(atoms=rest, align="density", rigid_residues=rigid)
    out = GenerateFolder(folder / ("rigid" if rigid else "free"))
    generate_series(folder / "train", out.path, settings, folder.parent / "particles", points)
    frames = read_both(out.ensemble("at"), len(states), len(atoms))
    centre_A = Frame.of(read_map(TrainFolder(folder / "train").canonical)).centre_A
    backbone, residues = atoms.is_backbone, pd.read_csv(out.residues("at"))
    known = residues["std_err_A"].to_numpy()[atoms.residue] <= WANTED_A
    print(
        "residues rigid" if rigid else "atom by atom", f": {100 * known[backbone].mean():.1f} % told within", WANTED_A
    )
    for state, angle in zip(frames - centre_A, states, strict=True):
        true_A = phantom.positions_A(angle)[0]
        wrong_A = superposed(state[backbone], true_A[backbone]) - true_A[backbone]
        moved_A = superposed(phantom.atoms_A[backbone], true_A[backbone]) - true_A[backbone]
        numbers = rms(moved_A), rms(wrong_A), rms(wrong_A[known[backbone]]), rms((state - true_A)[backbone])
        print(
            "state {}: moved by {:.2f} A; wrong by {:.2f}, of those {:.2f}; with the pose {:.2f}".format(
                angle, *numbers
            )
        )
    print(pd.read_csv(out.geometry("at")).round(3).to_string(index=False))


def compare_particles(folder: Path, phantom: Phantom, atoms: AtomicModel, rest_A: np.ndarray) -> None:
    """Carried atoms of particles at their own latents, superposed, beside the error that is told."""
    flex, truth = FlexModel.load(folder / "train"), np.load(folder.parent / "sim/truth.npz")
    rows = np.linspace(0, len(flex.latents) - 1, SAMPLED).astype(int)
    ride, backbone = ride_on(flex.mesh, atoms, rest_A), atoms.is_backbone
    moved = [ride.moved_A(one)[backbone] for one in flex.displacements_A(flex.latents[rows]).numpy()]
    true = [phantom.positions_A(one)[0][backbone] for one in truth["angles_rad"][rows]]
    wrong = np.stack([superposed(one, other) - other for one, other in zip(moved, true, strict=True)])
    true = np.stack([superposed(one, phantom.atoms_A[backbone]) for one in true])
    rms_A, std_err_A = residue_motion_A(atoms, ride, MotionFrame.of(flex, "density"))
    of_atom = atoms.residue[backbone]
    print(
        f"particles: move by {rms(true - true.mean(0)):.2f} A (told {np.sqrt((rms_A[of_atom] ** 2).mean()):.2f}), "
        f"wrong by {rms(wrong):.2f} A, told {np.sqrt((std_err_A[of_atom] ** 2).mean()):.2f}; over atoms, correlation "
        f"{np.corrcoef(np.sqrt((wrong**2).sum(2).mean(0)), std_err_A[of_atom])[0, 1]:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--moving", action="append", required=True, metavar="B,G", help="chains that swing together")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--segments", nargs="*", default=(), help="of the mesh, as in mesh.segments; else one")
    parser.add_argument("--range-rad", type=float, default=0.3)
    parser.add_argument("--num-particles", type=int, default=3000)
    parser.add_argument("--pixel-size-A", type=float, default=3.0)
    parser.add_argument("--snr", type=float, default=0.08)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    options.segments, options.name = tuple(options.segments), "segments" if options.segments else "plain"
    options.out.mkdir(parents=True, exist_ok=True)
    atoms = read_atomic_model(options.model)
    phantom = phantom_of(atoms, options.moving, options.range_rad)
    half_A = 32 * options.pixel_size_A  # the simulated maps have their first voxel at zero
    options.model_in_map = options.out / "model.cif"
    write_ensemble(options.model_in_map, atoms, [phantom.atoms_A + half_A], np.zeros(len(atoms.residues)))
    make(options.out, phantom, options)
    folder, rest = options.out / options.name, options.out / options.name / "rest.cif"
    flex, angles = FlexModel.load(folder / "train"), np.load(options.out / "sim/truth.npz")["angles_rad"]
    latents = latents_of_states(flex, angles, np.zeros((1, len(phantom.hinges))))[0]
    rest_A = at_rest_A(flex, atoms, phantom.atoms_A, latents)
    print(f"the canonical map's conformation is {rms(rest_A - phantom.atoms_A):.2f} A from the structure's")
    write_ensemble(rest, replace(atoms, path=rest), [rest_A + half_A], np.zeros(len(atoms.residues)))
    for rigid in (False, True):
        compare_states(folder, phantom, atoms, rest, rigid)
    compare_particles(folder, phantom, atoms, rest_A)


if __name__ == "__main__":
    main()
