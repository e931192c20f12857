"""Options of the test run."""

from pathlib import Path


def pytest_addoption(parser):
    parser.addoption(
        "--data",
        type=Path,
        default=None,
        help="folder with the flexible IgG particle set (igg/); adds the acceptance tests on it (minutes)",
    )


def pytest_ignore_collect(collection_path, config):
    if "acceptance" in collection_path.parts and config.getoption("--data") is None:
        return True
    return None
