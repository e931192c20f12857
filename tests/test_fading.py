"""Parts that a third of the particles lack: found, told and confirmed; and none claimed where all are complete."""

import json
from dataclasses import replace
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import starfile
import torch
from moving_ball import ball
from training_sets import area_under_roc, prepared

from flexlib import train as training
from flexlib.errors import InputError
from flexlib.imaging.image_transforms import centred_irfft2, centred_rfft2
from flexlib.imaging.maps import read_map, write_label_map
from flexlib.layout import MeshFolder, ParticlesFolder
from flexlib.mesh.build import build_mesh
from flexlib.model.flex_model import FlexModel
from flexlib.model.forward import EXACT
from flexlib.model.occupancy import Quadratic, log_prior
from flexlib.projection.op import gather_volume
from flexlib.train import epoch
from flexlib.train.fading import cut_part
from flexlib.train.occupancy import learnt_share
from flexlib.train.part_search import two_levels
from flexlib.train.setup import set_up
from flexlib.workflow_support.settings import MeshSettings, TrainSettings

BOX, NUM, MISSING = 32, 800, 1 / 3
QUICK = TrainSettings(latent_dims=1, epochs=6, validation_fraction=0.1, occupancy="auto")


def part_at_one_end(consensus: np.ndarray) -> np.ndarray:
    """(N, N, N) bool: a twelfth of the mass, at the end of the molecule's longest axis."""
    mass = consensus.clip(0).ravel()
    at = np.stack(np.unravel_index(np.arange(mass.size), consensus.shape)[::-1], 1) - len(consensus) // 2
    middle = np.average(at, axis=0, weights=mass)
    _, axes = np.linalg.eigh(np.cov((at - middle).T, aweights=mass))
    along = (at - middle) @ axes[:, -1]
    order = np.argsort(-along)
    held = np.cumsum(mass[order]) / mass.sum()
    part = np.zeros(mass.size, bool)
    part[order[: np.searchsorted(held, 1 / 12)]] = True
    return part.reshape(consensus.shape)


