"""Real metadata and particles with their quirks (`pytest --data DIR`): known answers, and what each file lacks."""

from dataclasses import replace
from pathlib import Path

import mrcfile
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from flexlib.errors import InputError
from flexlib.images.ctf import ctf_images
from flexlib.images.stack import open_stacks, read_stack_header
from flexlib.particles import read_particles
from flexlib.particles.cs_file import read_cs_file
from flexlib.particles.star_text import read_star_text
from flexlib.particles.table import Particles

COMPLETE = {  # file: particles, optics groups, half-sets
    "FinalRefinement-OriginalParticles-PfCRT.star": (5, 1, {0, 1}),
    "cryosparc_P12_J24_001_particles.cs": (2019, 1, {0, 1}),
    "relion31.6opticsgroups.star": (139, 6, {0, 1}),
    "relion31.star": (5, 1, {0}),
    "relion5.star": (17, 1, {0, 1}),
}
WITHOUT_POSES = {
    "cryosparc_J2_particles_exported.cs": "column alignments3D/pose is missing",
    "empiar_10076_7.cs": "column alignments3D/pose is missing",
    "empiar_10076_7.star": "column rlnAngleRot is missing: particles need the poses of a refinement",
}


@pytest.fixture(scope="module")
def folder(request) -> Path:
    return (request.config.getoption("--data") / "real_files").resolve()


def test_every_file_is_spoken_for(folder):
    found = {path.name for suffix in ("star", "cs") for path in folder.glob(f"*.{suffix}")}
    assert found == {*COMPLETE, *WITHOUT_POSES}


@pytest.mark.parametrize("name", COMPLETE)
def test_complete_files_read(folder, name):
    particles = read_particles(folder / name)
    assert (len(particles), len(particles.optics), set(particles.half_set)) == COMPLETE[name]
    products = particles.rotation @ particles.rotation.transpose(0, 2, 1)
    np.testing.assert_allclose(products, np.broadcast_to(np.eye(3), products.shape), atol=1e-6)


@pytest.mark.parametrize("name", WITHOUT_POSES)
def test_files_without_poses_are_refused_in_one_line(folder, name):
    with pytest.raises(InputError, match=WITHOUT_POSES[name]) as error:
        read_particles(folder / name)
    assert str(folder / name) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", [*COMPLETE, *WITHOUT_POSES])
def test_files_come_back_as_they_went_in(folder, tmp_path, name):
    """STAR files byte for byte, also next to an added column; .cs records bit by bit, whole and in part."""
    out = tmp_path / name
    if name.endswith(".star"):
        text = read_star_text(folder / name)
        text.write(out, text.particles)
        assert out.read_bytes() == text.content
        rows = np.arange(len(text.particles))
        text.write(out, text.particles, columns={"flexLatent1": ["0.5"] * len(rows)})
        again = read_star_text(out)
        before, after = text.cells(text.particles, rows), again.cells(again.particles, rows)
        assert [[*cells, b"0.5"] for cells in before] == list(after)
        return
    table = read_cs_file(folder / name)
    table.take(np.arange(0, len(table), 3)).write(out)
    original, written = np.load(folder / name), np.load(out)
    assert written.dtype == original.dtype and written.tobytes() == original[::3].tobytes()


def test_known_answers(folder):
    """Rotations, shifts and CTF rows that an established reader finds, to the precision of the stored floats."""
    particles = read_particles(folder / "cryosparc_P12_J24_001_particles.cs")
    known = np.load(folder / "cryosparc_P12_J24_001_known_answers.npz")
    np.testing.assert_allclose(particles.rotation, known["rotation"], atol=5e-7)
    group = particles.optics[0]
    box_A = group.box * group.pixel_size_A
    np.testing.assert_allclose(particles.origin_A / box_A, known["shift_fraction_of_box"], atol=1e-8)
    count = len(particles)
    one = (group.box, group.pixel_size_A, group.voltage_kV, group.spherical_aberration_mm, group.amplitude_contrast)
    found = np.stack(
        [
            np.full(count, one[0]),
            np.full(count, one[1]),
            particles.defocus_u_A,
            particles.defocus_v_A,
            np.rad2deg(particles.defocus_angle_rad),
            *(np.full(count, value) for value in one[2:]),
            np.rad2deg(particles.phase_shift_rad),
        ],
        1,
    )
    np.testing.assert_allclose(found, known["ctf"], rtol=1e-7, atol=5e-6)


