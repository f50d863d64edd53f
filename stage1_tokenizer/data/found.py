"""What was found in a data set: the first line that a command says, which also goes into the run's log and report."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from stage1_tokenizer.data.bad_files import one_line
from stage1_tokenizer.engine.console import say

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


def plural(number: int, one: str, many: str) -> str:
    """A number with its noun."""
    return f"{number:,} {one if number == 1 else many}"


def _listed(shown: list[str], of: int) -> str:
    return ", ".join([*shown, f"and {of - len(shown):,} more"] if of > len(shown) else shown)
