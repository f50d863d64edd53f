"""Memory that this process may use: that of the machine or its container, shared with the processes beside it."""

import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")
UNKNOWN = 4 * 2**30
"""Bytes that are assumed where no system call says how much there is."""


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
