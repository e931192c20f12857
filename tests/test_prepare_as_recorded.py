"""prepare on particle sets as users have them: background, noise levels, bad pixels, images that stand twice.

A small simulated set of known, falling noise is disturbed in one way at a time. What prepare then makes of it must be
what it makes of the undisturbed set, but for what the disturbance hides: the image's mean and the first shells.
"""

import csv
from dataclasses import replace

import mrcfile
import numpy as np
import pytest
import starfile
import torch

from flexlib.errors import InputError
from flexlib.files import read_json
from flexlib.images.noise import read_noise, sigma_at
from flexlib.images.normalisation import polynomials, subtract_background
from flexlib.images.sources import open_full_images, open_training_images
from flexlib.imaging.fourier import shell_sums
from flexlib.imaging.image_transforms import centred_rfft2
from flexlib.imaging.maps import read_map
from flexlib.layout import ParticlesFolder
from flexlib.particles import read_particles
from flexlib.particles.latents_write import write_latents_star
from flexlib.particles.plausible import implausible_values
from flexlib.prepare.contrast import _of_two_kinds
from flexlib.prepare.run import prepare_particles
from flexlib.prepare.screening import first_twins
from flexlib.projection.op import VoxelTensors, gather_volume, project, view_vertices
from flexlib.simulate.run import simulate_particles
from flexlib.simulate.settings import Simulation
from flexlib.tetra.tetmesh import single_cell_mesh
from flexlib.tetra.voxels import voxelise
from flexlib.workflow_support.settings import PrepareSettings

COUNT, BOX, PIXEL_SIZE_A = 500, 40, 5.6
AXIS = np.linspace(-1, 1, BOX)
Y, X = np.meshgrid(AXIS, AXIS, indexing="ij")


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """Rigid particles in white noise of unit variance, as simulated."""
    folder = tmp_path_factory.mktemp("clean")
    settings = {"phantom": "rigid", "num_particles": COUNT, "box": BOX, "pixel_size_A": PIXEL_SIZE_A, "snr": 0.15}
    simulate_particles(folder, Simulation(**settings, seed=4))
    return folder


def stored(clean):
    with mrcfile.open(clean / "particles.mrcs") as file:
        return file.data.astype(np.float32)


def prepared(clean, folder, images, **settings):
    """Prepare the clean set's particles with other ``images`` in ``folder``/in; returns ``folder``."""
    (folder / "in").mkdir(parents=True)
    with mrcfile.new(folder / "in/particles.mrcs") as file:
        file.set_data(images.astype(np.float32))
        file.set_image_stack()
        file.voxel_size = PIXEL_SIZE_A
    (folder / "in/particles.star").write_text((clean / "particles.star").read_text())
    return prepare_star(clean, folder / "in/particles.star", folder, **settings)


def prepare_star(clean, star, folder, **settings):
    prepare_particles(
        star, clean / "consensus.mrc", folder, mask=clean / "mask.mrc", settings=PrepareSettings(**settings)
    )
    return folder


@pytest.fixture(scope="module")
def undisturbed(clean, tmp_path_factory):
    consensus = read_map(clean / "consensus.mrc")
    axis = np.arange(BOX) - BOX // 2
    radius = np.sqrt(axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[None, None, :] ** 2)
    with mrcfile.new(clean / "mask.mrc") as file:
        file.set_data(np.clip(14 - radius, 0, 1).astype(np.float32))
        file.voxel_size = consensus.pixel_size_A
    return prepared(clean, tmp_path_factory.mktemp("undisturbed"), stored(clean))


def predictions(source, folder):
    volume, mask = (read_map(folder / f"{name}.mrc") for name in ("consensus", "mask"))
    mesh = single_cell_mesh(source.box * source.pixel_size_A)
    voxels = VoxelTensors.from_mesh_voxels(voxelise(mesh, mask.data > 0, source.pixel_size_A))
    batch = source.batch(np.arange(len(source)))
    vertices = view_vertices(
        torch.as_tensor(mesh.vertices_A, dtype=torch.float32), batch.rotation, batch.origin_px, source.pixel_size_A
    )
    spectra = project(gather_volume(volume.data * mask.data, voxels), vertices, voxels, "cubic", 2)
    return batch.images, batch.transfer * spectra


