"""Conditions and other embeddings against known truth, and what users may get wrong in naming them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from latent_sets import noise, observed, two_states
from scipy.stats import kstest

from flexlib.errors import InputError
from flexlib.interpret import conditions
from flexlib.interpret.conditions import compare_conditions, read_conditions
from flexlib.interpret.density import estimate_density
from flexlib.interpret.embeddings import compare_embeddings
from flexlib.interpret.landscape import find_basins, make_landscape
from flexlib.interpret.observations import Observations
from flexlib.interpret.populations import basin_populations, region_populations
from flexlib.particles.input_rows import InputRows
from flexlib.particles.listed import listed_particles

STAR = """data_particles

loop_
_rlnImageName #1
_rlnOpticsGroup #2
_rlnMicrographName #3
"""


def mixed(shares: tuple[float, ...], count: int, seed: int, highs: tuple[float, ...] | None = None) -> Observations:
    """So many particles with each of these shares of the left state, one after the other."""
    rng = np.random.default_rng(seed)
    truth = np.concatenate([two_states(count, 1, share, rng) for share in shares])
    errors = np.concatenate([noise(count, 1, rng, 0.3, high) for high in highs or (0.7,) * len(shares)])
    return observed(truth, errors, rng)


def compared(seen: Observations, label: np.ndarray, micrograph: np.ndarray | None = None) -> conditions.Comparison:
    landscape = make_landscape(estimate_density(seen, 20))
    return compare_conditions(seen, label, micrograph, landscape, find_basins(landscape))


@pytest.fixture
def few_permutations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditions, "PERMUTATIONS", 199)
    monkeypatch.setattr(conditions, "_BOOTSTRAPS", 2)


@pytest.mark.usefixtures("few_permutations")
@pytest.mark.parametrize("highs", [(0.7, 0.7), (0.4, 0.9)], ids=["alike", "one known less well"])
def test_p_values_of_equal_conditions_are_uniform(highs: tuple[float, float]):
    found = [compared(mixed((0.7, 0.7), 400, seed, highs), np.repeat([0, 1], 400)).p_value for seed in range(40)]
    assert kstest(found, "uniform").pvalue > 0.01


def test_ten_points_of_population_are_told():
    found = compared(mixed((0.7, 0.6), 5000, 1), np.repeat([0, 1], 5000))
    assert found.p_value < 0.01
    assert sorted(found.share[:, 0]) == pytest.approx([0.6, 0.7], abs=4 * found.std_err.max())
    assert 0.005 < found.std_err.max() < 0.02


@pytest.mark.usefixtures("few_permutations")
def test_particles_of_a_micrograph_are_dealt_out_together():
    """Micrographs that differ among themselves: counting particles as independent finds a difference that is none."""
    p_values = {True: [], False: []}
    for seed in range(20):
        rng = np.random.default_rng(seed)
        shares = np.repeat(rng.choice([0.0, 1.0], 20), 50)
        truth = np.where(rng.random(1000) < shares, -1.0, 1.0)[:, None] + 0.25 * rng.standard_normal((1000, 1))
        seen = observed(truth, noise(1000, 1, rng), rng)
        micrograph = np.repeat(np.arange(20), 50)
        for known in (True, False):
            found = compared(seen, micrograph % 2, micrograph if known else None)
            assert found.by_micrograph is known
            p_values[known].append(found.p_value)
    assert np.mean(np.array(p_values[True]) < 0.05) <= 0.25
    assert np.mean(np.array(p_values[False]) < 0.05) > 0.25  # 0.05 if they were independent


def test_the_one_of_three_that_differs_is_found():
    found = compared(mixed((0.7, 0.7, 0.4), 800, 2), np.repeat([0, 1, 2], 800))
    assert found.p_value < 0.01
    assert found.pairs[0, 1] > 0.01 > max(found.pairs[0, 2], found.pairs[1, 2])


# naming conditions and regions -------------------------------------------------------------------------------------


@pytest.fixture
def where(tmp_path: Path) -> InputRows:
    """Ten particles of two micrographs, of which prepare dropped the first."""
    rows = [f"{row + 1:06d}@a.mrcs {1 + row % 2} mic{row // 5}.mrc" for row in range(10)]
    path = tmp_path / "particles.star"
    path.write_text(STAR + "\n".join(rows) + "\n")
    return InputRows(path, np.arange(1, 10), np.zeros(9, np.int64), 10)


def test_conditions_by_column(where: InputRows):
    found = read_conditions("rlnMicrographName", where, None)
    assert found.names == ["mic0.mrc", "mic1.mrc"]
    assert found.label.tolist() == [0] * 4 + [1] * 5


def test_conditions_by_files(where: InputRows, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "apo.csv").write_text("flexInputRow\n0\n1\n2\n")
    (tmp_path / "holo.star").write_text(STAR + "4@a.mrcs 1 x\n00005@a.mrcs 1 x\n")
    found = read_conditions([tmp_path / "apo.csv", tmp_path / "holo.star"], where, None)
    assert found.label.tolist() == [0, 0, 1, 1, -1, -1, -1, -1, -1]
    assert "5 particles are in none of the files" in caplog.text


@pytest.mark.parametrize(
    ("column", "complaint"),
    [
        ("rlnMicrograph", r"particles.star: no column 'rlnMicrograph'; the nearest are rlnMicrographName"),
        ("rlnImageName", r"column rlnImageName: 40 different values, at most 20 are compared"),
        ("rlnOpticsGroup", r"column rlnOpticsGroup: 1 is the only condition"),
    ],
)
def test_bad_columns_are_named(tmp_path: Path, column: str, complaint: str):
    path = tmp_path / "particles.star"
    path.write_text(STAR + "".join(f"{row + 1}@a.mrcs 1 m\n" for row in range(40)))
    with pytest.raises(InputError, match=complaint):
        read_conditions(column, InputRows(path, np.arange(40), np.zeros(40, np.int64), 40), None)


@pytest.mark.parametrize(
    ("first", "complaint"),
    [
        ("flexInputRow\n3\n", r"holo.csv: 1 of its particles are in .*apo.csv too, the first is row 4 of "),
        ("flexInputRow\n11\n", r"apo.csv: line 2, column flexInputRow: '11' is no particle of "),
        ("row\n3\n", r"apo.csv: the first line must name a column flexInputRow"),
        ("flexInputRow\n0\n", r"apo.csv: none of its particles was kept by prepare"),
        ("uid\n7\n", r"apo.csv: column uid: particles of .* have no uid"),
    ],
)
def test_bad_lists_are_named(where: InputRows, tmp_path: Path, first: str, complaint: str):
    (tmp_path / "apo.csv").write_text(first)
    (tmp_path / "holo.csv").write_text("flexInputRow\n3\n4\n")
    with pytest.raises(InputError, match=complaint):
        read_conditions([tmp_path / "apo.csv", tmp_path / "holo.csv"], where, None)


def test_a_list_that_is_no_region_has_the_share_of_its_particles(tmp_path: Path):
    seen = mixed((0.7,), 3000, 3)
    where = InputRows(tmp_path / "none.star", np.arange(3000), np.zeros(3000, np.int64), 3000)
    rng = np.random.default_rng(0)
    chosen = {"left": np.flatnonzero(seen.latents[:, 0] < 0), "any": rng.permutation(3000)[:900]}
    for name, rows in chosen.items():
        pd.DataFrame({"flexInputRow": rows}).to_csv(tmp_path / f"{name}.csv", index=False)
    landscape = make_landscape(estimate_density(seen))
    left, anywhere = region_populations(landscape, seen, [tmp_path / "left.csv", tmp_path / "any.csv"], where)
    assert (left.kind, anywhere.kind) == ("region", "list")
    assert left.low < 0.7 < left.high
    assert anywhere.share == pytest.approx(0.3)
    assert anywhere.std_err == pytest.approx(np.sqrt(0.3 * 0.7 / 3000), rel=0.01)
    assert listed_particles(tmp_path / "left.csv", where, "x").sum() == len(chosen["left"])


def test_shares_are_of_conformations_not_of_latents():
    """A rare state beside a common one, with large errors: many of its particles lie on the other side."""
    rng = np.random.default_rng(5)
    seen = observed(two_states(6000, 1, 0.9, rng), noise(6000, 1, rng, 0.9, 1.1), rng)
    landscape = make_landscape(estimate_density(seen))
    left = landscape.points[:, 0] < 0
    (whole,) = basin_populations(landscape, np.zeros(len(left), int), seen)
    assert whole.share == pytest.approx(1) and whole.low == pytest.approx(1, abs=1e-6)
    share, drawn = landscape.mass(left)
    naive = (seen.latents[:, 0] < 0).mean()
    assert abs(naive - 0.9) > 0.06
    assert abs(share - 0.9) < min(0.035, 3 * drawn.std())


# other embeddings --------------------------------------------------------------------------------------------------


def test_a_turned_embedding_agrees_and_a_random_one_by_chance():
    rng = np.random.default_rng(0)
    ours = rng.standard_normal((3000, 2))
    turned = ours @ np.array([[0.6, -0.8], [0.8, 0.6]])
    same, random = compare_embeddings(ours, turned), compare_embeddings(ours, rng.standard_normal((3000, 4)))
    assert same.kept > 0.95
    assert same.explained.min() > 0.97
    assert random.kept == pytest.approx(random.chance, abs=4 * random.kept_se)
    assert np.abs(random.explained).max() < 0.15


def test_one_latent_of_two_is_explained():
    rng = np.random.default_rng(1)
    ours = rng.standard_normal((3000, 2))
    half = compare_embeddings(ours, np.stack([np.tanh(ours[:, 0]), rng.standard_normal(3000)], 1)[:, :1])
    assert half.explained[0] > 0.97
    assert half.explained[1] < 0.1
    assert half.chance < half.kept < 0.5
    assert 0 < half.explained_se[0] < 0.02


def test_weights_count(few_permutations: None):
    """Junk with little weight changes no population."""
    seen = mixed((0.7,), 2000, 6)
    junk = mixed((0.0,), 1000, 7)
    both = {name: np.concatenate([getattr(seen, name), getattr(junk, name)]) for name in vars(seen)}
    both |= {"weight": np.repeat([1.0, 0.01], [2000, 1000]), "particle": np.arange(3000), "row": np.arange(3000)}
    landscape = make_landscape(estimate_density(replace(seen, **both), 2))
    assert landscape.mass(landscape.points[:, 0] < 0)[0] == pytest.approx(0.7, abs=0.04)
