"""prepare on optics groups that differ: pixel size, box (one odd), noise, and what was done to their images; symmetry.

The molecule is a sum of Gaussians, whose projections are known in closed form at any pixel size. Signal is far above
noise, so that an error of a few per cent in scale, pose or CTF leaves a residual that is not white.
"""

import csv
import importlib.util
from dataclasses import replace
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import starfile
import torch
from scipy.spatial.transform import Rotation

from flexlib.files import read_json
from flexlib.images.ctf import ctf_images
from flexlib.images.sources import open_full_images, open_training_images
from flexlib.imaging.image_transforms import plane_radius, plane_weight
from flexlib.imaging.maps import read_map, write_map
from flexlib.imaging.symmetry import symmetry_rotations
from flexlib.particles import read_particles
from flexlib.particles.star_write import write_star
from flexlib.particles.table import OpticsGroup, Particles
from flexlib.prepare.run import prepare_particles
from flexlib.projection.op import VoxelTensors, gather_volume, project, view_vertices
from flexlib.tetra.tetmesh import single_cell_mesh
from flexlib.tetra.voxels import voxelise
from flexlib.workflow_support.settings import PrepareSettings

SIGMA_A = 2.6  # of the Gaussians
SIGNAL = 10000.0


def optics_group(name, pixel_size_A, box, ctf_applied="", **aberrations):
    return OpticsGroup(name, 300.0, 2.7, 0.1, pixel_size_A, box, ctf_applied=ctf_applied, **aberrations)


GROUPS = (
    optics_group("fine", 2.0, 64),
    optics_group("coarse", 2.5, 52, beam_tilt_mrad=(0.4, -0.2)),
    optics_group("odd premultiplied", 2.0, 65, "premultiplied"),
    optics_group("flipped", 2.0, 64, "phase_flipped", magnification_matrix=((1.02, 0.01), (0.0, 0.985))),
)
NOISE = (1.0, 2.0, 0.5, 1.5)


def atoms(symmetry="C1"):
    rng = np.random.default_rng(4)
    one = rng.normal(size=(8, 3)) * 9 + (12, 0, 5)
    return np.concatenate([one @ rotation.T for rotation in symmetry_rotations(symmetry)])


def particles_of(groups, count, symmetric_atoms):
    """Metadata of ``count`` particles of each group; images are made by ``images_of``."""
    rng = np.random.default_rng(1)
    total = count * len(groups)
    optics_index = np.repeat(np.arange(len(groups)), count).astype(np.int32)
    return Particles(
        optics=groups,
        optics_index=optics_index,
        rotation=Rotation.random(total, rng=rng).as_matrix(),
        origin_A=rng.normal(scale=3, size=(total, 2)),
        defocus_u_A=rng.uniform(4000, 7000, total),
        defocus_v_A=rng.uniform(4000, 7000, total),
        defocus_angle_rad=rng.uniform(0, 3, total),
        phase_shift_rad=np.zeros(total),
        ctf_bfactor_A2=np.zeros(total),
        ctf_scale=np.ones(total),
        half_set=(rng.permutation(total) % 2).astype(np.int8),
        contrast_sign=np.ones(total),
        stack_paths=tuple(f"{index}.mrcs" for index in range(len(groups))),
        stack_index=optics_index,
        image_index=np.tile(np.arange(count), len(groups)),
        source_path="particles.star",
        source_row=np.arange(total),
    )


