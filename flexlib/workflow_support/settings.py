"""The settings of a run, each in one line: its key, type, default, meaning and limits; a dataclass for each section.

The contract's keys and defaults. The schema of the config and the tables of ``config/README.md`` are made from these
lines (``schema.py``), and a checked config (``checks.py``) becomes these dataclasses again (``make_settings``).
"""

# ruff: noqa: RUF009 (``setting`` is ``dataclasses.field`` and the user's reference in one)

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from flexlib.errors import InputError
from flexlib.workflow_support.setting import Auto, setting

Align = Literal["density", "rigid_core"]
Presence = Literal["present", "absent"]
PointChoice = dict[str, int | float]  # some or all of the swept keys, with a value each
Settings = TypeVar("Settings")


@dataclass(frozen=True)
class PrepareSettings:
    """``prepare:``."""

    crop_box: int | None = setting(
        None,
        "Box for reconstruction, pixels of the finest optics group; null keeps the widest that all images fill.",
        minimum=16,
        multipleOf=2,
    )
    train_box: int = setting(
        128, "Box for training, pixels; images are Fourier-cropped to it.", minimum=16, multipleOf=2
    )
    max_particles: int | None = setting(
        None,
        "Use at most this many particles (a random choice that keeps the half-sets' balance); null uses all.",
        minimum=20,
    )
    min_scale: float | None = setting(None, "Drop particles whose per-particle scale is below this; null keeps all.")
    symmetry: str = setting(
        "C1",
        "Point group of the consensus (Cn, Dn, T, O, I1 to I4, axes as RELION's; I is I2); each particle is used in "
        "all its equivalent poses.",
        pattern="^([Cc][1-9][0-9]*|[Dd][1-9][0-9]*|[Tt]|[Oo]|[Ii][1-4]?)$(?!\\n)",
    )
    resplit: bool = setting(False, "Draw new half-sets instead of keeping the input's.")


@dataclass(frozen=True)
class CellsSettings:
    """The key of ``mesh:`` that is swept; a class of its own so that it comes first, as in the reference."""

    cells: int = setting(
        20, "Coarseness, the number of tetra cells across the box; a list is swept.", swept=True, minimum=1
    )


@dataclass(frozen=True)
class MaskSettings:
    """The keys of ``mesh:`` that make the solvent mask, which prepare does."""

    lowpass_A: float = setting(
        10.0, "Low-pass filter on the consensus before the mask is made, Angstrom.", exclusiveMinimum=0
    )
    threshold: float | Auto = setting("auto", "Density level of the mask, a number, or auto.")
    dilate_A: float = setting(2.0, "Mask dilation, Angstrom.", minimum=0)
    pad_A: float = setting(5.0, "Width of the mask's soft edge, Angstrom.", minimum=0)


@dataclass(frozen=True)
class MeshSettings(MaskSettings, CellsSettings):
    """``mesh:`` with one value of ``cells``."""

    segmentation: Path | None = setting(
        None,
        "Segments of the mask, a Segger .seg, a label map .mrc, or an atomic model (.cif or .pdb, also .gz) that lies "
        "in the consensus; null makes one segment.",
    )
    segments: tuple[str, ...] = setting(
        (),
        "Of an atomic model, the chains and ranges of residues that make segments 1, 2, ..., a list such as [A, 'B,C', "
        "'D:1-200', 'D:201-400,E']; an empty list makes one of each chain.",
        uniqueItems=True,
    )
    connections: str | None = setting(
        None,
        "Which segments are joined, a tree such as 0>3, 0>4, 3>2 (root first; a number alone moves freely); null "
        "joins all that touch.",
    )
    rigid_segments: tuple[int, ...] = setting(
        (), "Segments that hardly deform (rigidity weight 20).", minimum=0, uniqueItems=True
    )
    min_rigidity_weight: float = setting(
        0.5, "Rigidity weight of empty cells (that of the densest is 1).", exclusiveMinimum=0, maximum=1
    )
    stiffen_low_density: bool = setting(False, "Give the weak, outer density a higher rigidity weight.")
    rigidity_weights: Path | None = setting(
        None,
        "Rigidity weights in place of those from the density, a .csv (segment, weight), .npy (one per cell) or .mrc "
        "(a map of weights).",
    )
    custom: Literal["surface"] | Path | None = setting(
        None,
        "Instead of the regular mesh, surface (cells follow the segments' surfaces; needs tetgen) or the path of a "
        "mesh (.vtu, .msh, .vtk, CryoSPARC's flex_mesh .pkl) or closed surface (.stl, .ply).",
    )


