"""What interpret says of conformations: the landscape and its populations, conditions, and other methods."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes

from flexlib.layout import InterpretFolder
from flexlib.records import InterpretationRecord
from flexlib.report.formats import NONE, number
from flexlib.report.judged import percent
from flexlib.report.markup import render
from flexlib.report.pictures import ACCENT, FLEX, INK, new_figure, png
from flexlib.report.results import Results, record_at, table_at
from flexlib.report.tables import Table

_KNOWN_P = 0.01  # below which a difference is told as one
_ODD_SHARE = 0.1  # of the smaller value, by which two conditions' errors or defocus are told to differ


@dataclass(frozen=True)
class Conformations:
    """The tables of interpret for the chosen sweep point."""

    folder: InterpretFolder

    @classmethod
    def of(cls, results: Results) -> Conformations:
        """Those of a results folder."""
        return cls(results.run.interpret(results.chosen.path if results.chosen else "no-sweep-point"))

    @cached_property
    def record(self) -> InterpretationRecord | None:
        """What interpret came to."""
        return record_at(InterpretationRecord, self.folder.record)

    @cached_property
    def landscape(self) -> pd.DataFrame | None:
        """Density and free energy."""
        return table_at(self.folder.landscape)

    @cached_property
    def populations(self) -> pd.DataFrame | None:
        """Basins and regions."""
        return table_at(self.folder.populations)

    @cached_property
    def path(self) -> pd.DataFrame | None:
        """The path of least free energy."""
        return table_at(self.folder.path_points)

    @cached_property
    def conditions(self) -> pd.DataFrame | None:
        """Populations by condition."""
        return table_at(self.folder.conditions)

    @cached_property
    def embeddings(self) -> pd.DataFrame | None:
        """Agreement with other methods."""
        return table_at(self.folder.embeddings)


def landscape_section(results: Results) -> Markup:
    """Landscape, populations and path; conditions; other methods. Empty where interpret has not run."""
    found = Conformations.of(results)
    record = found.record
    if record is None:
        return Markup("")
    shown: dict[str, Any] = {
        "landscape": None,
        "populations": None,
        "conditions": None,
        "embeddings": None,
        "errors_from": record.std_err_from,
    }
    if found.landscape is not None:
        shown["landscape"] = landscape_picture(found.landscape, found.path)
        shown["landscape_sentence"] = landscape_sentence(found, record)
    if found.populations is not None:
        shown["populations"] = population_table(found.populations)
        shown["lists"] = bool((found.populations["kind"] == "list").any())
    if found.path is not None:
        shown["path_sentence"] = path_sentence(found.path)
    if found.conditions is not None and record.condition_p_value is not None:
        shown["conditions"] = condition_table(found.conditions)
        shown["condition_sentence"] = condition_sentence(record)
        shown["cautions"] = cautions(found.conditions)
    if found.embeddings is not None:
        shown["embeddings"] = embedding_table(found.embeddings)
    return render("landscape", **shown)


# pictures ---------------------------------------------------------------------------------------------------------


def landscape_picture(landscape: pd.DataFrame, path: pd.DataFrame | None) -> bytes:
    """Free energy and its error: of one latent a curve with a band, of two latents two maps with the path."""
    if "latent_2" not in landscape:
        return _curve(landscape)
    figure = new_figure(9.6, 4.1)
    grid = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, column, label in zip(
        grid, ("free_energy_kT", "free_energy_se_kT"), ("free energy (kT)", "its standard error (kT)"), strict=True
    ):
        x, y, values = _raster(landscape, column)
        mesh = axes.pcolormesh(x, y, values, cmap="viridis" if axes is grid[0] else "magma", shading="nearest")
        figure.colorbar(mesh, ax=axes, shrink=0.85, label=label)
        _add_path(axes, path)
        axes.set_xlabel("latent 1")
    grid[0].set_ylabel("latent 2")
    return png(figure, 120)


def _curve(landscape: pd.DataFrame) -> bytes:
    figure = new_figure(6.4, 3.2)
    axes = figure.add_subplot()
    x, value, error = (landscape[name] for name in ("latent_1", "free_energy_kT", "free_energy_se_kT"))
    axes.fill_between(x, value - 2 * error, value + 2 * error, color=FLEX, alpha=0.25, linewidth=0)
    axes.plot(x, value, color=FLEX)
    axes.set_xlabel("latent 1")
    axes.set_ylabel("free energy (kT)")
    return png(figure, 120)


def _raster(landscape: pd.DataFrame, column: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions along either axis and (y, x) values; nan where there are none."""
    values = landscape[column].to_numpy(float)
    known = landscape[np.isfinite(values)] if np.isfinite(values).any() else landscape
    wide = known.pivot_table(index="latent_2", columns="latent_1", values=column, dropna=False)
    return wide.columns.to_numpy(float), wide.index.to_numpy(float), wide.to_numpy(float)


def _add_path(axes: Axes, path: pd.DataFrame | None) -> None:
    if path is None or "latent_2" not in path:
        return
    axes.plot(path["latent_1"], path["latent_2"], color="white", linewidth=3)
    axes.plot(path["latent_1"], path["latent_2"], color=ACCENT, linewidth=1.6)
    axes.plot(path["latent_1"].iloc[[0, -1]], path["latent_2"].iloc[[0, -1]], "o", color=ACCENT, mec=INK, ms=5)