def residual_power(source, folder):
    """(shells,) mean power of the whitened images minus their prediction, and (n, shells) the log-likelihoods."""
    images, predicted = predictions(source, folder)
    pixels = shell_sums(torch.ones(images.shape[1:]), 2, rim=True).numpy()
    residual, raw = (
        shell_sums(spectra.abs().square(), 2, rim=True).numpy() for spectra in (images - predicted, images)
    )
    return residual.mean(0) / pixels, 0.5 * (raw - residual)


RNG = np.random.default_rng(3)
ANGLE = RNG.uniform(0, 2 * np.pi, COUNT)[:, None, None]
CURVATURE = RNG.normal(size=(5, COUNT, 1, 1))
DISTURBANCES = {  # what is done to the images, and the shells whose noise it may raise
    "offset of 0.2": (lambda images: images + 0.2, 1),
    "offset of 3": (lambda images: images + 3.0, 1),
    "mean of a micrograph": (lambda images: 40 * images + 2500, 1),
    "grey levels": (lambda images: images + np.linspace(-2, 2, COUNT)[:, None, None], 1),
    "planes": (lambda images: images + np.cos(ANGLE) * X + np.sin(ANGLE) * Y, 3),
    "paraboloids": (
        lambda images: images + sum(c * p for c, p in zip(CURVATURE, (X, Y, X * X, X * Y, Y * Y), strict=True)),
        3,
    ),
}


@pytest.fixture(scope="module", params=DISTURBANCES)
def disturbed(request, clean, undisturbed, tmp_path_factory):
    disturb, shells = DISTURBANCES[request.param]
    folder = tmp_path_factory.mktemp("disturbed")
    return prepared(clean, folder / "run", disturb(stored(clean))), shells


def test_slow_background_is_no_signal(undisturbed, disturbed):
    folder, shells = disturbed
    (expected,), (sigma,) = (read_noise(path / "noise.csv") for path in (undisturbed, folder))
    records = [read_json(path / "prepared.json")["optics_groups"][0] for path in (undisturbed, folder)]
    assert records[0]["background_terms"] == 0 < records[1]["background_terms"]
    gain = 40 if sigma[-1] > 10 else 1
    np.testing.assert_allclose(sigma[shells:] / gain, expected[shells:], rtol=0.02)
    assert (sigma[:shells] / gain < 6).all(), "no more than the fit's own error is left of the background"
    assert records[1]["image_scale"] / gain == pytest.approx(records[0]["image_scale"], rel=0.01)
    for open_images in (open_training_images, open_full_images):
        before, after = (residual_power(open_images(path), path) for path in (undisturbed, folder))
        np.testing.assert_allclose(after[0], 1.0, atol=0.12)
        np.testing.assert_allclose(after[0][3:], before[0][3:], atol=0.02)
        difference = (after[1] - before[1])[:, shells:].sum(1)
        assert abs(difference.mean()) < 0.5 and difference.std() < 2.0, "of the likelihood's gain by the signal, nats"
        assert before[1].sum(1).mean() > 40


def test_nothing_is_done_to_clean_images(clean, undisturbed):
    """White images of no background, one level and no bad pixels are those that were recorded."""
    record = read_json(undisturbed / "prepared.json")
    assert record["left_out"] == {} and record["num_repaired"] == 0
    table = starfile.read(undisturbed / "particles.star")["particles"]
    assert not {"flexNoiseLevel", "flexPixelReach", "flexGreyLevel"} & set(table.columns)
    (sigma,) = read_noise(undisturbed / "noise.csv")
    np.testing.assert_allclose(sigma[:6], 1.0, atol=0.05)  # in later ones the consensus is not exact
    np.testing.assert_allclose(sigma[12:], 1.0, atol=0.02)
    full = open_full_images(undisturbed)
    spectra = centred_rfft2(torch.from_numpy(stored(clean)[:20]))
    expected = spectra * full._filter_of(np.arange(20), "cpu")
    torch.testing.assert_close(full.whitened(np.arange(20)), expected)


