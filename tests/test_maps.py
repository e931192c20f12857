"""Maps: position in space, density units, filters, the mask."""

from __future__ import annotations

import mrcfile
import numpy as np
import pytest

from flexlib.errors import InputError
from flexlib.imaging import fourier, maps, masks


def gaussian(box: int, centre_px=(3.0, -2.0, 1.0), sigma_px: float = 3.0, pixel: float = 1.0) -> np.ndarray:
    """(N, N, N) Gaussian of height 1 at ``centre_px`` (x, y, z) from the box centre, in units of ``pixel``."""
    axis = (np.arange(box) - box // 2) * pixel
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
    square = (x - centre_px[0]) ** 2 + (y - centre_px[1]) ** 2 + (z - centre_px[2]) ** 2
    return np.exp(-square / (2 * sigma_px**2)).astype(np.float32)


def write_raw(path, data, voxel_size=2.0, **header) -> None:
    with mrcfile.new(path, overwrite=True) as file:
        file.set_data(data)
        if voxel_size:
            file.voxel_size = voxel_size
        for name, value in header.items():
            setattr(file.header, name, value)


@pytest.mark.parametrize("box", [16, 20, 24, 48, 64])
def test_fourier_resampling_keeps_positions_and_densities(box):
    old = 32
    resample = fourier.fourier_crop_map if box < old else fourier.fourier_pad_map
    expected = gaussian(box, pixel=old / box)
    assert np.abs(resample(gaussian(old), box) - expected).max() < (2e-2 if box == 16 else 2e-4)


def test_fourier_crop_undoes_pad():
    volume = fourier.lowpass_map(np.random.default_rng(0).standard_normal((24, 24, 24)), 1.0, 4.0)
    assert np.abs(fourier.fourier_crop_map(fourier.fourier_pad_map(volume, 40), 24) - volume).max() < 1e-5


@pytest.mark.parametrize("box", [20, 32, 46])
def test_real_crop_and_pad_keep_the_centre(box):
    assert np.abs(maps.crop_or_pad_real(gaussian(32, sigma_px=1.5), box) - gaussian(box, sigma_px=1.5)).max() < 1e-3
    assert maps.crop_or_pad_real(np.ones((8, 8, 8)), 12, fill=-1.0)[0, 0, 0] == -1.0


def test_lowpass_keeps_low_and_removes_high_waves():
    box, pixel_size_A = 64, 2.0
    x = np.arange(box)
    for shell, gain in [(4, 1.0), (16, 0.5), (24, 0.0)]:
        wave = np.broadcast_to(np.cos(2 * np.pi * shell * x / box), (box, box, box))
        filtered = fourier.lowpass_map(wave, pixel_size_A, box * pixel_size_A / 16)
        np.testing.assert_allclose(filtered, gain * wave, atol=1e-5)


def test_written_map_reads_back(tmp_path):
    volume = gaussian(16)
    like = maps.Map(volume, 3.5, (-10.0, 4.0, 7.5), (0, 0, 0))
    maps.write_map(tmp_path / "new" / "map.mrc", volume, 3.5, like=like)
    back = maps.read_map(tmp_path / "new" / "map.mrc")
    np.testing.assert_array_equal(back.data, volume)
    assert back.pixel_size_A == pytest.approx(3.5)
    assert back.origin_A == like.origin_A and back.nstart == (0, 0, 0)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["map.mrc"]


@pytest.mark.parametrize(
    ("like", "box", "pixel_size_A"),
    [
        (maps.Map(np.zeros((32,) * 3, np.float32), 2.0), 16, 4.0),  # Fourier crop
        (maps.Map(np.zeros((32,) * 3, np.float32), 2.0), 16, 2.0),  # real crop
        (maps.Map(np.zeros((32,) * 3, np.float32), 2.0, (-32.0, -32.0, 8.0)), 48, 2.0),
        (maps.Map(np.zeros((32,) * 3, np.float32), 2.0, (0.0, 0.0, 0.0), (-16, -16, -16)), 16, 4.0),
        (maps.Map(np.zeros((32,) * 3, np.float32), 2.0, (0.0, 0.0, 0.0), (-16, 4, 2)), 16, 2.0),
    ],
)
def test_centre_in_space_is_carried_to_another_box(tmp_path, like, box, pixel_size_A):
    maps.write_map(tmp_path / "m.mrc", np.zeros((box,) * 3), pixel_size_A, like=like)
    back = maps.read_map(tmp_path / "m.mrc")

    def centre_A(m: maps.Map) -> np.ndarray:
        corner = np.array(m.origin_A) if any(m.origin_A) or not any(m.nstart) else np.array(m.nstart) * m.pixel_size_A
        return corner + m.box // 2 * m.pixel_size_A

    np.testing.assert_allclose(centre_A(back), centre_A(like))


def test_axis_order_is_undone(tmp_path):
    volume = np.random.default_rng(0).standard_normal((8, 8, 8)).astype(np.float32)
    # columns run along z, rows along y, sections along x
    write_raw(tmp_path / "m.mrc", volume.transpose(2, 1, 0).copy(), mapc=3, mapr=2, maps=1, nxstart=-3, nzstart=-5)
    back = maps.read_map(tmp_path / "m.mrc")
    np.testing.assert_array_equal(back.data, volume)
    assert back.nstart == (-5, 0, -3)


@pytest.mark.parametrize(
    ("data", "voxel_size", "word"),
    [
        (np.zeros((8, 8, 10), np.float32), 2.0, "cubic"),
        (np.zeros((8, 8, 8), np.float32), 0.0, "voxel"),
        (np.zeros((8, 8, 8), np.float32), (2.0, 2.0, 3.0), "voxel"),
        (np.full((8, 8, 8), np.nan, np.float32), 2.0, "finite"),
    ],
)
def test_bad_maps_are_refused_in_one_line(tmp_path, data, voxel_size, word):
    write_raw(tmp_path / "bad.mrc", data, voxel_size)
    with pytest.raises(InputError, match=word) as error:
        maps.read_map(tmp_path / "bad.mrc")
    assert "bad.mrc" in str(error.value) and "\n" not in str(error.value)


def test_an_odd_map_is_made_even_about_its_centre(tmp_path):
    data = np.random.default_rng(0).normal(size=(9, 9, 9)).astype(np.float32)
    write_raw(tmp_path / "odd.mrc", data, 2.0)
    volume = maps.read_map(tmp_path / "odd.mrc")
    assert volume.box == 10 and not volume.data[0].any() and not volume.data[:, :, 0].any()
    np.testing.assert_array_equal(volume.data[1:, 1:, 1:], data)
    assert volume.data[5, 5, 5] == data[4, 4, 4], "voxel N//2"
    assert volume.origin_A == (-2.0, -2.0, -2.0), "every voxel stays where it was"


def test_a_text_file_is_no_map(tmp_path):
    (tmp_path / "text.mrc").write_text("not a map")
    with pytest.raises(InputError, match=r"text\.mrc"):
        maps.read_map(tmp_path / "text.mrc")
    with pytest.raises(InputError, match=r"none\.mrc"):
        maps.read_map(tmp_path / "none.mrc")


def test_soft_edge_falls_as_a_cosine_outside_the_dilated_mask():
    mask = np.zeros((32, 32, 32), bool)
    mask[16, 16, 16] = True
    profile = masks.soft_edge(mask, pixel_size_A=2.0, dilate_A=4.0, width_A=12.0)[16, 16, 16:]
    expected = 0.5 + 0.5 * np.cos(np.pi * np.clip((2.0 * np.arange(16) - 4.0) / 12.0, 0, 1))
    np.testing.assert_allclose(profile, expected, atol=1e-6)


def blurred_particle(noise: float) -> tuple[np.ndarray, np.ndarray]:
    """A dense body with an arm that is spread over many positions: map, and the voxels of body and arm."""

    def ball(x: float, y: float, radius_px: float) -> np.ndarray:
        square = -2 * np.log(gaussian(48, (x, y, 0.0), 5.0).astype(float)) * 25
        return 1 / (1 + np.exp((np.sqrt(square) - radius_px) / 0.3))

    body = ball(-6.0, 0.0, 7.0)
    arms = [ball(9 * np.cos(a) + 2, 9 * np.sin(a), 4.0) for a in np.linspace(-0.8, 0.8, 9)]
    volume = body + np.mean(arms, axis=0) + np.random.default_rng(0).normal(0, noise, body.shape)
    return volume.astype(np.float32), (np.max([body, *arms], axis=0) > 0.3)


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.1])
def test_automatic_mask_holds_the_blurred_arm_and_little_else(noise):
    volume, particle = blurred_particle(noise)
    mask = masks.make_mask(volume, pixel_size_A=3.0)
    assert mask.dtype == np.float32 and mask.min() == 0.0 and mask.max() == 1.0
    assert (mask[particle] > 0.5).mean() > 0.98
    assert (mask > 0.5).sum() < 4 * particle.sum() < 0.1 * mask.size


