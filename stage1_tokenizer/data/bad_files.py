"""Images that cannot be read: each is reported once and listed in a file, and only a small share of them is tolerated.

A bad image keeps its place in the data set, and the next readable image replaces it. So the order of the data stays a
function of (seed, epoch, index), and the processes need not tell each other about bad files.
"""

import os
import sys
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from stage1_tokenizer.engine.errors import BadFileError
from stage1_tokenizer.engine.system import lock_file, map_in_threads

T = TypeVar("T")

BAD_FILES = "bad_files.txt"
"""Name of the list in a run's folder."""
MAX_PRINTED = 10
"""Number of bad files that each process prints; the list has all of them."""
MAX_QUOTED = 5
"""Number of bad files that an error message quotes."""


class BadImageError(BadFileError):
    """One image that cannot be read: its path, and the reason."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)  # pickling repeats these arguments
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class BadFiles:
    """The bad files among the `n` images of a data set (both splits together) that this process has met."""

    def __init__(
        self,
        path: Path | None,
        tolerated_share: float,
        n: int,
        find_all: Callable[[], Iterable[tuple[Hashable, BadImageError]]] = tuple,
    ) -> None:
        """Start without a bad file.

        path: the list, with one line `file<TAB>reason` for each bad file. The first bad file creates it; None: no list.
        tolerated_share: share of the n images, 0..1, that may be bad.
        find_all: reads all images, and yields the bad ones with their keys; called before bad files end a run.
        """
        self._path, self._tolerated_share, self.n = path, tolerated_share, n
        self._find_all = find_all
        self._errors: dict[Hashable, BadImageError] = {}
        self._listed: set[bytes] = set()
        self._read_bytes = 0  # length of the part of the list that `_listed` knows
        self._is_complete = False
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for pickling, without the lock and the reader, which belong to this process."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_find_all")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock(), _find_all=tuple)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._errors

    def add(self, key: Hashable, error: BadImageError) -> None:
        """Report a bad image if it is new. Safe to call from any thread.

        key: identifies the image within the data set.

        Raises:
            BadFileError: more images than the tolerated share are bad, or all of them.
        """
        is_new = self._report(key, error)
        number = len(self._errors)
        if is_new and (number / self.n > self._tolerated_share or number == self.n):
            raise self.build_error()

    def _report(self, key: Hashable, error: BadImageError) -> bool:
        """Print and list a bad image; return True if it is new."""
        with self._lock:
            if key in self._errors:
                return False
            self._errors[key] = error
            number = len(self._errors)
            if number <= MAX_PRINTED:
                more = "; further bad images are not printed" if number == MAX_PRINTED else ""
                print(f"warning: {one_line(str(error))}; the next image replaces it{more}", file=sys.stderr)
            self._append(error)
            return True

    def build_error(self) -> BadFileError:
        """Find all bad files, and return the error that ends the run because of them."""
        with self._lock:
            is_complete, self._is_complete = self._is_complete, True
        if not is_complete:  # otherwise a thread is reading all images, or has done so
            for key, error in self._find_all():
                self._report(key, error)
        with self._lock:
            errors = list(self._errors.values())
        lines = [f"  {one_line(str(error))}" for error in errors[:MAX_QUOTED]]
        lines += [f"  and {len(errors) - MAX_QUOTED:,} more"] if len(errors) > MAX_QUOTED else []
        listed = f" (all of them are listed in {self._path})" if self._path else ""
        return BadFileError(
            f"{self._count()} cannot be read, and data.bad_share tolerates {self._tolerated_share:.2%} of them:\n"
            + "\n".join(lines)
            + f"\nRepair them or move them away{listed}, or raise --data.bad_share"
        )

    def summary(self) -> str:
        """Return one line about all bad files; empty if there is none."""
        listed = f"; they are listed in {self._path}" if self._path else ""
        return f"{self._count()} cannot be read and are left out{listed}" if self._errors else ""

    def _count(self) -> str:
        return f"{len(self._errors):,} of {self.n:,} images"

    def _append(self, error: BadImageError) -> None:
        """Add a line to the list, unless an earlier run or another process has listed the file."""
        if self._path is None:
            return
        name = one_line(str(error.path)).encode()
        line = name + b"\t" + one_line(error.reason).encode() + b"\n"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Opened to append and written in one call, so lines of several processes do not mix. On Windows, without
            # O_BINARY, the C library would change the ends of lines.
            binary: int = getattr(os, "O_BINARY", 0)
            file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | binary, 0o666)
            try:
                with suppress(OSError):  # a file system without locks; at worst the list has a line twice
                    lock_file(file, wait=True)
                is_torn = self._read_list(file)
                if name not in self._listed:
                    os.write(file, b"\n" + line if is_torn else line)
            finally:
                os.close(file)
        except OSError as failure:  # the run goes on without the list; a full disk ends it at the next save
            print(f"warning: {self._path} cannot be written ({failure.strerror})", file=sys.stderr)
            self._path = None

    def _read_list(self, file: int) -> bool:
        """Read the lines that were written since the last call; return True if the last one was cut off."""
        os.lseek(file, self._read_bytes, os.SEEK_SET)
        tail = os.read(file, max(0, os.fstat(file).st_size - self._read_bytes))
        whole = tail[: tail.rfind(b"\n") + 1]
        self._read_bytes += len(whole)
        self._listed.update(line.split(b"\t", 1)[0] for line in whole.splitlines())
        return len(whole) < len(tail)


def read_errors(read: Callable[[T], object], items: Iterable[T]) -> Iterator[BadImageError | None]:
    """Read items in threads, and yield the error of each in their order; None for an item that can be read."""

    def error_of(item: T) -> BadImageError | None:
        try:
            read(item)
        except BadImageError as error:
            return error
        return None

    return map_in_threads(error_of, items)


def one_line(text: str) -> str:
    r"""Return text in which characters that break a line, or cannot be printed, are escaped as Python does: `\n`."""
    return "".join(
        c if c.isprintable() and c != "\\" else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )
