"""The summary of a data set for the console, and data.json: the record by which a resume recognises its data."""

import json
import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, NamedTuple, Self

from pydantic import Field, TypeAdapter

from stage1_tokenizer.data.bad_files import one_line
from stage1_tokenizer.engine.console import say
from stage1_tokenizer.engine.files import write_file

DATA_FILE = "data.json"
MAX_NAMED = 10
"""Number of classes, and of kinds of ignored files, that the first line names."""


@dataclass(frozen=True)
class DataSummary:
    """Number of images in a data set, and of the other files beside them."""

    origin: str
    """Source of the images, as the end of the first line: "under PATH", "of mnist"."""
    train: int
    """Number of images to train on."""
    validation: int
    """Number of images to validate on."""
    shared: bool = False
    """True if both splits are the same images."""
    classes: Mapping[str, int | None] = field(default_factory=dict)
    """Number of images of each class (None: unknown); empty for a data set without classes."""
    ignored: Mapping[str, int] = field(default_factory=dict)
    """Number of files that are no data, by their kind."""
    notes: tuple[str, ...] = ()
    """Decisions, and oddities that the user should know."""

    @property
    def images(self) -> int:
        """Number of images of both splits together."""
        return self.train if self.shared else self.train + self.validation

    def lines(self) -> list[str]:
        """Return the lines for the console: images, classes and ignored files; the splits; one line for each note."""
        classes = "without classes"
        if self.classes:
            classes = f"in {format_count(len(self.classes), 'class', 'classes')} ({_name_first(self.classes.items())})"
        first = f"{format_count(self.images, 'image', 'images')} {classes} {self.origin}"
        if total := sum(self.ignored.values()):
            kinds = sorted(self.ignored.items(), key=lambda pair: -pair[1])
            first += f"; {format_count(total, 'file', 'files')} ignored ({_name_first(kinds)})"
        if self.shared:
            second = "all are trained on, and validated on too"
        else:
            second = f"{self.train:,} to train on, {self.validation:,} to validate on"
        return [one_line(line) for line in (first, second, *(f"note: {note}" for note in self.notes))]


def print_data_summary(summary: DataSummary) -> None:
    """Print the summary of a data set, in the main process."""
    if os.environ.get("RANK", "0") == "0":
        for line in summary.lines():
            say(f"data: {line}" if not line.startswith("note: ") else f"      {line}")


def format_count(number: int, one: str, many: str | None = None) -> str:
    """Return a number with its noun in singular or plural. `many`: the plural; None: `one` with an s."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _name_first(sizes: Collection[tuple[str, int | None]]) -> str:
    named = [name if number is None else f"{name} {number:,}" for name, number in islice(sizes, MAX_NAMED)]
    return ", ".join([*named, f"and {len(sizes) - MAX_NAMED:,} more"] if len(sizes) > MAX_NAMED else named)


class DataRecord(NamedTuple):
    """The data of a run."""

    found: Annotated[list[str], Field(min_length=2)]
    """Lines of the data set's summary: the first has the images and classes, the second the sizes of the splits."""
    identity: dict[str, str]
    """The identity of each split; it does not depend on where the data lies."""
    classes: list[str]
    """Names of the classes in the order of their labels."""

    @classmethod
    def saved_in(cls, folder: Path) -> Self | None:
        """Read the record in a run's folder; None if it is damaged or missing (earlier versions wrote none)."""
        with suppress(OSError, ValueError, RecursionError):
            return TypeAdapter(cls).validate_python(json.loads((folder / DATA_FILE).read_text(encoding="utf-8")))
        return None

    def write(self, folder: Path) -> None:
        """Write the record into a run's folder.

        Raises:
            StorageError: no space, or no permission.
        """
        write_file(folder / DATA_FILE, json.dumps(self._asdict(), indent=1, ensure_ascii=False).encode())

    def differences(self, now: Self) -> list[str]:
        """Return one line with the data of a run and the data that is there now; an empty list if they are the same."""
        if self.identity == now.identity and self.classes == now.classes:
            return []
        splits = [split for split, identity in now.identity.items() if self.identity.get(split) != identity]
        changed = f"the files of {' and '.join(splits)}" if splits else "the order of the classes"
        return [f"the data, {changed}: {self.found[0]} ({self.found[1]}) -> {now.found[0]} ({now.found[1]})"]