@dataclass(frozen=True)
class TrainSettings:
    """``train:`` with one value of each swept key."""

    latent_dims: int = setting(2, "Number of latent dimensions; a list is swept.", swept=True, minimum=1)
    rigidity: float = setting(
        2.0, "Strength of the rigidity prior (3DFlex's lambda); a list is swept.", swept=True, minimum=0
    )
    seed: int = setting(0, "Seed of the random numbers; a list is swept.", swept=True, minimum=0)
    layers: int = setting(6, "Layers of the flow's network.", minimum=1)
    hidden_units: int = setting(64, "Units per hidden layer.", minimum=1)
    epochs: int | Auto = setting("auto", "Passes over the particles, a whole number, or auto.", minimum=1)
    noise_injection: float = setting(
        0.15,
        "Standard deviation of the noise added in training to latents drawn from their posteriors, in units of their "
        "own spread.",
        minimum=0,
    )
    centering: float | Auto = setting(
        "auto",
        "Pull of the latents to their centre; auto keeps them at zero mean and unit spread and needs no tuning, a "
        "number is 3DFlex's penalty on the fourth power (its default is 20).",
        minimum=0,
    )
    latent_init: Literal["spectral", "random"] | Path = setting(
        "spectral",
        "Where latents start, spectral, random, or a file of latents (a latents.star of ours, CryoSPARC's 3D Flex "
        "latents or 3DVA components as .cs, a .npy or .csv with one row a particle).",
    )
    init_from: Path | None = setting(
        None,
        "Start from what was trained before, a folder of a trained sweep point (its flow, map and latents; same mesh, "
        "train_box, dims and network), or a file of latents as for latent_init.",
    )
    freeze_latents: bool = setting(
        False, "Keep the latents as they start, in their own scale; only flow and map are trained."
    )
    refine_poses: bool | Auto = setting(
        "auto",
        "Refine each particle's rotation and shift with its latents. auto does so where the width of their prior, "
        "which is learnt, differs from zero. Where poses are refined, a displacement of the whole molecule is the "
        "pose's and no motion; false takes the input's poses for exact.",
    )
    refine_contrast: bool | Auto = setting(
        "auto",
        "Refine the contrast of each particle in the same way, as a factor of its image; it starts from the input's "
        "scale, where that has one.",
    )
    find_junk: bool = setting(
        True,
        "Learn which images show no particle of the map, such as noise, and particles in a wrong pose: each counts as "
        "far as it is likely to show one. false takes all for particles.",
    )
    occupancy: Literal["none", "auto"] | tuple[int, ...] = setting(
        "none",
        "Parts of the molecule that some particles lack. none takes every particle for complete, a list of the mesh's "
        "segments such as [3] names the parts, at most 4, auto looks for them: check what it finds, for a motion that "
        "the training has missed (too few latent_dims or epochs) may pass for a missing part. Only what the particles "
        "confirm is kept.",
        minimum=0,
        minItems=1,
        uniqueItems=True,
    )
    validation_fraction: float = setting(
        0.05,
        "Share of the particles held out of training to score it, the same ones at every sweep point: by whole "
        "micrographs where the input names them and there are enough.",
        minimum=0,
        exclusiveMaximum=1,
    )
    processes: int = setting(
        1,
        "Processes that share the particles of a training or reconstruction, one on each GPU or on a part of the "
        "CPU's cores, of one machine or of several (docs/workflow.md); changes no result but for rounding.",
        minimum=1,
    )


@dataclass(frozen=True)
class SweepSettings:
    """``sweep:``, which ``points.sweep_points`` reads."""

    exclude: list[PointChoice] = setting(
        [],
        "Points to leave out of the product, a list such as [{cells: 40, latent_dims: 4}]; an entry leaves out all "
        "points that agree with it.",
    )
    points: list[PointChoice] = setting(
        [],
        "Points besides the product, a list such as [{rigidity: 50.0}]; what an entry does not name is the first "
        "value of its list.",
    )
    choose_by: Literal["held_out", "cross"] = setting(
        "held_out",
        "The score that the best point has the highest of, held_out (particles that were held out of its training) or "
        "cross (all particles, each half-set scored by the model of the other). cross validates every point of the "
        "sweep, which takes about the time of its trainings once more.",
    )


@dataclass(frozen=True)
class GenerateSettings:
    """``generate:``; ``series`` is read by ``series.parse_series``."""

    frames: int = setting(
        41,
        "Maps per series; along an axis an even number becomes the next odd one, so that the middle map is at the "
        "origin. Series of clusters and of files have a map for each of theirs.",
        minimum=2,
    )
    series: str | list[str] = setting(
        "axes",
        "Which series. axes (one along each latent dimension), curve (the curve through the middle of the particles), "
        "kmeans 8 (eight clusters), between 12 340 (two particles by their rows in the input file, from 1) or between "
        "-1,0 1,0.5 (two points), or a file of points (.csv, .txt, .npy, .star, .cs). A list makes several.",
        minItems=1,
    )
    volume: Path | None = setting(
        None, "A map to deform instead of the canonical one, MRC, at any box of the same centre."
    )
    atoms: Path | None = setting(
        None,
        "An atomic model that lies in the map that is deformed (.cif or .pdb, also .gz); every series is written of "
        "it too, carried by the motion and not fitted (docs/atoms.md).",
    )
    rigid_residues: bool = setting(
        False, "Move each residue of the atomic model as a rigid body instead of atom by atom."
    )
    align: Align = setting(
        "rigid_core",
        "What is at rest in maps, films and the report. rigid_core (the largest part of the density that moves as one "
        "rigid body stays exactly where it lies in the map that is deformed) or density (the density's mean position "
        "and orientation, the frame of the particles' poses; take it for maps that are to be projected or compared "
        "with images).",
    )
    occupancy: Presence | list[int] = setting(
        "present",
        "Parts that particles may lack in the map that is deformed, present (all are there), absent (none is), or a "
        "list of the numbers of those that are there.",
        minimum=1,
        minItems=1,
        uniqueItems=True,
    )
    lowpass_A: float | None = setting(
        None, "Low-pass filter on the map that is deformed, Angstrom.", exclusiveMinimum=0
    )
    bfactor_A2: float | None = setting(
        None, "B-factor put on the map that is deformed, square Angstrom; negative sharpens."
    )