def with_poses(folder: Path, out: Path) -> tuple[Path, Path]:
    """The seven real particles' .star and .cs, which have none, with the same poses in either program's form."""
    rng = np.random.default_rng(0)
    rotation, origin_px = Rotation.random(7, rng=rng), rng.normal(size=(7, 2))
    text = read_star_text(folder / "empiar_10076_7.star")
    columns = dict(
        zip(("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"), rotation.as_euler("ZYZ", degrees=True).T, strict=True)
    )
    columns |= {"rlnOriginX": origin_px[:, 0], "rlnOriginY": origin_px[:, 1]}
    text.write(
        out / "seven.star", text.particles, columns={name: list(map(repr, v.tolist())) for name, v in columns.items()}
    )
    records = np.zeros(7, [("uid", "u8"), ("alignments3D/pose", "f8", (3,)), ("alignments3D/shift", "f8", (2,))])
    records["uid"] = np.load(folder / "empiar_10076_7.cs")["uid"]
    records["alignments3D/pose"], records["alignments3D/shift"] = rotation.as_rotvec(), origin_px
    with (out / "poses.cs").open("wb") as file:
        np.save(file, records[::-1])  # joined on uid
    return out / "seven.star", out / "poses.cs"


def in_float32(particles: Particles) -> Particles:
    """The same particles with CTF parameters as a .cs holds them, angles in radians."""
    names = ("defocus_u_A", "defocus_v_A", "defocus_angle_rad", "phase_shift_rad")
    columns = {name: getattr(particles, name).astype(np.float32).astype(np.float64) for name in names}
    fields = ("voltage_kV", "spherical_aberration_mm", "amplitude_contrast", "pixel_size_A")
    optics = tuple(
        replace(group, **{name: float(np.float32(getattr(group, name))) for name in fields})
        for group in particles.optics
    )
    return replace(particles, optics=optics, **columns)


def test_star_and_cs_of_the_same_particles(folder, tmp_path, caplog):
    """Same images, poses and CTFs; only the .cs knows that these images were never inverted."""
    star_path, poses = with_poses(folder, tmp_path)
    stacks, star = open_stacks(read_particles(star_path, image_root=folder))
    cs_stacks, cs = open_stacks(read_particles(folder / "empiar_10076_7.cs", passthrough=poses))
    assert "odd headers" in caplog.text  # no map id, zero machine stamp, zero pixel size
    rows = np.arange(7)
    images = stacks.read(star, rows)
    np.testing.assert_array_equal(images, cs_stacks.read(cs, rows))
    header = read_stack_header(folder / "empiar_10076_7.mrc")
    stored = np.fromfile(header.path, header.dtype, offset=header.offset)
    np.testing.assert_array_equal(images, stored.reshape(-1, header.box, header.box))
    np.testing.assert_allclose(star.rotation, cs.rotation, atol=1e-12)
    np.testing.assert_allclose(star.origin_A, cs.origin_A, rtol=1e-5, atol=1e-6)
    theirs = ctf_images(cs, rows, 320)
    np.testing.assert_allclose(ctf_images(star, rows, 320), theirs, atol=2e-3)  # the .cs has float32 numbers
    np.testing.assert_allclose(ctf_images(in_float32(star), rows, 320), theirs, atol=1e-6)
    assert (star.contrast_sign == 1).all() and (cs.contrast_sign == -1).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # mrcfile, of the header that RELION wrote
def test_real_images_of_relion_are_read(folder, caplog):
    """Five real particles with an optics table: every image as it stands."""
    stacks, particles = open_stacks(read_particles(folder / "relion31.star"))
    assert "no map id, no machine stamp" in caplog.text
    images = stacks.read(particles, np.arange(5))
    with mrcfile.open(folder / "relion31.mrcs", permissive=True) as file:
        np.testing.assert_array_equal(images, file.data)
    assert (particles.optics[0].box, particles.optics[0].pixel_size_A) == (256, 2.806)


def test_established_reader_of_starfile_agrees(folder):
    import starfile

    for name in (name for name in (*COMPLETE, *WITHOUT_POSES) if name.endswith(".star")):
        text = read_star_text(folder / name)
        blocks = starfile.read(folder / name, always_dict=True)
        ours = text.frame(text.particles)
        theirs = blocks[text.particles.block]
        assert list(ours) == list(theirs)
        for column in ours:
            assert (ours[column].to_numpy() == theirs[column].to_numpy()).all(), (name, column)
