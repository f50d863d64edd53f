"""Several processes inside one test: gloo ranks on this machine, on CPU, without a launcher.

    run_processes(2, function, *args)      function(accelerator, *args) on each rank -> [result of rank 0, of rank 1]

Ranks are forked from a server that has only imported torch; a fork takes a tenth of a second. A fork of pytest itself
would copy the state of its OpenMP threads, of autograd and, on some machines, of CUDA.
"""

import ctypes
import gc
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import socket
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any, Literal

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from stage1_tokenizer.engine.command import leave_process_group

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    # Each rank would import other modules again: a second for x-transformers, a tenth for pytest.
    [
        "tests.helpers.faults",
        "tests.helpers.artefacts",
        "stage2_prior.tokens",
        "sampling.output",
        "sampling.evaluation.features",
        "stage1_tokenizer.diagnostics.alarms",
        "stage1_tokenizer.discriminator",
        "stage1_tokenizer.engine.training_step",
        "stage1_tokenizer.engine.compiling",
        "stage1_tokenizer.validation",
    ]
)
_PR_SET_PDEATHSIG = 1


class RankFailedError(Exception):
    """A rank raised, died, or did not answer in time; the message has its traceback."""


def run_processes(
    n: int, function: Callable[..., Any], *args: Any, precision: Literal["no", "bf16"] = "no", timeout: float = 60.0
) -> list[Any]:
    """Call function(accelerator, *args) on n ranks of one thread each; returns their results by rank.

    `function` must be importable (no lambda), and results must pickle.

    Raises:
        RankFailedError: as soon as one rank fails, or after `timeout` seconds. The other ranks are killed.
    """
    settings = {"port": _free_port(), "precision": precision, "timeout": timeout}
    ranks, pipes = [], []
    for rank in range(n):
        ours, theirs = _CONTEXT.Pipe(duplex=False)
        process = _CONTEXT.Process(target=_rank, args=(theirs, rank, n, settings, function, args), daemon=True)
        process.start()
        theirs.close()
        ranks.append(process)
        pipes.append(ours)
    try:
        results = _collect(pipes, time.monotonic() + timeout)
        for process in ranks:
            process.join(timeout=10)
        return results
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
            process.join()
            process.close()
        for pipe in pipes:
            pipe.close()


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = {id(pipe): rank for rank, pipe in enumerate(pipes) if rank not in results}
        left = max(0.0, deadline - time.monotonic())
        ready = multiprocessing.connection.wait([pipes[rank] for rank in waiting.values()], left)
        if not ready:
            raise RankFailedError(f"ranks {sorted(waiting.values())} did not answer in time")
        for pipe in ready:
            rank = waiting[id(pipe)]
            good, answer = _answer(pipe, rank)  # type: ignore[arg-type]
            if not good:
                # Often one rank fails only because another one did, whose message tells more.
                others = [other for other in waiting.values() if other != rank and pipes[other].poll(0.3)]
                more = [said for fine, said in (_answer(pipes[other], other) for other in others) if not fine]
                raise RankFailedError("\n".join([answer, *more]))
            results[rank] = answer
    return [results[rank] for rank in range(len(pipes))]


def _answer(pipe: Connection, rank: int) -> tuple[bool, Any]:
    """Return True and a rank's result, or False and the message of its failure."""
    try:
        good, answer = pickle.loads(pipe.recv_bytes())
    except EOFError:
        return False, f"rank {rank} died without a word"
    return good, answer if good else f"rank {rank}:\n{answer}"


def _rank(
    pipe: Connection, rank: int, n: int, settings: dict[str, Any], function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    if os.name == "posix" and hasattr(ctypes.CDLL(None), "prctl"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # no orphans if pytest is killed
    # No GPU, the given precision, and a number of threads that start_accelerator keeps.
    os.environ.update(CUDA_VISIBLE_DEVICES="", ACCELERATE_MIXED_PRECISION=settings["precision"], OMP_NUM_THREADS="2")
    if n > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(settings["port"]))
    torch.set_num_threads(1)
    gc.freeze()  # the collector need not examine the imported modules, which takes a third of a second
    os.fsync = lambda fd: None  # as in tests/conftest.py
    try:
        group = InitProcessGroupKwargs(timeout=timedelta(seconds=settings["timeout"]))
        accelerator = Accelerator(cpu=True, kwargs_handlers=[group])
        assert accelerator.num_processes == n, f"{n} ranks were started, the group has {accelerator.num_processes}"
        warnings.simplefilter("error")  # as pytest does in its own process
        data = pickle.dumps((True, function(accelerator, *args)))
    except BaseException:
        data = pickle.dumps((False, traceback.format_exc()))
    pipe.send_bytes(data)
    pipe.close()
    leave_process_group()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
