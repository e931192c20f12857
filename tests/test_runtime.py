"""The device that a run's ``device:`` stands for."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from flexlib.errors import InputError
from flexlib.runtime import kd_tree, resolve_device


@pytest.mark.parametrize(
    ("asked", "gpus", "given"), [("auto", 0, "cpu"), ("auto", 1, "cuda"), ("cpu", 1, "cpu"), ("cuda", 1, "cuda")]
)
def test_auto_is_a_gpu_where_there_is_one(monkeypatch, asked, gpus, given):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert resolve_device(asked) == torch.device(given)


def test_a_gpu_that_is_not_there_is_the_users_mistake(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match="torch sees no GPU here"):
        resolve_device("cuda")


def test_points_at_zero_make_a_tree_where_denormals_count_as_zero():
    points = np.concatenate([np.zeros((500, 2)), np.random.default_rng(0).standard_normal((500, 2))])
    expected = kd_tree(points + 3.0).query(points[::7] + 3.0, 2)[0]
    code = (
        "import sys, numpy as np, torch; from flexlib.runtime import kd_tree; torch.set_flush_denormal(True);"
        "points = np.frombuffer(sys.stdin.buffer.read()).reshape(-1, 2);"
        "print(kd_tree(points).query(points[::7], 2)[0].tobytes().hex(), np.nextafter(0.0, 1.0) * 1.0)"
    )
    # it may die
    ended = subprocess.run([sys.executable, "-c", code], input=points.tobytes(), capture_output=True)
    assert ended.returncode == 0, ended.stderr
    found, denormal = ended.stdout.split()
    np.testing.assert_allclose(np.frombuffer(bytes.fromhex(found.decode())).reshape(-1, 2), expected, atol=1e-12)
    assert float(denormal) == 0.0  # still
