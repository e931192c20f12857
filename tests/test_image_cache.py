"""The images' copy on scratch: the same images, gone afterwards, and never the reason for a failure."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from flexlib.images import cache
from flexlib.images.cache import cached_images
from flexlib.images.sources import open_full_images
from flexlib.prepare.run import prepare_particles
from flexlib.simulate.run import simulate_particles
from flexlib.simulate.settings import Simulation
from flexlib.workflow_support.settings import MaskSettings, PrepareSettings

COUNT, BOX = 60, 32


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Prepared particles, some of which select left out."""
    folder = tmp_path_factory.mktemp("cache")
    truth = simulate_particles(folder / "data", Simulation(num_particles=COUNT, box=BOX, pixel_size_A=8.0, snr=1.0))
    prepare_particles(
        truth.particles_star,
        truth.consensus,
        folder / "particles",
        settings=PrepareSettings(train_box=16, max_particles=40),
        mask_settings=MaskSettings(lowpass_A=30.0, dilate_A=8.0, pad_A=16.0),
    )
    return folder / "particles"


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_copy_serves_the_same_images_from_scratch_alone_and_goes(prepared, tmp_path):
    source = open_full_images(prepared)
    rows = np.arange(len(source))[::-3].copy()
    expected = source.batch(rows)
    with cached_images(source, tmp_path / "scratch") as copied:
        (copy,) = (path for path in files(tmp_path) if path.suffix == ".images")
        assert copy.stat().st_size == len(source) * BOX**2 * 4  # those in use, not the whole stack
        original = source.stored[0].headers[0].path
        hidden = original.rename(original.with_suffix(".away"))
        try:
            copied_batch = copied.batch(rows)
        finally:
            hidden.rename(original)
        assert copied.particles is source.particles  # messages name the original images
    assert np.array_equal(copied_batch.images, expected.images) and np.array_equal(
        copied_batch.transfer, expected.transfer
    )
    assert files(tmp_path) == [] and list((tmp_path / "scratch").iterdir()) == []
    assert np.array_equal(source.batch(rows).images, expected.images)


def test_without_cache_dir_the_source_is_itself(prepared):
    source = open_full_images(prepared)
    with cached_images(source, None) as same:
        assert same is source


def test_a_disk_too_small_is_reported_before_anything_is_written(prepared, tmp_path, caplog, monkeypatch):
    full = shutil.disk_usage(tmp_path)._replace(total=10**9, free=10**5)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: full)
    source = open_full_images(prepared)
    with caplog.at_level(logging.WARNING), cached_images(source, tmp_path) as used:
        assert used is source and files(tmp_path) == []
    (record,) = caplog.records
    assert "0.00 GB are needed, 0.00 GB are free" in record.getMessage()
    assert record.getMessage().startswith(f"reconstruct.cache_dir: {tmp_path}: images are not copied there")


def test_a_disk_that_fills_up_on_the_way_costs_the_copy_only(prepared, tmp_path, caplog, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache.os, "fsync", full)
    source = open_full_images(prepared)
    with caplog.at_level(logging.WARNING), cached_images(source, tmp_path) as used:
        assert used is source and files(tmp_path) == []
    assert "No space left on device" in caplog.records[0].getMessage()


def test_a_copy_that_differs_is_not_used(prepared, tmp_path, caplog, monkeypatch):
    honest = cache._checksum
    monkeypatch.setattr(cache, "_checksum", lambda path: honest(path) ^ 1)
    source = open_full_images(prepared)
    with caplog.at_level(logging.WARNING), cached_images(source, tmp_path) as used:
        assert used is source
    assert "differs" in caplog.records[0].getMessage()
    assert files(tmp_path) == []


def test_a_folder_that_cannot_be_made_costs_the_copy_only(prepared, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    source = open_full_images(prepared)
    with caplog.at_level(logging.WARNING), cached_images(source, tmp_path / "file" / "scratch") as used:
        assert used is source
    assert len(caplog.records) == 1


def test_an_error_inside_removes_the_copy_and_is_not_swallowed(prepared, tmp_path):
    with pytest.raises(OSError, match="mine"), cached_images(open_full_images(prepared), tmp_path):
        raise OSError("mine")
    assert files(tmp_path) == []


def test_jobs_leave_each_other_alone_and_what_a_dead_one_left_is_removed(prepared, tmp_path):
    left = tmp_path / f"{cache._PREFIX}left"
    left.mkdir()
    (left / cache._LOCK).touch()
    (left / "000000.images").write_bytes(b"old")
    source = open_full_images(prepared)
    with cached_images(source, tmp_path) as first, cached_images(source, tmp_path) as second:
        paths = {used.stored[0].headers[0].path for used in (first, second)}
        assert len(paths) == 2 and all(path.is_file() for path in paths)
        assert not left.exists()
    assert files(tmp_path) == []


def test_sigterm_removes_the_copy(prepared, tmp_path):
    script = (
        "import sys, time\n"
        "from flexlib.images.cache import cached_images\n"
        "from flexlib.images.sources import open_full_images\n"
        "with cached_images(open_full_images(sys.argv[1]), sys.argv[2]):\n"
        "    print('copied', flush=True)\n"
        "    time.sleep(60)\n"
    )
    job = subprocess.Popen([sys.executable, "-c", script, prepared, tmp_path], stdout=subprocess.PIPE, text=True)
    assert job.stdout.readline() == "copied\n"
    assert any(path.suffix == ".images" for path in files(tmp_path))
    began = time.monotonic()
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=20) == 128 + signal.SIGTERM and time.monotonic() - began < 10
    job.stdout.close()
    assert files(tmp_path) == []
