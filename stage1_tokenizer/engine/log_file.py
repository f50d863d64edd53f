"""A run's logs, metrics.jsonl and alarms.jsonl: one JSON object per line, with the `step` it belongs to."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from stage1_tokenizer.engine.checkpoint import write_file

LAST_STEP, LARGEST = 2**53, 1e300
"""A step or a value beyond these is a damaged one."""


class Curve(NamedTuple):
    """One scalar over the steps at which it was logged."""

    steps: list[int]
    values: list[float]


def log_entries(log: Path) -> list[dict[str, Any]]:
    """The entries of a log, in order; none where there is no file. Lines that are none, as a kill leaves them, or as
    they look while another process writes them, are left out."""
    if not log.is_file():
        return []
    entries = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
            if isinstance(entry["step"], int):
                entries.append(entry)
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return entries


def read_curves(log: Path) -> dict[str, Curve]:
    """All scalars of a metrics.jsonl by name; none where there is no file. A line cut off by a stop is left out."""
    curves: dict[str, Curve] = {}
    for entry in log_entries(log):
        if not 0 <= entry["step"] <= LAST_STEP:
            continue
        for name, value in entry.items():
            if name != "step" and isinstance(value, (int, float)) and abs(value) <= LARGEST:
                curve = curves.setdefault(name, Curve([], []))
                curve.steps.append(entry["step"])
                curve.values.append(float(value))
    return curves


def forget_after(log: Path, step: int) -> None:
    """Drop the entries of steps that are about to be run again. Raises StorageError."""
    kept = [entry for entry in log_entries(log) if entry["step"] <= step]
    if log.exists():
        write_file(log, "".join(json.dumps(entry) + "\n" for entry in kept).encode())


def sync_log(log: Path) -> None:
    """Flush a log to disk: what a state has behind it must outlive a power cut as the state does."""
    if log.exists():
        with log.open("rb") as file:
            os.fsync(file.fileno())
