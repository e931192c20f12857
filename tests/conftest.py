"""Options of the test run, and how several workers (``-n``) share the machine."""

import os
from pathlib import Path

import numba
import pytest
import torch
from driver import Driver
from threadpoolctl import threadpool_limits

from flexlib.runtime import tune_process

# files with whole runs and trainings: first, so that no worker has one left when the others are done
LONGEST = ["test_end_to_end", "test_workflow", "test_driver", "test_training", "test_distributed", "test_views"]


def pytest_configure(config):
    """As the stages do, before any thread is started: threads inherit how the processor treats denormal numbers."""
    tune_process()
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        use_threads(max(1, len(os.sched_getaffinity(0)) // workers))


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def use_threads(number):
    """Let this worker, and the processes that it starts unless told otherwise, use so many threads."""
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(variable, str(number))
    threadpool_limits(number)
    torch.set_num_threads(number)
    numba.set_num_threads(min(number, numba.config.NUMBA_NUM_THREADS))


def pytest_addoption(parser):
    parser.addoption(
        "--data",
        type=Path,
        default=None,
        help="folder with the flexible IgG particle set (igg/); adds the acceptance tests on it (minutes)",
    )

    parser.addoption("--slurm", action="store_true", help="the tests on the SLURM that tests/slurm/cluster.sh starts")

    parser.addoption("--faults", action="store_true", help="stages killed, without room or input (tests/faults)")

    parser.addoption("--gpu", action="store_true", help="the tests that need a CUDA device (tests/gpu)")


def pytest_ignore_collect(collection_path, config):
    if "acceptance" in collection_path.parts and config.getoption("--data") is None:
        return True
    if "slurm" in collection_path.parts and not config.getoption("--slurm"):
        return True
    if "faults" in collection_path.parts and not config.getoption("--faults"):
        return True
    if "gpu" in collection_path.parts and not config.getoption("--gpu"):
        return True
    return None


@pytest.fixture(scope="session")
def driver(request):
    """An environment with Snakemake and a flexlib that must not be imported; kept in pytest's cache."""
    driver = Driver.made_in(Path(request.config.cache.mkdir("driver")))
    driver.poison()
    yield driver
    driver.cure()


@pytest.fixture(scope="module")
def one_thread():
    """Problems this small are slower with more: threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
