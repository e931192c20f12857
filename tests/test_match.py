"""Whether images match the consensus: each common mistake is made once, refused, and named as what it is."""

from dataclasses import replace

import mrcfile
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from flexlib.errors import InputError
from flexlib.images.ctf import ctf_images
from flexlib.imaging.maps import read_map, write_map
from flexlib.layout import ParticlesFolder
from flexlib.particles import read_particles
from flexlib.particles.star_write import relion_tables, write_star
from flexlib.prepare.run import prepare_particles
from flexlib.records import PreparedRecord
from flexlib.simulate.run import simulate_particles
from flexlib.simulate.settings import Simulation

COUNT, BOX, PIXEL_SIZE_A = 600, 40, 5.6


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """Folder of a rigid set that CTF, shifts and noise are in; the simulator's own poses."""
    folder = tmp_path_factory.mktemp("simulated")
    settings = {"phantom": "rigid", "num_particles": COUNT, "box": BOX, "pixel_size_A": PIXEL_SIZE_A, "snr": 0.1}
    microscope = {"shift_sd_A": 9.0, "defocus_range_A": (30000.0, 40000.0)}  # so that a wrong shift or CTF tells
    simulate_particles(folder, Simulation(**settings, **microscope, seed=6))
    return folder


def prepared(simulated, out, particles=None, consensus=None, images=None):
    """The record of a preparation with other particles, consensus or images than those simulated."""
    star, map_path = simulated / "particles.star", simulated / "consensus.mrc"
    if images is not None:
        with mrcfile.new(out / "images.mrcs") as file:
            file.set_data(images.astype(np.float32))
            file.set_image_stack()
    if particles is not None or images is not None:
        particles = particles or read_particles(star)
        star = out / "particles.star"
        stack = simulated / "particles.mrcs" if images is None else out / "images.mrcs"
        write_star(relion_tables(particles, [str(stack)]), star)
    if consensus is not None:
        map_path = out / "other.mrc"
        write_map(map_path, consensus.data, consensus.pixel_size_A)
    prepare_particles(star, map_path, out / "particles")
    return PreparedRecord.read(ParticlesFolder(out / "particles").record)


def test_images_that_match_are_told(simulated, tmp_path):
    record = prepared(simulated, tmp_path)
    assert not any(finding.warning for finding in record.health)
    match = record.match
    assert f"Of 200 images, {match['own_pose']:.0%} match the consensus better" in record.health[0].sentence
    assert match["num_images"] == 200
    assert match["own_pose"] > 0.95 and match["hand"] > 0.8


def mirrored(volume, *axes):
    return replace(volume, data=np.roll(np.flip(volume.data, axes), 1, axes))


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 1, 2)])
def test_a_map_of_the_other_hand_is_refused(simulated, tmp_path, axes):
    other = mirrored(read_map(simulated / "consensus.mrc"), *axes)
    with pytest.raises(InputError, match=r"do not match projections of the consensus: .* other hand than the poses"):
        prepared(simulated, tmp_path, consensus=other)


def stacked(simulated):
    with mrcfile.open(simulated / "particles.mrcs") as file:
        return file.data.astype(np.float32)


def turned(images):
    """Mirrored about the pixel N//2."""
    return np.roll(images[:, ::-1], 1, axis=1)


