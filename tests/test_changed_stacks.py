"""Image stacks that hold other images than when prepare read them: refused before anything is computed from them."""

import os
import shutil
from pathlib import Path

import mrcfile
import numpy as np
import pytest

from flexlib.errors import InputError
from flexlib.images.sources import open_full_images
from flexlib.layout import ParticlesFolder
from flexlib.particles.star import read_tables
from flexlib.particles.star_write import write_star
from flexlib.prepare import prepare_particles
from flexlib.reconstruct import reconstruct
from flexlib.simulate import Simulation, simulate_particles
from flexlib.workflow_support.settings import MaskSettings, PrepareSettings, ReconstructSettings

COUNT = 60


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("changed")
    truth = simulate_particles(folder / "data", Simulation(num_particles=COUNT, box=32, pixel_size_A=8.0, snr=1.0))
    prepare_particles(
        truth.particles_star,
        truth.consensus,
        folder / "particles",
        settings=PrepareSettings(train_box=16),
        mask_settings=MaskSettings(lowpass_A=30.0, dilate_A=8.0, pad_A=16.0),
    )
    return folder


@pytest.fixture
def prepared(original):
    """The prepared folder and its stack, whose content is put back afterwards."""
    stack = open_full_images(original / "particles").particles.stack_paths[0]
    content = stack.read_bytes()
    yield original / "particles", stack
    stack.write_bytes(content)


def change(stack: Path, edit) -> None:
    with mrcfile.mmap(stack, "r+") as file:
        edit(file.data)


def test_stack_in_another_order_is_refused_by_reconstruction(prepared, tmp_path):
    particles, stack = prepared
    change(stack, lambda data: data.__setitem__(slice(None), data[::-1].copy()))
    with pytest.raises(InputError, match="the image stacks have changed since prepare: run it again") as refused:
        reconstruct(particles, tmp_path / "never read", tmp_path / "out", ReconstructSettings())
    message = str(refused.value)
    assert "\n" not in message and message.startswith(f"{stack}: image 1 is not the one that prepare read")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("index", [0, COUNT // 2, COUNT - 1])
def test_single_replaced_image_of_the_sample_is_refused_by_its_number(prepared, index):
    particles, stack = prepared
    change(stack, lambda data: data[index].__iadd__(np.float32(1e-3)))
    with pytest.raises(InputError, match=rf"{stack.name}: image {index + 1} is not the one that prepare read"):
        open_full_images(particles)


def test_equal_pixels_go_on_in_whatever_file(prepared):
    particles, stack = prepared
    expected = open_full_images(particles).whitened(np.arange(COUNT))
    os.utime(stack, (1, 1))
    copied = shutil.copy(stack, stack.with_suffix(".copy"))
    stack.unlink()
    Path(copied).rename(stack)
    pixels = mrcfile.read(stack)
    with mrcfile.new(stack, pixels.astype(">f4"), overwrite=True) as file:  # the other byte order
        file.set_image_stack()
    assert (open_full_images(particles).whitened(np.arange(COUNT)) == expected).all()


def test_folder_without_checksums_goes_on(prepared, tmp_path):
    """As older versions have prepared."""
    particles, stack = prepared
    older = shutil.copytree(particles, tmp_path / "older")
    path = ParticlesFolder(older).particles
    tables = read_tables(path)
    write_star({"optics": tables.optics, "particles": tables.particles.drop(columns="flexImageDigest")}, path)
    change(stack, lambda data: data.__setitem__(slice(None), data[::-1].copy()))
    assert len(open_full_images(older)) == COUNT


def test_checksums_that_look_like_numbers_are_read_as_text(prepared, tmp_path):
    """Sixteen decimal digits, or 1e15 and infinity to a reader of numbers."""
    particles, _ = prepared
    changed = shutil.copytree(particles, tmp_path / "digits")
    path = ParticlesFolder(changed).particles
    tables = read_tables(path)
    tables.particles["flexImageDigest"] = ["0000000000000012", "12e4567890123456"] * (COUNT // 2)
    write_star({"optics": tables.optics, "particles": tables.particles}, path)
    assert read_tables(path).particles["flexImageDigest"].tolist() == tables.particles["flexImageDigest"].tolist()
