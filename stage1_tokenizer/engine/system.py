"""Cores, threads, memory and locks that the operating system gives this process. Calls that not every system has stand
here, each with what takes its place."""

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import IO, TypeVar

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")
U = TypeVar("U")
AT_ONCE = 256
"""Things that are handed to the threads together."""
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")
UNKNOWN = 4 * 2**30
"""Bytes that are assumed where no system call says how much there is."""


def cores() -> int:
    """Number of cores that this process may use; where the system does not tell, of all that the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_threads(function: Callable[[T], U], things: Iterable[T]) -> Iterator[U]:
    """Apply a function that releases the interpreter's lock, as Pillow's decoders do, to each of any number of things.
    They are handed to the threads a part at a time, for that takes memory too."""
    things = iter(things)
    with ThreadPoolExecutor() as threads:
        while part := list(islice(things, AT_ONCE)):
            yield from threads.map(function, part)


def memory_share() -> int:
    """Bytes of memory for each of the processes of this training on this machine."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)
    return min([machine_memory(), *container_limits()]) // max(1, processes)


def machine_memory() -> int:
    """Bytes of memory of the machine."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        return UNKNOWN


def container_limits(own: Path = OWN_CGROUP, groups: Path = CGROUPS) -> Iterator[int]:
    """Bytes that each control group of Linux above this process allows; none where there is no limit."""
    try:
        lines = own.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:  # 0::/PATH of version 2, N:memory:/PATH of version 1
        _, kinds, path = [*line.split(":", 2), "", ""][:3]
        if kinds == "":
            top, name = groups, "memory.max"
        elif "memory" in kinds.split(","):
            top, name = groups / "memory", "memory.limit_in_bytes"
        else:
            continue
        # Within a container its own group is mounted at the top, and the path is that of the host.
        parts = Path(path.lstrip("/")).parts
        for folder in (top.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)):
            try:
                limit = (folder / name).read_text(encoding="ascii").strip()
            except (OSError, ValueError):
                continue
            if limit.isdecimal():  # else "max"
                yield int(limit)


def lock(file: int | IO[str], shared: bool = False, wait: bool = False) -> None:
    """Lock an open file against other processes, until it is closed or this process ends.

    Raises:
        BlockingIOError, PermissionError: another process has it, and wait is False. (POSIX allows either, and network
            file systems take the other.)
        OSError: the system, or the file system, has no locks.
    """
    if fcntl is None:
        raise OSError(errno.ENOLCK, "this system has no locks that end with a process")
    # A record lock: unlike flock's, it is not inherited by data workers, which may outlive a killed run by seconds.
    fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
