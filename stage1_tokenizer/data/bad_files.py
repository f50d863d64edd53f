"""Pictures that cannot be read: each is reported once, listed in a file, and only a small share of them is tolerated.

A bad picture keeps its place in the data set, and the next readable one stands in for it. So the order of the data
stays a function of (seed, epoch, index): no process has to know what another one has found.
"""

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from stage1_tokenizer.engine.errors import BadFileError
from stage1_tokenizer.engine.system import lock_file, map_in_threads

T = TypeVar("T")

BAD_FILES = "bad_files.txt"
"""The list's name in a run's folder."""
PRINTED = 10
"""So many bad files are printed by each process; the list has them all."""
QUOTED = 5
"""So many are quoted where the run stops because of them."""


class BadImageError(BadFileError):
    """One picture that cannot be read: its path, and why."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)  # what pickling repeats
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class BadFiles:
    """The bad files among the `n` of a data set, both splits together, as far as this process has met them."""

    def __init__(
        self,
        path: Path | None,
        share: float,
        n: int,
        find_all: Callable[[], Iterable[tuple[int, BadImageError]]] = tuple,
    ) -> None:
        """`path`: the list, one line `file<TAB>reason` for each; it appears with the first of them. None: no list.
        `share`: so many of the n, in 0..1, are tolerated. `find_all`: reads all files, to list every bad one where a
        run stops because of them."""
        self._path, self._share, self.n = path, share, n
        self._find_all = find_all
        self._errors: dict[int, BadImageError] = {}  # by place in the data set
        self._listed: set[bytes] = set()
        self._read = 0  # bytes of the list that `_listed` knows
        self._complete = False
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Without the lock and the reader, which belong to this process."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_find_all")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock(), _find_all=tuple)

    def __contains__(self, place: int) -> bool:
        return place in self._errors

    def add(self, place: int, error: BadImageError) -> None:
        """Report the picture at `place`, if it is new. Any number of threads may call this.

        Raises:
            BadFileError: these are more than the share that is tolerated, or all there are.
        """
        if self._note(place, error) and (len(self._errors) / self.n > self._share or len(self._errors) == self.n):
            raise self.verdict()

    def _note(self, place: int, error: BadImageError) -> bool:
        """Report and list a picture; true if it is new."""
        with self._lock:
            if place in self._errors:
                return False
            self._errors[place] = error
            found = len(self._errors)
            if found <= PRINTED:
                more = "; further ones are not printed" if found == PRINTED else ""
                print(f"warning: {one_line(str(error))}; the next picture stands in for it{more}", file=sys.stderr)
            self._append(error)
            return True

    def verdict(self) -> BadFileError:
        """The error that ends a run because of these, with all others that there are."""
        with self._lock:
            complete, self._complete = self._complete, True
        if not complete:  # else a thread is at it, or it is done
            for place, error in self._find_all():
                self._note(place, error)
        with self._lock:
            errors = list(self._errors.values())
        lines = [f"  {one_line(str(error))}" for error in errors[:QUOTED]]
        lines += [f"  and {len(errors) - QUOTED:,} more"] if len(errors) > QUOTED else []
        return BadFileError(
            f"{self._count()} cannot be read, and data.bad_share tolerates {self._share:.2%} of them:\n"
            + "\n".join(lines)
            + f"\nMend them or move them away{self._where()}, or raise --data.bad_share"
        )

    def summary(self) -> str:
        """One line about all that was found; empty where nothing was."""
        listed = f"; they are listed in {self._path}" if self._path else ""
        return f"{self._count()} cannot be read and are left out{listed}" if self._errors else ""

    def _count(self) -> str:
        return f"{len(self._errors):,} of {self.n:,} pictures"

    def _where(self) -> str:
        return f" (all that were found are listed in {self._path})" if self._path else ""

    def _append(self, error: BadImageError) -> None:
        """Add a line to the list unless the file is on it, from an earlier run or another process."""
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
                with suppress(OSError):  # no locks there; a line is then twice in the list, at worst
                    lock_file(file, wait=True)
                torn = self._read_list(file)
                if name not in self._listed:
                    os.write(file, b"\n" + line if torn else line)
            finally:
                os.close(file)
        except OSError as failure:  # a full disk ends the run where it saves; what is missing here is only a list
            print(f"warning: {self._path} cannot be written ({failure.strerror})", file=sys.stderr)
            self._path = None

    def _read_list(self, file: int) -> bool:
        """Learn the lines that were written since the last call; true where the last one was cut off."""
        os.lseek(file, self._read, os.SEEK_SET)
        tail = os.read(file, max(0, os.fstat(file).st_size - self._read))
        whole = tail[: tail.rfind(b"\n") + 1]
        self._read += len(whole)
        self._listed.update(line.split(b"\t", 1)[0] for line in whole.splitlines())
        return len(whole) < len(tail)


def errors_of(read: Callable[[T], object], things: Iterable[T]) -> Iterator[BadImageError | None]:
    """Read things in threads, and return in their order what is wrong with each; None for one that can be read."""

    def error_of(thing: T) -> BadImageError | None:
        try:
            read(thing)
        except BadImageError as error:
            return error
        return None

    return map_in_threads(error_of, things)


class BadPart(NamedTuple):
    """The bad files of one split, whose first image has the place `first` in the data set."""

    files: BadFiles
    first: int

    def __contains__(self, place: object) -> bool:
        return isinstance(place, int) and self.first + place in self.files

    def add(self, place: int, error: BadImageError) -> None:
        """Report the picture at a place of the split. Raises BadFileError as `BadFiles.add` does."""
        self.files.add(self.first + place, error)


def one_line(text: str) -> str:
    r"""Text in which whatever would break a line, or is no character at all, is written as Python escapes it: `\n`."""
    return "".join(
        c if c.isprintable() and c != "\\" else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )
