"""What TensorBoard shows of a run. It is a convenience: where it cannot be written, the training goes on without it."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from stage1_tokenizer.errors import UserError


class Events:
    """TensorBoard's event file in a folder. The first failure is told to `warn`, and nothing is written after it."""

    def __init__(self, folder: Path, step: int, warn: Callable[[str], None]) -> None:
        """`step`: of what an earlier, interrupted run has written, hide what comes after it."""
        self._warn, self._others = warn, threading.excepthook
        self._writer: SummaryWriter | None = None
        self._try(lambda: self._open(folder, step + 1))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._write("add_scalar", name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        self._write("add_text", name, text, step)

    def image(self, step: int, name: str, image: Tensor) -> None:
        """image (C, H, W) in [0, 1]."""
        self._write("add_image", name, image, step)

    def close(self) -> None:
        if self._writer is not None:
            self._try(self._writer.close)
        threading.excepthook = self._others

    def _open(self, folder: Path, purge_step: int) -> None:
        before = set(threading.enumerate())
        self._writer = SummaryWriter(folder, purge_step=purge_step)
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
            self._warn(f"TensorBoard's events cannot be written ({error}); the training goes on without them")
