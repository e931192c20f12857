"""MRC stacks as programs write them: every pixel type, odd headers, and one clear line for what cannot be read."""

import bz2
import gzip
import logging
import struct

import mrcfile
import numpy as np
import pandas as pd
import pytest

from flexlib.errors import InputError
from flexlib.images.stack import open_stacks, read_stack_header
from flexlib.particles import read_particles
from flexlib.particles.star_write import write_star

BOX, COUNT = 6, 4
MODES = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}


def write_mrc(
    path, mode=2, order="<", imod_flags=None, stamp=True, pixel_size_A=1.5, extended=0, shape=None, dtype=None
):
    """A stack written byte by byte; returns its images."""
    count, ny, nx = shape or (COUNT, BOX, BOX)
    values = np.arange(count * ny * nx).reshape(count, ny, nx) % 250
    dtype = np.dtype(dtype or MODES.get(mode, "f4"))
    data = values.astype(dtype)
    header = bytearray(1024)
    struct.pack_into(f"{order}10i", header, 0, nx, ny, count, mode, 0, 0, 0, nx, ny, count)
    struct.pack_into(f"{order}3f", header, 40, *(pixel_size_A * side for side in (nx, ny, count)))
    struct.pack_into(f"{order}3i", header, 64, 1, 2, 3)
    struct.pack_into(f"{order}i", header, 92, extended)
    if imod_flags is not None:
        struct.pack_into(f"{order}2i", header, 152, 1146047817, imod_flags)
    if stamp:
        header[208:216] = b"MAP " + (b"\x44\x44\0\0" if order == "<" else b"\x11\x11\0\0")
    path.write_bytes(bytes(header) + bytes(extended) + data.astype(dtype.newbyteorder(order)).tobytes())
    return data.real.astype(np.float32)


def star_of(folder, names, groups=None, optics=None):
    """A STAR file of the images ``names``."""
    count = len(names)
    groups = groups or [1] * count
    optics = optics or {
        "rlnOpticsGroup": sorted(set(groups)),
        "rlnVoltage": 300.0,
        "rlnSphericalAberration": 2.7,
        "rlnAmplitudeContrast": 0.1,
        "rlnImagePixelSize": 1.5,
    }
    angles = {f"rlnAngle{name}": 0.0 for name in ("Rot", "Tilt", "Psi")}
    columns = angles | {"rlnOriginXAngst": 0.0, "rlnOriginYAngst": 0.0, "rlnDefocusU": 1e4, "rlnDefocusV": 1e4}
    table = pd.DataFrame({"rlnImageName": names, "rlnOpticsGroup": groups, **columns})
    write_star({"optics": pd.DataFrame(optics), "particles": table}, folder / "p.star")
    return read_particles(folder / "p.star")


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("stamp", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_byte_order_and_stamp(tmp_path, mode, order, stamp):
    expected = write_mrc(tmp_path / "a.mrcs", mode, order, stamp=stamp, extended=128)
    stacks, particles = open_stacks(star_of(tmp_path, ["3@a.mrcs", "000001@a.mrcs"]))
    images = stacks.read(particles, np.array([0, 1]))
    assert images.dtype == np.float32
    np.testing.assert_array_equal(images, expected[[2, 0]])


def test_bytes_are_signed_unless_imod_says_otherwise(tmp_path):
    for name, flags, dtype in (
        ("mrc2014", None, "i1"),
        ("imod_signed", 1, "i1"),
        ("imod", 0, "u1"),
        ("imod2", 2, "u1"),
    ):
        expected = write_mrc(tmp_path / f"{name}.mrcs", 0, imod_flags=flags, dtype=dtype)
        header = read_stack_header(tmp_path / f"{name}.mrcs")
        stored = np.fromfile(header.path, header.dtype, offset=header.offset).reshape(expected.shape)
        np.testing.assert_array_equal(stored, expected)
        assert expected.max() > 127 or dtype == "i1"


def test_a_single_image_in_an_mrc_file(tmp_path):
    expected = write_mrc(tmp_path / "one.mrc", 12, shape=(1, BOX, BOX))
    stacks, particles = open_stacks(star_of(tmp_path, ["one.mrc"]))
    np.testing.assert_array_equal(stacks.read(particles, np.array([0]), 4)[0], expected[0, 1:5, 1:5])


def test_odd_headers_are_reported_once(tmp_path, caplog):
    for name in "abc":
        write_mrc(tmp_path / f"{name}.mrcs", stamp=name != "a", pixel_size_A=0.0 if name == "b" else 1.5)
    _, particles = open_stacks(star_of(tmp_path, ["1@a.mrcs", "1@b.mrcs", "1@c.mrcs", "2@a.mrcs"]))
    warned = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warned) == 1
    assert "2 of 3 stacks have odd headers" in warned[0].message
    assert "no map id, no machine stamp; no pixel size (the metadata's is used)" in warned[0].message
    assert particles.optics[0].pixel_size_A == 1.5


