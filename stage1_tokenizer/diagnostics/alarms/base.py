"""The base class of alarms, and the list of a run's alarms that tracks when each begins and ends."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple


class LogEntry(NamedTuple):
    """One entry of a run's log."""

    step: int
    interval: int
    """Steps since the previous training entry; the entry's codes were counted over these."""
    scalars: Mapping[str, float]
    """Finite values by name, e.g. `train/total`."""


class Alarm(ABC):
    """One problem to watch for."""

    name: ClassVar[str]
    entries: ClassVar[int] = 3
    """Entries in a row that must show the problem: one bad entry may be one odd batch."""
    reads: tuple[str, ...]
    """Scalars that the alarm needs; it skips entries without them."""

    @abstractmethod
    def look(self, entry: LogEntry) -> str | None:
        """Return a message if the entry shows the problem (what happened, the value, what to try), else None."""


class Alarms:
    """All alarms of a run, and the state of each."""

    def __init__(self, alarms: Sequence[Alarm]) -> None:
        self._alarms = alarms
        self._is_on = [False] * len(alarms)
        self._contrary = [0] * len(alarms)  # entries in a row that contradict the alarm's state, on or off
        self._last_step = 0

    def look(self, step: int, scalars: Mapping[str, float]) -> list[tuple[str, str]]:
        """Read the log entry of a step; return name and message of each alarm that begins with it."""
        finite = {name: value for name, value in scalars.items() if math.isfinite(value)}
        entry = LogEntry(step, step - self._last_step, finite)
        if "train/total" in scalars:
            self._last_step = step
        begun = []
        for number, alarm in enumerate(self._alarms):
            if not finite.keys() >= set(alarm.reads):
                continue
            message = alarm.look(entry)
            is_seen = message is not None
            self._contrary[number] = 0 if is_seen == self._is_on[number] else self._contrary[number] + 1
            if self._contrary[number] < alarm.entries:
                continue
            # Two alarms may share a name (dead codes in training and in validation): the user is told once.
            names_on = {other.name for other, is_on in zip(self._alarms, self._is_on, strict=True) if is_on}
            self._is_on[number], self._contrary[number] = is_seen, 0
            if message is not None and alarm.name not in names_on:
                begun.append((alarm.name, message))
        return begun
