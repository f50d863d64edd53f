"""A tiny run of stage two's train.py, for tests: arguments, and the call in this process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from stage1_tokenizer.engine.run import Run
from tests.helpers.commands import Ended, names_of, run
from tests.helpers.training import StoppedError

SCRIPT = "stage2_prior/train.py"
TINY = {
    "prior.layers": 1,
    "prior.width": 16,
    "prior.heads": 2,
    "prior.dropout": 0.1,
    "prior.label_dropout": 0.5,
    "optim.warmup_steps": 2,
    "batch_size": 6,
    "steps": 10,
    "log_every": 1,
    "save_every": 1,
    "validate_every": 5,
    "keep": 100,
    "samples": 2,
}


def flags(out: Path, tokenizer: Path, **options: Any) -> list[str]:
    """Return the command line of a tiny run. Options have two underscores for a dot."""
    given = TINY | {key.replace("__", "."): value for key, value in options.items()}
    pairs = {"tokenizer": tokenizer, "out": out, **given}
    pairs = {key: value for key, value in pairs.items() if key != "report"}
    words = [
        word for key, value in pairs.items() for word in ([f"--{key}"] if value is True else [f"--{key}", str(value)])
    ]
    return words if given.get("report") else [*words, "--no-report"]


def train(
    out: Path,
    tokenizer: Path,
    stop_after: int | None = None,
    change: Callable[[dict[str, Any]], object] = lambda _: None,
    **options: Any,
) -> Ended:
    """Run a training in this process.

    stop_after: step after whose save the run is aborted. change: function that may replace the script's names.
    """
    names = names_of(SCRIPT)
    change(names)
    save_state = Run._save_state

    def stopping(self: Run, step: int) -> None:
        save_state(self, step)
        if step == stop_after:
            raise StoppedError

    try:
        with patch.object(Run, "_save_state", stopping):
            return run(names["main"], *flags(out, tokenizer, **options))
    except StoppedError:
        return Ended(-9, "", "")
