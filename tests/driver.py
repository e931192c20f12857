"""Snakemake as clusters have it: an environment of its own with nothing of ours, and jobs in another one.

The driver's environment is made once, by pip, in pytest's cache; that of the jobs by Snakemake's ``--sdm conda`` with
the stand-in for conda in ``tests/conda``, in the same place.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
import venv
from dataclasses import dataclass
from pathlib import Path

import mrcfile
import numpy as np
import starfile
import yaml
from conda.bin.linked_packages import link_packages
from run_snakemake import ROOT, small_config, start

POISON = "raise ImportError(\"this flexlib is of Snakemake's environment, not the workflow's\")\n"
IN_CONDA = ("--sdm", "conda")
PACKAGES_AT_HAND = [path for path in sys.path if path.endswith("site-packages")]


@dataclass(frozen=True)
class Driver:
    """An environment that has Snakemake, its SLURM plugin, snakedeploy, and a flexlib that must not be imported."""

    folder: Path

    @classmethod
    def made_in(cls, folder: Path) -> Driver:
        """The environment in ``folder``, made if it is not there."""
        driver = cls(folder)
        if not (folder / "made").exists():
            shutil.rmtree(folder, ignore_errors=True)
            venv.create(folder, with_pip=True)
            packages = ["snakemake>=9,<10", "snakemake-executor-plugin-slurm>=2.8", "snakedeploy"]
            link_packages(packages, folder, PACKAGES_AT_HAND, but=["snakemake"])
            subprocess.run([folder / "bin/python", "-m", "pip", "install", "--quiet", *packages], check=True)
            (folder / "made").touch()
        return driver

    @property
    def packages(self) -> Path:
        """Its site-packages."""
        return next(self.folder.glob("lib/python*/site-packages"))

    def poison(self) -> None:
        """Give it a flexlib that cannot be imported."""
        (self.packages / "flexlib").mkdir(exist_ok=True)
        (self.packages / "flexlib/__init__.py").write_text(POISON)

    def cure(self) -> None:
        """Take its flexlib away."""
        shutil.rmtree(self.packages / "flexlib", ignore_errors=True)

    @property
    def conda_prefix(self) -> Path:
        """Where conda's environments are; another folder where flexlib, which is in them, has other commands."""
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        return self.folder / f"conda-{hashlib.sha256(repr(project).encode()).hexdigest()[:8]}"

    @property
    def environment(self) -> dict[str, str]:
        """Variables of a shell in which it is active and conda is at hand; none of the tests' own environment."""
        kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        path = [self.folder / "bin", ROOT / "tests/conda/bin", "/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin"]
        return kept | {
            "PATH": os.pathsep.join(map(str, path)),
            "PACKAGES_AT_HAND": os.pathsep.join(PACKAGES_AT_HAND),
            "SNAKEMAKE_CONDA_PREFIX": str(self.conda_prefix),
        }

    def start(self, folder: Path, log: Path, *arguments: str, **variables: str) -> subprocess.Popen[bytes]:
        """Start Snakemake in ``folder``, in a process group of its own."""
        return start(["snakemake", *arguments], folder, log, self.environment | variables)

    def run(self, folder: Path, *arguments: str, **variables: str) -> str:
        """Run Snakemake in ``folder`` to its end, which must be a good one; what it says."""
        result = subprocess.run(
            ["snakemake", *arguments],
            cwd=folder,
            env=self.environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert result.returncode == 0, result.stdout[-8000:]
        return result.stdout


def clone(folder: Path) -> Path:
    """A Git repository in ``folder`` with all that this one tracks or would, as it is now."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists() or (ROOT / name).is_symlink():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    for compiled in ROOT.glob("flexlib/**/__pycache__/*.nb[ic]"):  # numba's, of these very files: a minute of work
        (folder / compiled.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy2(compiled, folder / compiled.relative_to(ROOT))
    who = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    for arguments in (("init", "--quiet"), ("add", "--all"), (*who, "commit", "--quiet", "--message=x"), ("tag", "v1")):
        subprocess.run(["git", *arguments], cwd=folder, check=True)
    return folder


def write_config(folder: Path, **more: object) -> Path:
    """``small_config`` as ``my.yaml`` in a folder."""
    (folder / "my.yaml").write_text(yaml.safe_dump(small_config(**more)))
    return folder / "my.yaml"


def assert_same_training(disturbed: Path, undisturbed: Path) -> None:
    """Latents and canonical map in the folders of two trainings of one sweep point."""
    tables = [
        starfile.read(folder / "latents.star", always_dict=True)["particles"] for folder in (disturbed, undisturbed)
    ]
    columns = ["flexLatent1", "flexLatent2"]
    np.testing.assert_allclose(tables[0][columns], tables[1][columns], atol=1e-3)
    assert_same_map(disturbed / "canonical.mrc", undisturbed / "canonical.mrc")


def assert_same_map(disturbed: Path, undisturbed: Path) -> None:
    """Two maps, to a thousandth of the largest value."""
    maps = [mrcfile.read(path) for path in (disturbed, undisturbed)]
    np.testing.assert_allclose(maps[0], maps[1], atol=1e-3 * np.abs(maps[1]).max())
