"""What the process runs on: its device, its threads, its memory and the versions of its libraries.

The settings cost nothing and save much; every number stays the same but for denormals.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import stat
import tempfile
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from flexlib.errors import InputError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

PACKAGES = (  # whose versions are reported
    "torch",
    "triton",
    "numpy",
    "scipy",
    "numba",
    "pandas",
    "mrcfile",
    "h5py",
    "meshio",
    "pyamg",
    "scikit-image",
    "plotly",
    "snakemake",
)

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8  # glibc, malloc.h


def tune_process() -> None:
    """Keep freed memory for the next batch, and treat denormal numbers as zero.

    To be called before numba or torch have started threads: a thread inherits how it treats denormal numbers, and where
    threads differ in that, results of the order of 1e-38 depend on their number.

    Batches of the same size come and go by the thousand; without this, glibc returns each large array to the system,
    which maps it anew, page by page. Threads share one heap: what the one that reads ahead has freed is not kept for it
    alone. Where the C library has no ``mallopt`` nothing happens.
    """
    import torch

    torch.set_flush_denormal(True)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
    mallopt(_M_TOP_PAD, 1 << 26)
    mallopt(_M_ARENA_MAX, 1)


@cache
def keeps_compiled() -> bool:
    """Whether numba can keep what it compiles, for ``njit(cache=...)``; without, every process compiles for a minute.

    It keeps it beside the source, else in the user's cache folder. Where neither can be written, as in containers and
    in other users' installations, a folder of the user's own below the temporary one takes their place; nobody else
    may write there, for what is found in it is run.
    """
    import numba

    if numba.config.CACHE_DIR:  # type: ignore[attr-defined]
        return _is_writable(Path(numba.config.CACHE_DIR))  # type: ignore[attr-defined]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser(), "numba")
    if _is_writable(Path(__file__).parent / "__pycache__") or _is_writable(home):
        return True
    try:
        own = Path(tempfile.gettempdir(), f"flexlib-compiled-{os.getuid()}")
        own.mkdir(mode=0o700, exist_ok=True)
        status = own.lstat()
    except OSError:
        return False
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        return False
    numba.config.CACHE_DIR = str(own)  # type: ignore[attr-defined]
    return True


def _is_writable(folder: Path) -> bool:
    """Whether a file can be made in a folder, which is made if it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except (OSError, RuntimeError):  # the latter of a home that is not known
        return False


def share_threads_with_numba() -> None:
    """Give numba kernels as many threads as torch has been given."""
    import numba
    import torch

    threads, available = torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    numba.set_num_threads(min(threads, available))
    if torch.get_num_threads() != threads:  # numba starts its threads at its first use, and sets torch's number too
        torch.set_num_threads(threads)


@cache
def has_triton() -> bool:
    """Whether Triton, which torch brings along with CUDA on Linux, is installed; warns once where it is not."""
    if find_spec("triton") is not None:
        return True
    logger.warning("triton is not installed: projections on this GPU are computed by plain torch, slowly")
    return False


def resolve_device(device: str) -> torch.device:
    """The device that a ``device:`` of the config stands for.

    Parameters
    ----------
    device : str
        "auto" (a GPU where torch sees one, else the CPU), "cuda", "cpu", or any other name of a torch device.

    Raises
    ------
    InputError
        A GPU is asked for and torch sees none.
    """
    import torch

    sees_gpu = torch.cuda.device_count() > 0
    if device == "auto":
        return torch.device("cuda" if sees_gpu else "cpu")
    chosen = torch.device(device)
    if chosen.type == "cuda" and not sees_gpu:
        raise InputError("device: cuda, but torch sees no GPU here: ask for one (resources: gpu) or set device: auto")
    return chosen


def describe_device(device: torch.device) -> str:
    """Kind and name of a device: "cuda (NVIDIA H100 80GB HBM3)", "cpu (AMD EPYC 7763 64-Core Processor)"."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    return f"{device.type} ({name})"


def processor_name() -> str:
    """The CPU's name where the system tells it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def package_versions() -> dict[str, str]:
    """Installed versions of ``PACKAGES``, those that are there."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
