"""Read a particle set, whichever program wrote it."""

from __future__ import annotations

from pathlib import Path

from flexlib.errors import InputError
from flexlib.particles.table import Particles


def read_particles(
    path: str | Path, passthrough: str | Path | None = None, image_root: str | Path | None = None
) -> Particles:
    """Read RELION STAR or CryoSPARC .cs metadata; images are not opened (see ``stack.open_stacks``).

    ``passthrough`` is a second .cs with further columns of the same particles; ``image_root`` the folder that image
    paths are relative to (default: the file's own folder, then its parents). Raises InputError naming file, row and
    column for anything missing or not a number.
    """
    path = Path(path)
    root = None if image_root is None else Path(image_root)
    if not path.is_file():
        raise InputError(f"{path}: particle file not found")
    if path.suffix == ".cs":
        from flexlib.particles.cs import read_cs

        return read_cs(path, None if passthrough is None else Path(passthrough), root)
    if path.suffix == ".star":
        if passthrough is not None:
            raise InputError(f"passthrough: {passthrough}: only used with a .cs particle file, not with {path}")
        from flexlib.particles.star import read_star

        return read_star(path, root)
    raise InputError(f"{path}: particle file must end in .star (RELION) or .cs (CryoSPARC)")
