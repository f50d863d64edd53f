"""A verdict on one file or folder, on one line."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from stage1_tokenizer.data.bad_files import one_line
from stage1_tokenizer.engine.state import TEMPORARY

Verdict = Literal["ok", "bad", "note"]
"""ok: whole, fitting, and read by this version. bad: not so. note: harmless, or nothing that could be judged."""


class Finding(NamedTuple):
    """A verdict on a file or folder."""

    verdict: Verdict
    path: Path
    what: str

    def __str__(self) -> str:
        return f"{self.verdict:<4} {one_line(str(self.path))}: {one_line(' '.join(self.what.split()))}"


def ok(path: Path, what: str) -> Finding:
    return Finding("ok", path, what)


def bad(path: Path, what: str) -> Finding:
    return Finding("bad", path, what)


def note(path: Path, what: str) -> Finding:
    return Finding("note", path, what)


def reason(error: Exception, path: Path) -> str:
    """An error's message without the path at its beginning, since a finding begins with it."""
    return str(error).removeprefix("data.root ").removeprefix(f"{path}: ")


def check_leftovers(folder: Path, holder: str | None) -> Iterator[Finding]:
    """Note each unfinished write of a killed process directly in a folder; no reader ever looks for these names.

    holder: the process that has the folder now, if any.
    """
    written = "is being written, or " if holder is not None else ""
    for path in sorted(folder.glob(f"{TEMPORARY}*")):
        yield note(path, f"{written}is left over from a write that was cut off; harmless")
