"""The order of the data, and the worker processes that prepare batches in this order.

The images of each batch are a function of (seed, step), for any number of processes.
Training reads the stream  perm(epoch 0), perm(epoch 1), ...  without a gap. Step s takes positions s*B .. (s+1)*B of
the stream, and each process takes its slice of them. So there is no state to save, and a resumed run continues with the
next batch.
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

START_METHOD = "fork" if sys.platform == "linux" and hasattr(os, "fork") else "spawn"
"""Start method of the workers. Forked workers share the cached images; spawned ones receive a copy. On macOS the system
libraries may crash in a fork, and Windows has no fork."""
GRACE_SECONDS = 5.0
"""Time that a worker goes on after a SIGTERM with an unknown sender. The sender may be a scheduler that stops the
parent too, and the parent needs batches until its last step is done."""
BatchIndices = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Indices (B,) of the images of a batch, and the epoch (B,) of each, which selects its augmentation."""
Batch = tuple[Tensor, Tensor]
"""Images (B, C, H, W) uint8 and labels (B,) int64."""


class BatchOrder:
    """The order of the images in a training run. `batch_size` counts all processes and micro-batches together."""

    def __init__(self, n: int, batch_size: int, seed: int, rank: int = 0, processes: int = 1) -> None:
        """n: the number of images.

        Raises:
            ConfigError: the processes cannot share a batch evenly.
        """
        if batch_size % processes:
            raise ConfigError(f"batch_size {batch_size} cannot be shared evenly by {processes} processes")
        self._n, self._batch, self._seed = n, batch_size, seed
        self._slice = slice(rank * batch_size // processes, (rank + 1) * batch_size // processes)

    def indices(self, step: int) -> BatchIndices:
        """Return this process's indices and epochs at a step, (B / processes,) each."""
        positions = np.arange(step * self._batch, (step + 1) * self._batch, dtype=np.int64)[self._slice]
        epochs = positions // self._n
        indices = np.empty_like(positions)
        for epoch in np.unique(epochs):
            in_epoch = epochs == epoch
            indices[in_epoch] = _permutation(self._n, self._seed, int(epoch))[positions[in_epoch] % self._n]
        return indices, epochs

    def describe_batch(self, step: int, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the batch of a step with its indices and epochs, each (B / processes,), to be saved for inspection."""
        indices, epochs = map(torch.from_numpy, self.indices(step))
        return {"pixels": pixels, "labels": labels, "indices": indices, "epochs": epochs}


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng(derive_seed(seed, "order", epoch)).permutation(n)


def rank_range(n: int, rank: int, processes: int) -> range:
    """Return the part of 0..n-1 that belongs to a process: contiguous, and each index belongs to exactly one."""
    return range(n * rank // processes, n * (rank + 1) // processes)


def split_evenly(indices: NDArray[np.int64], at_most: int) -> list[NDArray[np.int64]]:
    """Split indices (n,) into non-empty parts of nearly equal length, `at_most` or less; an empty list if n is 0, as
    in a process for which there is no image."""
    return np.array_split(indices, -(-len(indices) // at_most)) if len(indices) else []


class _TrainingBatches(Dataset[Batch | UserError]):
    def __init__(self, images: ImageBatches, order: BatchOrder) -> None:
        self._images, self._order = images, order

    def batch(self, step: int) -> Batch:
        """Return this process's batch of a step."""
        return self._images.batch(*self._order.indices(step))

    def __getitem__(self, step: int) -> Batch | UserError:
        """Return a batch, in a worker. Return a user error instead of raising it, because the loader would paste the
        worker's traceback into the message."""
        try:
            return self.batch(step)
        except UserError as error:
            return error


def training_batches(images: ImageBatches, order: BatchOrder, first: int, last: int, workers: int) -> Iterator[Batch]:
    """Yield this process's batches of the steps first .. last-1, on the device of the cached images. `workers`
    processes prepare them ahead; if the images are on a GPU, preparing a batch costs nothing and no worker starts.

    Raises:
        BadFileError: too many images cannot be read.
        StorageError: a worker was killed, most often because the machine has no memory left.
    """
    batches, steps = _TrainingBatches(images, order), range(first, last)
    if workers == 0 or images.device.type != "cpu":
        yield from map(batches.batch, steps)
        return
    stream = _start_workers(batches, steps, workers)
    try:
        for _ in steps:
            batch = _next_batch(stream, workers)
            if isinstance(batch, Exception):
                raise batch
            yield batch
    finally:
        del stream  # ends the workers, also while an error keeps this frame alive


def _start_workers(batches: _TrainingBatches, steps: range, workers: int) -> Iterator[Batch | UserError]:
    # The loader draws a seed from its generator when it starts. Its own generator keeps torch's global state untouched.
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        multiprocessing_context=START_METHOD,
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=_leave_signals_to_parent,
    )
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        return iter(loader)
    handler = signal.getsignal(signal.SIGCHLD)
    stream = iter(loader)
    # torch's handler raises an error at any line when a worker dies, also while a state is saved. Without the handler,
    # `_next_batch` notices the death when it waits for the worker's batch, at most five seconds later.
    signal.signal(signal.SIGCHLD, handler)
    return stream


def _leave_signals_to_parent(_: int) -> None:
    """Keep a worker alive when Ctrl-C or a scheduler's SIGTERM reaches all processes: the parent still needs the
    batches of its last step. A worker ends when its parent sends SIGTERM, or has died."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # threads that start later inherit the mask
        threading.Thread(target=_end_with_parent, daemon=True).start()
    else:  # macOS does not tell the sender of a signal, and Windows ends a process without a signal
        signal.signal(signal.SIGTERM, lambda *_: threading.Timer(GRACE_SECONDS, os._exit, [0]).start())


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    while parent is not None and signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(0)


def _next_batch(stream: Iterator[Batch | UserError], workers: int) -> Batch | Exception:
    """Return the next batch, or an error. A raised error would keep the frames of the loader alive, and with them its
    workers."""
    try:
        return next(stream)
    except UserError:  # raised by a signal handler
        raise
    except Exception as error:
        if str(error).startswith("Caught "):  # a bug in our code; the message has the worker's traceback
            return error.with_traceback(None)
        reason = str(error)
    return StorageError(
        f"one of {workers} data workers died ({reason}). Most often no memory is left, or no shared memory in "
        "/dev/shm. Lower data.workers or batch_size; data.workers 0 needs neither. The same command continues from "
        "the last saved state."
    )


def validation_batches(images: ImageBatches, batch_size: int, rank: int, processes: int) -> Iterator[Batch]:
    """Yield this process's part of a split, centre-cropped and not flipped; every image exactly once over all
    processes."""
    mine = np.asarray(rank_range(len(images), rank, processes), dtype=np.int64)
    for start in range(0, len(mine), batch_size):
        yield images.batch(mine[start : start + batch_size])
