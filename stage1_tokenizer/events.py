"""What TensorBoard shows of a run. It is a convenience: where it cannot be written, the training goes on without it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter


class Events:
    """TensorBoard's event file in a folder. The first failure is told to `warn`, and nothing is written after it."""

    def __init__(self, folder: Path, purge_step: int | None, warn: Callable[[str], None]) -> None:
        """`purge_step`: hide what an earlier, interrupted run has written from this step on."""
        self._warn = warn
        self._writer: SummaryWriter | None = None
        self._try(lambda: self._open(folder, purge_step))

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

    def _open(self, folder: Path, purge_step: int | None) -> None:
        self._writer = SummaryWriter(folder, purge_step=purge_step)

    def _write(self, method: str, *arguments: Any) -> None:
        if self._writer is not None:
            self._try(lambda: getattr(self._writer, method)(*arguments))

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # whatever a tracker raises is no reason to lose a run
            self._writer = None
            self._warn(f"TensorBoard's events cannot be written ({error}); the training goes on without them")
