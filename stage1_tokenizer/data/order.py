"""Which pictures make up which batch: a function of (seed, step), the same on any number of processes.

Training reads the stream  perm(epoch 0), perm(epoch 1), ...  without a gap; step s takes positions s*B .. (s+1)*B of
it, and each process takes its slice. So there is no state to save, and a resumed run continues with the next batch.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from stage1_tokenizer.data.image_batches import ImageBatches
from stage1_tokenizer.engine.errors import ConfigError, StorageError, UserError
from stage1_tokenizer.engine.seeds import derive_seed

START = "fork" if sys.platform == "linux" and hasattr(os, "fork") else "spawn"
"""How workers start. A fork shares the pictures; else each worker is sent a copy of all of them. On macOS the system's
own libraries may crash in a fork, and Windows has none."""
GRACE = 5.0
"""Seconds that a worker goes on after a SIGTERM of which it cannot tell the sender. If it was not the parent, then the
parent was sent one too, and needs batches until its last step is done."""
Places = tuple[NDArray[np.int64], NDArray[np.int64]]
Batch = tuple[Tensor, Tensor]


class BatchOrder:
    """The batches of a training run. `batch_size` is that of all processes and micro-batches together."""

    def __init__(self, n: int, batch_size: int, seed: int, rank: int = 0, processes: int = 1) -> None:
        if batch_size % processes:
            raise ConfigError(f"batch_size {batch_size} cannot be shared evenly by {processes} processes")
        self._n, self._batch, self._seed = n, batch_size, seed
        self._share = slice(rank * batch_size // processes, (rank + 1) * batch_size // processes)

    def places(self, step: int) -> Places:
        """This process's (indices, epochs) at a step, each (B / processes,)."""
        positions = np.arange(step * self._batch, (step + 1) * self._batch, dtype=np.int64)[self._share]
        epochs = positions // self._n
        indices = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = _permutation(self._n, self._seed, int(epoch))[positions[here] % self._n]
        return indices, epochs

    def describe_batch(self, step: int, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the batch of a step with its indices and epochs, each (B / processes,), to be saved for inspection."""
        indices, epochs = map(torch.from_numpy, self.places(step))
        return {"pixels": pixels, "labels": labels, "indices": indices, "epochs": epochs}


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng(derive_seed(seed, "order", epoch)).permutation(n)


def share(n: int, rank: int, processes: int) -> range:
    """The part of 0..n-1 that falls to a process: contiguous, and every index in exactly one part."""
    return range(n * rank // processes, n * (rank + 1) // processes)


def parts_of(indices: NDArray[np.int64], at_most: int) -> list[NDArray[np.int64]]:
    """Split indices (n,) into parts of nearly equal length, `at_most` or less; no part is empty, so of none are none.

    A process has none where there are fewer images than processes.
    """
    return np.array_split(indices, -(-len(indices) // at_most)) if len(indices) else []


class _Batches(Dataset[Batch | UserError]):
    def __init__(self, pictures: ImageBatches, order: BatchOrder) -> None:
        self._pictures, self._order = pictures, order

    def make(self, step: int) -> Batch:
        return self._pictures.batch(*self._order.places(step))

    def __getitem__(self, step: int) -> Batch | UserError:
        """For the workers. An error of the user's is returned: raised, it would arrive with a traceback pasted in."""
        try:
            return self.make(step)
        except UserError as error:
            return error


def training_batches(pictures: ImageBatches, order: BatchOrder, first: int, last: int, workers: int) -> Iterator[Batch]:
    """This process's batches of the steps first .. last-1: uint8 pictures (B, C, H, W) and labels (B,), on the device
    where the pictures are kept. `workers` processes make them ahead, unless that is a GPU, where making them is free.

    Raises:
        BadFileError: too many pictures cannot be read.
        StorageError: a worker was killed, most often because the machine's memory is spent.
    """
    batches, steps = _Batches(pictures, order), range(first, last)
    if workers == 0 or pictures.device.type != "cpu":
        yield from map(batches.make, steps)
        return
    waiting = _start_workers(batches, steps, workers)
    try:
        for _ in steps:
            batch = _next(waiting, workers)
            if isinstance(batch, Exception):
                raise batch
            yield batch
    finally:
        del waiting  # ends the workers, also while an error keeps this frame


def _start_workers(batches: _Batches, steps: range, workers: int) -> Iterator[Batch | UserError]:
    # The loader draws a seed from its generator when it starts; an own one keeps torch's global state untouched.
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        multiprocessing_context=START,
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=_leave_signals_to_parent,
    )
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        return iter(loader)
    before = signal.getsignal(signal.SIGCHLD)
    waiting = iter(loader)
    # torch's handler raises wherever the program is when a worker dies, be it in the middle of saving a state. Without
    # it, the death is found when the worker's batch is waited for, at most five seconds later.
    signal.signal(signal.SIGCHLD, before)
    return waiting


def _leave_signals_to_parent(_: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM go to all processes, and the parent still needs the batches of its last step.
    A worker ends when its parent says so, by SIGTERM too, or has died."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # in the threads to come as well
        threading.Thread(target=_end_with_parent, daemon=True).start()
    else:  # macOS does not say who sent a signal, and Windows ends a process without one
        signal.signal(signal.SIGTERM, lambda *_: threading.Timer(GRACE, os._exit, [0]).start())


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    while parent is not None and signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(0)


def _next(waiting: Iterator[Batch | UserError], workers: int) -> Batch | Exception:
    """Errors are returned, so that none keeps the frames of the loader, and with them its workers."""
    try:
        return next(waiting)
    except UserError:  # a signal's
        raise
    except Exception as error:
        if str(error).startswith("Caught "):  # an error of our own; the message has the worker's traceback
            return error.with_traceback(None)
        reason = str(error)
    return StorageError(
        f"one of {workers} data workers died ({reason}). Most often the memory is spent, or the shared memory in "
        "/dev/shm: lower data.workers or batch_size; data.workers 0 needs neither. The same command goes on from "
        "the last checkpoint."
    )


def validation_batches(
    pictures: ImageBatches, batch_size: int, rank: int, processes: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's share of a split, every picture exactly once over all processes, in its plain view."""
    mine = np.asarray(share(len(pictures), rank, processes), dtype=np.int64)
    for start in range(0, len(mine), batch_size):
        yield pictures.batch(mine[start : start + batch_size])
