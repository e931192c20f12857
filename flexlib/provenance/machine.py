"""What a run ran with: versions, the code's commit, the machine; nothing about who ran it."""

from __future__ import annotations

import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import flexlib


@dataclass(frozen=True)
class Commit:
    """The state of the code's git checkout."""

    sha: str
    modified: bool  # tracked files differ from it


def code_commit(root: Path | None = None) -> Commit | None:
    """The commit of the checkout that is ``root`` (this flexlib's own); None where it is none, and without git."""
    root = Path(flexlib.__file__).parents[1] if root is None else root
    if not (root / ".git").exists():  # a folder, or a file in a worktree
        return None
    sha, changes = (_git(root, *words) for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno")))
    return None if sha is None or changes is None else Commit(sha.strip(), bool(changes.strip()))


def _git(root: Path, *words: str) -> str | None:
    """What git says; None where it fails."""
    try:
        run = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout


def operating_system() -> str:
    """Name and version, without the host's name."""
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = ""
    kernel = f"{platform.system()} {platform.release()} {platform.machine()}"
    return f"{name} ({kernel})" if name else kernel


def home_folder() -> Path | None:
    """The user's home; None where there is none, as in some containers, or where it is the whole disk."""
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home if home.name else None


def public_command(command: str) -> str:
    """A command line that tells no names: paths below the working folder are relative, the home folder is ``~``.

    The first word, a path into somebody's environment, becomes the program's name, and a folder named like the user
    becomes ``USER``.
    """
    program, _, arguments = command.partition(" ")
    parts = program.strip("'").split("/")
    program = parts[-2] if parts[-1] == "__main__.py" and len(parts) > 1 else parts[-1]
    here, home = Path.cwd().as_posix(), home_folder()
    end = r"(?![\w.-])"
    if here != "/":
        arguments = re.sub(f"{re.escape(here)}(?:/|{end})", "./", arguments)
    if home is not None:
        arguments = re.sub(f"{re.escape(home.as_posix())}{end}", "~", arguments)
        arguments = re.sub(f"(?<=/){re.escape(home.name)}{end}", "USER", arguments)
    return f"{program} {arguments}".strip()