def test_dust_is_dropped_and_a_second_body_kept():
    volume = gaussian(48, (-10, 0, 0)) + gaussian(48, (12, 0, 0), 2.5) + 0.9 * gaussian(48, (0, 18, 0), 0.8)
    mask = masks.make_mask(volume, 3.0, threshold=0.3)
    assert mask[24, 24, 14] == 1.0 and mask[24, 24, 36] == 1.0
    assert mask[24, 42, 24] == 0.0


def test_threshold_above_the_map_is_refused():
    with pytest.raises(InputError, match="threshold"):
        masks.make_mask(gaussian(16), 3.0, threshold=5.0)


@pytest.mark.parametrize("box", [16, 24, 48, 64])
def test_resampled_mask_keeps_its_place_and_volume(box):
    mask = masks.soft_edge(gaussian(32, (2, -3, 1)) > 0.2, 1.0, 1.0, 4.0)
    other = masks.resample_mask(mask, box)
    assert other.min() >= 0 and other.max() <= 1

    def moments(m):
        axis = (np.arange(len(m)) - len(m) // 2) * 32 / len(m)
        return [m.sum() * (32 / len(m)) ** 3] + [(m.sum(t) * axis).sum() / m.sum() for t in [(0, 1), (0, 2), (1, 2)]]

    np.testing.assert_allclose(moments(other), moments(mask), rtol=0.02, atol=0.02)
