"""A folder that Tessera writes: marked as ours, so that no output is read as data, and locked for one command.

Two runs that write to the same files would each spoil the other's. The lock is the system's own, on a file that says
who holds it. It ends with the process, however that ends, so nothing is ever left to clean up.
"""

import json
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO

from stage1_tokenizer.engine.checkpoint import NO_SPACE, storage_error
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.engine.system import lock

LOCK_FILE = ".lock"
MARKER = ".tessera"
TEXT = b"Tessera wrote this folder. Its images are not read as data unless the folder itself is named.\n"
_held: dict[Path, IO[str]] = {}


def mark_folder(folder: Path) -> None:
    """Make a folder, and write the marker into it if it holds nothing but hidden files: whatever else lies there is not
    ours."""
    with suppress(OSError):  # a full disk ends the command where it saves
        folder.mkdir(parents=True, exist_ok=True)
        if all(name.startswith(".") for name in os.listdir(folder)):
            (folder / MARKER).write_bytes(TEXT)


def is_marked(folder: str | Path) -> bool:
    """True for a folder that Tessera wrote; versions before the marker are known by the files that say so."""
    there = os.path.exists  # unlike Path.exists, False where a folder may not be looked into
    if there(os.path.join(folder, MARKER)):
        return True
    settings = os.path.join(folder, "settings.json")  # of samples
    if there(settings):
        with suppress(OSError, ValueError, RecursionError):
            tree = json.loads(Path(settings).read_text(encoding="utf-8"))
            return isinstance(tree, dict) and isinstance(tree.get("finished"), bool)
    return all(there(os.path.join(folder, name)) for name in ("config.yaml", "environment.jsonl"))  # a run


def lock_folder(folder: Path) -> None:
    """Keep other processes from this folder until this one ends or calls `unlock_folders`. The folder is made, and
    marked as one of ours.

    Raises:
        ConfigError: another process has it (names its id and host), or it cannot be written to.
        StorageError: there is no space for it.
    """
    path = folder.resolve() / LOCK_FILE
    if path in _held:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mark_folder(folder)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        if error.errno in NO_SPACE:
            raise storage_error(path, error) from None
        raise ConfigError(f"--out {folder}: cannot be written to ({error.strerror})") from None
    try:
        lock(file)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = file.read(1000).strip() or "unknown"
        file.close()
        raise ConfigError(
            f"{folder} is in use by another process ({holder}); wait for it, or give another --out"
        ) from None
    except OSError as error:  # better to work there than not
        file.close()
        print(
            f"warning: {folder} cannot be locked ({error.strerror}); do not start two commands on it at once",
            file=sys.stderr,
        )
        return
    if not _is_at(path, file):  # who had it has just taken it away
        file.close()
        return lock_folder(folder)
    _held[path] = file
    with suppress(OSError):  # the lock holds, even where there is no space to say who holds it
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}) + "\n")
        file.flush()


def _is_at(path: Path, file: IO[str]) -> bool:
    """True if an open file is the one of this path, and not one that was there before."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def unlock_folders() -> None:
    """Give back what this process holds, at a command's end: a notebook may call the next one. A folder that holds
    nothing else, since the command was refused, goes too."""
    while _held:
        path, file = _held.popitem()
        with suppress(OSError):
            if {each.name for each in path.parent.iterdir()} <= {LOCK_FILE, MARKER}:
                path.with_name(MARKER).unlink(missing_ok=True)
                path.unlink()
                path.parent.rmdir()
        file.close()


def holder_of(folder: Path) -> str | None:
    """The process that has this folder, in the words of its lock file; None where nobody has. Nothing is written."""
    path = folder.resolve() / LOCK_FILE
    if path in _held:  # to open and close it here would give it back
        return "this one"
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            try:
                lock(file, shared=True)
            except (BlockingIOError, PermissionError):
                return file.read(1000).strip() or "unknown"
    except OSError:  # no such file, or a file system without locks
        pass
    return None
