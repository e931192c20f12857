"""The CUDA backend without a GPU: its Triton kernels interpreted on the CPU, and compiled for a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from operator_cases import (
    CASES,
    assert_matches_reference,
    relative_error,
    rigidity_results,
    twisted_bodies,
)

from flexlib import runtime
from flexlib.projection import op, reference

WORKER = Path(__file__).with_name("triton_worker.py")


def _worker(task: str, folder: Path, **environment: str) -> dict:
    """What ``triton_worker.py`` finds. Triton reads its settings when it is imported: so in a process of its own."""
    out = folder / f"{task}.pt"
    done = subprocess.run(
        [sys.executable, str(WORKER), task, str(out)],
        env=os.environ | {"TRITON_CACHE_DIR": str(folder / "cache")} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    return _worker("interpret", tmp_path_factory.mktemp("interpret"), TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return _worker("compile", tmp_path_factory.mktemp("compile"), TRITON_INTERPRET="0")


@pytest.mark.parametrize("taps", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_forward_and_both_gradients_match_reference(interpreted, name, taps):
    assert_matches_reference(name, CASES[name], taps, interpreted[f"{name} {taps}"])


@pytest.mark.parametrize("taps", [2, 4])
def test_the_size_of_the_tiles_changes_nothing(interpreted, taps):
    for small, whole in zip(interpreted[f"centred {taps}"], interpreted[f"whole tile {taps}"], strict=True):
        assert relative_error(small, whole.double()) < 1e-6


def test_gradients_that_are_not_needed_come_back_empty(interpreted):
    _, grad_values, grad_vertices = interpreted["one voxel, one image 4"]
    alone, nothing = interpreted["needs (True, False)"]
    assert torch.equal(alone, grad_values) and nothing.numel() == 0
    nothing, alone = interpreted["needs (False, True)"]
    assert torch.equal(alone, grad_vertices) and nothing.numel() == 0
    assert [t.numel() for t in interpreted["needs (False, False)"]] == [0, 0]


def test_vertices_that_are_not_finite_spoil_their_own_image_only(interpreted):
    images, _, grad_vertices = interpreted["broken"]
    assert images[:2].isnan().any((1, 2)).all() and grad_vertices[:2].isnan().any(1).all()
    assert images[2:].isfinite().all() and grad_vertices[2:].isfinite().all()


def test_rigidity_energy_and_gradient_match_reference(interpreted):
    mesh, moved = twisted_bodies()
    energy, gradient = interpreted["rigidity"]
    expected_energy, expected_gradient = rigidity_results(mesh, moved)
    assert (expected_energy > 1e-4).all() and relative_error(energy, expected_energy) < 1e-5
    for found, expected in zip(gradient, expected_gradient, strict=True):
        assert relative_error(found, expected) < 1e-4


@pytest.mark.parametrize(
    ("kernel", "sums"),
    [
        ("splat 2", 2),
        ("splat 4", 4),
        ("fold 2", 0),
        ("fold 4", 0),
        ("adjoint 2", 9),
        ("adjoint 4", 9),
        ("rigidity", 13),
    ],
)
def test_kernels_compile_for_a_gpu(compiled, kernel, sums):
    """With a hardware atomic for each number, or row of them, that is added: no loop of compare-and-swap."""
    ptx = compiled[kernel]
    assert ".target sm_90" in ptx and "cas" not in ptx
    row = {"splat 2": r"\.v2", "splat 4": r"\.v4"}.get(kernel, "")
    assert len(re.findall(rf"(?:atom|red)\.\S*global\S*\.add{row}\.f32", ptx)) == sums


def test_what_triton_cannot_do_plain_torch_does(monkeypatch, caplog):
    assert op.backend("cuda", torch.float32).__name__ == "flexlib.projection.cuda"
    assert op.backend("cuda", torch.float64) is reference
    runtime.has_triton.cache_clear()
    monkeypatch.setattr(runtime, "find_spec", lambda name: None)
    try:
        assert op.backend("cuda", torch.float32) is reference
        assert op.backend("cuda", torch.float32) is reference
    finally:
        runtime.has_triton.cache_clear()
    assert [record.message.split(":")[0] for record in caplog.records] == ["triton is not installed"]
