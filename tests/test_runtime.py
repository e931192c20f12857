"""The device that a run's ``device:`` stands for."""

import pytest
import torch

from flexlib.errors import InputError
from flexlib.runtime import resolve_device


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
