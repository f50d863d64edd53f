"""Fixtures that several test files share."""

import gc
import os
import sys
from pathlib import Path

import pytest
import torch

# Flushing to disk is for power cuts, which no test makes, and takes a third of the suite's time. (That it is done, and
# before the rename, tests/stage1_tokenizer/engine/test_checkpoint.py looks at.)
os.fsync = lambda fd: None

# Two threads of a busy machine wait for each other a hundred times longer than these tests' tensors take to compute.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What docs/reliability.md promises, it promises on Linux alone: these tests read /proc, and set limits and send
    signals of which other systems have not all."""
    if sys.platform == "linux":
        return
    for item in items:
        if item.path.parent.name == "faults" or item.path.name in ("test_fuzz.py", "test_headers.py"):
            item.add_marker(pytest.mark.skip(reason="on Linux alone"))


def pytest_collection_finish() -> None:
    """The garbage collector need not go through all that was imported, again and again."""
    gc.freeze()


def pytest_unconfigure() -> None:
    """At the end it must, or extension modules complain that something of theirs is left."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder TESSERA_DATA: real images and weights, which are not part of the project."""
    folder = os.environ.get("TESSERA_DATA")
    if not folder:
        pytest.skip("TESSERA_DATA is not set: no real images and weights here")
    return Path(folder)