def test_mrcfile_reads_the_same(tmp_path):
    expected = write_mrc(tmp_path / "a.mrcs", 12)
    with mrcfile.open(tmp_path / "a.mrcs") as file:
        np.testing.assert_array_equal(file.data, expected)


def compressed(write):
    def write_compressed(path):
        write_mrc(path)
        path.write_bytes(write(path.read_bytes()))

    return write_compressed


def shortened(path):
    write_mrc(path)
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (compressed(gzip.compress), "compressed with gzip: unpack it first"),
        (compressed(bz2.compress), "compressed with bzip2: unpack it first"),
        (shortened, r"truncated: 1599 bytes, its header promises 1600 \(4 images of 6 x 6\)"),
        (lambda path: write_mrc(path, shape=(4, 6, 8)), "images of 8 x 6 pixels, 4 of them: square images are needed"),
        (lambda path: write_mrc(path, 4, dtype="c8"), r"data of type complex64 are not supported \(mode 4\)"),
        (lambda path: write_mrc(path, 101), r"data of type 4-bit integers are not supported \(mode 101\)"),
        (lambda path: write_mrc(path, 77), r"data of type unknown are not supported \(mode 77\)"),
        (lambda path: path.write_bytes(b"MRC?"), r"not a readable MRC stack \(4 bytes, shorter than an MRC header\)"),
        (lambda path: path.write_bytes(bytes(4096)), "its header makes no sense in either byte order"),
        (lambda path: path.mkdir(), "image stack not found"),
        (lambda path: None, "image stack not found: .*bad.mrcs"),
        (lambda path: write_mrc(path, shape=(1, BOX, BOX)), "image 2 of a stack of 1: .*bad.mrcs"),
        (lambda path: write_mrc(path, shape=(4, 8, 8)), r"images of 8 px, others of 6 px in the same optics group"),
    ],
)
def test_a_bad_stack_is_named_with_file_row_and_column(tmp_path, write, message):
    write_mrc(tmp_path / "good.mrcs")
    write(tmp_path / "bad.mrcs")
    particles = star_of(tmp_path, ["1@good.mrcs", "2@good.mrcs", "2@bad.mrcs", "3@bad.mrcs"])
    with pytest.raises(InputError, match=rf"^\S*p\.star: row 3, column rlnImageName: .*{message}") as error:
        open_stacks(particles)
    assert "\n" not in str(error.value)


def test_optics_groups_may_differ_in_box(tmp_path):
    write_mrc(tmp_path / "a.mrcs")
    write_mrc(tmp_path / "b.mrcs", shape=(COUNT, 9, 9))
    particles = star_of(tmp_path, ["1@a.mrcs", "1@b.mrcs"], [1, 2])
    _, particles = open_stacks(particles)
    assert [group.box for group in particles.optics] == [6, 9]


def test_a_box_other_than_stated_is_named(tmp_path):
    write_mrc(tmp_path / "a.mrcs")
    optics = {
        "rlnOpticsGroup": [1],
        "rlnVoltage": 300.0,
        "rlnSphericalAberration": 2.7,
        "rlnAmplitudeContrast": 0.1,
        "rlnImagePixelSize": 1.5,
        "rlnImageSize": 8,
    }
    with pytest.raises(InputError, match=r"p\.star: row 1, column rlnImageSize: 8 px, but the images have 6 px"):
        open_stacks(star_of(tmp_path, ["1@a.mrcs"], optics=optics))
