"""Files and command lines that nobody would write: seeded mutations of good ones, and what reading them may lead to.

Reading an input ends well (accepted), or with one of our own errors (refused). Anything else is a finding: another
exception, more time than LIMIT_S, more memory than the target's bound. Findings keep their bytes, to be read again:

    fuzz(target, n=10_000, seed=1, folder)      a target: a name, good examples, and what reads a path
    attempt(target, path)                       one of them again
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
"""Of computing for one input, whatever else the machine does meanwhile; a slow one takes a second."""
WAIT_S = 60.0
"""For one input on the clock, should it wait and not compute."""
FENCE = 4 * 2**30
"""Bytes of address space beyond those in use, lest a finding takes the machine with it."""

Mutation = Callable[[random.Random, bytes], bytes]


class Target(NamedTuple):
    """Something that is read from outside."""

    name: str
    seeds: list[bytes]
    """Good ones."""
    read: Callable[[Path], object]
    suffix: str = ""
    mutations: tuple[Mutation, ...] = ()
    """Those that know the format, besides those of any bytes."""
    megabytes: int = 300
    """By which reading one input may raise the process's memory, at most."""


class Counts(NamedTuple):
    """What became of the inputs."""

    accepted: int
    refused: int


class FindingError(AssertionError):
    """An input that was neither accepted nor refused; the message says which, why, and where its bytes are."""


class OvertimeError(BaseException):
    """Reading took too long. Not an Exception, so that nobody who catches those catches it."""


def fuzz(target: Target, n: int, seed: int, folder: Path) -> Counts:
    """Read n mutated inputs, the same ones for the same seed. Raises FindingError at the first that is one."""
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
    """n mutated inputs; each depends on the seed and its own number alone."""
    for number in range(n):
        rng = random.Random(f"{target.name} {seed} {number}")
        data = rng.choice(target.seeds)
        knowing = target.mutations and rng.random() < 0.7
        for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
            mutate = rng.choice(target.mutations) if knowing else mutate_bytes
            data = mutate(rng, data)
        yield data


def attempt(target: Target, path: Path) -> bool:
    """Read one input; whether it was accepted. Raises whatever else happens."""
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
            warnings.simplefilter("ignore")  # one is no error to the user either
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
    """Whether the system tells what one input takes; some containers do not, and there no memory is a finding."""
    return _memory("VmRSS") is not None and _memory("VmHWM") is not None and _forget_peak()


def _memory(field: str) -> int | None:
    """Bytes of VmRSS (now), VmHWM (at most, since the peak was forgotten) or VmSize of this process, if it is told."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def _forget_peak() -> bool:
    """Whether the system let us: else the peak is that of all that this process has done so far."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
