"""What stages leave for each other in JSON: one dataclass a file, with its one reader and its one writer.

Plain Python: the workflow reads these too. Files of an older flexlib lack keys that newer ones have; a key that has a
default here takes it, any other is an error that names the file.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from flexlib.errors import InputError
from flexlib.files import read_json, write_json


@dataclass(frozen=True)
class Record:
    """A JSON file with fixed keys."""

    stage: ClassVar[str] = ""  # that writes it

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Read the record at ``path``.

        Raises
        ------
        InputError
            The file is not there, or lacks a key.
        """
        if not Path(path).is_file():
            raise InputError(f"{path}: not found: is this a folder that {cls.stage} has written?")
        try:
            return cls.from_json(read_json(path))
        except (TypeError, KeyError, ValueError) as error:
            raise InputError(f"{path}: not what this version's {cls.stage} writes ({error}): run it again") from error

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """The record with the keys of ``content``; keys that it does not know are passed over."""
        known = {item.name for item in fields(cls)}
        return cls(**{key: value for key, value in content.items() if key in known})

    def to_json(self) -> dict[str, Any]:
        """What ``write`` writes."""
        return asdict(self)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the record, atomically."""
        write_json(path, self.to_json())


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else float(value)


@dataclass(frozen=True)
class OpticsRecord:
    """How the images of one optics group were recorded, and what prepare made of them."""

    name: str
    input_box: int
    input_pixel_size_A: float
    ctf_applied: str  # "" for nothing; see ``particles.table.OpticsGroup``
    side_px: int  # of the real-space crop, in the group's own pixels
    image_scale: float  # what one voxel of the consensus is worth in the images
    background_terms: int = 0  # polynomials of the background that is subtracted: see ``images.normalisation``


@dataclass(frozen=True)
class Finding:
    """A line of the health check."""

    topic: str
    sentence: str
    warning: bool  # something to look at


@dataclass(frozen=True)
class PreparedRecord(Record):
    """``prepared.json``: what prepare read and made. A row is a particle in one of its equivalent poses."""

    stage: ClassVar[str] = "prepare"

    particles: str  # the user's files, absolute
    passthrough: str | None
    image_root: str | None
    consensus: str
    mask: str | None
    num_input: int  # particles in the user's file
    num_particles: int  # kept
    symmetry: str
    symmetry_copies: int
    num_rows: int  # of particles.star: particles times symmetry copies
    half_sets: str  # where they came from: "input" or "random"
    full_box: int  # of the images, brought to a common grid
    full_pixel_size_A: float
    crop_box: int  # for reconstruction
    train_box: int
    train_pixel_size_A: float
    optics_groups: list[OpticsRecord]
    settings: dict[str, Any] = field(default_factory=dict)  # ``prepare:``
    mask_settings: dict[str, Any] = field(default_factory=dict)  # what of ``mesh:`` made the mask
    mask_share: float | None = None  # of the training box's voxels, those where the mask is above 0
    background_radius_A: float = 0.0  # of the circle outside which backgrounds are fitted
    left_out: dict[str, int] = field(default_factory=dict)  # images that cannot be used: how many for each reason
    num_repaired: int = 0  # images of which a few extreme pixels are replaced
    # "num_images" compared with the consensus; the share of them that match it better in their "own_pose" than in
    # another's, and better than its mirror image ("hand")
    match: dict[str, float] = field(default_factory=dict)
    health: list[Finding] = field(default_factory=list)  # of the particle set

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """See ``Record``."""
        groups = [group if is_dataclass(group) else OpticsRecord(**group) for group in content.get("optics_groups", [])]
        health = [Finding(**finding) for finding in content.get("health", [])]
        return super().from_json(content | {"optics_groups": groups, "health": health})


@dataclass(frozen=True)
class MeshRecord(Record):
    """Of the figures in ``mesh_quality.json`` the one that the workflow asks for."""

    stage: ClassVar[str] = "mesh"

    num_vertices: int


@dataclass(frozen=True)
class ValidationRecord(Record):
    """``validation.json``: what a training came to. Gains are in nats per particle, over the rigid model.

    Where nothing was held out gains are nan; ``rejected`` ones are of a model that was set to rest.
    """

    stage: ClassVar[str] = "train"

    validation_gain: float | None
    validation_gain_se: float | None
    validation_particles: int  # held out
    rejected_gain: float | None
    rejected_gain_se: float | None
    suggested_dims: int
    rms_displacement_A: float
    rms_displacement_per_unit_A: list[float]  # of each latent
    motion_share: list[float]  # of all motion, in each principal axis
    mean_strain: float | None
    epochs: int
    band_shell: float
    num_particles: int  # measured images
    num_voxels: int
    num_vertices: int
    num_cells: int
    wall_s: float
    num_rows: int = 0  # particles times symmetry copies
    validation_rows: int = 0  # held out
    held_out_by: str = "image"  # "micrograph": ``held_out_micrographs`` of them were held out whole
    held_out_micrographs: int = 0
    device: str = ""  # that computed it, as ``runtime.describe_device`` says
    # learnt widths of what was refined, None where nothing was: rms angle, shift along an axis, log of the contrast
    pose_rotation_deg: float | None = None
    pose_shift_A: float | None = None
    contrast_sd: float | None = None
    junk_share: float | None = None  # learnt share of images that show no particle; None where none was looked for
    # what view, defocus, shift and pose say of each latent: the fields of ``train.entanglement.Entanglement``
    entanglement: list[dict[str, Any]] = field(default_factory=list)
    # of each part that some particles lack: share of the particles that have it, gain in nats per particle over its
    # being there in all, centre (x, y, z) from the box centre, share of the mass, the mesh's segment where it was named
    occupancy: list[dict[str, Any]] = field(default_factory=list)

    @property
    def gain(self) -> float:
        """``validation_gain``, nan where there is none."""
        return _or_nan(self.validation_gain)

    @property
    def gain_se(self) -> float:
        """``validation_gain_se``, nan where there is none."""
        return _or_nan(self.validation_gain_se)


@dataclass(frozen=True)
class ChoiceRecord(Record):
    """``best_point.json``: the chosen sweep point, and how it compares with the one of the highest score.

    Gains are of the score that ``choose_by`` names.
    """

    stage: ClassVar[str] = "choose"

    cells: int
    latent_dims: int
    rigidity: float
    seed: int
    path: str
    validation_gain: float | None
    validation_gain_se: float | None
    highest_validation_gain: float | None
    highest_validation_gain_path: str
    difference_to_best: float | None
    difference_to_best_se: float | None
    choose_by: str = "held_out"  # ``sweep.choose_by``


@dataclass(frozen=True)
class InputFile:
    """A file that a run reads."""

    path: str  # as the config has it, or would
    used_as: list[str]  # the keys of the config that name it; "images" for a stack that the particles name
    size_bytes: int
    modified_ns: int  # since 1970
    sha256: str | None  # None where the config leaves it out


@dataclass(frozen=True)
class ChecksumsRecord(Record):
    """``checksums.json``: what the user's input files were."""

    stage: ClassVar[str] = "checksum"

    files: list[InputFile]

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """See ``Record``."""
        return cls([InputFile(**file) for file in content["files"]])


