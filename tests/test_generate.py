"""Series of maps: the files of the stage, their places in space, checkpoints, and the command line."""

import os
import re
from dataclasses import replace
from functools import partial

import meshio
import mrcfile
import numpy as np
import pandas as pd
import pytest
import torch
from json_records import prepared_record
from moving_ball import BOX, PIXEL_SIZE_A, ball, ball_mesh, centre_A, linear_model
from PIL import Image
from scipy import ndimage

from flexlib.errors import InputError
from flexlib.generate.chimerax import chimerax_script
from flexlib.generate.command import main
from flexlib.generate.latents import displacement_metric
from flexlib.generate.run import generate_series, newest_model
from flexlib.imaging.fourier import lowpass_map, sharpen_map
from flexlib.imaging.maps import Map, read_map, write_map
from flexlib.mesh.lattice import bcc_mesh
from flexlib.model.flex_model import FlexModel
from flexlib.model.flow import FlowGenerator
from flexlib.particles.star_write import write_star
from flexlib.render import film as movie
from flexlib.render import surface
from flexlib.workflow_support import settings as all_settings

ORIGIN_A = (7.0, 8.0, 9.0)
NSTART = (-16, -16, -16)

# the model's ball moves as a whole: with its rigid core at rest it would not
GenerateSettings = partial(all_settings.GenerateSettings, align="density")


@pytest.fixture(scope="module", autouse=True)
def small_pictures():
    """Films of small pictures: most of a frame's time is drawing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(movie, "_SIZE_PX", 120)
        patch.setattr(surface, "_SHARP_BOX", 48)
        yield


@pytest.fixture(scope="module")
def mesh():
    return ball_mesh()


@pytest.fixture(scope="module")
def latents():
    """A disc with a hole: nobody at the origin."""
    generator = np.random.default_rng(5)
    angle, radius = generator.uniform(0, 2 * np.pi, 600), generator.uniform(3, 7, 600)
    return np.c_[radius * np.cos(angle), radius * np.sin(angle)]


@pytest.fixture(scope="module")
def train(mesh, latents, tmp_path_factory):
    """A training folder whose map is placed by its header's ORIGIN."""
    folder = tmp_path_factory.mktemp("train")
    canonical = np.where(ball(BOX, 8), 1.0, 0.0)
    model = linear_model(mesh, canonical, latents)
    model.epoch = 12
    model.save(folder / "model.pt")
    write_map(folder / "canonical.mrc", canonical, PIXEL_SIZE_A, like=Map(canonical, PIXEL_SIZE_A, ORIGIN_A))
    return folder


@pytest.fixture(scope="module")
def series(train, tmp_path_factory):
    """The stage's output by default, with fewer frames."""
    out = tmp_path_factory.mktemp("out")
    generate_series(train, out, GenerateSettings(frames=4))
    return out


def test_axes_are_the_default(series, latents):
    assert sorted(path.name for path in series.iterdir()) == sorted(
        [*(f"axis_{axis}{end}" for axis in (1, 2) for end in ("", ".cxc", ".webp")), "series.csv"]
    )
    table = pd.read_csv(series / "series.csv")
    counts = ["num_particles", "beyond_data", "rms_displacement_A", "rigid_core_share"]
    assert list(table.columns) == ["series", "frame", "latent_1", "latent_2", *counts]
    assert len(table) == 10  # four frames an axis became five
    first = table[table.series == "axis_1"]
    low, high = np.percentile(latents[:, 0], [2, 98])
    np.testing.assert_allclose(first.latent_1, [low, low / 2, 0, high / 2, high], atol=1e-5)
    assert (first.latent_2 == 0).all()
    for row in table.itertuples():
        frame = read_map(series / row.series / f"frame_{row.frame:03d}.mrc")
        np.testing.assert_allclose(centre_A(frame.data, PIXEL_SIZE_A), [row.latent_1, row.latent_2, 0], atol=0.02)
        assert row.rms_displacement_A == pytest.approx(np.hypot(row.latent_1, row.latent_2), abs=1e-5)


