"""flexlib installed where it cannot write: compiled code is kept in the user's cache folder, or not at all.

Permissions do not bind root, whom containers often run as. A file where ``__pycache__`` would be does, and a home that
is a device: no folder can be made there by anybody.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import flexlib

PACKAGE = Path(flexlib.__file__).parent

# imports every module that has compiled code, and runs some
PROGRAM = """
import importlib, logging, sys
from pathlib import Path
import numpy as np
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(levelname)s %(message)s")
for path in Path(sys.argv[1]).rglob("*.py"):
    if "@compiled(" in path.read_text():
        importlib.import_module(".".join(path.relative_to(Path(sys.argv[1]).parent).with_suffix("").parts))
from flexlib.tetra.tetmesh import single_cell_mesh
from flexlib.tetra.voxels import voxelise
assert Path(sys.modules["flexlib"].__file__).parent == Path(sys.argv[1])
print("voxels:", len(voxelise(single_cell_mesh(16.0), np.ones((8, 8, 8), np.float32), 2.0).cell))
"""


@pytest.fixture(scope="module")
def read_only(tmp_path_factory) -> Path:
    """A copy of the package in which no compiled code can be kept."""
    package = shutil.copytree(
        PACKAGE, tmp_path_factory.mktemp("site") / "flexlib", ignore=shutil.ignore_patterns("__pycache__")
    )
    for folder in [package, *(path for path in package.rglob("*") if path.is_dir())]:
        (folder / "__pycache__").touch()
    return package


def run(package: Path, **environment: str) -> str:
    """What ``PROGRAM`` says."""
    unwanted = ("HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR")
    kept = {name: value for name, value in os.environ.items() if name not in unwanted}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(package)],
        env={**kept, "PYTHONPATH": str(package.parent), **environment},
        capture_output=True,
        text=True,
        cwd=package.parent,
    )
    assert result.returncode == 0, result.stderr
    assert re.search(r"voxels: [1-9]", result.stdout)
    return result.stdout


def kept_code(folder: Path) -> set[str]:
    return {path.name.partition("-")[0] for path in folder.rglob("*.nbc")}


def test_nowhere_to_keep_it_runs_and_says_so_once(read_only):
    said = run(read_only, HOME="/dev/null")
    assert said.count("WARNING compiled code can be kept neither in ") == 1
    assert "NUMBA_CACHE_DIR" in said and not kept_code(read_only.parent)


def test_the_users_cache_folder_is_used(read_only, tmp_path):
    assert "compiled code" not in run(read_only, HOME=str(tmp_path))
    assert kept_code(tmp_path / ".cache/numba") == {"voxels._assign_cells"}


def test_a_named_folder_is_used(read_only, tmp_path):
    assert "compiled code" not in run(read_only, HOME="/dev/null", NUMBA_CACHE_DIR=str(tmp_path / "named"))
    assert kept_code(tmp_path / "named") == {"voxels._assign_cells"}


def test_only_one_place_asks_numba_to_compile():
    asking = [path for path in PACKAGE.rglob("*.py") if re.search(r"\bnjit\(|numba\.(jit|njit)", path.read_text())]
    assert [path.relative_to(PACKAGE).as_posix() for path in asking] == ["runtime.py"]