@dataclass(frozen=True)
class ResolutionRecord(Record):
    """``resolution.json``: resolutions of the half-maps in Angstrom, and what was derived from them."""

    stage: ClassVar[str] = "reconstruct"

    resolutions_A: dict[str, float]  # by model, part and threshold: "flex_0.143", "rigid_0.5", "flex_moving_0.143"
    moving_rms_displacement: dict[str, float]  # "largest_A", "threshold_A"
    flex_b_factor_A2: float | None
    flex_local_A: dict[str, float]  # percentiles of the local resolution
    converged: dict[str, bool]  # by model and half: "flex_half1"
    device: str = ""  # that computed it, as ``runtime.describe_device`` says
    poses: dict[str, str] = field(default_factory=dict)  # by model: "refined" or "input"
    effective_particles: float | None = None  # sum of the probabilities that rows were weighed by; None: not weighed

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """See ``Record``; resolutions lie at the top level of the file, as ``flex_0.143_A``."""
        own = {item.name for item in fields(cls)}
        found = {key.removesuffix("_A"): value for key, value in content.items() if key not in own}
        return super().from_json(content | {"resolutions_A": found})

    def to_json(self) -> dict[str, Any]:
        """See ``from_json``."""
        content = super().to_json()
        return {f"{key}_A": value for key, value in content.pop("resolutions_A").items()} | content


