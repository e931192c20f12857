"""Packages of one environment linked into another, in a second where pip would take a minute to unpack them.

Of Snakemake's environment and the standard library: the stand-in for conda (``tests/conda``) uses it there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement


def link_packages(wanted: Iterable[str], prefix: Path, search_path: Iterable[str], but: Iterable[str] = ()) -> None:
    """Give the environment ``prefix`` what is ``wanted`` and all that this needs, from the folders of a search path.

    What is not there, or in another version, is left to pip, and so are the packages ``but``: those that have commands,
    which cannot be linked.
    """
    (target,) = prefix.glob("lib/python*/site-packages")
    at_hand = {}
    for package in metadata.distributions(path=list(search_path)):
        at_hand.setdefault(_name(package.metadata["Name"]), package)
    there = {_name(package.metadata["Name"]) for package in metadata.distributions(path=[str(target)])}
    for package in (package for name, package in _needed(wanted, at_hand).items() if name not in {*there, *but}):
        for file in package.files or ():
            if ".." not in file.parts:
                _link(Path(file.locate()), target / file)


def _needed(wanted: Iterable[str], at_hand: dict[str, metadata.Distribution]) -> dict[str, metadata.Distribution]:
    found, ahead = {}, list(wanted)
    while ahead:
        asked = Requirement(ahead.pop())
        package = at_hand.get(_name(asked.name))
        applies = asked.marker is None or asked.marker.evaluate({"extra": ""})
        if applies and package and _name(asked.name) not in found and asked.specifier.contains(package.version):
            found[_name(asked.name)] = package
            ahead += package.requires or ()
    return found


def _name(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def _link(source: Path, target: Path) -> None:
    if target.exists() or not source.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)
