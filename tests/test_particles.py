"""Particle metadata and stacks: conventions by hand, RELION against CryoSPARC, and one clear line for every error."""

import dataclasses

import mrcfile
import numpy as np
import pandas as pd
import pytest
import starfile
from scipy.spatial.transform import Rotation

from flexlib.errors import InputError
from flexlib.images.ctf import even_zernike_index, physical_frequencies, zernike
from flexlib.images.stack import open_stacks, read_stack_header
from flexlib.particles import read_particles
from flexlib.particles.star_write import relion_tables, write_star
from flexlib.particles.table import wavelength_A

COUNT, BOX = 12, 8


@pytest.fixture
def euler_deg():
    return np.random.default_rng(1).uniform([-180, 5, -180], [180, 175, 180], (COUNT, 3))


@pytest.fixture
def blocks(euler_deg):
    """The tables of a RELION 3.1 file of two stacks and two optics groups."""
    rng = np.random.default_rng(2)
    optics = pd.DataFrame(
        {
            "rlnOpticsGroup": [1, 2],
            "rlnOpticsGroupName": ["first", "second"],
            "rlnVoltage": [300.0, 300.0],
            "rlnSphericalAberration": [2.7, 2.7],
            "rlnAmplitudeContrast": [0.07, 0.1],
            "rlnImagePixelSize": [1.5, 1.5],
            "rlnImageSize": [BOX, BOX],
        }
    )
    particles = pd.DataFrame(
        {
            "rlnImageName": [f"{i // 2 + 1:06d}@stacks/{'ab'[i % 2]}.mrcs" for i in range(COUNT)],
            "rlnOpticsGroup": [1 + i // 7 for i in range(COUNT)],
            "rlnAngleRot": euler_deg[:, 0],
            "rlnAngleTilt": euler_deg[:, 1],
            "rlnAnglePsi": euler_deg[:, 2],
            "rlnOriginXAngst": rng.normal(size=COUNT),
            "rlnOriginYAngst": rng.normal(size=COUNT),
            "rlnDefocusU": rng.uniform(1e4, 2e4, COUNT),
            "rlnDefocusV": rng.uniform(1e4, 2e4, COUNT),
            "rlnDefocusAngle": rng.uniform(0, 180, COUNT),
            "rlnPhaseShift": rng.uniform(0, 90, COUNT),
            "rlnRandomSubset": [1 + i % 2 for i in range(COUNT)],
        }
    )
    return {"optics": optics, "particles": particles}


def write_stack(path, count=COUNT // 2, box=BOX, dtype=np.float32):
    path.parent.mkdir(exist_ok=True, parents=True)
    data = np.random.default_rng(3).integers(0, 100, (count, box, box)).astype(dtype)
    with mrcfile.new(path, overwrite=True) as file:
        file.set_data(data)
        file.set_image_stack()
    return data


@pytest.fixture
def star(tmp_path, blocks):
    write_stack(tmp_path / "stacks" / "a.mrcs")
    write_stack(tmp_path / "stacks" / "b.mrcs")
    write_star(blocks, tmp_path / "particles.star")
    return tmp_path / "particles.star"


def cs_table(blocks):
    """The same particles as CryoSPARC stores them."""
    table, optics = blocks["particles"], blocks["optics"]
    group = table["rlnOpticsGroup"].to_numpy() - 1
    euler = table[["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]].to_numpy()
    names = table["rlnImageName"].str.split("@", expand=True)
    columns = {
        "uid": (np.arange(COUNT, dtype=np.uint64) * 7919 + 2**60, "u8", ()),
        "blob/path": ([f">{name}" for name in names[1]], "S32", ()),
        "blob/idx": (names[0].astype(int) - 1, "u4", ()),
        "blob/shape": (np.full((COUNT, 2), BOX), "u4", (2,)),
        "blob/psize_A": (np.full(COUNT, 1.5), "f4", ()),
        "blob/sign": (-np.ones(COUNT), "f4", ()),
        "ctf/exp_group_id": (group + 5, "u4", ()),
        "ctf/accel_kv": (np.full(COUNT, 300), "f4", ()),
        "ctf/cs_mm": (np.full(COUNT, 2.7), "f4", ()),
        "ctf/amp_contrast": (optics["rlnAmplitudeContrast"].to_numpy()[group], "f4", ()),
        "ctf/df1_A": (table["rlnDefocusU"], "f4", ()),
        "ctf/df2_A": (table["rlnDefocusV"], "f4", ()),
        "ctf/df_angle_rad": (np.deg2rad(table["rlnDefocusAngle"]), "f4", ()),
        "ctf/phase_shift_rad": (np.deg2rad(table["rlnPhaseShift"]), "f4", ()),
        "alignments3D/split": (table["rlnRandomSubset"] - 1, "u4", ()),
        "alignments3D/shift": (table[["rlnOriginXAngst", "rlnOriginYAngst"]] / 3.0, "f4", (2,)),
        "alignments3D/pose": (Rotation.from_euler("ZYZ", euler, degrees=True).as_rotvec(), "f4", (3,)),
        "alignments3D/psize_A": (np.full(COUNT, 3.0), "f4", ()),
        "alignments3D/alpha": (np.linspace(0.5, 1.5, COUNT), "f4", ()),
    }
    array = np.zeros(COUNT, [(name, kind, shape) for name, (_, kind, shape) in columns.items()])
    for name, (values, _, _) in columns.items():
        array[name] = values
    return array


def write_cs(path, table):
    with path.open("wb") as file:
        np.save(file, table)
    return path


def without(table, prefix, keep=("uid",)):
    return table[[name for name in table.dtype.names if not name.startswith(prefix) or name in keep]]


def test_rotation_by_hand(star, blocks):
    """RELION's rot turns the map about z: at rot 90 the map's x axis is seen along -y; tilt 90 shows z along -x."""
    table = blocks["particles"]
    table.loc[0, ["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]] = [90.0, 0.0, 0.0]
    table.loc[1, ["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]] = [0.0, 90.0, 0.0]
    write_star(blocks, star)
    rotation = read_particles(star).rotation
    np.testing.assert_allclose(rotation[0] @ [1, 0, 0], [0, -1, 0], atol=1e-12)
    np.testing.assert_allclose(rotation[1] @ [0, 0, 1], [-1, 0, 0], atol=1e-12)
    np.testing.assert_allclose(rotation[1] @ [1, 0, 0], [0, 0, 1], atol=1e-12)


def test_star_and_cs_agree(star, blocks, tmp_path):
    relion = read_particles(star)
    cryosparc = read_particles(write_cs(tmp_path / "particles.cs", cs_table(blocks)))
    for field in dataclasses.fields(relion):
        one, other = getattr(relion, field.name), getattr(cryosparc, field.name)
        if isinstance(one, np.ndarray) and field.name not in ("contrast_sign", "stack_index"):
            np.testing.assert_allclose(one, other, rtol=2e-7, atol=2e-6, err_msg=field.name)
    for one, other in zip(relion.optics, cryosparc.optics, strict=True):
        assert other.amplitude_contrast == pytest.approx(one.amplitude_contrast)
        assert (other.box, other.pixel_size_A) == (one.box, one.pixel_size_A)
    assert [relion.stack_paths[i] for i in relion.stack_index] == [
        cryosparc.stack_paths[i] for i in cryosparc.stack_index
    ]
    assert (relion.contrast_sign == 1).all() and (cryosparc.contrast_sign == -1).all()
    np.testing.assert_allclose(cryosparc.particle_scale, np.linspace(0.5, 1.5, COUNT), rtol=1e-6)
    assert set(relion.half_set) == {0, 1}
    np.testing.assert_allclose(relion.defocus_angle_rad, np.deg2rad(blocks["particles"]["rlnDefocusAngle"]))


def test_passthrough_is_joined_on_uid(blocks, star, tmp_path):
    table = cs_table(blocks)
    whole = read_particles(write_cs(tmp_path / "whole.cs", table))
    main = write_cs(tmp_path / "main.cs", without(table, "ctf/"))
    shuffled = without(table, ("blob/", "alignments3D/"))[np.random.default_rng(4).permutation(COUNT)]
    joined = read_particles(main, passthrough=write_cs(tmp_path / "pass.cs", shuffled))
    np.testing.assert_array_equal(joined.defocus_u_A, whole.defocus_u_A)
    np.testing.assert_array_equal(joined.optics_index, whole.optics_index)
    missing = shuffled[shuffled["uid"] != table["uid"][3]]
    with pytest.raises(InputError, match=r"main\.cs: row 4, column uid"):
        read_particles(main, passthrough=write_cs(tmp_path / "pass.cs", missing))


def test_relion_30_style(blocks, tmp_path):
    """One table: origins in pixels, pixel size from detector and magnification, optics by equal values."""
    old = blocks["particles"].drop(columns=["rlnOpticsGroup", "rlnOriginXAngst", "rlnOriginYAngst"])
    old["rlnOriginX"], old["rlnOriginY"] = np.arange(COUNT) / 4, -np.arange(COUNT) / 2
    old["rlnDetectorPixelSize"], old["rlnMagnification"] = 5.0, 10000.0
    old["rlnVoltage"], old["rlnSphericalAberration"] = 300.0, 2.7
    old["rlnAmplitudeContrast"] = [0.07] * 7 + [0.1] * 5
    write_star({"": old}, tmp_path / "old.star")
    particles = read_particles(tmp_path / "old.star")
    assert [group.pixel_size_A for group in particles.optics] == [5.0, 5.0]
    np.testing.assert_allclose(particles.origin_A[:, 0], np.arange(COUNT) * 5 / 4)
    np.testing.assert_allclose(particles.origin_A[:, 1], -np.arange(COUNT) * 5 / 2)
    np.testing.assert_array_equal(particles.optics_index, [0] * 7 + [1] * 5)


def test_columns_may_be_in_the_other_table(blocks, star):
    new = read_particles(star)
    blocks["particles"]["rlnVoltage"] = 300.0
    blocks["optics"] = blocks["optics"].drop(columns="rlnVoltage")
    blocks["optics"]["rlnPhaseShift"] = [10.0, 20.0]
    blocks["particles"] = blocks["particles"].drop(columns="rlnPhaseShift")
    write_star(blocks, star)
    moved = read_particles(star)
    assert moved.optics == new.optics
    np.testing.assert_allclose(np.rad2deg(moved.phase_shift_rad), [10.0] * 7 + [20.0] * 5)


def test_optional_columns(blocks, star):
    blocks["particles"] = blocks["particles"].drop(columns=["rlnRandomSubset", "rlnPhaseShift"])
    blocks["optics"] = blocks["optics"].assign(
        rlnBeamTiltX=0.1, rlnBeamTiltY=-0.2, rlnOddZernike="[1,2,3.5]", rlnMagMat00=1.01, rlnMagMat01=0.02,
        rlnMagMat10=0.03, rlnMagMat11=0.99,
    )  # fmt: skip
    write_star(blocks, star)
    particles = read_particles(star)
    assert (particles.half_set == -1).all() and (particles.phase_shift_rad == 0).all()
    group = particles.optics[0]
    assert group.beam_tilt_mrad == (0.1, -0.2) and group.odd_zernike == (1.0, 2.0, 3.5) and group.even_zernike == ()
    assert group.magnification_matrix == ((1.01, 0.02), (0.03, 0.99))


def test_relion_tables_round_trip(blocks, star, tmp_path):
    cryosparc = read_particles(write_cs(tmp_path / "particles.cs", cs_table(blocks)))
    write_star(relion_tables(cryosparc), tmp_path / "converted.star")
    back = read_particles(tmp_path / "converted.star")
    for field in dataclasses.fields(back):
        one, other = getattr(cryosparc, field.name), getattr(back, field.name)
        if isinstance(other, np.ndarray) and field.name != "stack_index":
            np.testing.assert_allclose(one, other, rtol=1e-7, atol=1e-7, err_msg=field.name)
    assert [back.stack_paths[i] for i in back.stack_index] == [cryosparc.stack_paths[i] for i in cryosparc.stack_index]


def test_half_sets_of_one_value_are_none(blocks, star, tmp_path):
    table = cs_table(blocks)
    table["alignments3D/split"] = 0
    assert (read_particles(write_cs(tmp_path / "particles.cs", table)).half_set == -1).all()


def with_columns(table, **columns):
    """The .cs records with further float32 columns ``ctf/<name>``, the same in every row."""
    kinds = [(f"ctf/{name}", "f4", np.shape(values)) for name, values in columns.items()]
    result = np.zeros(len(table), [*table.dtype.descr, *kinds])
    for name in table.dtype.names:
        result[name] = table[name]
    for name, values in columns.items():
        result[f"ctf/{name}"] = values
    return result


def test_aberrations_of_cryosparc(blocks, tmp_path):
    """Tilt of Cs * t radians is RELION's beam tilt t; trefoil is -(2 pi / 3) lambda^2 k^3 (cos 3th, sin 3th)."""
    table = with_columns(cs_table(blocks), tilt_A=[2700.0, -5400.0], trefoil_A=[3.0, 4.0])
    group = read_particles(write_cs(tmp_path / "particles.cs", table)).optics[0]
    np.testing.assert_allclose(group.beam_tilt_mrad, [0.1, -0.2], rtol=1e-6)
    strength = -2 * np.pi / 3 * wavelength_A(300.0) ** 2
    np.testing.assert_allclose(group.odd_zernike, [0, 0, 4 * strength, 0, 0, 3 * strength], rtol=1e-6)


def test_tetrafoil_of_cryosparc(blocks, tmp_path):
    """2 pi lambda^3 k^4 (t0 cos 2th + t1 sin 2th) + pi/2 lambda^3 k^4 (t2 cos 4th + t3 sin 4th), whatever the basis."""
    tetra = np.array([900.0, -500.0, 700.0, 300.0])
    table = with_columns(cs_table(blocks), tetra_A=tetra)
    group = read_particles(write_cs(tmp_path / "particles.cs", table)).optics[0]
    k, theta = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.3, 1.9, -2.2, 3.0])
    angles = [np.cos(2 * theta), np.sin(2 * theta), np.cos(4 * theta), np.sin(4 * theta)]
    cube = wavelength_A(300.0) ** 3
    expected = k**4 * cube * (np.array([2, 2, 0.5, 0.5]) * np.pi * tetra @ angles)
    kx, ky = k * np.cos(theta), k * np.sin(theta)
    found = sum(value * zernike(*even_zernike_index(at), kx, ky) for at, value in enumerate(group.even_zernike))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert np.abs(expected).max() > 1e-4


def test_anisomag_of_cryosparc_is_a_magnification_in_real_space(blocks, tmp_path):
    """A pixel size p2 called p1 is anisomag p2/p1 - 1 (CryoSPARC's own example): the same physical frequencies."""
    base = cs_table(blocks)
    relabelled = with_columns(base, anisomag=[0.02, 0.0, 0.0, 0.02])
    relabelled["blob/psize_A"] = base["blob/psize_A"] / 1.02
    one, other = (
        physical_frequencies(group, BOX, group.pixel_size_A)
        for group in (read_particles(write_cs(tmp_path / "a.cs", table)).optics[0] for table in (base, relabelled))
    )
    np.testing.assert_allclose(one, other, rtol=1e-6)
    turned = with_columns(base, anisomag=[0.03, 0.01, -0.02, 0.0])
    matrix = read_particles(write_cs(tmp_path / "b.cs", turned)).optics[0].magnification_matrix
    np.testing.assert_allclose(np.linalg.inv(matrix).T, [[1.03, 0.01], [-0.02, 1.0]], rtol=1e-6)


def test_shift_of_cryosparcs_ctf_is_taken_off(blocks, tmp_path):
    base = cs_table(blocks)
    plain, shifted = (
        read_particles(write_cs(tmp_path / "a.cs", table)).origin_A
        for table in (base, with_columns(base, shift_A=[0.5, -1.5]))
    )
    np.testing.assert_allclose(plain - shifted, np.broadcast_to([0.5, -1.5], plain.shape), rtol=1e-6)


@pytest.mark.parametrize(
    ("table", "column", "values", "message"),
    [
        ("particles", "rlnAngleRot", None, "column rlnAngleRot is missing"),
        ("particles", "rlnDefocusU", None, "column rlnDefocusU is missing"),
        ("optics", "rlnVoltage", None, "column rlnVoltage is missing"),
        ("optics", "rlnImagePixelSize", None, "rlnImagePixelSize is missing"),
        ("particles", "rlnImageName", None, "no particle table"),
        ("particles", "rlnAnglePsi", ["1"] * 4 + ["x"] * 8, "row 5, column rlnAnglePsi: x"),
        ("particles", "rlnDefocusV", [1.0, np.nan] * 6, "row 2, column rlnDefocusV: nan"),
        ("particles", "rlnRandomSubset", [1, 2, 3] * 4, "row 3, column rlnRandomSubset: 3"),
        ("particles", "rlnOpticsGroup", [1] * 5 + [4] * 7, "row 6, column rlnOpticsGroup: group 4 is not in"),
        ("particles", "rlnImageName", ["0@stacks/a.mrcs"] * 12, "row 1, column rlnImageName"),
        ("optics", "rlnOddZernike", "[1,a]", "row 1, column rlnOddZernike"),
        ("optics", "rlnVoltage", 0, "row 1, column rlnVoltage: 0 must be positive"),
    ],
)
def test_star_errors_name_row_and_column(blocks, star, table, column, values, message):
    if values is None:
        blocks[table].pop(column)
    else:
        blocks[table][column] = values
    write_star(blocks, star)
    with pytest.raises(InputError, match=message) as error:
        read_particles(star)
    assert str(star) in str(error.value) and "\n" not in str(error.value)


def test_cs_errors(blocks, tmp_path):
    table, path = cs_table(blocks), tmp_path / "particles.cs"
    with pytest.raises(InputError, match=r"column alignments3D/pose is missing"):
        read_particles(write_cs(path, without(table, "alignments3D/pose")))
    broken = table.copy()
    broken["alignments3D/pose"][6, 1] = np.nan
    with pytest.raises(InputError, match=r"row 7, column alignments3D/pose"):
        read_particles(write_cs(path, broken))
    broken = table.copy()
    broken["blob/sign"][2] = 0
    with pytest.raises(InputError, match=r"row 3, column blob/sign: 0"):
        read_particles(write_cs(path, broken))
    path.write_bytes(b"\x95CSDAT and more")
    with pytest.raises(InputError, match="header of the compressed stream cannot be read"):
        read_particles(path)
    path.write_bytes(b"not an array")
    with pytest.raises(InputError, match="not a readable"):
        read_particles(path)
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], object), allow_pickle=True)
    (tmp_path / "objects.npy").rename(path)
    with pytest.raises(InputError, match="Python objects"):  # pickles are never loaded
        read_particles(path)


def test_unknown_files(tmp_path):
    with pytest.raises(InputError, match="not found"):
        read_particles(tmp_path / "none.star")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(InputError, match=r"must end in \.star"):
        read_particles(tmp_path / "a.txt")
    (tmp_path / "a.star").write_text("nothing of the kind\n")
    with pytest.raises(InputError, match="no particle table"):
        read_particles(tmp_path / "a.star")


def test_image_paths_are_found_in_parents_and_root(blocks, star, tmp_path):
    deep = tmp_path / "Refine3D" / "job007" / "run_data.star"
    deep.parent.mkdir(parents=True)
    write_star(blocks, deep)
    assert read_particles(deep).stack_paths[0] == tmp_path / "stacks" / "a.mrcs"
    elsewhere = tmp_path / "elsewhere"
    write_stack(elsewhere / "stacks" / "a.mrcs")
    assert read_particles(star, image_root=elsewhere).stack_paths[0] == elsewhere / "stacks" / "a.mrcs"


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.uint16, np.float16, np.float32, ">f4", ">i2"])
def test_stack_modes(star, dtype):
    folder = star.parent / "stacks"
    expected = {name: write_stack(folder / f"{name}.mrcs", dtype=dtype) for name in "ab"}
    stacks, particles = open_stacks(read_particles(star))
    rows = np.array([5, 0, 11])
    images = stacks.read(particles, rows)
    assert images.dtype == np.float32 and images.shape == (3, BOX, BOX)
    np.testing.assert_array_equal(images, [expected["b"][2], expected["a"][0], expected["b"][5]])
    cropped = stacks.read(particles, rows, 4)
    np.testing.assert_array_equal(cropped, images[:, 2:6, 2:6])  # pixel 4 (8//2) becomes pixel 2 (4//2)


def test_headers_without_stamp_and_pixel_size_are_read(star, caplog):
    path = star.parent / "stacks" / "a.mrcs"
    expected = write_stack(path)
    content = bytearray(path.read_bytes())
    content[208:216] = bytes(8)  # map id and machine stamp
    content[40:52] = bytes(12)  # cell lengths: pixel size 0
    path.write_bytes(content)
    stacks, particles = open_stacks(read_particles(star))
    np.testing.assert_array_equal(stacks.read(particles, np.array([2]))[0], expected[1])
    assert "no map id, no machine stamp, no pixel size" in caplog.text


def test_stack_errors(blocks, star):
    stack = star.parent / "stacks" / "b.mrcs"
    content = stack.read_bytes()
    stack.write_bytes(content[:-10])
    with pytest.raises(InputError, match=r"particles\.star: row 2, column rlnImageName: .*b\.mrcs: truncated"):
        open_stacks(read_particles(star))
    stack.write_bytes(content[:500])
    with pytest.raises(InputError, match=r"row 2, column rlnImageName: .*not a readable MRC stack"):
        open_stacks(read_particles(star))
    stack.unlink()
    with pytest.raises(InputError, match=r"row 2, column rlnImageName: image stack not found"):
        open_stacks(read_particles(star))
    write_stack(stack, count=3)
    with pytest.raises(InputError, match=r"row 8, column rlnImageName: image 4 of a stack of 3"):
        open_stacks(read_particles(star))
    write_stack(stack, box=10)
    with pytest.raises(InputError, match=r"row 2, column rlnImageName: images of 10 px, others of 8 px"):
        open_stacks(read_particles(star))
    write_stack(star.parent / "stacks" / "a.mrcs", box=10)
    with pytest.raises(InputError, match=r"row 1, column rlnImageSize: 8 px, but the images have 10 px"):
        open_stacks(read_particles(star))
    with mrcfile.new(stack, overwrite=True) as file:
        file.set_data(np.zeros((6, 8, 8), np.complex64))
    with pytest.raises(InputError, match="complex64 are not supported"):
        read_stack_header(stack)


def test_starfile_reads_what_is_written(blocks, star):
    again = starfile.read(star)
    assert list(again) == ["optics", "particles"]
    np.testing.assert_allclose(again["particles"]["rlnDefocusU"], blocks["particles"]["rlnDefocusU"], rtol=1e-8)


def test_image_names_of_every_kind(blocks, star):
    """Without a slice, with RELION's :mrcs, with the other suffix, quoted; .mrc where only that exists."""
    folder = star.parent / "stacks"
    (folder / "b.mrcs").rename(folder / "b.mrc")
    write_stack(star.parent / "two words" / "c.mrcs")
    names = ["stacks/a.mrcs", "2@stacks/a.mrcs:mrcs", "0003@stacks/b.mrcs", "4@stacks/b.mrc:mrcs", "5@two words/c.mrc"]
    blocks["particles"] = blocks["particles"].iloc[: len(names)].assign(rlnImageName=names)
    write_star(blocks, star)
    particles = read_particles(star)
    assert particles.image_index.tolist() == [0, 1, 2, 3, 4]
    found = [particles.stack_paths[at].relative_to(star.parent).as_posix() for at in particles.stack_index]
    assert found == ["stacks/a.mrcs", "stacks/a.mrcs", "stacks/b.mrc", "stacks/b.mrc", "two words/c.mrcs"]
    write_star(relion_tables(particles), star.parent / "again.star")
    assert read_particles(star.parent / "again.star").image_index.tolist() == [0, 1, 2, 3, 4]


def test_each_optics_group_has_its_own_microscope(blocks, star):
    blocks["optics"] = blocks["optics"].assign(
        rlnVoltage=[300.0, 200.0],
        rlnSphericalAberration=[2.7, 0.01],
        rlnImagePixelSize=[1.5, 0.75],
        rlnImageSize=[8, 16],
    )
    write_star(blocks, star)
    first, second = read_particles(star).optics
    assert (first.voltage_kV, first.spherical_aberration_mm, first.pixel_size_A, first.box) == (300.0, 2.7, 1.5, 8)
    assert (second.voltage_kV, second.spherical_aberration_mm, second.pixel_size_A, second.box) == (
        200.0,
        0.01,
        0.75,
        16,
    )


def test_wide_cs_headers(blocks, tmp_path):
    """NumPy alone refuses headers beyond 10,000 characters, which CryoSPARC's widest files exceed."""
    base = cs_table(blocks)
    wide = np.zeros(COUNT, [*base.dtype.descr, *((f"alignments_class_{k}/class_posterior", "f4") for k in range(400))])
    for name in base.dtype.names:
        wide[name] = base[name]
    path = write_cs(tmp_path / "wide.cs", wide)
    with pytest.raises(ValueError, match="large"):
        np.load(path)
    np.testing.assert_array_equal(
        read_particles(path).rotation, read_particles(write_cs(tmp_path / "a.cs", base)).rotation
    )


def test_passthrough_errors_name_the_passthrough(blocks, tmp_path):
    table = cs_table(blocks)
    main = write_cs(tmp_path / "main.cs", without(table, "ctf/"))
    other = without(table, ("blob/", "alignments3D/"))[::-1].copy()
    other["ctf/df1_A"][0] = np.inf  # the main file's last row
    with pytest.raises(InputError, match=rf"main\.cs: row {COUNT}, column ctf/df1_A \(of .*pass\.cs\): inf"):
        read_particles(main, passthrough=write_cs(tmp_path / "pass.cs", other))
    other["uid"][5] = other["uid"][2]
    with pytest.raises(InputError, match=r"pass\.cs: row 6, column uid: \d+ stands in row 3 already"):
        read_particles(main, passthrough=write_cs(tmp_path / "pass.cs", other))
