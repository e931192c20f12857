"""The flexible IgG particle set with its known truth (``--data DIR``)."""

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session")
def igg(request) -> Path:
    return (request.config.getoption("--data") / "igg").resolve()


@pytest.fixture(scope="session")
def truth(igg):
    return np.load(igg / "truth.npz")
