"""What the report says of junk and of parts that are missing, against results in which both are known."""

from __future__ import annotations

import html as html_text
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_results import CONFIG, finished_report
from moving_ball import ball

from flexlib.images.stack import ImageStackWriter
from flexlib.mesh.lattice import bcc_mesh
from flexlib.model.flex_model import FlexModel
from flexlib.model.flow import FlowGenerator, rigid_modes_A
from flexlib.particles.star import read_tables
from flexlib.particles.star_write import write_star
from flexlib.records import ResolutionRecord, ValidationRecord
from flexlib.render import surface
from flexlib.report import judged, judged_pictures, sections
from flexlib.report.morph import Gallery
from flexlib.report.packing import column_label
from flexlib.report.page import build_page
from flexlib.report.results import Results
from flexlib.select import main as flex_select

PX = 40


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose training judged nothing."""
    return finished_report(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def root(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, whose training judged images and one part; image i of the stack is a square of level i."""
    root = tmp_path_factory.mktemp("judged") / "antibody"
    shutil.copytree(plain, root)
    found = Results(root, CONFIG)
    table = read_tables(found.train_folder.latents).particles
    generator = np.random.default_rng(0)
    probability = np.where(generator.random(len(table)) < 0.12, 0.3, 0.9) * generator.uniform(0.5, 1.0, len(table))
    occupancy = np.where(generator.random(len(table)) < 0.31, 0.05, 0.95)
    known = table["flexLatent1"].notna()
    extra = {"flexParticleProbability": probability, "flexOccupancy1": occupancy}
    write_star({"particles": table.assign(**{k: np.where(known, v, np.nan) for k, v in extra.items()})},
               found.train_folder.latents)  # fmt: skip
    particles = read_tables(found.run.particles.particles).particles
    names = [f"{i + 1:06d}@train.mrcs" for i in range(len(particles))]
    write_star({"particles": particles.assign(rlnImageName=names)}, found.run.particles.particles)
    with ImageStackWriter(found.run.particles.images, len(particles), PX, 6.0) as stack:
        for i in range(len(particles)):
            image = np.zeros((1, PX, PX), np.float32)
            image[0, 10:20, 10:20] = i
            stack.append(image)
    _write_model(found)
    return root


def _write_model(found: Results) -> None:
    """A model at rest with the right third of the density as its part."""
    consensus, mask = found.consensus, found.mask
    assert consensus is not None and mask is not None
    mesh = bcc_mesh(mask.data > 0, 6.0, 60.0)
    flow = FlowGenerator(torch.from_numpy(rigid_modes_A(mesh.vertices_A).astype(np.float32)), 2, 1, 4)
    parts = np.zeros(mask.data.shape, np.uint8)
    parts[:, :, 26:] = mask.data[:, :, 26:] > 0
    FlexModel(
        mesh, flow, np.zeros((10, 2), np.float32), (consensus.data * mask.data).astype(np.float32), PX, 6.0, parts=parts
    ).save(found.train_folder.model)


def test_sections_are_there_only_where_something_was_judged(plain: Path, root: Path) -> None:
    assert not sections.junk_section(Results(plain, CONFIG)) and not sections.occupancy_section(Results(plain, CONFIG))
    titles = ("Are they all particles?", "Is every part there?")
    before = (plain / "report.html").read_text()
    assert not any(title in before for title in titles) and "is drawn, here and beside" not in before
    build_page(Results(root, CONFIG), Gallery([], None, []), root / "report.html")
    after = (root / "report.html").read_text()
    order = [after.index(f'<section id="{name}">') for name in ("training", "junk", "occupancy", "latents")]
    assert order == sorted(order) and all(title in after for title in titles)


def test_junk_is_counted_and_left_out_of_the_latents(root: Path) -> None:
    found = Results(root, CONFIG, root / "truth.npz")
    table = read_tables(found.train_folder.latents).particles
    probability = table["flexParticleProbability"]
    junk, kept = int((probability < 0.5).sum()), int((probability >= 0.5).sum())
    assert 100 < junk < 600
    section = sections.junk_section(found)
    assert f"{junk:,} of {junk + kept:,} images" in section
    assert "counts as the probability" not in section and "learnt a junk share" not in section
    latents = sections.latent_section(found)
    assert f"{kept:,} particles, each with 2 latent coordinates" in latents
    assert f"at least 0.5 is drawn, here and beside: {junk:,}" in latents
    assert 'data-further=" --min-probability 0.5"' in latents
    assert found.latents is not None and found.latents["flexParticleProbability"].min() >= 0.5
    assert found.truth_names  # which have a row for each particle, junk or not


def test_what_the_records_say_is_told(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "run")
    found = Results(tmp_path / "run", CONFIG)
    part = {"share": 0.69, "share_se": 0.021, "gain": 3.0, "gain_se": 0.2, "mass_share": 0.084}
    path = found.train_folder.validation
    replace(ValidationRecord.read(path), junk_share=0.124, occupancy=[part]).write(path)
    path = found.reconstruct_folder.resolution
    unweighed = ResolutionRecord.read(path)
    replace(unweighed, effective_particles=1125.4).write(path)
    section = sections.junk_section(found)
    assert "The training learnt a junk share of 12\xa0%." in section
    assert "counts as the probability that it shows a particle, all together as 1,125." in section
    assert "Part 1 (8.4\xa0% of the mass) is missing from 31 ± 2\xa0% of the particles." in sections.occupancy_section(
        found
    )
    unweighed.write(path)
    assert "reconstruct.weigh_particles: false" in sections.junk_section(Results(found.root, CONFIG))


