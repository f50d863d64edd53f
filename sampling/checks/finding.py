"""The result of one check of a file or folder, on one line."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple, Self

from stage1_tokenizer.data.bad_files import one_line
from stage1_tokenizer.engine.state import TEMPORARY

Verdict = Literal["ok", "bad", "note"]
"""ok: undamaged, fits the files beside it, can be read by this version. bad: the opposite of one of these. note:
harmless, or not something that can be judged."""


class Finding(NamedTuple):
    """A verdict on one file or folder, with a text that says why."""

    verdict: Verdict
    path: Path
    text: str

    @classmethod
    def ok(cls, path: Path, text: str) -> Self:
        """Return a finding with the verdict ok."""
        return cls("ok", path, text)

    @classmethod
    def bad(cls, path: Path, text: str) -> Self:
        """Return a finding with the verdict bad."""
        return cls("bad", path, text)

    @classmethod
    def note(cls, path: Path, text: str) -> Self:
        """Return a finding with the verdict note."""
        return cls("note", path, text)

    @classmethod
    def of_error(cls, path: Path, error: Exception) -> Self:
        """Return a bad finding with the error's message, without the path at its start, which the line has already."""
        if isinstance(error, OSError):
            return cls.bad(path, f"cannot be read ({error.strerror})")
        return cls.bad(path, str(error).removeprefix("data.root ").removeprefix(f"{path}: "))

    def __str__(self) -> str:
        """Return the line that check.py prints."""
        return f"{self.verdict:<4} {one_line(str(self.path))}: {one_line(' '.join(self.text.split()))}"


def check_leftovers(folder: Path, holder: str | None) -> Iterator[Finding]:
    """Note each unfinished file of a killed process directly in a folder. No command ever reads files of these names.

    holder: the process that uses the folder now, if any.
    """
    written = "is being written, or " if holder is not None else ""
    for path in sorted(folder.glob(f"{TEMPORARY}*")):
        yield Finding.note(path, f"{written}is left over from a write that was cut off; harmless")
