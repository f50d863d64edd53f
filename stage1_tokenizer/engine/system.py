"""Cores, threads, memory and locks of the operating system. Calls that some systems lack are here, with a fallback."""

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
CHUNK = 256
"""Items that the threads get at a time."""
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")
ASSUMED_MEMORY = 4 * 2**30
"""Bytes of memory that are assumed if no system call tells the size."""


def count_cores() -> int:
    """Return the number of cores that this process may use; if the system does not tell, all cores of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_threads(function: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
    """Apply a function to each item in several threads, and yield the results in order.

    It helps if the function releases the interpreter's lock, as Pillow's decoders do. The threads get a chunk of the
    items at a time, so that any number of items needs little memory.
    """
    items = iter(items)
    with ThreadPoolExecutor() as threads:
        while chunk := list(islice(items, CHUNK)):
            yield from threads.map(function, chunk)


def memory_per_process() -> int:
    """Return the bytes of memory for each process of this training on this machine."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)
    return min([machine_memory(), *container_limits()]) // max(1, processes)


def machine_memory() -> int:
    """Return the bytes of memory of the machine."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        return ASSUMED_MEMORY


def container_limits(own: Path = OWN_CGROUP, groups: Path = CGROUPS) -> Iterator[int]:
    """Yield the bytes of memory that each Linux control group of this process allows; nothing without a limit."""
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
        # A container mounts its own group at the top, but the path is the one on the host.
        parts = Path(path.lstrip("/")).parts
        for folder in (top.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)):
            try:
                limit = (folder / name).read_text(encoding="ascii").strip()
            except (OSError, ValueError):
                continue
            if limit.isdecimal():  # else "max"
                yield int(limit)


def lock_file(file: int | IO[str], shared: bool = False, wait: bool = False) -> None:
    """Lock an open file against other processes, until it is closed or this process ends.

    Raises:
        BlockingIOError, PermissionError: another process has locked it, and wait is False. POSIX allows both errors.
        OSError: the system, or the file system, has no locks.
    """
    if fcntl is None:
        raise OSError(errno.ENOLCK, "this system has no locks that end with a process")
    # Data workers, which may outlive a killed run by seconds, do not inherit a record lock; they would inherit flock's.
    fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
