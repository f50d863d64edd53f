"""Marker and lock of a folder that Tessera writes.

The marker keeps later commands from reading our output as data. The lock keeps two commands from writing to the same
files. It is a lock of the operating system on a file that names the process, and ends with the process in any case.
"""

import json
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO

from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.engine.files import NO_SPACE, storage_error
from stage1_tokenizer.engine.system import lock_file

LOCK_FILE = ".lock"
MARKER = ".tessera"
MARKER_TEXT = b"Tessera wrote this folder. Its images are not read as data unless the folder itself is named.\n"
_held: dict[Path, IO[str]] = {}


def mark_folder(folder: Path) -> None:
    """Make a folder, and write the marker into it if it contains hidden files only; other files are not ours."""
    with suppress(OSError):  # a full disk is reported when the command saves
        folder.mkdir(parents=True, exist_ok=True)
        if all(name.startswith(".") for name in os.listdir(folder)):
            (folder / MARKER).write_bytes(MARKER_TEXT)


def is_marked(folder: str | Path) -> bool:
    """Return True for a folder that Tessera wrote. Folders of versions without a marker are known by their files."""
    exists = os.path.exists  # unlike Path.exists, False for a folder that may not be read
    if exists(os.path.join(folder, MARKER)):
        return True
    settings = os.path.join(folder, "settings.json")  # a folder of samples
    if exists(settings):
        with suppress(OSError, ValueError, RecursionError):
            tree = json.loads(Path(settings).read_text(encoding="utf-8"))
            return isinstance(tree, dict) and isinstance(tree.get("finished"), bool)
    return all(exists(os.path.join(folder, name)) for name in ("config.yaml", "environment.jsonl"))  # a run


def lock_folder(folder: Path) -> None:
    """Make, mark and lock a folder until this process ends or calls `unlock_folders`.

    On a file system without locks, print a warning and go on without a lock.

    Raises:
        ConfigError: another process has locked it (the message has its id and host), or it cannot be written to.
        StorageError: no space.
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
        lock_file(file)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = file.read(1000).strip() or "unknown"
        file.close()
        raise ConfigError(
            f"{folder} is in use by another process ({holder}). Wait until it ends, or give another --out"
        ) from None
    except OSError as error:  # some file systems have no locks, but a training works there too
        file.close()
        print(
            f"warning: {folder} cannot be locked ({error.strerror}). Do not start two commands on it at the same time",
            file=sys.stderr,
        )
        return
    if not _is_at(path, file):  # the process that held it has just removed it
        file.close()
        return lock_folder(folder)
    _held[path] = file
    with suppress(OSError):  # the lock works even if a full disk leaves no space for the name of the process
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}) + "\n")
        file.flush()


def _is_at(path: Path, file: IO[str]) -> bool:
    """Return True if an open file is still the file of this path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def unlock_folders() -> None:
    """Unlock all folders at the end of a command, since a notebook may call the next command in the same process.

    A folder without other files is removed: the command was refused before it wrote anything.
    """
    while _held:
        path, file = _held.popitem()
        with suppress(OSError):
            if {entry.name for entry in path.parent.iterdir()} <= {LOCK_FILE, MARKER}:
                path.with_name(MARKER).unlink(missing_ok=True)
                path.unlink()
                path.parent.rmdir()
        file.close()


def find_lock_holder(folder: Path) -> str | None:
    """Return the process that has locked a folder, as its lock file names it; None: not locked. Writes nothing."""
    path = folder.resolve() / LOCK_FILE
    if path in _held:  # opening and closing the file here would release the lock
        return "this one"
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            try:
                lock_file(file, shared=True)
            except (BlockingIOError, PermissionError):
                return file.read(1000).strip() or "unknown"
    except OSError:  # no such file, or a file system without locks
        pass
    return None
