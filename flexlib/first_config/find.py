"""What lies near the user's files: the folder that image paths start in, half-maps, a job's symmetry."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from flexlib.errors import InputError
from flexlib.files import is_there
from flexlib.particles.star_text import StarText, read_star_text
from flexlib.particles.table import Particles, find_image_file

_HALVES = (("half1", "half2"), ("half_A", "half_B"))  # in the names of RELION's half-maps, and of CryoSPARC's
_LIKE = 3  # letters that the names of a map and its half-maps begin with alike, at least
_MAX_FOLDERS = 500  # that are searched for the images
_MAX_BYTES = 2**20  # of a job's file that is read: those that state the symmetry are small
_GROUP = r"([Cc][1-9]\d*|[Dd][1-9]\d*|[Tt]|[Oo]|[Ii][1-4]?)"


def find_image_root(particles: Particles, folders: Iterable[Path]) -> Path | None:
    """The folder in which all image stacks are found by the paths that the metadata have for them.

    Parameters
    ----------
    particles
        Whose stacks were not found.
    folders
        To look in: each, then their parents, then the folders directly within them.

    Returns
    -------
    root
        The first that has every stack; None where none has, or where paths are absolute.
    """
    names = particles.extra["stack_names"]
    used = [names[stack] for stack in np.unique(particles.stack_index)]
    for root in _roots(list(folders)):
        found = [find_image_file(name, particles.source_path, root) for name in used]
        if all(file is not None and is_there(file, as_file=True) for file in found):
            return root
    return None


def _roots(folders: list[Path]) -> Iterator[Path]:
    """``folders``, their parents, and the folders within them; each once, no more than ``_MAX_FOLDERS``."""
    near = [root for folder in folders for root in (folder.absolute(), *folder.absolute().parents)]
    seen: set[Path] = set()
    for root in [*near, *(inner for folder in folders for inner in _inner_folders(folder.absolute()))]:
        if root not in seen and len(seen) < _MAX_FOLDERS:
            seen.add(root)
            yield root


def _inner_folders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:  # a folder that may not be read has nothing for us
        return []


def find_half_maps(consensus: Path) -> tuple[Path, Path] | None:
    """The half-maps that RELION or CryoSPARC wrote beside a map.

    RELION's ``run_class001`` has ``run_half1_class001_unfil`` and its like, CryoSPARC's ``J1_2_volume_map`` has
    ``J1_2_volume_map_half_A`` and ``_half_B``. Of several pairs, that with the longest common beginning with the map's
    name is taken, and unfiltered ones before others.
    """
    if not consensus.parent.is_dir():
        return None
    pairs = [
        (path, other)
        for first, second in _HALVES
        for path in sorted(consensus.parent.glob(f"*{first}*.mrc"))
        if (other := path.with_name(path.name.replace(first, second))).is_file()
    ]

    def likeness(pair: tuple[Path, Path]) -> tuple[int, bool]:
        same = [a == b for a, b in zip(pair[0].stem, consensus.stem, strict=False)]
        return [*same, False].index(False), "unfil" in pair[0].name

    best = max(pairs, key=likeness, default=None)
    return best if best is not None and likeness(best)[0] >= _LIKE else None


def find_symmetry(folders: Iterable[Path]) -> tuple[str, Path] | None:
    """The point group that a refinement's own files state, and the file that does.

    Looked for in each of ``folders``: RELION's sampling, model and optimiser files (the last iteration's), its
    ``job.star``, and CryoSPARC's ``job.json``.
    """
    for folder in dict.fromkeys(path.absolute() for path in folders):
        for path in _job_files(folder):
            if (group := _stated_symmetry(path)) is not None:
                return group.upper(), path
    return None


def _job_files(folder: Path) -> list[Path]:
    """Files of ``folder`` that may state the symmetry, the most telling first."""
    kinds = ("run*_sampling.star", "run*_model.star", "run*_optimiser.star", "job.star", "job.json")
    found: list[Path] = []
    for kind in kinds:
        # "run_" sorts after "run_it025_": the final iteration's comes first
        found += sorted(folder.glob(kind), key=lambda path: ("_it" not in path.name, path.name), reverse=True)
    return [path for path in found if path.is_file() and path.stat().st_size <= _MAX_BYTES]


def _stated_symmetry(path: Path) -> str | None:
    if path.suffix == ".json":
        text = path.read_text(errors="replace")
        match = re.search(r'"refine_symmetry"\s*:\s*\{[^{}]*"value"\s*:\s*"' + _GROUP + '"', text)
        return match[1] if match else None
    try:
        star = read_star_text(path)
        stated = _symmetry_in_tables(star)
    except InputError:  # not our file to judge
        return None
    if stated is None:
        match = re.search(rf"--sym\s+{_GROUP}(?=\s|$)", star.content.decode(errors="replace"))
        stated = match[1] if match else None
    return stated if stated is not None and re.fullmatch(_GROUP, stated) else None


def _symmetry_in_tables(star: StarText) -> str | None:
    """``rlnSymmetryGroup`` of any table, or the job option ``sym_name``."""
    option, value = "rlnJobOptionVariable", "rlnJobOptionValue"
    for table in star.tables:
        if "rlnSymmetryGroup" in table.labels and len(table):
            return str(star.frame(table, ["rlnSymmetryGroup"], ["rlnSymmetryGroup"])["rlnSymmetryGroup"].iloc[0])
        if option in table.labels and value in table.labels:
            options = star.frame(table, [option, value], [option, value])
            named = options[options[option] == "sym_name"][value]
            if len(named):
                return str(named.iloc[0])
    return None