def test_a_set_without_junk_is_said_to_have_none(root: Path) -> None:
    found = Results(root, CONFIG)
    table = judged.judged_images(found)
    assert table is not None
    clean = table.assign(probability=1.0)
    assert judged.junk_sentence(found, clean).startswith(
        f"None of {len(table):,} images more likely shows anything but"
    )
    assert judged_pictures.probability_histogram(clean["probability"].to_numpy(), "x", "y")


def test_without_a_record_the_share_is_the_posteriors(root: Path) -> None:
    (part,) = judged.part_shares(Results(root, CONFIG))
    table = read_tables(Results(root, CONFIG).train_folder.latents).particles
    shown = table["flexParticleProbability"] >= 0.5
    assert len(part.present) == shown.sum()
    assert part.share == pytest.approx(table.loc[shown, "flexOccupancy1"].mean())


def test_shares_are_rounded_to_a_digit_of_their_error() -> None:
    assert [judged.percent(0.3123, error) for error in (0.021, 0.0033, 0.15)] == [
        "31 ± 2\xa0%", "31.2 ± 0.3\xa0%", "31 ± 15\xa0%",
    ]  # fmt: skip
    assert judged.percent(0.0042) == "0.42\xa0%" and judged.percent(0.0) == "0\xa0%"


def test_error_of_a_share_is_its_scatter() -> None:
    """Of certain particles the binomial one; of uncertain ones that of the likeliest share, over repeated draws."""
    certain = np.repeat([1.0, 0.0], [300, 100])
    assert judged._share_error(certain, 0.75) == pytest.approx(np.sqrt(0.75 * 0.25 / 400))
    generator, likeliest, errors = np.random.default_rng(0), [], []
    for _ in range(300):
        there = generator.random(500) < 0.7
        odds = np.exp(generator.normal(0, 1, 500) * 1.5 + np.where(there, 1.125, -1.125))  # of two Gaussians
        share = 0.5
        for _ in range(200):
            present = share * odds / (share * odds + 1 - share)
            share = present.mean()
        likeliest.append(share)
        errors.append(judged._share_error(present, share))
    assert np.mean(likeliest) == pytest.approx(0.7, abs=0.01)
    assert np.mean(errors) == pytest.approx(np.std(likeliest), rel=0.15)
    assert np.mean(errors) > 1.2 * np.sqrt(0.21 / 500)
    assert judged._share_error(np.ones(10), 1.0) is None


def test_images_shown_are_the_least_likely_and_likely_ones(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, drawn = Results(root, CONFIG), {}
    table = judged.judged_images(found)
    assert table is not None
    monkeypatch.setattr(
        judged_pictures, "_drawn_rows", lambda images, chosen: drawn.update(images=images, chosen=chosen)
    )
    rows = judged_pictures.image_rows(found, table)
    assert rows is not None and rows.detail_A == pytest.approx(36.0)  # six pixels
    least = table.sort_values("probability")["row"].head(8)
    assert drawn["chosen"].index[:8].tolist() == least.tolist()
    assert (drawn["chosen"].iloc[8:] >= table["probability"].median()).all()
    particles = read_tables(found.run.particles.particles).particles
    at = {int(row): i for i, row in enumerate(particles["flexInputRow"].astype(int))}
    levels = drawn["images"][:, 15, 15]
    np.testing.assert_allclose(levels, [at[row] for row in drawn["chosen"].index], rtol=0.01)
    monkeypatch.undo()
    assert rows.picture is None and judged_pictures.image_rows(found, table).picture[:4] == b"RIFF"


def test_missing_images_are_told(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "run")
    (tmp_path / "run/particles/train.mrcs").unlink()
    assert "train.mrcs) are not there, so none are shown" in sections.junk_section(Results(tmp_path / "run", CONFIG))


def test_commands_shown_write_what_they_say(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Results(root, CONFIG)
    table = read_tables(found.train_folder.latents).particles
    monkeypatch.chdir(tmp_path)
    wanted = {
        "junk": int((table["flexParticleProbability"] >= 0.5).sum()),
        "occupancy": int((table["flexOccupancy1"] < 0.5).sum()),
    }
    for name, section in (("junk", sections.junk_section(found)), ("occupancy", sections.occupancy_section(found))):
        (command,) = re.findall(r"<pre>flex-select (.*)</pre>", section)
        arguments = shlex.split(html_text.unescape(command))
        assert flex_select(arguments) == 0
        assert len(read_tables(tmp_path / arguments[arguments.index("--out") + 1]).particles) == wanted[name]


def test_part_is_drawn_where_it_is(root: Path) -> None:
    views = judged_pictures.part_pictures(Results(root, CONFIG))
    assert list(views) == [1] and views[1][:4] == b"RIFF"
    solid = ball(32, 10)
    cap = solid & (np.arange(32)[:, None, None] < 9)  # at low z: behind, seen from the front
    view = judged_pictures.clearest_view(solid, cap)
    for turned in (view, surface.quarter_turn(view)):
        assert (turned @ [0, 0, -1.0])[2] > -0.3  # not on the far side


def test_columns_have_names() -> None:
    assert column_label("flexOccupancy2") == "occupancy of part 2"
    assert column_label("flexParticleProbability") == "probability of a particle"
    assert column_label("flexLatentStdErr1") == "standard error of latent 1"
    assert column_label("flexMotion1Angst") == "motion 1 (Å)"
