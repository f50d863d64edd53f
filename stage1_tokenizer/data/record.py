"""The images that were found in a data set, and data.json: by it a resume knows the data of its run again."""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple, Self

from pydantic import Field, TypeAdapter

from stage1_tokenizer.data.bad_files import one_line
from stage1_tokenizer.engine.console import say
from stage1_tokenizer.engine.files import write_file

DATA_FILE = "data.json"
MOST = 10
"""Classes, and kinds of ignored files, that the line names."""


@dataclass(frozen=True)
class Found:
    """The images of a data set, and what lies beside them."""

    where: str
    """The end of the line: under which folder, or of which published set."""
    train: int
    validation: int
    shared: bool = False
    """True if the splits are the same images."""
    classes: Mapping[str, int | None] = field(default_factory=dict)
    """Number of images of each class (None: unknown); empty where there are no classes."""
    ignored: Mapping[str, int] = field(default_factory=dict)
    """Number of files that are no data, by their kind."""
    notes: tuple[str, ...] = ()
    """What was decided, and what is odd."""

    @property
    def images(self) -> int:
        """Number of images of both splits together."""
        return self.train if self.shared else self.train + self.validation

    def lines(self) -> list[str]:
        """The images with their classes and what was ignored; the splits; a line for each note."""
        classes = "without classes"
        if self.classes:
            first_ones = list(self.classes.items())[:MOST]
            shown = [name if number is None else f"{name} {number:,}" for name, number in first_ones]
            classes = f"in {plural(len(self.classes), 'class', 'classes')} ({_listed(shown, len(self.classes))})"
        first = f"{plural(self.images, 'image', 'images')} {classes} {self.where}"
        if total := sum(self.ignored.values()):
            kinds = sorted(self.ignored.items(), key=lambda pair: -pair[1])
            shown = [f"{kind} {number:,}" for kind, number in kinds[:MOST]]
            first += f"; {plural(total, 'file', 'files')} ignored ({_listed(shown, len(kinds))})"
        if self.shared:
            second = "all are trained on, and validated on too"
        else:
            second = f"{self.train:,} to train on, {self.validation:,} to validate on"
        return [one_line(line) for line in (first, second, *(f"note: {note}" for note in self.notes))]


def announce(found: Found) -> None:
    """Say what was found, in the main process."""
    if os.environ.get("RANK", "0") == "0":
        for line in found.lines():
            say(f"data: {line}" if not line.startswith("note: ") else f"      {line}")


def plural(number: int, one: str, many: str | None = None) -> str:
    """Return a number and its noun, e.g. `3 images`. `many`: the noun's plural; None: `one` with an s."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _listed(shown: list[str], of: int) -> str:
    return ", ".join([*shown, f"and {of - len(shown):,} more"] if of > len(shown) else shown)


class DataRecord(NamedTuple):
    """The data of a run."""

    found: Annotated[list[str], Field(min_length=2)]
    """Lines that say what was found; the first is a summary, the second says the numbers of the splits."""
    identity: dict[str, str]
    """A hash for each split; the same wherever the data lies."""
    classes: list[str]

    @classmethod
    def saved_in(cls, folder: Path) -> Self | None:
        """Read the record in a run's folder; None: there is none, as earlier versions left it, or it is damaged."""
        with suppress(OSError, ValueError, RecursionError):
            return TypeAdapter(cls).validate_python(json.loads((folder / DATA_FILE).read_text(encoding="utf-8")))
        return None

    def write(self, folder: Path) -> None:
        """Raises StorageError: no space, or no permission."""
        write_file(folder / DATA_FILE, json.dumps(self._asdict(), indent=1, ensure_ascii=False).encode())

    def differences(self, now: Self) -> list[str]:
        """Lines that say which data a run had, and which there are now; none where they are the same."""
        if self.identity == now.identity and self.classes == now.classes:
            return []
        splits = [split for split, identity in now.identity.items() if self.identity.get(split) != identity]
        what = f"the files of {' and '.join(splits)}" if splits else "the order of the classes"
        return [f"the data, {what}: {self.found[0]} ({self.found[1]}) -> {now.found[0]} ({now.found[1]})"]
