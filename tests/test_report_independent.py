"""The report's section on two models that never met: its sentences say what the files hold."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from fake_results import write_fake_results
from json_records import agreement_record

from flexlib.report.independent import independent_section, shared_fsc
from flexlib.report.results import Results

FREQUENCY = np.arange(64) / (64 * 2 * 2.5)


def curves(model: str, half_at: float, moving_half_at: float) -> pd.DataFrame:
    """FSC that falls to a half at these shells."""
    shell = np.arange(64)
    falls = {"corrected": half_at, "moving": moving_half_at}
    columns = {f"fsc_{model}_{kind}": 1 / (1 + np.exp((shell - at) / 4)) for kind, at in falls.items()}
    return pd.DataFrame({"shell": shell, "frequency_1_per_A": FREQUENCY, **columns})


def test_what_one_model_shares_between_its_halves_is_told_by_region():
    whole, moving = shared_fsc(curves("independent", 40, 20), curves("flex", 40, 30))
    assert not whole.is_much and "Hardly anything of that was shared" in whole.sentence
    assert moving.is_much and "Trust the independent one" in moving.sentence
    difference = curves("flex", 40, 30)["fsc_flex_moving"] - curves("independent", 40, 20)["fsc_independent_moving"]
    assert moving.largest == pytest.approx(difference.max())
    assert f"{moving.largest:.3f}" in moving.sentence
    own_A, shared_A = moving.half_A[1], moving.half_A[0]
    assert own_A > 1.4 * shared_A and own_A == pytest.approx(1 / FREQUENCY[20], rel=0.05)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("independent")
    write_fake_results(folder, box=32, pixel_size_A=7.0, frames=1)
    return folder


@pytest.fixture
def results(finished, tmp_path) -> Results:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return Results(tmp_path, {}, None)


def test_the_section_gives_the_numbers_of_the_files(results):
    page = str(independent_section(results))
    assert "The part that moves moves by 9 ± 1.5 Å rms" in page and "6 ± 1 Å rms" in page
    assert "along the 12 softest modes of the mesh, down to a wavelength of 120 Å" in page
    assert "Standard errors are too small for latent 2 (1.56 times)" in page
    assert "2.5 Å" in page and "1,200" in page  # of the regions
    assert "predicts the other" in page and "independent-fsc" in page and "independent-modes" in page
    assert "In 50%" not in page and "larger than the motion" in page  # in the lower half of the box


@pytest.mark.parametrize(("at_rest", "said"), [([True, False], "Half-set 1 on its own"), ([True, True], "Neither")])
def test_halves_at_rest_are_told_and_nothing_is_said_of_their_motion(results, at_rest, said):
    replace(agreement_record(0.1, 0.2, 50), at_rest=at_rest).write(results.validate_folder.record)
    page = str(independent_section(results))
    assert said in page and "what half of them cannot repeat" in page
    assert "The part that moves" not in page and "independent-modes" not in page and "too small" not in page


def test_without_validation_it_says_how_to_get_it(results):
    results.validate_folder.record.unlink()
    page = str(independent_section(results))
    assert "validate: {points: best}" in page and "independent-fsc" not in page


def test_files_that_are_missing_leave_the_rest(results):
    folder = results.validate_folder
    for path in (folder.fsc, folder.modes, folder.regions, folder.calibration, folder.motion_error):
        path.unlink()
    assert "The part that moves" in str(independent_section(results))
