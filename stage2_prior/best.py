"""The best validation of a prior's training: its weights, which are those written, and an alarm when it has passed.

    validation -> look -> record (value, step, how many validations ago) and weights, in the CPU's memory

A prior learns its training images by heart sooner than a tokenizer does: on few images validation is best early and
rises from then on, while training goes on falling. Record and weights are parts of the saved state, so a resumed run
goes on with the best of the whole run; the last weights are in the state too.
"""

import copy
import math

import torch
from torch import Tensor, nn

from stage1_tokenizer.diagnostics.alarms.base import Alarm, LogEntry
from stage1_tokenizer.engine.state import Part
from stage2_prior.base import Prior
from stage2_prior.likelihood import bits

COMPARED = "validation/nats_per_token"
"""The figure, by its name in the log, that the best weights have the lowest value of."""
BEST_BY = "best_by"
"""The header's entry that names this figure, in files whose weights were chosen by it."""

TRAINING = "train/nats_per_token"
MARGIN = 0.01
"""Share by which validation must be above its best: a prior that has converged moves by less to either side."""
IN_A_ROW = 2
"""Validations in a row that must be so."""


class Record(nn.Module):
    """The best validation so far."""

    nats: Tensor
    """() float64 nats per token."""
    step: Tensor
    """() int64 optimizer steps before it; 0: there was none."""
    since: Tensor
    """() int64 validations after it, none of them better."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("nats", torch.zeros((), dtype=torch.float64))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("since", torch.zeros((), dtype=torch.int64))


class Best:
    """The best validation of a run, known to all processes, and its weights, on the main process alone."""

    def __init__(self, prior: Prior, is_main: bool) -> None:
        self.record = Record()
        self.weights = copy.deepcopy(prior).cpu() if is_main else None

    @property
    def parts(self) -> dict[str, Part]:
        """What a saved state holds of this."""
        parts: dict[str, Part] = {"best": self.record}
        return parts if self.weights is None else parts | {"best_weights": self.weights}

    @property
    def step(self) -> int:
        """Optimizer steps that the best weights have learned from; 0: nothing was validated yet."""
        return int(self.record.step)

    @torch.no_grad()
    def look(self, step: int, nats: float, prior: Prior) -> None:
        """Compare a validation after `step` steps, and keep its weights if it is better than all before.

        A value that is not finite is never better. Between equal ones the earlier stays.
        """
        if not math.isfinite(nats) or (self.step and nats >= float(self.record.nats)):
            self.record.since += 1
            return
        self.record.nats.fill_(nats)
        self.record.step.fill_(step)
        self.record.since.zero_()
        if self.weights is not None:
            mine, theirs = self.weights.state_dict(), prior.state_dict()
            for name, tensor in mine.items():
                tensor.copy_(theirs[name])

    def is_exhausted(self, patience: int | None) -> bool:
        """True if the last `patience` validations, or more, brought nothing better."""
        return patience is not None and int(self.record.since) >= patience

    def described(self) -> dict[str, str]:
        """What the header of the weights says of this; nothing before the first validation."""
        if not self.step:
            return {}
        return {"step": str(self.step), BEST_BY: COMPARED, "best_value": repr(float(self.record.nats))}

    def in_words(self, done: int) -> str:
        """Which weights a run of `done` steps has written."""
        if not self.step:
            return f"those of step {done:,}: nothing was validated"
        last = " and last" if self.step == done else ""
        best = f"best on validation ({bits(float(self.record.nats)):.3f} bits per token)"
        kept = "" if last else f"; those of step {done:,} are in state/"
        return f"those of step {self.step:,}, {best}{last}{kept}"


class Overfitting(Alarm):
    """Validation is above its best, and training, on the mean since the last validation, below what it was then."""

    name = "overfitting"
    entries = 1  # IN_A_ROW counts validations, between which entries on training come
    reads = ()

    def __init__(self) -> None:
        self._since: list[float] = []  # training, since the last validation
        self._best: tuple[float, float, int] | None = None  # validation, training and step of the best
        self._row = 0
        self._message: str | None = None

    def look(self, entry: LogEntry) -> str | None:
        if TRAINING in entry.scalars:
            self._since.append(entry.scalars[TRAINING])
        if COMPARED in entry.scalars and self._since:
            training = sum(self._since) / len(self._since)
            self._since = []
            self._message = self._judge(entry.step, entry.scalars[COMPARED], training)
        return self._message

    def _judge(self, step: int, validation: float, training: float) -> str | None:
        if self._best is None or validation < self._best[0]:
            self._best, self._row = (validation, training, step), 0
            return None
        best, then, at = self._best
        self._row = self._row + 1 if validation > best * (1 + MARGIN) and training < then else 0
        if self._row < IN_A_ROW:
            return None
        return (
            f"validation is at {bits(validation):.3f} bits per token, {bits(best):.3f} at its best (step {at:,}), "
            f"while training fell from {bits(then):.3f} to {bits(training):.3f}: the prior learns its training images "
            "by heart. The weights of the best validation are kept, and more steps are unlikely to improve them: "
            "--patience 3 ends such a run. To get further: more images, more --views of each (with --data.flip, "
            "--data.random_crop), --prior.dropout 0.1, or a smaller prior"
        )