def images_of(particles, group, noise, positions_A):
    """(n, B, B) images of a group: exact transforms on their own grid, CTF, noise, then what was done to them."""
    optics = particles.optics[group]
    rows = np.flatnonzero(particles.optics_index == group)
    box, pixel_size_A = optics.box, optics.pixel_size_A
    frequency = np.stack(
        np.meshgrid(np.fft.fftfreq(box), np.fft.rfftfreq(box), indexing="ij")[::-1], -1
    ).reshape(-1, 2) / pixel_size_A  # fmt: skip
    seen = frequency @ np.array(optics.magnification_matrix).T  # RELION takes the slice at M k
    view_A = np.einsum("nij,aj->nai", particles.rotation[rows], positions_A)[:, :, :2]
    spectra = np.exp(-2j * np.pi * np.einsum("nai,ki->nak", view_A, seen)).sum(1)
    spectra *= np.exp(-2 * np.pi**2 * SIGMA_A**2 * (seen**2).sum(1)) / pixel_size_A**2
    spectra *= np.exp(2j * np.pi * particles.origin_A[rows] @ frequency.T) * SIGNAL
    spectra = torch.as_tensor(spectra.reshape(-1, box, box // 2 + 1), dtype=torch.complex64)
    spectra *= ctf_images(particles, rows, box)
    images = torch.fft.irfft2(spectra, s=(box, box)).roll((box // 2, box // 2), (1, 2))
    images += noise * torch.randn(images.shape, generator=torch.Generator().manual_seed(group))
    ctf = ctf_images(replace(particles, optics=tuple(replace(g, beam_tilt_mrad=(0.0, 0.0)) for g in GROUPS)), rows, box)
    applied = {"": 1.0, "premultiplied": ctf, "phase_flipped": ctf.sign()}[optics.ctf_applied]
    return torch.fft.irfft2(torch.fft.rfft2(images) * applied, s=(box, box)).numpy()


def write_set(folder, particles, noise, positions_A, box=64, pixel_size_A=2.0):
    """Images, a RELION 3.1 STAR file as RELION would write it, the consensus and a mask."""
    for group in range(len(particles.optics)):
        with mrcfile.new(folder / f"{group}.mrcs") as file:
            file.set_data(images_of(particles, group, noise[group], positions_A).astype(np.float32))
    import pandas as pd

    flags = {"premultiplied": "rlnCtfDataAreCtfPremultiplied", "phase_flipped": "rlnCtfDataArePhaseFlipped"}
    optics = pd.DataFrame(
        [
            {
                "rlnOpticsGroup": number,
                "rlnOpticsGroupName": group.name.replace(" ", "_"),
                "rlnVoltage": 300.0,
                "rlnSphericalAberration": 2.7,
                "rlnAmplitudeContrast": 0.1,
                "rlnImagePixelSize": group.pixel_size_A,
                "rlnImageSize": group.box,
                "rlnBeamTiltX": group.beam_tilt_mrad[0],
                "rlnBeamTiltY": group.beam_tilt_mrad[1],
                **{f"rlnMagMat{i}{j}": group.magnification_matrix[i][j] for i in (0, 1) for j in (0, 1)},
                **{flag: int(name == group.ctf_applied) for name, flag in flags.items()},
            }
            for number, group in enumerate(particles.optics, 1)
        ]
    )
    euler_deg = Rotation.from_matrix(particles.rotation.transpose(0, 2, 1)).as_euler("ZYZ", degrees=True)
    table = pd.DataFrame(
        {
            "rlnImageName": [
                f"{index + 1:06d}@{stack}.mrcs"
                for index, stack in zip(particles.image_index, particles.stack_index, strict=True)
            ],
            "rlnOpticsGroup": particles.optics_index + 1,
            **{f"rlnAngle{name}": euler_deg[:, axis] for axis, name in enumerate(("Rot", "Tilt", "Psi"))},
            **{f"rlnOrigin{name}Angst": particles.origin_A[:, axis] for axis, name in enumerate("XY")},
            "rlnDefocusU": particles.defocus_u_A,
            "rlnDefocusV": particles.defocus_v_A,
            "rlnDefocusAngle": np.rad2deg(particles.defocus_angle_rad),
            "rlnRandomSubset": particles.half_set + 1,
        }
    )
    write_star({"optics": optics, "particles": table}, folder / "particles.star")
    axis = (np.arange(box) - box // 2) * pixel_size_A
    density = np.zeros((box,) * 3, np.float32)
    for x, y, z in positions_A:
        shape = [np.exp(-((axis - centre) ** 2) / (2 * SIGMA_A**2)) for centre in (z, y, x)]
        density += (shape[0][:, None, None] * shape[1][:, None] * shape[2]).astype(np.float32)
    write_map(folder / "consensus.mrc", density, pixel_size_A)
    write_map(folder / "mask.mrc", (density > 1e-4).astype(np.float32), pixel_size_A)


def prepare(folder, out, **settings):
    prepare_particles(
        folder / "particles.star", folder / "consensus.mrc", out, mask=folder / "mask.mrc",
        settings=PrepareSettings(**settings),
    )  # fmt: skip
    return out


def predictions(batch, source, folder):
    """transfer * projection of the consensus, at the source's box."""
    sub = "full/" if source.box == read_json(folder / "prepared.json")["crop_box"] else ""
    volume, mask = (read_map(folder / f"{sub}{name}.mrc") for name in ("consensus", "mask"))
    mesh = single_cell_mesh(source.box * source.pixel_size_A)
    voxels = VoxelTensors.from_mesh_voxels(voxelise(mesh, mask.data > 0, source.pixel_size_A))
    vertices_A = torch.as_tensor(mesh.vertices_A, dtype=torch.float32)
    vertices = view_vertices(vertices_A, batch.rotation, batch.origin_px, source.pixel_size_A)
    return batch.transfer * project(gather_volume(volume.data * mask.data, voxels), vertices, voxels, "cubic", 2)


def power(spectra, box, limit):
    """(b,) mean power per pixel between shell 2 and ``limit`` (b,)."""
    radius = plane_radius(box)
    weight = plane_weight(box) * (radius >= 2) * (radius < torch.as_tensor(limit)[:, None, None])
    return ((spectra.abs().square() * weight).sum((1, 2)) / weight.sum((1, 2))).numpy()


COUNT = 80


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Four optics groups; returns the data's and the prepared folder."""
    folder = tmp_path_factory.mktemp("mixed")
    write_set(folder, particles_of(GROUPS, COUNT, atoms()), NOISE, atoms())
    return folder, prepare(folder, folder / "out", train_box=48)


def test_groups_are_brought_to_one_grid(mixed):
    _, out = mixed
    summary = read_json(out / "prepared.json")
    assert (summary["full_box"], summary["full_pixel_size_A"], summary["train_box"]) == (64, 2.0, 48)
    assert [group["side_px"] for group in summary["optics_groups"]] == [64, 52, 64, 64]
    assert [group["ctf_applied"] for group in summary["optics_groups"]] == ["", "", "premultiplied", "phase_flipped"]
    sizes_A = [group.pixel_size_A for group in open_training_images(out).particles.optics]
    np.testing.assert_allclose(sizes_A, [64 * 2 / 48, 52 * 2.5 / 48, 64 * 2 / 48, 64 * 2 / 48])
    assert read_map(out / "mask.mrc").box == 48 and read_map(out / "full/mask.mrc").box == 64


def test_images_tell_the_sign_of_odd_aberrations(mixed, tmp_path, caplog):
    folder, _ = mixed
    caplog.set_level("INFO")
    prepare(folder, tmp_path / "right", train_box=48)
    assert "optics group coarse: odd aberrations as given fit better" in caplog.text
    assert "of the opposite sign better" not in caplog.text
    blocks = starfile.read(folder / "particles.star")
    blocks["optics"][["rlnBeamTiltX", "rlnBeamTiltY"]] *= -1
    blocks["particles"]["rlnImageName"] = blocks["particles"]["rlnImageName"].str.replace("@", f"@{folder}/")
    write_star(blocks, tmp_path / "wrong.star")
    prepare_particles(
        tmp_path / "wrong.star", folder / "consensus.mrc", tmp_path / "wrong", mask=folder / "mask.mrc",
        settings=PrepareSettings(train_box=48),
    )  # fmt: skip
    warned = [record.message for record in caplog.records if "of the opposite sign better" in record.message]
    assert len(warned) == 1 and "optics group coarse:" in warned[0]


def test_noise_of_each_group_is_its_own(mixed):
    _, out = mixed
    with (out / "noise.csv").open() as file:
        rows = list(csv.DictReader(file))
    for group, expected in enumerate(NOISE, 1):
        sigma = np.array([float(row["sigma"]) for row in rows if int(row["group"]) == group])
        assert len(sigma) == 32
        np.testing.assert_allclose(sigma[4:], expected, rtol=0.06)


@pytest.mark.parametrize("open_images", [open_training_images, open_full_images])
def test_every_group_is_predicted_to_the_noise(mixed, open_images):
    _, out = mixed
    source = open_images(out)
    batch = source.batch(np.arange(len(source)))
    predicted = predictions(batch, source, out)
    sides = np.array([64, 52, 64, 64])
    limit = np.minimum(source.box, sides)[source.particles.optics_index] / 2
    residual, raw = power(batch.images - predicted, source.box, limit), power(batch.images, source.box, limit)
    beyond = plane_radius(source.box)[None] >= torch.as_tensor(limit)[:, None, None]
    assert not batch.images[beyond].any() and not batch.transfer[beyond].any()
    for group in range(4):
        members = source.particles.optics_index == group
        assert raw[members].mean() > 20, "signal that only an exact prediction explains"
        assert residual[members].mean() == pytest.approx(1, abs=0.08), GROUPS[group].name


def test_the_test_would_tell_a_wrong_magnification(mixed):
    """The coarse group's images are 1.6 % off the nominal pixel size, and one group has a magnification matrix."""
    _, out = mixed
    source = open_full_images(out)
    batch = source.batch(np.arange(len(source)))
    nominal = replace(batch, rotation=torch.as_tensor(source.particles.rotation, dtype=torch.float32))
    residual = power(batch.images - predictions(nominal, source, out), source.box, np.full(len(source), 26.0))
    by_group = [residual[source.particles.optics_index == group].mean() for group in range(4)]
    assert by_group[0] < 1.1 and by_group[2] < 1.1
    assert by_group[1] > 1.4 and by_group[3] > 1.4


def test_phase_flips_and_premultiplication_are_undone(tmp_path):
    """The same recorded images, treated three ways, give the same training images where the CTF is not nearly zero."""
    stacks, ctf = {}, None
    for applied in ("", "premultiplied", "phase_flipped"):
        groups = (optics_group("a", 2.0, 64, applied),)
        particles = particles_of(groups, 60, atoms())
        folder = tmp_path / (applied or "recorded")
        folder.mkdir()
        write_set(folder, particles, (1.0,), atoms())
        source = open_training_images(prepare(folder, folder / "out", train_box=64))
        stacks[applied] = source.batch(np.arange(60)).images
        ctf = ctf_images(particles, np.arange(60), 64)
    clear = (ctf.abs() > 0.1) & (plane_radius(64) < 32) & (plane_radius(64) > 0)
    for applied in ("premultiplied", "phase_flipped"):
        difference = (stacks[applied] - stacks[""])[clear].abs()
        assert float(difference.square().sum() / stacks[""][clear].abs().square().sum()) < 1e-5, applied
    near_zero = stacks["premultiplied"][(ctf.abs() < 0.02) & (plane_radius(64) < 32)].abs()
    assert float(near_zero.max()) < 6, "a zero of the CTF is not blown up"


@pytest.mark.parametrize("name", ["T", "C3"])
def test_symmetry_gives_every_image_all_its_poses(tmp_path, name):
    positions_A = atoms(name)
    particles = particles_of((GROUPS[0],), 60, positions_A)
    write_set(tmp_path, particles, (5.0,), positions_A)
    out = prepare(tmp_path, tmp_path / "out", train_box=48, symmetry=name, max_particles=50)
    copies = len(symmetry_rotations(name))
    summary = read_json(out / "prepared.json")
    assert (summary["symmetry"], summary["symmetry_copies"], summary["num_particles"]) == (name, copies, 50)
    assert summary["num_rows"] == 50 * copies
    with mrcfile.mmap(out / "train.mrcs") as file:
        assert len(file.data) == 50
    table = starfile.read(out / "particles.star")["particles"]
    assert table["flexSymmetryCopy"].tolist() == list(range(copies)) * 50
    assert (table.groupby("rlnImageName")[["flexInputRow", "rlnRandomSubset", "flexImageName"]].nunique() == 1).all(
        axis=None
    )
    assert table["rlnImageName"].nunique() == 50
    for source in (open_training_images(out), open_full_images(out)):
        batch = source.batch(np.arange(len(source)))
        residual = power(
            batch.images - predictions(batch, source, out), source.box, np.full(len(source), source.box / 2)
        )
        assert residual.max() < 1.5 and residual.mean() == pytest.approx(1, abs=0.05)
        first = read_particles(tmp_path / "particles.star").rotation[table["flexInputRow"].to_numpy()[::copies]]
        np.testing.assert_allclose(source.particles.rotation[::copies], first, atol=1e-6)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_particles(tmp_path):
    """442 MB more to read and as much more to write: the peak grows by less than half of either alone.

    What grows is the metadata's rows (some 60 MB) and what the allocator happens to hold (as much, either way).
    """
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "bench_prepare.py"
    spec = importlib.util.spec_from_file_location("bench_prepare", path)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    peaks = []
    for count in (9000, 36000):
        bench.make_particles(tmp_path / str(count), count, 64, distinct=60)
        peaks.append(bench.measure(tmp_path / str(count), 64)["peak_bytes"])
    assert peaks[1] - peaks[0] < 220e6, peaks
