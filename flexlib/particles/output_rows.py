"""The rows of what is written beside the user's particles: which of the input each one is, and what is added to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from flexlib.particles.input_rows import InputRows, PreparedRows, check_length
from flexlib.particles.read import read_particles
from flexlib.particles.star_write import relion_tables
from flexlib.particles.table import Particles


@dataclass(frozen=True)
class OutputRows:
    """m rows of a STAR file that is written in the order of the input's."""

    prepared: PreparedRows
    where: InputRows
    rows: np.ndarray  # (m,) of the input file
    prepared_row: np.ndarray  # (m,) of the prepared particles, -1 where prepare dropped the particle

    @classmethod
    def of_copies(cls, prepared: PreparedRows) -> OutputRows:
        """A row for each prepared one (with symmetry, each copy), and one for each particle that prepare dropped."""
        where = prepared.input_rows
        dropped = np.setdiff1d(np.arange(where.num_input), where.rows)
        rows = np.concatenate([where.rows, dropped])
        prepared_row = np.concatenate([np.arange(len(where.rows)), np.full(len(dropped), -1)])
        order = np.argsort(rows, kind="stable")
        return cls(prepared, where, rows[order], prepared_row[order])

    @classmethod
    def of_particles(cls, prepared: PreparedRows) -> OutputRows:
        """A row for each particle of the input; of symmetry copies the first stands for all."""
        where = prepared.input_rows
        prepared_row = np.full(where.num_input, -1)
        prepared_row[where.rows[::-1]] = np.arange(len(where.rows))[::-1]
        return cls(prepared, where, np.arange(where.num_input), prepared_row)

    @property
    def expanded(self) -> bool:
        """Whether particles have symmetry copies."""
        return "flexSymmetryCopy" in self.prepared.table

    def columns(self, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The values (n,) of the prepared rows spread over the output's, and what distinguishes copies."""
        columns = {name: _spread(np.asarray(column), self.prepared_row) for name, column in values.items()}
        if not self.expanded:
            return columns
        copy = np.where(self.prepared_row < 0, 0, self.where.copy[self.prepared_row])
        return {"flexInputRow": self.rows, "flexSymmetryCopy": copy} | columns

    def halves(self, labels: Sequence[str]) -> dict[str, np.ndarray]:
        """The half-sets that prepare drew, if it did, under a name that is not among the input's ``labels``."""
        if self.prepared.record.half_sets != "random":
            return {}
        turns = np.arange(len(self.rows)) % 2 + 1
        drawn = self.prepared.table["rlnRandomSubset"].to_numpy(np.int64)[self.prepared_row]
        name = "flexRandomSubset" if "rlnRandomSubset" in labels else "rlnRandomSubset"
        return {name: np.where(self.prepared_row < 0, turns, drawn)}

    def read_input(self) -> Particles:
        """The user's particle file as prepare read it. Raises InputError where it has another length now."""
        record = self.prepared.record
        particles = read_particles(self.where.path, record.passthrough, record.image_root)
        check_length(self.where, len(particles))
        return particles


def _spread(values: np.ndarray, prepared_row: np.ndarray) -> np.ndarray:
    """(m,) the values of the prepared rows, nan where there is none."""
    if (prepared_row >= 0).all():
        return values[prepared_row]
    return np.where(prepared_row < 0, np.nan, values[prepared_row])


def converted_tables(particles: Particles) -> dict[str, pd.DataFrame]:
    """The blocks of a .cs as RELION's tables."""
    blocks = relion_tables(particles)
    if particles.uid is not None:
        blocks["particles"]["flexUid"] = particles.uid
    return blocks
