"""What the process runs on: its device, its threads, its memory and the versions of its libraries.

The settings cost nothing and save much; every number stays the same but for denormals.
"""

from __future__ import annotations

import ctypes
import io
import logging
import platform
from collections.abc import Callable
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexlib.errors import InputError
from flexlib.files import reading

if TYPE_CHECKING:
    import numpy as np
    import torch
    from scipy.spatial import cKDTree

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


def kd_tree(points: np.ndarray) -> cKDTree:
    """Scipy's ``cKDTree`` of (n, k) points, also where denormal numbers count as zero (``tune_process``).

    It parts points at the next number above some coordinate. Above zero that is a denormal number: where this counts
    as zero nothing is parted, for ever, and the process dies.
    """
    import numpy as np
    import torch
    from scipy.spatial import cKDTree

    if np.multiply(np.nextafter(0.0, 1.0), 1.0) > 0:
        return cKDTree(points)
    torch.set_flush_denormal(False)
    try:
        return cKDTree(points)
    finally:
        torch.set_flush_denormal(True)


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorate a function as ``numba.njit(**options)``, its machine code kept for the next process.

    It is kept beside the source, or else in the user's cache folder (``NUMBA_CACHE_DIR`` names another). Where neither
    can be written, every process compiles for itself, which a warning tells once.
    """
    from numba import njit

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError as error:
            if "cannot cache function" not in str(error):
                raise
        _warn_uncached()
        return njit(**options)(function)

    return decorate


@cache
def _warn_uncached() -> None:
    logger.warning(
        "compiled code can be kept neither in %s nor in the user's cache folder, and every job compiles it anew: let "
        "NUMBA_CACHE_DIR name a folder that can be written",
        Path(__file__).parent,
    )


def share_threads_with_numba() -> None:
    """Give numba kernels as many threads as torch has been given."""
    import numba
    import torch

    threads, available = torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    numba.set_num_threads(min(threads, available))
    if torch.get_num_threads() != threads:  # numba starts its threads at its first use, and sets torch's number too
        torch.set_num_threads(threads)


def load_saved(path: Path, device: torch.device | str = "cpu") -> Any:
    """What ``torch.save`` wrote: tensors, numbers, texts and containers, and nothing that would run code.

    Raises
    ------
    InputError
        The file is damaged, or asks for anything else.
    """
    import torch

    with reading(path):
        content = path.read_bytes()
    try:
        return torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    except Exception as error:  # a damaged file can raise nearly anything
        raise InputError(f"{path}: damaged, or not a file of tensors that flexlib wrote: not loaded") from error


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
