"""SHA-256 of every file that a run reads, each file read once, several at a time."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flexlib.errors import InputError
from flexlib.particles import read_particles
from flexlib.provenance.machine import home_folder
from flexlib.records import ChecksumsRecord, InputFile

logger = logging.getLogger(__name__)

IMAGES = "images"  # how a stack is used

Known = Mapping[tuple[str, int, int], str | None]  # SHA-256 by path, size and time of modification


def checksum_inputs(
    inputs: Mapping[str, Sequence[str | Path]],
    out_json: str | Path,
    image_root: str | Path | None = None,
    stacks: bool = True,
    threads: int = 4,
) -> None:
    """Write the sizes, times and SHA-256 of the user's files and of all image stacks that the particles name.

    What an earlier ``out_json`` has under the same path, size and time of modification is not read again.

    Parameters
    ----------
    inputs
        The paths under each key of the config, ``particles`` among them; a folder stands for the files in it.
    out_json
        ``records.ChecksumsRecord``.
    image_root
        As in ``read_particles``.
    stacks
        False takes no SHA-256 of image stacks, which can be a terabyte.
    threads
        Files that are read at the same time.

    Raises
    ------
    InputError
        A file is not there, or changes while it is read.
    """
    uses = _uses(inputs, image_root)
    known = _known(Path(out_json))

    def describe(path: Path) -> InputFile:
        hashed = stacks or uses[path] != [IMAGES]
        return _describe(path, spell(path, [image_root, *inputs["particles"]]), uses[path], known if hashed else None)

    with ThreadPoolExecutor(threads) as pool:
        files = list(pool.map(describe, uses))
    ChecksumsRecord(files).write(out_json)
    hashed = [file for file in files if file.sha256]
    gigabytes = sum(file.size_bytes for file in hashed) / 1e9
    logger.info("SHA-256 of %d of %d input files, %.3f GB", len(hashed), len(files), gigabytes)


def _uses(inputs: Mapping[str, Sequence[str | Path]], image_root: str | Path | None) -> dict[Path, list[str]]:
    """What each file is used as; a file that is named twice is there once."""
    uses: dict[Path, list[str]] = {}
    for key, paths in inputs.items():
        for path in map(Path, paths):
            files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
            for file in files:
                _add_use(uses, file, key)
    passthrough = next(iter(inputs.get("passthrough", [])), None)
    particles = read_particles(inputs["particles"][0], passthrough, image_root)
    for path in particles.stack_paths:
        _add_use(uses, path, IMAGES)
    return uses


def _add_use(uses: dict[Path, list[str]], path: Path, key: str) -> None:
    keys = uses.setdefault(path.absolute(), [])
    if key not in keys:
        keys.append(key)


def _known(path: Path) -> Known:
    if not path.is_file():
        return {}
    try:
        files = ChecksumsRecord.read(path).files
    except InputError as error:
        logger.warning("%s", error)
        return {}
    return {(file.path, file.size_bytes, file.modified_ns): file.sha256 for file in files}


def _describe(path: Path, spelled: str, used_as: list[str], known: Known | None) -> InputFile:
    """A file with its SHA-256; without one where ``known`` is None."""
    try:
        before = path.stat()
        sha256 = None
        if known is not None:
            sha256 = known.get((spelled, before.st_size, before.st_mtime_ns)) or _sha256(path)
        after = path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise InputError(f"{path}: changed while its checksum was taken")
    return InputFile(spelled, used_as, before.st_size, before.st_mtime_ns, sha256)


def _sha256(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def spell(path: Path, given: Sequence[str | Path | None]) -> str:
    """An absolute path as the config would have it.

    Relative to the working folder where it lies below it, else below one of ``given`` (paths as the config has them) or
    their parents; elsewhere the home folder is ``~``, so that no user's name is told.
    """
    folders = [Path(), *(parent for one in given if one is not None for parent in (Path(one), *Path(one).parents))]
    for folder in folders:
        if path.is_relative_to(folder.absolute()):
            return (folder / path.relative_to(folder.absolute())).as_posix()
    home = home_folder()
    if home is not None and path.is_relative_to(home):
        return f"~/{path.relative_to(home).as_posix()}"
    return path.as_posix()