def test_frames_say_where_there_are_no_particles(series, latents):
    table = pd.read_csv(series / "series.csv").set_index(["series", "frame"])
    assert table.beyond_data.tolist() == [0, 0, 1, 0, 0] * 2  # the hole
    assert table.num_particles.loc["axis_1", 2] == 0
    spread = latents.std(0)
    end = table.loc["axis_1", 4]
    distance = np.sqrt((((latents - [end.latent_1, end.latent_2]) / spread) ** 2).mean(1))
    assert end.num_particles == (distance <= 0.5).sum()
    script = (series / "axis_1.cxc").read_text()
    assert "open axis_1/frame_*.mrc vseries true" in script
    labels = re.findall(r'2dlabels create flex(\d) text "([^"]+)" color "([^"]+)"', script)
    assert len(labels) == 5
    assert labels[2] == ("3", "frame 3 of 5: 0 particles near - BEYOND THE DATA", "red")
    assert labels[4][1:] == (f"frame 5 of 5: {int(end.num_particles)} particles near", "dim gray")
    assert 'text "beyond the data: frames 3"' in script
    assert "vseries play #1 direction oscillate loop true" in script


def test_chimerax_level_encloses_density(series):
    level = float(re.search(r"level (\S+)", (series / "axis_1.cxc").read_text())[1])
    assert 0.2 < level < 1.0  # a ball of density 1


def test_displacement_of_each_frame_is_on_the_mesh(series, mesh):
    table = pd.read_csv(series / "series.csv").set_index(["series", "frame"])
    grid = meshio.read(series / "axis_2" / "frame_004.vtu")
    np.testing.assert_allclose(grid.points, mesh.vertices_A)
    np.testing.assert_array_equal(grid.cells_dict["tetra"], mesh.cells)
    expected = np.broadcast_to([0, table.loc["axis_2", 4].latent_2, 0], mesh.vertices_A.shape)
    np.testing.assert_allclose(grid.point_data["displacement_A"], expected, atol=1e-4)


def test_movie_plays_to_and_fro(series):
    with Image.open(series / "axis_1.webp") as film:
        assert film.n_frames == 8  # 5 there, 3 back
        assert film.info["loop"] == 0
        pictures = []
        for frame in range(5):
            film.seek(frame)
            pictures.append(np.asarray(film.convert("RGB")).astype(int)[: -movie._FOOTER_PX])
    assert pictures[0].shape == pictures[4].shape
    shown = [picture.min(2) < 240 for picture in pictures]
    assert all(1000 < one.sum() < one.size / 2 for one in shown)
    assert (shown[0] != shown[4]).sum() > 300  # it moves

    def redness(picture):
        return (picture[..., 0] - picture[..., 2])[picture.min(2) < 240].mean()

    assert redness(pictures[2]) > 10  # beyond the data
    assert redness(pictures[0]) < -10


@pytest.mark.parametrize(("factor", "placed_by"), [(1, "nstart"), (2, "origin"), (2, "nstart")])
def test_middle_frame_overlays_on_the_map_it_came_from(mesh, latents, tmp_path, placed_by, factor):
    """At the model's box and at twice that: header and centre of mass are the given map's."""
    box, pixel_size_A = BOX * factor, PIXEL_SIZE_A / factor
    density = ndimage.gaussian_filter(ball(box, 5 * factor, (factor, 0, -factor)).astype(np.float32), 0.6 * factor)
    place = {"origin_A": ORIGIN_A} if placed_by == "origin" else {"nstart": tuple(factor * n for n in NSTART)}
    given = Map(density, pixel_size_A, **place)
    write_map(tmp_path / "map.mrc", density, pixel_size_A, like=given)
    model = linear_model(mesh, ball(BOX, 9) * 1.0, latents)
    model.save(tmp_path / "model.pt")
    settings = GenerateSettings(frames=3, series="between -4,0 4,0", volume=tmp_path / "map.mrc")
    generate_series(tmp_path, tmp_path / "out", settings)
    with mrcfile.open(tmp_path / "map.mrc") as one, mrcfile.open(tmp_path / "out/between/frame_001.mrc") as other:
        assert one.data.shape == other.data.shape
        for name in ("cella", "origin", "nxstart", "nystart", "nzstart", "mapc", "mapr", "maps"):
            assert one.header[name] == other.header[name], name
        shift_A = centre_A(other.data, pixel_size_A) - centre_A(one.data, pixel_size_A)
        assert np.abs(shift_A).max() < 0.02 * pixel_size_A
        assert other.data.sum() == pytest.approx(one.data.sum(), rel=1e-4)
    last = read_map(tmp_path / "out/between/frame_002.mrc")
    np.testing.assert_allclose(
        centre_A(last.data, pixel_size_A) - centre_A(density, pixel_size_A), [4, 0, 0], atol=0.05
    )