@dataclass(frozen=True)
class ReconstructSettings:
    """``reconstruct:``; ``points`` is for the workflow to interpret."""

    max_bfgs_iterations: int = setting(20, "Upper limit of L-BFGS iterations per half-map.", minimum=1)
    rigid_baseline: bool = setting(True, "Reconstruct the same particles without motion too.")
    poses: Literal["refined", "input"] = setting(
        "refined",
        "Poses and contrasts of the particles, refined (where training refined them; the rigid map takes those refined "
        "under a rigid map) or input (those of the input file, for both maps).",
    )
    weigh_particles: bool = setting(
        True,
        "Let each image count as the probability that it shows a particle, where training has found these.",
    )
    all_in_ram: bool = setting(
        False,
        "Hold the CTFs and moved mesh vertices of a half-set in memory instead of computing them in every iteration.",
    )
    cache_dir: Path | None = setting(
        None,
        "Folder on fast scratch where the images are copied once while they are read and removed afterwards; without "
        "room there, they are read where they are.",
        written=True,
    )
    points: Literal["best", "all"] | list[PointChoice] = setting(
        "best",
        "Which points of the sweep are reconstructed: best (the simplest within one standard error of the best "
        "held-out score), all, or a list such as [{cells: 20, rigidity: 2.0}].",
        minItems=1,
    )


@dataclass(frozen=True)
class ValidateSettings:
    """``validate:``; ``points`` is for the workflow to interpret."""

    points: Literal["best", "all", "none"] | list[PointChoice] = setting(
        "best",
        "Which points of the sweep are validated: best (the chosen one of those that are reconstructed, which the "
        "report shows), all, none, or a list such as [{cells: 20, rigidity: 2.0}].",
        minItems=1,
    )


@dataclass(frozen=True)
class InterpretSettings:
    """``interpret:``; ``points`` is for the workflow to interpret."""

    bodies: int | Literal["auto"] = setting(
        "auto",
        "Number of quasi-rigid bodies that the motion is divided into, or auto (as many as explain it).",
        minimum=1,
        maximum=12,
    )
    regions: list[Path] = setting(
        [],
        "Lists of particles whose share of all is told with its error, such as the report's lasso saves (.csv with "
        "flexInputRow) or a subset of the input (.star, .cs).",
    )
    conditions: str | list[Path] | None = setting(
        None,
        "What the particles differ in beforehand, a column of the input (such as rlnOpticsGroup or rlnMicrographName), "
        "or a list of files, each with the particles of one condition (.star, .cs, or .csv with flexInputRow).",
    )
    embeddings: list[Path] = setting(
        [],
        "Latents of other methods for the same particles in the same order (.npy, .csv, .txt) or with their uids "
        "(.cs), to be compared with these.",
    )
    points: Literal["reconstructed", "all", "none"] | list[PointChoice] = setting(
        "reconstructed",
        "Which points of the sweep are interpreted, reconstructed (those that are reconstructed), all, none, or a list "
        "such as [{cells: 20, rigidity: 2.0}].",
        minItems=1,
    )


def make_settings(kind: type[Settings], section: Mapping[str, Any]) -> Settings:
    """One section of a checked config as its dataclass: text becomes ``Path`` and lists become tuples where due.

    Raises
    ------
    InputError
        A key that ``kind`` does not have.
    """
    hints = get_type_hints(kind)
    if unknown := sorted(set(section) - set(hints)):
        raise InputError(f"config: {kind.__name__} has no key {unknown[0]!r}")
    return kind(**{key: _typed(value, hints[key]) for key, value in section.items()})


def _typed(value: Any, hint: Any) -> Any:
    kinds = get_args(hint)
    words = [word for kind in kinds for word in get_args(kind)]
    if isinstance(value, str) and Path in kinds and value not in words:
        return Path(value)
    if isinstance(value, list) and Ellipsis in kinds:
        return tuple(value)
    if float in (hint, *kinds) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value
