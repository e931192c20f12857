"""prepare on simulated particles of known noise and scale: what it measures, writes, gives out and refuses."""

import csv

import mrcfile
import numpy as np
import pytest
import starfile
import torch
from scipy.spatial.transform import Rotation

from flexlib.errors import InputError
from flexlib.files import read_json
from flexlib.images.ctf import ctf_images
from flexlib.images.sources import open_full_images, open_training_images
from flexlib.imaging.fourier import fourier_crop_map
from flexlib.imaging.image_transforms import centred_irfft2, centred_rfft2, plane_radius, plane_weight
from flexlib.imaging.maps import Map, read_map, write_map
from flexlib.imaging.masks import make_mask
from flexlib.layout import ParticlesFolder
from flexlib.particles import read_particles
from flexlib.particles.latents_write import write_latents_star
from flexlib.particles.star_write import relion_tables, write_star
from flexlib.particles.table import OpticsGroup, Particles
from flexlib.prepare.fit import smooth_power
from flexlib.prepare.grid import match_grid
from flexlib.prepare.mask import read_mask
from flexlib.prepare.run import prepare_particles
from flexlib.prepare.selection import select_particles
from flexlib.projection.op import VoxelTensors, gather_volume, project, view_vertices
from flexlib.records import PreparedRecord
from flexlib.tetra.tetmesh import single_cell_mesh
from flexlib.tetra.voxels import voxelise
from flexlib.workflow_support.settings import MaskSettings, PrepareSettings

COUNT, BOX, PIXEL_SIZE_A = 700, 48, 3.0
SCALES = (2.5, 0.7)  # of the two optics groups
ALPHA = np.linspace(0.6, 1.4, COUNT)


def noise_sigma(group, radius):
    """True noise spectrum: falling in group 0, rising in group 1."""
    return 3.0 + 6.0 / (1 + (radius / 5) ** 2) if group == 0 else 1.0 + 0.05 * radius


