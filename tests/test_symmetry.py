"""Point groups: against the operators that RELION prints, and as groups."""

import re
import shutil
import subprocess

import numpy as np
import pytest

from flexlib.errors import InputError
from flexlib.symmetry import symmetry_rotations

GROUPS = {"C1": 1, "C3": 3, "D2": 4, "D7": 14, "T": 12, "O": 24, "I": 60, "I1": 60, "I2": 60, "I3": 60, "I4": 60}


def relion_rotations(name):
    """What ``relion_refine --print_symmetry_ops`` prints: (m, 3, 3), five or six digits."""
    program = shutil.which("relion_refine")
    assert program, "relion_refine is not on the path: install RELION (apt-get install relion)"
    command = [program, "--sym", name, "--print_symmetry_ops"]
    text = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    number = r"\s+(-?[\d.]+(?:e-?\d+)?)"
    matrices = re.findall(rf"R\(\d+\)={number * 9}", text)
    return np.array(matrices, float).reshape(-1, 3, 3)


def unmatched(first, second):
    """Largest distance of any rotation of one set to the nearest of the other."""
    distance = np.abs(first[:, None] - second[None]).max((2, 3))
    return max(distance.min(0).max(), distance.min(1).max())


@pytest.mark.parametrize("name", GROUPS)
def test_rotations_are_relions(name):
    ours, theirs = symmetry_rotations(name), relion_rotations(name)
    assert len(ours) == len(theirs) == GROUPS[name]
    assert unmatched(ours, theirs) < 2e-5


@pytest.mark.parametrize("name", GROUPS)
def test_rotations_form_a_group(name):
    rotations = symmetry_rotations(name)
    np.testing.assert_array_equal(rotations[0], np.eye(3))
    np.testing.assert_allclose(np.linalg.det(rotations), 1, atol=1e-12)
    np.testing.assert_allclose(
        rotations @ rotations.transpose(0, 2, 1), np.broadcast_to(np.eye(3), rotations.shape), atol=1e-12
    )
    products = (rotations[:, None] @ rotations[None]).reshape(-1, 3, 3)
    assert unmatched(rotations, products) < 1e-12


def test_icosahedral_settings_differ():
    for first in ("I1", "I2", "I3", "I4"):
        for second in ("I1", "I2", "I3", "I4"):
            assert (unmatched(symmetry_rotations(first), symmetry_rotations(second)) < 1e-6) == (first == second)


def test_names():
    assert len(symmetry_rotations("d3")) == 6 and len(symmetry_rotations(" c12 ")) == 12
    for name in ("C0", "I5", "Oh", "C3v", "", "D", "7", "C1000"):
        with pytest.raises(InputError, match=r"prepare.symmetry: .* is no point group"):
            symmetry_rotations(name)
