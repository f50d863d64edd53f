"""Faults to inject into a training, which runs in a separate process, so that a real signal may kill it.

    code, words = run_processes(1, trained, out, options, partial(at_step, step=3, fault=killed))[0]

`trained` runs stage one as the command line does; `prior_trained` runs stage two. A `change` gets the script's names,
which it may replace, and the rank.
"""

import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from torch import Tensor

from stage1_tokenizer.engine.command import run_command
from stage1_tokenizer.engine.run import Run
from tests.helpers import prior_training
from tests.helpers.commands import names_of
from tests.helpers.processes import RankFailedError, run_processes
from tests.helpers.training import train

Names = dict[str, Any]
Change = Callable[[Names, int], object]
NAN = float("nan")


def nothing(names: Names, rank: int) -> None:
    """Change nothing."""


def trained(accelerator: Accelerator, out: Path, options: dict[str, Any], change: Change = nothing) -> tuple[int, str]:
    """Run a tiny stage-one training. Returns exit code and stderr."""
    return ended(lambda: train(accelerator, out, options, None, change))


def prior_trained(
    accelerator: Accelerator, out: Path, tokenizer: Path, options: dict[str, Any], change: Change = nothing
) -> tuple[int, str]:
    """Run a tiny stage-two training. Options have two underscores for a dot. Returns exit code and stderr."""
    names = names_of(prior_training.SCRIPT)
    change(names, accelerator.process_index)
    sys.argv = [prior_training.SCRIPT, *prior_training.flags(out, tokenizer, **options)]
    return ended(names["main"])


def ended(main: Callable[[], object]) -> tuple[int, str]:
    """Run a command in this process. Returns exit code and stderr."""
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err):
            run_command(lambda: (main(), None)[1])
    except SystemExit as exit_:
        return int(exit_.code or 0), err.getvalue()
    return 0, err.getvalue()


def dies(function: Callable[..., Any], *args: Any, processes: int = 1) -> None:
    """Run a function in processes, and assert that one of them dies without a message."""
    with pytest.raises(RankFailedError, match="died without a word"):
        run_processes(processes, function, *args)


def killed() -> None:
    """Kill this process, by SIGKILL."""
    os.kill(os.getpid(), signal.SIGKILL)


def send_signal(number: signal.Signals) -> None:
    """Send a signal to this process."""
    os.kill(os.getpid(), number)


def at_step(names: Names, rank: int, step: int, fault: Callable[[], object], on_rank: int = 0) -> None:
    """Cause a fault in the given step (counted from 1), when its gradients are computed but not yet used."""
    if rank != on_rank:
        return
    guard_class = names["FiniteGuard"]

    class Faulty(guard_class):  # type: ignore[misc, valid-type]
        def check(self, done: int, *args: Any, **kwargs: Any) -> Any:
            if done == step and self._name != "discriminator":
                fault()
            return super().check(done, *args, **kwargs)

    names["FiniteGuard"] = Faulty


def at_save(names: Names, rank: int, step: int, fault: Callable[[], object]) -> None:
    """Cause a fault just before the state of a step is written."""
    save = Run.save

    def faulty(run: Run, done: int) -> None:
        if done == step:
            fault()
        save(run, done)

    setattr(Run, "save", faulty)  # noqa: B010


def nan_pixels(names: Names, rank: int, steps: range, on_rank: int = 0) -> None:
    """Put a NaN into one pixel of the batches of these steps (counted from 1), on one rank."""
    batches, normalise = names["training_batches"], names["normalise"]
    now = [0]

    def counted(images: Any, order: Any, first: int, *args: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for now[0], batch in enumerate(batches(images, order, first, *args), start=first + 1):
            yield batch

    def spoilt(pixels: Tensor) -> Tensor:
        x: Tensor = normalise(pixels)
        if now[0] in steps and rank == on_rank and len(x) > 1:
            x[1, 0, 3, 5] = NAN
        return x

    names.update(training_batches=counted, normalise=spoilt)


def remembered(names: Names, rank: int, kept: dict[str, Any]) -> None:
    """Store a reference to every part of the run, to read its weights in memory."""
    resume = Run.resume

    def watched(run: Run, given: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        kept.update(given)
        resume(run, given, *args, **kwargs)

    setattr(Run, "resume", watched)  # noqa: B010


def weights_of(accelerator: Accelerator, out: Path, options: dict[str, Any], change: Change) -> dict[str, Any]:
    """Run a training. Returns exit code, stderr, and the tokenizer's tensors in memory at the end."""
    kept: dict[str, Any] = {}

    def changed(names: Names, rank: int) -> None:
        remembered(names, rank, kept)
        change(names, rank)

    code, err = trained(accelerator, out, options, changed)
    arrays: dict[str, Any] = {name: value.numpy().copy() for name, value in kept["tokenizer"].state_dict().items()}
    return {"code": code, "err": err, "weights": arrays}


def chained(names: Names, rank: int, changes: list[Change]) -> None:
    """Apply several changes."""
    for change in changes:
        change(names, rank)


def sending(step: int, number: signal.Signals, on_rank: int = 0) -> Change:
    """Return the change that sends a signal in a step."""
    return partial(at_step, step=step, fault=partial(send_signal, number), on_rank=on_rank)
