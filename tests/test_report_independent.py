"""What the report says of two models that never met: that they agree, that one stands still, that a map flatters."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fake_results import CONFIG, finished_report

from flexlib.records import AgreementRecord
from flexlib.report import independent_pictures, independent_sentences, sections, sentences
from flexlib.report.independent import FscComparison, ValidatedPoint, validated_points
from flexlib.report.morph import Gallery
from flexlib.report.results import Results

NOTHING = Gallery([], None, [])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose halves agree."""
    return finished_report(tmp_path_factory.getbasetemp())


@pytest.fixture
def root(plain: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    shutil.copytree(plain, tmp_path / "run", ignore=shutil.ignore_patterns("report.html"))
    return tmp_path / "run"


def text_of(root: Path) -> str:
    """The section's words on single lines, without its figures."""
    html = str(sections.independent_section(Results(root, CONFIG), NOTHING))
    plain = re.sub(r"<[^>]*>", " ", re.sub(r"<script.*?</script>", " ", html, flags=re.DOTALL))
    return re.sub(r"\s+", " ", plain.replace("&#39;", "'"))


def point_of(root: Path) -> ValidatedPoint:
    (point,) = validated_points(Results(root, CONFIG))
    return point


def change_record(root: Path, **values: object) -> AgreementRecord:
    """Write other values into the record of the validation."""
    path = point_of(root).folder.record
    record = replace(AgreementRecord.read(path), **values)
    record.write(path)
    return record


def change_table(path: Path, **columns: object) -> None:
    """Write other columns into a table."""
    pd.read_csv(path).assign(**columns).to_csv(path, index=False)


def comparison(independent_fsc: list[float], shared: list[float]) -> FscComparison:
    """Of a box of 20 A with shells a twentieth of 1 / A apart."""
    frequency = np.arange(len(shared)) / 20
    curves = {"frequency_1_per_A": frequency, "independent": independent_fsc, "shared": shared}
    return FscComparison("whole map", pd.DataFrame(curves))


def test_halves_that_agree(plain: Path) -> None:
    point, text = point_of(plain), text_of(plain)
    record, shared = point.record, point.shared
    assert shared is not None
    reached = [f"{record.resolutions_A[f'independent{part}_0.143']:.1f} Å" for part in ("", "_moving")]
    for part, value in zip(("Whole map", "Moving part"), reached, strict=True):
        assert f"{part}: the independent half-maps reach {value} at FSC 0.143" in text
    assert text.count("Nothing of the FSC was shared") == 2
    assert "agree: the part that moves moves 6.0 ± 1.0 Å" in text
    assert "6.0 ± 1.0 Å (rms over particles and density), 6 times its error" in text
    assert f"over the whole map it is {record.motion_size_A:.1f} ± {record.motion_error_A:.1f} Å" in text
    assert "In 1 of 2 regions of latent space (100 particles) the error exceeds the motion" in text
    assert "agree on the softest 12 modes, down to a wavelength of 60 Å" in text
    assert "none is too small by more than a factor of 1.1" in text
    assert f"{record.cross_gain:.3g} ± {record.cross_gain_se:.2g} nats per particle more than by a rigid one" in text
    assert "gains 30.1 ± 1.2 on those that were held out" in text
    assert "not confirmed" not in text and "set to rest" not in text and "looks better" not in text
    verdict = sentences.verdict(Results(plain, CONFIG))
    assert verdict.endswith(f"the part that moves moves 6.0 ± 1.0 Å. Their half-maps reach {reached[0]}.")


def test_share_of_the_mask_where_the_motion_is_not_told(plain: Path) -> None:
    point, results = point_of(plain), Results(plain, CONFIG)
    assert results.full_mask is not None
    inside = results.full_mask.data > 0.5
    lower = inside[: len(inside) // 2].sum() / inside.sum()  # where the fake error is the larger
    assert point.untold_share(results.full_mask) == pytest.approx(lower)
    assert f"In {100 * lower:.2g}\xa0% of the mask's volume the error exceeds the motion" in (
        independent_sentences.motion_sentence(point, results.full_mask)
    )


def test_differences_are_of_shells_that_say_something() -> None:
    one = comparison([1.0, 0.95, 0.85, 0.5, 0.1, 0.0], [1.0, 0.5, 0.86, 0.6, 0.12, 0.01])
    assert one.mean_difference == pytest.approx((0.01 + 0.1 + 0.02 + 0.01) / 4)  # not shell 1
    assert one.largest_difference == (pytest.approx(0.1), pytest.approx(20 / 3))
    assert one.flattered
    low = comparison([1.0, 0.95, 0.85, 0.5, 0.1, 0.0], [1.0, 0.95, 0.84, 0.49, 0.09, -0.01])
    assert not low.flattered and low.largest_difference[0] < 0
    assert "nowhere higher, on average 0.010 lower" in independent_sentences.fsc_sentence(low)


@pytest.mark.parametrize(("shells", "flatters"), [(0.012, False), (0.036, True)])
def test_resolution_alone_can_flatter(shells: float, flatters: bool) -> None:
    """A curve that falls 1.2 % or 3.6 % later, in a few of many shells."""
    frequency = np.arange(200.0)
    fall = np.clip((45 - frequency) / 20, 0, 1)
    later = np.interp(frequency / (1 + shells), frequency, fall)
    one = comparison(fall.tolist(), later.tolist())
    assert 0 < one.mean_difference < 0.01 and one.flattered is flatters


def test_a_shared_fsc_that_looks_too_good_is_told(root: Path) -> None:
    path = Results(root, CONFIG).reconstruct_folder.fsc
    table = pd.read_csv(path)
    higher = table["fsc_flex_corrected"] + 0.12 * (table["frequency_1_per_A"] > 0.05)
    change_table(path, fsc_flex_corrected=higher)
    point, text = point_of(root), text_of(root)
    whole, moving = point.comparisons
    assert whole.flattered and not moving.flattered
    largest, at_A = whole.largest_difference
    assert 0.11 < largest < 0.13 and at_A < 20
    assert f"the shared curve lies at most {largest:.3f} higher (at {at_A:.1f} Å)" in text
    assert "looks better than it is (whole map). The half-maps of one model share its errors" in text
    assert text.count("Nothing of the FSC was shared") == 1
    shared_A, own_A = (whole.resolution_A(model, 0.5) for model in ("shared", "independent"))
    assert shared_A is not None and own_A is not None
    assert f"{shared_A:.1f} Å ({own_A - shared_A:.2f} Å better)" in text
    verdict = sentences.verdict(Results(root, CONFIG))
    assert (
        f"trust the independent half-maps (FSC 0.143: {point.record.resolutions_A['independent_0.143']:.1f} Å, not"
        in (verdict)
    )
    assert "that never met" not in verdict


@pytest.mark.parametrize(
    ("at_rest", "named", "said"),
    [
        ([False, True], "The model of half-set 2 was set to rest", "only one half confirms"),
        ([True, True], "The models of both half-sets were set to rest", "neither half confirms"),
    ],
)
def test_a_half_that_stands_still_is_told_plainly(root: Path, at_rest: list[bool], named: str, said: str) -> None:
    change_record(root, at_rest=at_rest, num_modes_agreeing=0, mode_limit_A=None)
    text = text_of(root)
    assert named in text and f"{said} is not confirmed" in text
    assert "How much of the FSC was shared?" in text and "Does each model predict" in text
    for left_out in ("How well is the motion known?", "resolution of the motion", "standard errors hold?"):
        assert left_out not in text
    alone = "models of both half-sets alone stand" if all(at_rest) else "model of half-set 2 alone stands"
    assert f"The motion is not confirmed: the {alone} still." in sentences.verdict(Results(root, CONFIG))


def test_rigid_particles_warn_of_nothing(root: Path) -> None:
    change_record(root, at_rest=[True, True], motion_size_A=0.0, motion_error_A=0.0, moving_size_A=None)
    verdict = sentences.verdict(Results(root, CONFIG))
    assert "find no motion either" in verdict and "not confirmed" not in verdict


def test_a_cross_gain_within_two_errors_confirms_nothing(root: Path) -> None:
    change_record(root, cross_gain=0.19, cross_gain_se=0.1)
    wanted = "The motion is not confirmed: each half-set's model gains only 0.19 ± 0.1 nats per particle"
    assert wanted in text_of(root) and wanted in sentences.verdict(Results(root, CONFIG))
    change_record(root, cross_gain=0.21)
    assert "not confirmed" not in text_of(root)
    change_record(root, cross_gain=None, cross_gain_se=None)
    assert "No particle was scored" in text_of(root) and "not confirmed" not in text_of(root)


def test_motion_smaller_than_its_error_is_not_told(root: Path) -> None:
    change_record(root, moving_size_A=2.0, moving_error_A=3.0)
    text = text_of(root)
    assert "How the moving part moves is not told: 2.0 ± 3.0 Å." in text
    assert "The error is as large as the motion: how that part moves is not told." in text


def test_standard_errors_that_are_too_small_are_named(root: Path) -> None:
    change_table(point_of(root).folder.calibration, factor=[1.02, 1.456], coverage=[0.68, 0.41])
    text = text_of(root)
    assert "Standard errors are too small: latent 2 by a factor of 1.46." in text and "41 %" in text


def test_modes_that_never_agree_or_all_do(root: Path) -> None:
    change_record(root, num_modes_agreeing=0, mode_limit_A=None)
    assert "do not agree even on the softest modes" in text_of(root)
    change_record(root, num_modes_agreeing=24, mode_limit_A=36.0)
    assert "agree on all 24 modes of the mesh that were compared, down to a wavelength of 36 Å" in text_of(root)
    change_record(root, num_modes_agreeing=6, mode_limit_A=6e6)
    assert "motions of whole bodies against each other; on no bending" in text_of(root)


def test_not_validated_says_how(root: Path) -> None:
    shutil.rmtree(root / "validate")
    text = text_of(root)
    assert "No sweep point was validated. Take validate: none out of the configuration" in text
    assert "never met" not in text and "never met" not in sentences.verdict(Results(root, CONFIG))


def test_not_reconstructed_has_nothing_to_compare_with(root: Path) -> None:
    shutil.rmtree(root / "reconstruct")
    text = text_of(root)
    assert text.count("there is nothing to compare with") == 2 and "Nothing of the FSC" not in text


FILES = ("fsc", "modes", "regions", "calibration", "motion_error", "motion_size", "map")


@pytest.mark.parametrize("damage", ["gone", "damaged"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_lost_costs_no_more_than_its_part(root: Path, name: str, damage: str) -> None:
    path = getattr(point_of(root).folder, name)
    path.unlink()
    if damage == "damaged":
        path.write_bytes(b"\x00\xff\x00,nonsense\n1")
    text = text_of(root)
    assert "agree: the part that moves moves 6.0 ± 1.0 Å" in text
    assert name == "motion_size" or (path.name in text and "is not there, or cannot be read" in text)


def test_a_damaged_record_is_named(root: Path) -> None:
    path = point_of(root).folder.record
    path.write_text("{")
    text = text_of(root)
    assert f"{path.as_posix()} cannot be read: run the rule validate again." in text
    assert "No sweep point was validated" not in text


def test_every_validated_point_is_shown_the_chosen_one_first(root: Path) -> None:
    results, chosen = Results(root, CONFIG), point_of(root).point
    for seed in range(1, 6):
        other = replace(chosen, seed=seed, rigidity=0.5)
        shutil.copytree(results.run.validate(chosen.path).path, results.run.validate(other.path).path)
    points = validated_points(results)
    assert len(points) == 6 and points[0].point == chosen
    html = str(sections.independent_section(results, NOTHING))
    ids = re.findall(r'<div class="plot" id="([^"]*)"', html)
    assert len(ids) == len(set(ids)) == 4 * 3  # whole map, moving part, modes
    assert html.count("<li>") == 2 and "Further sweep points" in html


def test_error_is_drawn_in_colours(plain: Path) -> None:
    point, results = point_of(plain), Results(plain, CONFIG)
    drawn = independent_pictures.error_pictures(point, results.reconstruction_mask, None)
    assert set(drawn) == {"error", "ratio"} and all(picture[:4] == b"RIFF" for picture in drawn.values())


def test_values_shrink_about_the_centre() -> None:
    values = np.indices((64, 64, 64))[2].astype(np.float32) - 32
    small = independent_pictures._shrunk(values, 40)
    assert small.shape == (40, 40, 40)
    np.testing.assert_allclose(small[3, 5], np.clip((np.arange(40) - 20) * 1.6, -32, 31), atol=1e-4)
