"""The whole config: its top level, and the settings of each stage."""

# ruff: noqa: RUF009 (``setting`` is ``dataclasses.field`` and the user's reference in one)

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flexlib.workflow_support.setting import setting
from flexlib.workflow_support.settings import (
    GenerateSettings,
    InterpretSettings,
    MeshSettings,
    PrepareSettings,
    ReconstructSettings,
    SweepSettings,
    TrainSettings,
    ValidateSettings,
)
from flexlib.workflow_support.simulate_settings import SimulateSettings


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The whole config: its top level, and a section for each stage."""

    name: str = setting(
        ...,
        "Name of the run; everything is written below results/NAME/. Letters, digits, dot, dash, underscore.",
        pattern="^[A-Za-z0-9][A-Za-z0-9._-]*$(?!\\n)",
    )
    particles: Path = setting(..., "Particles with poses and CTF, a RELION (3.0 to 5) .star or a CryoSPARC .cs file.")
    passthrough: Path | None = setting(None, "A CryoSPARC passthrough .cs that carries further columns; joined by uid.")
    image_root: Path | None = setting(
        None,
        "Folder that image paths are relative to; default is the particles file's own folder, then its parents.",
    )
    consensus: Path = setting(..., "The consensus (rigid) refinement's map, MRC.")
    mask: Path | None = setting(
        None,
        "Solvent mask, MRC, of any box and voxel size with the consensus map's centre; made from the consensus when "
        "not given.",
    )
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto",
        "Where training and reconstruction compute, cuda (a GPU, or the run is refused), cpu, or auto (a GPU if there "
        "is one).",
    )
    checksums: Literal["all", "tables"] = setting(
        "all",
        "Which inputs get a SHA-256 for the record of the run, all (image stacks are read once more for it) or tables "
        "(stacks are recorded by size and time of modification only).",
    )
    simulate: SimulateSettings | None = setting(
        None,
        "Demo and tests only; simulate particles of a flexible phantom into the folder that `particles` names.",
    )
    prepare: PrepareSettings = setting(PrepareSettings, "Preparation of the particles.")
    mesh: MeshSettings = setting(MeshSettings, "The tetrahedral mesh and its rigidity.")
    train: TrainSettings = setting(TrainSettings, "Training of flow, latents and canonical map.")
    sweep: SweepSettings = setting(
        SweepSettings,
        "The sweep beyond the product of the lists of mesh.cells, train.latent_dims, train.rigidity and train.seed.",
    )
    generate: GenerateSettings = setting(GenerateSettings, "Series of maps along the latent space.")
    reconstruct: ReconstructSettings = setting(ReconstructSettings, "Half-maps at full resolution.")
    validate: ValidateSettings | Literal["none"] = setting(
        ValidateSettings,
        "Two models, one of each half-set, trained from scratch and compared; neither starts from what "
        "train.latent_init and train.init_from name. validate: none leaves it out. With train.freeze_latents the two "
        "would not be independent: nothing is validated then, and a run that asks for it is refused.",
    )
    interpret: InterpretSettings | Literal["none"] = setting(
        InterpretSettings,
        "What the motion means, bodies and hinges, populations, conditions. interpret: none leaves it out.",
    )


SECTIONS: dict[str, type] = {
    "simulate": SimulateSettings,
    "prepare": PrepareSettings,
    "mesh": MeshSettings,
    "train": TrainSettings,
    "sweep": SweepSettings,
    "generate": GenerateSettings,
    "reconstruct": ReconstructSettings,
    "validate": ValidateSettings,
    "interpret": InterpretSettings,
}
