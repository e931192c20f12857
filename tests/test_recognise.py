"""Image stacks that are not what they were when prepare read them: noticed where they are read again."""

import os
import shutil

import mrcfile
import numpy as np
import pytest

from flexlib.errors import InputError
from flexlib.images.sources import open_full_images
from flexlib.layout import ParticlesFolder, SimulationFolder
from flexlib.prepare.run import prepare_particles
from flexlib.simulate.run import simulate_particles
from flexlib.simulate.settings import Simulation
from flexlib.workflow_support.settings import PrepareSettings


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A prepared set of 120 particles."""
    folder = tmp_path_factory.mktemp("made")
    simulate_particles(
        folder / "sim", Simulation(phantom="clamp", num_particles=120, box=32, pixel_size_A=7.0, snr=1.0)
    )
    sim = SimulationFolder(folder / "sim")
    prepare_particles(sim.particles, sim.consensus, folder / "particles", settings=PrepareSettings(train_box=32))
    return folder


@pytest.fixture
def stack(made):
    """The stack, which may be changed; afterwards it is as it was."""
    path = SimulationFolder(made / "sim").images
    kept = shutil.copy2(path, made / "kept.mrcs")
    yield path
    shutil.copy2(kept, path)


def rewrite(path, images):
    """A stack with other images, or others' order, as a program would write it."""
    with mrcfile.new(path, overwrite=True) as file:
        file.set_data(np.ascontiguousarray(images))
        file.set_image_stack()
        file.voxel_size = 7.0


def test_untouched_is_read(made):
    assert len(open_full_images(made / "particles")) == 120


@pytest.mark.parametrize("how", ["touched", "copied", "written again by another program", "longer"])
def test_the_same_images_are_read_on(made, stack, how, caplog):
    caplog.set_level("INFO")
    images = mrcfile.read(stack)
    if how == "touched":
        os.utime(stack)
    elif how == "copied":
        stack.unlink()
        shutil.copy(made / "kept.mrcs", stack)
    else:
        rewrite(stack, images if how != "longer" else np.concatenate([images, images[:5]]))
    assert len(open_full_images(made / "particles")) == 120
    assert "its images are the same" in caplog.text


@pytest.mark.parametrize("how", ["another order", "turned round", "shorter by one", "other images", "other contrast"])
def test_other_images_are_refused_in_one_line_that_names_the_stack(made, stack, how):
    images = mrcfile.read(stack)
    others = {
        "another order": np.random.default_rng(0).permutation(images),
        "turned round": images[::-1],
        "shorter by one": images[1:],
        "other images": images[:, ::-1],
        "other contrast": -images,
    }
    rewrite(stack, others[how])
    with pytest.raises(InputError) as refused:
        open_full_images(made / "particles")
    assert str(stack) in str(refused.value) and "\n" not in str(refused.value)


def test_a_set_prepared_before_there_was_such_a_record_is_read(made, stack):
    record = ParticlesFolder(made / "particles").stacks
    content = record.read_text()
    record.unlink()
    try:
        os.utime(stack)
        assert len(open_full_images(made / "particles")) == 120
    finally:
        record.write_text(content)
