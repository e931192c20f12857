"""Meshes of 12, 20 and 40 cells, and of two parted segments, train on the flexible IgG set (`pytest --data DIR`)."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from run_snakemake import snakemake

from flexlib.imaging.maps import read_map, write_map
from flexlib.tetra.io import read_mesh
from flexlib.tetra.voxels import voxelise


def run(folder: Path, igg: Path, mesh: dict) -> Path:
    config = {
        "name": "igg",
        "particles": str(igg / "particles.star"),
        "consensus": str(igg / "consensus.mrc"),
        "mesh": mesh,
        "train": {"epochs": 1},
    }
    (folder / "igg.yaml").write_text(yaml.safe_dump(config))
    result = snakemake(folder, "--configfile", "igg.yaml", "--cores", "2", "--until", "train")
    assert result.returncode == 0, result.stderr[-5000:]
    return folder / "results/igg"


@pytest.fixture(scope="module")
def swept(tmp_path_factory, igg) -> Path:
    return run(tmp_path_factory.mktemp("cells"), igg, {"cells": [12, 20, 40]})


@pytest.mark.parametrize("cells", [12, 20, 40])
def test_all_sizes_of_cells_train(swept, cells):
    quality = json.loads((swept / f"mesh/cells~{cells}/mesh_quality.json").read_text())
    assert quality["uncovered_voxels"] == 0 and quality["num_bodies"] == 1
    score = json.loads((swept / f"train/cells~{cells}/dims~2/rigidity~2.0/seed~0/validation.json").read_text())
    print(cells, "cells:", quality["num_cells"], "tetra,", score["validation_gain"], "+-", score["validation_gain_se"])
    assert score["validation_gain"] > 3 * score["validation_gain_se"]


def test_a_segmented_mesh_trains(tmp_path, igg):
    """Core below, arms above: two parted segments from a label map at another box, through the whole workflow."""
    consensus = read_map(igg / "consensus.mrc")
    labels = np.zeros((2 * consensus.box,) * 3, np.int16)
    labels[consensus.box :] = 1  # z above the box centre
    write_map(tmp_path / "labels.mrc", labels + 1, consensus.pixel_size_A / 2, like=consensus, dtype=np.int16)
    results = run(tmp_path, igg, {"cells": 16, "segmentation": str(tmp_path / "labels.mrc"), "connections": "1, 2"})
    mesh = read_mesh(results / "mesh/cells~16/mesh.vtu")
    mask = read_map(results / "particles/mask.mrc")
    voxels = voxelise(mesh, mask.data > 0, mask.pixel_size_A)
    above = np.unravel_index(voxels.index, mask.data.shape)[0] >= mask.box // 2
    assert np.array_equal(mesh.segment[voxels.cell], np.where(above, 2, 1))
    score = json.loads((results / "train/cells~16/dims~2/rigidity~2.0/seed~0/validation.json").read_text())
    print("segmented:", score["validation_gain"], "+-", score["validation_gain_se"])
    assert score["validation_gain"] > 3 * score["validation_gain_se"]
