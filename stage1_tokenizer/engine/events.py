"""Events for TensorBoard. They are a convenience: where they cannot be written, a command goes on without them."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from stage1_tokenizer.engine.errors import UserError


class Events:
    """TensorBoard's event file in a folder. The first failure is told to `warn`, and nothing is written after it."""

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
