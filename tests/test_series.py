"""Choosing latent points: spellings, axes, clusters, the principal curve, and where there are data."""

from pathlib import Path

import numpy as np
import pytest

from flexlib.errors import InputError
from flexlib.generate.curve import principal_curve
from flexlib.generate.neighbourhood import Neighbourhood
from flexlib.generate.series import axis_latents, line_latents
from flexlib.particles.clusters import cluster_latents
from flexlib.particles.latents_read import read_frame_latents
from flexlib.particles.latents_write import components
from flexlib.workflow_support.series import SeriesRequest, check_series, parse_series, series_files


@pytest.mark.parametrize(
    ("text", "request_", "name"),
    [
        ("axes", SeriesRequest("axes"), "axes"),
        ("curve", SeriesRequest("curve"), "curve"),
        ("kmeans 8", SeriesRequest("kmeans", count=8), "kmeans_8"),
        ("between 12 340", SeriesRequest("between", ends=(12, 340)), "between_12_340"),
        ("between -1,0.5 7", SeriesRequest("between", ends=((-1.0, 0.5), 7)), "between"),
        ("between -1 1.0", SeriesRequest("between", ends=((-1.0,), (1.0,))), "between"),
        ("a/my loop.csv", SeriesRequest("file", path=Path("a/my loop.csv")), "my_loop"),
        ("J9_latents.cs", SeriesRequest("file", path=Path("J9_latents.cs")), "J9_latents"),
    ],
)
def test_spellings(text, request_, name):
    assert parse_series(text) == [request_]
    assert request_.name == name


