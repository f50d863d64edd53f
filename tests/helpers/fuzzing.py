"""Fuzzing: read seeded mutations of good files and command lines, and check the outcome.

Each input must be accepted, or refused with one of our own errors. Anything else is a finding: another exception, more
time than LIMIT_S, more memory than the target's bound. The bytes of a finding are kept:

    fuzz(target, n=10_000, seed=1, folder)      a target: a name, good examples, and a function that reads a path
    attempt(target, path)                       read one input again
"""

import contextlib
import io
import random
import resource
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from stage1_tokenizer.engine.errors import UserError
from tests.helpers.mutations import mutate_bytes

LIMIT_S = 10.0
"""Largest CPU time for one input; a slow one takes a second."""
WAIT_S = 60.0
"""Largest wall time for one input, in case it waits and does not compute."""
FENCE = 4 * 2**30
"""Bytes of address space beyond those in use, so that a finding cannot exhaust the machine's memory."""

Mutation = Callable[[random.Random, bytes], bytes]


class Target(NamedTuple):
    """An input from outside."""

    name: str
    seeds: list[bytes]
    """Good inputs."""
    read: Callable[[Path], object]
    suffix: str = ""
    mutations: tuple[Mutation, ...] = ()
    """Mutations that know the format; those of any bytes are added."""
    megabytes: int = 300
    """Largest rise of the process's memory by reading one input."""


class Counts(NamedTuple):
    """Numbers of inputs that were accepted and refused."""

    accepted: int
    refused: int


class FindingError(AssertionError):
    """An input was neither accepted nor refused; the message names it, the reason and the file with its bytes."""


class OvertimeError(BaseException):
    """Reading took too long. Not an Exception, so that no `except Exception` catches it."""


def fuzz(target: Target, n: int, seed: int, folder: Path) -> Counts:
    """Read n mutated inputs, equal ones for equal seeds. Raises FindingError at the first finding."""
    accepted = 0
    for number, data in enumerate(inputs(target, n, seed)):
        path = folder / f"input{target.suffix}"
        path.write_bytes(data)
        try:
            accepted += attempt(target, path)
        except BaseException as error:
            kept = folder / f"finding-{target.name}-{seed}-{number}{target.suffix}"
            kept.write_bytes(data)
            if isinstance(error, KeyboardInterrupt):
                raise
            raise FindingError(f"{target.name}, seed {seed}, input {number}: {error!r}; its bytes: {kept}") from error
    return Counts(accepted, n - accepted)


def inputs(target: Target, n: int, seed: int) -> Iterator[bytes]:
    """Yield n mutated inputs; each depends on the seed and its number alone."""
    for number in range(n):
        rng = random.Random(f"{target.name} {seed} {number}")
        data = rng.choice(target.seeds)
        knowing = target.mutations and rng.random() < 0.7
        for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
            mutate = rng.choice(target.mutations) if knowing else mutate_bytes
            data = mutate(rng, data)
        yield data


def attempt(target: Target, path: Path) -> bool:
    """Read one input. Returns True if it was accepted, False if refused; passes other exceptions on."""
    before, measured = _memory("VmRSS"), _forget_peak()
    limits, in_use = resource.getrlimit(resource.RLIMIT_AS), _memory("VmSize")
    handlers = {number: signal.signal(number, _overtime) for number in (signal.SIGALRM, signal.SIGPROF)}
    try:
        if in_use is not None:
            resource.setrlimit(resource.RLIMIT_AS, (in_use + FENCE, limits[1]))
        signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
        signal.setitimer(signal.ITIMER_REAL, WAIT_S)
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")  # a warning is no error for the user either
            target.read(path)
            accepted = True
    except UserError as error:
        accepted = False
        if len(str(error)) > 5000:
            raise AssertionError(f"a message of {len(str(error))} characters") from error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)
    peak = _memory("VmHWM")
    if measured and before is not None and peak is not None:
        grown = (peak - before) / 2**20
        assert grown < target.megabytes, f"{grown:.0f} MB were taken"
    return accepted


def _overtime(number: int, frame: FrameType | None) -> None:
    raise OvertimeError(f"more than {LIMIT_S} s of computing" if number == signal.SIGPROF else f"more than {WAIT_S} s")


def measures_memory() -> bool:
    """Return True if the system reports a process's memory; in some containers it does not."""
    return _memory("VmRSS") is not None and _memory("VmHWM") is not None and _forget_peak()


def _memory(field: str) -> int | None:
    """Return the bytes of VmRSS (now), VmHWM (peak since its reset) or VmSize of this process; None: not reported."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def _forget_peak() -> bool:
    """Reset the process's peak memory. Returns False if the system does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