@pytest.mark.parametrize("exponent", [2.5, 4.0])
def test_steep_noise_is_white_in_every_shell(tmp_path, exponent):
    settings = {"phantom": "rigid", "num_particles": COUNT, "box": BOX, "pixel_size_A": PIXEL_SIZE_A, "snr": 0.1}
    simulate_particles(tmp_path / "sim", Simulation(**settings, noise_power_law=exponent))
    prepare_particles(tmp_path / "sim/particles.star", tmp_path / "sim/consensus.mrc", tmp_path / "out")
    (sigma,) = read_noise(tmp_path / "out/noise.csv")
    assert sigma[1] > 8 * sigma[-1]
    power, _ = residual_power(open_training_images(tmp_path / "out"), tmp_path / "out")
    np.testing.assert_allclose(power[1:], 1.0, atol=0.1)


def test_interpolated_noise_has_the_power_of_its_shells():
    """A falling power law, whose shells' means are known: at every pixel, and shell 0 tells of none but itself."""
    box = 48
    from flexlib.imaging.fourier import shell_means
    from flexlib.imaging.image_transforms import plane_radius

    radius = plane_radius(box).numpy()
    true = (1 + (radius / 2.4) ** 2) ** -0.75
    sigma = np.sqrt(shell_means(true**2, 2, rim=True))[None]
    sigma[0, 0] = 50.0
    found = sigma_at(radius, sigma, box)[0]
    inside = (radius > 0) & (radius < box / 2)
    np.testing.assert_allclose(found[inside], true[inside], rtol=0.05)
    assert found[0, 0] == pytest.approx(50.0)


def test_polynomials_are_fitted_outside_the_circle_alone():
    """Any paraboloid vanishes whatever lies inside; odd boxes too."""
    for box, radius in ((32, 10.0), (33, 40.0)):
        axis = np.arange(box, dtype=float)
        y, x = np.meshgrid(axis, axis, indexing="ij")
        outside, basis = polynomials(box, 6, radius)
        np.testing.assert_allclose(basis[outside].T @ basis[outside], np.eye(6), atol=1e-4)
        slow = np.stack([3 + 0.2 * x - 0.1 * y, 7 - 0.01 * x * y + 0.02 * y**2])
        images = slow.astype(np.float32)
        inside = np.setdiff1d(np.arange(box * box), outside)
        images.reshape(2, -1)[:, inside] += 5.0
        subtract_background(images, 6, radius)
        np.testing.assert_allclose(images.reshape(2, -1)[:, inside], 5.0, atol=1e-3)
        np.testing.assert_allclose(images.reshape(2, -1)[:, outside], 0.0, atol=1e-3)


