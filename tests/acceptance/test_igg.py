"""The main job on a flexible IgG particle set with known truth (`pytest --data DIR`): defaults, both input formats."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import starfile
import yaml
from run_snakemake import snakemake
from scipy.spatial import cKDTree

from flexlib.imaging.fsc import fsc
from flexlib.imaging.maps import read_map
from flexlib.model.deformed import deform_at_latent
from flexlib.model.flex_model import FlexModel

POINT = "cells~20/dims~2/rigidity~2.0/seed~0"
NEIGHBOURS = 30


def run_workflow(folder: Path, igg: Path, particles: str, *targets: str) -> Path:
    config = {"name": "igg", "particles": str(igg / particles), "consensus": str(igg / "consensus.mrc")}
    config["validate"] = "none"
    (folder / "igg.yaml").write_text(yaml.safe_dump(config))
    result = snakemake(folder, "--configfile", "igg.yaml", "--cores", "2", *targets)
    assert result.returncode == 0, result.stderr[-5000:]
    return folder / "results/igg"


@pytest.fixture(scope="module")
def from_star(tmp_path_factory, igg) -> Path:
    return run_workflow(tmp_path_factory.mktemp("star"), igg, "particles.star")


@pytest.fixture(scope="module")
def from_cs(tmp_path_factory, igg) -> Path:
    return run_workflow(tmp_path_factory.mktemp("cs"), igg, "particles.cs")


@pytest.fixture(scope="module", params=["from_star", "from_cs"])
def results(request) -> Path:
    return request.getfixturevalue(request.param)


def neighbour_regression_r2(latents: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """R^2 per angle of the mean over 30 nearest neighbours, fitted on even rows and scored on odd ones."""
    _, nearest = cKDTree(latents[::2]).query(latents[1::2], k=NEIGHBOURS)
    predicted, wanted = angles[::2][nearest].mean(1), angles[1::2]
    return 1 - ((predicted - wanted) ** 2).sum(0) / ((wanted - wanted.mean(0)) ** 2).sum(0)


def test_latents_tell_the_angles(results, truth):
    table = starfile.read(results / f"train/{POINT}/latents.star", always_dict=True)["particles"]
    assert len(table) == len(truth["angles_rad"])
    r2 = neighbour_regression_r2(table[["flexLatent1", "flexLatent2"]].to_numpy(), truth["angles_rad"])
    print("R^2", r2.round(4))
    assert (r2 >= 0.95).all()


def test_training_takes_under_three_minutes(results):
    wall_s = json.loads((results / f"train/{POINT}/validation.json").read_text())["wall_s"]
    print("training", wall_s, "s")
    assert wall_s < 180


def test_both_inputs_give_the_same_particles(from_star, from_cs):
    first, second = (read_stack(folder) for folder in (from_star, from_cs))
    assert np.abs(first - second).max() < 1e-4 * first.std()
    tables = [
        starfile.read(f / "particles/particles.star", always_dict=True)["particles"] for f in (from_star, from_cs)
    ]
    for column in ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi", "rlnOriginXAngst", "rlnDefocusU", "rlnRandomSubset"):
        difference = tables[0][column].to_numpy() - tables[1][column].to_numpy()
        if "Angle" in column:
            difference = (difference + 180) % 360 - 180
        assert np.abs(difference).max() < 0.01, column


def read_stack(results: Path) -> np.ndarray:
    import mrcfile

    with mrcfile.mmap(results / "particles/train.mrcs") as stack:
        return np.array(stack.data)


def test_maps_at_the_truth_states_beat_the_rigid_map(results, truth, igg):
    model = FlexModel.load(results / f"train/{POINT}")
    folder = results / f"reconstruct/{POINT}"
    flexible, rigid = read_map(folder / "flex_map.mrc"), read_map(folder / "rigid_map.mrc")
    shells = slice(1, int(0.6 * flexible.box / 2) + 1)
    for number, state in enumerate(truth["states_rad"]):
        state_map = read_map(igg / f"truth_state_{number}.mrc").data
        distance = np.linalg.norm((truth["angles_rad"] - state) / truth["angles_rad"].std(0), axis=1)
        nearest = np.argsort(distance)[:50]
        z = model.latents[nearest].mean(0)
        moved = fsc(deform_at_latent(model, flexible, z), state_map)[shells]
        still = fsc(rigid.data, state_map)[shells]
        print(f"state {number}: flexible", moved.round(3), "rigid", still.round(3))
        assert (moved > still).all()


def test_half_maps_improve(results):
    with (results / f"reconstruct/{POINT}/fsc.csv").open() as handle:
        table = list(csv.DictReader(handle))
    gain = [float(row["fsc_flex"]) - float(row["fsc_rigid"]) for row in table[5:28]]
    assert np.mean(gain) > 0.02  # most of the molecule is the still core
