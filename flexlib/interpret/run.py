"""The stage interpret: what a trained motion means: bodies and hinges, the landscape and its populations."""

from __future__ import annotations

import time
from pathlib import Path

from flexlib.errors import InputError
from flexlib.interpret.body_files import interpret_bodies
from flexlib.interpret.conformations import write_conformations
from flexlib.layout import InterpretFolder, ParticlesFolder, TrainFolder, ValidateFolder
from flexlib.model.flex_model import FlexModel
from flexlib.records import AgreementRecord, InterpretationRecord
from flexlib.workflow_support.settings import GenerateSettings, InterpretSettings


def interpret(
    particles_dir: str | Path,
    train_dir: str | Path,
    out_dir: str | Path,
    settings: InterpretSettings,
    generate: GenerateSettings,
    latents_star: str | Path,
) -> None:
    """Say what the motion of one sweep point means.

    Writes what ``layout.InterpretFolder`` lists (docs/interpret.md).

    Parameters
    ----------
    particles_dir
        What prepare has written.
    train_dir
        What train has written for one sweep point.
    out_dir
        Folder to write into.
    settings
        ``interpret:``.
    generate
        ``generate:``, for the maps along the path of least free energy.
    latents_star
        The particles' latents with the standard errors to believe: as train has written them, or as validate has
        corrected them.

    Raises
    ------
    InputError
        The files do not belong together.
    """
    began = time.perf_counter()
    particles, train, out = (
        ParticlesFolder(Path(particles_dir)),
        TrainFolder(Path(train_dir)),
        InterpretFolder(Path(out_dir)),
    )
    model = FlexModel.load(train.path)
    if model.latent_covariance is None:
        raise InputError(f"{train.path}: the model is of a training that had not ended: train again")
    validated = Path(latents_star) != train.latents
    agreement = AgreementRecord.read(ValidateFolder(Path(latents_star).parent).record) if validated else None
    bodies = interpret_bodies(model, particles, out, settings, generate.align, agreement)
    conformations = write_conformations(out, (particles, train, Path(latents_star)), model, settings, generate)
    InterpretationRecord(
        wall_s=round(time.perf_counter() - began, 2),
        std_err_from="validate" if validated else "train",
        **bodies,
        **conformations,
    ).write(out.record)