def ball_map():
    """A few Gaussian blobs within 40 % of the box; (z, y, x), no density beyond."""
    axis = (np.arange(BOX) - BOX // 2).astype(np.float32)
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
    rng = np.random.default_rng(0)
    volume = np.zeros((BOX,) * 3, np.float32)
    for centre in rng.uniform(-8, 8, (14, 3)):
        volume += np.exp(-((z - centre[0]) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2) / (2 * 1.5**2))
    return volume


def metadata(folder):
    rng = np.random.default_rng(1)
    group = OpticsGroup("a", 300.0, 2.7, 0.1, PIXEL_SIZE_A, BOX)
    return Particles(
        optics=(group, OpticsGroup("b", 200.0, 2.7, 0.07, PIXEL_SIZE_A, BOX)),
        optics_index=(np.arange(COUNT) % 2).astype(np.int32),
        rotation=Rotation.random(COUNT, rng=rng).as_matrix(),
        origin_A=rng.normal(scale=4, size=(COUNT, 2)),
        defocus_u_A=rng.uniform(8000, 20000, COUNT),
        defocus_v_A=rng.uniform(8000, 20000, COUNT),
        defocus_angle_rad=rng.uniform(0, 3, COUNT),
        phase_shift_rad=np.zeros(COUNT),
        ctf_bfactor_A2=np.zeros(COUNT),
        ctf_scale=np.ones(COUNT),
        half_set=(rng.permutation(COUNT) % 2).astype(np.int8),
        contrast_sign=-np.ones(COUNT),
        stack_paths=(folder / "images.mrcs",),
        stack_index=np.zeros(COUNT, np.int32),
        image_index=rng.permutation(COUNT),
        source_path=folder / "particles.cs",
        source_row=np.arange(COUNT),
        particle_scale=ALPHA,
    )


def rigid_spectra(volume, mask, box, pixel_size_A, rotation, origin_px):
    """sum_j V_j exp(-2 pi i k . p_j / box) by the operator, twofold oversampled."""
    mesh = single_cell_mesh(box * pixel_size_A)
    voxels = VoxelTensors.from_mesh_voxels(voxelise(mesh, mask, pixel_size_A))
    vertices_A = torch.as_tensor(mesh.vertices_A, dtype=torch.float32)
    vertices = view_vertices(vertices_A, rotation, origin_px, pixel_size_A)
    return project(gather_volume(volume, voxels), vertices, voxels, "cubic", 2)


def write_cs(path, particles):
    """The particles as CryoSPARC would store them: dark, with alpha."""
    groups = particles.optics_index
    fields = {
        "uid": np.arange(COUNT, dtype=np.uint64) + 10**18,
        "blob/path": np.full(COUNT, b"images.mrcs"),
        "blob/idx": particles.image_index.astype(np.uint32),
        "blob/shape": np.full((COUNT, 2), BOX, np.uint32),
        "blob/psize_A": np.full(COUNT, PIXEL_SIZE_A),
        "blob/sign": particles.contrast_sign,
        "ctf/exp_group_id": groups.astype(np.uint32),
        "ctf/accel_kv": np.array([300.0, 200.0])[groups],
        "ctf/cs_mm": np.full(COUNT, 2.7),
        "ctf/amp_contrast": np.array([0.1, 0.07])[groups],
        "ctf/df1_A": particles.defocus_u_A,
        "ctf/df2_A": particles.defocus_v_A,
        "ctf/df_angle_rad": particles.defocus_angle_rad,
        "alignments3D/split": particles.half_set.astype(np.uint32),
        "alignments3D/shift": particles.origin_A / PIXEL_SIZE_A,
        "alignments3D/pose": Rotation.from_matrix(particles.rotation.transpose(0, 2, 1)).as_rotvec(),
        "alignments3D/alpha": particles.particle_scale,
    }
    table = np.zeros(COUNT, [(name, values.dtype, values.shape[1:]) for name, values in fields.items()])
    for name, values in fields.items():
        table[name] = values
    with path.open("wb") as file:
        np.save(file, table)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Dark images of known scale and coloured noise, their .cs, consensus and mask; returns the folder."""
    folder = tmp_path_factory.mktemp("data")
    volume, particles = ball_map(), metadata(folder)
    mask = volume > 1e-4
    write_map(folder / "consensus.mrc", volume, PIXEL_SIZE_A, Map(volume, PIXEL_SIZE_A, (5.0, 6.0, 7.0)))
    write_map(folder / "mask.mrc", mask.astype(np.float32), PIXEL_SIZE_A)
    rows = np.arange(COUNT)
    spectra = rigid_spectra(
        volume, mask, BOX, PIXEL_SIZE_A, torch.as_tensor(particles.rotation, dtype=torch.float32),
        torch.as_tensor(particles.origin_A / PIXEL_SIZE_A, dtype=torch.float32),
    )  # fmt: skip
    amplitude = np.array(SCALES)[particles.optics_index] * ALPHA / BOX
    spectra *= (
        ctf_images(particles, rows, BOX, PIXEL_SIZE_A) * torch.as_tensor(amplitude, dtype=torch.float32)[:, None, None]
    )
    noise = centred_rfft2(torch.randn((COUNT, BOX, BOX), generator=torch.Generator().manual_seed(3)))
    radius = plane_radius(BOX)
    noise *= torch.stack([noise_sigma(group, radius) for group in (0, 1)])[particles.optics_index.astype(int)]
    images = -centred_irfft2(spectra + noise).numpy()
    stored = np.empty_like(images)
    stored[particles.image_index] = images
    with mrcfile.new(folder / "images.mrcs") as file:
        file.set_data(stored)
        file.set_image_stack()
    write_cs(folder / "particles.cs", particles)
    return folder


def prepare(dataset, out, particles="particles.cs", mask="mask.mrc", **settings):
    mask_path = None if mask is None else dataset / mask
    prepare_particles(
        dataset / particles, dataset / "consensus.mrc", out, mask=mask_path, settings=PrepareSettings(**settings)
    )
    return out


@pytest.fixture(scope="module")
def prepared(dataset, tmp_path_factory):
    """Cropped from 48 to 40 px in real space, then to 32 px in Fourier space."""
    return prepare(dataset, tmp_path_factory.mktemp("prepared"), crop_box=40, train_box=32)


def residual_power(source, folder, scale=1.0):
    """Per optics group and shell: power of the images minus ``scale`` times their prediction, and of the images."""
    sub = "full/" if source.box == 40 else ""
    volume, mask = (read_map(folder / f"{sub}{name}.mrc") for name in ("consensus", "mask"))
    batch = source.batch(np.arange(len(source)))
    predicted = batch.transfer * rigid_spectra(
        volume.data * mask.data, mask.data > 0, source.box, source.pixel_size_A, batch.rotation, batch.origin_px
    )
    shell, weight = plane_radius(source.box).round().long().flatten(), plane_weight(source.box).flatten()
    result = []
    for spectra in (batch.images - scale * predicted, batch.images):
        power = (spectra.abs().square().flatten(1) * weight).double()
        groups = [power[source.particles.optics_index == group].mean(0) for group in (0, 1)]
        shells = [torch.zeros(BOX, dtype=torch.double).index_add_(0, shell, group) for group in groups]
        counts = torch.zeros(BOX, dtype=torch.double).index_add_(0, shell, weight.double())
        result.append((torch.stack(shells) / counts)[:, : source.box // 2].numpy())
    return result


def test_noise_and_scale_are_recovered(prepared):
    summary = read_json(prepared / "prepared.json")
    np.testing.assert_allclose([group["image_scale"] for group in summary["optics_groups"]], SCALES, rtol=0.02)
    assert summary["mask_share"] == pytest.approx((read_map(prepared / "mask.mrc").data > 0).mean())
    with (prepared / "noise.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == BOX  # 24 shells of the full box for each of two groups
    for group in (0, 1):
        sigma = np.array([float(row["sigma"]) for row in rows if int(row["group"]) == group + 1])
        np.testing.assert_allclose(sigma[1:], noise_sigma(group, np.arange(1, BOX // 2)), rtol=0.04)
    assert float(rows[7]["frequency_1_per_A"]) == pytest.approx(7 / (BOX * PIXEL_SIZE_A))


@pytest.mark.parametrize("open_images", [open_training_images, open_full_images])
def test_predictions_leave_white_noise_of_unit_variance(prepared, open_images):
    residual, raw = residual_power(open_images(prepared), prepared)
    np.testing.assert_allclose(residual[:, 2:], 1.0, atol=0.08)  # few pixels in low shells; cropping mixes neighbours
    assert abs(residual[:, 2:].mean() - 1) < 0.01
    assert raw[:, 3].min() > 1.5, "a signal that only the prediction explains"
    worse, _ = residual_power(open_images(prepared), prepared, scale=1.1)
    assert (worse[:, 2:8].sum(1) > residual[:, 2:8].sum(1)).all()


def test_training_stack_is_standardised(prepared):
    with mrcfile.open(prepared / "train.mrcs") as file:
        data = file.data.copy()
        assert file.voxel_size.x == pytest.approx(PIXEL_SIZE_A * 40 / 32) and file.is_image_stack()
    assert data.shape == (COUNT, 32, 32) and data.dtype == np.float32
    spectra = centred_rfft2(torch.from_numpy(data))
    assert float(spectra[:, plane_radius(32) >= 16].abs().max()) < 1e-4
    assert data[:, 12:20, 12:20].mean() > data[:, :4].mean(), "dark in the input, white here"


def test_training_and_full_sources_agree_on_the_common_band(prepared):
    train, full = open_training_images(prepared), open_full_images(prepared)
    assert (train.box, full.box) == (32, 40) and full.pixel_size_A == PIXEL_SIZE_A
    assert train.pixel_size_A == pytest.approx(3.75)
    rows = np.array([3, 699, 12])
    small, large = train.batch(rows), full.batch(rows)
    inside = plane_weight(32) > 0
    cropped = torch.cat([large.images[:, :16, :17], large.images[:, -16:, :17]], 1)
    torch.testing.assert_close(small.images, cropped * inside, atol=2e-5, rtol=0)
    voxel_sum = (32 / 40) ** 3  # sums over the Fourier-cropped map's voxels are smaller by this: see images.py
    transfer = torch.cat([large.transfer[:, :16, :17], large.transfer[:, -16:, :17]], 1) / voxel_sum
    torch.testing.assert_close(small.transfer, transfer * inside, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(small.origin_px * 3.75, large.origin_px * 3.0)
    assert not small.images[:, ~inside].any() and not small.transfer[:, ~inside].any()


def test_batches_do_not_depend_on_their_company(prepared):
    source = open_training_images(prepared)
    one, many = source.batch(np.array([17])), source.batch(np.arange(30))
    torch.testing.assert_close(one.images[0], many.images[17], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(one.transfer[0], many.transfer[17], atol=1e-7, rtol=1e-5)
    assert source.half_set.dtype == np.int8 and set(source.half_set) == {0, 1}


def test_maps_keep_centre_place_and_values(dataset, prepared):
    original, full, train = (
        read_map(path)
        for path in (dataset / "consensus.mrc", prepared / "full/consensus.mrc", prepared / "consensus.mrc")
    )
    assert (full.box, train.box, train.pixel_size_A) == (40, 32, pytest.approx(3.75))
    np.testing.assert_array_equal(full.data, original.data[4:44, 4:44, 4:44])
    np.testing.assert_allclose(train.data, fourier_crop_map(full.data, 32), atol=1e-6)
    centres = [np.array(map_.origin_A) + map_.box // 2 * map_.pixel_size_A for map_ in (original, full, train)]
    np.testing.assert_allclose(centres, [centres[0]] * 3, atol=1e-4)
    mask = read_map(prepared / "mask.mrc").data
    assert mask.min() >= 0 and mask.max() == pytest.approx(1)


def test_star_input_gives_the_same(dataset, prepared, tmp_path_factory):
    """The same images as RELION would store them: white, so the stack is inverted."""
    folder = tmp_path_factory.mktemp("relion")
    particles = read_particles(dataset / "particles.cs")
    blocks = relion_tables(particles, ["white.mrcs"])
    blocks["particles"] = blocks["particles"].drop(columns="flexContrastSign")
    write_star(blocks, folder / "particles.star")
    with mrcfile.open(dataset / "images.mrcs") as file, mrcfile.new(folder / "white.mrcs") as white:
        white.set_data(-file.data)
    prepare_particles(
        folder / "particles.star",
        dataset / "consensus.mrc",
        folder / "out",
        mask=dataset / "mask.mrc",
        settings=PrepareSettings(crop_box=40, train_box=32),
    )
    one, other = open_training_images(prepared), open_training_images(folder / "out")
    rows = np.arange(0, COUNT, 7)
    first, second = one.batch(rows), other.batch(rows)
    torch.testing.assert_close(first.images, second.images, atol=2e-4, rtol=0)
    torch.testing.assert_close(first.transfer, second.transfer, atol=1e-5, rtol=1e-3)
    np.testing.assert_array_equal(one.half_set, other.half_set)


def test_selection_is_kept_in_order_and_balanced(dataset, tmp_path):
    out = prepare(dataset, tmp_path, crop_box=40, train_box=32, max_particles=101, min_scale=0.8)
    table = starfile.read(out / "particles.star")["particles"]
    rows = table["flexInputRow"].to_numpy()
    assert len(rows) == 101 and (np.diff(rows) > 0).all()
    assert ALPHA[rows].min() >= 0.8
    particles = read_particles(dataset / "particles.cs")
    source = open_training_images(out)
    np.testing.assert_array_equal(source.half_set, particles.half_set[rows])
    assert abs(int((source.half_set == 0).sum()) - int((source.half_set == 1).sum())) == 1
    full = open_full_images(out)
    expected = centred_rfft2(torch.from_numpy(np.ascontiguousarray(_stored(dataset, particles, rows[:4]))))
    sigma = np.array([noise_sigma(group, 5.0 * 48 / 40) for group in particles.optics_index[rows[:4]]])
    got = full.batch(np.arange(4)).images[:, 0, 5]
    np.testing.assert_allclose(got, -expected[:, 0, 5].numpy() / sigma, rtol=0.15)


def _stored(dataset, particles, rows):
    with mrcfile.mmap(dataset / "images.mrcs") as file:
        return np.array(file.data[particles.image_index[rows], 4:44, 4:44])


def test_latents_star_keeps_every_row(dataset, tmp_path):
    out = prepare(dataset, tmp_path, crop_box=40, train_box=32, max_particles=200)
    source = open_training_images(out)
    latents = np.random.default_rng(0).normal(size=(200, 3))
    write_latents_star(out, latents, tmp_path / "latents.star", {"flexGain": np.arange(200.0)})
    blocks = starfile.read(tmp_path / "latents.star")
    table = blocks["particles"]
    rows = starfile.read(out / "particles.star")["particles"]["flexInputRow"].to_numpy()
    assert len(table) == COUNT and len(source) == 200
    written = table[["flexLatent1", "flexLatent2", "flexLatent3"]].to_numpy()
    np.testing.assert_allclose(written[rows], latents, rtol=1e-7)
    assert np.isnan(np.delete(written, rows, 0)).all()
    np.testing.assert_array_equal(table["flexGain"].to_numpy()[rows], np.arange(200))
    particles = read_particles(dataset / "particles.cs")
    np.testing.assert_allclose(table["rlnDefocusAngle"], np.rad2deg(particles.defocus_angle_rad), rtol=1e-7)
    assert table["rlnImageName"][5] == f"{particles.image_index[5] + 1:06d}@images.mrcs"
    np.testing.assert_array_equal(table["flexUid"].to_numpy().astype(np.uint64), particles.uid)
    assert table["rlnRandomSubset"].tolist() == (particles.half_set + 1).tolist()


def test_latents_star_keeps_text_of_star_input(dataset, tmp_path):
    blocks = relion_tables(read_particles(dataset / "particles.cs"), [str(dataset / "images.mrcs")])
    blocks["particles"]["rlnMicrographName"] = ["0001"] * COUNT
    blocks["particles"]["rlnCtfMaxResolution"] = ["3.70"] * COUNT
    write_star(blocks, tmp_path / "in.star")
    prepare_particles(
        tmp_path / "in.star", dataset / "consensus.mrc", tmp_path / "out", mask=dataset / "mask.mrc",
        settings=PrepareSettings(train_box=32, max_particles=100),
    )  # fmt: skip
    write_latents_star(tmp_path / "out", np.zeros((100, 1)), tmp_path / "latents.star")
    text = ["rlnMicrographName", "rlnCtfMaxResolution"]
    table = starfile.read(tmp_path / "latents.star", parse_as_string=text)["particles"]
    assert set(table["rlnMicrographName"]) == {"0001"} and set(table["rlnCtfMaxResolution"]) == {"3.70"}
    assert list(table.columns) == [*blocks["particles"].columns, "flexLatent1"]


def test_random_halves_where_there_are_none(dataset, caplog):
    particles = read_particles(dataset / "particles.cs")
    without = Particles(**{**vars(particles), "half_set": np.full(COUNT, -1, np.int8)})
    kept, origin = select_particles(without, PrepareSettings())
    again, _ = select_particles(without, PrepareSettings())
    assert origin == "random" and "no half-sets" in caplog.text
    assert (kept.half_set == 0).sum() == COUNT // 2 and set(kept.half_set) == {0, 1}
    np.testing.assert_array_equal(kept.half_set, again.half_set)
    same, origin = select_particles(particles, PrepareSettings())
    assert origin == "input"
    np.testing.assert_array_equal(same.half_set, particles.half_set)
    assert select_particles(particles, PrepareSettings(resplit=True))[1] == "random"


def test_rows_of_one_image_stay_in_one_half(dataset, caplog):
    """An input that was symmetry-expanded elsewhere: each image three times, in both half-sets or without any."""
    particles = read_particles(dataset / "particles.cs").subset(np.repeat(np.arange(0, COUNT, 2), 3))
    rows = len(particles)
    parted = Particles(**{**vars(particles), "half_set": (np.arange(rows) % 2).astype(np.int8)})
    same, origin = select_particles(parted, PrepareSettings())
    assert origin == "input" and f"{rows // 3} images have rows in both half-sets" in caplog.text
    np.testing.assert_array_equal(same.half_set, parted.half_set)
    caplog.clear()
    for settings in (PrepareSettings(resplit=True), PrepareSettings(resplit=True, max_particles=rows // 2)):
        kept, origin = select_particles(parted, settings)
        halves = {image: set(kept.half_set[kept.image_index == image]) for image in kept.image_index}
        assert origin == "random" and all(len(half) == 1 for half in halves.values())
        assert abs(float(kept.half_set.mean()) - 0.5) < 0.01
    assert "in both half-sets" not in caplog.text
    select_particles(read_particles(dataset / "particles.cs"), PrepareSettings())
    assert "in both half-sets" not in caplog.text


def test_groups_left_without_particles_are_dropped(dataset):
    particles = read_particles(dataset / "particles.cs")
    scale = np.where(particles.optics_index == 0, 0.1, 1.0)
    kept, _ = select_particles(
        Particles(**{**vars(particles), "particle_scale": scale}), PrepareSettings(min_scale=0.5)
    )
    assert [group.voltage_kV for group in kept.optics] == [200.0] and not kept.optics_index.any()


def test_train_box_no_smaller_than_the_images(dataset, tmp_path, caplog):
    caplog.set_level("INFO")
    out = prepare(dataset, tmp_path, mask=None, train_box=128, max_particles=60)
    assert open_training_images(out).box == BOX and "not Fourier-cropped" in caplog.text
    assert read_map(out / "mask.mrc").data.mean() < 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_box": 64}, "prepare.crop_box: 64 px is larger than the images' box of 48"),
        ({"crop_box": 41}, "prepare.crop_box: 41 px: an even number"),
        ({"train_box": 33}, "prepare.train_box: 33 px: an even number"),
        ({"symmetry": "C2"}, r"prepare.symmetry: C2: the consensus .* does not have this symmetry .* \(correlation"),
        ({"symmetry": "I5"}, "prepare.symmetry: 'I5' is no point group"),
        ({"min_scale": 5.0}, "prepare.min_scale: 5 leaves 0 particles: at least 20 are needed"),
        ({"max_particles": 1}, "prepare.max_particles: 1: at least 20 are needed"),
        ({"max_particles": 19}, "prepare.max_particles: 19: at least 20 are needed"),
    ],
)
def test_settings_errors(dataset, tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        prepare(dataset, tmp_path, **settings)
    assert not list(tmp_path.iterdir()), "nothing is written before the checks"


def test_inverted_contrast_is_reported_and_turned(dataset, prepared, tmp_path, caplog):
    """One optics group of the wrong sign: one line, and the same training images and transfer functions."""
    table = np.load(dataset / "particles.cs")
    table["blob/sign"][table["ctf/exp_group_id"] == 1] = 1
    with (dataset / "inverted.cs").open("wb") as file:
        np.save(file, table)
    prepare(dataset, tmp_path, particles="inverted.cs", crop_box=40, train_box=32)
    warned = [record.message for record in caplog.records if "correlate negatively" in record.message]
    assert len(warned) == 1 and "optics group exposureGroup1 correlate" in warned[0]
    for open_images in (open_training_images, open_full_images):
        right, turned = (open_images(folder).batch(np.arange(60)) for folder in (prepared, tmp_path))
        torch.testing.assert_close(turned.images, right.images)
        torch.testing.assert_close(turned.transfer, right.transfer)


def test_images_of_something_else_are_refused(dataset, tmp_path):
    table = np.load(dataset / "particles.cs")
    table["alignments3D/pose"] = Rotation.random(COUNT, rng=np.random.default_rng(8)).as_rotvec()
    table["alignments3D/shift"] += 9
    with (dataset / "wrong.cs").open("wb") as file:
        np.save(file, table)
    with pytest.raises(InputError, match=r"do not match projections of the consensus: .*another map or other poses"):
        prepare(dataset, tmp_path, particles="wrong.cs")


def test_broken_pixels_are_reported(dataset, tmp_path, caplog):
    """One image that is not finite is left out, and named; the others are used."""
    with mrcfile.open(dataset / "images.mrcs") as file:
        data = file.data.copy()
    particles = read_particles(dataset / "particles.cs")
    data[particles.image_index[41], 20, 20] = np.nan
    with mrcfile.new(tmp_path / "images.mrcs") as file:
        file.set_data(data)
    (tmp_path / "particles.cs").write_bytes((dataset / "particles.cs").read_bytes())
    prepare_particles(tmp_path / "particles.cs", dataset / "consensus.mrc", tmp_path / "out", mask=dataset / "mask.mrc")
    assert "particles.cs: 1 images hold values that are not finite and are left out: row 42" in caplog.text
    assert len(open_training_images(tmp_path / "out")) == COUNT - 1


def test_the_mask_settings_on_record_are_those_that_made_the_mask(dataset, tmp_path):
    """The four that make it, as given, and none of the mesh's other keys."""
    settings = MaskSettings(lowpass_A=20.0, dilate_A=4.0)
    prepare_particles(
        dataset / "particles.cs",
        dataset / "consensus.mrc",
        tmp_path,
        settings=PrepareSettings(train_box=16, max_particles=100),
        mask_settings=settings,
    )
    folder = ParticlesFolder(tmp_path)
    record = PreparedRecord.read(folder.record)
    assert record.mask_settings == {"lowpass_A": 20.0, "threshold": "auto", "dilate_A": 4.0, "pad_A": 5.0}
    consensus, made = read_map(folder.full_consensus), read_map(folder.full_mask)
    np.testing.assert_array_equal(made.data, make_mask(consensus.data, consensus.pixel_size_A, **record.mask_settings))
    assert not np.array_equal(made.data, make_mask(consensus.data, consensus.pixel_size_A))


def test_match_grid_resamples_and_keeps_the_centre():
    def gaussian(box, pixel_size_A):
        axis = (np.arange(box) - box // 2) * pixel_size_A
        square = (axis[:, None, None] - 6) ** 2 + (axis[None, :, None] + 3) ** 2 + axis[None, None, :] ** 2
        return Map(np.exp(-square / (2 * 7.0**2)).astype(np.float32), pixel_size_A)

    expected = gaussian(48, 3.0).data
    for box, pixel_size_A in ((60, 2.4), (40, 3.6), (64, 3.0), (50, 2.37)):
        np.testing.assert_allclose(match_grid(gaussian(box, pixel_size_A), 48, 3.0, "map"), expected, atol=0.01)
    near = gaussian(48, 3.02)  # within 1 %: a calibration, not another grid
    assert match_grid(near, 48, 3.0, "map") is near.data
    with pytest.raises(InputError, match=r"map: 48 voxels of 1 A, but the images have 48 px of 3 A"):
        match_grid(gaussian(48, 1.0), 48, 3.0, "map")


@pytest.mark.parametrize(("box", "pixel_size_A"), [(96, 1.5), (80, 1.8), (36, 4.0), (60, 2.37), (64, 3.0)])
def test_a_mask_of_any_box_keeps_its_edge(tmp_path, box, pixel_size_A):
    """A hard ball: 1 inside, 0 outside, off by less than a voxel of either grid; no ringing beyond."""

    def radius_A(box, pixel_size_A):
        axis = (np.arange(box) - box // 2) * pixel_size_A
        return np.sqrt((axis[:, None, None] - 9) ** 2 + (axis[None, :, None] + 6) ** 2 + axis[None, None, :] ** 2)

    write_map(tmp_path / "mask.mrc", (radius_A(box, pixel_size_A) <= 40).astype(np.float32), pixel_size_A)
    mask, radius = read_mask(tmp_path / "mask.mrc", 48, 3.0), radius_A(48, 3.0)
    reach_A = 3**0.5 * max(pixel_size_A, 3.0)
    assert mask.shape == (48,) * 3 and (mask[radius < 40 - reach_A] == 1).all()
    assert not mask[radius > 40 + reach_A].any()
    assert mask.sum() == pytest.approx((radius <= 40).sum(), rel=0.02)


def test_bad_masks_are_refused(tmp_path):
    for name, data, pixel_size_A, message in (
        ("density", np.full((48,) * 3, 3.0), 3.0, "a mask has values from 0 to 1, not 3 to 3"),
        ("other", np.ones((48,) * 3), 1.0, "48 voxels of 1 A, but the images have 48 px of 3 A"),
        ("corner", np.pad(np.ones((2, 2, 2)), (0, 98)), 3.0, "the mask is empty within the images' box of 48 px"),
    ):
        write_map(tmp_path / f"{name}.mrc", data.astype(np.float32), pixel_size_A)
        with pytest.raises(InputError, match=rf"{name}\.mrc: {message}"):
            read_mask(tmp_path / f"{name}.mrc", 48, 3.0)


def test_smoothing_needs_no_more_shells_than_samples_ask_for():
    power = np.array([0.5, 4.0, 3.0, 2.0, 1.0, 0.0])
    np.testing.assert_array_equal(smooth_power(power, np.full(6, 10000))[:5], power[:5])
    few = smooth_power(power, np.full(6, 700))
    np.testing.assert_allclose(few[[0, 2]], [0.5, 3.0])
    assert few[5] > 0