@dataclass(frozen=True)
class AgreementRecord(Record):
    """``validation.json`` of the stage validate: what two models agree on, one of each half-set, that never met.

    Resolutions in Angstrom are those of the half-maps that each half-set's own model makes, by part and threshold:
    "independent_0.143", "independent_moving_0.143". Sizes of motion are rms over particles and density.
    """

    stage: ClassVar[str] = "validate"

    cross_gain: float | None  # of each half-set's particles by the other's model: nats per particle, over the rigid one
    cross_gain_se: float | None
    cross_particles: int  # scored
    resolutions_A: dict[str, float]
    motion_error_A: float  # of the model of all particles
    motion_size_A: float
    moving_error_A: float | None  # within the part that moves; None where nothing does
    moving_size_A: float | None
    at_rest: list[bool]  # which half-set's model was set to rest, for want of evidence
    num_modes_agreeing: int  # softest modes of the mesh along which the two agree
    mode_limit_A: float | None  # scale in space of the last of them
    latent_coverage: list[float]  # of each latent the share of particles that differ by no more than a standard error
    std_err_factor: list[float]  # of each latent, at least 1, by which its standard errors are too small
    rest_shape_A: float  # rms distance of the two shapes at rest
    converged: dict[str, bool]  # by half-map: "independent_half1"
    wall_s: float
    device: str = ""  # that computed it, as ``runtime.describe_device`` says

    @property
    def gain(self) -> float:
        """``cross_gain``, nan where there is none."""
        return _or_nan(self.cross_gain)

    @property
    def gain_se(self) -> float:
        """``cross_gain_se``, nan where there is none."""
        return _or_nan(self.cross_gain_se)


@dataclass(frozen=True)
class InterpretationRecord(Record):
    """``interpretation.json``: the motion in a few figures."""

    stage: ClassVar[str] = "interpret"

    wall_s: float
    std_err_from: str  # whose standard errors the latents have: "train" or "validate"
    # of the landscape; no particles where there is none, because the model stands still or particles are few
    landscape_particles: int = 0
    landscape_width: list[float] = field(default_factory=list)  # what it resolves, in units of each latent it shows
    num_basins: int = 0
    condition_of: str | None = None  # the column, or "files"; None where no conditions are compared
    condition_p_value: float | None = None
    condition_pairs: dict[str, float] = field(default_factory=dict)  # p value of each two of more than two conditions
    condition_by_micrograph: bool = False  # whether whole micrographs were dealt out
    condition_unassigned: int = 0  # particles of no condition
    num_bodies: int | None = None
    bodies_reason: str = ""  # why there is one body only, where none were looked for or nothing moves
    bodies_explained: float | None = None  # share of the squared motion that is the bodies'
    bodies_motion_A: float | None = None  # rms motion, of the density as one body
    bodies_bend: float | None = None  # squared strain inside the bodies over that of all: 1 where all bends
    hinge_range_deg: list[float] = field(default_factory=list)  # of hinges between bodies that touch, as in hinges.csv
    body_poses: bool = False  # whether particles with the bodies' poses are written