def take_out(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Take a part out of a third of the prepared images of rigid particles: the part, and (n,) bool which."""
    setup = set_up(ParticlesFolder(folder / "particles"), MeshFolder(folder / "mesh"), QUICK, "cpu")
    operator = replace(setup.rigid, accuracy=EXACT)
    part = part_at_one_end(setup.consensus.data * setup.mask.data) & (setup.mask.data > 0)
    values = gather_volume(setup.consensus.data * setup.mask.data * part, operator.voxels)
    absent = np.random.default_rng(1).random(len(setup.source)) < MISSING
    batch = setup.source.batch(np.arange(len(setup.source)))
    alone = batch.transfer * operator.slices(values, batch)
    images = batch.images - alone * torch.as_tensor(absent)[:, None, None]
    with mrcfile.open(folder / "particles/train.mrcs", "r+") as stack:
        assert (centred_rfft2(torch.as_tensor(stack.data.copy())) - batch.images).abs().max() < 1e-3
        stack.set_data(centred_irfft2(images).numpy())
    return part, absent


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> Path:
    return prepared(tmp_path_factory.mktemp("complete"), "rigid", NUM, 0.2)


@pytest.fixture(scope="module")
def fading(tmp_path_factory):
    folder = prepared(tmp_path_factory.mktemp("fading"), "rigid", NUM, 0.2)
    part, absent = take_out(folder)
    training.train(folder / "particles", folder / "mesh", folder / "train", QUICK)
    return folder, part, absent


@pytest.mark.slow
def test_part_is_found_and_told(fading):
    folder, part, absent = fading
    model = FlexModel.load(folder / "train")
    assert model.parts.shape == (BOX,) * 3 and model.parts.dtype == np.uint8 and model.parts.max() == 1
    found, density = model.parts == 1, model.canonical.clip(0)
    assert density[found & part].sum() > 0.6 * density[part].sum()
    assert density[found & part].sum() > 0.75 * density[found].sum()
    assert model.occupancy.shape == (NUM, 1)
    assert area_under_roc(-model.occupancy[:, 0], absent) > 0.9
    assert abs(model.occupancy_share[0] - (1 - absent.mean())) < 0.05


@pytest.mark.slow
def test_files_say_so(fading):
    folder, part, _ = fading
    record = json.loads((folder / "train/validation.json").read_text())["occupancy"]
    assert len(record) == 1 and record[0]["gain"] > 3 * record[0]["gain_se"] and record[0]["segment"] is None
    assert 0.005 < record[0]["share_se"] < 0.04
    table = starfile.read(folder / "train/latents.star", always_dict=True)["particles"]
    model = FlexModel.load(folder / "train")
    assert np.abs(table["flexOccupancy1"].to_numpy(np.float64) - model.occupancy[:, 0]).max() < 1e-5
    labels = read_map(folder / "train/occupancy_parts.mrc").data
    assert np.array_equal(np.rint(labels), model.parts)
    axis_A = (np.arange(BOX) - BOX // 2) * 7.0
    z, y, x = np.nonzero(part)
    centre_A = np.array([axis_A[x].mean(), axis_A[y].mean(), axis_A[z].mean()])
    assert np.linalg.norm(record[0]["centre_A"] - centre_A) < 14


@pytest.mark.slow
def test_motion_is_judged_apart(fading):
    """The particles do not move: what the missing part changes is no motion."""
    scores = json.loads((fading[0] / "train/validation.json").read_text())
    assert scores["validation_gain"] == 0 and scores["rms_displacement_A"] == 0


@pytest.mark.slow
def test_no_part_is_invented(complete):
    training.train(complete / "particles", complete / "mesh", complete / "train", QUICK)
    model = FlexModel.load(complete / "train")
    assert model.parts is None and model.occupancy is None and model.occupancy_share is None
    assert json.loads((complete / "train/validation.json").read_text())["occupancy"] == []
    assert not (complete / "train/occupancy_parts.mrc").exists()


@pytest.mark.slow
def test_segments_that_the_mesh_has_not_are_refused(fading):
    folder, _, _ = fading
    for segment, message in ((7, r"no segment 7; its segments are 0"), (0, "is all of the molecule")):
        with pytest.raises(InputError, match=rf"train\.occupancy: .*{message}"):
            training.train(
                folder / "particles", folder / "mesh", folder / "refused", replace(QUICK, occupancy=(segment,))
            )


@pytest.mark.slow
def test_named_segment_is_told_and_an_interrupted_run_ends_the_same(fading, monkeypatch):
    folder, part, absent = fading
    write_label_map(folder / "halves.mrc", 1 + part.astype(np.int16), 7.0)
    build_mesh(folder / "particles", folder / "two", MeshSettings(cells=10, segmentation=folder / "halves.mrc"))
    settings = replace(QUICK, epochs=2, occupancy=(2,))
    training.train(folder / "particles", folder / "two", folder / "named", settings)
    whole = FlexModel.load(folder / "named")
    assert area_under_roc(-whole.occupancy[:, 0], absent) > 0.9
    record = json.loads((folder / "named/validation.json").read_text())["occupancy"]
    assert [one["segment"] for one in record] == [2]

    take_step, done = epoch.take_step, [0]

    def step_then_fail(*arguments):
        done[0] += 1
        if done[0] == 30:  # in the middle of the second epoch
            raise KeyboardInterrupt
        return take_step(*arguments)

    monkeypatch.setattr(epoch, "take_step", step_then_fail)
    with pytest.raises(KeyboardInterrupt):
        training.train(folder / "particles", folder / "two", folder / "resumed", settings)
    saved = torch.load(folder / "resumed/checkpoints/checkpoint.pt", weights_only=True)["occupancy"]
    assert saved["segments"] == [2] and saved["labels"].max() == 1 and 0.5 < float(saved["share"]) < 0.8
    monkeypatch.setattr(epoch, "take_step", take_step)
    training.train(folder / "particles", folder / "two", folder / "resumed", settings)
    resumed = FlexModel.load(folder / "resumed")
    assert np.array_equal(whole.parts, resumed.parts)
    assert np.abs(whole.occupancy - resumed.occupancy).max() < 1e-4


@pytest.mark.parametrize(("lower", "is_presence"), [(0.0, True), (0.8, False)])
def test_two_levels_are_told_from_one(lower, is_presence):
    """Amplitudes of 4,000 particles, each known to within 1 / sqrt(gram): nothing, or merely less, in a quarter."""
    generator = torch.Generator().manual_seed(0)
    has = torch.rand(4000, generator=generator) < 0.75
    level = torch.where(has, 1.2, 1.2 * lower)
    gram = 4.0 + 2.0 * torch.rand(4000, generator=generator)
    noise = torch.randn(4000, generator=generator) * gram.sqrt()
    cross = gram * (level - 1) + noise  # of the residual, in a map of amplitude 1
    found = two_levels(Quadratic(torch.zeros(4000), cross[:, None], gram[:, None, None]), torch.ones(4000))
    assert found.is_presence == is_presence
    if is_presence:
        assert abs(found.share - 0.75) < 0.04 and abs(found.present - 1.2) < 0.06 and abs(found.absent) < 0.15


def test_a_part_is_cut_where_the_density_changes_and_none_where_all_of_it_does():
    """A sharp edge in a noisy change of density, blurred to 20 A, is found to within a voxel's layer."""
    generator = np.random.default_rng(0)
    density = ball(BOX, 10) * (1 + 0.3 * generator.random((BOX,) * 3))
    inside, at = density > 0, np.arange(BOX) - BOX // 2
    part = inside & (at > 4)
    change = -0.4 * density * part + 0.2 * generator.standard_normal(density.shape) * inside
    found = cut_part(change, density, inside, 5.0)
    assert (found & part).sum() > 0.8 * part.sum()
    assert (found & ~part).sum() < 0.1 * part.sum()
    assert cut_part(0.4 * density, density, inside, 5.0) is None


def test_shares_of_two_parts_that_overlap_in_images_are_learnt():
    """Each part alone would be judged wrongly: what one lacks looks like half of the other's absence."""
    generator = torch.Generator().manual_seed(0)
    gram = 9.0 * torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    lacks = (torch.rand((20_000, 2), generator=generator) < torch.tensor([0.2, 0.4])).float()
    noise = torch.randn((20_000, 2), generator=generator) @ torch.linalg.cholesky(gram).T
    found = Quadratic(torch.zeros(20_000), noise - lacks @ gram, gram.expand(20_000, 2, 2))
    share = learnt_share(found, torch.ones(20_000), torch.tensor([0.5, 0.5]))
    assert (share - torch.tensor([0.8, 0.6])).abs().max() < 0.01
    present = found.present(log_prior(share))
    assert abs(float(present[:, 1].mean()) - 0.6) < 0.01
    assert area_under_roc(-present[:2000, 1].numpy(), lacks[:2000, 1].numpy() > 0) > 0.95
    junk = torch.cat([torch.ones(10_000), torch.zeros(10_000)])  # rows that count for nothing change nothing
    half = Quadratic(*(part[:10_000] for part in found.parts()))
    torch.testing.assert_close(
        learnt_share(found, junk, share), learnt_share(half, torch.ones(10_000), share), rtol=0, atol=1e-5
    )
