"""The most memory that a call takes.

On a CPU it is measured in a process of its own, so that nothing else's peak stands above it; on a GPU torch counts what
it allocates, and can forget an earlier peak.
"""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Prepare = Callable[..., Callable[[], object]]
"""Builds what does not count and returns the call that does. A module's function: another process imports it."""
CLEAR = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


def peak_of(device: torch.device, prepare: Prepare, *arguments: Any) -> float | None:
    """MiB by which the first call of what prepare(*arguments) returns raises the peak.

    On a GPU of what torch allocates there; else of the process's resident set, or None where the system does not tell
    (it does on Linux).

    Raises:
        RuntimeError: the other process ended without a figure; it has printed why.
    """
    if device.type == "cuda":
        call = prepare(*arguments)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if not CLEAR.exists():
        return None
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(theirs, prepare, arguments))
    process.start()
    theirs.close()  # so that a process that died is the end of the pipe
    try:
        result: float = ours.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"no memory figure for {arguments}: its process ended with {process.exitcode}") from None
    process.join()
    return result


def _measure(pipe: Any, prepare: Prepare, arguments: tuple[Any, ...]) -> None:
    call = prepare(*arguments)
    CLEAR.write_text("5")  # forget the peak so far
    resident = _resident("VmRSS")
    call()
    pipe.send(_resident("VmHWM") - resident)


def _resident(name: str) -> float:
    """MiB: VmRSS is what the process has in memory now, VmHWM the most it ever had."""
    lines = STATUS.read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(name)) / 1024
