"""Peak memory of a call.

On a CPU it is measured in a separate process, because an earlier peak of the same process could be higher. On a GPU
torch counts its allocations, and can reset the peak.
"""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Prepare = Callable[..., Callable[[], object]]
"""Function of a module (another process imports it) that prepares a call and returns it; only the call is measured."""
CLEAR = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


def peak_of(device: torch.device, prepare: Prepare, *arguments: Any) -> float | None:
    """Return the MiB by which the first call of `prepare(*arguments)()` raises the peak.

    On a GPU: of torch's allocations. Otherwise: of the process's resident set; None if the system is not Linux.

    Raises:
        RuntimeError: the other process ended without a result; it has printed the reason.
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
    theirs.close()  # so that the pipe ends if the process dies
    try:
        result: float = ours.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"no peak memory for {arguments}: its process ended with {process.exitcode}") from None
    process.join()
    return result


def _measure(pipe: Any, prepare: Prepare, arguments: tuple[Any, ...]) -> None:
    call = prepare(*arguments)
    CLEAR.write_text("5")  # reset the peak
    resident = _resident("VmRSS")
    call()
    pipe.send(_resident("VmHWM") - resident)


def _resident(name: str) -> float:
    """Return MiB of the process: VmRSS is its memory now, VmHWM its peak."""
    lines = STATUS.read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(name)) / 1024
