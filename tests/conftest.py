"""Fixtures that several test files share."""

import os
from pathlib import Path

import pytest
import torch

# Two threads of a busy machine wait for each other a hundred times longer than these tests' tensors take to compute.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder TESSERA_DATA: real images and weights, which are not part of the project."""
    folder = os.environ.get("TESSERA_DATA")
    if not folder:
        pytest.skip("TESSERA_DATA is not set: no real images and weights here")
    return Path(folder)
