"""What is said of one thing that was looked at, on one line."""

from pathlib import Path
from typing import Literal, NamedTuple

from stage1_tokenizer.data.bad_files import one_line

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
