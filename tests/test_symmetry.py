"""Point groups: against the operators that RELION prints, and as groups."""

import re
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
from scipy.spatial.transform import Rotation

from flexlib.errors import InputError
from flexlib.imaging.symmetry import symmetry_rotations
from flexlib.particles import read_particles
from flexlib.particles.star_write import write_star

GROUPS = {"C1": 1, "C3": 3, "D2": 4, "D7": 14, "T": 12, "O": 24, "I": 60, "I1": 60, "I2": 60, "I3": 60, "I4": 60}


def run(program, *arguments):
    """Standard output of one of RELION's programs."""
    path = shutil.which(program)
    assert path, f"{program} is not on the path: install RELION (apt-get install relion)"
    return subprocess.run([path, *arguments], capture_output=True, text=True, timeout=60, check=True).stdout


def relion_rotations(name):
    """What ``relion_refine --print_symmetry_ops`` prints: (m, 3, 3), five or six digits."""
    text = run("relion_refine", "--sym", name, "--print_symmetry_ops")
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


@pytest.mark.parametrize("name", ["C3", "D2", "T", "I1"])
def test_poses_are_those_of_relions_symmetry_expansion(tmp_path, name):
    """``relion_particle_symmetry_expand`` gives the poses R g, in another order."""
    optics = {
        "rlnOpticsGroup": [1],
        "rlnOpticsGroupName": "a",
        "rlnVoltage": 300.0,
        "rlnSphericalAberration": 2.7,
        "rlnAmplitudeContrast": 0.1,
        "rlnImagePixelSize": 2.0,
        "rlnImageSize": 64,
        "rlnImageDimensionality": 2,
    }
    euler_deg = Rotation.random(5, rng=np.random.default_rng(2)).as_euler("ZYZ", degrees=True)
    angles = {f"rlnAngle{axis}": euler_deg[:, column] for column, axis in enumerate(("Rot", "Tilt", "Psi"))}
    names = [f"{number:06d}@a.mrcs" for number in range(1, 6)]
    rest = {"rlnOriginXAngst": 1.0, "rlnOriginYAngst": 2.0, "rlnDefocusU": 1e4, "rlnDefocusV": 1e4}
    table = pd.DataFrame({"rlnImageName": names, "rlnOpticsGroup": 1, **angles, **rest})
    write_star({"optics": pd.DataFrame(optics), "particles": table}, tmp_path / "in.star")
    run("relion_particle_symmetry_expand", "--i", str(tmp_path / "in.star"), "--o", str(tmp_path / "out.star"),
        "--sym", name)  # fmt: skip
    before, after = read_particles(tmp_path / "in.star"), read_particles(tmp_path / "out.star")
    for number in range(5):
        theirs = after.rotation[after.image_index == number]
        ours = before.rotation[number] @ symmetry_rotations(name)
        assert len(theirs) == len(ours) and unmatched(ours, theirs) < 2e-5


def test_icosahedral_settings_differ():
    for first in ("I1", "I2", "I3", "I4"):
        for second in ("I1", "I2", "I3", "I4"):
            assert (unmatched(symmetry_rotations(first), symmetry_rotations(second)) < 1e-6) == (first == second)


def test_names():
    assert len(symmetry_rotations("d3")) == 6 and len(symmetry_rotations(" c12 ")) == 12
    for name in ("C0", "I5", "Oh", "C3v", "", "D", "7", "C1000"):
        with pytest.raises(InputError, match=r"prepare.symmetry: .* is no point group"):
            symmetry_rotations(name)