def test_a_list_makes_several_and_names_its_files():
    requests = parse_series(["axes", "kmeans 3", "loop.star"])
    assert [request.kind for request in requests] == ["axes", "kmeans", "file"]
    assert list(series_files(["axes", "loop.star", "b.npy"])) == [Path("loop.star"), Path("b.npy")]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("axis", "'axis' is not understood; known are axes, curve, kmeans 8"),
        ("kmeans", "'kmeans' is not understood"),
        ("kmeans 0", "'kmeans 0' is not understood"),
        ("between 3", "two particles or points are needed"),
        ("between 0 3", "particles are counted from 1"),
        (f"between 1 {'9' * 5000}", "particles are counted from 1, in up to 15 digits"),
        (f"kmeans {'9' * 5000}", "is not understood"),
        ("between a,b 3", "'a,b' is not a point such as 0.5,-1"),
        ("between nan,1 3", "'nan,1' is not a point"),
        ("between 1,2,3 4,5,6", "between: the point 1,2,3 has 3 of 2 coordinates"),
        ([], "the list is empty"),
        ([3], "3 is not understood"),
    ],
)
def test_mistakes_are_told_before_any_work(value, message):
    with pytest.raises(InputError) as caught:
        check_series(value, [2])
    assert str(caught.value).startswith("generate.series: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_axis_passes_the_origin_in_the_middle_between_percentiles():
    latents = np.random.default_rng(0).uniform([-6, -2], [6, 4], (2000, 2))
    points = axis_latents(latents, 1, 7)
    low, high = np.percentile(latents[:, 1], [2, 98])
    np.testing.assert_allclose(points[[0, 3, 6], 1], [low, 0, high], atol=1e-12)
    np.testing.assert_allclose(np.diff(points[:, 1]), np.repeat([-low / 3, high / 3], 3))
    assert (points[:, 0] == 0).all()
    away = axis_latents(latents + np.array([0, 10]), 0, 7)  # an axis without the origin: its median stands for it
    np.testing.assert_allclose(away[:, 1], np.median(latents[:, 1]) + 10)


def arc(count, angle, noise, seed=0):
    generator = np.random.default_rng(seed)
    place = generator.uniform(-angle / 2, angle / 2, count)
    return np.c_[np.cos(place), np.sin(place)] + noise * generator.standard_normal((count, 2))


def test_principal_curve_follows_a_bent_cloud_in_equal_steps():
    """The truth: an arc of three quarters of a circle of radius 1. Its first principal axis is nowhere near it."""
    curve = principal_curve(arc(3000, 1.5 * np.pi, 0.1), 31)
    assert np.abs(np.linalg.norm(curve, axis=1) - 1).max() < 0.08
    angles = np.sort(np.arctan2(curve[:, 1], curve[:, 0]))
    assert angles[0] == pytest.approx(-0.75 * np.pi, abs=0.2)
    assert angles[-1] == pytest.approx(0.75 * np.pi, abs=0.2)
    steps = np.linalg.norm(np.diff(curve, axis=0), axis=1)
    assert steps.std() < 0.03 * steps.mean()


def test_principal_curve_crosses_a_round_cloud_straight_along_what_moves_most():
    latents = np.random.default_rng(1).standard_normal((3000, 2))
    curve = principal_curve(latents, 11, metric=np.diag([1.0, 9.0]))  # axis 2 moves three times as far
    assert np.abs(curve[:, 0]).max() < 0.3
    np.testing.assert_allclose(np.abs(curve[[0, -1], 1]), 2.05, atol=0.25)
    still = principal_curve(latents, 5, metric=np.zeros((2, 2)))
    assert np.isfinite(still).all()


def test_principal_curve_of_one_dimension_is_its_range():
    latents = np.random.default_rng(2).uniform(-1, 3, (500, 1))
    np.testing.assert_allclose(
        principal_curve(latents, 5)[:, 0], np.linspace(*np.percentile(latents, [2, 98]), 5), atol=0.02
    )


def test_clusters_are_shown_by_a_particle_of_each_in_order():
    generator = np.random.default_rng(3)
    centres = np.array([[0, 0], [5, 0], [10, 0], [10, 5]])
    latents = (centres[:, None] + 0.3 * generator.standard_normal((4, 200, 2))).reshape(-1, 2)

    def shown(of: np.ndarray, count: int = 4) -> np.ndarray:
        return of[cluster_latents(of, count, f"generate.series: kmeans {count}").nearest]

    points = shown(generator.permutation(latents))
    np.testing.assert_allclose(points, centres, atol=0.25)  # the path 0, 1, 2, 3 is the shortest
    assert all((np.abs(latents - point).max(1) < 1e-12).any() for point in points)
    np.testing.assert_array_equal(shown(latents), shown(latents))
    with pytest.raises(InputError, match=r"kmeans 5: 4 particles do not fall into so many clusters"):
        shown(latents[:4], 5)


def test_a_cluster_is_shown_by_one_of_its_own():
    """Also where a neighbour's particle lies nearer to a small cluster's centre."""
    for seed in (321, *range(30)):
        latents = np.random.default_rng(seed).standard_normal((60, 2))
        clusters = cluster_latents(latents, 8, "kmeans 8")
        np.testing.assert_array_equal(clusters.label[clusters.nearest], np.arange(8))
        assert [clusters.size(number) for number in range(8)] == np.bincount(clusters.label).tolist()


def test_line_between_points():
    np.testing.assert_allclose(line_latents(np.array([0.0, 2.0]), np.array([4.0, 0.0]), 3), [[0, 2], [2, 1], [4, 0]])


@pytest.mark.parametrize("dims", [1, 2])
def test_counts_and_gaps(dims):
    """Two clouds with nothing between them: the gap and what lies outside are beyond the data, the clouds are not."""
    generator = np.random.default_rng(4)
    latents = generator.standard_normal((4000, dims))
    latents[:2000, 0] -= 8
    latents[2000:, 0] += 8
    middle = np.zeros((1, dims))
    places = np.concatenate([middle, middle - 8 * np.eye(dims)[:1], middle + 8 * np.eye(dims)[:1], middle + 20])
    near = Neighbourhood(latents)
    assert near.beyond_data(places).tolist() == [True, False, False, True]
    spread = latents.std(0)
    distance = np.sqrt((((latents[None] - places[:, None]) / spread) ** 2).mean(2))
    assert near.num_near(places).tolist() == (distance <= 0.5).sum(1).tolist()
    assert near.beyond_data(latents).mean() < 0.02


def test_few_particles_are_no_mistake():
    near = Neighbourhood(np.array([[0.0], [1.0], [2.0]]))
    assert near.beyond_data(np.array([[1.0], [9.0]])).tolist() == [False, True]
    assert Neighbourhood(np.zeros((4, 2))).num_near(np.zeros((1, 2))).tolist() == [4]


POINTS = np.array([[0.5, -1.0], [0.25, 2.0], [0.0, 3.5]])


@pytest.mark.parametrize("kind", ["csv", "named.csv", "txt", "npy", "star", "cs"])
def test_points_of_a_file(tmp_path, kind):
    path = tmp_path / f"points.{kind}"
    rows = "\n".join(",".join(map(str, point)) for point in POINTS)
    if kind == "npy":
        np.save(path, POINTS)
    elif kind == "cs":
        components(np.arange(3, dtype=np.uint64), POINTS).write(path)
    elif kind == "star":
        labels = "data_\n\nloop_\n_flexLatent2 #1\n_flexLatent1 #2\n"
        path.write_text(labels + "\n".join(f"{b} {a}" for a, b in POINTS) + "\n")
    else:
        head = {"csv": "# from nowhere\n", "named.csv": "z1,z2\n", "txt": ""}[kind]
        path.write_text(head + (rows.replace(",", " ") if kind == "txt" else rows) + "\n")
    np.testing.assert_allclose(read_frame_latents(path), POINTS)


def test_points_that_are_no_numbers_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("1,2\n3,nan\n")
    with pytest.raises(InputError, match=r"a\.csv: no points of latent space: row 2 is not finite"):
        read_frame_latents(tmp_path / "a.csv")
    (tmp_path / "b.star").write_text("data_\n\nloop_\n_rlnAngleRot #1\n1.0\n")
    with pytest.raises(InputError, match=r"b\.star: no latents: column flexLatent1 is missing"):
        read_frame_latents(tmp_path / "b.star")
    for digits in (30, 400, 5000):  # more than float64 has, but for the first
        (tmp_path / "c.star").write_text(f"data_\nloop_\n_flexLatent1\n_flexLatent2\n0.5 {'9' * digits}\n1 2\n")
        if digits == 30:
            assert read_frame_latents(tmp_path / "c.star").tolist() == [[0.5, 1e30], [1, 2]]
            continue
        with pytest.raises(InputError, match=r"c\.star: no points of latent space: row 1 is not finite"):
            read_frame_latents(tmp_path / "c.star")
    np.save(tmp_path / "d.npy", np.array([[1, 2], [3, np.longdouble("1e4000")]], np.longdouble))
    with pytest.raises(InputError, match=r"d\.npy: no points of latent space: row 2 is not finite"):
        read_frame_latents(tmp_path / "d.npy")
