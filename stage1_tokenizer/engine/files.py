"""Functions that write files so that a crash never leaves half a file, and that check the files that a user names.

Each write goes to a temporary name in the same folder, is flushed to disk, then renamed. A reader finds the old file or
the new file at any moment, and each is complete.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from stage1_tokenizer.engine.errors import BadFileError, ConfigError, StorageError, shorten
from stage1_tokenizer.engine.file_names import describe_path

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a full disk, a used-up quota and a file that is larger than the process may write."""


def write_file(path: Path, *data: bytes | memoryview, flush: bool = True) -> None:
    """Write the parts of a file one after the other: the complete file, or nothing.

    flush: flush to disk, so that the file survives a power cut. False is for very many small files, where flushing
        takes too long.

    Raises:
        StorageError: no space, or no permission. An older file of this name stays as it was.
    """
    with open_atomic(path, flush, sum(map(len, data))) as file:
        file.writelines(data)


@contextmanager
def open_atomic(path: Path, flush: bool = True, size: int | None = None) -> Iterator[IO[bytes]]:
    """Open a file for writing. It appears under its name when the block ends without an error.

    size: number of bytes to be written if known, for the message about a full disk.

    Raises:
        StorageError: no space, or no permission. An older file of this name stays as it was.
    """
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            if flush:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
        if flush:
            sync_folder(path.parent)
    except OSError as error:
        raise storage_error(path, error, size) from None
    finally:  # also after an interruption
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flush the entries of a folder to disk, so that a rename in it survives a power cut."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows cannot open folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot flush folders
            raise
    finally:
        os.close(descriptor)


def storage_error(path: Path, error: OSError, needed: int | None = None) -> StorageError:
    """Make the error for a failed write to `path`. needed: size of the file in bytes, if known."""
    if error.errno in NO_SPACE:
        return no_space_error(path, needed, f" ({error.strerror})")
    size = "" if needed is None else f" ({needed:,} bytes)"
    return StorageError(f"cannot write {path}{size}: {error.strerror}")


def no_space_error(path: Path, needed: int | None, reason: str = "") -> StorageError:
    """Make the error for a full disk. needed: size of the file in bytes, if known."""
    return StorageError(
        f"no space left writing {path}: it needs {'more' if needed is None else f'{needed:,} bytes'}, "
        f"{free_bytes(path):,} are free{reason}. What was saved before is intact. Make room, and the same command "
        "continues from there"
    )


def free_bytes(path: Path) -> int:
    """Return the number of bytes that this user can still write at `path`, which need not exist yet."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free


def require_file(path: Path, key: str, choices: str) -> Path:
    """Return the path if there is a file.

    key: the option that named the path. choices: the end of the message: what the user can give instead.

    Raises:
        ConfigError: there is no such file.
    """
    try:
        is_file = path.is_file()
    except OSError:  # the name is too long, or a folder above it may not be read
        is_file = False
    if not is_file:
        raise ConfigError(f"{key} {describe_path(shorten(path))}: there is no such file; {choices}")
    return path


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits.

    Raises:
        BadFileError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BadFileError(f"{path}: cannot be read ({error.strerror})") from None
