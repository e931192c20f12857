"""Series of maps: the push-forward of density against the exact transform of moved voxels, and the stage's files."""

import finufft
import numba
import numpy as np
import pandas as pd
import pytest
import torch

from flexlib.errors import InputError
from flexlib.generate import VolumeDeformer, chimerax_script, deform_at_latent, deform_volume, generate_series, num_near
from flexlib.maps import Map, read_map, soft_edge, write_map
from flexlib.mesh.lattice import bcc_mesh
from flexlib.mesh.voxels import voxelise
from flexlib.model import FlexModel, FlowGenerator
from flexlib.settings import GenerateSettings

BOX = 32
PIXEL_SIZE_A = 3.0


def ball(box, radius_px, centre_px=(0, 0, 0)):
    z, y, x = np.ogrid[:box, :box, :box]
    x0, y0, z0 = (c + box // 2 for c in centre_px)
    return (x - x0) ** 2 + (y - y0) ** 2 + (z - z0) ** 2 < radius_px**2


@pytest.fixture(scope="module")
def mesh():
    return bcc_mesh(ball(BOX, 11), PIXEL_SIZE_A, 20.0)


def bend_A(vertices_A):
    """A smooth bend of a few Angstrom."""
    x, y, z = (vertices_A / 30.0).T
    return 4.0 * np.stack([np.sin(z) + 0.2, 0.5 * x * z, np.cos(y) * 0.7], 1)


def linear_model(mesh, canonical, latents):
    """A model whose first latent is a translation along x in Angstrom and whose second is one along y."""
    shifts = np.zeros((2, len(mesh.vertices_A), 3), np.float32)
    shifts[0, :, 0] = shifts[1, :, 1] = 1.0
    flow = FlowGenerator(torch.from_numpy(shifts), 2, 1, 4)
    with torch.no_grad():
        flow.linear.copy_(torch.eye(2))
    return FlexModel(mesh, flow, latents.astype(np.float32), canonical.astype(np.float32), BOX, PIXEL_SIZE_A)


def centre_A(volume, pixel_size_A):
    """Centre of mass (x, y, z) in Angstrom from the box centre."""
    box = len(volume)
    axis = (np.arange(box) - box // 2) * pixel_size_A
    return np.array([(volume.sum(tuple({0, 1, 2} - {a})) * axis).sum() / volume.sum() for a in (2, 1, 0)])


def test_volume_at_rest_is_given_back(mesh):
    volume = np.random.default_rng(0).standard_normal((BOX,) * 3).astype(np.float32)
    mask = soft_edge(ball(BOX, 8), PIXEL_SIZE_A, 0.0, 9.0)
    moved = deform_volume(volume, PIXEL_SIZE_A, mask, mesh, np.zeros_like(mesh.vertices_A))
    assert np.abs(moved - volume).max() < 1e-5 * np.abs(volume).max()


def test_mass_is_kept_and_density_outside_the_mask_stays(mesh):
    generator = np.random.default_rng(1)
    inside = ball(BOX, 8)
    volume = np.where(inside, generator.uniform(1, 2, inside.shape), 0)
    volume[2, 2, 2] = 5.0
    moved = deform_volume(volume, PIXEL_SIZE_A, inside, mesh, bend_A(mesh.vertices_A))
    assert moved.sum() == pytest.approx(volume.sum(), rel=1e-5)
    assert np.abs(moved - volume).max() > 0.5
    without = deform_volume(volume * inside, PIXEL_SIZE_A, inside, mesh, bend_A(mesh.vertices_A))
    assert (moved - without)[2, 2, 2] == pytest.approx(5.0, rel=1e-4)


def test_push_forward_is_the_transform_of_the_moved_voxels(mesh):
    inside = ball(BOX, 9)
    volume = np.where(inside, np.random.default_rng(2).standard_normal(inside.shape), 0).astype(np.float32)
    displacements_A = bend_A(mesh.vertices_A)
    moved = np.fft.fftn(deform_volume(volume, PIXEL_SIZE_A, inside, mesh, displacements_A))

    voxels = voxelise(mesh, inside, PIXEL_SIZE_A)
    corners = (mesh.vertices_A + displacements_A)[mesh.cells[voxels.cell]]
    moved_px = (voxels.bary[:, None] @ corners)[:, 0] / PIXEL_SIZE_A + BOX // 2
    x, y, z = np.ascontiguousarray(moved_px.T * 2 * np.pi / BOX)
    values = volume.reshape(-1)[voxels.index].astype(complex)
    exact = np.fft.ifftshift(finufft.nufft3d1(z, y, x, values, (BOX,) * 3, isign=-1, eps=1e-9))

    k = np.fft.fftfreq(BOX)
    radius = np.sqrt(k[:, None, None] ** 2 + k[None, :, None] ** 2 + k[None, None, :] ** 2)
    for low, high, tolerance in (
        (0, 0.1, 1e-4),
        (0.1, 0.2, 1e-3),
        (0.2, 0.3, 3e-3),
        (0.3, 0.4, 1e-2),
        (0.4, 0.5, 3e-2),
    ):
        band = (radius >= low) & (radius < high)
        error = np.linalg.norm((moved - exact)[band]) / np.linalg.norm(exact[band])
        assert error < tolerance, (low, high, error)


def test_whole_voxel_shift_moves_whole_voxels(mesh):
    inside = ball(BOX, 8)
    volume = np.where(inside, np.random.default_rng(3).standard_normal(inside.shape), 0)
    shift_A = np.broadcast_to(np.array([2, -1, 3]) * PIXEL_SIZE_A, mesh.vertices_A.shape)
    moved = deform_volume(volume, PIXEL_SIZE_A, inside, mesh, shift_A)
    assert np.abs(moved - np.roll(volume, (3, -1, 2), (0, 1, 2))).max() < 1e-4


def test_same_bits_for_any_number_of_threads(mesh):
    volume = np.random.default_rng(4).standard_normal((BOX,) * 3).astype(np.float32)
    deformer = VolumeDeformer(volume, PIXEL_SIZE_A, np.ones_like(volume), mesh)
    threads = numba.get_num_threads()
    try:
        results = []
        for count in (1, min(2, numba.config.NUMBA_NUM_THREADS)):
            numba.set_num_threads(count)
            results.append(deformer.deform(bend_A(mesh.vertices_A)))
    finally:
        numba.set_num_threads(threads)
    assert np.array_equal(*results)


def test_flow_is_carried_to_another_box_and_pixel_size(mesh):
    inside = ball(BOX, 8)
    model = linear_model(mesh, inside * 1.0, np.zeros((5, 2)))
    fine = Map(ball(48, 8, (1, 0, -1)).astype(np.float32), 2.0)
    moved = deform_at_latent(model, fine, np.array([5.0, -3.0]))
    assert moved.shape == (48, 48, 48)
    np.testing.assert_allclose(centre_A(moved, 2.0) - centre_A(fine.data, 2.0), [5.0, -3.0, 0.0], atol=0.02)


def test_series_runs_along_each_latent_axis(mesh, tmp_path):
    generator = np.random.default_rng(5)
    latents = generator.uniform([-6, -2], [6, 4], (500, 2))
    canonical = np.where(ball(BOX, 8), 1.0, 0.0)
    train, out = tmp_path / "train", tmp_path / "out"
    linear_model(mesh, canonical, latents).save(train / "model.pt")
    write_map(train / "canonical.mrc", canonical, PIXEL_SIZE_A, like=Map(canonical, PIXEL_SIZE_A, (7.0, 8.0, 9.0)))
    generate_series(train, out, GenerateSettings(frames=3))

    assert sorted(p.name for p in out.iterdir()) == ["axis_1", "axis_1.cxc", "axis_2", "axis_2.cxc", "series.csv"]
    table = pd.read_csv(out / "series.csv")
    assert list(table.columns) == ["series", "frame", "latent_1", "latent_2", "num_particles"]
    assert len(table) == 6
    first = table[table.series == "axis_1"]
    np.testing.assert_allclose(first.latent_1.iloc[[0, -1]], np.percentile(latents[:, 0], [2, 98]), atol=1e-5)
    np.testing.assert_allclose(first.latent_2, np.median(latents[:, 1]), atol=1e-5)
    for row in table.itertuples():
        frame = read_map(out / row.series / f"frame_{row.frame:03d}.mrc")
        assert frame.pixel_size_A == pytest.approx(PIXEL_SIZE_A)
        assert frame.origin_A == pytest.approx((7, 8, 9))
        np.testing.assert_allclose(centre_A(frame.data, PIXEL_SIZE_A), [row.latent_1, row.latent_2, 0], atol=0.02)
        assert row.num_particles == num_near(latents.astype(np.float32), np.array([row.latent_1, row.latent_2]))
    script = (out / "axis_1.cxc").read_text()
    assert "open axis_1/frame_*.mrc vseries true" in script
    assert "vseries play #1" in script


def test_contour_level_encloses_density():
    canonical = np.where(ball(BOX, 8), 1.0, 0.0)
    script = chimerax_script("axis_1", Map(canonical, PIXEL_SIZE_A))
    assert 0 < float(script.split("level ")[1].split()[0]) <= 1.0


def test_series_from_a_file_of_latents(mesh, tmp_path):
    canonical = np.where(ball(BOX, 8), 1.0, 0.0)
    linear_model(mesh, canonical, np.zeros((4, 2))).save(tmp_path / "model.pt")
    write_map(tmp_path / "canonical.mrc", canonical, PIXEL_SIZE_A)
    path = tmp_path / "loop.csv"
    path.write_text("# z1,z2\n0,3\n3,0\n")
    generate_series(tmp_path, tmp_path / "out", GenerateSettings(series=str(path)))
    frame = read_map(tmp_path / "out" / "loop" / "frame_001.mrc")
    np.testing.assert_allclose(centre_A(frame.data, PIXEL_SIZE_A), [3, 0, 0], atol=0.02)
    path.write_text("0,3,1\n")
    with pytest.raises(InputError, match=r"loop.csv: 3 numbers a row, the model has 2 latents"):
        generate_series(tmp_path, tmp_path / "out", GenerateSettings(series=str(path)))
    with pytest.raises(InputError, match=r"generate.series: nowhere.csv"):
        generate_series(tmp_path, tmp_path / "out", GenerateSettings(series="nowhere.csv"))
