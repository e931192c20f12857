"""Sizes of data and what stages need of memory, time and disk."""

import shutil
from collections import namedtuple

import numpy as np
import pytest
from json_records import prepared_record

from flexlib.errors import InputError
from flexlib.imaging.maps import write_map
from flexlib.workflow_support import estimates
from flexlib.train.schedule import ANNEAL_EPOCHS, MAX_EPOCHS
from flexlib.workflow_support.estimates import (
    DataSize,
    check_free_space,
    data_size,
    disk_mb,
    memory_mb,
    num_vertices,
    read_map_size,
    runtime_min,
)

PREPARE = {"crop_box": None, "train_box": 128, "max_particles": None, "symmetry": "C1"}
LARGE, SMALL = DataSize(1_000_000, 256, 128), DataSize(1000, 64, 64)


def test_size_in_a_header(tmp_path):
    write_map(tmp_path / "map.mrc", np.zeros((20, 20, 20), np.float32), 2.5)
    size = read_map_size(tmp_path / "map.mrc")
    assert size.voxels == (20, 20, 20)
    assert size.extent_A == (50.0, 50.0, 50.0)
    raw = (tmp_path / "map.mrc").read_bytes()
    (tmp_path / "swapped.mrc").write_bytes(np.frombuffer(raw[:1024], "<i4").astype(">i4").tobytes())
    assert read_map_size(tmp_path / "swapped.mrc") == size
    (tmp_path / "short.mrc").touch()
    assert read_map_size(tmp_path / "short.mrc") is None


def test_size_of_data_is_guessed_before_and_known_after_preparation(tmp_path):
    (tmp_path / "p.star").write_bytes(bytes(200 * 500))
    write_map(tmp_path / "c.mrc", np.zeros((40, 40, 40), np.float32), 2.5)
    config = {"particles": str(tmp_path / "p.star"), "consensus": str(tmp_path / "c.mrc"), "prepare": PREPARE}
    record = tmp_path / "prepared.json"
    assert data_size(config, record) == DataSize(500, 40, 40)
    assert data_size({**config, "prepare": {**PREPARE, "max_particles": 10, "symmetry": "D7"}}, record).num_rows == 140
    simulated = {**config, "simulate": {"num_particles": 77, "box": 96}}
    assert data_size(simulated, record) == DataSize(77, 96, 96)
    prepared_record(num_rows=432, crop_box=36, train_box=32).write(record)
    assert data_size(config, record) == DataSize(432, 36, 32)


@pytest.mark.parametrize("stage", ["simulate", "prepare", "mesh", "train", "generate", "reconstruct", "report"])
def test_needs_grow_with_the_data(stage):
    assert 1500 <= memory_mb(stage, SMALL) < memory_mb(stage, LARGE)
    assert 60 <= runtime_min(stage, SMALL) <= runtime_min(stage, LARGE) <= 1440
    assert 0 < disk_mb(stage, SMALL, maps=4) <= disk_mb(stage, LARGE, maps=4)


def test_disk_is_that_of_what_is_written():
    assert disk_mb("prepare", DataSize(4096, 64, 64)) == pytest.approx(4096 * 64 * 64 * 4 / 2**20, rel=0.15)
    assert disk_mb("generate", DataSize(1, 256, 128), maps=82) == pytest.approx(1.2 * 82 * 8, abs=2)
    assert memory_mb("reconstruct", LARGE, all_in_ram=True) > memory_mb("reconstruct", LARGE) + 100_000


def test_a_full_disk_is_refused(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000 * 2**30, 940 * 2**30, 60 * 2**30))
    check_free_space(tmp_path / "not" / "yet", 39 * 1024, "maps")
    with pytest.raises(
        InputError, match=r"no room for maps, about 41\.0 GB: the disk has 40\.0 GB to spare; free some"
    ):
        check_free_space(tmp_path / "not" / "yet", 41 * 1024, "maps")
    assert estimates.SPARE == 0.02
