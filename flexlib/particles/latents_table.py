"""The table latents.star as it was written: rows, latents, and where the particles came from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from flexlib.errors import InputError
from flexlib.layout import TrainFolder, find_run
from flexlib.particles.input_rows import latent_columns
from flexlib.particles.star_text import StarText, TextTable, read_star_text
from flexlib.records import PreparedRecord

PROBABILITY = "flexParticleProbability"  # posterior probability that the image shows a particle
OCCUPANCY = "flexOccupancy"  # and the number of a part, from 1: posterior probability that it is there


@dataclass(frozen=True)
class LatentTable:
    """A latents.star: m rows, the (m, K) latents, and the file that prepare read (None where it is not known)."""

    text: StarText
    table: TextTable
    columns: pd.DataFrame  # latents, flexInputRow, and flexUid where there is one
    latents: np.ndarray  # (m, K) float64, nan for particles that prepare dropped
    input_row: np.ndarray  # (m,) int64, 0-based row of the input file
    input_path: Path | None = None
    passthrough: Path | None = None

    def named(self, column: str) -> pd.Series:
        """(m,) values of a column."""
        known = column in self.columns
        return self.columns[column] if known else self.text.frame(self.table, [column], ("rlnImageName",))[column]

    def dimension(self, name: str) -> np.ndarray:
        """(m,) values of a latent dimension (1 to K) or of any numeric column by its name."""
        key = f"flexLatent{name}" if name.isdigit() else name
        if key not in self.table.labels:
            known = ", ".join(latent_columns(self.table.labels))
            raise InputError(f"{self.text.path}: no latent dimension or column {name!r}: there are {known}")
        values = self.named(key)
        if not pd.api.types.is_numeric_dtype(values):
            raise InputError(f"{self.text.path}: column {key} is not numeric")
        return values.to_numpy(np.float64)


def read_latent_table(
    source: str | Path, input_path: str | Path | None = None, passthrough: str | Path | None = None
) -> LatentTable:
    """Open a training folder or a latents.star.

    Parameters
    ----------
    source
        The folder, or the file.
    input_path, passthrough
        The user's particle file, and its passthrough .cs; by default what the run's record of prepare names.

    Raises
    ------
    InputError
        There are no latents, or not as many as the record says.
    """
    source = Path(source)
    path = TrainFolder(source).latents if source.is_dir() else source
    if not path.is_file():
        raise InputError(f"{path}: latents not found")
    text = read_star_text(path)
    table = text.particles
    names = latent_columns(table.labels)
    if not names:
        raise InputError(f"{path}: no latents: column flexLatent1 is missing")
    columns = text.frame(table, (*names, "flexInputRow", "flexUid"))
    latents = columns[names].apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
    rows = columns["flexInputRow"].to_numpy(np.int64) if "flexInputRow" in columns else np.arange(len(columns))
    if input_path is None and (run := find_run(path)) is not None:
        prepared = PreparedRecord.read(run.particles.record)
        input_path, passthrough = prepared.particles, passthrough or prepared.passthrough
        if len(np.unique(rows)) != prepared.num_input:
            raise InputError(
                f"{path}: {len(columns)} rows, but {run.particles.record} names {prepared.num_input} particles"
            )
    return LatentTable(
        text=text,
        table=table,
        columns=columns.assign(flexInputRow=rows),
        latents=latents,
        input_row=rows,
        input_path=None if input_path is None else Path(input_path),
        passthrough=None if passthrough is None else Path(passthrough),
    )
