"""Which particles are held out: whole micrographs where they are known, the same ones in every training."""

import logging
from dataclasses import replace

import numpy as np
import pytest
from training_sets import prepared

from flexlib.layout import MeshFolder, ParticlesFolder, TrainFolder
from flexlib.particles.star import read_tables
from flexlib.particles.star_write import write_star
from flexlib.prepare.run import prepare_particles
from flexlib.records import ValidationRecord
from flexlib.train import train
from flexlib.train.rows import choose_rows
from flexlib.train.score import choose_held_out
from flexlib.train.setup import set_up
from flexlib.workflow_support.settings import PrepareSettings, TrainSettings


def micrographs(sizes, seed=0):
    """(n,) micrograph of each image, in no order."""
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))


@pytest.mark.parametrize("copies", [1, 3])
def test_whole_micrographs_are_held_out(copies):
    """Of 100 micrographs of 5 to 15 images; copies of an image go the same way."""
    of_image = micrographs(np.random.default_rng(1).integers(5, 16, 100))
    image, micrograph = np.repeat(np.arange(len(of_image)), copies), np.repeat(of_image, copies)
    choice = choose_held_out(image, 0.1, micrograph)
    assert choice.by_micrograph
    held = set(micrograph[choice.held_out])
    assert not held & set(micrograph[choice.training])
    assert not set(image[choice.held_out]) & set(image[choice.training])
    assert np.array_equal(np.union1d(choice.held_out, choice.training), np.arange(len(image)))
    wanted, count = round(0.1 * len(of_image)), len(set(image[choice.held_out]))
    last = max(np.count_nonzero(of_image == one) for one in held)
    assert wanted <= count < wanted + last
    assert np.array_equal(choice.held_out, choose_held_out(image, 0.1, micrograph).held_out)


