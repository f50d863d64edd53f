"""Faults of the processes that prepare batches: row 30 of the table of faults."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from stage1_tokenizer.data.bad_files import BadImageError
from stage1_tokenizer.data.base import DataSplit, ImageArray
from stage1_tokenizer.data.folder import FolderConfig
from stage1_tokenizer.data.image_batches import ImageBatches
from stage1_tokenizer.data.order import Batch, BatchOrder, training_batches
from stage1_tokenizer.engine.errors import BadFileError, StorageError

N = 20
# Python 3.12 warns of any fork in a process with threads, and torch has some.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


class Struck(DataSplit):
    """20 images. Reading the thirteenth in a worker calls `strike`."""

    identity = ""

    def __init__(self, strike: Callable[[], object]) -> None:
        self._strike, self._parent = strike, os.getpid()

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[ImageArray, int]:
        if index == 12 and os.getpid() != self._parent:
            self._strike()
        return np.full((8, 8, 3), index, dtype=np.uint8), index


def batches(strike: Callable[[], object], workers: int = 2) -> list[Batch]:
    data = FolderConfig(root="unused", image_size=(8, 8), cache="none", bad_share=0.01)
    made = ImageBatches(Struck(strike), data, seed=0)
    return list(training_batches(made, BatchOrder(N, 4, 0), 0, 10, workers))


@pytest.mark.parametrize("how", ["killed", "ended"])
def test_fault_30_a_dead_worker_is_a_plain_error(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Fault 30: the kernel kills a worker when no memory is left. The run ends soon, with what to do, and not by an
    exception that torch raises wherever the program happens to be."""
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))  # five seconds, else
    before, children = signal.getsignal(signal.SIGCHLD), {*multiprocessing.active_children()}
    start = time.monotonic()
    with pytest.raises(StorageError, match=r"one of 2 data workers died .* [Ll]ower data\.workers") as caught:
        batches((lambda: os.kill(os.getpid(), signal.SIGKILL)) if how == "killed" else lambda: os._exit(1))
    assert time.monotonic() - start < 60
    assert caught.value.exit_code == 5
    assert signal.getsignal(signal.SIGCHLD) == before
    assert not {*multiprocessing.active_children()} - children


def refuse() -> None:
    raise BadImageError(Path("x.png"), "the file is empty")


def test_fault_30_a_workers_error_has_no_traceback_in_it() -> None:
    """Fault 30: an error of the user's is the same message whichever process meets it; torch pastes a traceback in."""
    with pytest.raises(BadFileError) as caught:
        batches(refuse)
    assert str(caught.value).startswith("1 of 20 images cannot be read")
    assert "x.png: the file is empty" in str(caught.value)
    assert "Traceback" not in str(caught.value)


def divide() -> float:
    return 1 / 0


def test_fault_30_an_error_of_our_own_keeps_its_traceback() -> None:
    """Fault 30: it is a bug and no lack of memory, so it says where it is."""
    with pytest.raises(ZeroDivisionError, match=r"in divide"):
        batches(divide)


def test_fault_30_workers_are_forked() -> None:
    """Fault 30: where another way is the default, as from Python 3.14 on, each worker would be sent a copy of all the
    images. These cannot be sent at all."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        assert len(batches(lambda: None)) == 10
    finally:
        multiprocessing.set_start_method(before, force=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_fault_30_a_signal_to_all_processes_leaves_the_workers_at_work(number: int) -> None:
    """Fault 30: Ctrl-C and schedulers signal the workers too, while the run still waits for the batches of the step
    that it means to finish."""
    told = batches(lambda: os.kill(os.getpid(), number))
    assert len(told) == 10
    for (pixels, labels), (same, too) in zip(told, batches(refuse, workers=0), strict=True):
        assert torch.equal(pixels, same)
        assert torch.equal(labels, too)


def test_fault_30_workers_that_ignore_signals_end_with_the_run() -> None:
    """Fault 30: when the run stops early, or by an error, no worker is left over and none is waited for."""
    made = ImageBatches(Struck(lambda: None), FolderConfig(root="unused", image_size=(8, 8), cache="none"), seed=0)
    start, before = time.monotonic(), {*multiprocessing.active_children()}
    stream = training_batches(made, BatchOrder(N, 4, 0), 0, 1000, 2)
    next(stream)
    assert len({*multiprocessing.active_children()} - before) == 2
    del stream
    assert not {*multiprocessing.active_children()} - before
    assert time.monotonic() - start < 60
