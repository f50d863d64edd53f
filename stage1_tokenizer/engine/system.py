"""Calls to the operating system that not every one has, each with what takes its place there."""

import errno
import os
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def cores() -> int:
    """Number of cores that this process may use; where the system does not tell, of all that the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
