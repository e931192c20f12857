"""What the report says of landscape, conditions and other methods, and that it warns where it must."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from flexlib.layout import InterpretFolder, RunFolder
from flexlib.records import InterpretationRecord
from flexlib.report.landscape import landscape_section
from flexlib.report.results import Results
from flexlib.workflow_support.points import SweepPoint

POINT = SweepPoint(cells=8, latent_dims=2, rigidity=2.0, seed=0)


@pytest.fixture
def folder(tmp_path: Path) -> InterpretFolder:
    """A run's interpret folder of two latents, with two basins and a path."""
    run = RunFolder(tmp_path)
    run.train(POINT.path).path.mkdir(parents=True)
    out = run.interpret(POINT.path)
    out.path.mkdir(parents=True)
    x, y = (axis.ravel() for axis in np.meshgrid(np.linspace(-2, 2, 9), np.linspace(-2, 2, 9)))
    energy = np.where(np.hypot(x, y) < 2, (x**2 - 1) ** 2 + y**2, np.nan)
    columns = {"latent_1": x, "latent_2": y, "free_energy_kT": energy, "free_energy_se_kT": 0.1 + 0 * energy}
    pd.DataFrame(columns).to_csv(out.landscape, index=False)
    rows = [("basin 1", "basin", 0.7, 0.01, 0.68, 0.72, 0.6, -1.0, 0.0), ("picked (1)", "list", *[0.3] * 5, 1.0, 0.0)]
    names = ["name", "kind", "share", "share_se", "low", "high", "counted", "latent_1", "latent_2"]
    pd.DataFrame(rows, columns=names).to_csv(out.populations, index=False)
    path = pd.DataFrame({"latent_1": [-1.0, 0.0, 1.0], "latent_2": 0.0, "motion_A": [0.0, 2.0, 4.0]})
    path.assign(free_energy_kT=[0.0, 2.5, 0.5], free_energy_se_kT=[0.0, 0.2, 0.1]).to_csv(out.path_points, index=False)
    record(out)
    return out


def record(out: InterpretFolder, **values: object) -> None:
    known = {"wall_s": 1.0, "std_err_from": "train", "landscape_particles": 4000, "landscape_width": [0.25, 0.2]}
    InterpretationRecord(**{**known, "num_basins": 2, **values}).write(out.record)


def text_of(out: InterpretFolder) -> str:
    html = str(landscape_section(Results(out.path.parents[len(Path(POINT.path).parts)], {})))
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html)).replace("\N{NO-BREAK SPACE}", " ").replace("&#39;", "'")


def test_nothing_is_said_where_interpret_has_not_run(tmp_path: Path):
    assert landscape_section(Results(tmp_path, {})) == ""


def test_landscape_is_told_with_its_limits(folder: InterpretFolder):
    text = text_of(folder)
    assert "The landscape of 4,000 particles has 2 basins, parted by barriers" in text
    assert "climbs 2.0 ± 0.2 kT above the higher of its ends" in text
    assert "70 ± 1 %" in text and "68.0 to 72.0 %" in text
    assert "particles that were picked and kept, not the solution" in text
    assert "run validate for errors" in text
    assert "A list that does not mark out a region" in text
    assert "Conditions" not in text and "Other methods" not in text


def test_validated_errors_and_one_basin(folder: InterpretFolder):
    record(folder, std_err_from="validate", num_basins=1)
    text = text_of(folder)
    assert "one basin: no barrier within it is confirmed" in text
    assert "run validate for errors" not in text


def test_path_over_a_gap_has_no_height(folder: InterpretFolder):
    pd.read_csv(folder.path_points).assign(free_energy_kT=[0.0, np.nan, 0.5]).to_csv(folder.path_points, index=False)
    assert "too few particles on part of it to tell how high it climbs" in text_of(folder)


def conditions(folder: InterpretFolder, errors: tuple[float, float]) -> None:
    values = {"condition": ["<apo>", "holo"], "particles": [2000, 3000], "basin_1": [0.7, 0.6], "basin_1_se": 0.01}
    table = pd.DataFrame(values).assign(std_err_rms=errors, junk_share=0.0, defocus_um=1.5)
    table.to_csv(folder.conditions, index=False)


def test_conditions_and_what_else_may_be_behind_them(folder: InterpretFolder):
    conditions(folder, (0.3, 0.3))
    record(folder, condition_of="files", condition_p_value=0.0005, condition_by_micrograph=True)
    text = text_of(folder)
    assert "The conditions differ (p = 0.0005, conditions dealt out anew to whole micrographs)." in text
    assert "&lt;apo&gt; 2000" in text or "&lt;apo&gt; 2,000" in text
    assert "also differ in" not in text
    conditions(folder, (0.3, 0.4))
    record(folder, condition_of="files", condition_p_value=0.4, condition_unassigned=12)
    text = text_of(folder)
    assert "The conditions are not shown to differ (p = 0.4, conditions dealt out anew to particles)." in text
    assert "12 particles are of no condition." in text
    assert "The conditions also differ in standard errors of the latents (0.3 to 0.4)" in text


def test_other_methods(folder: InterpretFolder):
    values = {"embedding": ["z.npy"], "neighbours": [40], "kept": 0.4, "kept_se": 0.01, "chance": 0.01}
    pd.DataFrame(values).assign(r2_latent_1=0.9, r2_latent_1_se=0.01).to_csv(folder.embeddings, index=False)
    text = text_of(folder)
    assert "z.npy 40 ± 1 % 1 % 0.90 ± 0.01" in text


def test_a_model_at_rest_has_no_landscape(folder: InterpretFolder):
    for path in (folder.landscape, folder.populations, folder.path_points):
        path.write_text("latent_1\n")
    record(folder, landscape_particles=0, landscape_width=[], num_basins=0)
    text = text_of(folder)
    assert "There is no landscape" in text and "basins" not in text