@pytest.mark.parametrize(
    ("columns", "images", "told"),
    [
        (lambda p: {"rotation": p.rotation.transpose(0, 2, 1)}, None, "each rotation is replaced by its inverse"),
        (lambda p: {"image_index": (p.image_index - 1).clip(0)}, None, "each row's image is the one that follows it"),
        (None, turned, "their rows run from top to bottom"),
        (None, lambda images: turned(images.transpose(0, 2, 1)).transpose(0, 2, 1), "their columns run from right to"),
        (None, lambda images: images.transpose(0, 2, 1), "their rows and columns are exchanged"),
        (
            lambda p: {"rotation": p.rotation @ Rotation.random(COUNT, rng=np.random.default_rng(8)).as_matrix()},
            None,
            "and so it is with another hand",
        ),
    ],
)
def test_the_likeliest_mistake_is_named(simulated, tmp_path, columns, images, told):
    particles = read_particles(simulated / "particles.star")
    changed = None if columns is None else replace(particles, **columns(particles))
    new = None if images is None else images(stacked(simulated))
    with pytest.raises(InputError, match=r"do not match projections of the consensus") as caught:
        prepared(simulated, tmp_path, changed, images=new)
    assert told in str(caught.value)
    assert not (tmp_path / "particles").exists()


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        (lambda p: {"origin_A": -p.origin_A}, "the shifts are of the opposite sign"),
        (lambda p: {"origin_A": p.origin_A / PIXEL_SIZE_A}, "the shifts are in pixels, not Angstrom"),
        (lambda p: {"defocus_u_A": p.defocus_u_A / 10, "defocus_v_A": p.defocus_v_A / 10}, "the defocus is ten times"),
    ],
)
def test_what_fits_far_better_is_told(simulated, tmp_path, columns, told):
    particles = read_particles(simulated / "particles.star")
    with pytest.raises(InputError, match=rf"do not match projections of the consensus.* if {told}"):
        prepared(simulated, tmp_path, replace(particles, **columns(particles)))


def test_random_shifts_are_a_doubt_not_a_mistake(tmp_path, caplog):
    """Centred particles whose shifts are nothing but the errors of a refinement: smaller ones fit better."""
    settings = {"phantom": "rigid", "num_particles": COUNT, "box": BOX, "pixel_size_A": PIXEL_SIZE_A, "snr": 0.1}
    simulate_particles(tmp_path / "in", Simulation(**settings, shift_sd_A=0.0))
    particles = read_particles(tmp_path / "in/particles.star")
    errors_A = np.random.default_rng(2).normal(0, 4, (COUNT, 2))
    prepared(tmp_path / "in", tmp_path, replace(particles, origin_A=particles.origin_A + errors_A))
    assert "images match projections of the consensus better if there are no shifts" in caplog.text


def test_phase_flipped_images_are_told(simulated, tmp_path):
    """Flipped, but the metadata do not say so."""
    particles = read_particles(simulated / "particles.star")
    sign = torch.sign(ctf_images(particles, np.arange(COUNT), BOX))
    images = torch.fft.irfft2(torch.fft.rfft2(torch.from_numpy(stacked(simulated))) * sign, s=(BOX, BOX)).numpy()
    with pytest.raises(InputError, match=r"better if they are phase-flipped, which the metadata do not say"):
        prepared(simulated, tmp_path, images=images)


def test_voxels_of_the_wrong_width_are_told(simulated, tmp_path):
    consensus = read_map(simulated / "consensus.mrc")
    padded = replace(consensus, data=np.pad(consensus.data, 4), pixel_size_A=0.6 * PIXEL_SIZE_A)
    with pytest.raises(InputError, match=r"the map's voxels are 5.6 A wide, not 3.36 A as its header says"):
        prepared(simulated, tmp_path, consensus=padded)
    with pytest.raises(InputError, match=r"48 voxels of 1 A, but the images have 40 px of 5.6 A"):
        prepared(simulated, tmp_path, consensus=replace(padded, pixel_size_A=1.0))


def test_a_dark_map_is_inverted(simulated, tmp_path, caplog):
    consensus = read_map(simulated / "consensus.mrc")
    prepared(simulated, tmp_path, consensus=replace(consensus, data=-consensus.data))
    assert "the density is dark" in caplog.text and "correlate negatively" not in caplog.text
    given = prepared(simulated, tmp_path / "as_given")
    inverted, plain = (ParticlesFolder(folder / "particles") for folder in (tmp_path, tmp_path / "as_given"))
    for name in ("consensus", "mask"):
        maps = [read_map(getattr(folder, name)).data for folder in (inverted, plain)]
        np.testing.assert_allclose(maps[0], maps[1], atol=1e-6 * abs(maps[1]).max())
    assert given.optics_groups[0].image_scale > 0


def test_a_box_that_cuts_the_mask_is_refused(simulated, tmp_path):
    from flexlib.workflow_support.settings import PrepareSettings

    with pytest.raises(InputError, match=r"prepare.crop_box: 20 px cut away \d+% of the mask"):
        prepare_particles(
            simulated / "particles.star",
            simulated / "consensus.mrc",
            tmp_path / "particles",
            settings=PrepareSettings(crop_box=20),
        )