def test_micrographs_are_drawn_at_random():
    """Not the first ones, nor the neighbours of a grid square."""
    held = np.unique(choose_held_out(np.arange(10_000), 0.1, np.arange(10_000) // 10).held_out // 10)
    assert len(held) == 100
    assert 450 < held.mean() < 550 and 260 < held.std() < 315  # of 1,000 evenly drawn: 500 +- 28, 289 +- 13
    assert 0 < np.count_nonzero(np.diff(held) == 1) < 20  # 10 are expected


def test_the_most_is_of_how_many_are_drawn():
    """2,000 of 100,000 images: the micrograph that reaches them is taken whole."""
    choice = choose_held_out(np.arange(100_000), 0.05, np.arange(100_000) // 30)
    assert choice.by_micrograph and len(choice.held_out) == 2010
    assert len(choose_held_out(np.arange(100_000), 0.05).held_out) == 2000


@pytest.mark.parametrize(
    ("sizes", "fraction", "by_micrograph"),
    [
        ([10] * 50, 0.1, True),  # five of ten
        ([10] * 50, 0.08, False),  # four
        ([11] * 50, 0.08, False),  # four are all 44
        ([11] * 50, 0.082, True),  # of 45 wanted a fifth one has the last: 55
        ([500], 0.1, False),  # one micrograph
        ([1000] * 20, 0.05, False),  # a micrograph is as large as the share
        ([1] * 500, 0.1, True),  # a micrograph an image
        ([20] * 6, 0.9, False),  # nothing would be left to train on
        ([20] * 20, 0.5, True),
    ],
)
def test_few_or_large_micrographs_leave_single_images(sizes, fraction, by_micrograph):
    micrograph = micrographs(sizes)
    image = np.arange(len(micrograph))
    choice, single = choose_held_out(image, fraction, micrograph), choose_held_out(image, fraction)
    assert choice.by_micrograph == by_micrograph and not single.by_micrograph
    assert len(single.held_out) == round(fraction * len(image))
    if by_micrograph:
        assert len(single.held_out) <= len(choice.held_out) <= 1.5 * len(single.held_out)
    else:
        assert np.array_equal(choice.held_out, single.held_out)


def test_one_huge_micrograph_is_not_held_out_with_four_small_ones():
    """Wherever it stands among those drawn, the share never exceeds 1.5 times what is wanted."""
    for seed in range(20):
        sizes = np.random.default_rng(seed).permutation([400] * 5 + [5] * 95)
        choice = choose_held_out(np.arange(sizes.sum()), 0.04, micrographs(sizes))
        assert 99 <= len(choice.held_out) <= 1.5 * 99
        assert choice.by_micrograph or len(choice.held_out) == 99


def test_no_share_holds_out_nothing():
    choice = choose_held_out(np.arange(100), 0.0, np.arange(100) // 5)
    assert not choice.by_micrograph and not len(choice.held_out) and len(choice.training) == 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """60 particles, four of each micrograph."""
    folder = prepared(tmp_path_factory.mktemp("held_out"), "antibody", 60, snr=1.0)
    star = folder / "sim/particles.star"
    tables = read_tables(star)
    names = [f"mic{row // 4}.mrc" for row in range(60)]
    write_star({"optics": tables.optics, "particles": tables.particles.assign(rlnMicrographName=names)}, star)
    prepare_settings = PrepareSettings(train_box=32)
    prepare_particles(star, folder / "sim/consensus.mrc", folder / "particles", settings=prepare_settings)
    return folder


def settings(**changes):
    return TrainSettings(latent_dims=1, epochs=1, validation_fraction=0.35, **changes)


def test_all_seeds_hold_out_the_same(folder, caplog):
    particles, mesh = ParticlesFolder(folder / "particles"), MeshFolder(folder / "mesh")
    caplog.set_level(logging.INFO, logger="flexlib.train.rows")
    setups = [set_up(particles, mesh, settings(seed=seed), "cpu") for seed in (0, 1, 7)]
    micrograph = setups[0].source.particles.micrograph
    assert caplog.messages == ["24 particles are held out, all of 6 micrographs"] * 3
    for setup in setups:
        assert np.array_equal(setup.validation_rows, setups[0].validation_rows)
        assert setup.held_out().seed == setups[0].held_out().seed  # of the halves of Fourier pixels
        assert not np.isin(micrograph[setup.training_rows], micrograph[setup.validation_rows]).any()
        assert setup.held_out_micrographs == 6


def test_a_half_set_holds_out_its_own_part_of_what_all_do(folder):
    particles = ParticlesFolder(folder / "particles")
    whole = choose_rows(particles, settings())
    parts = []
    for half in (1, 2):
        chosen = choose_rows(particles, settings(), half)
        assert chosen.by_micrograph and (chosen.source.half_set == half - 1).all()
        parts.append(chosen.half.rows[chosen.held_out])
        assert np.array_equal(np.sort(chosen.half.rows[chosen.training]), np.setdiff1d(chosen.half.rows, parts[-1]))
    assert np.array_equal(np.sort(np.concatenate(parts)), whole.held_out)


@pytest.mark.parametrize(
    ("micrograph_of", "said"),
    [
        (None, "the input does not name their micrographs"),
        (lambda row: row // 15, "4 micrographs are too few to hold out whole ones"),
    ],
)
def test_single_images_where_micrographs_do_not_serve(folder, tmp_path, caplog, micrograph_of, said):
    """A prepared folder of an older version has no such column."""
    copied = ParticlesFolder(tmp_path)
    for path in (folder / "particles").iterdir():
        (tmp_path / path.name).symlink_to(path)
    tables = read_tables(copied.particles)
    table = tables.particles.drop(columns="flexMicrograph")
    if micrograph_of is not None:
        table["flexMicrograph"] = [1 + micrograph_of(row) for row in range(len(table))]
    copied.particles.unlink()
    write_star({"optics": tables.optics, "particles": table}, copied.particles)
    caplog.set_level(logging.INFO, logger="flexlib.train.rows")
    chosen = choose_rows(copied, settings())
    assert caplog.messages == [f"21 particles are held out, chosen one by one: {said}"]
    assert not chosen.by_micrograph
    assert np.array_equal(chosen.held_out, choose_held_out(chosen.source.particles.image_index, 0.35).held_out)


def test_the_record_says_how_they_were_chosen(folder, tmp_path, one_thread):
    train(folder / "particles", folder / "mesh", tmp_path, settings(), "cpu")
    path = TrainFolder(tmp_path).validation
    record = ValidationRecord.read(path)
    assert (record.held_out_by, record.held_out_micrographs, record.validation_particles) == ("micrograph", 6, 24)
    older = {k: v for k, v in record.to_json().items() if not k.startswith("held_out")}
    assert ValidationRecord.from_json(older) == replace(record, held_out_by="image", held_out_micrographs=0)
