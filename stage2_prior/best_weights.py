"""The weights of the best validation of a prior's training, and the alarm for overfitting.

    validation -> BestWeights.update -> record (value, step, validations since) and a copy of the weights on the CPU

A prior overfits sooner than a tokenizer: on few images the validation is best early, then rises, while the training
loss still falls. So prior.safetensors gets the weights of the best validation. The record and these weights are parts
of the saved state, so a resumed run knows the best of the whole run; the last weights are in the state too.
"""

import copy
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from stage1_tokenizer.diagnostics.alarms.base import Alarm, Alarms, LogEntry
from stage1_tokenizer.engine.checkpoint import read_header, read_weights, to_cpu, write_weights
from stage1_tokenizer.engine.errors import BadFileError
from stage1_tokenizer.engine.state import Part
from stage2_prior.base import Prior
from stage2_prior.likelihood import nats_to_bits

BEST_METRIC = "validation/nats_per_token"
"""Name in the log of the metric that the best weights minimise."""
BEST_BY = "best_by"
"""Header entry that names this metric, in files whose weights were chosen by it."""

TRAINING_METRIC = "train/nats_per_token"
MARGIN = 0.01
"""Share by which validation must exceed its best value. A converged prior varies by less."""
IN_A_ROW = 2
"""Validations in a row that must exceed the best value by the margin."""


class BestRecord(nn.Module):
    """The best validation so far, as buffers of a saved state."""

    nats: Tensor
    """Best nats per token, () float64."""
    step: Tensor
    """Optimizer steps before the best validation, () int64; 0: nothing was validated yet."""
    since: Tensor
    """Validations after the best one, () int64."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("nats", torch.zeros((), dtype=torch.float64))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("since", torch.zeros((), dtype=torch.int64))


class BestWeights:
    """The record of the best validation, on all processes, and its weights, on the main process only."""

    def __init__(self, validated: Prior, is_main: bool) -> None:
        """validated: the prior that is validated, which the training changes in place."""
        self._validated = validated
        self._record = BestRecord()
        self._weights = copy.deepcopy(validated).cpu() if is_main else None

    @property
    def parts(self) -> dict[str, Part]:
        """The parts of the saved state."""
        parts: dict[str, Part] = {"best": self._record}
        return parts if self._weights is None else parts | {"best_weights": self._weights}

    @property
    def step(self) -> int:
        """Optimizer steps of the best weights; 0: nothing was validated yet."""
        return int(self._record.step)

    @torch.no_grad()
    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Compare the validation after `step` steps with the best one; keep its weights if it is better.

        A value that is not finite is never better. Of equal values the earlier one stays.
        """
        nats = metrics[BEST_METRIC]
        if not math.isfinite(nats) or (self.step and nats >= float(self._record.nats)):
            self._record.since += 1
            return
        self._record.nats.fill_(nats)
        self._record.step.fill_(step)
        self._record.since.zero_()
        if self._weights is not None:
            validated = self._validated.state_dict()
            for name, tensor in self._weights.state_dict().items():
                tensor.copy_(validated[name])

    def is_exhausted(self, patience: int | None) -> bool:
        """Return True if the last `patience` validations, or more, were not better than the best; None: never."""
        return patience is not None and int(self._record.since) >= patience

    def write(self, path: Path, header: Mapping[str, str], step: int) -> None:
        """Write the best weights to a file; before the first validation, those after `step` steps. Main process only.

        A file that holds exactly these weights gets a new time only, so that entries that other commands have added to
        its header stay with the weights.
        """
        prior, entries = self._validated, {**header, "step": str(step)}
        if self.step and self._weights is not None:
            prior = self._weights
            entries |= {"step": str(self.step), BEST_BY: BEST_METRIC, "best_value": repr(float(self._record.nats))}
        if _holds(path, prior, entries):
            path.touch()
        else:
            write_weights(path, prior, "prior", entries)

    def summary(self, done: int) -> str:
        """Say which weights a run of `done` steps has written."""
        if not self.step:
            return f"those of step {done:,}: nothing was validated"
        last = " and last" if self.step == done else ""
        best = f"best on validation ({nats_to_bits(float(self._record.nats)):.3f} bits per token)"
        kept = "" if last else f"; those of step {done:,} are in state/"
        return f"those of step {self.step:,}, {best}{last}{kept}"


def _holds(path: Path, prior: Prior, entries: Mapping[str, str]) -> bool:
    """Return True if a file has these entries in its header, and exactly these weights."""
    if not path.exists():
        return False
    try:
        if not entries.items() <= read_header(path, "prior").items():  # the usual case, without reading the weights
            return False
        saved = read_weights(path, "prior")[0]
    except BadFileError:  # a damaged file is written anew
        return False
    own = to_cpu(prior.state_dict())
    return saved.keys() == own.keys() and all(torch.equal(saved[name], own[name]) for name in own)


class Overfitting(Alarm):
    """Validation is above its best value, and the training loss is below its value at that time."""

    name = "overfitting"
    entries = 1  # IN_A_ROW counts validations; entries on training come in between
    reads = ()

    def __init__(self) -> None:
        self._losses: list[float] = []  # of training, since the last validation
        self._best: tuple[float, float, int] | None = None  # validation, mean training loss and step of the best
        self._in_a_row = 0
        self._message: str | None = None

    def look(self, entry: LogEntry) -> str | None:
        """Return the alarm's message while the prior overfits, else None."""
        if TRAINING_METRIC in entry.scalars:
            self._losses.append(entry.scalars[TRAINING_METRIC])
        if BEST_METRIC in entry.scalars and self._losses:
            training = sum(self._losses) / len(self._losses)
            self._losses = []
            self._message = self._check(entry.step, entry.scalars[BEST_METRIC], training)
        return self._message

    def _check(self, step: int, validation: float, training: float) -> str | None:
        """Compare a validation, and the mean training loss before it, with those of the best; in nats per token."""
        if self._best is None or validation < self._best[0]:
            self._best, self._in_a_row = (validation, training, step), 0
            return None
        best, training_then, at = self._best
        overfits = validation > best * (1 + MARGIN) and training < training_then
        self._in_a_row = self._in_a_row + 1 if overfits else 0
        if self._in_a_row < IN_A_ROW:
            return None
        return (
            f"validation is at {nats_to_bits(validation):.3f} bits per token, {nats_to_bits(best):.3f} at best (step "
            f"{at:,}), while training fell from {nats_to_bits(training_then):.3f} to {nats_to_bits(training):.3f}: the "
            "prior overfits, it learns its training images by heart. The weights of the best validation are kept; more "
            "steps are unlikely to improve them, and --patience 3 ends such a run. Try: more images, more --views of "
            "each (with --data.flip, --data.random_crop), --prior.dropout 0.1, or a smaller prior"
        )


def build_prior_alarms() -> Alarms:
    """Build the alarms of a prior's training."""
    return Alarms([Overfitting()])