# sentences and tables ----------------------------------------------------------------------------------------------


def landscape_sentence(found: Conformations, record: InterpretationRecord) -> str:
    """How many basins there are, of how many particles."""
    basins = "one basin: no barrier within it is confirmed"
    if record.num_basins > 1:
        basins = f"{record.num_basins} basins, parted by barriers of more than five standard errors"
    width = ", ".join(number(value, 2) for value in record.landscape_width)
    return (
        f"The landscape of {record.landscape_particles:,} particles has {basins}. It tells apart what differs by some "
        f"{width} along the latents shown; finer detail these particles do not prove."
    )


def path_sentence(path: pd.DataFrame) -> str:
    """How high the path of least free energy climbs."""
    if "free_energy_kT" not in path:
        return ""
    length = f"The path of least free energy is {number(path['motion_A'].iloc[-1], 2)} Å of motion (rms) long"
    energy, error = path["free_energy_kT"], path["free_energy_se_kT"]
    if energy.isna().any():
        return f"{length}; there are too few particles on part of it to tell how high it climbs."
    top = int(energy.argmax())
    start = float(max(energy.iloc[0], energy.iloc[-1]))
    height = f"{float(energy.iloc[top]) - start:.1f} ± {float(error.iloc[top]):.1f} kT"
    return f"{length} and climbs {height} above the higher of its ends."


def population_table(populations: pd.DataFrame) -> Table:
    """Shares with their 95 % intervals."""
    latents = [name for name in populations if str(name).startswith("latent_")]
    rows = [
        (
            str(row["name"]),
            str(row["kind"]),
            percent(row["share"], row["share_se"]),
            f"{100 * row['low']:.1f} to {100 * row['high']:.1f} %",
            f"{100 * row['counted']:.1f} %",
            ", ".join(number(row[name], 2) for name in latents),
        )
        for _, row in populations.iterrows()
    ]
    return Table(("", "what it is", "share", "95 % interval", "by latents alone", "mean latents"), rows)


def condition_table(conditions: pd.DataFrame) -> Table:
    """Populations of each condition, and what else may differ."""
    basins = sorted(name for name in conditions if str(name).startswith("basin_") and not str(name).endswith("_se"))
    rows = [
        (
            str(row["condition"]),
            number(row["particles"], 7),
            *(percent(row[name], row[f"{name}_se"]) for name in basins),
            number(row["std_err_rms"]),
            percent(row["junk_share"]),
            number(row["defocus_um"]),
        )
        for _, row in conditions.astype({"condition": str}).iterrows()
    ]
    head = ("condition", "particles", *(name.replace("_", " ") for name in basins))
    return Table((*head, "latents' standard error", "junk", "defocus (µm)"), rows)


def condition_sentence(record: InterpretationRecord) -> str:
    """Whether the conditions differ."""
    assert record.condition_p_value is not None
    p_value, unit = record.condition_p_value, "whole micrographs" if record.condition_by_micrograph else "particles"
    verdict = "The conditions differ" if p_value < _KNOWN_P else "The conditions are not shown to differ"
    sentence = f"{verdict} (p = {p_value:.2g}, conditions dealt out anew to {unit})."
    if record.condition_pairs:
        pairs = "; ".join(f"{pair}: p = {value:.2g}" for pair, value in record.condition_pairs.items())
        sentence += f" Each two, not corrected for their number: {pairs}."
    if record.condition_unassigned:
        sentence += f" {record.condition_unassigned:,} particles are of no condition."
    return sentence


def cautions(conditions: pd.DataFrame) -> list[str]:
    """What else differs between the conditions, and could be behind a difference."""
    names = {"std_err_rms": "standard errors of the latents", "defocus_um": "defocus"}
    found = []
    for column, name in names.items():
        values = conditions[column].dropna()
        if len(values) > 1 and values.min() > 0 and values.max() > (1 + _ODD_SHARE) * values.min():
            found.append(f"{name} ({number(values.min())} to {number(values.max())})")
    if np.ptp(conditions["junk_share"]) > _ODD_SHARE / 2:
        found.append(
            f"share of junk ({percent(conditions['junk_share'].min())} to {percent(conditions['junk_share'].max())})"
        )
    return found


def embedding_table(embeddings: pd.DataFrame) -> Table:
    """Neighbours kept, and how much of each latent is explained."""
    latents = [name for name in embeddings if str(name).startswith("r2_") and not str(name).endswith("_se")]
    rows = [
        (
            str(row["embedding"]),
            f"{percent(row['kept'], row['kept_se'])}",
            percent(row["chance"]),
            *(f"{row[name]:.2f} ± {row[f'{name}_se']:.2f}" if pd.notna(row[name]) else NONE for name in latents),
        )
        for _, row in embeddings.iterrows()
    ]
    head = ("embedding", "neighbours kept", "by chance")
    return Table((*head, *(f"R² of latent {name.rsplit('_', 1)[1]}" for name in latents)), rows)
