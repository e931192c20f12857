"""flexlib where nothing can be written beside it, nor in the user's home: a module, a container, another's packages.

Root may write everywhere, so folders are made impossible instead of forbidden: a file stands where ``__pycache__``
would be, and the home is in /proc.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILE = """
import sys, tempfile
tempfile.tempdir = sys.argv[1]
import numpy as np
from flexlib.runtime import keeps_compiled
from flexlib.tetra.tetmesh import single_cell_mesh
from flexlib.tetra.voxels import voxelise
import flexlib.reconstruct.run, flexlib.render.surface, flexlib.simulate.run, flexlib.train.run
mask = np.zeros((4, 4, 4), bool)
mask[1:3, 1:3, 1:3] = True
print(flexlib.train.run.__file__, keeps_compiled(), len(voxelise(single_cell_mesh(4.0), mask, 1.0).index))
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A flexlib beside which no compiled code can be kept."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT / "flexlib", folder / "flexlib", ignore=shutil.ignore_patterns("__pycache__"))
    for inner in [folder / "flexlib", *(path for path in (folder / "flexlib").iterdir() if path.is_dir())]:
        (inner / "__pycache__").touch()
    return folder


def compile_there(package, temporary):
    """What COMPILE prints with a folder for temporary files."""
    kept = {key: value for key, value in os.environ.items() if key not in ("XDG_CACHE_HOME", "NUMBA_CACHE_DIR")}
    variables = {"HOME": "/proc/none", "PYTHONPATH": str(package)}
    command = [sys.executable, "-B", "-c", COMPILE, str(temporary)]
    done = subprocess.run(command, cwd="/", env=kept | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    file, keeps, voxels = done.stdout.split()
    assert Path(file).is_relative_to(package) and int(voxels) == 8
    return keeps == "True"


def test_compiled_code_is_kept_in_a_folder_of_the_users_own(package, tmp_path):
    assert compile_there(package, tmp_path)
    (kept,) = tmp_path.glob("flexlib-compiled-*")
    assert kept.stat().st_mode & 0o777 == 0o700
    assert list(kept.rglob("*.nbi"))


def test_not_in_a_folder_that_others_could_have_filled(package, tmp_path):
    others = tmp_path / f"flexlib-compiled-{os.getuid()}"
    others.mkdir()
    others.chmod(0o777)
    assert not compile_there(package, tmp_path)
    assert not list(others.iterdir())


def test_where_nothing_at_all_can_be_written_it_is_compiled_each_time(package):
    assert not compile_there(package, "/proc/none")
