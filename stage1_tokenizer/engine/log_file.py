"""A run's logs: metrics.jsonl and alarms.jsonl, one JSON object per line with the `step` it belongs to, and events for
TensorBoard."""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from stage1_tokenizer.engine.checkpoint import write_file
from stage1_tokenizer.engine.errors import UserError

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


class Events:
    """TensorBoard's event file in a folder: a convenience, without which a command goes on.

    The first failure is told to `warn`, and nothing is written after it.
    """

    def __init__(self, folder: Path, step: int | None, warn: Callable[[str], None], suffix: str = "") -> None:
        """`step`: of what an earlier, interrupted run has written, hide what comes after it; None: hide nothing.
        `suffix`: the end of the file's name."""
        self._warn, self._others = warn, threading.excepthook
        self._writer: Any = None
        self._try(lambda: self._open(folder, None if step is None else step + 1, suffix))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._write("add_scalar", name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        self._write("add_text", name, text, step)

    def image(self, step: int, name: str, image: Tensor) -> None:
        """image (C, H, W): uint8, or floats in [0, 1]."""
        self._write("add_image", name, image, step)

    def close(self) -> None:
        if self._writer is not None:
            self._try(self._writer.close)
        threading.excepthook = self._others

    def _open(self, folder: Path, purge_step: int | None, suffix: str) -> None:
        # Imported here: a machine without TensorBoard, or with one that does not fit its other packages, can train.
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415

        before = set(threading.enumerate())
        self._writer = SummaryWriter(folder, purge_step=purge_step, filename_suffix=suffix)
        # It writes in a thread, whose failure it tells at the next event; the thread's own traceback says no more.
        threads = set(threading.enumerate()) - before
        threading.excepthook = lambda failure: None if failure.thread in threads else self._others(failure)

    def _write(self, method: str, *arguments: Any) -> None:
        if self._writer is not None:
            self._try(lambda: getattr(self._writer, method)(*arguments))

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except UserError:  # a signal's, which may come anywhere
            raise
        except Exception as error:  # whatever a tracker raises is no reason to lose a run
            self._writer = None
            self._warn(
                f"TensorBoard's events cannot be written ({error}); the command goes on without them. The figures are "
                "in metrics.jsonl too, the images in PNG files"
            )
