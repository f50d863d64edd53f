"""The logs of a run: metrics.jsonl and alarms.jsonl, one JSON object with a `step` per line, and TensorBoard events."""

import json
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from stage1_tokenizer.engine.errors import UserError
from stage1_tokenizer.engine.files import write_file

METRICS_FILE = "metrics.jsonl"
"""Name of the log of scalars in a run's folder."""
LAST_STEP, LARGEST = 2**53, 1e300
"""Largest step and largest value of a curve; larger ones come from a damaged file."""


class Curve(NamedTuple):
    """One scalar over the steps at which it was logged."""

    steps: list[int]
    values: list[float]


def read_log(log: Path) -> list[dict[str, Any]]:
    """Return the entries of a log in order; an empty list if there is no file.

    Lines that are no JSON object with a step are skipped: a killed process left them incomplete, or another process is
    writing them.
    """
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
    """Return all scalars of a metrics.jsonl by name; an empty dictionary if there is no file."""
    curves: dict[str, Curve] = {}
    for entry in read_log(log):
        if not 0 <= entry["step"] <= LAST_STEP:
            continue
        for name, value in entry.items():
            if name != "step" and isinstance(value, (int, float)) and abs(value) <= LARGEST:
                curve = curves.setdefault(name, Curve([], []))
                curve.steps.append(entry["step"])
                curve.values.append(float(value))
    return curves


def drop_entries_after(log: Path, step: int) -> None:
    """Remove the entries of later steps, which a resumed run does again. Raise StorageError if that fails."""
    entries = [entry for entry in read_log(log) if entry["step"] <= step]
    if log.exists():
        write_file(log, "".join(json.dumps(entry) + "\n" for entry in entries).encode())


def sync_log(log: Path) -> None:
    """Flush a log to disk, so that after a power cut it is as complete as the state saved with it."""
    if log.exists():
        with log.open("rb") as file:
            os.fsync(file.fileno())


class EventWriter:
    """Writer of TensorBoard's event file in a folder. The command continues if it fails.

    The first failure is reported to `warn`; after it nothing more is written.
    """

    def __init__(self, folder: Path, step: int | None, warn: Callable[[str], None], suffix: str = "") -> None:
        """Open a new event file.

        step: hide what an earlier, interrupted run wrote after this step; None: hide nothing.
        suffix: the end of the file's name.
        """
        self._warn, self._former_hook = warn, threading.excepthook
        self._writer: Any = None
        self._try(lambda: self._open(folder, None if step is None else step + 1, suffix))

    def add_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write the scalars of a step by their names."""
        for name, value in values.items():
            self._write("add_scalar", name, value, step)

    def add_text(self, step: int, name: str, text: str) -> None:
        """Write a text of a step."""
        self._write("add_text", name, text, step)

    def add_image(self, step: int, name: str, image: Tensor) -> None:
        """Write an image (C, H, W) of a step: uint8, or floats in [0, 1]."""
        self._write("add_image", name, image, step)

    def close(self) -> None:
        """Write what is buffered, and close the file."""
        if self._writer is not None:
            self._try(self._writer.close)
        threading.excepthook = self._former_hook

    def _open(self, folder: Path, purge_step: int | None, suffix: str) -> None:
        # Imported here, so that training works without TensorBoard, or with a version that does not fit other packages.
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415

        before = set(threading.enumerate())
        self._writer = SummaryWriter(folder, purge_step=purge_step, filename_suffix=suffix)
        # The writer works in a thread and reports a failure at the next event; its traceback adds nothing.
        threads = set(threading.enumerate()) - before
        threading.excepthook = lambda failure: None if failure.thread in threads else self._former_hook(failure)

    def _write(self, method: str, *arguments: Any) -> None:
        if self._writer is not None:
            self._try(lambda: getattr(self._writer, method)(*arguments))

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except UserError:  # raised by a signal, at any line
            raise
        except Exception as error:  # no error of a log viewer may end a run
            self._writer = None
            self._warn(
                f"TensorBoard's events cannot be written ({error}). The command continues without them; metrics.jsonl "
                "has the same numbers, and PNG files have the images"
            )
