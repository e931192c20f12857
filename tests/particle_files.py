"""Small particle files and prepared folders for the tests of metadata in and out."""

from dataclasses import replace
from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd
from json_records import prepared_record
from scipy.spatial.transform import Rotation

from flexlib.images.normalisation import Normalisation
from flexlib.imaging.symmetry import symmetry_rotations
from flexlib.layout import ParticlesFolder
from flexlib.particles import read_particles
from flexlib.particles.star_write import write_star
from flexlib.particles.table import OpticsGroup
from flexlib.prepare.writing import write_particles

COUNT, BOX = 12, 16

# As RELION writes, with what a rewrite would lose: padding, exponents, an unknown column, comments, other blocks
STAR_HEAD = """
# version 30001 ; written by hand

data_general

_rlnTilesTotal   12
_comment  'two words'

data_optics

loop_
_rlnOpticsGroup #1
_rlnOpticsGroupName #2
_rlnVoltage #3
_rlnSphericalAberration #4
_rlnAmplitudeContrast #5
_rlnImagePixelSize #6
_rlnImageSize #7
_rlnImageDimensionality #8
           1 opticsGroup1   300.000000     2.700000     0.100000     2.000000           16            2

# version 30001

data_particles

loop_
_rlnImageName #1
_rlnOpticsGroup #2
_rlnAngleRot #3
_rlnAngleTilt #4
_rlnAnglePsi #5
_rlnOriginXAngst #6
_rlnOriginYAngst #7
_rlnDefocusU #8
_rlnDefocusV #9
_rlnDefocusAngle #10
_someoneElses #11
"""
STAR_TAIL = "\ndata_more\n\nloop_\n_what\nleft_alone # with a comment\n"


def star_rows(halves: bool = False) -> list[str]:
    """The text of each particle row."""
    odd = ["1.500000e+00", "-0", "+3.", ".5", "1e4", "abc"]
    rows = []
    for i in range(COUNT):
        image = f"{i // 2 + 1:06d}@Extract/job1/{'ab'[i % 2]}.mrcs"
        pose = f"{10 * i}.00000    {5 + 12 * i}.5 -{i}.250000e+01   {0.25 * i:.6f} -1.000"
        row = f"  {image}   1 {pose} 1.2000{i:02d}e+04 11000.5  4.{i}0 {odd[i % 6]}"
        rows.append(row + (f" {1 + i % 2}" if halves else "") + " ")
    return rows