def test_filters_act_on_the_map(train, tmp_path):
    at = np.zeros((1, 2))
    generate_series(train, tmp_path / "a", GenerateSettings(lowpass_A=20.0, bfactor_A2=-300.0), points=at)
    canonical = read_map(train / "canonical.mrc").data
    expected = lowpass_map(sharpen_map(canonical, PIXEL_SIZE_A, -300.0), PIXEL_SIZE_A, 20.0)
    np.testing.assert_allclose(read_map(tmp_path / "a/at/frame_000.mrc").data, expected, atol=1e-5)
    wave = np.sin(2 * np.pi * 4 * np.arange(BOX) / BOX) * np.ones((BOX,) * 3)
    gain = np.exp(300 / 4 * (4 / (BOX * PIXEL_SIZE_A)) ** 2)
    np.testing.assert_allclose(sharpen_map(wave, PIXEL_SIZE_A, -300.0), gain * wave, atol=1e-5)


def test_parts_are_present_or_absent(mesh, latents, tmp_path, capsys):
    """At any box, moved with the rest; the density of the others stays as it is."""
    left, right = ball(BOX, 4, (-6, 0, 0)), ball(BOX, 3, (6, 0, 0))
    canonical = (ball(BOX, 3) | left | right).astype(np.float32)
    parts = np.zeros((BOX,) * 3, np.uint8)
    parts[:, :, : BOX // 2 - 2], parts[:, :, BOX // 2 + 3 :] = 1, 2
    replace(linear_model(mesh, canonical, latents), parts=parts).save(tmp_path / "model.pt")
    write_map(tmp_path / "canonical.mrc", canonical, PIXEL_SIZE_A)
    fine = np.kron(canonical, np.ones((2, 2, 2))).astype(np.float32)
    fine = np.roll(fine, (-1, -1, -1), (0, 1, 2))  # voxel 2 i lies where voxel i does: the block's corner is its middle
    write_map(tmp_path / "fine.mrc", fine, PIXEL_SIZE_A / 2)
    at = np.array([[0.0, 0.0], [2 * PIXEL_SIZE_A, 0.0]])
    mass = [float((canonical * (parts == part)).sum()) for part in range(3)]
    for occupancy, shown in (("present", (0, 1, 2)), ("absent", (0,)), ([2], (0, 2))):
        expected = canonical * np.isin(parts, shown)
        generate_series(tmp_path, tmp_path / "out", GenerateSettings(occupancy=occupancy), points=at)
        for frame, shift in ((0, 0), (1, 2)):
            found = read_map(tmp_path / f"out/at/frame_{frame:03d}.mrc").data
            np.testing.assert_allclose(found, np.roll(expected, shift, 2), atol=1e-4)
        generate_series(
            tmp_path, tmp_path / "out", GenerateSettings(occupancy=occupancy, volume=tmp_path / "fine.mrc"), points=at
        )
        found = read_map(tmp_path / "out/at/frame_000.mrc").data.sum() / 8
        assert found == pytest.approx(sum(mass[part] for part in shown), rel=0.1)
    arguments = [str(tmp_path), str(tmp_path / "by_hand"), "--at", "0,0", "--align", "density", "--occupancy"]
    assert main([*arguments, "1,2"]) == 0
    np.testing.assert_allclose(read_map(tmp_path / "by_hand/at/frame_000.mrc").data, canonical, atol=1e-4)
    assert main([*arguments, "3"]) == main([*arguments, "some"]) == 1
    messages = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ERROR")]
    assert messages[0].endswith("model.pt: no part 3: there are 1 to 2")
    assert messages[1] == "ERROR --occupancy: 'some' is not present, absent or numbers of parts such as 1,2"


def test_a_model_without_parts_has_none_to_leave_out(train, tmp_path, caplog):
    generate_series(train, tmp_path / "out", GenerateSettings(occupancy="absent"), points=np.zeros((1, 2)))
    assert "model.pt: generate.occupancy: this model has no parts that can be absent: maps are whole" in caplog.text
    whole = read_map(train / "canonical.mrc").data
    np.testing.assert_allclose(read_map(tmp_path / "out/at/frame_000.mrc").data, whole, atol=1e-5)


def test_series_from_a_file_and_its_mistakes(train, tmp_path):
    path = tmp_path / "loop.csv"
    path.write_text("# z1,z2\n0,3\n3,0\n")
    generate_series(train, tmp_path / "out", GenerateSettings(series=str(path)))
    frame = read_map(tmp_path / "out" / "loop" / "frame_001.mrc")
    np.testing.assert_allclose(centre_A(frame.data, PIXEL_SIZE_A), [3, 0, 0], atol=0.02)
    path.write_text("0,3,1\n")
    with pytest.raises(InputError, match=r"loop.csv: 3 numbers a row, the model has 2 latents"):
        generate_series(train, tmp_path / "out", GenerateSettings(series=str(path)))
    with pytest.raises(InputError, match=r"generate.series: nowhere.csv"):
        generate_series(train, tmp_path / "out", GenerateSettings(series="nowhere.csv"))
    path.write_text("0,3\n" * 1001)
    with pytest.raises(InputError, match="1001 rows, each would be a map"):
        generate_series(train, tmp_path / "out", GenerateSettings(series=str(path)))


def test_between_particles_goes_by_rows_of_the_input(train, latents, tmp_path):
    """Prepare dropped every other particle; rows are those of the user's file, from 1."""
    images = [f"{i + 1}@stack.mrcs" for i in range(1200)]
    write_star({"particles": pd.DataFrame({"rlnImageName": images, "rlnAngleRot": 0.0})}, tmp_path / "p.star")
    prepared = pd.DataFrame({"rlnImageName": images[::2], "rlnRandomSubset": 1, "flexInputRow": np.arange(0, 1200, 2)})
    folder = tmp_path / "particles"
    write_star({"particles": prepared}, folder / "particles.star")
    replace(prepared_record(600, BOX, BOX), particles=str(tmp_path / "p.star"), num_input=1200).write(
        folder / "prepared.json"
    )
    settings = GenerateSettings(frames=3, series=["between 3 11", "between 3 1,2"])
    generate_series(train, tmp_path / "out", settings, particles_dir=folder)
    table = pd.read_csv(tmp_path / "out" / "series.csv").groupby("series")[["latent_1", "latent_2"]]
    np.testing.assert_allclose(table.nth(0), [latents[1], latents[1]], atol=1e-5)
    np.testing.assert_allclose(table.nth(1), [(latents[1] + latents[5]) / 2, (latents[1] + [1, 2]) / 2], atol=1e-5)
    for number, message in (
        (4, "particle 4 of .*p.star was left out by prepare"),
        (1201, "particle 1201: .* has 1200"),
    ):
        with pytest.raises(InputError, match=message):
            generate_series(train, tmp_path / "out", GenerateSettings(series=f"between 1 {number}"), folder)
    with pytest.raises(InputError, match="not beside the training: name it"):
        generate_series(train, tmp_path / "out", GenerateSettings(series="between 1 3"))


def test_curve_and_clusters_keep_to_the_particles(train, latents, tmp_path):
    generate_series(train, tmp_path, GenerateSettings(frames=3, series=["curve", "kmeans 4", "kmeans 4"]))
    table = pd.read_csv(tmp_path / "series.csv")
    assert table.series.value_counts(sort=False).to_dict() == {"curve": 3, "kmeans_4": 4, "kmeans_4_2": 4}
    clusters = table[table.series == "kmeans_4"]
    assert (clusters.beyond_data == 0).all()
    radius = np.hypot(clusters.latent_1, clusters.latent_2)
    assert radius.between(2.9, 7.1).all()  # the centres themselves may lie nearer to the hole


def test_metric_is_angstrom_per_latent_step(mesh, latents):
    metric = displacement_metric(linear_model(mesh, ball(BOX, 8) * 1.0, latents), latents)
    np.testing.assert_allclose(metric, np.eye(2), atol=1e-5)  # each latent moves every vertex by an Angstrom


def test_newest_whole_checkpoint_is_used_while_training(train, mesh, latents, tmp_path, caplog):
    with pytest.raises(InputError, match="no model and no checkpoint yet"):
        newest_model(tmp_path)
    model = linear_model(mesh, ball(BOX, 8) * 1.0, latents)
    model.epoch = 3
    model.save(tmp_path / "checkpoints" / "model.pt")
    (tmp_path / "checkpoints" / ".model.99.part.pt").write_bytes(b"half a file")
    consensus = Map(np.zeros((BOX,) * 3, np.float32), PIXEL_SIZE_A, ORIGIN_A)
    write_map(tmp_path / "particles" / "consensus.mrc", consensus.data, PIXEL_SIZE_A, like=consensus)
    prepared_record(len(latents), BOX, BOX).write(tmp_path / "particles" / "prepared.json")
    generate_series(tmp_path, tmp_path / "out", GenerateSettings(), points=np.array([[1.0, 0.0]]))
    assert "training is not finished: this is its checkpoint of epoch 3" in caplog.text
    assert read_map(tmp_path / "out" / "at" / "frame_000.mrc").origin_A == pytest.approx(ORIGIN_A)
    # finished: the model counts, whatever the times say of a copied folder
    model.save(tmp_path / "model.pt")
    os.utime(tmp_path / "model.pt", (1, 1))
    assert newest_model(tmp_path) == tmp_path / "model.pt"
    # a new training in the same folder
    model.epoch = 1
    model.save(tmp_path / "checkpoints" / "model.pt")
    assert newest_model(tmp_path) == tmp_path / "checkpoints" / "model.pt"


def test_command_line_makes_maps_at_points(train, tmp_path, capsys):
    fine = Map(ball(48, 8).astype(np.float32), 2.0, ORIGIN_A)
    write_map(tmp_path / "flex_map.mrc", fine.data, 2.0, like=fine)
    arguments = [str(train), str(tmp_path / "out"), "--volume", str(tmp_path / "flex_map.mrc"), "--align", "density"]
    assert main([*arguments, "--at", "-5,3", "--at", "0,2"]) == 0
    for frame, expected_A in enumerate([(-5, 3, 0), (0, 2, 0)]):
        moved = read_map(tmp_path / "out" / "at" / f"frame_{frame:03d}.mrc")
        assert moved.pixel_size_A == pytest.approx(2.0)
        np.testing.assert_allclose(centre_A(moved.data, 2.0), expected_A, atol=0.02)
    assert main([*arguments, "--at", "1,2,3"]) == 1
    assert main([*arguments, "--series", "axis"]) == 1
    assert main([str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 1
    messages = capsys.readouterr().err.splitlines()
    assert [line for line in messages if line.startswith("ERROR")] == [
        "ERROR --at: 3 numbers a row, the model has 2 latents",
        next(line for line in messages if line.startswith("ERROR generate.series: 'axis' is not understood")),
        f"ERROR {tmp_path}/nowhere: no model and no checkpoint yet: training writes one after its first epoch",
    ]


def test_a_map_of_another_scale_is_refused(train, tmp_path):
    write_map(tmp_path / "small.mrc", np.zeros((16,) * 3, np.float32), 2.0)
    with pytest.raises(InputError, match=r"small.mrc: 32 A wide, the model's box is 96 A"):
        generate_series(train, tmp_path / "out", GenerateSettings(volume=tmp_path / "small.mrc"))
    write_map(tmp_path / "unset.mrc", np.zeros((64,) * 3, np.float32), 0.1)
    with pytest.raises(InputError, match=r"unset.mrc: its pixels of 0.1 A do not fit"):
        generate_series(train, tmp_path / "out", GenerateSettings(volume=tmp_path / "unset.mrc"))


def test_single_frame_script_and_film(tmp_path):
    table = pd.DataFrame({"frame": [0], "num_particles": [3], "beyond_data": [0]})
    assert "perframe" not in chimerax_script("at", table, 0.5)
    volume = ball(BOX, 8).astype(np.float32)
    film = movie.SeriesMovie("at", [volume, volume], 0.5, PIXEL_SIZE_A)
    film.add(volume, movie.FrameNote(np.zeros(2), 3, False))
    film.write(tmp_path / "at.webp")
    with Image.open(tmp_path / "at.webp") as picture:
        assert picture.size[0] == 240


@pytest.fixture(scope="module")
def hinge_train(tmp_path_factory):
    """A lever on a body of two thirds of the density swings with latent 1; latent 2 turns and shifts the whole.

    To first order, the flow being linear: the whole is turned by 0.02 rad at a latent of 1, which makes it larger by
    0.01 A at its edge.
    """
    folder = tmp_path_factory.mktemp("hinge")
    mesh = bcc_mesh(ball(BOX, 13), PIXEL_SIZE_A, 6.0)
    lever = np.clip((mesh.vertices_A[:, 0] - 6) / 6, 0, 1)
    swing = np.cross([0, 0, 1], mesh.vertices_A - [6, 0, 0]) * lever[:, None]
    whole = np.cross([0.0, 0.02, 0], mesh.vertices_A) + np.array([0, 2.0, 0])
    fields = np.stack([0.1 * swing, whole])
    flow = FlowGenerator(torch.from_numpy(fields.astype(np.float32)), 2, 1, 4)
    with torch.no_grad():
        flow.linear.copy_(torch.eye(2))
    canonical = ball(BOX, 11).astype(np.float32)
    canonical[:, np.abs(np.arange(BOX) - BOX // 2) > 4] = 0  # a disc: a ball would turn in itself
    latents = np.random.default_rng(3).normal(0, 1, (400, 2)).astype(np.float32)
    FlexModel(mesh, flow, latents, canonical, BOX, PIXEL_SIZE_A).save(folder / "model.pt")
    return folder


def test_rigid_core_is_at_rest_in_all_that_is_written(hinge_train, tmp_path, caplog):
    """What lies at x < 6 A is one body: it lies still in the maps although the flow moves it by 4 A."""
    caplog.set_level("INFO")
    mesh = FlexModel.load(hinge_train).mesh
    at = np.array([[0.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
    tables = {}
    for align in ("rigid_core", "density"):
        generate_series(hinge_train, tmp_path / align, all_settings.GenerateSettings(align=align), points=at)
        tables[align] = pd.read_csv(tmp_path / align / "series.csv")
    share = tables["rigid_core"].rigid_core_share
    assert share.between(0.5, 0.85).all() and share.nunique() == 1
    assert f"the rigid core is at rest: {100 * share[0]:.0f} % of the density" in caplog.text
    assert tables["density"].rigid_core_share.isna().all()
    assert "rigid_core" not in meshio.read(tmp_path / "density/at/frame_002.vtu").point_data
    grid = meshio.read(tmp_path / "rigid_core/at/frame_002.vtu")
    core = grid.point_data["rigid_core"] > 0.5
    assert (mesh.vertices_A[core, 0] < 9).all() and core[mesh.vertices_A[:, 0] < 3].all()
    assert np.abs(grid.point_data["displacement_A"][core]).max() < 0.3
    np.testing.assert_allclose(
        tables["rigid_core"].rms_displacement_A[2],
        np.sqrt((grid.point_data["displacement_A"] ** 2).sum(1).mean()),
        rtol=1e-3,
    )
    # what turns as a whole does not move at all; the lever does, to its own side
    at_rest, whole, both = (read_map(tmp_path / f"rigid_core/at/frame_{i:03d}.mrc").data for i in range(3))
    assert np.abs(whole - at_rest).sum() < 0.03 * at_rest.sum()
    body, lever = (
        (slice(None), slice(None), slice(0, BOX // 2 - 2)),
        (slice(None), slice(None), slice(BOX // 2 + 4, None)),
    )
    assert np.abs(both - at_rest)[body].sum() < 0.05 * at_rest[body].sum()
    moved = (both[lever] * (np.arange(BOX) - BOX // 2)[:, None]).sum() * PIXEL_SIZE_A / both[lever].sum()
    assert moved > 2
    free = read_map(tmp_path / "density/at/frame_002.mrc").data
    assert np.abs(free - at_rest)[body].sum() > 0.2 * at_rest[body].sum()
