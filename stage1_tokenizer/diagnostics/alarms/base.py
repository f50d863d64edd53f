"""What an alarm is, and when one begins and is over."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple


class LogEntry(NamedTuple):
    step: int
    interval: int
    """Steps since the last entry on training, over which codes were counted."""
    scalars: Mapping[str, float]


class Alarm(ABC):
    """One thing to look for."""

    name: ClassVar[str]
    entries: ClassVar[int] = 3
    """In so many in a row it must be seen: one bad entry may be one odd batch."""
    reads: tuple[str, ...]
    """Scalars without which an entry says nothing."""

    @abstractmethod
    def look(self, entry: LogEntry) -> str | None:
        """What is seen, what it means and what to do; None where all is well."""


class Alarms:
    """All alarms of a run."""

    def __init__(self, alarms: Sequence[Alarm]) -> None:
        self._alarms = alarms
        self._on = [False] * len(alarms)
        self._row = [0] * len(alarms)  # entries in a row that speak against what is on or off
        self._last = 0

    def look(self, step: int, scalars: Mapping[str, float]) -> list[tuple[str, str]]:
        """The log entry of a step -> the name and message of each alarm that begins with it."""
        known = {name: value for name, value in scalars.items() if math.isfinite(value)}
        entry = LogEntry(step, step - self._last, known)
        if "train/total" in scalars:
            self._last = step
        begun = []
        for number, alarm in enumerate(self._alarms):
            if not known.keys() >= set(alarm.reads):
                continue
            message = alarm.look(entry)
            self._row[number] = 0 if (message is not None) == self._on[number] else self._row[number] + 1
            if self._row[number] < alarm.entries:
                continue
            names_on = {other.name for other, on in zip(self._alarms, self._on, strict=True) if on}
            self._on[number], self._row[number] = not self._on[number], 0
            if message is not None and alarm.name not in names_on:
                begun.append((alarm.name, message))
        return begun
