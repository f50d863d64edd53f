"""The arithmetic of a training, as its states record it. A resume must choose the same, or it is no longer one run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from stage1_tokenizer.engine import processor
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.engine.processor import VARIABLE, FastPath


class Arithmetic:
    """Mixed precision, and the processor's fast paths that change how this training rounds."""

    def __init__(self, accelerator: Accelerator, fast_paths: Sequence[FastPath]) -> None:
        """fast_paths: those that this training's float32 on a CPU meets; on a GPU or in bfloat16 it meets none."""
        self._precision: str = accelerator.mixed_precision
        self._scaler = accelerator.scaler  # of float16's loss; None in other precisions
        exact = accelerator.device.type == "cpu" and self._precision == "no"
        self._fast_paths = {path: processor.takes(path) for path in fast_paths if exact}

    def record(self) -> dict[str, Any]:
        """Entries for a state's scalars."""
        scaler = {"scaler": self._scaler.state_dict()} if self._scaler else {}
        return {"precision": self._precision, "fast_paths": self._fast_paths, **scaler}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Continue with the loss scale of a state's scalars."""
        if self._scaler and "scaler" in saved:
            self._scaler.load_state_dict(saved["scaler"])

    def check(self, folder: Path, saved: Mapping[str, Any]) -> None:
        """Compare with the scalars of a state in `folder`. States of older versions record no fast paths.

        Raises:
            ConfigError: the arithmetic differs; the message names the variable to set.
        """
        if saved.get("precision") != self._precision:
            raise ConfigError(
                f"{folder} was trained with mixed precision {saved.get('precision')!r}, and would go on with "
                f"{self._precision!r}, which is no longer the same as one run. Set "
                f"ACCELERATE_MIXED_PRECISION={saved.get('precision')}, or give --allow_changed"
            )
        before = saved.get("fast_paths", {})
        changed = [path for path, now in self._fast_paths.items() if before.get(path, now) != now]
        if changed:
            wanted = ",".join(path if before[path] else f"-{path}" for path in changed)
            raise ConfigError(
                f"{folder} was trained with other fast paths, on another processor or with another {VARIABLE}, and "
                f"would go on with another rounding, which is no longer the same as one run. Set {VARIABLE}={wanted}, "
                "or give --allow_changed"
            )
