"""Fixtures that several test files share."""

import gc
import os
import sys
from pathlib import Path

import pytest
import torch

# Flushing protects from power cuts, which no test causes, and takes a third of the suite's time.
# (tests/stage1_tokenizer/engine/test_checkpoint.py tests that files are flushed before they are renamed.)
os.fsync = lambda fd: None

# On a busy machine, two threads wait for each other a hundred times longer than these tests' tensors take to compute.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests of docs/reliability.md on systems other than Linux: they use /proc, limits and signals."""
    if sys.platform == "linux":
        return
    for item in items:
        if item.path.parent.name == "faults" or item.path.name in ("test_fuzz.py", "test_headers.py"):
            item.add_marker(pytest.mark.skip(reason="Linux only"))


def pytest_collection_finish() -> None:
    """Exclude the imported modules from garbage collection, which saves time."""
    gc.freeze()


def pytest_unconfigure() -> None:
    """Include them again, or extension modules report leaks."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder TESSERA_DATA: real images and weights, which are not part of the project."""
    folder = os.environ.get("TESSERA_DATA")
    if not folder:
        pytest.skip("TESSERA_DATA is not set: no real images and weights here")
    return Path(folder)
