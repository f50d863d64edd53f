"""Precision of computations: float64 on devices that have it, and the arithmetic of a training, recorded in its states:
precision, fast paths, and whether it is compiled.

A resumed run must compute with the same precision, or it differs from an uninterrupted run.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import Tensor

from stage1_tokenizer.engine import processor
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.engine.processor import FAST_PATHS_VARIABLE, FastPath


def device_of_float64(device: torch.device) -> torch.device:
    """Return the device, or the CPU if the device is an Apple GPU (mps), which has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def to_float64(x: Tensor) -> Tensor:
    """Return x in float64, on its device or on the CPU."""
    return x.to(device_of_float64(x.device)).double()


class TrainingPrecision:
    """Mixed precision of a training, and the fast paths of the processor that change its rounding."""

    def __init__(self, accelerator: Accelerator, fast_paths: Sequence[FastPath]) -> None:
        """Read the settings. fast_paths: paths that this training uses on a CPU; elsewhere it uses none."""
        self._accelerator, self._precision = accelerator, str(accelerator.mixed_precision)
        self._scaler = accelerator.scaler  # scales the loss in float16; None in other precisions
        is_on_cpu = accelerator.device.type == "cpu"
        self._fast_paths = {path: processor.takes_fast_path(path) for path in fast_paths if is_on_cpu}

    def record(self) -> dict[str, Any]:
        """Return the entries for the scalars of a state."""
        scaler = {"scaler": self._scaler.state_dict()} if self._scaler else {}
        return {
            "precision": self._precision,
            "fast_paths": self._fast_paths,
            "compiled": is_compiled(self._accelerator),
            **scaler,
        }

    def load(self, saved: Mapping[str, Any]) -> None:
        """Restore the loss scale from the scalars of a state."""
        if self._scaler and "scaler" in saved:
            self._scaler.load_state_dict(saved["scaler"])

    def check(self, folder: Path, saved: Mapping[str, Any]) -> None:
        """Compare with the scalars of a state of the run in `folder`. States of older versions have no fast paths, and
        do not say whether they were compiled.

        Raises:
            ConfigError: the precision differs; the message names the variable to set.
        """
        if saved.get("precision") != self._precision:
            raise ConfigError(
                f"{folder} was trained with mixed precision {saved.get('precision')!r} and would continue with "
                f"{self._precision!r}, so its result would differ from an uninterrupted run. Set "
                f"ACCELERATE_MIXED_PRECISION={saved.get('precision')}, or give --allow_changed"
            )
        before = saved.get("fast_paths", {})
        changed = [path for path, now in self._fast_paths.items() if before.get(path, now) != now]
        if changed:
            value = ",".join(path if before[path] else f"-{path}" for path in changed)
            raise ConfigError(
                f"{folder} was trained with other fast paths (on another processor, or with another "
                f"{FAST_PATHS_VARIABLE}) and would continue with another rounding, so its result would differ from an "
                f"uninterrupted run. Set {FAST_PATHS_VARIABLE}={value}, or give --allow_changed"
            )
        was_compiled = saved.get("compiled", is_compiled(self._accelerator))
        if was_compiled != is_compiled(self._accelerator):
            word, option = ("", "always") if was_compiled else ("not ", "never")
            raise ConfigError(
                f"{folder} was {word}compiled and would continue otherwise, with another rounding, so its result would "
                f"differ from an uninterrupted run. Give --compile {option} (a prior) or the --dynamo options of its "
                "beginning (environment.jsonl has the command), or --allow_changed"
            )


def is_compiled(accelerator: Accelerator) -> bool:
    """Return True if `accelerator.prepare` compiles models."""
    return bool(accelerator.state.dynamo_plugin.backend != DynamoBackend.NO)