def write_relion_star(path: Path, halves: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    label = "_rlnRandomSubset #12\n" if halves else ""
    path.write_text(STAR_HEAD + label + "".join(row + "\n" for row in star_rows(halves)) + STAR_TAIL)
    return path


def write_stacks(root: Path, suffix: str = "mrcs") -> None:
    """Two stacks of noise, as ``write_relion_star`` and ``cs_records`` name them."""
    for number, name in enumerate("ab"):
        path = root / f"Extract/job1/{name}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = np.random.default_rng(number).normal(size=(COUNT // 2, BOX, BOX)).astype(np.float32)
        with mrcfile.new(path, overwrite=True) as file:
            file.set_data(data)
            file.set_image_stack()
            file.voxel_size = 2.0


def cs_records(halves: bool = True) -> np.ndarray:
    """Particles as CryoSPARC stores them, (COUNT,) structured; stacks end in .mrc."""
    rng = np.random.default_rng(5)
    columns = {
        "uid": (rng.permutation(COUNT).astype(np.uint64) * 7919 + 2**60, "<u8", ()),
        "blob/path": ([f">Extract/job1/{'ab'[i % 2]}.mrc" for i in range(COUNT)], "S24", ()),
        "blob/idx": (np.arange(COUNT) // 2, "<u4", ()),
        "blob/shape": (np.full((COUNT, 2), BOX), "<u4", (2,)),
        "blob/psize_A": (np.full(COUNT, 2.0), "<f4", ()),
        "blob/sign": (-np.ones(COUNT), "<f4", ()),
        "ctf/accel_kv": (np.full(COUNT, 300), "<f4", ()),
        "ctf/cs_mm": (np.full(COUNT, 2.7), "<f4", ()),
        "ctf/amp_contrast": (np.full(COUNT, 0.1), "<f4", ()),
        "ctf/df1_A": (rng.uniform(1e4, 2e4, COUNT), "<f4", ()),
        "ctf/df2_A": (rng.uniform(1e4, 2e4, COUNT), "<f4", ()),
        "ctf/df_angle_rad": (rng.uniform(0, 3, COUNT), "<f4", ()),
        "alignments3D/split": (np.arange(COUNT) % 2 if halves else np.zeros(COUNT), "<u4", ()),
        "alignments3D/shift": (rng.normal(size=(COUNT, 2)), "<f4", (2,)),
        "alignments3D/pose": (Rotation.random(COUNT, rng=rng).as_rotvec(), "<f4", (3,)),
        "alignments3D/psize_A": (np.full(COUNT, 2.0), "<f4", ()),
        "vendor/unknown": (rng.normal(size=(COUNT, 4)), "<f8", (4,)),
    }
    records = np.zeros(COUNT, [(name, kind, shape) for name, (_, kind, shape) in columns.items()])
    for name, (values, _, _) in columns.items():
        records[name] = values
    return records


def save_cs(path: Path, records: np.ndarray) -> Path:
    with path.open("wb") as file:
        np.save(file, records)
    return path


def prepared_folder(
    folder: Path,
    particles: Path,
    kept: np.ndarray,
    half_sets: str = "input",
    copies: int = 1,
    passthrough: Path | None = None,
) -> Path:
    """What latents need to know of a folder that prepare wrote: prepared.json and particles.star."""
    rows = np.repeat(kept, copies)
    table = pd.DataFrame(
        {
            "rlnImageName": [f"{i + 1:06d}@train.mrcs" for i in range(len(rows))],
            "rlnAngleRot": np.arange(len(rows)) + 0.125,
            "rlnAngleTilt": np.arange(len(rows)) + 0.25,
            "rlnAnglePsi": np.arange(len(rows)) + 0.5,
            "rlnRandomSubset": 1 + rows % 3 % 2,
            "flexInputRow": rows,
        }
    )
    if copies > 1:
        table["flexSymmetryCopy"] = np.tile(np.arange(copies), len(kept))
    write_star({"particles": table}, folder / "particles.star")
    record = replace(
        prepared_record(len(rows), BOX, BOX),
        particles=str(particles),
        passthrough=passthrough and str(passthrough),
        num_input=COUNT,
        num_particles=len(kept),
        symmetry_copies=copies,
        half_sets=half_sets,
    )
    record.write(folder / "prepared.json")
    return folder


def prepared_poses(
    folder: Path,
    path: Path,
    kept: np.ndarray,
    *,
    symmetry: str = "C1",
    optics: tuple[OpticsGroup, ...] | None = None,
    passthrough: Path | None = None,
    half_sets: str = "input",
) -> Path:
    """What refined poses need of a folder that prepare wrote: prepared.json, and particles.star as prepare has it.

    ``optics`` are those of the training images, of nominally as many Angstrom per pixel as the first has.
    """
    everyone = read_particles(path, passthrough)
    particles, rotations = everyone.subset(kept), symmetry_rotations(symmetry)
    if half_sets == "random":
        particles = replace(particles, half_set=np.arange(len(kept)) % 2)
    optics = particles.optics if optics is None else optics
    as_they_are = Normalisation.none(len(optics), len(particles))
    write_particles(
        ParticlesFolder(folder), particles, optics, rotations, as_they_are, np.zeros(len(particles), np.uint64)
    )
    record = replace(
        prepared_record(len(kept) * len(rotations), BOX, BOX),
        particles=str(path),
        passthrough=passthrough and str(passthrough),
        num_input=len(everyone),
        num_particles=len(kept),
        symmetry=symmetry,
        symmetry_copies=len(rotations),
        half_sets=half_sets,
        train_pixel_size_A=optics[0].pixel_size_A,
    )
    record.write(folder / "prepared.json")
    return folder
