"""The alarm of a prior that learns its training images by heart: validation rises while training falls."""

from stage1_tokenizer.diagnostics.alarms.base import Alarm, Entry
from stage2_prior.best import COMPARED
from stage2_prior.likelihood import bits

TRAINING = "train/nats_per_token"
MARGIN = 0.01
"""Share by which validation must be above its best: a prior that has converged moves by less to either side."""
IN_A_ROW = 2
"""Validations in a row that must be so."""


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

    def look(self, entry: Entry) -> str | None:
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
