"""Options of the test run."""

from pathlib import Path


def pytest_addoption(parser):
    parser.addoption(
        "--data",
        type=Path,
        default=None,
        help="folder with the flexible IgG particle set (igg/); adds the acceptance tests on it (minutes)",
    )

    parser.addoption("--slurm", action="store_true", help="the tests on the SLURM that tests/slurm/cluster.sh starts")


def pytest_ignore_collect(collection_path, config):
    if "acceptance" in collection_path.parts and config.getoption("--data") is None:
        return True
    if "slurm" in collection_path.parts and not config.getoption("--slurm"):
        return True
    return None