LEVELS = {
    "two sessions": np.where(np.arange(COUNT) < COUNT // 2, 15.0, 1.0),
    "spread": np.exp(0.3 * np.random.default_rng(6).normal(size=COUNT)),
    "one of 500": np.where(np.arange(COUNT) == 7, 40.0, 1.0),
}


@pytest.mark.parametrize("kind", LEVELS)
def test_intensities_that_differ_within_an_optics_group(clean, undisturbed, tmp_path, kind):
    """Signal and noise scaled alike: the prepared images are those of the normalised set, up to one factor."""
    factor = LEVELS[kind]
    folder = prepared(clean, tmp_path / "run", stored(clean) * factor[:, None, None])
    table = starfile.read(folder / "particles.star")["particles"]
    found = table["flexNoiseLevel"].to_numpy() / factor
    np.testing.assert_allclose(found / np.median(found), 1.0, atol=0.09)
    for open_images in (open_training_images, open_full_images):
        before, after = (residual_power(open_images(path), path) for path in (undisturbed, folder))
        np.testing.assert_allclose(after[0], before[0], atol=0.03)
        assert after[1].sum(1).mean() == pytest.approx(before[1].sum(1).mean(), rel=0.02)


def test_noise_that_differs_while_the_signal_does_not(clean, undisturbed, tmp_path):
    """Ice of another thickness: the noise is brought to one level, and each image's scale says what that does."""
    images = stored(clean)
    noisy = np.arange(COUNT) % 2 == 1
    images[noisy] += 1.5 * np.random.default_rng(8).normal(size=images[noisy].shape)
    folder = prepared(clean, tmp_path / "run", images)
    table = starfile.read(folder / "particles.star")["particles"]
    level, scale = table["flexNoiseLevel"].to_numpy(), table["flexScale"].to_numpy()
    assert np.median(level[noisy]) / np.median(level[~noisy]) == pytest.approx(3.25**0.5, rel=0.02)
    np.testing.assert_allclose(level * scale, 1.0, rtol=1e-5)
    images, predicted = predictions(open_training_images(folder), folder)
    fit = [float((images[rows] * predicted[rows].conj()).real.sum() / predicted[rows].abs().square().sum())
           for rows in (torch.as_tensor(noisy), torch.as_tensor(~noisy))]  # fmt: skip
    np.testing.assert_allclose(fit, 1.0, atol=0.04)


@pytest.mark.parametrize("how", ["stack", "images"])
def test_contrast_that_differs_within_an_optics_group(clean, undisturbed, tmp_path, caplog, how):
    """A fifth of the images inverted: in a stack of their own, or anywhere; told, and turned."""
    images = stored(clean)
    dark = np.arange(COUNT) < COUNT // 5 if how == "stack" else np.arange(COUNT) % 5 == 2
    images[dark] *= -1
    (tmp_path / "in").mkdir()
    blocks = starfile.read(clean / "particles.star")
    if how == "stack":
        names = blocks["particles"]["rlnImageName"]
        blocks["particles"]["rlnImageName"] = [
            name.replace("particles.mrcs", "dark.mrcs") if is_dark else name
            for name, is_dark in zip(names, dark, strict=True)
        ]
        with mrcfile.new(tmp_path / "in/dark.mrcs") as file:
            file.set_data(images[dark])
            file.set_image_stack()
    with mrcfile.new(tmp_path / "in/particles.mrcs") as file:
        file.set_data(images)
        file.set_image_stack()
    starfile.write(blocks, tmp_path / "in/particles.star")
    folder = prepare_star(clean, tmp_path / "in/particles.star", tmp_path / "out")
    assert f"{COUNT // 5} of {COUNT} images of optics group opticsGroup1, in 1 stacks, have the opposite" in caplog.text
    table = starfile.read(folder / "particles.star")["particles"]
    np.testing.assert_array_equal(table["flexInputSign"].to_numpy() < 0, dark)
    for open_images in (open_training_images, open_full_images):
        before, after = (open_images(path).batch(np.arange(COUNT)) for path in (undisturbed, folder))
        torch.testing.assert_close(after.images, before.images)
        torch.testing.assert_close(after.transfer, before.transfer)


@pytest.mark.parametrize(("share", "spread", "two"), [(0.2, 1.5, True), (0.5, 1.5, True), (0.0, 2.0, False)])
def test_two_contrasts_leave_few_images_undecided(share, spread, two):
    rng = np.random.default_rng(5)
    size = rng.normal(6, spread, 1000)
    assert _of_two_kinds(np.where(rng.uniform(size=1000) < share, -size, size)) == two
    assert not _of_two_kinds(rng.normal(scale=6, size=1000)), "wrong poses of a strong signal"


def left_out_rows(folder):
    with (folder / "left_out.csv").open() as file:
        return {int(row["input_row"]): (row["image"], row["reason"]) for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def dirty(clean, undisturbed, tmp_path_factory):
    """Every kind of bad image at once; returns the folder."""
    images = stored(clean)
    images[4] = 0.0
    images[11] = 7.5
    images[20, 3, 3] = np.nan
    images[21, 30, 9] = np.inf
    images[33, 18, 22] = 300.0
    images[34, 20, 20] = -1e6
    images[35, :6] = 500.0
    images[60] = images[59]  # a twin, but in another pose: no duplicate
    folder = tmp_path_factory.mktemp("dirty") / "run"
    (folder / "in").mkdir(parents=True)
    with mrcfile.new(folder / "in/particles.mrcs") as file:
        file.set_data(images)
        file.set_image_stack()
    with mrcfile.new(folder / "in/again.mrcs") as file:
        file.set_data(images[100:103])
        file.set_image_stack()
    blocks = starfile.read(clean / "particles.star")
    table = blocks["particles"]
    table.loc[199, :] = table.loc[99]  # the same row twice
    other = table.columns.drop("rlnImageName")
    for copy, row in enumerate((100, 101, 102)):  # the same pixels in two stacks
        table.loc[300 + copy, other] = table.loc[row, other]
        table.loc[300 + copy, "rlnImageName"] = f"{copy + 1:06d}@again.mrcs"
    starfile.write(blocks, folder / "in/particles.star")
    return folder


def test_bad_images_are_told_and_left_out(clean, undisturbed, dirty, caplog):
    prepare_star(clean, dirty / "in/particles.star", dirty)
    rows = left_out_rows(dirty)
    assert {row: reason for row, (_, reason) in rows.items()} == {
        5: "blank", 12: "blank", 21: "not finite", 22: "not finite", 36: "extreme pixels",
        200: "duplicate of row 100", 301: "duplicate of row 101", 302: "duplicate of row 102",
        303: "duplicate of row 103",
    }  # fmt: skip
    assert rows[302][0] == f"000002@{dirty / 'in/again.mrcs'}"
    record = read_json(dirty / "prepared.json")
    assert record["left_out"] == {"not finite": 2, "blank": 2, "extreme pixels": 1, "duplicate": 4}
    assert record["num_repaired"] == 2 and record["num_particles"] == COUNT - 9 and record["num_input"] == COUNT
    told = [line.message for line in caplog.records if "left out" in line.message or "set to the back" in line.message]
    assert len(told) == 5
    assert any("2 images are blank (all pixels equal) and are left out: rows 5, 12" in line for line in told)
    assert any("2 images hold a few extreme pixels" in line and "rows 34, 35" in line for line in told)
    health = {finding["sentence"]: finding["warning"] for finding in record["health"]}
    assert health["2 images had extreme pixels replaced (rows 34, 35)."]
    assert health["4 images are left out: duplicate."]
    with (dirty / "outlying.csv").open() as file:
        outlying = [(int(row["input_row"]), row["what"]) for row in csv.DictReader(file)]
    assert outlying == [(34, "extreme pixels beyond"), (35, "extreme pixels beyond")]
    source = open_training_images(dirty)
    assert len(source) == COUNT - 9
    table = starfile.read(dirty / "particles.star")["particles"]
    assert not set(table["flexInputRow"] + 1) & set(rows)


def test_what_is_left_is_as_if_the_bad_images_had_not_been_there(undisturbed, dirty):
    (expected,), (sigma,) = (read_noise(path / "noise.csv") for path in (undisturbed, dirty))
    np.testing.assert_allclose(sigma, expected, rtol=0.03)
    table = starfile.read(dirty / "particles.star")["particles"]
    rows = table["flexInputRow"].to_numpy()
    hit = np.flatnonzero(np.isin(rows, (33, 34)))
    before, train, full = open_training_images(undisturbed), open_training_images(dirty), open_full_images(dirty)
    for source in (train, full):
        repaired, original = source.whitened(hit), before.whitened(rows[hit])
        difference = (repaired - original).abs().square().mean() / original.abs().square().mean()
        assert float(difference) < 0.05, "one pixel of 1600 differs, by no more than the noise in it"


def test_latents_know_which_rows_were_left_out(dirty, tmp_path):
    count = len(open_training_images(dirty))
    write_latents_star(dirty, np.ones((count, 1)), tmp_path / "latents.star")
    latents = starfile.read(tmp_path / "latents.star")["particles"]["flexLatent1"].to_numpy()
    assert set(np.flatnonzero(np.isnan(latents)) + 1) == set(left_out_rows(dirty))


def test_a_set_of_bad_images_is_refused(clean, undisturbed, tmp_path):
    images = stored(clean)
    images[3:] = 0.0
    images[400] = np.nan
    message = rf"of {COUNT} images 1 hold values that are not finite, {COUNT - 4} are blank .*right stacks\?"
    with pytest.raises(InputError, match=message):
        prepared(clean, tmp_path / "run", images)
    assert not ParticlesFolder(tmp_path / "run").record.exists()


def test_a_half_set_without_good_images_is_refused(clean, undisturbed, tmp_path):
    images = stored(clean)
    halves = starfile.read(clean / "particles.star")["particles"]["rlnRandomSubset"].to_numpy()
    images[halves == 2] = 0.0
    with pytest.raises(InputError, match="half-set 2 has 0 particles that can be used: at least 5 are needed"):
        prepared(clean, tmp_path / "run", images)


def test_images_masked_beforehand_are_no_blank_ones(clean, undisturbed, tmp_path):
    """Zero outside a circle: no noise is seen there, and nothing is proposed from it."""
    inside = np.hypot(X, Y) < 0.8
    folder = prepared(clean, tmp_path / "run", stored(clean) * inside)
    record = read_json(folder / "prepared.json")
    assert record["left_out"] == {} and record["optics_groups"][0]["background_terms"] == 0
    assert "flexNoiseLevel" not in starfile.read(folder / "particles.star")["particles"]
    power, _ = residual_power(open_training_images(folder), folder)
    np.testing.assert_allclose(power, 1.0, atol=0.05)


def test_rows_of_one_image_are_twins_in_one_pose_only():
    """A symmetry expanded elsewhere is kept, also beside a group; the same pose, or one equal by symmetry, is not."""
    from scipy.spatial.transform import Rotation

    turn = Rotation.from_euler("z", 90, degrees=True).as_matrix()
    pose = Rotation.from_rotvec([0.3, -1.0, 0.4]).as_matrix()
    near = Rotation.from_rotvec([0.0, 0.1, 0.0]).as_matrix() @ pose
    rotation = np.stack([pose, pose @ turn, near, pose, pose @ turn])
    digest, usable = np.array([5, 5, 5, 6, 5], np.uint64), np.ones(5, bool)
    none = np.eye(3)[None]
    assert first_twins(rotation, digest, usable, none).tolist() == [-1, -1, 0, -1, 1]
    group = np.stack([np.linalg.matrix_power(turn, power) for power in range(4)])
    assert first_twins(rotation, digest, usable, group).tolist() == [-1, 0, 0, -1, 0]
    usable[0] = False
    assert first_twins(rotation, digest, usable, none).tolist() == [-1, -1, -1, -1, 1]


IMPLAUSIBLE = {
    "defocus in nm": ({"defocus_u_A": 0.1, "defocus_v_A": 0.1}, {}, "defocus, A: a median of 1"),
    "defocus in um": ({"defocus_u_A": 1e-4, "defocus_v_A": 1e-4}, {}, "defocus, A: 0.8"),
    "overfocus": ({"defocus_u_A": -1.0, "defocus_v_A": -1.0}, {}, "defocus, A: -2"),
    "voltage in V": ({}, {"voltage_kV": 3e5}, "voltage, kV: 300000 to 300000 is unusual"),
    "aberration in um": ({}, {"spherical_aberration_mm": 2700.0}, "spherical aberration, mm: 2700 to 2700 is unusual"),
    "contrast in percent": ({}, {"amplitude_contrast": 7.0}, "amplitude contrast: 7 to 7 is unusual"),
}


@pytest.mark.parametrize("kind", IMPLAUSIBLE)
def test_implausible_values_are_told(clean, kind):
    factors, changes, start = IMPLAUSIBLE[kind]
    particles = read_particles(clean / "particles.star")
    assert implausible_values(particles) == []
    optics = tuple(replace(group, **changes) for group in particles.optics)
    scaled = {name: factor * getattr(particles, name) for name, factor in factors.items()}
    (sentence,) = implausible_values(replace(particles, optics=optics, **scaled))
    assert sentence.startswith(start)
